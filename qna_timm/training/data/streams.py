"""Streams of samples (tfds, webdataset, iterable hub datasets) with keyed augmentation."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from qna_timm.training.data.bad_images import one_line
from qna_timm.training.errors import RunFailed, UsageError
from qna_timm.training.generators import derive_seed, generators_kept, seed_generators


@contextlib.contextmanager
def _told_in_a_line(what: str, count: int) -> Iterator[None]:
    """What a reader raises on its way to the sample behind `count` others, as `RunFailed`."""
    try:
        yield
    except (StopIteration, RunFailed, UsageError, MemoryError):
        raise
    except Exception as error:  # readers of other libraries raise what they like
        raise RunFailed(
            f"cannot read {what} sample {count} of this reader: {one_line(error)}"
        ) from error


class EvalStream(IterableDataset):
    """A stream that is evaluated, as it comes.

    Args:
        dataset: Gives samples.
    """

    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        """The samples.

        Raises:
            RunFailed: The reader has failed.
        """
        samples, count = iter(self.dataset), 0
        while True:
            with _told_in_a_line("validation", count):
                try:
                    sample = next(samples)
                except StopIteration:
                    return
            yield sample
            count += 1


class KeyedStream(IterableDataset):
    """A stream whose i-th sample is augmented with random numbers of its own.

    They are a function of (seed, epoch, rank, worker, i): the order of the samples is the
    stream's affair, which also depends on the numbers of processes and workers.

    Args:
        dataset: Gives samples, augmented from the global CPU generators.
        seed: Of the run.
        rank: This process.
    """

    def __init__(self, dataset: IterableDataset, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self._epoch = multiprocessing.Value("q", 0)  # persistent workers must see it change

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose samples the next iteration gives."""
        self._epoch.value = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        """The epoch's samples.

        Raises:
            RunFailed: The reader has failed, or gives none.
        """
        info, epoch = get_worker_info(), self._epoch.value
        worker = 0 if info is None else info.id
        samples, count = iter(self.dataset), 0
        while True:
            with generators_kept(), _told_in_a_line("training", count):
                seed_generators(derive_seed("stream", self.seed, epoch, self.rank, worker, count))
                try:
                    sample = next(samples)
                except StopIteration:
                    if not count:
                        raise RunFailed(
                            f"reader {worker} of the training data has no sample"
                        ) from None
                    return
            yield sample
            count += 1
