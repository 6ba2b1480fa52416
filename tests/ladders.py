"""Ladders of an installation with compiled functions and of one without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qna_timm.ops import native
from qna_timm.ops.qna import forms
from qna_timm.ops.qna import native as qna_native
from qna_timm.ops.span import native as span_native
from qna_timm.ops.workspace import Workspace

SWITCHED_OFF = "a test has switched it off"


def needs_native() -> None:
    """Skips a test where nothing was compiled."""
    for library in (qna_native.LIBRARY, span_native.LIBRARY):
        if library.why_not is not None:
            pytest.skip(library.why_not)


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing was compiled."""
    monkeypatch.setattr(forms, "unsupported", lambda *_: SWITCHED_OFF)
    monkeypatch.setattr(span_native, "unsupported", lambda *_: SWITCHED_OFF)


def capabilities() -> list[str]:
    """PyTorch's words for instruction sets that this processor has."""
    order = list(native.KINDS)
    best = torch.backends.cpu.get_cpu_capability()
    return order[order.index(best) :] if best in order else ["DEFAULT"]


def compiled_for(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the functions compiled for an instruction set; skips where they cannot run."""
    needs_native()
    if capability not in capabilities():
        pytest.skip(f"this processor has no {capability}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name, module in (("qna", qna_native), ("span", span_native)):
        library = native.load_library(name, module.VERSION, module.FUNCTIONS)
        assert (library.why_not, library.kind) == (None, native.KINDS[capability])
        monkeypatch.setattr(module, "LIBRARY", library)


def same_for_any_threads(run: Callable[[], list[Tensor]]) -> bool:
    """Whether results of one, two and three threads have the same bits."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return all(
        torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True)
    )


def guard_memory(monkeypatch: pytest.MonkeyPatch, margin: int = 4096) -> list[Tensor]:
    """Hands compiled functions memory without a number in it; what lies around it must stay so."""
    handed = []

    def get(self: Workspace, name: str, shape: tuple[int, ...]) -> Tensor:
        memory = torch.full((shape[0] + 2 * margin,), float("nan"))
        handed.append(memory)
        return memory[margin:-margin]

    monkeypatch.setattr(Workspace, "get", get)
    return handed


def untouched(handed: list[Tensor], margin: int = 4096) -> bool:
    """Whether nothing was written around handed memory."""
    return all(
        bool(memory[:margin].isnan().all() and memory[-margin:].isnan().all()) for memory in handed
    )
