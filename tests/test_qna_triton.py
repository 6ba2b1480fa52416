"""Triton kernels of learned-query attention: their cases in the interpreter, and compilation."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_launch, record_launches, resources, run_cases

from qna_timm.ops.qna.triton import launch as qna_triton

CASES = Path(__file__).parent / "qna_triton_cases.py"


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


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_compile(dtype: torch.dtype, kernel_size: int, capability: int) -> None:
    """Down to machine code, with the arguments that the launchers give, and without spilling."""
    scores, value = torch.empty(1, 28, 28, 2, 8), torch.empty(1, 28, 28, 64, dtype=dtype)
    table = torch.empty(kernel_size**2, 2, 8)
    args = (scores, value, table, table)
    window = ((kernel_size, kernel_size), 1, kernel_size // 2)

    def call() -> None:
        out, stats = qna_triton.forward(*args, *window)
        qna_triton.backward(out, *args, stats, *window)

    launches = record_launches(qna_triton, call)
    names = [launch.kernel.__name__ for launch in launches]
    prefix = "toeplitz_" if kernel_size == 7 else ""
    forward = "toeplitz_kernel" if prefix else "forward_kernel"
    gradients = [f"{prefix}delta_kernel", f"{prefix}token_kernel", "table_kernel"]
    assert names == [forward, *gradients, *(["toeplitz_table_kernel"] if prefix else [])]
    # before 3.9 Triton took more for products of float32 numbers on an A100
    older = tuple(map(int, qna_triton.triton.__version__.split(".")[:2])) < (3, 9)
    most = 448 if older and (dtype, capability) == (torch.float32, 80) else 256
    for name, launch in zip(names, launches, strict=True):
        compiled = compile_launch(launch, capability)
        # bytes of a thread: here and there a few; behind the products' loop what they waited for
        assert resources(compiled).spilled <= (most if prefix else 64)
        if name.startswith("toeplitz"):
            products = "wgmma.mma_async" if capability == 90 else "mma.sync"
            assert products in compiled.asm["ptx"]


@pytest.mark.parametrize("head_dim", [1, 2])
def test_few_channels_compile(head_dim: int) -> None:
    """Products of tensor cores sum 16 numbers at least."""
    scores = torch.empty(1, 28, 28, 2, 8)
    value = torch.empty(1, 28, 28, 8 * head_dim, dtype=torch.bfloat16)
    table, window = torch.empty(49, 2, 8), ((7, 7), 1, 3)

    def call() -> None:
        out, stats = qna_triton.forward(scores, value, table, table, *window)
        qna_triton.backward(out, scores, value, table, table, stats, *window)

    for launch in record_launches(qna_triton, call):
        compile_launch(launch, 90)


def test_needs_a_gpu() -> None:
    scores, value = torch.empty(1, 3, 3, 1, 1), torch.empty(1, 3, 3, 4)
    assert "on cpu" in qna_triton.unsupported(scores, value, None, None, (3, 3), 1, 1)


def test_needs_tuples_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qna_triton.triton, "__version__", "3.2.0")
    scores, value = torch.empty(1, 3, 3, 1, 1), torch.empty(1, 3, 3, 4)
    reason = qna_triton.unsupported(scores, value, None, None, (3, 3), 1, 1)
    assert reason == "triton 3.2.0 is too old, 3.3 is the first that can"
