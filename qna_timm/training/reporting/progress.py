"""Progress of a pass over a loader: a bar on a terminal, lines in a pipe; an epoch in a line."""

import importlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

_logger = logging.getLogger(__name__)

# Turning a CUDA tensor into text waits for the device, so the bar's values are read this rarely.
_BAR_REFRESH_S = 0.5


def _format_value(value: Any) -> str:
    number = float(value)
    if number == 0 or 1e-3 <= abs(number) < 1e4:
        return f"{number:.4g}" if abs(number) < 10 else f"{number:.2f}"
    return f"{number:.2e}"


def format_duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _shows_bars() -> bool:
    """Whether stderr is a terminal with room; a bar on one of no width (containers) is unseen."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return True  # a terminal that does not tell its size


def epoch_text(
    train: Mapping[str, float], evaluated: Mapping[str, float], num_branches: int | None = None
) -> str:
    """An epoch's losses and metrics in a line: ``training loss 1.9, val loss 1.7, val top1 93.5``.

    Args:
        train: Means over the epoch.
        evaluated: Metrics on the validation images, if there are any.
        num_branches: Of a model whose training loss is a sum over branches: beside it stands their
            mean, which can be held against the validation loss.
    """
    losses = {"training loss": train["loss"]}
    if num_branches:
        losses["per branch"] = train.get("loss_class", math.nan) / num_branches
    return ", ".join(filter(None, (metrics_text(losses), metrics_text(evaluated, "val "))))


def metrics_text(metrics: Mapping[str, float], prefix: str = "") -> str:
    """Metrics in a line: ``top1 93.5, branches_top1 91.2 90.8 92.1, agreement 94.6``."""
    parts: list[str] = []
    for name, value in metrics.items():
        branch = re.fullmatch(r"branch_(\d+)_(.*)", name)
        if branch and branch[1] != "0":
            parts[-1] += f" {value:.4g}"
        else:
            shown = f"branches_{branch[2]}" if branch else name
            parts.append(f"{prefix}{shown} {value:.4g}")
    return ", ".join(parts)


class Progress:
    """Shows how far a pass over a loader is, how fast, and how long it will still take.

    Args:
        total: Number of steps (calls of `update`) in the pass; 0 when unknown.
        desc: Short name of the pass, for example `train 3/10`.
        log_interval: Steps between two log lines when stderr is not a terminal; 0 logs only the
            last step.
        enabled: False makes every method do nothing (all ranks but the first).
        start_step: Steps already behind us when a pass is continued.
    """

    def __init__(
        self, total: int, desc: str, *, log_interval: int, enabled: bool = True, start_step: int = 0
    ) -> None:
        self.total = total
        self.desc = desc
        self.log_interval = log_interval
        self.enabled = enabled
        self.step = start_step
        self.images = 0
        self._start_step = start_step
        self._start_time = time.perf_counter()
        self._last_shown = 0.0
        self._bar = self._open_bar() if enabled and _shows_bars() else None

    def _open_bar(self) -> Any | None:
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError:
            return None  # log lines say the same
        return tqdm(
            total=self.total or None,
            initial=self.step,
            desc=self.desc,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    @property
    def rate(self) -> float:
        """Images per second since the pass began."""
        return self.images / max(time.perf_counter() - self._start_time, 1e-9)

    def update(self, n_images: int, **values: Any) -> None:
        """Counts one step.

        Args:
            n_images: Images of this step over all processes.
            **values: Numbers or one-element tensors to show. They are read only when shown, so
                passing device tensors costs nothing on the other steps.
        """
        if not self.enabled:
            return
        self.step += 1
        self.images += n_images
        last = self.step == self.total
        if self._bar is not None:
            now = time.perf_counter()
            if last or now - self._last_shown >= _BAR_REFRESH_S:
                self._last_shown = now
                self._bar.set_postfix_str(self._describe(values), refresh=False)
            self._bar.update(1)
        elif last or (self.log_interval and (self.step - 1) % self.log_interval == 0):
            _logger.info("%s", self._line(values))

    def _describe(self, values: dict[str, Any]) -> str:
        parts = [f"{name} {_format_value(value)}" for name, value in values.items()]
        return ", ".join([*parts, f"{self.rate:.1f} img/s"])

    def _line(self, values: dict[str, Any]) -> str:
        line = f"{self.desc} [{self.step}"
        if self.total:
            elapsed = time.perf_counter() - self._start_time
            steps_run = self.step - self._start_step
            remaining = elapsed / steps_run * (self.total - self.step)
            line += f"/{self.total} {100 * self.step / self.total:.0f}%] {self._describe(values)}"
            return f"{line}, eta {format_duration(remaining)}"
        return f"{line}] {self._describe(values)}"

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
