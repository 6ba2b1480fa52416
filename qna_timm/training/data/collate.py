"""Making batches of samples: augmentation splits, and what travels with a batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from qna_timm.training.data.bad_images import Replacement


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


class Collated(NamedTuple):
    """What a loader's workers send: a batch, and which of its images are replacements."""

    batch: Any
    replaced: tuple[Replacement, ...]


class TellingCollate:
    """Collates samples and lets their replacements travel along.

    Args:
        collate_fn: Makes a batch of samples.
    """

    def __init__(self, collate_fn: Callable[[Sequence[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Sequence[Any]) -> Collated:
        return Collated(shared(self.collate_fn(samples)), getattr(samples, "replaced", ()))


def shared(batch: Any) -> Any:
    """The batch, in shared memory if this is a worker.

    Where there is no memory left this raises. A worker's queue, which would otherwise move the
    batch there, drops it in that case, and the main process waits for ever.
    """
    if get_worker_info() is not None and isinstance(batch, (tuple, list)):
        for part in batch:
            if isinstance(part, Tensor):
                part.share_memory_()
    return batch
