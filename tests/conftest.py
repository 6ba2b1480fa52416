"""Fixtures of all tests."""

import pytest
from ladders import compiled_for, needs_native, without_native


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
