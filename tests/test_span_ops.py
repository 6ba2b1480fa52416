"""Span attention as an operator: every form against the reference, in value and gradient."""

import pytest
import torch
from golden import relative_error
from ladders import needs_native
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qna_timm.ops import ring_index, ring_weights, span_attention
from qna_timm.ops.span import tiles
from qna_timm.ops.span.offsets import span_offsets

# batch, height, width, channels, heads, kernel, mask_padding, mask: none, positive, with holes
CASES = [
    (2, 5, 7, 8, 2, 3, False, "none"),
    (1, 9, 6, 8, 4, 5, True, "positive"),
    (2, 3, 3, 4, 1, 7, False, "positive"),
    (2, 12, 17, 12, 3, 5, True, "holes"),
    (1, 1, 1, 4, 2, 3, True, "none"),
    (3, 8, 8, 6, 3, 1, False, "none"),
    (1, 2, 13, 4, 2, 11, False, "holes"),
]
ORDER = ("qkv", "rel_pos_h", "rel_pos_w", "mask", "floor", "num_heads", "mask_padding", "scale")


def problem(case: tuple, floor: float = 1e-2, dtype: torch.dtype = torch.float64) -> dict:
    """Arguments of `span_attention`."""
    batch, height, width, channels, heads, kernel, mask_padding, kind = case
    make = torch.Generator().manual_seed(0)
    mask = None if kind == "none" else torch.rand(heads, kernel**2, generator=make, dtype=dtype)
    if kind == "holes":
        mask[:, 1], mask[0, -1] = 0, 0
    tables = torch.randn(2, channels, kernel, generator=make, dtype=dtype)
    return dict(
        qkv=torch.randn(batch, height, width, 3 * channels, generator=make, dtype=dtype),
        rel_pos_h=tables[0],
        rel_pos_w=tables[1],
        num_heads=heads,
        mask=mask,
        floor=torch.full((kernel**2,), floor, dtype=dtype) if floor and mask is not None else None,
        scale=0.7,
        mask_padding=mask_padding,
    )


def run(problem: dict, impl: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output and gradients of sum(out * direction)."""
    leaves = {}
    for name in ("qkv", "rel_pos_h", "rel_pos_w", "mask"):
        if problem[name] is not None:
            # parameters are float32 where maps are halves, as under autocast
            kept = dtype if name == "qkv" or dtype.itemsize > 2 else torch.float32
            leaves[name] = problem[name].detach().to(kept).clone().requires_grad_()
    out = span_attention(**{**problem, **leaves}, impl=impl)
    make = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=make, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), list(leaves.values()))]


def agree(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Every tensor by max|d| / max|wanted|; what is nothing, to 1e-8 of it."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        size = max(float(other.abs().max()), 1e-8)
        assert float((one.double() - other).abs().max()) <= tolerance * size


@pytest.fixture(params=["tiles", "native"])
def by_hand(request: pytest.FixtureRequest) -> str:
    """A form whose gradients are written by hand."""
    if request.param == "native":
        needs_native()
    return request.param


@pytest.mark.parametrize("floor", [0.0, 1e-2], ids=["plain", "floor"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms_agree(case: tuple, floor: float) -> None:
    wanted = run(problem(case, floor), "reference")
    assert all(torch.isfinite(x).all() for x in wanted)
    agree(run(problem(case, floor), "offsets"), wanted, 1e-12)
    agree(run(problem(case, floor), "tiles"), wanted, 1e-12)
    agree(run(problem(case, floor), "tiles", torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("floor", [0.0, 1e-8])
def test_narrow_mask_beyond_the_map(floor: float) -> None:
    """A mask narrower than its window, and tiles over the border: queries there see nothing."""
    arguments = problem((1, 9, 17, 4, 1, 11, True, "positive"))
    near = (ring_index(11) <= 1).double()
    arguments["mask"] *= near
    arguments["floor"] = floor * near
    wanted = run(arguments, "reference")
    agree(run(arguments, "tiles"), wanted, 1e-12)


@pytest.mark.parametrize("scores", [1, 4000, 20000])
def test_tiles_in_parts(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile rows of one image at a time, or several images: the same numbers."""
    case = (5, 13, 10, 4, 2, 5, True, "holes")
    wanted = run(problem(case), "tiles")
    monkeypatch.setattr(tiles, "CPU_SCORES", scores)
    agree(run(problem(case), "tiles"), wanted, 1e-12)


def test_gradcheck() -> None:
    arguments = problem((1, 2, 3, 2, 1, 3, False, "positive"))
    names = ("qkv", "rel_pos_h", "rel_pos_w", "mask")
    leaves = tuple(arguments.pop(name).requires_grad_() for name in names)
    for impl in ("reference", "tiles"):

        def call(*tensors: Tensor, impl: str = impl) -> Tensor:
            return span_attention(**dict(zip(names, tensors, strict=True)), **arguments, impl=impl)

        assert torch.autograd.gradcheck(call, leaves)
        assert impl == "reference" or torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "holes"])
def test_large_scores(dtype: torch.dtype, kind: str, by_hand: str) -> None:
    """Scores of +-1e4, and one that towers over a map: finite, and right where they are exact."""
    arguments = problem((1, 6, 7, 4, 2, 5, False, kind), 1e-8)
    arguments["scale"] = 1.0
    qkv = arguments["qkv"].round()  # integers: products are exact in every type
    qkv[..., :8] = qkv[..., :8] * 25
    qkv[0, 2, 2, 4:8] = 200
    qkv[..., :4] = qkv[..., :4].clamp(-50, 50)
    arguments["qkv"] = qkv
    tables = {name: arguments[name].round() for name in ("rel_pos_h", "rel_pos_w")}
    arguments.update(tables)
    found = run(arguments, by_hand, dtype)
    assert all(torch.isfinite(x).all() for x in found)
    wanted = run(arguments, "reference")
    epsilon = max(torch.finfo(dtype).eps, 1e-5)
    assert relative_error(found[0].float(), wanted[0].numpy()) <= 2 * epsilon


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype, by_hand: str) -> None:
    """Twice the error at most of the offsets computed in that type, outputs and gradients."""
    arguments = problem((2, 9, 9, 16, 2, 5, False, "positive"))
    wanted = run(arguments, "reference")
    found = run(arguments, by_hand, dtype)
    low = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    low = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in low.items()}
    out = span_offsets(*(low[name] for name in ORDER))
    make = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=make, dtype=torch.float64)
    leaves = [low[name] for name in ORDER[:4]]
    plain = [out.detach(), *torch.autograd.grad((out * direction).sum(), leaves)]
    for one, other, right in zip(found, plain, wanted, strict=True):
        rounding = torch.finfo(dtype).eps * float(right.abs().max())
        error = float((one.double() - right).abs().max())
        assert error <= 2 * float((other.double() - right).abs().max()) + rounding


def test_other_layouts(by_hand: str) -> None:
    arguments = problem((2, 8, 6, 8, 2, 5, False, "positive"), dtype=torch.float32)
    wanted = run(arguments, by_hand, torch.float32)
    qkv = arguments["qkv"]
    for view in (
        qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.cat([qkv, qkv], dim=3)[..., :24],
        qkv.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert not view.is_contiguous()
        agree(run({**arguments, "qkv": view}, by_hand, torch.float32), wanted, 1e-6)
    empty = span_attention(**{**arguments, "qkv": qkv[:0]}, impl=by_hand)
    assert empty.shape == (0, 8, 6, 8)


def test_saved_for_backward() -> None:
    """qkv and the tables."""
    arguments = problem((2, 16, 16, 8, 2, 7, False, "positive"), dtype=torch.float32)
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    arguments["qkv"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        span_attention(**arguments)
    positions = 2 * 16 * 16
    tables = sum(arguments[name].nbytes for name in ("rel_pos_h", "rel_pos_w", "mask", "floor"))
    assert sum(saved.values()) <= 4 * positions * 3 * 8 + tables + 64


def test_largest_temporary() -> None:
    """Nothing of the size of B*C*H*W*k*k, nor of B*h*H*W*k*k, forward or backward."""
    arguments = problem((16, 32, 32, 16, 4, 7, False, "none"), dtype=torch.float32)
    arguments["qkv"].requires_grad_()
    with torch.profiler.profile(profile_memory=True) as record:
        span_attention(**arguments).sum().backward()
    events = record.profiler.kineto_results.events()
    largest = max(e.nbytes() for e in events if e.name() == "[memory]")
    assert largest < 4 * 16 * 4 * 32 * 32 * 49 / 2


def test_registered_operators(by_hand: str) -> None:
    """torch.library's own checks, and transforms that see the operator."""
    dtype = torch.float64 if by_hand == "tiles" else torch.float32
    arguments = problem((2, 5, 6, 8, 2, 3, False, "positive"), dtype=dtype)
    flat = [*(arguments[name] for name in ORDER), by_hand]
    flat[0] = flat[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # as of a convolution
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = torch.ops.qna_timm
    torch.library.opcheck(operators.span_attention.default, flat, test_utils=tests)
    backward = (torch.randn_like(operators.span_attention(*flat)), *flat)
    torch.library.opcheck(operators.span_attention_backward.default, backward, test_utils=tests)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_function_transforms() -> None:
    arguments = problem((2, 4, 5, 4, 2, 3, False, "positive"))
    qkv = arguments.pop("qkv")

    def total(qkv: Tensor) -> Tensor:
        return span_attention(qkv, **arguments).square().sum()

    wanted = torch.autograd.grad(total(leaf := qkv.clone().requires_grad_()), leaf)[0]
    assert torch.allclose(torch.func.grad(total)(qkv), wanted)
    each = torch.func.vmap(torch.func.grad(total))(qkv[:, None])
    assert torch.allclose(each.flatten(0, 1), wanted)
    jacobian = torch.func.jacrev(lambda qkv: span_attention(qkv, **arguments))
    assert torch.allclose(torch.func.jacrev(total)(qkv), wanted)
    found, plain = jacobian(qkv[:1, :2, :2]), arguments | {"impl": "offsets"}
    assert torch.allclose(
        found, torch.func.jacfwd(lambda qkv: span_attention(qkv, **plain))(qkv[:1, :2, :2])
    )


def test_compiled() -> None:
    arguments = problem((2, 6, 5, 8, 2, 3, False, "positive"))
    qkv = arguments.pop("qkv").requires_grad_()

    def step(qkv: Tensor) -> Tensor:
        return span_attention(qkv, **arguments).square().sum()

    wanted = torch.autograd.grad(step(qkv), qkv)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.allclose(torch.autograd.grad(compiled(qkv), qkv)[0], wanted)


def test_compiled_after_a_convolution(by_hand: str) -> None:
    """Compilers hold operators to the strides that they were promised."""
    arguments = problem((2, 6, 5, 8, 2, 3, False, "positive"), dtype=torch.float32)
    qkv = arguments.pop("qkv").permute(0, 3, 1, 2).contiguous().requires_grad_()

    def step(qkv: Tensor) -> Tensor:
        out = span_attention(qkv.sigmoid().permute(0, 2, 3, 1), **arguments, impl=by_hand)
        return out.square().sum()

    wanted = torch.autograd.grad(step(qkv), qkv)[0]
    compiled = torch.compile(step, fullgraph=True)
    assert torch.allclose(torch.autograd.grad(compiled(qkv), qkv)[0], wanted, atol=1e-6)


def test_autocast_stops(by_hand: str) -> None:
    """Nothing inside is computed in half precision, forward or backward."""
    arguments = problem((2, 9, 9, 16, 2, 5, False, "positive"), dtype=torch.float32)
    wanted = run(arguments, by_hand, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        agree(run(arguments, by_hand, torch.float32), wanted, 1e-12)
        agree([span_attention(**arguments, impl="offsets")], wanted[:1], 1e-5)


def test_flops() -> None:
    torch.manual_seed(0)
    qkv, table = torch.randn(2, 4, 5, 24, requires_grad=True), torch.randn(8, 3)
    positions_times_offsets = 2 * 4 * 5 * 3**2
    with FlopCounterMode(display=False) as counter:
        out = span_attention(qkv, table, table, 2)
    assert counter.get_total_flops() == 2 * 2 * 8 * positions_times_offsets  # two products
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * 8 * positions_times_offsets


def test_meta() -> None:
    arguments = problem((2, 6, 5, 8, 2, 3, False, "positive"))
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    assert span_attention(**meta).shape == (2, 6, 5, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rel_pos_h": torch.zeros(8, 4)}, "odd k, got [8, 4]"),
        ({"qkv": torch.zeros(1, 4, 4, 20)}, "qkv must be [B, H, W, 24], got [1, 4, 4, 20]"),
        ({"qkv": torch.zeros(1, 0, 4, 24)}, "must have positions and channels, got [1, 0, 4, 24]"),
        ({"num_heads": 3}, "num_heads must divide the 8 channels, got 3"),
        ({"mask": torch.ones(2, 8)}, "mask must be [2, 9], got [2, 8]"),
        ({"mask": None, "floor": torch.ones(9)}, "come with a mask"),
        ({"impl": "tile"}, "impl must be one of"),
        ({"impl": "native"}, "impl='native' cannot compute this: it computes in float32, qkv is "),
    ],
)
def test_errors(change: dict, words: str) -> None:
    arguments = {**problem((1, 4, 4, 8, 2, 3, False, "positive")), **change}
    with pytest.raises(ValueError) as error:
        span_attention(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_ring_weights() -> None:
    span = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    weights = ring_weights(span, 5, 2.0, 5)
    wanted = [[1, 1, 0.5, 0, 0, 0], [1, 1, 1, 0.75, 0.25, 0], [1] * 6]
    assert torch.allclose(weights, torch.tensor(wanted, dtype=torch.float64))
    # The gradient passes at the bounds: at span 0 rings 1 (at 1), 2 and 3 (at 0), 5/2 each.
    assert torch.autograd.grad(weights[0].sum(), span)[0][0] == pytest.approx(7.5)
    assert ring_index(5).view(5, 5)[0].tolist() == [2, 2, 2, 2, 2]
    assert ring_index(5).view(5, 5)[2].tolist() == [2, 1, 0, 1, 2]


def test_forward_mode_by_itself() -> None:
    """'auto' takes the form that has tangents where some may be asked for."""
    gen = torch.Generator().manual_seed(0)
    qkv, tangent = (torch.randn(1, 5, 6, 24, generator=gen, dtype=torch.float64) for _ in range(2))
    tables = [torch.randn(8, 3, generator=gen, dtype=torch.float64) for _ in range(2)]

    def attend(x: Tensor) -> Tensor:
        return span_attention(x, *tables, 2)

    out, found = torch.func.jvp(attend, (qkv,), (tangent,))
    step = 1e-6
    wanted = (attend(qkv + step * tangent) - attend(qkv - step * tangent)) / (2 * step)
    torch.testing.assert_close(out, attend(qkv))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
