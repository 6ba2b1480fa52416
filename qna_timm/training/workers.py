"""Loader workers that die: noticed while one waits for a batch, and nowhere else.

PyTorch raises an error wherever the main thread happens to be when a worker is killed: in a
backward pass, in the middle of a save. Here it is told when the next batch is asked for.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

_GRACE = 5.0  # seconds for a killed process to be gone


class _WhileWaiting:
    """PyTorch's handler of SIGCHLD, silent unless the main thread waits for a batch."""

    waiting = False

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if _WhileWaiting.waiting:
            self.handler(signum, frame)


def tell_deaths_only_while_waiting() -> None:
    """To be called when a loader has started workers, which is when PyTorch sets its handler."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and not isinstance(handler, _WhileWaiting):
        signal.signal(signal.SIGCHLD, _WhileWaiting(handler))


@contextmanager
def waiting() -> Iterator[None]:
    """While entered, the death of a worker raises."""
    _WhileWaiting.waiting = True
    try:
        yield
    finally:
        _WhileWaiting.waiting = False


def _workers(iterator: Any) -> list[Any]:
    """Processes of a `DataLoader`'s iterator, which keeps them to itself."""
    return list(getattr(iterator, "_workers", ()))


def persistent(loader: DataLoader) -> Iterator[Any] | None:
    """The iterator that a loader with persistent workers uses again for the next epoch."""
    return getattr(loader, "_iterator", None)


def raise_if_one_died(iterator: Iterator[Any] | None) -> None:
    """Tells of a worker that died while nobody waited.

    Raises:
        RuntimeError: In PyTorch's words.
    """
    for worker in _workers(iterator):
        # Workers of streams end, with code 0, when they have nothing left to read.
        if worker.exitcode:
            how = f"exit code {worker.exitcode}"
            if worker.exitcode < 0:
                how = f"killed by {signal.Signals(-worker.exitcode).name}"
            raise RuntimeError(f"DataLoader worker (pid {worker.pid}) died: {how}")


def is_death(error: BaseException) -> bool:
    """Whether an error of a loader says that its workers, or their connection, are gone."""
    text = str(error)
    if isinstance(error, RuntimeError):
        beginnings = ("DataLoader worker (pid", "Pin memory thread exited")
        return text.startswith(beginnings) or "shared memory" in text
    # An error of this process: one that a worker met in its data begins with "Caught".
    return isinstance(error, (OSError, EOFError)) and not text.startswith("Caught ")


def discard(loader: DataLoader, iterator: Iterator[Any] | None) -> None:
    """Ends what is left of an iterator, so that the loader makes a new one."""
    if iterator is None:
        iterator = persistent(loader)
    for worker in _workers(iterator):
        # Not asked to end: one may wait for a lock that the dead worker held.
        if worker.is_alive():
            worker.kill()
            worker.join(_GRACE)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    loader._iterator = None
