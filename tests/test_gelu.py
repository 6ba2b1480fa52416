"""GELU by its tanh formula, with and without gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.layers import GELUTanh
from qna_timm.ops import gelu, gelu_tanh


def pytorch(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str
)
def test_inference_computes_the_same(dtype: torch.dtype, limit: float) -> None:
    x = torch.linspace(-30, 30, 100_001, dtype=dtype)
    given = x.clone()
    wanted = pytorch(x.double())
    assert gelu._is_small_inference(x)
    assert ((gelu_tanh(x) - wanted).abs() <= limit * x.abs().clamp(max=1)).all()
    assert torch.equal(x, given)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e4, -1e4, 1e30, -1e30, float("inf")])
def test_extreme_numbers(value: float) -> None:
    x = torch.full((3,), value)
    assert torch.equal(gelu_tanh(x), pytorch(x))


def test_not_a_number_stays() -> None:
    assert gelu_tanh(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]


def test_layouts() -> None:
    x = torch.randn(2, 6, 5, 4)
    maps = (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2], x[:0])
    for given in maps:
        out = gelu_tanh(given)
        torch.testing.assert_close(out, pytorch(given), rtol=1e-5, atol=1e-6)
        assert out.stride() == pytorch(given).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_pytorchs(dtype: torch.dtype) -> None:
    x = torch.randn(100, dtype=dtype)
    assert torch.equal(gelu_tanh(x), pytorch(x))


def test_gradients_are_pytorchs() -> None:
    x = torch.randn(100, requires_grad=True)
    (ours,) = torch.autograd.grad(gelu_tanh(x).sum(), x)
    (theirs,) = torch.autograd.grad(pytorch(x).sum(), x)
    assert torch.equal(ours, theirs)


def test_transforms() -> None:
    """Without gradients too, `torch.func` takes derivatives and maps over batches."""
    x, step = torch.randn(5, 7), torch.randn(5, 7)
    with torch.no_grad():
        _, ours = torch.func.jvp(gelu_tanh, (x,), (step,))
        _, theirs = torch.func.jvp(pytorch, (x,), (step,))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.func.vmap(gelu_tanh)(x), pytorch(x), rtol=1e-5, atol=1e-6)
    ours = torch.func.grad(lambda x: gelu_tanh(x).sum())(x)
    theirs = torch.func.grad(lambda x: pytorch(x).sum())(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_graphs_hold_pytorchs() -> None:
    layer, x = GELUTanh().eval(), torch.randn(2, 3)
    with torch.no_grad():
        graphs = [
            torch.export.export(layer, (x,)).module(),
            torch.jit.trace(layer, x),
            torch.jit.script(layer),
            torch.compile(layer, backend="eager", fullgraph=True),
        ]
        for graph in graphs:
            assert torch.equal(graph(x), pytorch(x))
