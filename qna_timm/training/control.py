"""What a run's processes decide together between two updates: to stop, to save, to refuse one."""

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from qna_timm.training.flags.intervals import Interval
from qna_timm.training.processes.distributed import Processes, reduce_flags
from qna_timm.training.signals import Stopped, StopSignals


class Decision(NamedTuple):
    """The same on every process.

    Attributes:
        bad: The update is not to be made: some process's loss or gradient is not finite.
        signum: Number of the signal that some process received, 0 for none.
        save: The state is due to be saved.
    """

    bad: bool
    signum: int
    save: bool


class Control:
    """Lets the processes agree, with a small reduction and one look at the device each time.

    Args:
        processes: The run's processes.
        signals: Signals of this process.
        interval: How often the state is saved within an epoch; time is the first process's.
        clock: Seconds.
    """

    def __init__(
        self,
        processes: Processes,
        signals: StopSignals,
        interval: Interval,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.processes = processes
        self.signals = signals
        self.interval = interval
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """The state has been saved: the interval begins anew."""
        self._saved_at = self._clock()
        self._updates = 0

    def count_update(self) -> None:
        """One more update is behind us."""
        self._updates += 1

    def _is_due(self) -> bool:
        if self.interval.updates:
            return self._updates >= self.interval.updates
        waited = self._clock() - self._saved_at
        return bool(self.interval.seconds) and waited >= self.interval.seconds

    def decide(self, bad: Tensor | bool = False) -> Decision:
        """Agree; every process calls this at the same places.

        Args:
            bad: Whether this process's losses or gradients are not finite, not yet looked at.
        """
        save = self.processes.is_primary and self._is_due()
        flags = reduce_flags([bad, self.signals.received, save], self.processes)
        return Decision(bool(flags[0]), flags[1], bool(flags[2]))

    def stop_if_asked(self) -> None:
        """Agree on whether to stop where nothing is there to be saved.

        Raises:
            Stopped: On every process, if some process received a signal.
        """
        if signum := self.decide().signum:
            raise Stopped(signum)
