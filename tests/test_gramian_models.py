"""Gramian models against the golden files, and what all of them promise."""

import copy
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qna_timm  # noqa: F401 - registers the models
from qna_timm.convert import ConversionError, gramian_state_dict
from qna_timm.layers.fuse import tap_positions
from qna_timm.models.ga_convnext import GramianConvNeXt

GOLDEN = ("ga_convnext_tiny_688", "ga_cswin_tiny")
SMALL = dict(depths=(1, 1, 3, 1), dims=(8, 16, 24, 32), num_taps=1, gram_dim=16, num_classes=7)


def small(**kwargs: object) -> nn.Module:
    """A GA-ConvNeXt of a few thousand parameters, without the tiny layer scales of a fresh one."""
    torch.manual_seed(0)
    model = timm.create_model("ga_convnext_tiny", **{**SMALL, **kwargs})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.5)
    return model


@pytest.fixture(scope="module", params=GOLDEN)
def released(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """A model with the golden files' weights, loaded through the converter, strictly."""
    model = timm.create_model(request.param)
    model.load_state_dict(gramian_state_dict(golden.released_gramian(request.param), model))
    return request.param, model.eval()


def golden_images() -> Tensor:
    return golden.images(0, 2, 3, 224, 224)


def test_golden_logits(released: tuple[str, nn.Module]) -> None:
    """Every branch's logits to 5e-6, the fused map too; the mean without being asked."""
    name, model = released
    wanted = golden.arrays("gramian")
    with torch.no_grad():
        features = model.forward_features(golden_images())
        mean = model.forward_head(features)
        model.set_branch_outputs(True)
        branches = model.forward_head(features)
        model.set_branch_outputs(False)
        tokens = model.forward_head(features, pre_logits=True)
    assert golden.relative_error(features, wanted[f"{name}/aggregated"]) < 1e-4
    assert branches.shape == (2, 5, 1000)
    for branch in range(5):
        logits = wanted[f"{name}/logits"][branch]
        assert np.abs(branches[:, branch].numpy() - logits).max() < 5e-6 * np.abs(logits).max()
        token = tokens.unflatten(1, (5, -1))[:, branch]
        assert golden.relative_error(token, wanted[f"{name}/head{branch}_cls_out"]) < 1e-4
    torch.testing.assert_close(mean, branches.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("released", GOLDEN[:1], indirect=True)
def test_golden_gradients(released: tuple[str, nn.Module]) -> None:
    """Norm of every gradient of sum_branches mean(logits^2) to 1e-3, in evaluation mode."""
    name, model = released
    wanted = golden.info("gramian")[f"grad_norms_{name}"]["eval"]
    model.set_branch_outputs(True)
    model.zero_grad()
    logits = model(golden_images())
    loss = logits.square().mean((0, 2)).sum()
    loss.backward()
    model.set_branch_outputs(False)
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-4)
    ours = dict(model.named_parameters())
    checked = 0
    for released_name, norm in wanted["grad_norms"].items():
        gradient = _gradient_of(released_name, ours)
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-8), released_name
        checked += 1
    assert checked == len(wanted["grad_norms"]) > 300
    model.zero_grad()


def _gradient_of(released_name: str, ours: dict[str, nn.Parameter]) -> Tensor:
    """The gradient of a released tensor: a branch's share of ours, or the whole."""
    from qna_timm.convert.gramian import _branch_of, _trunk_name

    branch = _branch_of(released_name)
    if branch is None:
        return ours[_trunk_name(released_name, is_cswin=False)].grad
    gradient = ours[f"head.{branch[1]}"].grad
    return gradient[branch[0]] if branch[1].startswith("fc.") else gradient.chunk(5)[branch[0]]


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("ga_convnext_tiny", 47_821_324, 5.454),
        ("ga_convnext_small", 70_116_364, 9.812),
        ("ga_convnext_base", 123_688_396, 17.333),
        ("ga_convnext_tiny_688", 47_821_324, 5.454),
        ("ga_convnext_tiny_768", 54_354_584, 5.754),
        ("ga_convnext_small_688", 70_116_364, 9.812),
        ("ga_convnext_small_768", 76_726_424, 10.127),
        ("ga_convnext_base_976", 123_688_396, 17.333),
        ("ga_convnext_base_1024", 128_839_176, 17.590),
    ],
)
def test_parameters_and_macs(name: str, parameters: int, gmacs: float) -> None:
    """Parameters exact; MACs at most the released ones, which the folded attention saves on."""
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    ours = counter.get_total_flops() / 2e9
    assert 0.93 * gmacs < ours < gmacs
    docs = timm.model_entrypoint(name).__doc__
    if said := re.search(r"([\d.]+) M parameters, ([\d.]+) GMACs", docs):
        assert said[1] == f"{parameters / 1e6:.1f}"
        assert float(said[2]) == pytest.approx(ours, abs=0.05 if ours > 10 else 0.005)


def test_tap_positions() -> None:
    """The released models' taps, and an error with the range that works."""
    assert tap_positions(9, 2) == [3, 6]
    assert tap_positions(27, 4) == [5, 10, 15, 20]
    assert tap_positions(21, 1) == [10]
    assert tap_positions(9, 0) == []
    with pytest.raises(ValueError, match="num_taps must be 0 to 2 for 3 blocks, got 3"):
        tap_positions(3, 3)


def test_drop_path_rates() -> None:
    """Linear over the trunk's blocks and the fusion; Gram layers have the fusion's."""
    model = timm.create_model("ga_convnext_tiny", drop_path_rate=0.2, device="meta")
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for stage in model.trunk.stages
        for block in stage.blocks
    ]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 19)[:18], atol=1e-7)
    assert model.fuse.block.drop_path.drop_prob == 0.2
    assert model.head.gram_layer.drop_path.drop_prob == 0.2


def test_initial_values() -> None:
    """Truncated normal 0.02 everywhere, biases 0, layer scales 1e-6 and 1e-4."""
    model = timm.create_model("ga_convnext_tiny", depths=(1, 1, 3, 1))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith("bias"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    assert torch.all(model.trunk.stages[0].blocks[0].gamma == 1e-6)
    assert torch.all(model.head.gram_layer.gamma == 1e-6)
    assert torch.all(model.head.block.ls1.gamma == 1e-4)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40), (97, 65)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_any_size_and_batch_1(size: tuple[int, int], training: bool) -> None:
    """Odd and non-square images, one of them alone in training."""
    model = small().train(training)
    x = torch.randn(1, 3, *size)
    logits = model(x.to(memory_format=torch.channels_last))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    torch.testing.assert_close(small().train(training)(x), logits, rtol=1e-4, atol=1e-5)


def test_no_images() -> None:
    """An empty batch in evaluation, as a last shard may be."""
    assert small(drop_path_rate=0.1).eval()(torch.empty(0, 3, 32, 32)).shape == (0, 7)


@torch.no_grad()
def test_compile_and_export() -> None:
    """One graph, also with branch outputs; exported with a batch of any size."""
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    model.set_branch_outputs(True)
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled(x).shape == (2, 5, 7)
    model.set_branch_outputs(False)
    exported = torch.export.export(
        model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    ).module()
    y = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(exported(y), model(y))


def test_compiled_training() -> None:
    """Strides of the compiler's and of real tensors agree, with a grouped projection too."""
    torch.manual_seed(0)
    model = timm.create_model(
        "ga_backbone", backbone="test_resnet", num_classes=7, gram_dim=16, proj_groups=4
    ).train()
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_heads_can_be_replaced() -> None:
    """Another number of classes, no classes, no heads at all; the trunk stays."""
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert model.get_classifier().weight.shape == (5, 7, 32)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size) == (2, 5 * 32)
    torch.testing.assert_close(model(x), model.forward_head(features, pre_logits=True))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "avg")


def test_branch_count_and_width() -> None:
    """One branch, other Gram widths; what cannot be shared out is told by name."""
    for kwargs in (dict(num_branches=1), dict(gram_dim=15, embed_groups=4), dict(mlp_groups=1)):
        assert small(**kwargs).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(ValueError, match="embed_groups"):
        small(gram_dim=13)
    with pytest.raises(ValueError, match=r"dims must be a number .* each of 4 stages, got"):
        small(dims=(8, 16, 24))
    with pytest.raises(TypeError, match="num_branch"):
        small(num_branch=2)


def test_weight_decay_and_layer_groups() -> None:
    """Vectors are not decayed though they hold all branches; layer decay knows the order."""
    model = small()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1)
    plain = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    vectors = {
        id(p) for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("bias")
    }
    assert plain == vectors
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    scales = [
        scale[id(p)]
        for p in (
            model.trunk.stem[0].weight,
            model.trunk.stages[0].blocks[0].conv_dw.weight,
            model.trunk.stages[2].blocks[1].conv_dw.weight,
            model.fuse.block.conv1.weight,
            model.head.fc.weight,
        )
    ]
    assert scales == sorted(set(scales))
    assert scales[-1] == 1.0


def test_intermediates_come_with_the_same_pass() -> None:
    """Features and maps of one pass in training mode, where two passes would differ."""
    model = small(drop_path_rate=0.5).train()
    calls = []
    model.trunk.stem.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 3, 64, 64)
    features, maps = model.forward_intermediates(x)
    assert len(calls) == 1
    assert [m.shape[1] for m in maps] == [8, 16, 24, 32]
    assert features.shape == (4, 32, 4, 4)


def test_gradient_checkpointing_covers_the_tapped_stage() -> None:
    """Same gradients, fewer saved activations."""
    model, x = small(depths=(1, 1, 6, 1)).train(), torch.randn(2, 3, 64, 64)

    def run(enable: bool) -> tuple[Tensor, int]:
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x).square().sum()
        loss.backward()
        return model.trunk.stem[0].weight.grad.clone(), saved

    (plain, more), (checkpointed, fewer) = run(False), run(True)
    torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-7)
    assert fewer < 0.8 * more


def test_pretrained_overlay_takes_released_and_own_files(tmp_path: Path) -> None:
    """timm's way to load a local file: released names, own names, another number of classes."""
    name = "ga_convnext_tiny_688"
    state = golden.released_gramian(name)
    torch.save({"arch": name, "state_dict": state}, tmp_path / "model_best.pth.tar")
    overlay = {"file": str(tmp_path / "model_best.pth.tar")}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=1000
    ).eval()
    weights = model.state_dict()
    torch.testing.assert_close(weights["head.fc.weight"][3], state["fc.3.weight"])
    torch.testing.assert_close(
        weights["head.gram_proj.weight"].chunk(5)[2], state["gram_contraction.2.0.weight"]
    )
    save_file(weights, tmp_path / "ours.safetensors")
    again = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "ours.safetensors")},
        num_classes=10,
    )
    assert again.head.fc.weight.shape == (5, 10, 688)
    torch.testing.assert_close(again.trunk.stem[0].weight, model.trunk.stem[0].weight)
    with pytest.raises(ConversionError, match="not one of ga_convnext_tiny_768: wrong shape"):
        timm.create_model("ga_convnext_tiny_768", pretrained=True, pretrained_cfg_overlay=overlay)


def test_fused_map_alone_takes_whole_files(tmp_path: Path) -> None:
    """A model without branches loads a file that has them."""
    whole = small().eval()
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    model = timm.create_model(
        "ga_convnext_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "whole.safetensors")},
        global_pool="",
        **{**SMALL, "num_classes": 0},
    ).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), whole.forward_features(x))


def test_released_checkpoints_that_do_not_fit() -> None:
    """A branch too few, a tensor of something else: one line that names it."""
    name = "ga_convnext_tiny_688"
    model = timm.create_model(name, device="meta")
    state = golden.released_gramian(name)
    with pytest.raises(ConversionError, match="wrong shape"):
        few = {k: v for k, v in state.items() if ".4." not in k or k.startswith("stages.")}
        gramian_state_dict(few, model)
    with pytest.raises(ConversionError, match="4 of 5 branches"):
        gramian_state_dict({k: v for k, v in state.items() if k != "ga.4.gamma_1"}, model)
    with pytest.raises(ConversionError, match=r"unknown to it"):
        gramian_state_dict({**state, "decoder.weight": torch.zeros(1)}, model)
    with pytest.raises(ConversionError, match=r"missing: 1 \(trunk\.stem\.0\.weight\)"):
        gramian_state_dict({k: v for k, v in state.items() if k != "stem.0.weight"}, model)


def test_backbone_weights_load_into_the_trunk(tmp_path: Path) -> None:
    """timm's ConvNeXt of the usual width: all but the narrower last stage."""
    donor = timm.create_model("convnext_tiny", depths=(1, 1, 3, 1))
    save_file(donor.state_dict(), tmp_path / "convnext.safetensors")
    model = timm.create_model("ga_convnext_tiny", depths=(1, 1, 3, 1))
    report = model.load_backbone(str(tmp_path / "convnext.safetensors"))
    weights = model.trunk.state_dict()
    fresh = set(report.fresh)
    assert fresh == {name for name in weights if name.startswith("stages.3.")} - {
        "stages.3.downsample.0.weight",
        "stages.3.downsample.0.bias",
    }
    assert report.loaded + len(fresh) == len(weights)
    for name in set(weights) - fresh:
        assert torch.equal(weights[name], donor.state_dict()[name]), name
    assert "stages.3.blocks.0.mlp.fc1" in str(report)
    assert "\n" not in str(report)


def test_backbone_weights_load_into_a_model_of_no_factory(tmp_path: Path) -> None:
    """The class itself has no pretrained_cfg."""
    donor = timm.create_model("convnext_tiny", depths=(1, 1, 3, 1), dims=(8, 16, 24, 32))
    save_file(donor.state_dict(), tmp_path / "convnext.safetensors")
    model = GramianConvNeXt(**SMALL)
    assert model.load_backbone(str(tmp_path / "convnext.safetensors")).fresh == []


def test_convnext_backbone_under_the_names_of_its_repository(tmp_path: Path) -> None:
    """The last stage, narrower here, stays fresh; a file of another network is told as one."""
    kwargs = {"depths": (1, 1, 3, 1), "dims": (16, 32, 64, 128), "gram_dim": 16}
    kwargs |= {"num_classes": 3, "proj_groups": 1, "embed_groups": 8}
    model = timm.create_model("ga_convnext_tiny", **kwargs)
    donor = timm.create_model("convnext_tiny", depths=(1, 1, 3, 1), dims=(16, 32, 64, 96))
    released = {}
    for name, tensor in donor.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace("head.norm", "norm")
        name = name.replace("head.fc.", "head.").replace("conv_dw", "dwconv")
        name = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        released[name.replace(".blocks.", ".").replace("mlp.fc", "pwconv")] = tensor
    torch.save({"model": released}, tmp_path / "convnext.pth")
    model.load_backbone(str(tmp_path / "convnext.pth"))
    weights = model.trunk.state_dict()
    for name in set(weights) & set(donor.state_dict()):
        if not name.startswith(("stages.3.", "head.")):
            assert torch.equal(weights[name], donor.state_dict()[name]), name

    torch.save({"fc.weight": torch.zeros(2, 3), "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ConversionError, match="no tensor fits the trunk"):
        model.load_backbone(str(tmp_path / "other.pth"))


def test_backbone_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Nothing fits, no such file, not a checkpoint: one line each."""
    model = small()
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("no checkpoint")
    for source in ("other.safetensors", "text.pth", "missing.pth"):
        with pytest.raises(ConversionError, match=source) as error:
            model.load_backbone(str(tmp_path / source))
        assert "\n" not in str(error.value)
        assert "weights_only=False" not in str(error.value)


def test_deep_copy_keeps_working() -> None:
    """Averaged weights are a deep copy; branch outputs are not part of the state."""
    model = small().eval()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(twin(x), model(x))
    model.set_branch_outputs(True)
    assert twin(x).shape == (1, 7)
    assert set(twin.state_dict()) == set(model.state_dict())
