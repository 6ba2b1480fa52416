"""Random erasing on the device, with random numbers of its own for each shard."""

from collections.abc import Callable

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from qna_timm.training.generators import generators_kept, seed_generators


class KeyedErasing:
    """timm's random erasing of the batches that its prefetcher makes.

    The prefetcher works one batch ahead and draws from the global generators, so that what it
    erased would depend on when a run was resumed.

    Args:
        erasing: Erases rectangles of a batch [B, C, H, W].
        seed: Gives the seed of the batch that is due.
        device: Where the batches are.
    """

    def __init__(
        self, erasing: RandomErasing, seed: Callable[[], int], device: torch.device
    ) -> None:
        self.erasing = erasing
        self.seed = seed
        self.device = device

    def __call__(self, inputs: Tensor) -> Tensor:
        with generators_kept(self.device):
            seed_generators(self.seed(), self.device)
            return self.erasing(inputs)
