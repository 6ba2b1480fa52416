"""GA-ResNet and GA-ViT: the derived counts, any image size, trunks from ImageNet weights."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from gramian_reference import ReferenceHead
from safetensors.torch import save_file
from timm.models import FeatureInfo
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qna_timm  # noqa: F401 - registers the models
from qna_timm.convert import ConversionError
from qna_timm.models.ga_resnet import SEBottleneck

NAMES = ("ga_resnet50", "ga_vit_small", "ga_vit_medium")
HEAD = dict(num_classes=7, num_branches=3, gram_dim=16, proj_groups=4, embed_groups=8, attn_dim=16)
SMALL_RESNET = dict(
    layers=(1, 2, 1, 1), channels=(8, 16, 32, 32), stem_width=8, num_features=64, **HEAD
)
SMALL_VIT = dict(img_size=64, embed_dim=64, depth=3, trunk_num_heads=2, **HEAD)
SIZES = ((64, 64), (33, 47), (65, 130), (1, 1), (7, 224))


def small(name: str, **kwargs: object) -> nn.Module:
    """A model of the name's family with every parameter away from 0, and fixed statistics."""
    torch.manual_seed(0)
    args = SMALL_RESNET if name == "ga_resnet50" else SMALL_VIT
    model = timm.create_model(name, **{**args, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


families = pytest.mark.parametrize("name", ["ga_resnet50", "ga_vit_small"])


@pytest.mark.parametrize(
    ("name", "num_branches", "count"),
    [
        ("ga_resnet50", 5, 41_286_704),
        ("ga_resnet50", 1, 22_361_744),
        ("ga_vit_small", 5, 27_667_976),
        ("ga_vit_small", 1, 22_865_512),
        ("ga_vit_medium", 5, 60_482_312),
    ],
)
def test_parameter_count(name: str, num_branches: int, count: int) -> None:
    model = timm.create_model(name, num_branches=num_branches, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


def macs(model: Callable[[Tensor], object], x: Tensor) -> tuple[float, float]:
    """Multiply-adds in 1e9: all, and without those of attention and of Gram matrices."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    counts = {str(op): flops / 2e9 for op, flops in counter.get_flop_counts()["Global"].items()}
    products = ("bmm", "scaled_dot_product")
    return sum(counts.values()), sum(
        count for op, count in counts.items() if op.split(".")[-1].lstrip("_")[:18] not in products
    )


@pytest.mark.parametrize(
    ("name", "paper", "ours"),
    [
        ("ga_resnet50", 5.214215, 4.7325),
        ("ga_vit_small", 4.303812, 4.6077),
        ("ga_vit_medium", 9.643301, 10.0369),
    ],
)
def test_multiply_adds(name: str, paper: float, ours: float) -> None:
    """All of ours; and, with heads written plainly, the linear ones, which the paper's rows count.

    The plain heads project keys and values of every position, ours of one query.
    """
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        x = torch.empty(1, 3, 224, 224)
        block = model.head.block
        plain = ReferenceHead(
            model.num_features,
            1000,
            gram_dim=128,
            gram_layer=None,
            proj_groups=model.head.gram_proj.groups,
            embed_groups=model.head.gram_embed.groups,
            attn_dim=block.q.weight.shape[0] // 5,
            mlp_groups=block.mlp.groups,
        ).eval()
    assert macs(model, x)[0] == pytest.approx(ours, rel=5e-3)
    linear = macs(lambda x: plain(model.forward_features(x)), x)[1]
    assert linear == pytest.approx(paper, rel=1e-5)


@families
@pytest.mark.parametrize("size", SIZES)
def test_any_size(name: str, size: tuple[int, int]) -> None:
    """One image of any size: finite, every parameter gets a gradient, also in training."""
    model = small(name)
    x = torch.randn(1, 3, *size)
    features = model.forward_features(x)
    assert features.shape[2:] == (-(-size[0] // 16), -(-size[1] // 16))
    assert model(x).isfinite().all()
    model.train()
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@families
def test_float32(name: str) -> None:
    """float32 against float64, channels-last, and an image that is a view."""
    model = small(name)
    x = torch.randn(2, 3, 80, 48)
    wanted = copy.deepcopy(model).double()(x.double())
    views = torch.randn(2, 4, 83, 50)[:, 1:, 3:, 2:].copy_(x)
    for found in (model(x), model(views), model(x.to(memory_format=torch.channels_last))):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@families
@torch.no_grad()
def test_graphs(name: str) -> None:
    """Compiled whole, exported with free sizes, and scripted: the same function."""
    shallow = dict(layers=(1, 1, 1, 1)) if name == "ga_resnet50" else dict(depth=1)
    model = small(name, num_branches=1, **shallow)
    x, other = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 50, 70)
    sizes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
    for graph in (exported, torch.jit.script(model)):
        for images in (x, other):
            torch.testing.assert_close(graph(images), model(images), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_drop_path_rates(name: str) -> None:
    """Linear over the blocks; the ResNet's fusion is the last step."""
    model = timm.create_model(name, drop_path_rate=0.2, device="meta")
    found = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    if name == "ga_resnet50":
        wanted = [0.2 * i / 16 for i in range(1, 17)]
    else:
        wanted = [0.2 * i / 11 for i in range(1, 12) for _ in range(2)]
    assert found == pytest.approx(wanted)


@families
def test_grad_checkpointing(name: str) -> None:
    model = small(name)
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key], rtol=1e-4, atol=1e-6)


@families
@pytest.mark.parametrize("norm", [False, True])
def test_pruned_features(name: str, norm: bool) -> None:
    """`features_only` and pruning give the maps of the whole model, normalised where asked."""
    model = small(name)
    x = torch.randn(2, 3, 64, 64)
    features, maps = model.forward_intermediates(x, norm=norm)
    torch.testing.assert_close(features, model.forward_features(x))
    pruned = copy.deepcopy(model)
    indices = pruned.prune_intermediate_layers([0, 1], prune_norm=not norm)
    found = pruned.forward_intermediates(x, indices, norm=norm, intermediates_only=True)
    for ours, wanted in zip(found, maps, strict=False):
        torch.testing.assert_close(ours, wanted)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "reductions"), [("ga_resnet50", [2, 4, 8, 16, 32]), ("ga_vit_small", [16] * 3)]
)
def test_features_only(name: str, reductions: list[int]) -> None:
    args = SMALL_RESNET if name == "ga_resnet50" else SMALL_VIT
    model = timm.create_model(name, features_only=True, **args)
    assert isinstance(model.feature_info, FeatureInfo)
    assert model.feature_info.reduction() == reductions
    maps = model(torch.randn(1, 3, 96, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [m.shape[2] for m in maps] == [96 // r for r in reductions]


def test_se_bottleneck_is_timms_with_open_gates() -> None:
    """With the gates at 1 the block is timm's; without, squeeze-and-excitation changes it."""
    torch.manual_seed(0)
    shortcut = nn.Conv2d(8, 16, 1, 2)
    ours = SEBottleneck(8, 4, 2, copy.deepcopy(shortcut)).eval()
    plain = Bottleneck(8, 4, 2, copy.deepcopy(shortcut)).eval()
    plain.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 8, 9, 11)
    assert (ours(x) - plain(x)).abs().max() > 0.01
    _open_gates(ours)
    torch.testing.assert_close(ours(x), plain(x))


def _open_gates(module: nn.Module) -> None:
    for key, parameter in module.named_parameters():
        if "se.fc2" in key:
            # A sigmoid of 40 is 1 in float32
            nn.init.constant_(parameter, 0.0 if key.endswith("weight") else 40.0)


def test_resnet50_into_trunk(tmp_path: Path) -> None:
    """timm's resnet50: stages 1 to 3 but for the gates; stem and last stage fresh, and told."""
    torch.manual_seed(0)
    backbone = timm.create_model("resnet50").eval()
    assert isinstance(backbone, ResNet)
    save_file(backbone.state_dict(), tmp_path / "resnet50.safetensors")
    model = timm.create_model("ga_resnet50").eval()
    report = model.load_backbone(str(tmp_path / "resnet50.safetensors"))
    loaded = [k for k in backbone.state_dict() if k.startswith(("layer1", "layer2", "layer3"))]
    assert report.loaded == len([k for k in loaded if not k.endswith("_tracked")])
    assert {name.split(".")[0] for name in report.fresh if ".se." not in name} == {
        "conv1",
        "bn1",
        "layer4",
    }
    assert len([name for name in report.fresh if ".se." in name]) == 4 * 16
    _open_gates(model)
    x = torch.randn(1, 64, 17, 15)
    stages = [model.trunk.layer1, model.trunk.layer2, model.trunk.layer3]
    wanted = backbone.layer3(backbone.layer2(backbone.layer1(x)))
    torch.testing.assert_close(nn.Sequential(*stages)(x), wanted)


def test_deep_stem_into_trunk(tmp_path: Path) -> None:
    """A backbone with the same stem gives it, at other input channels too."""
    backbone = timm.create_model("resnet50c")
    save_file(backbone.state_dict(), tmp_path / "resnet50c.safetensors")
    model = timm.create_model("ga_resnet50", in_chans=1)
    report = model.load_backbone(str(tmp_path / "resnet50c.safetensors"))
    assert not [n for n in report.fresh if not n.startswith("layer4") and ".se." not in n]
    torch.testing.assert_close(model.trunk.bn1.weight, backbone.bn1.weight)
    first = backbone.conv1[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.trunk.conv1[0].weight, first)


def vit(**kwargs: object) -> VisionTransformer:
    """A small vision transformer as timm has them, with parameters away from 0."""
    torch.manual_seed(1)
    args = dict(img_size=64, embed_dim=64, depth=3, num_heads=2, num_classes=5)
    model = VisionTransformer(**{**args, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def without_class_token(backbone: VisionTransformer, x: Tensor) -> Tensor:
    """The backbone's tokens after its norm, had it no class token."""
    prefix = backbone.pos_embed.shape[1] - backbone.patch_embed.num_patches
    tokens = backbone.patch_embed(x) + backbone.pos_embed[:, prefix:]
    return backbone.norm(backbone.blocks(tokens))


@pytest.mark.parametrize(
    "args",
    [
        {},
        dict(class_token=False, global_pool="avg", fc_norm=False),
        dict(no_embed_class=True, init_values=0.3),
        dict(reg_tokens=2),
    ],
    ids=["deit", "no_class_token", "deit3", "registers"],
)
def test_vit_into_trunk(tmp_path: Path, args: dict[str, object]) -> None:
    """Prefix tokens dropped, layer scale folded: the same function of the patches."""
    backbone = vit(**args)
    save_file(backbone.state_dict(), tmp_path / "vit.safetensors")
    model = small("ga_vit_small")
    report = model.load_backbone(str(tmp_path / "vit.safetensors"))
    assert not report.fresh
    assert str(report).endswith("nothing fresh")
    x = torch.randn(2, 3, 64, 64)
    wanted = without_class_token(backbone, x).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(model.forward_features(x), wanted, rtol=1e-4, atol=1e-5)


def test_deit_into_trunk(tmp_path: Path) -> None:
    """timm's deit_small_patch16_224, with its class token and 197 positions."""
    torch.manual_seed(0)
    backbone = timm.create_model("deit_small_patch16_224").eval()
    save_file(backbone.state_dict(), tmp_path / "deit.safetensors")
    model = timm.create_model("ga_vit_small").eval()
    report = model.load_backbone(str(tmp_path / "deit.safetensors"))
    assert not report.fresh
    assert report.loaded == len(model.trunk.state_dict()) == len(backbone.state_dict()) - 3
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = without_class_token(backbone, x).transpose(1, 2).unflatten(2, (14, 14))
        torch.testing.assert_close(model.forward_features(x), wanted, rtol=1e-4, atol=1e-5)


def test_vit_positions_of_other_sizes(tmp_path: Path) -> None:
    """A table of 4x4 on a model of 6x2: resampled as timm does it; no grid, no guess."""
    backbone = vit()
    save_file(backbone.state_dict(), tmp_path / "vit.safetensors")
    model = small("ga_vit_small", img_size=(96, 32))
    model.load_backbone(str(tmp_path / "vit.safetensors"))
    backbone.set_input_size((96, 32))
    torch.testing.assert_close(model.trunk.pos_embed, backbone.pos_embed[:, 1:])
    odd = {**backbone.state_dict(), "pos_embed": torch.zeros(1, 13, 64)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(ConversionError, match="13 positions are no square grid"):
        model.load_backbone(str(tmp_path / "odd.safetensors"))


def test_vit_input_size(tmp_path: Path) -> None:
    """At the new size the positions are the table; timm's builder is told; files of either size."""
    model = small("ga_vit_small")
    x = torch.randn(1, 3, 96, 32)
    on_the_fly = model(x)
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    model.trunk.pos_embed.requires_grad_(False)
    model.set_input_size((96, 32))
    torch.testing.assert_close(model(x), on_the_fly)
    assert model.trunk.pos_embed.shape == (1, 12, 64)
    assert not model.trunk.pos_embed.requires_grad
    assert model._model_args["img_size"] == (96, 32)
    overlay = dict(file=str(tmp_path / "small.safetensors"), num_classes=7)
    args = {**SMALL_VIT, "img_size": (96, 32)}
    again = timm.create_model(
        "ga_vit_small", pretrained=True, pretrained_cfg_overlay=overlay, **args
    ).eval()
    torch.testing.assert_close(again(x), on_the_fly)
    model.set_input_size(patch_size=8)
    assert model.forward_features(x).shape[2:] == (12, 4)
    assert {info["reduction"] for info in model.feature_info} == {8}


@pytest.mark.parametrize("name", NAMES)
def test_cfg(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """No weights are published, and none are claimed."""
    cfg = timm.create_model(name, device="meta").pretrained_cfg
    assert cfg["tag"] == "untrained"
    assert not any(cfg.get(key) for key in ("url", "file", "hf_hub_id", "origin_url"))
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="No pretrained"):
        timm.create_model(name, pretrained=True, device="meta")
