"""The global random number generators: seeded by what is drawn for, kept from what is not."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import get_worker_info

_NUMPY_SEEDS = 2**32


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of `parts`; those of neighbouring parts are unrelated."""
    text = "/".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seeds Python's, NumPy's and PyTorch's CPU generator, and that of an accelerator."""
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)
    # Not torch.manual_seed: that would also restart the generators of other devices.
    torch.random.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def seed_optimizer(optimizer: Optimizer, seed: int, device: torch.device) -> None:
    """Seeds what an optimizer draws from in a step, if it draws: the same on every process.

    Adahessian has a generator of its own, which its state leaves out; Kron draws from the global
    ones too, which are seeded otherwise on every process.

    Args:
        optimizer: The optimizer, maybe in timm's `Lookahead`.
        seed: Of the step.
        device: Where the parameters are.
    """
    inner = getattr(optimizer, "_base_optimizer", optimizer)
    if isinstance(getattr(inner, "generator", None), torch.Generator):
        inner.seed = seed  # of the generator that it makes on another device
        inner.generator.manual_seed(seed)
    elif hasattr(inner, "rng"):
        seed_generators(seed, device)


def seed_average(average: nn.Module | None, seed: int) -> None:
    """Seeds what averaged weights in bfloat16 are rounded by: the same on every process.

    timm's average has a generator of its own, which its state leaves out.

    Args:
        average: timm's `ModelEmaV3`, or None without an average.
        seed: Of the update.
    """
    generator = getattr(average, "_sr_generator", None)
    if generator is not None:
        generator.manual_seed(seed)


@contextlib.contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restores the CPU generators, and that of an accelerator, on exit.

    So what is loaded in the main process leaves no trace in what is computed there. In a loader
    worker, whose generators serve nothing else, it does nothing.
    """
    if get_worker_info() is not None:
        yield
        return
    accelerator = None
    if device is not None and device.type != "cpu":
        accelerator = torch.get_device_module(device)
        accelerator_state = accelerator.get_rng_state(device)
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        if accelerator is not None:
            accelerator.set_rng_state(accelerator_state, device)
