"""What a run says: on stderr while it runs, and in its folder."""

import logging
import logging.handlers
import sys
import warnings
from collections import deque
from pathlib import Path
from types import TracebackType

from qna_timm.training.errors import UsageError
from qna_timm.training.storage.writes import Writes

_OWN = ("timm", "qna_timm", "train", "validate", "__main__")


_warnings_logger = logging.getLogger("py.warnings")


class _Formatter(logging.Formatter):
    """Plain lines; warnings and errors say that they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno > logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class _FileLines(logging.Handler):
    """Appends lines to a file; what a full disk refuses is kept and tried with the next line.

    The file is opened for each line, which are few: nothing is lost at a kill, and a folder that
    comes back is found again.
    """

    def __init__(self, path: Path, writes: Writes) -> None:
        super().__init__()
        self._path = path
        self._writes = writes
        self._waiting: deque[bytes] = deque(maxlen=10_000)
        self._failing = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.append((self.format(record) + "\n").encode(errors="backslashreplace"))
        except Exception:  # as logging has it: a mistake in a message ends no run
            self.handleError(record)
            return
        try:
            self._write()
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._failing = True  # first: the report passes through here too
                self._writes.report(self._path.name, error)

    def _write(self) -> None:
        with open(self._path, "ab", buffering=0) as file:
            while self._waiting:
                # A disk may have room for a part of a line.
                written = file.write(self._waiting[0])
                if rest := self._waiting.popleft()[written:]:
                    self._waiting.appendleft(rest)


def _is_ours(record: logging.LogRecord) -> bool:
    """Other libraries are heard from warnings upwards."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in _OWN


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object
) -> None:
    """What libraries warn of, as one line like the others, without their source code."""
    text = " ".join(str(message).split())
    if text.startswith("Grad strides do not match bucket view strides"):
        # of 1x1 convolutions' weights on channels-last maps, whose order in memory is the same
        return
    _warnings_logger.warning("%s (%s, %s:%d)", text, category.__name__, Path(filename).name, lineno)


class RunLog:
    """While entered, collects what the run says; from `to_file` on, to stderr and to a file.

    Until the run folder is there lines are held back, so that a mistake in the settings is told
    in one line. They are dropped with a `UsageError`, shown with any other exception.

    Args:
        enabled: False (all processes but the first) lets only errors through.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._handlers: list[logging.Handler] = []
        self._early = logging.handlers.MemoryHandler(
            10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )

    def __enter__(self) -> "RunLog":
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO if self._enabled else logging.ERROR)
        self._add(self._early)
        self._show_warning, warnings.showwarning = warnings.showwarning, _log_warning
        return self

    def _add(self, handler: logging.Handler) -> None:
        handler.addFilter(_is_ours)
        logging.getLogger().addHandler(handler)
        self._handlers.append(handler)

    def to_file(self, path: Path, writes: Writes | None = None) -> None:
        """Say everything held back, and all that comes, on stderr and at the end of a file.

        Args:
            path: The file.
            writes: Is told if the file cannot be written to.
        """
        file = _FileLines(path, writes or Writes())
        file.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._release(file, self._add_stream())

    def _add_stream(self) -> logging.Handler:
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(_Formatter("%(message)s"))
        self._add(stream)
        return stream

    def _release(self, *handlers: logging.Handler) -> None:
        """Hand the lines held back to handlers that stay, and hold back no more."""
        logging.getLogger().removeHandler(self._early)
        for handler in handlers:
            if handler not in self._handlers:
                self._add(handler)
            for record in self._early.buffer:
                handler.handle(record)
        self._early.buffer.clear()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._early.buffer and not isinstance(exc, UsageError):
            self._release(self._add_stream())
        warnings.showwarning = self._show_warning
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(self._level)
