"""Span attention as a layer: golden cases, learned windows, switches, export."""

import copy

import numpy as np
import pytest
import timm
import torch
from golden import arrays, info, relative_error, span_leaf
from span_reference import UnfoldedAttention
from torch import Tensor, nn

from qna_timm.layers import AdaptiveSpan, SpanAttention

GOLDEN = info("span_layers")


def golden_layer(case: dict, **kwargs) -> SpanAttention:
    """The layer of a golden case."""
    heads, size, half = case["g"], case["rel_size"], case["cout"] // 2
    adaptive = case.get("adaptive", False)
    layer = SpanAttention(
        case["cin"],
        case["cout"],
        heads,
        case["k"],
        adaptive=adaptive,
        span_ramp=case.get("R", 2.0),
        rel_size=size,
        **kwargs,
    )
    names = ("query_conv", "key_conv", "value_conv")
    weights = [span_leaf(f"{name}.weight", [case["cout"], case["cin"], 1, 1]) for name in names]
    weights[0] *= case.get("qscale", 1)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat(weights))
        layer.rel_pos_h.copy_(span_leaf("rel_h", [half, 1, 1, size, 1]).view(half, size))
        layer.rel_pos_w.copy_(span_leaf("rel_w", [half, 1, 1, 1, size]).view(half, size))
        if adaptive:
            span = case["z"]
            if span == "det":
                span = span_leaf("adaptive_mask.current_val", [heads, 1]).flatten()
            layer.span_mask.span.copy_(torch.as_tensor(span))
    return layer


@pytest.mark.parametrize("impl", ["auto", "offsets"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, impl: str) -> None:
    case, data = GOLDEN[name], arrays("span_layers")
    layer = golden_layer(case, impl=impl)
    x = np.random.RandomState(0).standard_normal((case["n"], case["cin"], case["h"], case["w"]))
    x = torch.from_numpy(x.astype(np.float32)).requires_grad_()
    out = layer(x)
    out.square().mean().backward()
    grads = dict(zip(("query", "key", "value"), layer.qkv.weight.grad.chunk(3), strict=True))
    found = {f"d_{name}_conv.weight": grad for name, grad in grads.items()}
    found.update(dx=x.grad, d_rel_h=layer.rel_pos_h.grad, d_rel_w=layer.rel_pos_w.grad)
    if layer.span_mask is not None:
        found["d_adaptive_mask.current_val"] = layer.span_mask.span.grad
        assert layer.span_mask.running_radius() == case["radius"]
    assert relative_error(out, data[f"{name}/out"]) <= 1e-4
    for key, grad in found.items():
        wanted = data[f"{name}/{key}"].ravel()
        error = np.linalg.norm(grad.double().numpy().ravel() - wanted)
        assert error <= 1e-3 * np.linalg.norm(wanted) + 1e-8, key


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_renormalisation_matters(eps: float) -> None:
    """The sharp cases tell eps 1e-8 from others."""
    name = "adaptive_R2_zsharp_q4_im32_g4_9x9"
    case = GOLDEN[name]
    x = np.random.RandomState(0).standard_normal((case["n"], case["cin"], case["h"], case["w"]))
    out = golden_layer(case, eps=eps)(torch.from_numpy(x.astype(np.float32)))
    assert relative_error(out, arrays("span_layers")[f"{name}/out"]) > 0.05


def adaptive(**kwargs) -> SpanAttention:
    """A small adaptive layer with spans that differ."""
    torch.manual_seed(0)
    layer = SpanAttention(6, 8, 2, adaptive=True, **kwargs)
    with torch.no_grad():
        layer.span_mask.span.copy_(torch.tensor([0.0, 0.35]))
    return layer.eval()


def test_running_radius() -> None:
    """The released rule: 0.2, 0.4 and 0.6 are more than a fifth in float32."""
    for span, radius, exact in [
        (0.0, 2, 2),
        (0.1, 3, 3),
        (0.2, 4, 3),
        (0.4, 5, 4),
        (0.6, 5, 5),
        (1.0, 5, 5),
    ]:
        for flag, wanted in ((False, radius), (True, exact)):
            mask = AdaptiveSpan(2, span_init=span, exact_radius=flag)
            assert mask.running_radius() == wanted, (span, flag)
    assert AdaptiveSpan(1, span_ramp=2.3).running_radius() == 3
    assert AdaptiveSpan(1, span_ramp=2.3, exact_radius=True).running_radius() == 4
    assert AdaptiveSpan(1, max_span=9, span_init=1.0).running_radius() == 9
    diverged = AdaptiveSpan(2)
    diverged.span.data.fill_(float("nan"))
    assert diverged.running_radius() == 5


def test_span_state() -> None:
    mask = AdaptiveSpan(3)
    with torch.no_grad():
        mask.span.copy_(torch.tensor([-0.5, 0.5, 1.5]))
    assert mask.penalty().item() == pytest.approx(2.5)
    mask.clamp_()
    assert mask.span.tolist() == [0.0, 0.5, 1.0]
    assert mask.pixels().tolist() == [0.0, 2.5, 5.0]
    assert not mask.pixels().requires_grad


@pytest.mark.parametrize("ramp", [1.0, 2.0, 2.3, 4.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_window_without_looking(ramp: float, eps: float) -> None:
    """Compiled and exported layers run at max_span, to the same numbers; gradients too."""
    layer = adaptive(span_ramp=ramp, eps=eps).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    parameters = [x, *layer.parameters()]
    wanted = [layer(x), *torch.autograd.grad(layer(x).square().sum(), parameters)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = [compiled(x), *torch.autograd.grad(compiled(x).square().sum(), parameters)]
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-10)
    exported = torch.export.export(layer, (x.detach(),)).module()
    assert torch.allclose(exported(x.detach()), wanted[0], atol=1e-10)


def test_fixed_radius() -> None:
    layer = adaptive()
    x = torch.randn(1, 6, 7, 7)
    wanted = layer(x)
    assert layer.span_mask.running_radius() == 4
    layer.fix_radius()
    exported = torch.export.export(layer, (x,))
    shapes = [node.meta["val"].shape for node in exported.graph.nodes if "val" in node.meta
              and isinstance(node.meta["val"], Tensor)]  # fmt: skip
    assert (2, 81) in shapes and (2, 121) not in shapes
    assert torch.allclose(exported.module()(x), wanted, atol=1e-6)
    with torch.no_grad():
        layer.span_mask.span.fill_(1.0)
    layer.fix_radius(False)
    assert layer._radius() == 5


def test_plain_operators() -> None:
    """timm's switch for exporters."""
    x = torch.randn(1, 6, 5, 5)
    wanted = adaptive()(x)
    timm.layers.set_fused_attn(False)
    try:
        layer = adaptive()
    finally:
        timm.layers.set_fused_attn(True)
    exported = torch.export.export(layer, (x,))
    assert not [node for node in exported.graph.nodes if "qna_timm" in str(node.target)]
    assert torch.allclose(exported.module()(x), wanted, atol=1e-5)


def test_smaller_spans_compute_less() -> None:
    """The operator is given the running window."""
    layer = adaptive()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.qna_timm.span_attention.default:
                sizes.append(args[1].shape[1])
            return function(*args, **(kwargs or {}))

    for span in (0.0, 0.1, 1.0):
        with torch.no_grad():
            layer.span_mask.span.fill_(span)
            with Watch():
                layer(torch.randn(1, 6, 5, 5))
    assert sizes == [5, 7, 11]


def test_switches() -> None:
    """Each against the unfolded form told to do the same."""
    x = torch.randn(2, 6, 7, 9)
    plain = SpanAttention(6, 8, 2, 5)
    assert torch.allclose(plain(x), UnfoldedAttention(plain)(x), atol=1e-5)
    scaled = SpanAttention(6, 8, 2, 5, scale_scores=True)
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.qkv.weight[:8] /= 2  # sqrt(4)
    assert torch.allclose(plain(x), scaled(x), atol=1e-5)
    # 'both' is 'split' with its channels in another order
    both = SpanAttention(6, 8, 2, 5, rel_axes="both")
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    one = SpanAttention(6, 8, 1, 5)
    one.load_state_dict(both.state_dict())
    with torch.no_grad():
        one.qkv.weight.copy_(both.qkv.weight.view(3, 8, 6, 1, 1)[:, order].flatten(0, 1))
        both.qkv.weight.view(3, 8, 6, 1, 1)[:2, 4:] = 0  # head 1 sees nothing but an even mixture
        one.qkv.weight.copy_(both.qkv.weight.view(3, 8, 6, 1, 1)[:, order].flatten(0, 1))
    mean = nn.functional.avg_pool2d(both.qkv(x)[:, 20:], 5, 1, 2)
    assert torch.allclose(both(x)[:, 4:], mean, atol=1e-5)
    assert torch.allclose(both(x)[:, [0, 1]], one(x)[:, [0, 1]], atol=1e-5)
    masked = SpanAttention(6, 8, 2, 5, mask_padding=True)
    with torch.no_grad():
        masked.qkv.weight[:8] = 0  # even weights over what is on the map
    value = masked.qkv(x)[:, 16:]
    mean = nn.functional.avg_pool2d(value, 5, 1, 2, count_include_pad=False)
    assert torch.allclose(masked(x), mean, atol=1e-5)


def test_scripts_have_one_form() -> None:
    """And say so: a form that is asked for by name is never another."""
    scripted = torch.jit.script(SpanAttention(6, 8, 2, 3, impl="tiles"))
    with pytest.raises(
        torch.jit.Error, match="must be 'auto' or 'offsets' in scripts, got 'tiles'"
    ):
        scripted(torch.randn(1, 6, 4, 5))
    torch.jit.script(SpanAttention(6, 8, 2, 3, impl="offsets"))(torch.randn(1, 6, 4, 5))


@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "adaptive"])
def test_tools(learns: bool) -> None:
    """Scripting, tracing, deepcopy, channels-last, autocast, meta."""
    layer = adaptive(kernel_size=4) if learns else SpanAttention(6, 8, 2, 5).eval()
    x = torch.randn(2, 6, 7, 9)
    wanted = layer(x)
    scripted = torch.jit.script(layer)
    assert torch.allclose(scripted(x), wanted, atol=1e-5)
    scripted(x).sum().backward()
    assert layer.rel_pos_h.grad.abs().sum() > 0
    assert torch.allclose(torch.jit.trace(layer, x)(x), wanted, atol=1e-5)
    assert torch.allclose(copy.deepcopy(layer)(x), wanted)
    assert torch.allclose(layer(x.to(memory_format=torch.channels_last)), wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), wanted.detach().numpy()) < 0.1
    with torch.device("meta"):
        assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == (2, 8, 7, 9)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"num_heads": 3}, "num_heads must divide out_chs=8, got 3"),
        ({"rel_axes": "rows"}, "rel_axes must be one of"),
        ({"num_heads": 8, "rel_axes": "both"}, "must be even for rel_axes='both', got 1"),
        ({"rel_size": 3}, "rel_size must be odd and at least 5, got 3"),
        ({"adaptive": True, "rel_size": 9}, "rel_size must be odd and at least 11, got 9"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"eps": float("nan")}, "eps must not be negative, got nan"),
        ({"adaptive": True, "max_span": 0}, "max_span must be at least 1"),
        ({"adaptive": True, "max_span": 2.5}, "max_span must be at least 1 pixel, whole, got 2.5"),
        ({"adaptive": True, "span_ramp": 0.0}, "span_ramp must be more than 0"),
        ({"adaptive": True, "span_init": 1.5}, "span_init must be in 0..1"),
    ],
)
def test_errors(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        SpanAttention(6, 8, **kwargs)
    assert words in str(error.value)


def test_initialisation() -> None:
    torch.manual_seed(0)
    layer = SpanAttention(64, 128, adaptive=True)
    for part in layer.qkv.weight.chunk(3):
        assert part.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert layer.rel_pos_h.shape == (64, 33)
    assert layer.rel_pos_h.std().item() == pytest.approx(1, rel=0.1)
    assert layer.span_mask.span.tolist() == pytest.approx([0.1] * 4)
