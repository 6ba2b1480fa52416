"""Float32 as such where half precision would not do: neither autocast nor TF32 inside."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor


def is_plain_float32(x: Tensor) -> bool:
    """Whether float32 products of a tensor are such already, so that nothing is to be switched."""
    if x.is_meta:
        return True
    if torch.is_autocast_enabled(x.device.type):
        return False
    return not x.is_cuda or torch.compiler.is_compiling()


def full_float32(device: torch.device) -> AbstractContextManager:
    """A context in which products and convolutions of float32 numbers are float32.

    Autocast is off, and so is TF32 on a GPU, which has 10 bits of a number where float32 has 23:
    a score that goes into an exponential, or what sets two Gram matrices apart, is lost in it.
    Compilers see autocast alone: a compiled graph takes what the caller has set for TF32. What is
    switched is the whole process's.
    """
    autocast = torch.autocast(device.type, enabled=False)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return autocast
    return _without_tf32(autocast)


@contextmanager
def _without_tf32(autocast: AbstractContextManager) -> Iterator[None]:
    undo = [_matmul_without_tf32(), _convolution_without_tf32()]
    try:
        with autocast:
            yield
    finally:
        for restore in undo:
            restore()


def _matmul_without_tf32() -> Callable[[], None]:
    """Switches it off; what is returned switches it back."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has used PyTorch's newer switches, which the older refuse
        return _switched(torch.backends.cuda.matmul)
    if before == "highest":
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


def _convolution_without_tf32() -> Callable[[], None]:
    """The same for convolutions, whose TF32 is PyTorch's default."""
    try:
        before = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return _switched(torch.backends.cudnn.conv)
    if not before:
        return lambda: None
    torch.backends.cudnn.allow_tf32 = False

    def restore() -> None:
        torch.backends.cudnn.allow_tf32 = True

    return restore


def _switched(operations: object) -> Callable[[], None]:
    before = operations.fp32_precision
    operations.fp32_precision = "ieee"
    return lambda: setattr(operations, "fp32_precision", before)
