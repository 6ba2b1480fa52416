"""Ladders of an installation with compiled functions and of one without."""

import pytest
import torch

from qna_timm.ops import qna_attn
from qna_timm.ops.qna_native import unsupported

SWITCHED_OFF = "a test has switched it off"


def needs_native() -> None:
    """Skips a test where nothing was compiled."""
    against = unsupported(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    if against is not None:
        pytest.skip(against)


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing was compiled."""
    monkeypatch.setattr(qna_attn, "unsupported", lambda *_: SWITCHED_OFF)
