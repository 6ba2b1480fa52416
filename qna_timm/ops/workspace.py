"""Buffers that are used again: on a CPU, fresh memory costs more than what is computed in it."""

import math
import threading

import torch
from torch import Tensor

# What a thread keeps between calls at most.
MOST_BYTES = 2**26

_kept = threading.local()


class Workspace:
    """Buffers by name. On a CPU they outlive the call, for the thread's next one."""

    def __init__(self, like: Tensor) -> None:
        """Of the dtype and on the device of `like`."""
        self.like = like
        self.buffers: dict[tuple, tuple[Tensor, tuple]] = {}
        if like.device.type == "cpu":
            if not hasattr(_kept, "buffers"):
                _kept.buffers = {}
            self.buffers = _kept.buffers

    def get(self, name: str, shape: tuple[int, ...], key: tuple | None = None) -> Tensor:
        """A buffer with anything in it; with a key, zeros or what that key's user left there."""
        count = math.prod(shape)
        flat, user = self.buffers.get((name, self.like.dtype), (None, ()))
        fresh = flat is None or flat.numel() < count
        if fresh:
            with torch.inference_mode(False):  # it may serve a call outside of it next
                flat = self.like.new_empty(count)
        if key is not None and (fresh or user != (key, shape)):
            flat.zero_()
        self.buffers[name, self.like.dtype] = flat, (key, shape)
        return flat[:count].view(shape)

    def release(self) -> None:
        """Lets go of buffers where they are many."""
        held = sum(flat.numel() * flat.element_size() for flat, _ in self.buffers.values())
        if held > MOST_BYTES:
            self.buffers.clear()
