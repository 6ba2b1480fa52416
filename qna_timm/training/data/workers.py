"""Loader workers that die: noticed while one waits for a batch, and nowhere else.

PyTorch raises an error wherever the main thread happens to be when a worker is killed: in a
backward pass, in the middle of a save. Here it is told when the next batch is asked for.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

# How PyTorch words it that a worker died, and that it met an error.
_BEGINNING = "DataLoader worker (pid"
_MET = "Caught "
_GRACE = 5.0  # seconds for a killed process to be gone
_PATIENCE = 0.5  # seconds for a dying process to be dead


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


def dead_worker(iterator: Iterator[Any] | None) -> str | None:
    """Which worker has died and how; None if none has."""
    for worker in _workers(iterator):
        # Workers of streams end, with code 0, when they have nothing left to read.
        if worker.exitcode:
            how = f"exited with code {worker.exitcode}"
            if worker.exitcode < 0:
                how = f"was killed by {signal.Signals(-worker.exitcode).name}"
            return f"{_BEGINNING} {worker.pid}) {how}"
    return None


def raise_if_one_died(iterator: Iterator[Any] | None) -> None:
    """Tells of a worker that died while nobody waited.

    Raises:
        RuntimeError: Beginning as PyTorch's do.
    """
    death = dead_worker(iterator)
    if death is not None:
        raise RuntimeError(death)


def is_death(error: BaseException) -> bool:
    """Whether an error of a loader says that its workers, or their connection, are gone."""
    text = str(error)
    if isinstance(error, RuntimeError):
        beginnings = (_BEGINNING, "Pin memory thread exited")
        return text.startswith(beginnings) or "shared memory" in text
    # Of this process: what a worker met in its data begins otherwise.
    return isinstance(error, (OSError, EOFError)) and not text.startswith(_MET)


def cause_of(error: BaseException, iterator: Iterator[Any] | None) -> str:
    """Why an iterator stopped, in one line.

    What this process meets first may be a connection that broke, or a thread that did.
    """
    end = time.monotonic() + _PATIENCE
    while _workers(iterator) and time.monotonic() < end:
        if (death := dead_worker(iterator)) is not None:
            return death
        time.sleep(0.01)
    # of what a worker met, its traceback's last line
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if lines and lines[0].startswith(_MET) else 0]


def discard(loader: DataLoader, iterator: Iterator[Any] | None = None) -> None:
    """Ends the workers of an iterator, or of the loader, which makes new ones when next asked.

    They are killed: PyTorch asks them to end, and waits for ever where a worker died with a lock
    in its hands.
    """
    if iterator is None:
        iterator = persistent(loader)
    for worker in _workers(iterator):
        if worker.is_alive():
            worker.kill()
    for worker in _workers(iterator):
        worker.join(_GRACE)
    if hasattr(iterator, "_workers"):
        iterator._shutdown = True  # PyTorch has nothing left to end
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        for queue in iterator._index_queues:
            queue.cancel_join_thread()
            queue.close()
        if hasattr(iterator, "_pin_memory_thread_done_event"):
            iterator._pin_memory_thread_done_event.set()
    loader._iterator = None
