"""What a run says: on stderr while it runs, and in its folder."""

import logging
import logging.handlers
import sys
import warnings
from pathlib import Path
from types import TracebackType

from qna_timm.training.errors import UsageError

_OWN = ("timm", "qna_timm", "train", "validate", "__main__")


_warnings_logger = logging.getLogger("py.warnings")


class _Formatter(logging.Formatter):
    """Plain lines; warnings and errors say that they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno > logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def _is_ours(record: logging.LogRecord) -> bool:
    """Other libraries are heard from warnings upwards."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in _OWN


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object
) -> None:
    """What libraries warn of, as one line like the others, without their source code."""
    text = " ".join(str(message).split())
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

    def to_file(self, path: Path) -> None:
        """Say everything held back, and all that comes, on stderr and at the end of a file."""
        file = logging.FileHandler(path, encoding="utf-8")
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
