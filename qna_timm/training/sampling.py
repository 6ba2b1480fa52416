"""Which samples a step sees, and with which random numbers they are augmented.

Both depend only on (seed, epoch, position in the epoch): not on the number of processes or of
loader workers, and not on what ran before. A resumed epoch is therefore the epoch it resumes.
"""

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

# Keeps the random numbers of a batch's mixing apart from those of its first sample.
_COLLATE_SALT = 0x5BD1E995
_NUMPY_SEEDS = 2**32


class SampleKey(NamedTuple):
    """What the sampler hands to the dataset instead of a bare index."""

    index: int
    seed: int
    mixup: bool


class KeyedBatch(list):
    """Samples of one batch, with the key of the first."""

    def __init__(self, samples: Sequence[Any], key: SampleKey) -> None:
        super().__init__(samples)
        self.key = key


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator that is a function of (seed, epoch); neighbouring pairs are unrelated."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class EpochSampler(Sampler[SampleKey]):
    """Shuffled training order, shared out over the processes step by step.

    Step i of P processes with b images each holds the same set of samples as step i of one
    process with P * b images. The incomplete last step is left out.

    Args:
        num_samples: Samples in the dataset.
        batch_size: Images a process takes per step, b.
        seed: Seed of the run.
        rank: This process, 0..world_size-1.
        world_size: Number of processes, P.
        epoch_repeats: Passes over the dataset per epoch (0 means 1).
        aug_repeats: Copies of a sample that follow one another in the order (repeated
            augmentation); the epoch keeps its length and sees fewer distinct samples.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epoch_repeats: float = 0,
        aug_repeats: float = 0,
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.aug_repeats = aug_repeats
        self.epoch = 0
        self.mixup_enabled = True
        epoch_size = round(num_samples * (epoch_repeats or 1))
        self.num_steps = epoch_size // (batch_size * world_size)
        self.total_size = self.num_steps * batch_size * world_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        """Dataset indices of the whole epoch over all processes, [total_size]."""
        repeats = self.aug_repeats if self.aug_repeats > 1 else 1
        needed = math.ceil(self.total_size / repeats)
        passes = math.ceil(needed / self.num_samples)
        order = torch.cat(
            [torch.randperm(self.num_samples, generator=generator) for _ in range(passes)]
        )
        copies = (torch.arange(self.total_size, dtype=torch.float64) / repeats).long()
        return order[copies]

    def __iter__(self) -> Iterator[SampleKey]:
        generator = epoch_generator(self.seed, self.epoch)
        order = self._order(generator) if self.total_size else torch.empty(0, dtype=torch.long)
        seeds = torch.randint(2**62, (self.total_size,), generator=generator)
        mine = slice(self.rank, None, self.world_size)
        for index, seed in zip(order[mine].tolist(), seeds[mine].tolist(), strict=True):
            yield SampleKey(index, seed, self.mixup_enabled)

    def __len__(self) -> int:
        return self.total_size // self.world_size


def _seed_cpu(seed: int, seed_numpy: bool) -> None:
    random.seed(seed)
    # Not torch.manual_seed: that would also restart the accelerator's generator.
    torch.random.default_generator.manual_seed(seed)
    if seed_numpy:
        np.random.seed(seed % _NUMPY_SEEDS)


@contextlib.contextmanager
def _rng_kept() -> Iterator[None]:
    """Restores the CPU generators on exit, so that loading in the main process leaves no trace."""
    if get_worker_info() is not None:
        yield  # a worker's generators serve nothing else
        return
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class KeyedDataset(Dataset):
    """Reads samples by `SampleKey`, each augmented with its own key's random numbers.

    Args:
        dataset: Map-style dataset whose transform draws from the global CPU generators.
        worker_seeding: `all`, or `part` to leave numpy's generator alone as timm does.
    """

    def __init__(self, dataset: Dataset, worker_seeding: str = "all") -> None:
        self.dataset = dataset
        self.seed_numpy = worker_seeding != "part"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        with _rng_kept():
            return self._read(key)

    def _read(self, key: SampleKey) -> Any:
        _seed_cpu(key.seed, self.seed_numpy)
        return self.dataset[key.index]

    def __getitems__(self, keys: Sequence[SampleKey]) -> KeyedBatch:
        with _rng_kept():
            return KeyedBatch([self._read(key) for key in keys], keys[0])


class KeyedCollate:
    """Collates a `KeyedBatch` with the random numbers and the mixing switch of its key.

    The switch travels in the key because persistent workers keep their own copy of the collate
    function, which the main process cannot reach.
    """

    def __init__(self, collate_fn: Callable[[Sequence[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, batch: KeyedBatch) -> Any:
        if hasattr(self.collate_fn, "mixup_enabled"):
            self.collate_fn.mixup_enabled = batch.key.mixup
        with _rng_kept():
            _seed_cpu(batch.key.seed ^ _COLLATE_SALT, seed_numpy=True)
            return self.collate_fn(batch)
