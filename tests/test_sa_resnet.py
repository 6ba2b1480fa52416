"""SA-ResNets: the released function, timm's contract where timm's own tests do not look, any size.

timm's own per-model tests run besides these: scripts/timm_tests.sh.
"""

import copy
import warnings

import numpy as np
import pytest
import timm
import torch
from golden import arrays, images, info, relative_error, released_span
from timm.layers import ConvNormAct
from timm.models import group_parameters
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2
from torch import Tensor

from qna_timm.convert.span import _PROJECTIONS, _our_name
from qna_timm.layers import AdaptiveSpan, AugmentedConv2d, SpanAttention
from qna_timm.models.sa_resnet import SAResNet, checkpoint_filter_fn

GOLDEN = info("sa_resnet")
KINDS = ("cnn", "local", "adaptive", "augmented")
SIZES = ("small", "medium", "large")
# parameters at 100 classes; 'local' without the release's spans, which nothing reads
COUNTS = {
    "small": (546_180, 418_276, 424_560, 707_984),
    "medium": (2_109_828, 1_589_988, 1_603_444, 2_456_308),
    "large": (3_090_820, 2_229_476, 2_257_288, 3_806_952),
}
X = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 32, 32)).astype(np.float32))


def golden_model(variant: str) -> SAResNet:
    """A released variant with the golden files' weights, through the converter, strictly."""
    size, kind = variant.split("_")[:2]
    args = GOLDEN["args"][variant]
    kind = "augmented" if kind == "augconv" else kind
    kwargs = dict(num_heads=args["groups"], span_ramp=args["R"], span_init=args["z_init"])
    if kind != "adaptive":
        kwargs["kernel_size"] = args["attention_kernel"]
    model = timm.create_model(f"sa_resnet_{size}_{kind}", **kwargs)
    model.load_state_dict(checkpoint_filter_fn(released_span(variant), model))
    return model.eval()


def small_model(kind: str = "adaptive", **kwargs: object) -> SAResNet:
    torch.manual_seed(0)
    return timm.create_model(f"sa_resnet_small_{kind}", **kwargs).eval()


def gradient(model: SAResNet, released: str) -> Tensor:
    """A parameter's gradient under its released name."""
    for i, end in enumerate(_PROJECTIONS):
        if released.endswith(end):
            stacked = _our_name(f"{released.removesuffix(end)}qkv.weight")
            return model.get_parameter(stacked).grad.chunk(3)[i]
    return model.get_parameter(_our_name(released)).grad


@pytest.mark.parametrize("variant", GOLDEN["args"])
def test_golden_logits(variant: str) -> None:
    with torch.no_grad():
        logits = golden_model(variant)(X)
    assert relative_error(logits, arrays("sa_resnet")[f"{variant}/logits"]) < 1e-5


@pytest.mark.parametrize("variant", GOLDEN["grads"])
def test_golden_gradients(variant: str) -> None:
    """Of mean(logits^2): every norm, some whole ones, and each span's."""
    model, x = golden_model(variant), X.clone().requires_grad_()
    model(x).square().mean().backward()
    golden = GOLDEN["grads"][variant]
    assert float(x.grad.norm()) == pytest.approx(golden["input_grad_norm"], rel=1e-3)
    for name, norm in golden["grad_norm"].items():
        if not name.endswith("current_val"):  # with a penalty in it
            assert float(gradient(model, name).norm()) == pytest.approx(norm, rel=1e-3), name
    for name, wanted in arrays("sa_resnet").items():
        case, _, path = name.partition("/")
        if case == variant and path != "logits":
            found = x.grad if path == "input" else gradient(model, path)
            assert relative_error(found, wanted) < 1e-3, name
    if "adaptive" in variant:
        for name, wanted in golden["current_val_grad_without_span_penalty"].items():
            assert relative_error(gradient(model, name), np.array(wanted)) < 1e-3, name


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size: str) -> None:
    for kind, wanted in zip(KINDS, COUNTS[size], strict=True):
        model = timm.create_model(f"sa_resnet_{size}_{kind}", device="meta")
        assert sum(p.numel() for p in model.parameters()) == wanted, kind
        assert model.num_classes == 100


def test_parameter_counts_of_other_constructions() -> None:
    """Windows of 3x3; the stem for 64-pixel images at 200 classes."""
    wide = dict(stem_type="conv7_pool", num_classes=200)
    for name, kwargs, wanted in (
        ("small_local", dict(kernel_size=3), 417_828),
        ("small_cnn", wide, 611_208),
        ("small_local", wide, 483_304),
        ("small_adaptive", wide, 489_588),
        ("large_adaptive", wide, 2_373_516),
    ):
        model = timm.create_model(f"sa_resnet_{name}", device="meta", **kwargs)
        assert sum(p.numel() for p in model.parameters()) == wanted, name


def test_state_dict_names() -> None:
    """What checkpoints on disk hold: names are frozen."""
    spatial = {
        "cnn": ["weight"],
        "local": ["rel_pos_h", "rel_pos_w", "qkv.weight"],
        "adaptive": ["rel_pos_h", "rel_pos_w", "qkv.weight", "span_mask.span"],
        "augmented": [f"{m}.{p}" for m in ("conv", "qkv", "proj") for p in ("weight", "bias")],
    }
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

    def conv_norm(module: str) -> list[str]:
        return [f"{module}.conv.weight", *(f"{module}.bn.{leaf}" for leaf in norm)]

    for kind in KINDS:
        block = [
            *conv_norm("conv1"),
            *(f"spatial.{leaf}" for leaf in spatial[kind]),
            *(f"norm2.{leaf}" for leaf in norm),
            *conv_norm("conv3"),
            *conv_norm("shortcut"),
        ]
        wanted = [*conv_norm("stem"), "head.fc.weight", "head.fc.bias"]
        wanted += [f"stages.{i}.0.{name}" for i in range(3) for name in block]
        assert sorted(small_model(kind).state_dict()) == sorted(wanted)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (40, 8), (7, 5), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_image_size(kind: str, size: tuple[int, int]) -> None:
    """Odd and tiny images, smaller than a window; batch 1, any memory layout."""
    model = small_model(kind)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        logits = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(model(torch.cat([x, x]))[1:], logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x.mT.contiguous().mT), logits, rtol=1e-4, atol=1e-5)
        model = model.to(memory_format=torch.channels_last)
        channels_last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), logits, rtol=1e-4, atol=1e-5)
    assert logits.shape == (1, 100) and logits.isfinite().all()
    for feature, reduction in zip(maps, (2, 4, 8), strict=True):
        assert feature.shape[2:] == tuple(-(-side // reduction) for side in size)


def test_windows_of_fixed_size() -> None:
    model = timm.create_model("sa_resnet_small_adaptive").eval()
    x = torch.randn(1, 3, 16, 16)
    wanted = model(x)
    model.fix_radius()
    layers = [m for m in model.modules() if isinstance(m, SpanAttention)]
    assert [layer.fixed_radius for layer in layers] == [3, 3, 3]
    assert torch.equal(model(x), wanted)
    model.fix_radius(False)
    assert [layer.fixed_radius for layer in layers] == [-1, -1, -1]


def test_larger_images_through_the_other_stem() -> None:
    for side, wanted in ((64, 2), (71, 3), (224, 7)):
        model = small_model("cnn", stem_type="conv7_pool", num_classes=200)
        assert model.forward_features(torch.randn(1, 3, side, side)).shape[2] == wanted
    assert [f["reduction"] for f in model.feature_info] == [8, 16, 32]


def test_cut_cells_are_averaged_over_what_is_there() -> None:
    pool = small_model("cnn").stages[0][0].pool3
    ramp = torch.arange(9.0).view(1, 1, 3, 3)
    torch.testing.assert_close(pool(ramp), torch.tensor([[[[2.0, 3.5], [6.5, 8.0]]]]))


def test_arguments_reach_the_layers() -> None:
    switches = dict(
        rel_axes="both", mask_padding=True, scale_scores=True, eps=0.0, impl="offsets", num_heads=2
    )
    model = small_model(**switches, span_ramp=1.0, span_init=0.4, max_span=3, exact_radius=True)
    for layer, width in zip((s[0].spatial for s in model.stages), (32, 64, 128), strict=True):
        assert (layer.num_heads, layer.rel_axes, layer.impl) == (2, "both", "offsets")
        assert layer.mask_padding and layer.eps == 0.0 and layer.scale == (width / 2) ** -0.5
        mask = layer.span_mask
        assert (mask.max_span, mask.span_ramp, mask.exact_radius) == (3, 1.0, True)
        assert torch.equal(mask.span, torch.full((2,), 0.4))
    layer = small_model("augmented", kernel_size=5, key_dim=16, value_dim=8, relative=True)
    layer = layer.stages[0][0].spatial
    assert isinstance(layer, AugmentedConv2d) and layer.rel_pos_h.shape == (63, 4)
    assert layer.conv.kernel_size == (5, 5) and layer.value_dim == 8


def test_grad_reaches_every_parameter_of_relative_augmented_convolutions() -> None:
    model = small_model("augmented", relative=True).train()
    model(X).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "rel_pos" in n)


def test_features_and_pruning() -> None:
    """Every stage's map, by the wrapper and by pruning; no parameter of a pruned model is idle."""
    names = [f"sa_resnet_medium_{kind}" for kind in KINDS]
    for name in names:
        features = timm.create_model(name, features_only=True).eval()
        assert features.feature_info.channels() == [128, 256, 512, 1024]
        assert features.feature_info.reduction() == [1, 2, 4, 8]
        assert [f.shape[2] for f in features(X)] == [32, 16, 8, 4]
    assert len(timm.create_model("sa_resnet_small_cnn", features_only=True)(X)) == 3
    model = small_model("local")
    wanted = model.forward_intermediates(X, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert model.num_features == model.head_hidden_size == 256
    out = model(X)
    torch.testing.assert_close(out, wanted)
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model = small_model("local")
    wanted = model(X)
    model.prune_intermediate_layers([2], prune_head=False)
    torch.testing.assert_close(model(X), wanted)


def test_intermediates_stop_early() -> None:
    model = small_model("local")
    features, maps = model.forward_intermediates(X)
    torch.testing.assert_close(features, model.forward_features(X))
    torch.testing.assert_close(features, maps[-1])
    early = model.forward_intermediates(X, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], maps[0])


def test_classifier() -> None:
    model = small_model("adaptive", drop_rate=0.5)
    assert model.head.drop.p == 0.5
    model.reset_classifier(7)
    assert model(X).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(X), model.forward_head(model.forward_features(X), True))
    model.reset_classifier(0, "")
    assert model(X).shape == (2, 512, 4, 4)
    model.reset_classifier(3, "catavgmax")
    assert model(X).shape == (2, 3) and model.head_hidden_size == 1024


def test_gradient_checkpointing_and_deepcopy() -> None:
    grads = []
    model = small_model().train()
    for enable in (False, True):
        run = copy.deepcopy(model)
        run.set_grad_checkpointing(enable)
        run(X).square().mean().backward()
        grads.append([p.grad for p in run.parameters()])
    assert all(p.grad is None for p in model.parameters())
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def test_stochastic_depth() -> None:
    model = timm.create_model("sa_resnet_large_cnn", drop_path_rate=0.4, device="meta")
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage]
    assert rates == pytest.approx([0.05 * i for i in range(9)])


def test_weight_decay_and_layer_decay() -> None:
    """Every parameter decays with filter_bias_and_bn=False, as in the release; rates by block."""
    model = small_model()
    optimizer = create_optimizer_v2(model, opt="sgd", weight_decay=5e-4, filter_bias_and_bn=False)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}
    optimizer = create_optimizer_v2(model, opt="sgd", weight_decay=5e-4)
    spans = {id(m.span) for m in model.modules() if isinstance(m, AdaptiveSpan)}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0 or not spans & {id(p) for p in group["params"]}
    optimizer = create_optimizer_v2(model, opt="sgd", layer_decay=0.5)
    assert {g["lr_scale"] for g in optimizer.param_groups} == {1.0, 0.5, 0.25, 0.125, 0.0625}


def test_layer_groups() -> None:
    """Stem, blocks (or stages) and head."""
    model = timm.create_model("sa_resnet_large_cnn", device="meta")
    for coarse, layers in ((False, 1 + 9 + 1), (True, 1 + 4 + 1)):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(groups) == layers


@pytest.mark.parametrize("kind", KINDS)
def test_init_weights_after_to_empty(kind: str) -> None:
    kwargs = dict(relative=True) if kind == "augmented" else {}
    model = timm.create_model(f"sa_resnet_small_{kind}", device="meta", **kwargs)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    fresh = timm.create_model(f"sa_resnet_small_{kind}", **kwargs)
    for name, tensor in fresh.state_dict().items():
        found, wanted = model.state_dict()[name].double(), tensor.double()
        assert found.isfinite().all(), name
        if wanted.numel() < 100 or wanted.std() == 0:
            assert found.abs().max() <= 2 * wanted.abs().max() + 0.1, name
        else:
            assert float(found.std()) == pytest.approx(float(wanted.std()), rel=0.3), name
    assert model(X).isfinite().all()


def test_initialisation() -> None:
    """Projections N(0, 2/C), relative vectors N(0, 1), spans at span_init, the rest PyTorch's."""
    torch.manual_seed(0)
    layer = timm.create_model("sa_resnet_medium_adaptive", span_init=0.3).stages[3][0]
    assert float(layer.spatial.qkv.weight.detach().std()) == pytest.approx(
        (2 / 256) ** 0.5, rel=0.02
    )
    assert float(layer.spatial.rel_pos_h.detach().std()) == pytest.approx(1.0, rel=0.05)
    assert torch.equal(layer.spatial.span_mask.span, torch.full((4,), 0.3))
    bound = 512**-0.5
    assert bound * 0.99 < float(layer.conv1.conv.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Autocast and converted weights, forward and backward."""
    model = small_model(kind).train()
    wanted = model(X).detach().numpy()
    with torch.autocast("cpu", dtype=dtype):
        out = model(X)
    assert relative_error(out.float(), wanted) < 0.1
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    out = model.to(dtype)(X.to(dtype))
    assert out.dtype == dtype and relative_error(out.float(), wanted) < 0.1


@pytest.mark.parametrize("side", [31, 32, 33, 36])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_shortcut_takes_the_first_pixel_of_every_cell(stride: int, side: int) -> None:
    model = small_model("cnn", layers=(1, 1), channels=(8, 8), strides=(1, stride)).eval()
    block, x = model.stages[1][0], torch.randn(2, 32, side, side)
    at_first = block.shortcut(x)
    whole = block.shortcut.conv.weight[:, :, 0, 0]
    wanted = torch.einsum("oc,bcyx->boyx", whole, x[:, :, ::stride, ::stride])
    torch.testing.assert_close(at_first, block.shortcut.bn(wanted), rtol=1e-4, atol=1e-5)
    assert block(x).shape == at_first.shape


@pytest.mark.parametrize(
    "kind",
    # a learned window has all that a fixed one has; test_augmented_conv.py compiles the other kind
    ["adaptive", *(pytest.param(x, marks=pytest.mark.thorough) for x in KINDS if x != "adaptive")],
)
def test_compile_in_one_graph(kind: str) -> None:
    """Forward and backward traced whole (without the code generator), also at another size."""
    model = small_model(kind, layers=(1,), channels=(16,), strides=(2,), num_classes=5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-5)
    compiled(X).mean().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(X).mean().backward()
    for p, grad in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5)
    odd = X[:, :, :19, :27]
    torch.testing.assert_close(compiled(odd), model(odd), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_image(kind: str) -> None:
    """vmap over grad, as for privacy or influence: their mean is the gradient of the mean."""
    model = small_model(kind)
    parameters = dict(model.named_parameters())
    x = torch.randn(2, 3, 9, 10)

    def loss(parameters: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().mean().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(each[name].mean(dim=0), p.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs(kind: str) -> None:
    """Export, FX and TorchScript give what the model gives."""
    model = small_model(kind)
    with torch.no_grad():
        wanted = model(X)
        program = torch.export.export(model, (X,))
        torch.testing.assert_close(program.module()(X), wanted, rtol=1e-4, atol=1e-5)
        traced = create_feature_extractor(model, {"stages.1": "map", "head": "logits"})(X)
        torch.testing.assert_close(traced["logits"], wanted, rtol=1e-4, atol=1e-5)
        assert traced["map"].shape == (2, 256, 8, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(X), wanted, rtol=1e-4, atol=1e-5)


def test_input_channels_and_classes_from_a_file(caplog) -> None:
    """The head kept where the class counts agree, fresh and said so where not; the stem adapted."""
    source = small_model(num_classes=10)

    def create(**kwargs: object) -> SAResNet:
        overlay = {"state_dict": copy.deepcopy(source.state_dict())}
        return small_model(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    torch.testing.assert_close(create(num_classes=10)(X), source(X))
    grey = create(num_classes=10, in_chans=1)
    assert grey.stem.conv.weight.shape[1] == 1 and "fresh" not in caplog.text
    other = create(num_classes=7)
    assert "checkpoint has 10 classes, the model 7: the classifier is fresh" in caplog.text
    torch.testing.assert_close(other.forward_features(X), source.forward_features(X))


def test_other_activation_and_norm() -> None:
    model = small_model("local", act_layer="gelu", norm_layer="groupnorm1")
    assert isinstance(model.stem, ConvNormAct) and model(X).isfinite().all()
    assert not any(isinstance(m, torch.nn.ReLU | torch.nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(spatial="conv"), r"spatial must be one of .*'augmented'\), got 'conv'"),
        (dict(stem_type="cifar"), r"stem_type must be one of \['conv3', 'conv7_pool'\], got 'cif"),
        (dict(layers=(1, 1)), "a value for each stage, got 2, 3 and 3"),
        (dict(strides=(1, 0, 2)), "must be at least 1, got .*0, 2"),
        (dict(num_heads=3), "num_heads must divide out_chs=32, got 3"),
        (dict(spatial="local", kernel_size=4), "kernel_size must be odd, got 4"),
        (dict(spatial="cnn", kernel_size=4), "kernel_size must be odd, got 4"),
        (dict(span_ramp=0), "span_ramp must be more than 0 pixels, got 0"),
        (dict(rel_axes="all"), "rel_axes must be one of"),
    ],
)
def test_bad_constructions(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**kwargs)


def test_input_of_the_golden_files() -> None:
    """The images that all golden outputs are for are those of the rule."""
    assert torch.equal(X, images(0, 2, 3, 32, 32))
