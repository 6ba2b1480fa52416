"""Triton kernels of learned-query attention; `test_qna_triton.py` runs these cases.

Not collected by itself: without a GPU they need Triton's interpreter, which must be chosen before
triton is imported, and another test may have imported it.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops import qna_attention, qna_attention_reference
from qna_timm.ops.qna.triton import launch as qna_triton
from qna_timm.ops.qna.triton import problem as qna_triton_problem

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.filterwarnings(
        # numpy's words on positions off the map, computed and thrown away
        "ignore:invalid value encountered:RuntimeWarning",
        "ignore:divide by zero encountered:RuntimeWarning",
        "ignore:overflow encountered:RuntimeWarning",
    ),
]


# height, width, queries, heads, head_dim, window, stride, padding
SIZES = {
    "odd-map": (5, 7, 2, 3, 4, (3, 3), 1, 1),
    "small-map": (4, 5, 2, 1, 4, (3, 3), 1, 1),
    "stride-2": (5, 6, 1, 2, 4, (3, 3), 2, 1),
    "wide-stride-2": (4, 5, 1, 1, 4, (5, 5), 2, 2),
    "kernel-over-map": (2, 3, 1, 2, 4, (5, 5), 1, 2),
    "even-kernel": (5, 4, 1, 2, 2, (4, 4), 1, 1),
    "oblong-kernel": (5, 6, 1, 2, 4, (2, 5), 1, 1),
    "whole-map": (3, 3, 3, 2, 2, (3, 3), 1, 0),
    "one-token": (1, 1, 2, 2, 3, (3, 3), 2, 1),
    "odd-channels": (4, 4, 1, 1, 5, (3, 3), 1, 1),
    "many-heads": (3, 3, 1, 11, 8, (3, 3), 1, 1),
    "broad-head": (3, 3, 1, 2, 65, (3, 3), 1, 1),
    "several-tiles": (18, 34, 1, 1, 2, (3, 3), 1, 1),
    "two-tiles": (4, 34, 1, 1, 2, (3, 3), 1, 1),
    "broad-head-at-two-parts": (17, 6, 1, 2, 12, (2, 5), 1, 1),
}


def make_inputs(
    size: str, tables: str = "both", batch: int = 2
) -> tuple[list[Tensor | None], tuple]:
    """Scores, value, bias and weight in float64, and the remaining arguments."""
    height, width, queries, heads, head_dim, window, stride, padding = SIZES[size]
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    scores = draw(batch, height, width, queries, heads)
    value = draw(batch, height, width, heads * head_dim)
    offsets = window[0] * window[1]
    bias = None if tables == "no-bias" else draw(offsets, queries, heads)
    rows = 1 if tables == "weight-per-query" else offsets
    weight = None if tables == "no-weight" else draw(rows, queries, heads)
    return [scores, value, bias, weight], (window, stride, padding)


def to(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype) for x in tensors]


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs: the interpreter takes as long for a small block as for a large one."""
    monkeypatch.setattr(qna_triton_problem, "BLOCK_BYTES", 1 << 14)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""

    def empty(*shape: int | torch.Size, **options: object) -> Tensor:
        return torch.full(shape[0] if len(shape) == 1 else shape, float("nan"), **options)

    monkeypatch.setattr(torch, "empty", empty)


def run(tensors: list[Tensor | None], args: tuple, direction: Tensor) -> list[Tensor]:
    """Output and every gradient of the kernels, on CPU."""
    inputs = [None if x is None else x.to(DEVICE) for x in tensors]
    assert qna_triton.unsupported(*inputs, *args) is None
    out, stats = qna_triton.forward(*inputs, *args)
    grad = direction.to(DEVICE, out.dtype)
    grads = qna_triton.backward(grad, *inputs, stats, *args)
    assert all((x is None) == (g is None) for x, g in zip(inputs, grads, strict=True))
    for x, g in zip(inputs, grads, strict=True):
        assert x is None or (g.shape == x.shape and g.dtype == x.dtype and g.is_contiguous())
    return [x.cpu() for x in (out, *grads) if x is not None]


def expect(tensors: list[Tensor | None], args: tuple, direction: Tensor) -> list[Tensor]:
    """The same from the reference, in float64."""
    leaves = [None if x is None else x.double().requires_grad_() for x in tensors]
    out = qna_attention_reference(*leaves, *args)
    given = [x for x in leaves if x is not None]
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), given)]


def direction_of(tensors: list[Tensor | None], args: tuple) -> Tensor:
    out = qna_attention_reference(*to(tensors, torch.float32), *args)
    gen = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=gen, dtype=torch.float64)


def compare(
    tensors: list[Tensor | None],
    args: tuple,
    limits: tuple[float, float],
    nothing: float = 1e-6,
) -> None:
    """Output by its maximum, gradients by their norm; what is nothing, to `nothing`."""
    direction = direction_of(tensors, args)
    found = run(to(tensors, torch.float32), args, direction)
    wanted = expect(to(tensors, torch.float32), args, direction)
    assert (found[0].double() - wanted[0]).abs().max() <= limits[0] * wanted[0].abs().max()
    for f, w in zip(found[1:], wanted[1:], strict=True):
        assert (f.double() - w).norm() <= limits[1] * w.norm() + nothing


@pytest.mark.parametrize(
    ("size", "tables"),
    [
        ("odd-map", "both"),
        ("small-map", "no-bias"),
        ("small-map", "no-weight"),
        ("small-map", "weight-per-query"),
        ("stride-2", "weight-per-query"),
        ("wide-stride-2", "both"),
        ("kernel-over-map", "both"),
        ("even-kernel", "both"),
        ("oblong-kernel", "weight-per-query"),
        ("whole-map", "no-bias"),
        ("one-token", "both"),
        ("odd-channels", "no-weight"),
        ("many-heads", "both"),
        ("broad-head", "both"),
    ],
)
def test_matches_reference(size: str, tables: str) -> None:
    batch = 2 if size == "odd-map" else 1
    compare(*make_inputs(size, tables, batch), (1e-5, 1e-5))


@pytest.mark.thorough
def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also several to a program that sums for the tables, and partial sums of several programs."""
    monkeypatch.setattr(qna_triton_problem, "BLOCK_BYTES", 128)
    monkeypatch.setattr(qna_triton, "TABLE_PROGRAMS", 10)
    tensors, args = make_inputs("small-map", batch=1)
    compare(tensors, args, (1e-5, 1e-5))


def tower(tensors: list[Tensor | None], scale: float) -> None:
    """Scores of +-scale, and in one image a token that towers over all others."""
    scores = tensors[0] / tensors[0].abs().max() * scale
    scores[0, 0, 0] = scale
    scores[1] = scores[1].clamp(max=-scale / 2)
    scores[1, 2, 2] = scale
    tensors[0] = scores.float().double()


@pytest.fixture(params=["cuda-cores", "tensor-cores"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels of the forward pass, whatever the window."""
    offsets = 1 if request.param == "tensor-cores" else 1 << 30
    monkeypatch.setattr(qna_triton_problem, "TENSOR_CORE_OFFSETS", offsets)


def each_once(*pairs: tuple) -> list:
    """Cases of a kernel and something else: marked where both have another case."""
    seen: set = set()
    cases = []
    for pair in pairs:
        marks = [pytest.mark.thorough] * seen.issuperset(pair)
        cases.append(pytest.param(*pair, marks=marks))
        seen.update(pair)
    return cases


# scores within and beyond what a tile's peak can serve
@pytest.mark.parametrize(
    ("form", "scale"),
    each_once(
        ("cuda-cores", 30.0), ("tensor-cores", 1e4), ("cuda-cores", 1e4), ("tensor-cores", 30.0)
    ),
    indirect=["form"],
)
def test_large_scores(scale: float, form: None) -> None:
    tensors, args = make_inputs("small-map")
    tower(tensors, scale)
    compare(tensors, args, (1e-4, 1e-3), 1e-8 if scale == 1e4 else 1e-6)


@pytest.mark.parametrize(
    "tables",
    ["both", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("no-bias", "no-weight"))],
)
def test_one_token_has_all_the_weight(tables: str, form: None) -> None:
    """Of every window, at scores of 1e4: the gradients of scores and bias are nothing."""
    tensors, args = make_inputs("small-map", tables, batch=1)
    gen = torch.Generator().manual_seed(2)
    steps = torch.linspace(-1e4, 1e4, 20, dtype=torch.float64)
    order = torch.stack([torch.randperm(20, generator=gen) for _ in range(2)], dim=1)
    tensors[0] = steps[order].view(1, 4, 5, 2, 1).float().double()
    # small integers, so that no sum or product is rounded
    tensors[1] = (2 * tensors[1]).round()
    tensors[3] = None if tensors[3] is None else (2 * tensors[3]).round()
    direction = (2 * direction_of(tensors, args)).round()
    found = run(to(tensors, torch.float32), args, direction)
    wanted = expect(tensors, args, direction)
    assert (found[0].double() - wanted[0]).abs().max() <= 1e-6
    of_scores, of_value, *others = zip(found[1:], wanted[1:], strict=True)
    assert of_scores[0].norm() <= 1e-8
    if tensors[2] is not None:
        assert others[0][0].norm() <= 1e-8
    assert (of_value[0].double() - of_value[1]).norm() <= 1e-6 * of_value[1].norm()


@pytest.mark.parametrize(
    ("offset", "spread"),
    [pytest.param(0.0, 1e3, marks=pytest.mark.thorough), (-1e4, 1.0), (-1e4, 1e3)],
)
def test_wide_bias_and_common_offset(offset: float, spread: float, form: None) -> None:
    tensors, args = make_inputs("small-map", batch=1)
    tensors[0] = (tensors[0] + offset).float().double()
    tensors[2] = (tensors[2] * spread).float().double()
    compare(tensors, args, (1e-4, 1e-3), 1e-6 if spread == 1e3 else 1e-8)


def test_not_a_number_stays_where_it_is(form: None) -> None:
    """A NaN score spoils the windows that see it and no other."""
    tensors, args = make_inputs("small-map", batch=1)
    direction = direction_of(tensors, args)
    tensors[0][0, 0, 0, 0, 0] = float("nan")
    out = run(to(tensors, torch.float32), args, direction)[0]
    finite = out.isfinite().all(dim=3)[0]
    assert not finite[:2, :2].any() and finite[2:].all() and finite[:, 2:].all()


def in_low_precision(
    scores: Tensor,
    value: Tensor,
    bias: Tensor,
    weight: Tensor,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> Tensor:
    """The formula by unfolding, every step in the type of its arguments."""
    p = padding
    scores = F.pad(scores, [0, 0, 0, 0, p, p, p, p], value=float("-inf"))
    value = F.pad(value.unflatten(3, (bias.shape[2], -1)), [0, 0, 0, 0, p, p, p, p])
    scores, value = (  # B, Y, X, ..., K
        x.unfold(1, kernel_size[0], stride).unfold(2, kernel_size[1], stride).flatten(-2)
        for x in (scores, value)
    )
    attn = (scores + bias.permute(1, 2, 0)).softmax(dim=-1) * weight.permute(1, 2, 0)
    return (attn.unsqueeze(5) * value.unsqueeze(3)).sum(dim=-1).sum(dim=3).flatten(3)


@pytest.mark.parametrize(
    ("form", "dtype"),
    each_once(
        ("cuda-cores", torch.float16),
        ("tensor-cores", torch.bfloat16),
        ("cuda-cores", torch.bfloat16),
        ("tensor-cores", torch.float16),
    ),
    indirect=["form"],
    ids=str,
)
def test_low_precision(dtype: torch.dtype, form: None) -> None:
    """At most twice the error of the formula in that type, and its rounding: mean and maximum."""
    tensors, args = make_inputs("odd-map")
    direction = direction_of(tensors, args).to(dtype).double()
    wanted = expect(tensors, args, direction)
    single = to(tensors, torch.float32)
    found = run([single[0], tensors[1].to(dtype), *single[2:]], args, direction)
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    plain = in_low_precision(*leaves, *args)
    plain = [plain, *torch.autograd.grad((plain * direction.to(dtype)).sum(), leaves)]
    assert found[0].dtype == dtype
    for f, p, w in zip(found, plain, wanted, strict=True):
        ours, theirs = (f.double() - w).abs(), (p.double() - w).abs()
        rounding = torch.finfo(dtype).eps * w.abs()
        assert ours.max() <= 2 * theirs.max() + rounding.max()
        assert ours.mean() <= 2 * theirs.mean() + rounding.mean()


@pytest.mark.thorough
def test_layouts() -> None:
    """Transposed, strided, sliced and NCHW inputs give the bits that contiguous ones give."""
    tensors, args = make_inputs("small-map")
    single = to(tensors, torch.float32)
    direction = direction_of(tensors, args)
    wanted = run(single, args, direction)
    views = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
        lambda x: x.flatten(3).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).view_as(x),
    )
    for view in views:
        maps = [view(x) for x in single[:2]]
        assert not any(x.is_contiguous() for x in maps)
        found = run([*maps, *single[2:]], args, view(direction))
        for f, w in zip(found, wanted, strict=True):
            assert torch.equal(f, w)


@pytest.mark.parametrize(
    ("size", "tables"),
    [
        ("odd-map", "no-bias"),
        ("kernel-over-map", "weight-per-query"),
        ("even-kernel", "no-weight"),
        ("whole-map", "both"),
        ("several-tiles", "both"),
        ("broad-head-at-two-parts", "both"),
    ],
)
def test_tensor_cores(size: str, tables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qna_triton_problem, "TENSOR_CORE_OFFSETS", 1)
    tensors, args = make_inputs(size, tables, batch=1)
    inputs = [None if x is None else x.to(DEVICE, torch.float32) for x in tensors]
    assert qna_triton_problem.Problem(*inputs, *args).takes_tensor_cores()
    compare(tensors, args, (1e-5, 1e-5))


def test_tiles_that_products_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower in one of two tiles, and a value that is not finite in another."""
    monkeypatch.setattr(qna_triton_problem, "TENSOR_CORE_OFFSETS", 1)
    tensors, args = make_inputs("two-tiles", batch=1)
    tensors[0][0, 3, 5] += 500.0
    compare(tensors, args, (1e-4, 1e-3))
    single = [None if x is None else x.to(DEVICE, torch.float32) for x in tensors]
    single[1][0, 1, 33, 0] = float("inf")
    found = qna_triton.forward(*single, *args)[0].cpu()
    spoilt = torch.zeros(found.shape, dtype=torch.bool)
    spoilt[0, :3, 32:, 0] = True  # one channel in the windows that see the value
    assert torch.equal(~found.isfinite(), spoilt)


def test_empty_batch() -> None:
    tensors, args = make_inputs("odd-map")
    single = to(tensors, torch.float32)
    maps = [x[:0] for x in single[:2]]
    out, *grads = run([*maps, *single[2:]], args, torch.zeros(0, 5, 7, 12))
    assert out.shape == (0, 5, 7, 12) and not any(g.any() for g in grads)


def test_through_the_public_operator() -> None:
    tensors, args = make_inputs("small-map", batch=1)
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in tensors]
    direction = direction_of(tensors, args)
    out = qna_attention(*leaves, *args, impl="triton")
    grads = torch.autograd.grad((out * direction.to(DEVICE, torch.float32)).sum(), leaves)
    for f, w in zip([out, *grads], expect(tensors, args, direction), strict=True):
        torch.testing.assert_close(f.detach().cpu().double(), w, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="float64"):
        qna_attention(*(x.to(DEVICE) for x in tensors), *args, impl="triton")


def test_what_is_unsupported() -> None:
    tensors, args = make_inputs("odd-map")
    single = [x.to(DEVICE) for x in to(tensors, torch.float32)]
    assert "float64" in qna_triton.unsupported(single[0], single[1].double(), None, None, *args)
    assert "float64" in qna_triton.unsupported(single[0].double(), single[1], None, None, *args)
    broad = single[1].new_empty(1, 5, 7, 3 * 512)
    assert "512 channels" in qna_triton.unsupported(single[0], broad, None, None, *args)
