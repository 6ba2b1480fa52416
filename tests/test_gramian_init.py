"""Gramian models made without memory, and initialised afterwards."""

import pytest
import timm
import torch

import qna_timm  # noqa: F401 - registers the models

STAGES = dict(depths=(1, 1, 3, 1), num_taps=1, gram_dim=24, embed_groups=4)
MODELS = {
    "ga_convnext_tiny": dict(dims=(8, 16, 24, 32), **STAGES),
    "ga_cswin_tiny": dict(
        dims=(16, 32, 64, 64),
        trunk_num_heads=(2, 2, 4, 4),
        fuse_num_heads=4,
        proj_groups=4,
        **STAGES,
    ),
    "ga_resnet50": dict(
        layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), num_features=64, attn_dim=16
    ),
    "ga_vit_small": dict(depth=2, embed_dim=96, trunk_num_heads=3, attn_dim=24, img_size=64),
    "ga_backbone": dict(backbone="test_resnet", gram_dim=16),
}


@pytest.mark.parametrize("name", MODELS)
def test_init_weights_after_to_empty(name: str) -> None:
    """Every value is set: constants as the constructor's, others as spread as its."""
    torch.manual_seed(0)
    fresh = timm.create_model(name, num_classes=7, **MODELS[name])
    model = timm.create_model(name, num_classes=7, device="meta", **MODELS[name])
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 10**6)
    model.init_weights()
    wanted = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if not wanted[key].is_floating_point() or (wanted[key] == wanted[key].flatten()[0]).all():
            assert torch.equal(value, wanted[key]), key
        else:
            assert value.isfinite().all(), key
        if value.is_floating_point() and value.numel() > 256:
            assert value.std().item() == pytest.approx(wanted[key].std().item(), rel=0.3), key
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_init_weights_of_pruned_models(name: str) -> None:
    """What is left is initialised."""
    model = timm.create_model(name, num_classes=0, **MODELS[name])
    model.prune_intermediate_layers([0], prune_norm=True)
    model.init_weights()
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_branches_come_back_as_they_were_made() -> None:
    """Without pooling there are none; with classes again they begin as this family's do."""
    model = timm.create_model("ga_cswin_tiny", num_classes=7, **MODELS["ga_cswin_tiny"])
    before = model.head.gram_proj.weight.std().item()
    model.reset_classifier(0, "")
    model.reset_classifier(7)
    assert model.head.gram_proj.weight.std().item() == pytest.approx(before, rel=0.3)
