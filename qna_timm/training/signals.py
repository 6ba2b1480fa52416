"""SIGTERM and SIGINT: stop between two bytecodes, but never in the middle of a save."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The process was asked to stop.

    Attributes:
        signum: The signal.
        exit_code: What the process should exit with, 128 + signal number as shells have it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


class StopSignals:
    """While entered, the first SIGTERM or SIGINT raises `Stopped`; further ones do nothing.

    An epoch that is cut short leaves no trace, its work is done again after a resume: so there is
    nothing to finish, but what `held` covers is finished first.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._holds = 0
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

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._handle_in_worker(signum)
        elif self._received is None:
            self._received = signum
            if not self._holds:
                raise Stopped(signum)

    def _handle_in_worker(self, signum: int) -> None:
        """In a forked loader worker, which Ctrl-C and torchrun reach too.

        Its parent ends it in order, so the first signal is ignored; a second one, from a parent
        that has waited in vain, does its work.
        """
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put `Stopped` off to the end of the block."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._received is not None and not self._holds:
            raise Stopped(self._received)
