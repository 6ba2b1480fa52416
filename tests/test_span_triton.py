"""Triton kernels of span attention: their cases in the interpreter, and compilation."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_launch, record_launches, resources, run_cases

from qna_timm.ops import span_attention
from qna_timm.ops.span.triton import launch as span_triton

CASES = Path(__file__).parent / "span_triton_cases.py"


@pytest.mark.timeout(900)
def test_cases_in_the_interpreter() -> None:
    run_cases(CASES, {"TRITON_INTERPRET": "1"}, "not thorough")


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_more_cases_in_the_interpreter() -> None:
    run_cases(CASES, {"TRITON_INTERPRET": "1"}, "thorough")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cases_on_the_gpu() -> None:
    run_cases(CASES, {"TRITON_INTERPRET": "0"})


@pytest.mark.parametrize(
    ("dtype", "head_dim", "kernel_size", "capability"),
    [
        (torch.bfloat16, 16, 7, 80),
        (torch.bfloat16, 16, 7, 90),
        (torch.float16, 64, 3, 90),
        (torch.float32, 32, 11, 90),
    ],
    ids=str,
)
def test_kernels_compile(
    dtype: torch.dtype, head_dim: int, kernel_size: int, capability: int
) -> None:
    """Down to machine code, with the arguments that the launchers give, and without spilling."""
    heads, offsets = 4, kernel_size**2
    channels = heads * head_dim
    qkv = torch.empty(2, 14, 14, 3 * channels, dtype=dtype)
    table, mask, floor = (
        torch.empty(shape) for shape in ((channels, kernel_size), (heads, offsets), (offsets,))
    )

    def call() -> None:
        arguments = (qkv, table, table, mask, floor, heads, True, 1.0)
        span_triton.backward(qkv[..., :channels], *arguments, *span_triton.forward(*arguments))

    launches = record_launches(span_triton, call)
    names = [launch.kernel.__name__.removeprefix("span_") for launch in launches]
    backward = ["weights_kernel", "bwd_queries_kernel", "bwd_keys_kernel"]
    assert names == ["weights_kernel", "fwd_kernel", *backward]
    for launch in launches[1:]:
        # bytes of a thread: at most 16 with triton 3.9, 40 with 3.8
        assert resources(compile_launch(launch, capability)).spilled <= 48


def test_needs_a_gpu() -> None:
    table = torch.zeros(8, 3)
    with pytest.raises(ValueError, match=r"impl='triton' cannot compute this: .* on cpu"):
        span_attention(torch.zeros(1, 4, 4, 24), table, table, 2, impl="triton")
