"""Streams of samples (tfds, webdataset, iterable hub datasets) with keyed augmentation."""

import multiprocessing
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from qna_timm.training.generators import derive_seed, generators_kept, seed_generators


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
        info, epoch = get_worker_info(), self._epoch.value
        worker = 0 if info is None else info.id
        samples, count = iter(self.dataset), 0
        while True:
            with generators_kept():
                seed_generators(derive_seed("stream", self.seed, epoch, self.rank, worker, count))
                try:
                    sample = next(samples)
                except StopIteration:
                    return
            yield sample
            count += 1
