"""Batches of augmentation splits where no prefetcher makes them."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate


class SplitCollate:
    """Collates normalised samples the way timm's prefetcher does: split after split, then erased.

    Without it the splits of a batch stay a list, and erasing, done sample by sample, would not
    spare the clean split that `--resplit` asks to spare.

    Args:
        erasing: Random erasing of a whole batch [B * splits, C, H, W]; None for none.
    """

    def __init__(self, erasing: RandomErasing | None = None) -> None:
        self.erasing = erasing

    def __call__(self, batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
        inputs, target = default_collate(batch)
        if isinstance(inputs, Sequence):  # one [B, C, H, W] per split
            target = target.repeat(len(inputs))
            inputs = torch.cat(list(inputs))
        return (inputs if self.erasing is None else self.erasing(inputs)), target
