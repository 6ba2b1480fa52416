"""SIGTERM, SIGINT and SIGUSR1: noted at once, obeyed where a run can stop without losing a step."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
# What a batch system sends when time is nearly up: save, and let the job come back.
REQUEUE_SIGNAL = getattr(signal, "SIGUSR1", None)
# How long a signal leaves a process to meet the others, in seconds.
_PATIENCE = 10.0


class Stopped(BaseException):
    """The run was asked to stop.

    Attributes:
        signum: The signal.
        exit_code: What the process should exit with: 128 + signal number as shells have it, 0
            after SIGUSR1.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 0 if signum == REQUEUE_SIGNAL else 128 + signum


class StopSignals:
    """While entered, notes the first of `SIGNALS`; further ones do nothing.

    Before `defer` the signal raises `Stopped` between two bytecodes: nothing is there to be saved.
    After it the signal waits in `received` until the run's processes agree on where to stop, or
    until `obey`.

    Attributes:
        received: Number of the signal, 0 before one came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._deferred = False
        self._process = os.getpid()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        # Python lets only the main thread set handlers; elsewhere the default ones stay.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on signals only fill `received`, those that were blocked until now too."""
        self._deferred = True
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def obey(self) -> None:
        """From now on signals raise `Stopped` at once, as one does that has been received."""
        self._deferred = False
        if self.received:
            raise Stopped(self.received)

    def give_up_waiting(self) -> None:
        """To be called while this process waits for others that may never come.

        Raises:
            Stopped: A signal has been waiting for 10 seconds.
        """
        if self.received and time.monotonic() - self._received_at > _PATIENCE:
            raise Stopped(self.received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._handle_in_worker(signum)
        elif not self.received:
            self._received_at = time.monotonic()
            self.received = signum
            if not self._deferred:
                raise Stopped(signum)

    def _handle_in_worker(self, signum: int) -> None:
        """In a forked loader worker, which Ctrl-C and torchrun reach too.

        Its parent ends it in order, so the first signal is ignored; a second one, from a parent
        that has waited in vain, does its work.
        """
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)


def ignore_signals() -> None:
    """To be called when a process ends and its exit code is settled."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
