"""Triton kernels in a process of their own, and compiled for a GPU that is not here."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def run_cases(cases: Path, environment: dict[str, str], marks: str = "") -> None:
    """A file of tests in a new process: whether triton interprets is settled at its import.

    Args:
        cases: The file.
        environment: Variables beside this process's.
        marks: Which of the tests, as pytest's -m has it.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        marks,
        str(cases),
    ]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


class Launch(NamedTuple):
    """A kernel with the arguments that a launcher gave it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder:
    """Stands in for a kernel: `recorder[grid](...)` is written down, nothing runs."""

    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append(Launch(self.kernel, grid, args, kwargs))

        return launch


def record_launches(module: ModuleType, call: Callable[[], Any]) -> list[Launch]:
    """What the launchers of a module start during a call."""
    kernels = {name: x for name, x in vars(module).items() if isinstance(x, JITFunction)}
    launches: list[Launch] = []
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, launches))
        call()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def _type(value: Any) -> Any:
    if value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(x) for x in value)
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _divisible_by_16(value: Any, path: tuple[int, ...]) -> dict[tuple[int, ...], list]:
    """Where an argument is a pointer or a multiple of 16, of which Triton makes use."""
    if isinstance(value, tuple):
        return {
            k: v for i, x in enumerate(value) for k, v in _divisible_by_16(x, (*path, i)).items()
        }
    if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
        return {path: [["tt.divisibility", 16]]}
    return {}


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compiles a launch down to machine code for an NVIDIA GPU, 80 (A100) or 90 (H100)."""
    kwargs = dict(launch.kwargs)
    options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    signature = {name: _type(value) for name, value in values.items()}
    signature |= dict.fromkeys(kwargs, "constexpr")
    constants = {name: None for name, value in values.items() if value is None} | kwargs
    divisible: dict[tuple[int, ...], list] = {}
    for i, value in enumerate(launch.args):
        divisible |= _divisible_by_16(value, (i,))
    source = ASTSource(launch.kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


class Resources(NamedTuple):
    """What a compiled kernel takes: of every thread registers and spilled bytes, shared bytes."""

    registers: int
    spilled: int
    shared: int


def resources(compiled: CompiledKernel) -> Resources:
    """Read from the machine code by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spilled = usage["STACK"] + usage["LOCAL"]
    return Resources(usage["REG"], spilled, compiled.metadata.shared)
