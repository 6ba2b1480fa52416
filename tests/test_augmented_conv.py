"""The attention-augmented convolution against its paper's equations, position by position."""

import math

import pytest
import torch
from golden import relative_error
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from qna_timm.layers import AugmentedConv2d


def layer(seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs: object) -> AugmentedConv2d:
    """A small one in float64, two values a head unless told."""
    torch.manual_seed(seed)
    made = dict(num_heads=2, key_dim=6, value_dim=4, relative=True, rel_size=5)
    return AugmentedConv2d(3, 10, **{**made, **kwargs}, dtype=dtype).eval()


def reference(conv: AugmentedConv2d, x: Tensor) -> Tensor:
    """Section 3 of arXiv:1904.09925, one pair of positions at a time."""
    batch, _, height, width = x.shape
    heads = conv.num_heads
    qkv = conv.qkv(x)
    query, key = qkv[:, : conv.key_dim], qkv[:, conv.key_dim : 2 * conv.key_dim]
    value = qkv[:, 2 * conv.key_dim :]
    depth, values = conv.key_dim // heads, conv.value_dim // heads
    attn = torch.zeros(batch, conv.value_dim, height, width, dtype=x.dtype)
    places = [(i, j) for i in range(height) for j in range(width)]
    for b in range(batch):
        for h in range(heads):
            part, out = slice(h * depth, (h + 1) * depth), slice(h * values, (h + 1) * values)
            for y, z in places:
                scores = []
                for i, j in places:
                    k = key[b, part, i, j]
                    if conv.rel_pos_h is not None:
                        reach = conv.rel_pos_h.shape[0] // 2
                        k = k + conv.rel_pos_h[min(max(i - y, -reach), reach) + reach]
                        k = k + conv.rel_pos_w[min(max(j - z, -reach), reach) + reach]
                    scores.append(query[b, part, y, z] @ k / math.sqrt(depth))
                weights = torch.stack(scores).softmax(0)
                mixed = [w * value[b, out, i, j] for w, (i, j) in zip(weights, places, strict=True)]
                attn[b, out, y, z] = torch.stack(mixed).sum(0)
    return torch.cat([conv.conv(x), conv.proj(attn)], dim=1)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(relative=False),
        dict(rel_size=2),  # offsets beyond the tables
        dict(num_heads=1, kernel_size=1),
        dict(key_dim=2, value_dim=8, relative=False),  # values wider than keys
    ],
    ids=str,
)
def test_against_reference(kwargs: dict) -> None:
    """Outputs and all gradients, at a size that is neither square nor even."""
    conv = layer(**kwargs)
    x = torch.randn(2, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (conv, lambda x: reference(conv, x)):
        out = run(x)
        grads = torch.autograd.grad(out.square().mean(), [x, *conv.parameters()])
        results.append([out, *grads])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_two_values_a_head_stay_with_their_head() -> None:
    """Not the release's mixture of channels and positions: a head's output is of its values."""
    conv = layer()
    with torch.no_grad():
        conv.qkv.weight[12:14] = 0.0  # the first head's values
        conv.qkv.bias[12:14] = 7.0
        conv.proj.weight.copy_(torch.eye(4, dtype=torch.float64)[:, :, None, None])
        conv.proj.bias.zero_()
        out = conv(torch.randn(1, 3, 4, 4, dtype=torch.float64))[:, -4:]
    torch.testing.assert_close(out[:, :2], torch.full_like(out[:, :2], 7.0))
    assert out[:, 2:].std() > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 4), (33, 2)])
@pytest.mark.parametrize("relative", [False, True])
def test_any_map_size(relative: bool, size: tuple[int, int]) -> None:
    conv = layer(relative=relative)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    out = conv(x)
    assert out.shape == (2, 10, *size)
    torch.testing.assert_close(conv(x[:1]), out[:1])
    torch.testing.assert_close(conv(x.to(memory_format=torch.channels_last)), out)
    torch.testing.assert_close(conv(x.mT.contiguous().mT), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relative", [False, True])
def test_huge_scores(relative: bool, dtype: torch.dtype) -> None:
    """Scores of 1e4: finite, forward and backward, in less precision too."""
    conv = layer(relative=relative, dtype=torch.float32)
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        query, key, _ = conv.qkv(x).split([6, 6, 4], dim=1)
        conv.qkv.weight[:12] *= 100 / float(max(query.abs().max(), key.abs().max()))
    conv, x = conv.to(dtype), x.to(dtype).requires_grad_()
    out = conv(x)
    out.float().square().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in conv.parameters())


def test_memory_is_not_quadratic() -> None:
    """No tensor of positions by positions is kept for backward."""
    conv = layer(dtype=torch.float32, rel_size=32)
    sizes = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        conv(torch.randn(1, 3, 32, 32, requires_grad=True))
    assert max(sizes) < 1024 * 1024 / 4


@pytest.mark.parametrize("relative", [False, True])
def test_graphs(relative: bool) -> None:
    conv = layer(relative=relative, dtype=torch.float32)
    x = torch.randn(2, 3, 5, 6)
    wanted = conv(x)
    compiled = torch.compile(conv, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(torch.export.export(conv, (x,)).module()(x), wanted)
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(conv)
    torch.testing.assert_close(scripted(x), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(conv(x).float(), wanted.detach().numpy()) < 0.05


@pytest.mark.parametrize("relative", [False, True])
def test_compiled_gradients_of_any_size(relative: bool) -> None:
    """One graph for all heights and widths."""
    conv = layer(relative=relative, dtype=torch.float32)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(conv, fullgraph=True, backend=graphs)
    for size in ((5, 6), (8, 7)):
        x = torch.randn(2, 3, *size)
        torch._dynamo.mark_dynamic(x, [2, 3])
        grads = [
            torch.autograd.grad(run(x).square().mean(), list(conv.parameters()))
            for run in (compiled, conv)
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert graphs.frame_count == 1


def test_plain_products() -> None:
    """Without fused attention the same numbers, second derivatives and forward-mode ones."""
    fused = layer()
    use_fused = use_fused_attn()
    set_fused_attn(False)
    try:
        plain = layer()
    finally:
        set_fused_attn(bool(use_fused))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(plain(x), fused(x))
    assert torch.autograd.gradgradcheck(plain, (x[:1, :, :2, :2],))
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(plain, (x,), (tangent,))
    difference = plain(x + 1e-6 * tangent) - plain(x - 1e-6 * tangent)
    torch.testing.assert_close(found, difference / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(kernel_size=2), "kernel_size must be odd, got 2"),
        (dict(num_heads=4), "num_heads must divide key_dim=6 and value_dim=4, got 4"),
        (dict(num_heads=0), "must be at least 1, got 0, 6 and 4"),
        (dict(value_dim=10), "value_dim must be less than out_chs=10, got 10"),
        (dict(rel_size=0), "rel_size must be at least 1 pixel, got 0"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)
