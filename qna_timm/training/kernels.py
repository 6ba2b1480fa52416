"""Which kernels the libraries of a GPU take."""

import os

import torch


def choose_kernels(
    device: torch.device, deterministic: bool = False, full_float32: bool = False
) -> None:
    """As timm's scripts do on a GPU, unless the same bits are asked for; to be called early.

    Args:
        device: Where this process computes; elsewhere than on a GPU only `deterministic` counts.
        deterministic: Take kernels that give the same bits each time, or raise where there are
            none.
        full_float32: Without TF32: where precision is mixed, what is left of float32 needs its
            digits, and graphs cannot switch TF32 off for the parts that do.
    """
    if deterministic:
        # read when cuBLAS makes its first handle
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic  # one input size: the search pays
        torch.set_float32_matmul_precision("highest" if full_float32 else "high")  # "high" is TF32
