"""Operators: every form against the window-by-window reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from ladders import needs_native
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qna_timm.ops import (
    learned_query_scores,
    normalize_query,
    qna_attention,
    qna_attention_reference,
    span_attention,
    window_attention,
)
from qna_timm.ops.qna.offsets import qna_offsets

# H, W, queries, heads, head_dim, kernel, stride, padding
SIZES = {
    "odd-map": (5, 7, 2, 3, 4, 3, 1, 1),
    "stride-2": (6, 7, 1, 2, 4, 5, 2, 2),
    "kernel-over-map": (2, 3, 2, 2, 4, 7, 1, 3),
    "even-kernel": (6, 5, 3, 2, 2, 4, 1, 1),
    "whole-map": (5, 5, 2, 2, 2, 5, 1, 0),
    "one-token": (1, 1, 2, 2, 3, 3, 2, 1),
    "odd-channels": (4, 4, 1, 1, 5, 3, 1, 1),
    "small-map": (2, 3, 2, 1, 2, 3, 1, 1),
}
TABLES = ("both", "no-bias", "no-weight", "weight-per-query")


def make_inputs(
    size: str, tables: str = "both", spread: float = 1.0, batch: int = 2
) -> tuple[list[Tensor | None], tuple]:
    """Scores, value, bias and weight in float64, and the remaining arguments."""
    height, width, queries, heads, head_dim, kernel, stride, padding = SIZES[size]
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    scores = draw(batch, height, width, queries, heads) * spread
    value = draw(batch, height, width, heads * head_dim)
    bias = None if tables == "no-bias" else draw(kernel**2, queries, heads)
    rows = 1 if tables == "weight-per-query" else kernel**2
    weight = None if tables == "no-weight" else draw(rows, queries, heads)
    return [scores, value, bias, weight], ((kernel, kernel), stride, padding)


def to(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def gradients(tensors: list[Tensor | None], args: tuple, impl: str) -> list[Tensor]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = qna_attention(*leaves, *args, impl)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out.double() * direction).sum().backward()
    return [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("impl", ["offsets", "exact", "depthwise", "fft", "native", "auto"])
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("size", SIZES)
def test_forms_match_reference(size: str, tables: str, impl: str) -> None:
    if size == "one-token" and impl in ("depthwise", "fft"):
        pytest.skip("refused: its softmax is 1, gradients are differences of equal sums")
    if impl == "native":
        needs_native()
    tensors, args = make_inputs(size, tables)
    if impl == "fft":  # on maps as small as these it takes small spreads only
        tensors = [
            tensors[0] * 0.2,
            tensors[1],
            None if tensors[2] is None else tensors[2] * 0.2,
            tensors[3],
        ]
    wanted = qna_attention(*tensors, *args, "reference")
    found = qna_attention(*to(tensors, torch.float32), *args, impl)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert error(found, wanted) < 1e-5
    wanted_grads = gradients(tensors, args, "reference")
    found_grads = gradients(to(tensors, torch.float32), args, impl)
    for f, w in zip(found_grads, wanted_grads, strict=True):
        assert (f.double() - w).norm() <= 1e-4 * w.norm() + 1e-8


def test_reference_by_hand() -> None:
    """One window, written out: padding left out, weight after the softmax, queries summed."""
    scores = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64).view(1, 1, 2, 2, 1)
    value = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 1, 2, 1)
    bias = torch.zeros(9, 2, 1, dtype=torch.float64)
    bias[5, 0] = 0.5  # right neighbour, query 0
    weight = torch.ones(9, 2, 1, dtype=torch.float64)
    weight[4, 1] = -2.0  # centre, query 1
    out = qna_attention_reference(scores, value, bias, weight, (3, 3), 1, 1)
    centre0, right0 = torch.softmax(torch.tensor([0.0, 2.5], dtype=torch.float64), 0)
    centre1, right1 = torch.softmax(torch.tensor([1.0, -1.0], dtype=torch.float64), 0)
    wanted = centre0 * 3 + right0 * 5 + centre1 * 3 * -2 + right1 * 5
    torch.testing.assert_close(out[0, 0, 0, 0], wanted)


@pytest.mark.parametrize("size", SIZES)
def test_offsets_one_by_one_and_row_by_row(size: str) -> None:
    """The same function and gradients."""
    tensors, args = make_inputs(size)
    found = []
    for few in (0, 1000):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = qna_offsets(*leaves, *args, few=few)
        direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        found.append([out, *torch.autograd.grad((out * direction).sum(), leaves)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_row_by_row_to_any_order() -> None:
    """First and second derivatives, forward-mode too, and vectorised."""
    tensors, args = make_inputs("even-kernel", batch=1)
    leaves = [t.requires_grad_() for t in tensors]

    def run(*tensors: Tensor) -> Tensor:
        return qna_offsets(*tensors, *args, few=0)

    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    scores, *rest = leaves
    pair = torch.func.vmap(lambda scores: run(scores, *rest))(torch.stack([scores, 2 * scores]))
    torch.testing.assert_close(pair, torch.stack([run(scores, *rest), run(2 * scores, *rest)]))


def test_graphs_of_wide_windows_are_short() -> None:
    """Exporters' time: as long as the windows' side says, not their area."""

    def qna_nodes(kernel: int) -> int:
        def run(scores: Tensor, value: Tensor, table: Tensor) -> Tensor:
            window = ((kernel, kernel), 1, kernel // 2)
            return qna_attention(scores, value, table, table, *window, "offsets")

        maps = torch.randn(1, 9, 9, 2, 2), torch.randn(1, 9, 9, 4)
        return len(make_fx(run)(*maps, torch.randn(kernel**2, 2, 2)).graph.nodes)

    def span_nodes(kernel: int) -> int:
        def run(qkv: Tensor, table: Tensor) -> Tensor:
            return span_attention(qkv, table, table, num_heads=2, impl="offsets")

        maps = torch.randn(1, 9, 9, 12), torch.randn(4, kernel)
        return len(make_fx(run)(*maps).graph.nodes)

    for count in (qna_nodes, span_nodes):
        five, seven, nine = map(count, (5, 7, 9))
        assert nine - seven == seven - five < 40


def test_gradcheck_reference() -> None:
    tensors, args = make_inputs("stride-2", batch=1)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: qna_attention(*t, *args, "reference"), leaves)


@pytest.mark.usefixtures("ladder")
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
@pytest.mark.parametrize("size", ["odd-map", "stride-2", "kernel-over-map"])
def test_large_scores(size: str, scale: float, impl: str = "auto") -> None:
    """Scores of +-scale, and one that towers over a whole map."""
    tensors, args = make_inputs(size)
    scores = tensors[0]
    tensors[0] = (scores / scores.abs().max() * scale).float().double()
    tensors[0][0, 0, 0] = scale
    tensors[0][1] = tensors[0][1].clamp(max=-scale / 2)
    wanted = qna_attention(*tensors, *args, "reference")
    assert error(qna_attention(*to(tensors, torch.float32), *args, impl), wanted) < 1e-4
    wanted_grads = gradients(tensors, args, "reference")
    found_grads = gradients(to(tensors, torch.float32), args, impl)
    for f, w in zip(found_grads, wanted_grads, strict=True):
        assert (f.double() - w).norm() <= 1e-3 * w.norm() + 1e-8


@pytest.mark.parametrize("size", ["odd-map", "stride-2", "kernel-over-map"])
def test_large_scores_by_stock_operators(size: str) -> None:
    for scale in (30.0, 1e4):
        test_large_scores(size, scale, "offsets")


@pytest.mark.usefixtures("ladder")
@pytest.mark.parametrize("offset", [-1e4, -100.0, 100.0, 1e4])
def test_common_offset_of_scores(offset: float) -> None:
    """A softmax does not see an offset that all scores share."""
    tensors, args = make_inputs("odd-map")
    tensors[0] = (tensors[0] + offset).float().double()
    wanted = qna_attention(*tensors, *args, "reference")
    found = qna_attention(*to(tensors, torch.float32), *args)
    assert error(found, wanted) < 1e-4


@pytest.mark.usefixtures("ladder")
def test_wide_bias() -> None:
    tensors, args = make_inputs("odd-map")
    tensors[2] = (tensors[2] * 1e3).float().double()
    wanted = qna_attention(*tensors, *args, "reference")
    assert error(qna_attention(*to(tensors, torch.float32), *args), wanted) < 1e-4


@pytest.mark.parametrize("impl", ["depthwise", "fft"])
@pytest.mark.parametrize("kernel", [3, 7, 15])
@pytest.mark.parametrize("kind", ["spread", "tower", "smooth"])
def test_window_sums_are_right_or_refused(kind: str, kernel: int, impl: str) -> None:
    """Over every range of scores: what is not refused is right, gradients too."""
    gen = torch.Generator().manual_seed(0)
    served = []
    for spread in (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 20.0, 300.0):
        scores = torch.randn(1, 19, 23, 2, 2, generator=gen, dtype=torch.float64)
        value = torch.randn(1, 19, 23, 6, generator=gen, dtype=torch.float64)
        tables = torch.randn(2, kernel**2, 2, 2, generator=gen, dtype=torch.float64)
        if kind == "spread":
            scores = scores * spread
        elif kind == "tower":
            scores[:, 5, 5] += 3 * spread
        else:  # all windows alike: gradients of scores are next to nothing
            scores, tables, value = scores * spread, tables * 0.01, value * 0.1 + 3
        tensors = [scores.float().double(), value, tables[0], tables[1]]
        args = ((kernel, kernel), 1, kernel // 2)
        wanted = qna_attention(*tensors, *args, "offsets")
        try:
            found = qna_attention(*to(tensors, torch.float32), *args, impl)
        except ValueError:
            served.append(False)
        else:
            served.append(True)
            assert error(found, wanted) < 1e-4
        try:
            found_grads = gradients(to(tensors, torch.float32), args, impl)
        except ValueError:
            continue
        for f, w in zip(found_grads, gradients(tensors, args, "offsets"), strict=True):
            assert (f.double() - w).norm() <= 1e-3 * w.norm()
    assert served[0] or (impl, kernel) == ("fft", 3)  # small windows are not what it is for
    assert not served[-1]


@pytest.mark.usefixtures("ladder")
@pytest.mark.parametrize("gap", [30.0, 50.0])
def test_gradients_where_one_token_has_all_the_weight(gap: float) -> None:
    """Next to nothing, as with a softmax, and not the rounding of two large sums."""
    tensors, args = make_inputs("odd-map", "no-bias")
    scores = tensors[0] * 0.01 - gap
    scores[:, ::3, ::3] += gap  # one such token in every window
    tensors[0] = scores.float().double()
    wanted = gradients(tensors, args, "reference")
    found = gradients(to(tensors, torch.float32), args, "auto")
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() - w).norm() <= 1e-3 * w.norm() + 1e-8


@pytest.mark.usefixtures("ladder")
def test_kernel_of_one_token() -> None:
    """Its softmax is 1 whatever the score: no gradient at all for scores and bias."""
    (scores, value, bias, weight), _ = make_inputs("odd-map")
    tensors = [scores.float(), value.float(), bias[:1].float(), weight[:1].float()]
    score_grad, _, bias_grad, _ = gradients(tensors, ((1, 1), 1, 0), "auto")
    assert not score_grad.any() and not bias_grad.any()


@pytest.mark.usefixtures("ladder")
def test_not_a_number_stays_where_it_is() -> None:
    """A NaN score spoils the windows that see it and no other."""
    tensors, args = make_inputs("odd-map", batch=1)
    single = to(tensors, torch.float32)
    single[0][0, 0, 0, 0, 0] = float("nan")
    finite = qna_attention(*single, *args).isfinite().all(dim=3)[0]
    assert not finite[:2, :2].any() and finite[2:].all() and finite[:, 2:].all()


@pytest.mark.usefixtures("ladder")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_half_precision_values(dtype: torch.dtype, scale: float) -> None:
    """Half-precision values with float32 scores: no worse than rounding input and output."""
    tensors, args = make_inputs("odd-map")
    tensors[0] = (tensors[0] * scale).float().double()
    wanted = qna_attention(*tensors, *args, "reference")
    value = tensors[1].to(dtype)
    single = to(tensors, torch.float32)
    found = qna_attention(single[0], value, *single[2:], *args)
    rounded = qna_attention(tensors[0], value.double(), *tensors[2:], *args, "reference")
    assert found.dtype == dtype and found.isfinite().all()
    assert error(found, wanted) <= 2 * error(rounded.to(dtype), wanted) + 1e-6


def test_layouts() -> None:
    """Transposed, strided and expanded inputs give what contiguous ones do."""
    tensors, args = make_inputs("odd-map")
    single = to(tensors, torch.float32)
    wanted = qna_attention(*single, *args)
    strided = [
        None if t is None else torch.stack([t, t], dim=-1).transpose(0, 1)[..., 0].transpose(0, 1)
        for t in single
    ]
    assert not strided[0].is_contiguous()
    for impl in ("offsets", "exact", "depthwise", "auto"):
        torch.testing.assert_close(qna_attention(*strided, *args, impl), wanted)


def test_autocast_leaves_the_operator_alone() -> None:
    tensors, args = make_inputs("odd-map")
    single = to(tensors, torch.float32)
    wanted = qna_attention(*single, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(qna_attention(*single, *args), wanted)


def test_vmap_and_functional_gradient() -> None:
    tensors, args = make_inputs("odd-map")
    single = to(tensors, torch.float32)
    wanted = qna_attention(*single, *args)
    stacked = torch.func.vmap(lambda s: qna_attention(s, *single[1:], *args))(single[0][None])
    torch.testing.assert_close(stacked[0], wanted)
    grad = torch.func.grad(lambda s: qna_attention(s, *single[1:], *args).sum())(single[0])
    leaf = single[0].clone().requires_grad_()
    qna_attention(leaf, *single[1:], *args).sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(impl="eager"), r"impl must be one of .*'depthwise', .*'offsets'.* got 'eager'"),
        (dict(padding=3), "padding in 0..kernel_size-1"),
        (dict(stride=0), "at least 1"),
        (dict(kernel_size=3), r"kernel_size must be a pair \(height, width\), got 3"),
        (dict(kernel_size=(9, 9), padding=0), "does not fit the map"),
        (dict(rel_pos_bias=torch.zeros(9, 2, 2)), r"\[9, 2, 3\], got \[9, 2, 2\]"),
        (dict(query_weight=torch.zeros(4, 2, 3)), r"got \[4, 2, 3\]"),
        (dict(value=torch.zeros(2, 5, 7, 10)), "10 channels must divide into scores' 3 heads"),
        (dict(value=torch.zeros(2, 5, 6, 12)), "of the same B, H, W"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    (scores, value, bias, weight), (kernel, stride, padding) = make_inputs("odd-map")
    kwargs = dict(
        scores=scores,
        value=value,
        rel_pos_bias=bias,
        query_weight=weight,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
    )
    with pytest.raises(ValueError, match=message):
        qna_attention(**{**kwargs, **change})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32(dtype: torch.dtype) -> None:
    """Also under autocast, and for half-precision input."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 8, generator=gen).to(dtype)
    weight, bias = torch.randn(12, 8, generator=gen), torch.randn(12, generator=gen)
    query = normalize_query(torch.randn(2, 12, generator=gen), 3, True, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = learned_query_scores(x, weight, bias, query)
    key = torch.einsum("byxi,ci->byxc", x.double(), weight.double()) + bias.double()
    wanted = torch.einsum("byxhd,qhd->byxqh", key.unflatten(3, (3, 4)), query.double())
    assert scores.dtype == torch.float32
    assert error(scores, wanted) < 1e-5


def plain_window_attention(qkv: Tensor, table: Tensor, heads: int, window: tuple) -> Tensor:
    """Window attention token by token, for comparison."""
    batch, height, width, channels = qkv.shape
    q, k, v = qkv.unflatten(3, (3, heads, -1)).unbind(3)
    out = torch.zeros(batch, height, width, heads, channels // (3 * heads), dtype=qkv.dtype)
    span = 2 * window[1] - 1
    for y in range(height):
        for x in range(width):
            keys = [
                (j, i)
                for j in range(height)
                for i in range(width)
                if j // window[0] == y // window[0] and i // window[1] == x // window[1]
            ]
            rows = [(y - j + window[0] - 1) * span + x - i + window[1] - 1 for j, i in keys]
            key = torch.stack([k[:, j, i] for j, i in keys], 2)
            value = torch.stack([v[:, j, i] for j, i in keys], 2)
            scores = (q[:, y, x, :, None] * key).sum(-1) * q.shape[-1] ** -0.5 + table[rows].t()
            out[:, y, x] = (scores.softmax(-1).unsqueeze(-1) * value).sum(2)
    return out.flatten(3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "size, window",
    [((6, 6), (3, 3)), ((7, 5), (3, 2)), ((4, 9), (2, 4)), ((2, 3), (7, 7)), ((5, 8), (7, 3))],
)
def test_window_attention(size: tuple, window: tuple, fused: bool) -> None:
    """Any map: divided by its windows or not, smaller than one or not."""
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, *size, 24, generator=gen, dtype=torch.float64)
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    table = torch.randn(rows, 2, generator=gen, dtype=torch.float64)
    wanted = plain_window_attention(qkv, table, 2, window)
    torch.testing.assert_close(window_attention(qkv, table, 2, window, fused), wanted)


def test_window_attention_of_odd_channels() -> None:
    with pytest.raises(ValueError, match=r"3 \* num_heads = 15 times .* of a head, got 24"):
        window_attention(torch.randn(1, 4, 4, 24), None, 5, (2, 2))
    with pytest.raises(ValueError, match=r"qkv must be a channels-last map .*, got \[4, 4, 24\]"):
        window_attention(torch.randn(4, 4, 24), None, 4, (2, 2))


def plateau(side: int, drop: float) -> tuple[Tensor, Tensor]:
    """Scores and value of a map whose last rows and columns score `drop` less than the others."""
    gen = torch.Generator().manual_seed(0)
    scores = 0.05 * torch.randn(1, side, side, 1, 1, generator=gen)
    scores[:, -side // 4 :] -= drop
    scores[:, : -side // 4, -side // 4 :] -= drop
    return scores, 1 + 0.1 * torch.randn(1, side, side, 2, generator=gen)


@pytest.mark.parametrize("impl", ["exact", "fft", "native"])
@pytest.mark.parametrize("drop", [2.0, 4.5, 10.0])
def test_sums_of_thousands(impl: str, drop: float) -> None:
    """Of small numbers beside large ones, or through transforms that are one large number."""
    if impl == "native":
        needs_native()
    scores, value = plateau(128, drop)
    box = torch.ones(1, 1, 1, 63, dtype=torch.float64)
    attn = (scores[..., 0, 0] - scores.max()).double().exp()
    weighted = torch.cat([attn[None], attn * value.double().permute(3, 0, 1, 2)])
    below, *above = F.conv2d(
        F.conv2d(weighted, box, padding=(0, 31)), box.transpose(2, 3), padding=(31, 0)
    )
    wanted = torch.stack([x / below for x in above], dim=3)
    try:
        found = qna_attention(scores, value, None, None, (63, 63), 1, 31, impl=impl)
    except ValueError as error:
        assert impl == "fft" and drop > 2 and "out of its range" in str(error)
        return
    assert (found - wanted).abs().max() <= 3e-5 * wanted.abs().max()
