"""Which samples a shard holds, and with which random numbers they are augmented.

Both depend only on (seed, epoch, position in the epoch): not on the number of processes or of
loader workers, and not on what ran before. A resumed epoch is therefore the epoch it resumes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from qna_timm.training.data.bad_images import ReadableImages, Replacement, Samples
from qna_timm.training.data.collate import Collated, TellingCollate
from qna_timm.training.data.shards import ShardPlan
from qna_timm.training.generators import derive_seed, generators_kept, seed_generators

# Keeps the random numbers of a batch's mixing apart from those of its first sample.
_COLLATE_SALT = 0x5BD1E995


class SampleKey(NamedTuple):
    """What the sampler hands to the dataset instead of a bare index.

    Attributes:
        index: Of the sample in the dataset.
        seed: Of the random numbers that augment it.
        mixup: Whether its shard is mixed by the collate function.
        epoch: From 0.
        position: In the epoch's order over all processes.
    """

    index: int
    seed: int
    mixup: bool
    epoch: int
    position: int


class KeyedSamples(Samples):
    """Samples of one shard, with the key of the first."""

    def __init__(
        self, samples: Sequence[Any], key: SampleKey, replaced: Sequence[Replacement] = ()
    ) -> None:
        super().__init__(samples, replaced)
        self.key = key


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator that is a function of (seed, epoch)."""
    return torch.Generator().manual_seed(derive_seed(seed, epoch))


def seed_shard(seed: int, epoch: int, shard: int, device: torch.device) -> None:
    """Seeds what the training loop draws from while it computes a shard.

    Those are the global generators of Python, NumPy and PyTorch, the last for the CPU and for
    `device`: mixing in the loop, dropout and drop path depend on (seed, epoch, shard) alone.

    Args:
        seed: Of the run.
        epoch: From 0.
        shard: Number of the shard in the epoch, see `ShardPlan`.
        device: Where the shard is computed.
    """
    seed_generators(derive_seed("loop", seed, epoch, shard), device)


class EpochSampler(Sampler[SampleKey]):
    """Shuffled training order, of which each process takes in every world_size-th shard.

    Micro-batch a of rank r is shard a * world_size + r of the epoch; which samples are in it is
    up to the plan alone. Samples that fill no shard are left out.

    Args:
        num_samples: Samples in the dataset.
        plan: How the epoch is cut into shards.
        seed: Seed of the run.
        rank: This process, 0..world_size-1.
        world_size: Number of processes.
        aug_repeats: Copies of a sample that follow one another in the order (repeated
            augmentation); the epoch keeps its length and sees fewer distinct samples.

    Raises:
        UsageError: The plan's shards cannot be shared out over so many processes.
    """

    def __init__(
        self,
        num_samples: int,
        plan: ShardPlan,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        aug_repeats: float = 0,
    ) -> None:
        plan.accumulation(world_size)
        self.num_samples = num_samples
        self.plan = plan
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.aug_repeats = aug_repeats
        self.epoch = 0
        self.start = 0
        self.mixup_enabled = True
        self.total_size = plan.shards_per_epoch * plan.batch_size
        self._drawn: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses what the next iteration gives.

        Args:
            epoch: From 0.
            start: Micro-batches of this process that are left out at the beginning.
        """
        self.epoch = epoch
        self.start = start

    def shard_number(self, micro_batch: int) -> int:
        """The number in the epoch of the shard that is this process's `micro_batch`."""
        return micro_batch * self.world_size + self.rank

    def keys(self, epoch: int, micro_batch: int) -> list[SampleKey]:
        """The samples of any of this process's micro-batches."""
        order, seeds = self._draw(epoch)
        positions = self.plan.positions(self.shard_number(micro_batch))
        mine = slice(positions.start, positions.stop, positions.step)
        return [
            SampleKey(index, seed, self.mixup_enabled, epoch, position)
            for index, seed, position in zip(
                order[mine].tolist(), seeds[mine].tolist(), positions, strict=True
            )
        ]

    def _draw(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dataset indices and seeds of a whole epoch over all processes, each [total_size]."""
        if self._drawn is None or self._drawn[0] != epoch:
            generator = epoch_generator(self.seed, epoch)
            order = self._order(generator)
            self._drawn = epoch, order, torch.randint(2**62, order.shape, generator=generator)
        return self._drawn[1:]

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        repeats = self.aug_repeats if self.aug_repeats > 1 else 1
        needed = math.ceil(self.total_size / repeats)
        passes = math.ceil(needed / self.num_samples)
        order = torch.cat(
            [torch.randperm(self.num_samples, generator=generator) for _ in range(passes)]
        )
        copies = (torch.arange(self.total_size, dtype=torch.float64) / repeats).long()
        return order[copies]

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        for micro_batch in range(self.start, self.plan.shards_per_epoch // self.world_size):
            yield from self.keys(epoch, micro_batch)

    def __len__(self) -> int:
        """Samples of a whole epoch of this process, wherever the next iteration starts."""
        return self.total_size // self.world_size


class KeyedDataset(Dataset):
    """Reads samples by `SampleKey`, each augmented with its own key's random numbers.

    A sample that cannot be read is replaced by another, which its key chooses.

    Args:
        dataset: Map-style dataset whose transform draws from the global CPU generators.
        strict: Fail instead of replacing (--strict-data).
    """

    def __init__(self, dataset: Dataset, strict: bool = False) -> None:
        self.dataset = dataset
        self.images = ReadableImages(dataset, "train", strict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> KeyedSamples:
        samples, replaced = [], []
        with generators_kept():
            for key in keys:
                sample, fault = self.images.read(
                    key.index, key.seed, lambda seed=key.seed: seed_generators(seed)
                )
                samples.append(sample)
                if fault is not None:
                    replaced.append(fault._replace(epoch=key.epoch, position=key.position))
        return KeyedSamples(samples, keys[0], replaced)


class KeyedCollate(TellingCollate):
    """Collates `KeyedSamples` with the random numbers and the mixing switch of their key.

    The switch travels in the key because persistent workers keep their own copy of the collate
    function, which the main process cannot reach.
    """

    def __call__(self, samples: KeyedSamples) -> Collated:
        if hasattr(self.collate_fn, "mixup_enabled"):
            self.collate_fn.mixup_enabled = samples.key.mixup
        with generators_kept():
            seed_generators(samples.key.seed ^ _COLLATE_SALT)
            return super().__call__(samples)
