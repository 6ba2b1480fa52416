"""Exportable layers through PyTorch's ONNX exporter, computed by ONNX Runtime."""

import pytest
import timm
import torch
from torch import Tensor, nn

from qna_timm.layers import GramianHead, LearnedQueryAttention, SpanAttention

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# scripts/test_all.sh installs what they need; the check tests graphs without operators of our own
pytestmark = pytest.mark.thorough


def learned_queries(kernel_size: int, stride: int) -> tuple[nn.Module, Tensor]:
    layer = LearnedQueryAttention(8, 2, kernel_size=kernel_size, stride=stride, num_queries=2)
    return layer, torch.randn(2, 9, 7, 8)


def learned_spans() -> tuple[nn.Module, Tensor]:
    layer = SpanAttention(6, 8, num_heads=2, max_span=3, adaptive=True)
    return layer, torch.randn(2, 6, 9, 7)


def gramian_head() -> tuple[nn.Module, Tensor]:
    return GramianHead(16, 5, 3, gram_dim=8, embed_groups=4, num_heads=4), torch.randn(2, 16, 6, 5)


CASES = {
    "learned-queries": lambda: learned_queries(3, 2),
    "learned-queries-by-rows": lambda: learned_queries(7, 1),
    "learned-spans": learned_spans,
    "gramian-head": gramian_head,
}


@pytest.mark.parametrize("case", CASES)
def test_layers(case: str) -> None:
    """The same numbers for any batch."""
    torch.manual_seed(0)
    timm.layers.set_fused_attn(False)
    try:
        layer, x = CASES[case]()
    finally:
        timm.layers.set_fused_attn(True)
    layer.eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    y = torch.cat([x, 2 * x])[:3]
    (found,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), layer(y), rtol=1e-4, atol=1e-5)
