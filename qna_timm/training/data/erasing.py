"""Random erasing on the device, with random numbers of its own for each shard."""

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from qna_timm.training.data.batches import Batches
from qna_timm.training.generators import derive_seed, generators_kept, seed_generators


class KeyedErasing:
    """timm's random erasing of the batches that its prefetcher makes.

    The prefetcher works one batch ahead and draws from the global generators, so that what it
    erased would depend on when a run was resumed.

    Args:
        erasing: Erases rectangles of a batch [B, C, H, W].
        batches: What the prefetcher reads from; it works on the batch that came out last.
        seed: Of the run.
        place: Rank of this process and number of processes.
        device: Where the batches are.
    """

    def __init__(
        self,
        erasing: RandomErasing,
        batches: Batches,
        seed: int,
        place: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.erasing = erasing
        self.batches = batches
        self.seed = seed
        self.rank, self.world_size = place
        self.device = device

    def __call__(self, inputs: Tensor) -> Tensor:
        shard = self.batches.current * self.world_size + self.rank
        with generators_kept(self.device):
            seed = derive_seed("erase", self.seed, self.batches.epoch, shard)
            seed_generators(seed, self.device)
            return self.erasing(inputs)
