"""SA-ResNets for ImageNet: parameters, attention and pooling as their paper has them."""

import pytest
import timm
import torch

from qna_timm.layers import AdaptiveSpan, SpanAttention

IMAGENET = {26: 10.3e6, 38: 14.1e6, 50: 18.0e6}


@pytest.mark.parametrize("depth", IMAGENET)
def test_imagenet_networks(depth: int) -> None:
    """Parameters, and attention as their paper has it: 7x7, eight heads with both axes each."""
    model = timm.create_model(f"sa_resnet{depth}", device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(IMAGENET[depth], rel=0.02)
    layers = [m for m in model.modules() if isinstance(m, SpanAttention)]
    assert depth == 3 * len(layers) + 2
    assert not any(
        isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()
    )
    for layer in layers:
        assert (layer.kernel_size, layer.num_heads, layer.rel_axes) == (7, 8, "both")
    learned = timm.create_model(f"sa_resnet{depth}_adaptive", device="meta")
    spans = [m for m in learned.modules() if isinstance(m, AdaptiveSpan)]
    assert len(spans) == len(layers) and all(s.max_span == 5 for s in spans)


def test_pooling_after_attention() -> None:
    """Stages of the ImageNet networks average right behind the attention, others at the end."""
    torch.manual_seed(0)
    model = timm.create_model("sa_resnet26", channels=(16, 16, 32, 32), num_classes=2).eval()
    block = model.stages[1][0]
    x = torch.randn(1, 64, 8, 8)
    y = torch.nn.functional.avg_pool2d(block.spatial(block.conv1(x)), 2)
    y = block.conv3(block.norm2(y)) + block.shortcut(x)
    torch.testing.assert_close(block(x), y.relu())
    block = timm.create_model("sa_resnet_small_cnn").eval().stages[0][0]
    x = torch.randn(1, 32, 8, 8)
    y = block.conv3(block.norm2(block.spatial(block.conv1(x))))
    torch.testing.assert_close(
        block(x), (torch.nn.functional.avg_pool2d(y, 2) + block.shortcut(x)).relu()
    )


@pytest.mark.parametrize("name", ["sa_resnet26", "sa_resnet26_adaptive"])
@pytest.mark.parametrize("size", [(224, 224), (97, 33)])
def test_runs_at_any_size(name: str, size: tuple[int, int]) -> None:
    model = timm.create_model(name).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
        logits = model.forward_head(maps[-1])
    assert logits.shape == (1, 1000) and logits.isfinite().all()
    for feature, reduction in zip(maps, (4, 8, 16, 32), strict=True):
        assert feature.shape[2:] == tuple(-(-side // reduction) for side in size)
