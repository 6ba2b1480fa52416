"""Lengths of time and of training as flags spell them: ``90s``, ``10m``, ``1h``, ``50``."""

import re
from datetime import timedelta
from typing import NamedTuple

from qna_timm.training.flags.declaration import Rule

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
# A century: beyond it a mistake, and far within what `timedelta` and timers take.
_MOST_SECONDS = 100 * 366 * 86400


class Interval(NamedTuple):
    """How often something is due: after so many updates or so many seconds; both 0 for never."""

    updates: int = 0
    seconds: float = 0.0


def _seconds(text: str) -> float | None:
    """Seconds of ``90``, ``90s``, ``1.5h``; None where the text is no length of time."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower(), re.ASCII)
    if match is None:
        return None
    seconds = float(match[1]) * _SECONDS[match[2]]
    return seconds if seconds <= _MOST_SECONDS else None


def _interval(text: str) -> Interval | None:
    if re.fullmatch(r"\d{1,15}", text.strip(), re.ASCII):
        return Interval(updates=int(text))
    has_unit = text.strip()[-1:].isalpha()
    seconds = _seconds(text) if has_unit else None
    return None if seconds is None else Interval(seconds=seconds)


def parse_interval(text: str) -> Interval:
    """Read an interval: a whole number of updates, or a time with its unit (s, m, h or d).

    Args:
        text: ``50``, ``90s``, ``10m``, ``1.5h``; ``0`` in any unit for never.

    Raises:
        ValueError: It is neither.
    """
    interval = _interval(text)
    if interval is None:
        raise ValueError(f"text: must be {INTERVAL.text}, found '{text}'")
    return interval


def parse_duration(text: str) -> timedelta:
    """Read a length of time: seconds, or a number with its unit (s, m, h or d).

    Raises:
        ValueError: It is none.
    """
    seconds = _seconds(text)
    if seconds is None:
        raise ValueError(f"text: must be {DURATION.text}, found '{text}'")
    return timedelta(seconds=seconds)


INTERVAL = Rule(
    "a whole number of updates, or a time such as 90s, 10m or 1h",
    lambda text: _interval(text) is not None,
)
DURATION = Rule(
    "a time above 0: seconds, or one such as 90s, 10m or 1h",
    lambda text: bool(_seconds(text)),
)
