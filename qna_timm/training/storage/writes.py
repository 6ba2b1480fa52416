"""Writes that may fail without ending the run: said at once, tried again, told by the exit code."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_logger = logging.getLogger(__name__)


class Writes:
    """The account of what a run could not write.

    A full disk, a quota, a folder that vanished or became read-only costs the file that was to be
    written, not the training: files are replaced whole (see `files`), so the last good ones stay.
    """

    def __init__(self) -> None:
        self._failed: dict[str, None] = {}
        self._missing: set[str] = set()
        self._waiting: dict[str, Callable[[], None]] = {}

    @property
    def failed(self) -> list[str]:
        """Names of what could not be written at some time, the first first."""
        return list(self._failed)

    @property
    def missing(self) -> frozenset[str]:
        """Names of what could not be written at the last try."""
        return frozenset(self._missing)

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Let the block write `name`; if the system cannot, the run goes on after the block.

        Only what the system refuses (OSError) is let pass, and told in one line.
        """
        try:
            yield
        except OSError as error:
            self.report(name, error)
        else:
            if name in self._missing:
                self._missing.remove(name)
                _logger.info("%s: written again", name)

    def keep_trying(self, name: str, write: Callable[[], None], *, now: bool = True) -> None:
        """Write `name` now (or not yet) or, as long as the system cannot, at each `retry`."""
        self._waiting[name] = write
        if now:
            self._try(name, write)

    def retry(self) -> None:
        """Write what waits in `keep_trying`."""
        for name, write in list(self._waiting.items()):
            self._try(name, write)

    def _try(self, name: str, write: Callable[[], None]) -> None:
        with self.trying(name):
            write()
            del self._waiting[name]

    def report(self, name: str, error: OSError) -> None:
        """Note and say that `name` could not be written."""
        self._failed[name] = None
        self._missing.add(name)
        reason = error.strerror or error
        _logger.warning(
            "%s: not written (%s): training goes on, the next save tries again", name, reason
        )
