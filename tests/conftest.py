"""Fixtures of all tests."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import preloaded
import pytest
import torch
from ladders import compiled_for, needs_native, without_native
from timm.layers import is_fast_norm, set_fast_norm

# What is compiled here is small: neither PyTorch's headers are worth compiling ahead, nor three
# programs to see whether the compiler knows the processor.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands the tests out starts what those that run them share."""
    if getattr(config.option, "numprocesses", None) and sys.platform == "linux":
        folder = Path(tempfile.mkdtemp(prefix="qna_timm_", dir="/tmp"))  # sockets have short paths
        server = preloaded.start(folder)
        os.environ[preloaded.FOLDER] = str(folder)

        def end() -> None:
            server.kill()
            server.wait()
            shutil.rmtree(folder)

        config.add_cleanup(end)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take minutes come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def pytest_collection_finish() -> None:
    """What imports and collection have made stays: no use in looking for garbage among it. Graphs
    are traced a tenth faster where little is looked for at all."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    """Settings of the whole process that runs of scripts change."""
    fast_norm, deterministic = is_fast_norm(), torch.are_deterministic_algorithms_enabled()
    yield
    set_fast_norm(fast_norm)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a kernel calls a function, Triton's interpreter looks through the whole language
    for what it has to replace: a third of its time. Once for each module is enough."""
    function = pytest.importorskip("triton.runtime.interpreter").InterpretedFunction
    if not hasattr(function, "rewrite"):  # a version that works otherwise
        return
    thorough, seen = function.__call__, set()

    def call(self: object, *args: object, **kwargs: object) -> object:
        if id(self.fn.__globals__) in seen:
            return self.rewrite()(*args, **kwargs)
        seen.add(id(self.fn.__globals__))
        return thorough(self, *args, **kwargs)

    monkeypatch.setattr(function, "__call__", call)


@pytest.fixture(params=["native", "stock"])
def ladder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test of 'auto', with compiled functions and without."""
    if request.param == "native":
        needs_native()
    else:
        without_native(monkeypatch)
    return request.param


@pytest.fixture(params=["AVX512", "AVX2", "DEFAULT"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Functions compiled for an instruction set."""
    compiled_for(request.param, monkeypatch)
    return request.param
