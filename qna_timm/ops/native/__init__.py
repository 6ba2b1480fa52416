"""Compiled functions for CPUs: which library of an installation fits the processor, if any.

setup.py compiles the sources beside this file once for each of a few instruction sets, where it
finds a compiler. The libraries know neither Python nor PyTorch: they are called by addresses.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qna_timm.ops.workspace import Workspace

# Instruction sets in `torch.backends.cpu.get_cpu_capability`'s words, and modules for them, best
# first; the last is for any processor.
KINDS = {"AVX512": "avx512", "AVX2": "avx2", "DEFAULT": "baseline"}


@dataclass(frozen=True)
class Library:
    """Functions by name, or why there are none.

    Args:
        why_not: None for a library that serves.
        kind: The instruction set that it was compiled for.
        functions: What can be called.
    """

    why_not: str | None
    kind: str = ""
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def address(x: Tensor | None) -> int | None:
    """Of a tensor's first number; None is a null pointer.

    Raises:
        ValueError: it is in the memory of another device.
    """
    if x is None:
        return None
    if x.device.type != "cpu":
        raise ValueError(f"all tensors must be on the CPU as the map is, got one on {x.device}")
    return x.data_ptr()


def _find(name: str) -> tuple[str, str] | None:
    """The best kind that fits the processor of those that were compiled, and its file."""
    kinds, capability = list(KINDS), torch.backends.cpu.get_cpu_capability()
    for kind in kinds[kinds.index(capability) if capability in kinds else -1 :]:
        spec = importlib.util.find_spec(f"{__name__}.{name}_{KINDS[kind]}")
        if spec is not None and spec.origin is not None:
            return KINDS[kind], spec.origin
    return None


def load_library(
    name: str, version: int, functions: Mapping[str, tuple[list[type], type | None]]
) -> Library:
    """The library for this processor.

    Args:
        name: Of its source.
        version: What its function NAME_version must return: an installation in place may hold an
            older one.
        functions: Names, types of arguments and of results.
    """
    found = _find(name)
    if found is None:
        return Library("nothing was compiled when qna_timm was installed; it takes a C++ compiler")
    kind, path = found
    try:
        library = ctypes.CDLL(path)
        stated = getattr(library, f"{name}_version")
        stated.restype = ctypes.c_int64
        if stated() != version:
            return Library("it is of another version of qna_timm; install the package anew")
        loaded = {}
        for function, (arguments, result) in functions.items():
            loaded[function] = getattr(library, function)
            loaded[function].argtypes, loaded[function].restype = arguments, result
    except (OSError, AttributeError) as error:
        return Library(f"it does not load: {error}")
    return Library(None, kind, loaded)


class Call:
    """What a call of a library's functions takes: sizes, inputs in float32, memory, threads."""

    def __init__(
        self,
        library: Library,
        name: str,
        sizes: Sequence[int],
        inputs: Sequence[Tensor | None],
        backward: bool,
    ) -> None:
        """Of library `name`, whose function NAME_floats tells how much memory it takes."""
        self.sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        self.inputs = [in_float32(x) for x in inputs]
        self.threads = torch.get_num_threads()
        self.work = Workspace(self.inputs[0])
        floats = library.functions[f"{name}_floats"](self.sizes, int(backward), self.threads)
        self.memory = self.work.get("native", (floats,))

    def arguments(self, *settings: float) -> tuple:
        """Inputs, then settings, memory and threads."""
        inputs = (address(x) for x in self.inputs)
        return *inputs, *settings, address(self.memory), self.threads


def in_float32(x: Tensor | None) -> Tensor | None:
    """A tensor as compiled functions read it."""
    return None if x is None else x.detach().to(torch.float32).contiguous()
