"""QnA-ViT: the released function, timm's contract where timm's own tests do not look, any size.

timm's own per-model tests run besides these: scripts/timm_tests.sh.
"""

import copy
import logging

import numpy as np
import pytest
import timm
import torch
from golden import arrays, flax_params, images, info, projection, relative_error
from timm.models import FeatureInfo, group_parameters
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

import qna_timm
from qna_timm.convert.qna import _attention_layer, _qna_vit_name, _to_layout
from qna_timm.layers import LearnedQueryAttention
from qna_timm.models.qna_vit import QnAViT, checkpoint_filter_fn

NAMES = ("qna_vit_tiny", "qna_vit_tiny_7x7", "qna_vit_small", "qna_vit_base")
SMALL = dict(
    num_classes=10,
    img_size=64,
    embed_dim=32,
    qna_depths=(1, 1, 1, 0),
    window_depths=(0, 0, 1, 1),
    qna_num_heads=(4, 8, 16, 32),
    window_num_heads=(1, 2, 4, 8),
    window_size=(4, 4, 2, 2),
    drop_path_rate=0.0,
)
# released configuration key -> (ours, value)
OVERRIDES = {
    "lsa_layers": lambda v: ("window_depths", v),
    "qna_layers": lambda v: ("qna_depths", v),
    "classification_head_type": lambda v: ("head_type", v.replace("qnav", "qna_v")),
    "qna_down_skip": lambda v: ("down_shortcut", v),
    "layer_scale": lambda v: ("init_values", v),
    "qna_normalize_q": lambda v: ("normalize_query", v),
    "lsa_pos_embedding_type": lambda v: ("window_pos_embed", v),
    "qna_attention_scale": lambda v: ("query_weight", v),
    "drop_path_downsample": lambda v: ("drop_path_downsample", v),
}
SMALL_CASES = {
    name: case for name, case in info()["small_models"]["cases"].items() if case["status"] == "ok"
}


def load_rule(model: QnAViT, shapes: dict[str, list[int]]) -> QnAViT:
    """Load the golden files' weights through the converter, strictly."""
    model.load_state_dict(checkpoint_filter_fn(flax_params(shapes), model))
    return model.eval()


def golden_model(name: str) -> QnAViT:
    return load_rule(timm.create_model(name), info()[f"spec_{name}"]["params"])


def small_model(**kwargs: object) -> QnAViT:
    torch.manual_seed(0)
    return timm.create_model("qna_vit_tiny", **{**SMALL, **kwargs}).eval()


def check_gradients(model: QnAViT, shapes: dict, wanted: dict) -> None:
    """Norm and signed projection of each parameter's gradient, in the released layout."""
    counts = {p.split("/")[0][9:]: 0 for p in shapes if p.startswith("LSA")}
    for stage in counts:
        blocks = {p.split("/")[1] for p in shapes if p.startswith(f"LSAStage_{stage}/")}
        counts[stage] = len(blocks)
    for path, golden in wanted.items():
        name, layout = _qna_vit_name(path, {str(i): counts.get(str(i), 0) for i in range(4)})
        layer = _attention_layer(name, model)
        heads = getattr(layer, "num_queries", 1), getattr(layer, "num_heads", 1)
        index = torch.arange(int(np.prod(shapes[path]))).view(shapes[path])
        gradient = np.empty(index.numel(), np.float32)
        flat = model.get_parameter(name).grad.numpy().ravel()
        gradient[_to_layout(index, layout, *heads).numpy().ravel()] = flat
        norm = float(np.linalg.norm(gradient))
        assert abs(norm - golden["l2"]) <= 1e-3 * golden["l2"] + 1e-8, path
        bound = 3e-3 * golden["l2"] + 1e-8
        found = projection(path, gradient.reshape(shapes[path]))
        assert abs(found - golden["proj"]) <= bound, path


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(name: str) -> None:
    model = timm.create_model(name, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert count == info()[f"spec_{name}"]["total_params"]


@pytest.mark.parametrize("name", NAMES)
def test_multiply_adds(name: str) -> None:
    """The released code's count, but for the folding of queries into keys, which it counts too."""
    model = timm.create_model(name, device="meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(
        info()[f"spec_{name}"]["macs"]["total"], rel=2e-3
    )


@pytest.mark.parametrize("name", ["qna_vit_tiny", "qna_vit_tiny_7x7"])
def test_golden_logits(name: str) -> None:
    x = images(0, 2, 224, 224, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert relative_error(golden_model(name)(x), arrays()[f"{name}/logits"]) < 5e-6


def test_golden_stages_and_gradients() -> None:
    """Every stage's map, the released num_classes=0 output, and all gradients of mean(out^2)."""
    model = golden_model("qna_vit_tiny")
    maps: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda _module, _inputs, out: maps.__setitem__(name, out.detach())

    model.stem.register_forward_hook(keep("stem"))
    model.norm.register_forward_hook(keep("head_norm"))
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(keep(f"end_{i}"))
        if i > 0:  # the release counts the strided block to the stage before
            stage.downsample.register_forward_hook(keep(f"QnAStage_{i - 1}"))
    logits = model(images(0, 2, 224, 224, 3).permute(0, 3, 1, 2))
    maps["QnAStage_3"] = maps["end_3"]
    for name in ("stem", "QnAStage_0", "QnAStage_1", "QnAStage_2", "QnAStage_3", "head_norm"):
        wanted = arrays()[f"qna_vit_tiny_stages/stage/{name}"]
        assert relative_error(maps[name], wanted) < 1e-4, name
    logits.square().mean().backward()
    grads = info()["golden_qna_vit_tiny_grads"]["grads"]
    check_gradients(model, {path: g["shape"] for path, g in grads.items()}, grads)


@pytest.mark.parametrize("name", SMALL_CASES)
def test_golden_constructions(name: str) -> None:
    """The optional parts: heads, shortcuts, layer scale, windows in every stage, odd sizes."""
    case = SMALL_CASES[name]
    kwargs = dict(OVERRIDES[key](value) for key, value in case["overrides"].items())
    model = load_rule(
        small_model(**kwargs, num_classes=case["num_classes"] or 10),
        {
            **case["params"],
            **(
                {}
                if case["num_classes"]
                else {
                    path: shape
                    for path, shape in SMALL_CASES["base"]["params"].items()
                    if path.startswith("ClassificationHead_0/")
                }
            ),
        },
    )
    seed, size = (4, (2, 66, 62, 3)) if name.startswith("img66") else (2, (2, 64, 64, 3))
    x = images(seed, *size).permute(0, 3, 1, 2)
    out = model(x) if case["num_classes"] else model.forward_features(x)
    assert relative_error(out, arrays()[f"small/{name}/logits"]) < 5e-6
    if case.get("grads"):
        out.square().mean().backward()
        check_gradients(model, case["params"], case["grads"])


def test_golden_resnet_stem_statistics() -> None:
    shapes = {path: shape for path, shape in SMALL_CASES["base"]["params"].items()}
    del shapes["StemBlock_0/conv_1x1/kernel"]
    shapes["StemBlock_0/conv_7x7/kernel"] = [7, 7, 3, 32]
    for name in ("scale", "bias", "mean", "var"):
        shapes[f"StemBlock_0/BatchNorm_0/{name}"] = [32]
    model = load_rule(small_model(stem_type="resnet"), shapes).train()
    golden = {
        key.rsplit("/", 1)[-1]: value
        for key, value in arrays().items()
        if key.startswith("stem_resnet/after/")
    }
    logits = model(images(2, 2, 64, 64, 3).permute(0, 3, 1, 2))
    assert relative_error(logits, arrays()["stem_resnet/logits_train"]) < 1e-4
    assert relative_error(model.stem.bn.running_mean, golden["mean"]) < 1e-5
    assert relative_error(model.stem.bn.running_var, golden["var"]) < 1e-5


@pytest.mark.parametrize("name", [*NAMES, "small_downsample_False"])
def test_golden_drop_path(name: str) -> None:
    if name in NAMES:
        model = timm.create_model(name, device="meta")
    else:
        model = small_model(drop_path_rate=0.1, drop_path_downsample=False)
    order = []
    for i, stage in enumerate(model.stages):
        order += [stage.downsample] if i > 0 else []
        order += list(stage.blocks)
    golden = info()["verify"][f"drop_path_{name}"]
    assert len(order) == len(golden)
    for block, wanted in zip(order, golden, strict=True):
        assert getattr(block.drop_path2, "drop_prob", 0.0) == pytest.approx(wanted["drop_path"])
        first = wanted["drop_path"] if wanted["spatial_residual_has_drop_path"] else 0.0
        assert getattr(block.drop_path1, "drop_prob", 0.0) == pytest.approx(first)


def test_golden_initialisation() -> None:
    """Standard deviations and bounds of freshly made parameters."""
    torch.manual_seed(0)
    model = timm.create_model("qna_vit_tiny")
    counts = {"0": 0, "1": 0, "2": 4, "3": 2}
    for path, wanted in info()["verify"]["init_stats_qna_vit_tiny"].items():
        value = model.get_parameter(_qna_vit_name(path, counts)[0])
        count = value.numel()
        if wanted["std"] == 0:
            assert (value == wanted["mean"]).all(), path
            continue
        # five standard errors of a standard deviation's estimate, on both sides
        assert float(value.detach().std()) == pytest.approx(
            wanted["std"], rel=8 / (2 * count) ** 0.5
        ), path
        if not path.endswith("attn_scale_weights"):  # the others are truncated
            largest = max(-wanted["min"], wanted["max"])
            assert float(value.detach().abs().max()) <= 1.15 * largest + 0.02


def test_init_weights_after_to_empty() -> None:
    model = timm.create_model("qna_vit_tiny", device="meta", **{**SMALL, "query_weight": "posneg"})
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan"))
    model.init_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("size", [(224, 224), (384, 384), (200, 312), (33, 97), (7, 5), (1, 1)])
def test_any_image_size(size: tuple[int, int]) -> None:
    """Non-square, odd and tiny images, batch 1; features at the sizes their reductions say."""
    model = timm.create_model("qna_vit_tiny", num_classes=5).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        logits = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(logits, model(torch.cat([x, x]))[:1], rtol=1e-4, atol=1e-5)
        model = model.to(memory_format=torch.channels_last)
        channels_last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x.mT.contiguous().mT), logits, rtol=1e-4, atol=1e-5)
    assert logits.shape == (1, 5) and logits.isfinite().all()
    for feature, reduction in zip(
        maps, FeatureInfo(model.feature_info, 4).reduction(), strict=True
    ):
        assert feature.shape[2:] == tuple(-(-side // reduction) for side in size)


def test_img_size_scales_windows() -> None:
    for size, windows in ((224, (14, 7)), (384, (24, 12)), (32, (2, 1)), ((224, 448), None)):
        model = timm.create_model("qna_vit_tiny", img_size=size, device="meta")
        wanted = ((14, 28), (7, 14)) if windows is None else tuple((w, w) for w in windows)
        assert model.window_size[2:] == wanted
        assert model.stages[2].blocks[0].attn.window_size == wanted[0]


def test_set_input_size() -> None:
    """Tables as the released fine-tuning resizes them; the same as building at the new size."""
    model = golden_model("qna_vit_tiny")
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    source = copy.deepcopy(model.state_dict())
    model.set_input_size(384)
    name = "stages.2.blocks.0.attn.rel_pos_bias"
    assert old[name].shape == (27 * 27, 8) and model.get_parameter(name).shape == (47 * 47, 8)
    built = timm.create_model(
        "qna_vit_tiny", img_size=384, pretrained=True, pretrained_cfg_overlay={"state_dict": source}
    ).eval()
    x = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        torch.testing.assert_close(model(x), built(x))
    model.set_input_size(224)
    assert model.window_size == ((14, 14), (14, 14), (14, 14), (7, 7))
    model.set_input_size(window_size=(14, 14, 7, 7))
    assert model.stages[2].blocks[0].attn.rel_pos_bias.shape == (13 * 13, 8)
    with pytest.raises(ValueError, match="img_size must be positive"):
        model.set_input_size(0)
    with pytest.raises(ValueError, match="one entry for each of 4 stages"):
        model.set_input_size(window_size=(7, 7))


def test_set_input_size_is_remembered() -> None:
    """Sizes and windows are what the next call starts from; frozen tables stay frozen."""
    model = small_model(head_type="qna_v1").requires_grad_(False)
    windows = model.window_size
    model.set_input_size((80, 128))
    assert model.img_size == (80, 128) and model.window_size == ((5, 8), (5, 8), (2, 4), (3, 4))
    assert model.stages[2].blocks[0].attn.window_size == (2, 4)
    assert model.attn_pool.kernel_size == (3, 4), "part of a token is a token"
    model.set_input_size(64)
    assert model.window_size == windows == ((4, 4), (4, 4), (2, 2), (2, 2))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("head_type", ["qna_v1", "qna_v2"])
def test_query_head_at_other_sizes(head_type: str) -> None:
    model = small_model(head_type=head_type)
    x = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        assert model(x[..., :96]).shape == (2, 10)
        before = model(x)
        model.set_input_size((96, 160), window_size=(4, 4, 2, 2))
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert model.attn_pool.rel_pos_bias.shape[0] == 3 * 5
    model.reset_classifier(0)
    assert model(x).shape == (2, 256)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 3, 5, 256)


def test_hub_export_at_another_size(tmp_path) -> None:
    model = small_model()
    model.set_input_size(96)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(again(x), model(x))


def test_input_channels_and_classes_from_a_file(tmp_path, caplog) -> None:
    """Head kept where the class counts agree, fresh and said so where not; stem adapted."""
    torch.manual_seed(0)
    source = small_model()
    path = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    save_file(source.state_dict(), path)

    def create(**kwargs: object) -> QnAViT:
        overlay = {"file": str(path)}
        return small_model(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    x = torch.randn(1, 3, 64, 64)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(create()(x), source(x))
        grey = create(in_chans=1)
        assert grey.stem.conv.weight.shape[1] == 1 and grey(x[:, :1]).shape == (1, 10)
        assert "classifier is fresh" not in caplog.text
        other = create(num_classes=7)
    assert "checkpoint has 10 classes, the model 7: the classifier is fresh" in caplog.text
    torch.testing.assert_close(other.forward_features(x), source.forward_features(x))


def test_weight_decay_groups() -> None:
    """Exactly the release's list is not decayed when one-dimensional parameters are."""
    model = timm.create_model("qna_vit_tiny")
    kinds = {name.rsplit(".", 1)[1] for name in model.no_weight_decay()}
    assert kinds == {"rel_pos_bias", "query_weight"}
    every = sum("rel_pos_bias" in n or "query_weight" in n for n, _ in model.named_parameters())
    assert len(model.no_weight_decay()) == every == 26
    ones = small_model(query_weight="ones")
    assert not any("query_weight" in name for name in ones.no_weight_decay())
    shared = small_model(query_weight="normal_elementwise")
    assert any("query_weight" in name for name in shared.no_weight_decay())
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, filter_bias_and_bn=False)
    exempt = sum(len(g["params"]) for g in optimizer.param_groups if g["weight_decay"] == 0)
    assert exempt == 26


def test_layer_decay_reaches_every_parameter() -> None:
    model = timm.create_model("qna_vit_tiny")
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.8)
    scales = {g["lr_scale"]: len(g["params"]) for g in optimizer.param_groups}
    assert max(scales) == 1.0 and min(scales) < 0.1
    head = {id(p) for p in model.head.parameters()}
    top = {id(p) for g in optimizer.param_groups if g["lr_scale"] == 1.0 for p in g["params"]}
    assert head <= top and not any(id(p) in top for p in model.stem.parameters())


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups(coarse: bool) -> None:
    """A strided block belongs to the first block behind it, norm and attention pool to the last."""
    model = small_model(head_type="qna_v1", stem_type="resnet")

    def place(name: str) -> str:
        first, *rest = name.split(".")
        if first != "stages" or coarse:
            return ".".join([first, *rest[:1]]) if first == "stages" else first
        return ".".join([first, *rest[: 2 if rest[1] == "downsample" else 3]])

    groups = group_parameters(model, model.group_matcher(coarse=coarse)).values()
    stages = [
        ["stages.0.blocks.0"],
        ["stages.1.blocks.0", "stages.1.downsample"],
        ["stages.2.blocks.0", "stages.2.downsample"],
        ["stages.2.blocks.1"],
        ["attn_pool", "norm", "stages.3.blocks.0", "stages.3.downsample"],
    ]
    wanted = [["stem"], *stages, ["head"]]
    if coarse:
        wanted = [["stem"], *([f"stages.{i}"] for i in range(4)), ["attn_pool", "head", "norm"]]
    assert [sorted({place(name) for name in group}) for group in groups] == wanted


def test_windows_of_learned_queries_stage_by_stage() -> None:
    """A strided block has the window of the stage before it."""
    model = small_model(kernel_size=(3, 5, 7, 3))
    sides = {
        name: layer.kernel_size[0]
        for name, layer in model.named_modules()
        if isinstance(layer, LearnedQueryAttention)
    }
    assert sides == {
        "stages.0.blocks.0.attn": 3,
        "stages.1.downsample.attn": 3,
        "stages.1.blocks.0.attn": 5,
        "stages.2.downsample.attn": 5,
        "stages.2.blocks.1.attn": 7,
        "stages.3.downsample.attn": 7,
    }


@pytest.mark.parametrize("head_type", ["gap", "qna_v1"])
def test_pruning(head_type: str) -> None:
    """What is left of the network is one of fewer stages: its map, its widths, its windows."""
    x = torch.randn(2, 3, 64, 64)
    model = small_model(head_type=head_type)
    (wanted,) = model.forward_intermediates(x, [1], norm=True, intermediates_only=True)
    (early,) = model.forward_intermediates(
        x, [1], norm=True, stop_early=True, intermediates_only=True
    )
    torch.testing.assert_close(early, wanted)
    assert model.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(model(x).permute(0, 3, 1, 2), wanted)
    assert model.num_features == model.head_hidden_size == 64
    model.set_input_size(96)
    assert len(model.window_size) == 2
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5) and model.head_hidden_size == 128


def test_gradient_checkpointing_gradients() -> None:
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model = small_model().train()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def test_features_only_for_detection() -> None:
    x = torch.randn(1, 3, 96, 128)
    nhwc = timm.create_model("qna_vit_tiny", features_only=True).eval()
    nchw = timm.create_model("qna_vit_tiny", features_only=True, feature_cls="getter").eval()
    assert [f.shape[1:3] for f in nhwc(x)] == [f.shape[2:] for f in nchw(x)]
    assert nchw.feature_info.channels() == [64, 128, 256, 512]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Autocast and converted weights, forward and backward."""
    model = small_model().train()
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x).detach().numpy()
    with torch.autocast("cpu", dtype=dtype):
        out = model(x)
    assert relative_error(out.float(), wanted) < 0.1
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and relative_error(out.float(), wanted) < 0.1


def test_compile_in_one_graph() -> None:
    """Traced whole (backend 'eager': the graph is the same, the code generator left out)."""
    model = small_model()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.train()
    compiled(x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    model = small_model()
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (77, 57), (96, 160)])
def test_trace_of_another_size(size: tuple[int, int]) -> None:
    """Windows of the map of now, its padding and its mask; a map smaller than a window, too."""
    model = small_model()
    torch.nn.init.normal_(model.stages[3].blocks[0].attn.rel_pos_bias)
    traced, x = torch.jit.trace(model, torch.randn(2, 3, 40, 40)), torch.randn(3, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def test_script_and_trace_agree() -> None:
    model = small_model(head_type="qna_v2", stem_type="resnet", down_shortcut="avgpool")
    x = torch.randn(2, 3, 72, 64)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(head_type="qnav1"), "head_type must be 'gap', 'qna_v1' or 'qna_v2', got 'qnav1'"),
        (dict(stem_type="conv"), r"stem_type must be one of \['patch', 'resnet'\], got 'conv'"),
        (dict(down_shortcut="max"), "down_shortcut must be 'conv' or 'avgpool', got 'max'"),
        (dict(window_size=(4, 4)), "one entry for each of 4 stages"),
        (dict(window_size=0), "window_size must be positive"),
        (
            dict(qna_depths=(1,) * 5, window_depths=(0,) * 5, window_size=None),
            "window_size must be given for 5 stages",
        ),
        (dict(qna_num_heads=(4, 8)), r"qna_num_heads must be .* of 4 stages, got \(4, 8\)"),
        (dict(window_num_heads=(-1, 2, 4, 8)), "window_num_heads must be a number of at least 0"),
        (dict(kernel_size=0), "kernel_size must be a number of at least 1"),
        (dict(normalize_query=(True,)), "normalize_query must be one value or 4"),
        (dict(qna_depths=(1, 1, 1, -1)), "qna_depths and window_depths must not be negative"),
        (dict(embed_dim=-8), "embed_dim must be at least 1, got 3 and -8"),
        (dict(window_pos_embed="absolute"), "'relative' or 'none', got 'absolute'"),
        (dict(window_depths=(1, 1)), "must have one entry a stage"),
    ],
)
def test_bad_constructions(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**kwargs)


def test_names_of_wrapped_models() -> None:
    """Weights saved from under DistributedDataParallel and torch.compile."""
    model = small_model()
    state = {f"module._orig_mod.{name}": x for name, x in model.state_dict().items()}
    converted = checkpoint_filter_fn({"state_dict": state}, model)
    assert converted.keys() == model.state_dict().keys()


def test_queries_of_blocks() -> None:
    """Normalised or not, stage by stage."""
    model = small_model(normalize_query=(True, False, True, False), normalize_stop_grad=True)
    found = {
        name: layer.normalize_query
        for name, layer in model.named_modules()
        if isinstance(layer, LearnedQueryAttention)
    }
    assert {name.split(".")[1] for name in found} == set("0123")
    for name, normalized in found.items():
        # a strided block belongs to the stage before it
        before = int(name.split(".")[1]) - ("downsample" in name)
        assert normalized == (before % 2 == 0), name
    assert all(
        layer.normalize_stop_grad
        for layer in model.modules()
        if isinstance(layer, LearnedQueryAttention)
    )


@pytest.mark.parametrize("head_type", ["qna_v1", "qna_v2"])
def test_query_head_is_the_released_one_whatever_blocks_have(head_type: str) -> None:
    blocks = dict(query_weight="none", pos_embed="none", normalize_query=False, qkv_bias=True)
    model = small_model(head_type=head_type, normalize_stop_grad=True, num_queries=3, **blocks)
    usual = small_model(head_type=head_type)
    pool, wanted = model.attn_pool, usual.attn_pool
    assert pool.normalize_query and not pool.normalize_stop_grad
    shapes = {name: x.shape for name, x in pool.state_dict().items()}
    assert shapes == {name: x.shape for name, x in wanted.state_dict().items()}
    pool.load_state_dict(wanted.state_dict())
    x = torch.randn(2, 2, 2, 256)
    assert torch.equal(pool(x), wanted(x))


def test_features_of_three_stages() -> None:
    numbers = dict(qna_depths=(1, 1, 1), window_depths=(0, 0, 1), embed_dim=8)
    heads = dict(qna_num_heads=(2, 2, 2), window_num_heads=(2, 2, 2))
    model = timm.create_model("qna_vit_tiny", features_only=True, **numbers, **heads)
    assert model.feature_info.reduction() == [4, 8, 16]
    assert [x.shape[1] for x in model(torch.randn(1, 3, 64, 64))] == [16, 8, 4]


def test_version_is_public() -> None:
    assert qna_timm.__version__.count(".") == 2
