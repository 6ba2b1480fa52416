"""Which kernels the libraries of a GPU take."""

import os

import torch


def choose_kernels(device: torch.device, deterministic: bool = False, mixed: bool = False) -> None:
    """As timm's scripts do on a GPU, unless the same bits are asked for; to be called early.

    Args:
        device: Where this process computes; elsewhere than on a GPU only `deterministic` counts.
        deterministic: Take kernels that give the same bits each time, or raise where there are
            none.
        mixed: Precision is mixed: what float32 is left there was left for the sake of its digits.
    """
    if deterministic:
        # read when cuBLAS makes its first handle
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic  # one input size: the search pays
        torch.set_float32_matmul_precision("highest" if mixed else "high")  # "high" is TF32
