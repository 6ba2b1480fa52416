"""What a run says: on stderr while it runs, and in its folder."""

import logging
import logging.handlers
import sys
from pathlib import Path
from types import TracebackType

_OWN = ("timm", "qna_timm", "train", "validate", "__main__")


class _Formatter(logging.Formatter):
    """Plain lines; warnings and errors say that they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


def _is_ours(record: logging.LogRecord) -> bool:
    """Other libraries are heard from warnings upwards."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in _OWN


class RunLog:
    """While entered, log records of the run go to stderr and, once there is one, to a file.

    Args:
        enabled: False (all processes but the first) lets only errors through.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._handlers: list[logging.Handler] = []
        # Holds what is said before the run folder is there.
        self._early = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)

    def __enter__(self) -> "RunLog":
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(_Formatter("%(message)s"))
        stream.setLevel(logging.INFO if self._enabled else logging.ERROR)
        self._add(stream)
        if self._enabled:
            self._add(self._early)
        return self

    def _add(self, handler: logging.Handler) -> None:
        handler.addFilter(_is_ours)
        logging.getLogger().addHandler(handler)
        self._handlers.append(handler)

    def to_file(self, path: Path) -> None:
        """Write everything said so far, and from now on, to the end of a file."""
        if not self._enabled:
            return
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._add(file)
        self._early.setTarget(file)
        self._early.flush()
        logging.getLogger().removeHandler(self._early)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(self._level)
