"""Faults at the calls to the system that a save makes, and who is left whole after them."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qna_timm.training.storage import files
from qna_timm.training.storage.state_files import PREVIOUS_NAME, STATE_NAME, load_state, save_state


class FaultyCalls:
    """Counts the calls and has a fault happen instead of one of them.

    Args:
        number: Of the call, from 1; 0 for none.
        fault: What happens.
    """

    def __init__(self, number: int = 0, fault: Callable[[], None] = lambda: None) -> None:
        self.number = number
        self.fault = fault
        self.names: list[str] = []

    def step(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.number:
            self.fault()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("open", "fsync", "replace", "link", "unlink"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        patch.setattr(files, "open", self._open_file, raising=False)

    def _counted(self, name: str, call: Callable) -> Callable:
        def counted(*args: object, **kwargs: object) -> object:
            self.step(name)
            return call(*args, **kwargs)

        return counted

    def _open_file(self, path: Path, mode: str) -> io.BufferedIOBase:
        self.step(f"open {mode}")
        calls = self

        class Raw(io.FileIO):
            def write(self, data: bytes) -> int:
                calls.step("write")
                return super().write(data)

            def readinto(self, data: bytearray) -> int:
                calls.step("read")
                return super().readinto(data)

        raw = Raw(path, mode.replace("b", ""))
        if "+" in mode:
            return io.BufferedRandom(raw)
        return io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)


def refuse(number: int) -> Callable[[], None]:
    """The system refuses the call with this errno."""

    def fault() -> None:
        raise OSError(number, os.strerror(number))

    return fault


def full_disk() -> None:
    """No space left on the device."""
    refuse(errno.ENOSPC)()


def small_state(update: int, size: int = 500) -> dict:
    """A state of which every number is `update`."""
    return {
        "position": {"epoch": 2, "updates": update},
        "model": {"weight": torch.full((size,), float(update)), "bias": torch.full((3,), update)},
        "rows": [{"epoch": 0, "loss": float(update)}],
    }


def save_two(folder: Path) -> None:
    """Two saves: update 1 is in the last state but one, update 2 in the last."""
    folder.mkdir()
    for update in (1, 2):
        save_state(folder / STATE_NAME, small_state(update))


def updates_in(folder: Path) -> list[int]:
    """The updates of the previous and the last state, each whole in all its parts."""
    updates = []
    for name in (PREVIOUS_NAME, STATE_NAME):
        state = load_state(folder / name)
        update = state["position"]["updates"]
        assert torch.equal(state["model"]["weight"], torch.full((500,), float(update)))
        assert torch.equal(state["model"]["bias"], torch.full((3,), update))
        assert state["rows"][0]["loss"] == update
        updates.append(update)
    return updates
