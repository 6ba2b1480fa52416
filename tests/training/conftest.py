"""Fixtures of tests that train."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from killing import load_train

from qna_timm.training.reporting import curves


@pytest.fixture(autouse=True)
def seldom_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves would take most of the time of a short run: where they are no subject, none."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(curves, "can_draw", lambda: False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Results do not depend on the machine, and processes can be forked."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train(one_thread: None) -> ModuleType:
    """train.py as a module."""
    return load_train()


@pytest.fixture
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are compared have the same arguments, ``--output`` among them."""
    monkeypatch.chdir(tmp_path)
