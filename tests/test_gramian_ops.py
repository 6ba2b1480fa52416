"""Operators of the Gramian heads, on their own."""

import torch

from qna_timm.ops import (
    class_attention,
    class_attention_reference,
    gram_matrix,
    gram_triangle,
    gram_triangle_reference,
    part_linear,
    triangle_index,
)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    index = triangle_index(3)
    assert index.tolist() == [0, 1, 2, 4, 5, 8]
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gram_triangle(x, index, 2), x)
    shapes = ((2, 2, 4), (2, 3, 5), (2, 2, 5), (8, 5), (8, 5), (10,), (10,))
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *args: class_attention(*args, 2), args)
    args = [args[0], *(torch.randn(s).double().requires_grad_() for s in ((2, 3, 4), (2, 3)))]
    for function, inputs in ((part_linear, args), (gram_matrix, args[:1])):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_operators_against_their_references() -> None:
    """Folded attention and gathered triangle against the plain forms, scores up to +-1e4."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 5)
    exact = gram_triangle_reference(x.double(), 3)
    torch.testing.assert_close(gram_triangle(x, triangle_index(5), 3).double(), exact)
    shapes = ((2, 3, 8), (3, 12, 6), (2, 3, 6), (16, 6), (16, 6), (12,), (12,))
    args = [torch.randn(shape) for shape in shapes]
    for scale in (1.0, 100.0, 2000.0):
        args[0] = args[0] / args[0].abs().max() * scale
        exact = class_attention_reference(*(arg.double() for arg in args), 2)
        found = class_attention(*args, 2)
        assert (found - exact).abs().max() < 1e-4 * exact.abs().max()
