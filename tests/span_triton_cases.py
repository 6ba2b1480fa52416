"""Triton kernels of span attention; `test_span_triton.py` runs these cases.

Not collected by itself: without a GPU they need Triton's interpreter, which must be chosen before
triton is imported, and another test may have imported it.
"""

import os

import pytest
import torch
from test_span_ops import CASES, agree, problem, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from qna_timm.ops import ring_index, span_attention
from qna_timm.ops.span.offsets import span_offsets
from qna_timm.ops.span.triton import launch as span_triton

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = pytest.mark.usefixtures("quick_interpreter")

ORDER = ("qkv", "rel_pos_h", "rel_pos_w", "mask", "floor", "num_heads", "mask_padding", "scale")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""

    given = torch.empty

    def empty(*shape: int | torch.Size, **options: object) -> Tensor:
        x = given(*shape, **options)
        return x.fill_(float("nan") if x.is_floating_point() else -(2**20))

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs: the interpreter takes as long for a small block as for a large one."""
    monkeypatch.setattr(span_triton, "TILES", ((8, 16),))
    monkeypatch.setattr(span_triton, "COLUMNS", 32)


def to_device(arguments: dict, dtype: torch.dtype) -> dict:
    """Arguments as a layer gives them: qkv in a type, the rest float32."""
    moved = {}
    for name, x in arguments.items():
        kept = dtype if name == "qkv" else torch.float32
        moved[name] = x.to(DEVICE, kept) if isinstance(x, Tensor) else x
    return moved


def compute(arguments: dict, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients of sum(out * direction), as `test_span_ops.run` has them."""
    moved = to_device(arguments, dtype)
    leaves = {}
    for name in ORDER[:4]:
        if moved[name] is not None:
            leaves[name] = moved[name].detach().requires_grad_()
    out = span_attention(**{**moved, **leaves}, impl="triton")
    make = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=make, dtype=torch.float64)
    grads = torch.autograd.grad(out, list(leaves.values()), direction.to(DEVICE, out.dtype))
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
    return [x.cpu() for x in (out.detach(), *grads)]


# A floor means nothing without a mask. One case with a mask is also run without a floor; the others
# and maps that take long are left to the thorough check.
MASKED = [case for case in CASES if case[-1] != "none"]
PLAIN = [
    pytest.param(case, 0.0, marks=[pytest.mark.thorough] * (case in MASKED[1:])) for case in CASES
]
WITH_FLOOR = [
    pytest.param(case, 1e-2, marks=[pytest.mark.thorough] * (case[1] * case[2] >= 200))
    for case in MASKED
]


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("case", "floor"), PLAIN + WITH_FLOOR, ids=str)
def test_kernels_agree(case: tuple, floor: float) -> None:
    wanted = run(problem(case, floor), "reference")
    agree(compute(problem(case, floor)), wanted, 1e-5)


@pytest.mark.parametrize("floor", [0.0, 1e-8])
def test_narrow_mask_beyond_the_map(floor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, several to a program, that skip the offsets without weight."""
    monkeypatch.setattr(span_triton, "PROGRAMS", 2)
    arguments = problem((1, 9, 5, 4, 1, 11, True, "positive"))
    near = (ring_index(11) <= 1).double()
    arguments["mask"] *= near
    arguments["floor"] = floor * near
    agree(compute(arguments), run(arguments, "reference"), 1e-5)


def test_rows_without_weight_are_not_read() -> None:
    """The kernels find the radius: rows that no query of a tile sees may hold anything."""
    arguments = to_device(problem((1, 20, 4, 4, 1, 11, False, "positive")), torch.float32)
    arguments["mask"] *= (ring_index(11) <= 1).to(DEVICE)
    arguments["floor"] = None
    assert span_triton.choose_tile(11) == (8, 4)
    for hidden in (slice(0, 7), slice(17, 20)):
        arguments["qkv"][:, hidden] = float("nan")
    assert torch.isfinite(span_attention(**arguments, impl="triton")[:, 8:16]).all()


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 5)], ids=["up", "down"])
def test_one_sided_mask(rows: slice) -> None:
    """Where queries that see a key are not where the keys are that it sees as a query."""
    arguments = problem((1, 5, 4, 4, 1, 5, False, "positive"))
    arguments["mask"].view(1, 5, 5)[:, rows] = 0
    arguments["floor"] = None
    agree(compute(arguments), run(arguments, "reference"), 1e-5)


def test_windows_without_keys() -> None:
    """Of a query that sees nothing the output is 0, and nothing has a gradient."""
    arguments = problem((1, 4, 4, 4, 2, 3, True, "positive"))
    arguments["mask"] = torch.zeros(2, 9)
    arguments["mask"][0, 0] = 0.5  # up and left, of the first head
    arguments["floor"] = None
    out, grad_qkv, *others = compute(arguments)
    value = arguments["qkv"][..., 8:10]
    assert torch.allclose(out[:, 1:, 1:, :2].double(), value[:, :-1, :-1], atol=1e-5)
    assert not out[..., 2:].any() and not out[:, 0].any() and not out[:, :, 0].any()
    assert torch.isfinite(grad_qkv).all() and not grad_qkv[:, 3, :, 8:].any()
    assert all(float(x.abs().max()) < 1e-5 for x in others)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "holes"])
def test_large_scores(dtype: torch.dtype, kind: str) -> None:
    """Scores of +-1e4, and one that towers over a map: finite, and right where they are exact."""
    arguments = problem((1, 6, 7, 4, 2, 5, False, kind), 1e-8)
    arguments["scale"] = 1.0
    qkv = arguments["qkv"].round()  # integers: products are exact in every type
    qkv[..., :8] = qkv[..., :8] * 25
    qkv[0, 2, 2, 4:8] = 200
    qkv[..., :4] = qkv[..., :4].clamp(-50, 50)
    arguments["qkv"] = qkv
    arguments.update({name: arguments[name].round() for name in ("rel_pos_h", "rel_pos_w")})
    found = compute(arguments, dtype)
    assert all(torch.isfinite(x).all() for x in found)
    wanted = run(arguments, "reference")
    agree(found[:1], wanted[:1], 2 * max(torch.finfo(dtype).eps, 1e-5))
    if dtype == torch.float32:
        agree(found, wanted, 1e-3)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "holes"])
def test_low_precision(dtype: torch.dtype, kind: str) -> None:
    """Twice the error at most of the offsets computed in that type, outputs and gradients."""
    arguments = problem((1, 8, 8, 32, 2, 5, False, kind))
    wanted = run(arguments, "reference")
    found = compute(arguments, dtype)
    low = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    leaves = [low[name].requires_grad_() for name in ORDER[:4] if low[name] is not None]
    out = span_offsets(*(low[name] for name in ORDER))
    make = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=make, dtype=torch.float64)
    plain = [out.detach(), *torch.autograd.grad((out * direction).sum(), leaves)]
    for one, other, right in zip(found, plain, wanted, strict=True):
        error, budget = (one.double() - right).abs(), (other.double() - right).abs()
        rounding = torch.finfo(dtype).eps * right.abs()
        assert float(error.max()) <= 2 * float(budget.max()) + float(rounding.max())
        assert float(error.mean()) <= 2 * float(budget.mean()) + float(rounding.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_keep_precision(dtype: torch.dtype) -> None:
    """Relative vectors are float32: scores of 100 from what no half holds."""
    arguments = problem((1, 4, 4, 16, 1, 3, False, "none"))
    arguments["qkv"] = arguments["qkv"].to(dtype).double()
    for name in ("rel_pos_h", "rel_pos_w"):
        arguments[name] = (arguments[name] * 20).float().double()
    wanted = run(arguments, "reference")[:1]
    agree(compute(arguments, dtype)[:1], wanted, 2 * torch.finfo(dtype).eps)


def test_small_weights_keep_precision() -> None:
    """In float16, where 1e-7 has one bit: weights are no factors of what is rounded."""
    arguments = problem((1, 4, 4, 16, 1, 3, False, "positive"))
    arguments["qkv"] /= 4
    arguments["mask"] *= 1e-7
    arguments["mask"][0, 2] = 0.0
    arguments["floor"] = torch.full((9,), 1e-9, dtype=torch.float64)
    agree(compute(arguments, torch.float16), run(arguments, "reference"), 5e-3)


@pytest.mark.usefixtures("large_tiles")
def test_other_layouts() -> None:
    arguments = problem((2, 4, 6, 8, 1, 3, False, "positive"))
    wanted = run(arguments, "reference")
    qkv = arguments["qkv"]
    for view in (
        qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.cat([qkv, qkv], dim=3)[..., :24],
        qkv.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert not view.is_contiguous()
        agree(compute({**arguments, "qkv": view}), wanted, 1e-5)
    moved = to_device(arguments, torch.float32)
    moved["qkv"].requires_grad_()
    span_attention(**moved, impl="triton").sum().backward()  # a gradient of strides 0
    assert torch.isfinite(moved["qkv"].grad).all()
    empty = span_attention(**{**moved, "qkv": moved["qkv"][:0]}, impl="triton")
    assert empty.shape == (0, 4, 6, 8)
    assert all(not x.any() for x in torch.autograd.grad(empty.sum(), moved["qkv"]))


def test_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sum depends on which program is first."""
    arguments = problem((1, 6, 9, 4, 1, 3, False, "positive"))
    once, again = compute(arguments), compute(arguments)
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    monkeypatch.setattr(span_triton, "PROGRAMS", 3)  # two or three tiles each
    agree(compute(arguments), once, 1e-6)


def test_registered_operators() -> None:
    """torch.library's own checks."""
    arguments = to_device(problem((1, 3, 4, 4, 1, 3, False, "positive")), torch.float32)
    flat = tuple(arguments[name] for name in ORDER)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.qna_timm.span_triton.default, flat, test_utils=tests)
    out, stats = torch.ops.qna_timm.span_triton(*flat)
    channels_first = flat[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    backward = torch.ops.qna_timm.span_triton_backward.default
    for qkv in (flat[0], channels_first):
        inputs = (torch.ones_like(out), qkv, *flat[1:], out, stats)
        torch.library.opcheck(backward, inputs, test_utils=tests[:2])


class Layer(torch.nn.Module):
    """The operator alone."""

    def __init__(self, rest: dict) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, qkv: Tensor) -> Tensor:
        return span_attention(qkv, **self.rest, impl="triton")


def test_graphs_and_transforms() -> None:
    """Compiled, exported, checkpointed, differentiated as a function: the same numbers."""
    arguments = to_device(problem((1, 3, 4, 4, 1, 3, False, "positive")), torch.float32)
    qkv = arguments.pop("qkv")
    layer, leaf = Layer(arguments), qkv.clone().requires_grad_()
    out = layer(leaf)
    wanted = torch.autograd.grad(out.square().sum(), leaf)[0]
    found = torch.func.grad(lambda x: layer(x).square().sum())(qkv)
    assert torch.allclose(found, wanted, atol=1e-6)
    again = checkpoint(layer, leaf, use_reentrant=False)
    found = torch.autograd.grad(again.square().sum(), leaf)[0]
    assert torch.allclose(found, wanted, atol=1e-6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(leaf).square().sum(), leaf)[0]
    assert torch.allclose(found, wanted, atol=1e-6)
    exported = torch.export.export(layer, (qkv,))
    assert "qna_timm.span_triton" in exported.graph_module.code
    assert torch.allclose(exported.module()(qkv), out, atol=1e-6)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.allclose(layer(qkv), out, atol=1e-6)


def test_saved_for_backward() -> None:
    """qkv, the output, two numbers of every query and head, and the tables."""
    arguments = to_device(problem((1, 8, 8, 8, 2, 5, False, "positive")), torch.bfloat16)
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    arguments["qkv"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        span_attention(**arguments, impl="triton")
    tables = sum(arguments[name].nbytes for name in ("rel_pos_h", "rel_pos_w", "mask", "floor"))
    assert sum(saved.values()) <= 8 * 8 * (2 * 4 * 8 + 4 * 2 * 2) + tables


def test_second_gradients() -> None:
    arguments = to_device(problem((1, 2, 3, 4, 1, 3, False, "positive")), torch.float32)
    found = []
    for impl in ("triton", "offsets"):
        leaf = arguments["qkv"].clone().requires_grad_()
        out = span_attention(**{**arguments, "qkv": leaf}, impl=impl)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), leaf)[0].cpu())
    agree(found[:1], found[1:], 1e-4)


def test_flops_and_shapes() -> None:
    qkv, table = torch.randn(1, 4, 5, 24, device="meta"), torch.randn(8, 3, device="meta")
    qkv.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = span_attention(qkv, table, table, 2, impl="triton")
    assert out.shape == (1, 4, 5, 8)
    assert counter.get_total_flops() == 4 * 8 * 4 * 5 * 3**2
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 8 * 4 * 5 * 3**2


@pytest.mark.parametrize(
    ("shape", "kernel", "dtype", "words"),
    [
        ((1, 2, 2, 24), 3, torch.float64, "qkv is torch.float64"),
        ((1, 2, 2, 3 * 1024), 3, torch.float32, "a head has 512 channels, more than 128"),
        ((1, 2, 2, 24), 65, torch.float32, "kernel_size is 65, more than 63"),
    ],
)
def test_never_falls_back(shape: tuple, kernel: int, dtype: torch.dtype, words: str) -> None:
    table = torch.zeros(shape[3] // 3, kernel, device=DEVICE)
    with pytest.raises(ValueError, match="impl='triton' cannot compute this: ") as error:
        span_attention(
            torch.zeros(shape, device=DEVICE, dtype=dtype), table, table, 2, impl="triton"
        )
    assert words in str(error.value)
