"""Gramian heads on timm's models: what is tapped, what the backbone decides, saving and loading."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_input_data_config
from timm.models import register_model, resolve_model_input_args, save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import qna_timm  # noqa: F401 - registers the models
from qna_timm.models.ga_backbone import GramianBackbone

SMALL_SWIN = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=7)
SMALL_VIT = dict(depth=3, embed_dim=64, num_heads=2)
BACKBONES: dict[str, dict[str, Any]] = {
    "efficientnet_b0": {},
    "mobilenetv3_large_100": {},
    "swin_tiny_patch4_window7_224": dict(backbone_args=SMALL_SWIN, img_size=56),
    "vit_small_patch16_224": dict(backbone_args=SMALL_VIT, img_size=64),
}


def create(backbone: str, seed: int = 0, **kwargs: Any) -> GramianBackbone:
    args = {"num_classes": 5, "num_branches": 2, "gram_dim": 16, **BACKBONES.get(backbone, {})}
    torch.manual_seed(seed)
    return timm.create_model("ga_backbone", backbone=backbone, **{**args, **kwargs})


def images(model: nn.Module, batch: int = 2) -> Tensor:
    size = model._traits.get("img_size") or (64, 64)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, model.in_chans, *size, generator=generator)


def test_default_backbone() -> None:
    model = timm.create_model("ga_backbone", device="meta")
    assert model.get_classifier().weight.shape == (5, 1000, 320)
    assert model.pretrained_cfg["architecture"] == "ga_backbone"


def test_drop_rate_is_of_the_tokens() -> None:
    """The trunk's own dropout is before a classifier that it no longer has."""
    model = create("resnet18", drop_rate=0.5)
    assert model.head.head_drop.p == 0.5
    x = images(model)
    assert not torch.equal(model(x), model(x))
    assert create("resnet18").head.head_drop.p == 0.0


@pytest.mark.parametrize(
    ("backbone", "taps", "stride", "width"),
    [
        ("efficientnet_b0", [1, 2, 3, 4], 16, 320),
        ("mobilenetv3_large_100", [1, 2, 3, 4], 16, 960),
        ("swin_tiny_patch4_window7_224", [0, 1, 2, 3], 16, 768),
        ("vit_small_patch16_224", [11], 16, 384),
        ("vit_base_patch32_224", [11], 32, 768),
        ("resnet50", [1, 2, 3, 4], 16, 1024),
        ("vgg11", [2, 3, 4, 5], 16, 512),
        ("volo_d1_224", [0, 3], 16, 384),
        ("levit_128s", [0, 1, 2], 16, 384),
        ("qna_vit_tiny", [0, 1, 2, 3], 16, 512),
    ],
)
def test_default_taps(backbone: str, taps: list[int], stride: int, width: int) -> None:
    """The last map of each stride from 4 up; a multiple of 32 channels; fused near stride 16."""
    model = timm.create_model("ga_backbone", backbone=backbone, num_classes=3, device="meta")
    found = (model.taps, model.fuse_reduction, model.num_features)
    assert found == (taps, stride, width)
    x = torch.zeros(1, *model.pretrained_cfg["input_size"], device="meta")
    assert model.forward_features(x).shape[2:] == model.pretrained_cfg["pool_size"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_trains(backbone: str) -> None:
    """Every parameter gets a gradient, a step lowers the loss; deepcopies follow."""
    model = create(backbone).train()
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, target = images(model, 4), torch.arange(4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), target))
        losses[-1].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        optimizer.step()
        ema.update(model)
    assert losses[-1] < losses[0]
    model.set_branch_outputs()
    assert model(x).shape == (4, 2, 5)
    assert ema.module.eval()(x).shape == (4, 5)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("last", [False, True])
def test_taps_are_the_backbones_maps(backbone: str, last: bool, tmp_path: Path) -> None:
    """The fused maps equal those of the whole backbone, from whose file the trunk is loaded."""
    options = dict(BACKBONES[backbone])
    args = options.pop("backbone_args", {})
    torch.manual_seed(1)
    whole = timm.create_model(backbone, **options, **args).eval()
    path = tmp_path / "backbone.safetensors"
    save_file(whole.state_dict(), path)
    model = create(backbone, taps=None if last else (0, 1)).eval()
    report = model.load_backbone(str(path))
    assert report.fresh == [] and report.loaded > 10
    x = images(model)
    with torch.no_grad():
        wanted = whole.forward_intermediates(
            x, indices=model.taps, norm="vit" in backbone, intermediates_only=True
        )
        found = model.forward_taps(x)
    torch.testing.assert_close(found, wanted)
    if "vit" in backbone and last:
        with torch.no_grad():
            tokens = whole.forward_features(x)[:, 1:]
        torch.testing.assert_close(found[0].flatten(2).mT, tokens)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cut_after_the_last_tap(backbone: str) -> None:
    model = create(backbone, taps=(-2, 0)).train()
    assert len(model.feature_info) == model.taps[-1] + 1
    model(images(model)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_single_tap_of_the_right_width_is_not_fused() -> None:
    options = dict(BACKBONES["vit_small_patch16_224"])
    model = create("vit_small_patch16_224", **options).eval()
    assert list(model.fuse.parameters()) == []
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), model.forward_taps(x)[0])
    model = create("vit_small_patch16_224", **options, num_features=96)
    assert model.forward_features(x).shape == (2, 96, 4, 4)


def test_fuse_reduction() -> None:
    for wanted, stride, side in ((4, 4, 16), (8, 8, 8), (40, 32, 2)):
        model = create("resnet18", fuse_reduction=wanted).eval()
        assert model.fuse_reduction == stride
        with torch.no_grad():
            assert model.forward_features(torch.zeros(1, 3, 64, 64)).shape[-1] == side


@pytest.mark.parametrize("size", [(224, 224), (97, 61), (33, 224)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model = create("resnet18", num_classes=3)
    x = torch.randn(1, 3, *size)
    assert model.train()(x).isfinite().all()
    with torch.no_grad():
        logits = model.eval()(x)
        channels_last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=[pytest.mark.thorough] * name.startswith(("eff", "mobile")))
        for name in BACKBONES
    ],
)
def test_compiles_and_exports(backbone: str) -> None:
    model = create(backbone, taps=(0, 1)).eval()
    x = images(model)
    with torch.no_grad():
        wanted = model(x)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), wanted, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backbone", ["efficientnet_b0", "swin_tiny_patch4_window7_224"])
def test_scripts(backbone: str) -> None:
    model = create(backbone).eval()
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing(backbone: str) -> None:
    model = create(backbone, drop_path_rate=0.0)
    x = images(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_only(backbone: str) -> None:
    """The tapped maps unless others are asked for, also without the fusion's norm."""
    whole = create(backbone).eval()
    x = images(whole)
    features = create(backbone, features_only=True).eval()
    with torch.no_grad():
        wanted = whole.forward_intermediates(x, whole.taps, norm=False, intermediates_only=True)
        torch.testing.assert_close(features(x), wanted)
        first = create(backbone, features_only=True, out_indices=(0, 1)).eval()
        assert [map_.shape[1] for map_ in first(x)] == first.feature_info.channels()
        for norm in (False, True):
            fused, maps = whole.forward_intermediates(x, indices=[0, -1], norm=norm)
            torch.testing.assert_close(fused, whole.forward_features(x))
            wanted = whole.forward_intermediates(x, [0, -1], norm=norm, intermediates_only=True)
            torch.testing.assert_close(maps, wanted)


def test_arguments_reach_the_backbone() -> None:
    model = create("efficientnet_b0", in_chans=1, drop_path_rate=0.2)
    assert model.trunk.conv_stem.in_channels == model.in_chans == 1
    assert model.trunk.blocks[4][1].drop_path.drop_prob > 0
    assert model.fuse.block.drop_path.drop_prob == 0.2
    model = create("vgg11", drop_path_rate=0.2, img_size=64, device="meta")
    assert model.fuse.block.drop_path.drop_prob == 0.2
    with pytest.raises(TypeError, match="not_an_argument"):
        create("resnet18", not_an_argument=1)
    with pytest.raises(TypeError, match="not_an_argument"):
        create("resnet18", backbone_args={"not_an_argument": 1})


@register_model
def mapless_net(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(backbone="resnet19"), "backbone: timm has no model 'resnet19'"),
        (dict(backbone="ga_backbone"), "backbone: 'ga_backbone' has Gramian heads"),
        (dict(backbone="mapless_net"), "'mapless_net' gives no feature maps"),
        (
            dict(taps=(1, 5)),
            r"taps must be a list of indices from 0 to 4 .* \(strides 2, 4, 8, 16, 32\)",
        ),
        (dict(taps=()), "taps must be a list of indices"),
        (dict(taps=(1.5,)), "taps must be a list of indices"),
        (dict(taps=2), r"taps must be a list of indices .*, got 2"),
        (dict(backbone=[1]), r"backbone: timm has no model \[1\]"),
        (dict(fuse_reduction=0), "fuse_reduction must be at least 1, got 0"),
        (dict(backbone_args={"in_chans": 1}), "backbone_args: in_chans is an argument of ga_"),
        (dict(embed_groups=7), "embed_groups"),
        (dict(proj_groups=7), "proj_groups"),
        (dict(mlp_groups=7), "mlp_groups"),
    ],
)
def test_refusals(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        timm.create_model("ga_backbone", device="meta", **{"backbone": "resnet18", **kwargs})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "gram_dim"), [(320, 128), (100, 50), (36, 7)])
def test_default_groups_divide(width: int, gram_dim: int) -> None:
    model = create("resnet18", num_features=width, gram_dim=gram_dim, num_heads=1)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_cfg_is_the_backbones() -> None:
    """Size, statistics, crop and stem; what the user overlays wins, also through timm's scripts."""
    args = dict(backbone="vit_tiny_patch16_384", num_classes=3, device="meta")
    own = timm.get_pretrained_cfg("vit_tiny_patch16_384")
    model = timm.create_model("ga_backbone", **args)
    config = resolve_input_data_config(model)
    assert config["mean"] == own.mean == (0.5, 0.5, 0.5) and config["crop_pct"] == own.crop_pct
    assert config["input_size"] == (3, 384, 384)
    assert model.pretrained_cfg["pool_size"] == (24, 24)
    assert model.pretrained_cfg["first_conv"] == "trunk.patch_embed.proj"
    assert model.pretrained_cfg["fixed_input_size"] is True

    overlay = dict(mean=(0.1, 0.2, 0.3), input_size=(3, 96, 96))
    for resolve in (False, True):
        kwargs = dict(args, model_name="ga_backbone", pretrained_cfg_overlay=overlay)
        if resolve:
            kwargs = resolve_model_input_args(**kwargs)
        model = timm.create_model(**kwargs)
        config = resolve_input_data_config(model)
        assert config["mean"] == (0.1, 0.2, 0.3) and config["std"] == own.std
        assert config["input_size"] == (3, 96, 96) and model.trunk.pos_embed.shape[1] == 37


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet18"])
def test_img_size_of_scripts(backbone: str) -> None:
    """`--img-size` reaches a backbone of fixed size, and is the size of data for any."""
    kwargs = resolve_model_input_args(
        "ga_backbone", {"img_size": 96}, backbone=backbone, num_classes=3
    )
    model = timm.create_model(**kwargs, device="meta")
    config = resolve_input_data_config(model, {"img_size": 96})
    assert config["input_size"] == (3, 96, 96)
    x = torch.zeros(1, 3, 96, 96, device="meta")
    assert model.forward_features(x).shape[2:] == (6, 6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_save_at_another_size_load_in_a_fresh_process(tmp_path: Path) -> None:
    """A folder for the hub is all that a process needs that imports the package."""
    names = ("swin_tiny_patch4_window7_224", "vit_small_patch16_224")
    for name in names:
        model = create(name, taps=(0, 2), drop_path_rate=0.1).eval()
        model.set_input_size((112, 112))
        x = images(model)
        assert x.shape[-1] == 112
        save_for_hf(model, tmp_path / name, safe_serialization=True)
        with torch.no_grad():
            save_file({"x": x, "logits": model(x)}, tmp_path / f"{name}.safetensors")
    code = f"""
import qna_timm, timm, torch
from safetensors.torch import load_file
for name in {names}:
    model = timm.create_model("local-dir:{tmp_path}/" + name, pretrained=True).eval()
    io = load_file("{tmp_path}/" + name + ".safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(io["x"]), io["logits"])
    assert model.pretrained_cfg["mean"] and model.pretrained_cfg["pool_size"]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_set_input_size_of_any_backbone() -> None:
    model = create("resnet18")
    model.set_input_size(96)
    assert model._traits["img_size"] == (96, 96)
    with pytest.raises(ValueError, match="window_size: ResNet cannot change it"):
        model.set_input_size(96, window_size=7)
    with pytest.raises(ValueError, match="patch_size: the fusion is made for one"):
        create("vit_small_patch16_224").set_input_size(96, patch_size=8)


def test_pretrained_backbone(tmp_path: Path) -> None:
    """The backbone's published weights are asked of timm, but not when the model has its own."""
    torch.manual_seed(1)
    whole = timm.create_model("resnet18")
    path = tmp_path / "resnet18.safetensors"
    save_file(whole.state_dict(), path)
    args = {"pretrained_cfg_overlay": {"file": str(path)}}
    model = create("resnet18", backbone_pretrained=True, backbone_args=args, in_chans=1)
    weight = model.trunk.layer4[1].conv2.weight
    assert torch.equal(weight, whole.layer4[1].conv2.weight)
    torch.testing.assert_close(model.trunk.conv1.weight, whole.conv1.weight.sum(1, keepdim=True))
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    path.unlink()
    again = timm.create_model(f"local-dir:{tmp_path}/model", pretrained=True)
    assert torch.equal(again.trunk.layer4[1].conv2.weight, weight)


def test_load_backbone_of_another_size(tmp_path: Path) -> None:
    """Position tables and first convolution are adapted as timm does for the backbone itself."""
    args = dict(SMALL_VIT)
    whole = timm.create_model("vit_small_patch16_224", img_size=96, **args)
    path = tmp_path / "vit.safetensors"
    save_file(whole.state_dict(), path)
    model = create("vit_small_patch16_224", in_chans=1)
    report = model.load_backbone(str(path))
    assert report.fresh == []
    wanted = timm.create_model(
        "vit_small_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        img_size=64,
        in_chans=1,
        **args,
    )
    trunk = dict(model.trunk.named_parameters())
    for name, parameter in wanted.named_parameters():
        if not name.startswith("head."):
            torch.testing.assert_close(trunk[name], parameter)


def test_load_backbone_of_two_stems(tmp_path: Path) -> None:
    """Some backbones have several first convolutions; each is adapted to the image channels."""
    torch.manual_seed(1)
    whole = timm.create_model("mobileone_s0")
    path = tmp_path / "mobileone.safetensors"
    save_file(whole.state_dict(), path)
    model = create("mobileone_s0", in_chans=1)
    assert model.load_backbone(str(path)).fresh == []
    for found, source in (
        (model.trunk.stem.conv_kxk[0].conv, whole.stem.conv_kxk[0].conv),
        (model.trunk.stem.conv_scale.conv, whole.stem.conv_scale.conv),
    ):
        torch.testing.assert_close(found.weight, source.weight.sum(1, keepdim=True))


def test_load_backbone_says_what_is_fresh(tmp_path: Path) -> None:
    whole = timm.create_model("resnet18")
    path = tmp_path / "resnet18.safetensors"
    tensors = {k: v for k, v in whole.state_dict().items() if not k.startswith("layer4.1.")}
    save_file(tensors, path)
    report = create("resnet18").load_backbone(str(path))
    assert report.fresh and all(name.startswith("layer4.1.") for name in report.fresh)


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "densenet121", "poolformer_s12", "hrnet_w18_small", "vit_tiny_patch16_224"],
)
def test_layer_decay(backbone: str) -> None:
    """The head learns fastest, then the fusion, then the trunk, last layers first."""
    model = create(backbone)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {
        names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]
    }
    trunk = [scale for name, scale in scales.items() if name.startswith("trunk.")]
    fuse = [scale for name, scale in scales.items() if name.startswith("fuse.")]
    assert scales["head.fc.weight"] == 1
    assert not fuse or max(trunk) < min(fuse) <= max(fuse) <= 1
    assert max(trunk) < 1 and len(set(trunk)) > 3
    stem = next(name for name in scales if name.startswith("trunk."))
    assert scales[stem] == min(trunk)


def test_no_weight_decay() -> None:
    model = create("vit_small_patch16_224")
    assert "trunk.pos_embed" in model.no_weight_decay()
    assert copy.deepcopy(create("resnet18")).no_weight_decay() == set()
