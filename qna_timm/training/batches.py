"""The batches of a `DataLoader` from any one on."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from qna_timm.training.sampling import EpochSampler


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

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, due = self.epoch, self.start
        ahead, self._ahead = self._ahead, None
        iterator = ahead[1] if ahead and (ahead[0], 0) == (epoch, due) else None
        if iterator is None:
            iterator = self._iterate(epoch, due)
        for self.current, batch in enumerate(iterator, due):
            yield batch
        if self._reads_ahead:
            self._ahead = epoch + 1, self._iterate(epoch + 1, 0)

    def _iterate(self, epoch: int, first: int) -> Iterator[Any]:
        """The loader's batches from the `first` on; its workers begin at once."""
        if self._sampler is not None:
            self._sampler.set_epoch(epoch, first)
            return iter(self.loader)
        iterator = iter(self.loader)
        for _ in range(first):
            next(iterator)
        return iterator
