"""Buffers that are used again: on a CPU, fresh memory costs more than what is computed in it."""

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What a thread keeps between calls at most.
MOST_BYTES = 2**26

_kept = threading.local()


class _Buffer:
    """Memory, and what is known of its first rows."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.owner: Any = None
        self.rows = 0


class Workspace:
    """Buffers by name. On a CPU they outlive the call, for the thread's next one."""

    def __init__(self, like: Tensor) -> None:
        """Of the dtype and on the device of `like`."""
        self.like = like
        self.buffers: dict[tuple[str, torch.dtype], _Buffer] = {}
        if like.device.type == "cpu":
            if not hasattr(_kept, "buffers"):
                _kept.buffers = {}
            self.buffers = _kept.buffers

    def get(
        self,
        name: str,
        shape: tuple[int, ...],
        owner: Any = None,
        prepare: Callable[[Tensor], Any] = Tensor.zero_,
    ) -> Tensor:
        """A buffer [rows, ...], uninitialised or, with an owner, as that owner left it.

        Args:
            name: Which buffer.
            shape: Its shape. The largest buffer that was asked for by this name stays allocated.
            owner: What all that is written there depends on, beside values; compared.
            prepare: Writes rows that the owner has not had before.
        """
        count = math.prod(shape)
        buffer = self.buffers.get((name, self.like.dtype))
        if buffer is None or buffer.flat.numel() < count:
            with torch.inference_mode(False):  # it may serve a call outside of it next
                buffer = _Buffer(self.like.new_empty(count))
            self.buffers[name, self.like.dtype] = buffer
        out = buffer.flat[:count].view(shape)
        owner = None if owner is None else (owner, shape[1:])
        if owner is None or owner != buffer.owner:
            buffer.owner, buffer.rows = owner, 0
        if owner is not None and buffer.rows < shape[0]:
            prepare(out[buffer.rows :])
            buffer.rows = shape[0]
        return out

    def release(self) -> None:
        """Lets go of buffers where they are large; to be called at the end of a call."""
        held = sum(x.flat.numel() * x.flat.element_size() for x in self.buffers.values())
        if held > MOST_BYTES:
            self.buffers.clear()
