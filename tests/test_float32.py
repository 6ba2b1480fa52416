"""Float32 without TF32 and autocast, deterministic pooling: what matters on a GPU, seen without."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from qna_timm.ops import average_pool_to
from qna_timm.ops.float32 import full_float32, is_plain_float32

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# PyTorch's switches from 2.9 on
has_newer = hasattr(torch.backends.cudnn, "conv")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    if has_newer:
        torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def switches() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_no_tf32_inside(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = True
    with full_float32(CUDA):
        assert switches() == ("highest", False)
    assert switches() == (precision, True)
    with pytest.raises(ZeroDivisionError), full_float32(CUDA):
        raise ZeroDivisionError
    assert switches() == (precision, True)


@pytest.mark.skipif(not has_newer, reason="this PyTorch has the older switches alone")
def test_newer_switches() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with full_float32(CUDA):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.allow_tf32


def test_other_devices() -> None:
    torch.set_float32_matmul_precision("high")
    x = torch.ones(2)
    assert is_plain_float32(x) and is_plain_float32(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain_float32(x)
        with full_float32(CPU):
            assert is_plain_float32(x)
    with full_float32(CPU):
        assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (7, 7)), ((13, 9), (7, 4)), ((5, 6), (3, 1)), ((3, 2), (5, 2))]
)
def test_deterministic_pooling(old: tuple[int, int], new: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    wanted = F.adaptive_avg_pool2d(x, new)
    direction = torch.randn_like(wanted)
    torch.use_deterministic_algorithms(True)
    try:
        found = average_pool_to(x, new)
        grads = [torch.autograd.grad(out, x, direction)[0] for out in (found, wanted)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert "AdaptiveAvgPool" not in type(found.grad_fn).__name__
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="an older PyTorch")
def test_operators_stay_out_of_cuda_graphs() -> None:
    for name in ("qna_attention", "qna_attention_backward", "span_attention"):
        operator = getattr(torch.ops.qna_timm, name).default
        assert torch.Tag.cudagraph_unsafe in operator.tags
