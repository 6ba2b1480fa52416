"""The loader that training and evaluation see: batches on the device, epochs by number."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from qna_timm.training.data.bad_images import EvalImages, ReplacedImages, path_of
from qna_timm.training.data.batches import Batches
from qna_timm.training.data.erasing import KeyedErasing
from qna_timm.training.data.sampling import EpochSampler, KeyedDataset
from qna_timm.training.data.shards import ShardPlan
from qna_timm.training.data.streams import KeyedStream
from qna_timm.training.processes.distributed import process_place

_logger = logging.getLogger(__name__)


class ImageLoader:
    """Yields (input [B, C, H, W], target) on the device from one of timm's loaders.

    Images that cannot be read are replaced, and workers that die are started anew.

    Args:
        loader: `DataLoader` whose workers send `Collated` batches, or a `PrefetchLoader` of it.
        device: Where batches go.
        img_dtype: Type of the input.
        input_size: [C, H, W] of the input.
        mixes: Whether the collate function mixes samples (`FastCollateMixup`).
        reads_ahead: Whether workers begin with the next epoch when they are through with one.
        seed: Of the run; what the prefetcher erases depends on it.
    """

    def __init__(
        self,
        loader: DataLoader | PrefetchLoader,
        device: torch.device,
        img_dtype: torch.dtype,
        input_size: Sequence[int],
        mixes: bool = False,
        reads_ahead: bool = False,
        seed: int = 0,
    ) -> None:
        prefetches = isinstance(loader, PrefetchLoader)
        self._batches = Batches(loader.loader if prefetches else loader, reads_ahead)
        if prefetches:
            loader.loader = self._batches
            if loader.random_erasing is not None:
                # No reference to this loader: workers of one that the garbage collector finds in
                # a cycle get no word that they should end, and PyTorch waits 5 seconds for each.
                loader.random_erasing = KeyedErasing(
                    loader.random_erasing, self._batches, seed, process_place(), device
                )
        self.loader = loader if prefetches else self._batches
        self.device = device
        self.img_dtype = img_dtype
        self.input_size = tuple(input_size)
        self._mixes = mixes
        self._replaced = ReplacedImages()
        self._warned = False

    @property
    def _inner(self) -> DataLoader:
        return self._batches.loader

    @property
    def sampler(self) -> Sampler | None:
        """The sampler, or None for iterable datasets (torch has one of its own there)."""
        return None if isinstance(self._inner.dataset, IterableDataset) else self._inner.sampler

    @property
    def dataset(self) -> Dataset:
        """The dataset as it was opened, with its transform set."""
        dataset = self._inner.dataset
        ours = isinstance(dataset, (KeyedDataset, KeyedStream, EvalImages))
        return dataset.dataset if ours else dataset

    @property
    def batch_size(self) -> int:
        """Images of a micro-batch of this process."""
        return self._inner.batch_size

    @property
    def mixup_enabled(self) -> bool:
        """Whether the loader mixes samples; setting it takes effect at the next epoch."""
        return self._mixes and self._mixing_switch.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self._mixes and enabled != self._mixing_switch.mixup_enabled:
            self._mixing_switch.mixup_enabled = enabled
            self._batches.forget()

    @property
    def _mixing_switch(self) -> Any:
        sampler = self._inner.sampler
        # a stream's keyless samples are collated by a copy of timm's function alone
        return sampler if isinstance(sampler, EpochSampler) else self._inner.collate_fn.collate_fn

    @property
    def plan(self) -> ShardPlan:
        """How the epochs of a training loader are cut; for streams, as far as they know it."""
        if isinstance(self._inner.sampler, EpochSampler):
            return self._inner.sampler.plan
        world_size = process_place()[1]
        return ShardPlan(self.batch_size, world_size, len(self) * world_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses what the next iteration gives.

        Args:
            epoch: From 0.
            start: The micro-batch of this process that it begins with.
        """
        if start and self.sampler is None and not self._warned:
            self._warned = True
            _logger.warning(
                "this dataset is a stream: what has been trained on is read again and passed over"
            )
        self._batches.set_epoch(epoch, start)
        for holder in (self._inner.dataset, self.sampler):
            if hasattr(holder, "set_epoch") and not isinstance(holder, EpochSampler):
                holder.set_epoch(epoch)

    def samples(self, epoch: int, micro_batch: int) -> list[tuple[int, str]]:
        """Index and path of the images of a training micro-batch; the path is empty without files.

        Streams, which cannot tell, give an empty list.
        """
        if not isinstance(self._inner.sampler, EpochSampler):
            return []
        keys = self._inner.sampler.keys(epoch, micro_batch)
        return [(key.index, path_of(self.dataset, key.index)) for key in keys]

    def read_again(self, epoch: int, micro_batch: int) -> tuple[Tensor, Tensor] | None:
        """A training micro-batch as it came out, read in this process; None where it cannot be.

        That is of streams, and of what a prefetcher finishes on the device.
        """
        if not isinstance(self._inner.sampler, EpochSampler) or self.loader is not self._batches:
            return None
        samples = self._inner.dataset.__getitems__(self._inner.sampler.keys(epoch, micro_batch))
        inputs, target = self._inner.collate_fn(samples).batch
        return inputs.to(self.device, self.img_dtype), target.to(self.device)

    def replaced(self, before: tuple[int, int] | None = None) -> list[dict[str, Any]]:
        """Images that could not be read and were replaced, as far as this process handed them out.

        Args:
            before: Only those of earlier (epoch, micro-batch)es; None for all.

        Returns:
            Fields of `Replacement`, sorted, each image once for each time that it was drawn.
        """
        return self._replaced.entries(before)

    def close(self) -> None:
        """Ends the workers at once; a next iteration starts others."""
        self._batches.close()

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, wherever the next iteration starts."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, start = self._batches.epoch, self._batches.start
        for micro_batch, (inputs, target) in enumerate(self.loader, start):
            self._replaced.add(self._batches.replaced.pop(micro_batch, ()), epoch, micro_batch)
            yield (
                inputs.to(self.device, self.img_dtype, non_blocking=True),
                target.to(self.device, non_blocking=True),
            )
