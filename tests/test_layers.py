"""Layers against the released code's layers."""

import ast
import copy
import re

import numpy as np
import pytest
import torch
from golden import arrays, flax_leaf, images, info, projection, relative_error, thin
from torch import nn

from qna_timm.convert.qna import _MSA_LAYER, _QNA_LAYER, _to_layout
from qna_timm.layers import (
    BiasedBatchNorm2d,
    LearnedQueryAttention,
    LearnedQueryPool,
    WindowAttention,
)
from qna_timm.layers.qna_block import Shortcut
from qna_timm.ops import resize_offset_table
from qna_timm.ops.window_attn import rel_pos_bias_matrix

LEFT_OUT = (
    "qna/pos_contextual_pos_batch1",  # broken in the release, as the golden files' README says
    "qna/pos_absolute_pos",  # sum over the batch: test_absolute_position_does_not_mix_images
    "qna/pos_absolute_pos_batch4",
    "msa/w7_mask_last9keys",  # masks come from padding here: test_window_padding_is_not_seen
)
CASES = {
    name: case
    for name, case in info()["layers"].items()
    if name.startswith(("qna/", "msa/")) and case["status"] == "ok" and name not in LEFT_OUT
}


def build(case: dict) -> nn.Module:
    """Our layer for a golden case's arguments."""
    args = case["args"]
    if case["kind"] == "MultiHeadSelfAttention":
        window = args["window_size"]
        return WindowAttention(
            case["params"]["to_qkv/kernel"][0],
            args["heads"],
            (window, window) if isinstance(window, int) else tuple(window),
            attn_dim=args["features"],
            rel_pos_bias=args["use_relative_pe"],
            qkv_bias=args["use_bias"],
        )
    return LearnedQueryAttention(
        case["params"]["Wk"][0],
        args["heads"],
        attn_dim=args["features"],
        kernel_size=args["kernel_size"],
        stride=args["stride"],
        padding=args["padding"],
        num_queries=args["n_queries"],
        pos_embed=args.get("pos_embedding_type", "relative_pos").removesuffix("_pos"),
        query_weight=args.get("attn_scale", "normal"),
        normalize_query=args["normalize_q"],
        normalize_stop_grad=args.get("qna_normalize_stop_grads", False),
        scale_rel_pos_bias=args.get("scale_rpe_bias", False),
        qkv_bias=args.get("use_bias", False),
    )


def load(layer: nn.Module, case: dict) -> dict[str, tuple[str, str]]:
    """Give the layer the rule's weights; returns {released path: (our name, layout)}."""
    names = _MSA_LAYER if isinstance(layer, WindowAttention) else _QNA_LAYER
    heads = getattr(layer, "num_queries", 1), layer.num_heads
    places = {path: names[path] for path in case["params"]}
    layer.load_state_dict(
        {
            name: _to_layout(torch.from_numpy(flax_leaf(path, case["params"][path])), how, *heads)
            for path, (name, how) in places.items()
        }
    )
    return places


def case_input(name: str, case: dict) -> torch.Tensor:
    seed, shape = 1, (2, 14, 14, 32)
    if "odd13x17" in name:
        seed, shape = 5, (2, 13, 17, 32)
    elif case["kind"] == "MultiHeadSelfAttention":
        shape = ast.literal_eval(re.search(r"\((\(.*?\))\)", case["input"])[1])
    x = images(seed, *shape)
    return x[:1] if name.endswith("batch1") else x


@pytest.mark.parametrize("name", CASES)
def test_golden_layer(name: str) -> None:
    """Output to 1e-4, every gradient of mean(out^2) to 1e-3."""
    case = CASES[name]
    layer = build(case)
    places = load(layer, case)
    x = case_input(name, case).requires_grad_()
    if isinstance(layer, WindowAttention):
        out = layer(x.view(len(x), *layer.window_size, -1)).flatten(1, 2)
    else:
        out = layer(x)
    assert list(out.shape) == case["output_shape"]
    assert relative_error(out, arrays()[f"layers/{name}"]) < 1e-4

    loss = out.square().mean()
    assert float(loss.detach()) == pytest.approx(case["loss_mean_sq"], rel=1e-5)
    loss.backward()
    heads = getattr(layer, "num_queries", 1), layer.num_heads
    for path, wanted in case["grads"].items():
        if path == "<input>":
            gradient = x.grad.numpy()
        else:
            gradient = to_flax(layer, places[path], case["params"][path], heads)
        norm = float(np.linalg.norm(gradient))
        assert abs(norm - wanted["l2"]) <= 1e-3 * wanted["l2"] + 1e-8, path
        bound = 5e-3 * wanted["l2"] + 1e-8  # five deviations of a random direction
        assert abs(projection(path, gradient) - wanted["proj"]) <= bound, path


def to_flax(layer: nn.Module, place: tuple[str, str], shape: list[int], heads: tuple) -> np.ndarray:
    """Our gradient in the released layout: through the layout map's own indices."""
    name, how = place
    gradient = layer.get_parameter(name).grad.numpy().ravel()
    index = torch.arange(int(np.prod(shape))).view(shape)
    flat = np.empty(index.numel(), gradient.dtype)
    flat[_to_layout(index, how, *heads).numpy().ravel()] = gradient
    return flat.reshape(shape)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_golden_average_pool_shortcut(kernel: int) -> None:
    case = info()["layers"][f"avgpool1x1/k{kernel}_14"]
    shortcut = Shortcut(32, 64, kernel, "avgpool", {})
    weight = flax_leaf("Conv_0/kernel", case["params"]["Conv_0/kernel"])
    shortcut.proj.weight = nn.Parameter(torch.from_numpy(weight[0, 0].T))
    out = shortcut(images(8, 2, 14, 14, 32))
    assert relative_error(out, arrays()[f"layers/avgpool1x1/k{kernel}_14"]) < 1e-5


@pytest.mark.parametrize("size", [name for name in arrays() if "rpe_index" in name])
def test_golden_relative_position_index(size: str) -> None:
    """The bias of a token pair stands in the row that the release looks up."""
    window = tuple(int(side) for side in size.rsplit("/w", 1)[1].split("x"))
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    table = torch.arange(rows, dtype=torch.float32)[:, None]
    index = rel_pos_bias_matrix(table, window, window)[0]
    assert relative_error(index, arrays()[size]) == 0.0


def test_absolute_position_does_not_mix_images() -> None:
    """The release sums the bias over the batch; ours is the same for any batch."""
    case = CASES["qna/pos_absolute_pos_batch1"]
    layer = build(case)
    load(layer, case)
    x = images(1, 2, 14, 14, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
        assert relative_error(layer(x)[:1], arrays()["layers/qna/pos_absolute_pos_batch1"]) < 1e-4


def test_no_position_embedding() -> None:
    """'none' is a bias of zero (the release crashes)."""
    torch.manual_seed(0)
    plain = LearnedQueryAttention(8, 2, pos_embed="none")
    table = LearnedQueryAttention(8, 2)
    table.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 5, 8)
    torch.testing.assert_close(plain(x), table(x))


def test_output_width() -> None:
    layer = LearnedQueryAttention(8, 4, attn_dim=16, dim_out=6, stride=2)
    assert layer(torch.randn(1, 5, 4, 8)).shape == (1, 3, 2, 6)


def scaled_layer(scale: float) -> tuple[LearnedQueryAttention, torch.Tensor]:
    """A layer and input whose scores reach +-scale."""
    torch.manual_seed(0)
    layer = LearnedQueryAttention(32, 4, attn_dim=32, kernel_size=3)
    with torch.no_grad():
        layer.rel_pos_bias.normal_()
        layer.query_weight.normal_()
    x = torch.randn(2, 9, 10, 32)
    query = layer.query.unflatten(1, (4, 8))
    query = query / (query.norm(dim=2, keepdim=True) + 1e-6) / 8**0.5
    with torch.no_grad():
        largest = torch.einsum("byxhd,qhd->byxqh", layer.k(x).unflatten(3, (4, 8)), query)
        layer.k.weight.mul_(scale / largest.abs().max())
    return layer, x


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e3])
def test_scores_up_to_1000(scale: float) -> None:
    """float32 layer against itself in float64, output to 1e-4, gradients to 1e-3."""
    layer, x = scaled_layer(scale)
    double = copy.deepcopy(layer).double()
    out, wanted = layer(x), double(x.double())
    assert relative_error(out, wanted.detach().numpy()) < 1e-4
    out.square().mean().backward()
    wanted.square().mean().backward()
    for (name, p), q in zip(layer.named_parameters(), double.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-8, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_scores_of_10000(dtype: torch.dtype) -> None:
    layer, x = scaled_layer(1e4)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        out = layer(x)
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def low_precision_layer(layer: LearnedQueryAttention, x: torch.Tensor) -> torch.Tensor:
    """An independent layer in autocast's manner: half projections, float32 softmax, unfolded."""
    (h, d), k = (layer.num_heads, layer.head_dim), layer.kernel_size[0]
    query = layer.query.unflatten(1, (h, d))
    query = query / (query.norm(dim=2, keepdim=True) + 1e-6) / d**0.5
    key, value = layer.k(x).unflatten(3, (h, d)), layer.v(x)
    scores = torch.einsum("byxhd,qhd->byxqh", key.float(), query).flatten(3)
    pad = k // 2
    scores = nn.functional.pad(scores, (0, 0, pad, pad, pad, pad), value=float("-inf"))
    value = nn.functional.pad(value, (0, 0, pad, pad, pad, pad))
    windows = scores.unfold(1, k, 1).unfold(2, k, 1).flatten(4)  # b y x qh K
    windows = windows + layer.rel_pos_bias.flatten(1).t()
    attn = (windows.softmax(-1) * layer.query_weight.flatten(1).t()).unflatten(3, (-1, h)).sum(3)
    value = value.unfold(1, k, 1).unfold(2, k, 1).flatten(4).unflatten(3, (h, d))
    out = (attn.unsqueeze(4).to(value.dtype) * value).sum(-1).flatten(3)
    return layer.proj(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_autocast_error_within_twice_an_independent_layer(dtype: torch.dtype, scale: float) -> None:
    layer, x = scaled_layer(scale)
    wanted = copy.deepcopy(layer).double()(x.double()).detach().numpy()
    torch.testing.assert_close(low_precision_layer(layer, x), layer(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        ours = relative_error(layer(x), wanted)
        theirs = relative_error(low_precision_layer(layer, x), wanted)
    assert ours <= 2 * theirs


def test_pool_resizes_its_tables() -> None:
    """On its own map it is the layer without padding; on others it still sees every token."""
    torch.manual_seed(0)
    pool = LearnedQueryPool(16, 4, kernel_size=5)
    layer = LearnedQueryAttention(16, 4, kernel_size=5, padding=0)
    layer.load_state_dict(pool.state_dict())
    x = torch.randn(2, 5, 5, 16)
    torch.testing.assert_close(pool(x), layer(x))
    wide = torch.randn(2, 6, 9, 16)
    out = pool(wide)
    assert out.shape == (2, 1, 1, 16)
    for y, column in ((0, 0), (5, 8), (2, 4)):
        other = wide.clone()
        other[:, y, column] += 1.0
        assert not torch.allclose(pool(other), out, atol=1e-7)
    pool.set_kernel_size((6, 9))
    torch.testing.assert_close(pool(wide), out, rtol=1e-4, atol=1e-6)


def test_window_padding_is_not_seen() -> None:
    """A map that windows do not divide gives what each part alone gives."""
    torch.manual_seed(0)
    layer = WindowAttention(16, 4, (4, 4))
    nn.init.normal_(layer.rel_pos_bias)
    x = torch.randn(2, 6, 7, 16)
    out = layer(x)
    torch.testing.assert_close(layer(x[:, :4, :4]), out[:, :4, :4])
    torch.testing.assert_close(layer(x[:, 4:, 4:]), out[:, 4:, 4:])


@pytest.mark.parametrize("name", ["27to23", "27to47", "13to23", "3to7", "7to3"])
def test_golden_table_resize(name: str) -> None:
    old, new = (int(side) for side in name.split("to"))
    table = torch.from_numpy(arrays()[f"finetune_resize/resize/{name}/in"])
    found = resize_offset_table(table, (old, old), (new, new))
    wanted = arrays()[f"finetune_resize/resize/{name}/out"]
    assert relative_error(thin(found.numpy()), wanted) < 1e-5


def test_batch_norm_averages_the_biased_variance() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 2)
    norm, plain = BiasedBatchNorm2d(4), nn.BatchNorm2d(4)
    x.requires_grad_()
    out, wanted_out = norm(x), plain(x)
    torch.testing.assert_close(out, wanted_out)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted_out.square().sum(), x)[0])
    wanted = 0.9 + 0.1 * x.var(dim=(0, 2, 3), unbiased=False)
    torch.testing.assert_close(norm.running_var, wanted)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(
        norm.eval()(x),
        nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias),
    )
    assert norm.train()(x[:0]).shape == (0, 4, 5, 2)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_heads=0), "num_heads must be at least 1, got 0"),
        (dict(num_heads=2, kernel_size=0), "kernel_size must be at least 1, got 0"),
        (dict(num_heads=2, padding=3), r"padding must be in 0..2, got 3"),
        (dict(num_heads=3), "num_heads must divide attn_dim=8, got 3"),
        (dict(num_heads=2, pos_embed="contextual"), r"'relative', 'absolute', 'none'.*contextual"),
        (dict(num_heads=2, query_weight="one"), "query_weight must be one of .*got 'one'"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedQueryAttention(8, **kwargs)


def test_maps_are_channels_last() -> None:
    layer = LearnedQueryAttention(8, num_heads=2, kernel_size=3)
    for shape in ((1, 8, 5, 6), (5, 6, 8)):
        with pytest.raises(ValueError, match=r"x must be a channels-last map \[B, H, W, 8\], got"):
            layer(torch.zeros(shape))
