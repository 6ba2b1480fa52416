"""What the processes of a run are doing, told through memory that outlives them."""

import mmap
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from qna_timm.training import loop
from qna_timm.training.control import Control
from qna_timm.training.reporting import curves
from qna_timm.training.session import Session

# The first is where a process begins; `between` is what the others leave of a session.
PHASES = (
    "start-up",
    "loading",
    "forward",
    "backward",
    "agreeing",
    "optimizer",
    "evaluation",
    "saving",
    "between",
)


class Strike(NamedTuple):
    """Where a process kills itself.

    Attributes:
        phase: One of `PHASES`.
        entry: How often it has entered the phase by then.
        rank: Of the process.
        leaving: Whether it does so at the end of the phase instead of at its beginning.
    """

    phase: str
    entry: int = 1
    rank: int = 0
    leaving: bool = False


class Phases:
    """Notes the phase of each process in shared memory, so that a killed one has told its last.

    Args:
        train: From `killing.load_train`.
        processes: Number of ranks.
        strike: Where one of them ends.
        draw: Whether they draw curves, which takes most of a short run's time.
    """

    def __init__(
        self,
        train: ModuleType,
        processes: int = 1,
        strike: Strike | None = None,
        *,
        draw: bool = False,
    ) -> None:
        self._train = train
        self._strike = strike
        self._draw = draw
        self._memory = mmap.mmap(-1, processes)
        self._rank = 0
        self._entered: Counter[str] = Counter()

    def of(self, rank: int) -> str:
        """What a process is doing, or was when it ended."""
        return PHASES[self._memory[rank]]

    def watch(self, rank: int) -> None:
        """Note the phases of this process from now on; `Run` calls it in each."""
        self._rank = rank
        if not self._draw:
            curves.can_draw = lambda: False
        for phase, owner, name in (
            ("start-up", self._train, "set_up"),
            ("between", Session, "train"),
            ("forward", loop.Trainer, "_forward"),
            ("backward", torch.Tensor, "backward"),
            ("agreeing", Control, "decide"),
            ("optimizer", loop.Trainer, "_update"),
            ("evaluation", Session, "_evaluate"),
            ("saving", Session, "_save_epoch"),
            ("saving", Session, "save_state"),
        ):
            setattr(owner, name, self._noted(phase, getattr(owner, name)))
        loop._batches = self._noted_batches(loop._batches)

    @contextmanager
    def _within(self, phase: str) -> Iterator[None]:
        outer = self._memory[self._rank]
        self._memory[self._rank] = PHASES.index(phase)
        self._entered[phase] += 1
        self._die_if_due(phase, leaving=False)
        yield
        self._die_if_due(phase, leaving=True)
        self._memory[self._rank] = outer

    def _die_if_due(self, phase: str, leaving: bool) -> None:
        if self._strike == (phase, self._entered[phase], self._rank, leaving):
            os.kill(os.getpid(), signal.SIGKILL)

    def _noted(self, phase: str, call: Callable) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Any:
            with self._within(phase):
                return call(*args, **kwargs)

        return noted

    def _noted_batches(self, call: Callable) -> Callable:
        def noted(*args: Any) -> Iterator[Any]:
            batches = iter(call(*args))
            while True:
                with self._within("loading"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        return noted
