"""What every architecture does with timm's common arguments, where outputs alone would not tell."""

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import qna_timm  # noqa: F401 - registers the models

HEADS = dict(gram_dim=16, num_branches=2, proj_groups=4, embed_groups=8, attn_dim=16)
STAGES = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
STRIPES = dict(gram_num_heads=2, fuse_num_heads=4, gram_split_size=3, fuse_split_size=3)
# architecture -> (arguments of a small one, those for dropout beside drop_rate)
SMALL: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "qna_vit_tiny": (
        dict(
            embed_dim=8,
            qna_depths=(1, 1, 1, 0),
            window_depths=(0, 0, 1, 2),
            qna_num_heads=(2,) * 4,
            window_num_heads=(2,) * 4,
            window_size=2,
        ),
        dict(proj_drop_rate=0.1),
    ),
    "cswin_tiny": (
        dict(STAGES, num_heads=(2, 2, 4, 4), split_sizes=(1, 2, 2, 2)),
        dict(proj_drop_rate=0.1, attn_drop_rate=0.3),
    ),
    "ga_convnext_tiny": (
        dict(STAGES, num_taps=1, gram_dim=16, num_branches=2),
        {},
    ),
    "ga_cswin_tiny": (
        dict(HEADS, **STAGES, **STRIPES, trunk_num_heads=(2, 2, 4, 4), num_taps=1),
        {},
    ),
    "ga_resnet50": (
        dict(HEADS, layers=(1, 2, 1, 1), channels=(8, 16, 32, 32), stem_width=8, num_features=64),
        {},
    ),
    "ga_vit_small": (dict(HEADS, img_size=64, embed_dim=64, depth=3, trunk_num_heads=2), {}),
    "ga_backbone": (dict(HEADS, backbone="resnet18", num_features=64), {}),
    "sa_resnet_small_adaptive": ({}, {}),
}
NAMES = sorted(
    name
    for name in timm.list_models()
    if timm.model_entrypoint(name).__module__.startswith("qna_timm.")
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
every_architecture = pytest.mark.parametrize("name", SMALL)


def small(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **{**SMALL[name][0], **kwargs}).train()


def images(name: str) -> torch.Tensor:
    size = 16 if name.startswith("sa_resnet") else 64
    return torch.randn(2, 3, size, size)


def test_default_cfgs() -> None:
    """The images that the released code was evaluated on."""
    for name in NAMES:
        if name == "ga_backbone":  # the backbone's
            continue
        cfg, is_small = timm.get_pretrained_cfg(name), name.startswith("sa_resnet_")
        mean_std = CIFAR100 if is_small else IMAGENET
        assert (cfg.mean, cfg.std, cfg.interpolation) == (*mean_std, "bicubic"), name
        crop = 1.0 if is_small else 0.9 if "cswin" in name.lower() else 0.875
        assert (cfg.crop_pct, cfg.num_classes) == (crop, 100 if is_small else 1000), name
        assert cfg.input_size == ((3, 32, 32) if is_small else (3, 224, 224)), name
        side = 4 if is_small else 14 if name.startswith("ga_") else 7
        assert cfg.pool_size == (side, side), name


@pytest.mark.parametrize("name", [*SMALL, "sa_resnet26"])
def test_layers_that_cfgs_name(name: str) -> None:
    """timm adapts the first convolution to other channels, and drops other classifiers."""
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    first = model.get_submodule(cfg["first_conv"])
    assert isinstance(first, nn.Conv2d) and first.in_channels == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()


# how often dropout of a rate happens in a forward pass: 0.2 before the classifier, 0.1 after
# projections and inside and after MLPs, 0.3 where attention weights are dropped
DROPPED = {
    # blocks: 3 of learned queries and 3 strided ones, 3 of windows, each thrice
    "qna_vit_tiny": {0.2: 1, 0.1: 27},
    "cswin_tiny": {0.2: 1, 0.1: 15},
}


@every_architecture
def test_dropout(name: str) -> None:
    model = small(name, drop_rate=0.2, **SMALL[name][1])
    seen: Counter[float] = Counter()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: seen.update([module.p]))
    model(images(name))
    seen.pop(0.0, None)
    assert dict(seen) == DROPPED.get(name, {0.2: 1})


def test_attention_dropout() -> None:
    """Inside the fused attention: a rate of nearly 1 leaves little of it."""
    for name, rate in (("cswin_tiny", "attn_drop_rate"),):
        plain, dropped = small(name), small(name, **{rate: 0.5})
        x = images(name)
        torch.testing.assert_close(plain.eval()(x), dropped.eval()(x))
        dropped.train()
        assert not torch.equal(dropped(x), dropped(x))


@every_architecture
def test_stochastic_depth(name: str) -> None:
    """Drops in training, and reaches the rate that was asked for."""
    model, x = small(name, drop_path_rate=0.6), images(name)
    rates = [layer.drop_prob for layer in model.modules() if isinstance(layer, DropPath)]
    assert max(rates) == pytest.approx(0.6)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()  # what differs is not their statistics
    assert not torch.equal(model(x), model(x))


def blocks_of(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """The residual blocks of a network's stages."""
    kinds = ("Block", "Bottleneck", "BasicBlock", "SEBottleneck", "CSWinBlock", "SABottleneck")
    found = {
        place: module
        for place, module in model.named_modules()
        if type(module).__name__ in (*kinds, "ConvNeXtBlock") and "fuse" not in place
    }
    return {k: module for k, module in found.items() if "downsample" not in k.split(".")[-1]}


@every_architecture
def test_gradient_checkpointing_computes_again(name: str) -> None:
    """Every block of every stage twice, those whose maps are tapped too."""
    model, calls = small(name), Counter()
    blocks = blocks_of(name, model)
    assert len(blocks) >= 3
    for place, block in blocks.items():
        # before a call: computing again ends early, inside the last one
        block.register_forward_pre_hook(lambda *_, place=place: calls.update([place]))
    for enable, times in ((False, 1), (True, 2)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(images(name)).square().mean().backward()
        assert calls == dict.fromkeys(blocks, times)


TILED = ("qna_vit_tiny", "cswin_tiny", "ga_cswin_tiny")  # their windows hold to an image's size
GRAMIAN = [name for name in SMALL if name.startswith("ga_")]


@pytest.mark.parametrize("name", GRAMIAN)
def test_parts_of_gramian_networks_are_called(name: str) -> None:
    """Hooks of tools and units of FSDP2 are on modules: trunk, stages, fusion, head."""
    model, called = small(name).eval(), set()
    for place, module in model.named_modules():
        module.register_forward_hook(lambda *_, place=place: called.add(place))
    model(images(name))
    stages = {info["module"] for info in model.feature_info}
    if name == "ga_convnext_tiny" or name == "ga_cswin_tiny":
        stages -= {"trunk.stages.2"}  # gives maps from between its blocks
    trunk = set() if name == "ga_backbone" else {"trunk"}  # whose features timm's method gives
    assert {*stages, *trunk, "fuse", "head", "head.block.q", "head.fc"} - called == set()


@pytest.mark.parametrize("name", GRAMIAN)
def test_features_of_gramian_networks(name: str) -> None:
    """By the getter, said or not; no other of timm's classes fits a trunk within."""
    for words in ({}, {"feature_cls": "getter"}):
        features = small(name, features_only=True, **words).eval()
        maps = features(images(name))
        assert [x.shape[1] for x in maps] == features.feature_info.channels()
    for kind in ("list", "dict", "hook", "fx"):
        with pytest.raises(ValueError, match=f"must be 'getter', got '{kind}'"):
            small(name, features_only=True, feature_cls=kind)


@pytest.mark.parametrize("name", GRAMIAN)
def test_no_heads_without_the_fused_map(name: str) -> None:
    model = small(name)
    model.prune_intermediate_layers([0], prune_norm=True)
    with pytest.raises(ValueError, match=r"^the fused map was pruned, .* got 5 and None$"):
        model.reset_classifier(5)
    with pytest.raises(ValueError, match=r"^the fused map was pruned, .* got 0 and 'gram'$"):
        model.reset_classifier(0, "gram")
    model.reset_classifier(0)
    assert model.eval()(images(name)).ndim == 4


@pytest.mark.parametrize("name", GRAMIAN)
def test_maps_beside_the_fused_one(name: str) -> None:
    """The same as without it: ends of stages, not what is tapped between their blocks."""
    model, x = small(name).eval(), images(name)
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if place.endswith("gamma"):  # a layer scale that begins small hides what a block does
                parameter.fill_(1.0)
        features, maps = model.forward_intermediates(x)
        wanted = model.forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(features, model.forward_features(x))
    assert len(maps) == len(wanted) == len(model.feature_info)
    for found, alone in zip(maps, wanted, strict=True):
        torch.testing.assert_close(found, alone)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in SMALL if name not in TILED])
def test_exported_for_any_size(name: str) -> None:
    model, auto = small(name).eval(), torch.export.Dim.AUTO
    example = torch.randn(2, 3, 96, 64)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for size in ((3, 3, 65, 97), (2, 3, 128, 160)):
        x = torch.randn(size)
        torch.testing.assert_close(program.module()(x), model(x))


@every_architecture
@torch.no_grad()
def test_modules_are_called_once(name: str) -> None:
    """Quantizers take what a module computes for one operation, with statistics of its own."""
    model, calls = small(name).eval(), Counter()
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    model(images(name))
    assert calls and set(calls.values()) == {1}, calls.most_common(3)
