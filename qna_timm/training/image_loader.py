"""The loader that training and evaluation see: batches on the device, epochs by number."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from qna_timm.training.sampling import EpochSampler, KeyedDataset


def process_place() -> tuple[int, int]:
    """This process's (rank, world_size); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class ImageLoader:
    """Yields (input [B, C, H, W], target) on the device from one of timm's loaders.

    Args:
        loader: `DataLoader` or `PrefetchLoader`.
        device: Where batches go.
        img_dtype: Type of the input.
        input_size: [C, H, W] of the input.
        mixes: Whether the collate function mixes samples (`FastCollateMixup`).
    """

    def __init__(
        self,
        loader: DataLoader | PrefetchLoader,
        device: torch.device,
        img_dtype: torch.dtype,
        input_size: Sequence[int],
        mixes: bool = False,
    ) -> None:
        self.loader = loader
        self.device = device
        self.img_dtype = img_dtype
        self.input_size = tuple(input_size)
        self._mixes = mixes
        self._left_early = False

    @property
    def _inner(self) -> DataLoader:
        return self.loader.loader if isinstance(self.loader, PrefetchLoader) else self.loader

    @property
    def sampler(self) -> Sampler | None:
        """The sampler, or None for iterable datasets (torch puts a placeholder there)."""
        return None if isinstance(self.dataset, IterableDataset) else self._inner.sampler

    @property
    def dataset(self) -> Dataset:
        """The dataset as it was opened, with its transform set."""
        dataset = self._inner.dataset
        return dataset.dataset if isinstance(dataset, KeyedDataset) else dataset

    @property
    def batch_size(self) -> int:
        """Images per step of this process."""
        return self._inner.batch_size

    @property
    def mixup_enabled(self) -> bool:
        """Whether the loader mixes samples; setting it takes effect at the next epoch."""
        return self._mixes and self._mixing_switch.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self._mixes and enabled != self._mixing_switch.mixup_enabled:
            self._mixing_switch.mixup_enabled = enabled
            self._forget_prefetched()

    @property
    def _mixing_switch(self) -> Any:
        sampler = self._inner.sampler
        return sampler if isinstance(sampler, EpochSampler) else self._inner.collate_fn

    def _forget_prefetched(self) -> None:
        """Drops batches that timm's multi-epochs loader has begun to read ahead."""
        if isinstance(self._inner, MultiEpochsDataLoader):
            self._inner.iterator = None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose samples the next iteration gives."""
        if self._left_early:
            self._forget_prefetched()
        self._left_early = False
        for holder in (self.dataset, self._inner.sampler):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._left_early = True
        for inputs, target in self.loader:
            yield (
                inputs.to(self.device, self.img_dtype, non_blocking=True),
                target.to(self.device, non_blocking=True),
            )
        self._left_early = False
