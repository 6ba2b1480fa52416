"""The batches of a `DataLoader` from any one on."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from qna_timm.training.data.bad_images import Replacement
from qna_timm.training.data.sampling import EpochSampler
from qna_timm.training.data.workers import (
    cause_of,
    discard,
    is_death,
    persistent,
    raise_if_one_died,
    tell_deaths_only_while_waiting,
    waiting,
)
from qna_timm.training.errors import RunFailed

_MOST_DEATHS = 3

_logger = logging.getLogger(__name__)


class Batches:
    """Goes through a `DataLoader`; what timm's prefetcher, or the training itself, reads from.

    Args:
        loader: With an `EpochSampler`, which can start anywhere, or any other, whose batches are
            then read and passed over to get to the first that is wanted.
        reads_ahead: Let the workers begin with the next epoch as soon as they are through with
            one, as timm's multi-epochs loader does; for an `EpochSampler`.
    """

    def __init__(self, loader: DataLoader, reads_ahead: bool = False) -> None:
        self.loader = loader
        self.epoch = 0
        self.start = 0
        self.current = 0  # number in the epoch of the batch that came out last
        self.replaced: dict[int, Sequence[Replacement]] = {}  # by number, of batches that came out
        self.restarts = 0
        seeks = isinstance(loader.sampler, EpochSampler)
        self._sampler = loader.sampler if seeks else None
        self._reads_ahead = reads_ahead and seeks and loader.num_workers > 0
        self._ahead: tuple[int, Iterator[Any]] | None = None

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch, and the batch of it that the next iteration begins with."""
        self.epoch, self.start = epoch, start
        if self._sampler is not None:
            self._sampler.set_epoch(epoch, start)

    def forget(self) -> None:
        """Drops what has been read ahead."""
        self._ahead = None

    def close(self) -> None:
        """Ends the workers; a next iteration starts others."""
        self.forget()
        discard(self.loader)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Batches from `start` on, made anew where workers die.

        Raises:
            RunFailed: The workers die again and again, or an image cannot be replaced.
        """
        epoch, due, deaths = self.epoch, self.start, 0
        ahead, self._ahead = self._ahead, None
        iterator = ahead[1] if ahead and (ahead[0], 0) == (epoch, due) else None
        while True:
            try:
                with waiting():
                    if iterator is None:
                        iterator = self._iterate(epoch, due)
                    raise_if_one_died(iterator)
                    batch, replaced = next(iterator)
            except StopIteration:
                break
            except RunFailed as error:
                raise _of_worker(error) from error
            except (RuntimeError, OSError, EOFError) as error:
                if not self.loader.num_workers or not is_death(error):
                    raise
                cause = cause_of(error, iterator)
            else:
                self.current, self.replaced[due] = due, replaced
                yield batch
                due, deaths = due + 1, 0
                continue
            # Here, not in the handler: its traceback would keep the old iterator alive.
            discard(self.loader, iterator)
            iterator, deaths = None, deaths + 1
            self._report(cause, deaths, epoch, due)
        if self._reads_ahead:
            try:
                self._ahead = epoch + 1, self._iterate(epoch + 1, 0)
            except (RuntimeError, OSError, EOFError) as error:
                if not is_death(error):
                    raise
                discard(self.loader)  # the next epoch starts its workers itself

    def _report(self, cause: str, deaths: int, epoch: int, due: int) -> None:
        """Warns of workers that died, or gives up.

        Raises:
            RunFailed: They died too often without a batch in between.
        """
        if deaths >= _MOST_DEATHS:
            raise RunFailed(
                f"loader workers die, {deaths} times without a batch in between: {cause}; fewer "
                "--workers or a smaller --batch-size need less memory, /dev/shm included"
            )
        self.restarts += 1
        _logger.warning(
            "loader workers are started anew for micro-batch %d of epoch %d (time %d): %s",
            due,
            epoch + 1,
            self.restarts,
            cause,
        )

    def _iterate(self, epoch: int, first: int) -> Iterator[Any]:
        """The loader's batches from the `first` on; its workers begin at once."""
        if self._sampler is not None:
            self._sampler.set_epoch(epoch, first)
        raise_if_one_died(persistent(self.loader))
        iterator = iter(self.loader)
        tell_deaths_only_while_waiting()
        if self._sampler is None:
            for _ in range(first):
                next(iterator)
        return iterator


def _of_worker(error: RunFailed) -> RunFailed:
    """An error's own line without the worker's traceback that PyTorch puts before it."""
    return RunFailed(str(error).rsplit(f"{RunFailed.__name__}: ", 1)[-1].strip())
