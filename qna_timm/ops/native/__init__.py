"""Compiled functions for CPUs: which library of an installation fits the processor, if any.

setup.py compiles the sources beside this file once for each of a few instruction sets, where it
finds a compiler. The libraries know neither Python nor PyTorch: they are called by addresses.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Instruction sets in `torch.backends.cpu.get_cpu_capability`'s words, and the modules for them.
KINDS = {"AVX512": "avx512", "AVX2": "avx2"}
BASELINE = "baseline"


class Library:
    """Functions of a library as attributes, or why there are none."""

    def __init__(self, why_not: str | None, **functions: Callable[..., Any]) -> None:
        self.why_not = why_not
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no compiled function {name!r}: {self.why_not}")


def address(x: Tensor | None) -> int | None:
    """Of a tensor's first number; None is a null pointer."""
    return None if x is None else x.data_ptr()


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
    kind = KINDS.get(torch.backends.cpu.get_cpu_capability(), BASELINE)
    spec = importlib.util.find_spec(f"{__name__}.{name}_{kind}")
    if spec is None or spec.origin is None:
        return Library("nothing was compiled when qna_timm was installed; it takes a C++ compiler")
    try:
        library = ctypes.CDLL(spec.origin)
        found = getattr(library, f"{name}_version")
        found.restype = ctypes.c_int64
        if found() != version:
            return Library("it is of another version of qna_timm; install the package anew")
        loaded = {}
        for function, (arguments, result) in functions.items():
            loaded[function] = getattr(library, function)
            loaded[function].argtypes, loaded[function].restype = arguments, result
    except (OSError, AttributeError) as error:
        return Library(f"it does not load: {error}")
    return Library(None, **loaded)
