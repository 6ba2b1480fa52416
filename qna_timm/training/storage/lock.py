"""One run per folder: a lock that the system takes back however its holder ends."""

import errno
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from qna_timm.training.errors import UsageError
from qna_timm.training.storage.files import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    try:
        import msvcrt
    except ImportError:
        msvcrt = None

LOCK_NAME = ".lock"
# What the system says where another process has the lock, and where there are no locks.
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Windows lets nobody read what is locked, so that the locked byte lies behind the holder's name.
_LOCKED_BYTE = 1 << 20

_logger = logging.getLogger(__name__)


class RunLock:
    """While entered, no other process that asks can enter with the same folder.

    Entering also removes what killed runs left half written: who holds the lock knows that nobody
    is still writing it. Where the file system has no locks one warning is given instead.

    Args:
        folder: The run folder; it exists.
        command: The command line of this run, which a second run is told.
        patience: Seconds to wait for a holder that is ending: a process killed with much memory,
            or with its folder on another machine, keeps its lock until it is gone.
    """

    def __init__(
        self, folder: Path, command: Sequence[str] | None = None, *, patience: float = 3.0
    ) -> None:
        self.path = folder / LOCK_NAME
        self.command = list(sys.argv if command is None else command)
        self.patience = patience
        self._file: int | None = None
        self._process = 0

    def __enter__(self) -> "RunLock":
        """Take the lock.

        Raises:
            UsageError: Another run has it (the line names it), or the folder cannot be written.
        """
        try:
            self._acquire()
            remove_leftovers(self.path.parent)
        except OSError as error:
            self._release()
            raise UsageError(
                f"{self.path}: cannot lock the run folder: {error.strerror}"
            ) from error
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    def _acquire(self) -> None:
        deadline = time.monotonic() + self.patience
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                taken = _try_lock(file)
                # Its last holder may have removed the file since it was opened.
                if taken and _is_file_at(file, self.path):
                    self._file = file
                elif not taken and time.monotonic() > deadline:
                    raise UsageError(f"{self.path.parent}: in use by {_describe(_read(file))}")
                elif not taken:
                    time.sleep(0.05)
            finally:
                if self._file is None:
                    os.close(file)
        self._process = os.getpid()
        self._sign()

    def _sign(self) -> None:
        """Write who holds the lock; on a full disk it is held all the same."""
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(self.command),
        }
        try:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, json.dumps(holder).encode())
        except OSError as error:
            _logger.warning("%s: not signed (%s)", self.path, error.strerror)

    def _release(self) -> None:
        # A forked child that leaves the block has no lock to give back.
        if self._file is None or self._process != os.getpid():
            return
        try:
            # While it is still held: who has opened the file meanwhile will see that it is gone.
            if _is_file_at(self._file, self.path):
                self.path.unlink()
        except OSError:
            pass  # Without its lock the file means nothing.
        os.close(self._file)
        self._file = None


def holder(folder: Path) -> str | None:
    """Which run has a folder, in words; None if none has. Nothing there is changed."""
    try:
        file = os.open(folder / LOCK_NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _try_lock(file) else _describe(_read(file))
    except OSError:
        return None
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    """Lock an open file for this process; False if another process has it locked."""
    try:
        if fcntl is not None:
            # A POSIX record lock belongs to the process: forked loader workers that outlive a
            # killed run hold the descriptor, but not the lock, as they would one of flock. (Any
            # close of the file by this process drops it: nothing else here opens it.)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        _logger.warning("the run folder cannot be locked (%s): start no second run in it", error)
    return True


def _is_file_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any]:
    try:
        os.lseek(file, 0, os.SEEK_SET)
        holder = json.loads(os.read(file, 65536))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run"
    pid, host, since = (holder.get(key, "?") for key in ("pid", "host", "since"))
    return f"process {pid} on {host} since {since}: {holder.get('command', '?')}"
