"""Loaders: timm's transforms, collation and prefetching around our reproducible order."""

import argparse
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import ImageMode
from timm.data import AugMixDataset, create_loader
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, IterableDataset

from qna_timm.training.data.bad_images import EvalImages, refuse_neighbours
from qna_timm.training.data.collate import SplitCollate, TellingCollate
from qna_timm.training.data.image_loader import ImageLoader
from qna_timm.training.data.padded_crop import PADDED, use_padded_crop
from qna_timm.training.data.posterize import mend_posterize
from qna_timm.training.data.sampling import EpochSampler, KeyedCollate, KeyedDataset
from qna_timm.training.data.shards import ShardPlan, plan_shards, too_large_batch
from qna_timm.training.data.streams import EvalStream, KeyedStream
from qna_timm.training.errors import UsageError
from qna_timm.training.processes.distributed import process_place

_PREFETCH_DEVICES = ("cuda", "npu")
# A reader that shares its files out over all workers of all ranks pads less with few workers.
_PADDING_READER = "tfds/"


def uses_prefetcher(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether batches are normalised, erased and (with `FastCollateMixup`) mixed by the loader."""
    return not args.no_prefetcher and device.type in _PREFETCH_DEVICES


def default_image_mode(channels: int) -> str:
    """The PIL mode of images for a model with this many input channels.

    Raises:
        UsageError: it is neither 1 nor 3, and the user has to choose.
    """
    if channels not in (1, 3):
        raise UsageError(
            f"no image mode has {channels} channels by default; "
            "name one with --input-img-mode, for example RGBA or CMYK for 4"
        )
    return "L" if channels == 1 else "RGB"


def _set_image_mode(dataset: Dataset, args: argparse.Namespace, channels: int) -> None:
    """Lets images arrive with the model's number of channels.

    Raises:
        UsageError: the mode that the user chose has another number.
    """
    if args.input_img_mode:
        bands = len(ImageMode.getmode(args.input_img_mode).bands)
        if bands != channels:
            raise UsageError(
                f"--input-img-mode {args.input_img_mode} gives {bands} channels, "
                f"but the model takes {channels}"
            )
        return
    while isinstance(dataset, AugMixDataset):
        dataset = dataset.dataset
    if hasattr(dataset, "input_img_mode"):
        dataset.input_img_mode = default_image_mode(channels)


def num_workers(args: argparse.Namespace) -> int:
    """``--workers``; where nobody chose it, no more than there are cores (PyTorch would warn)."""
    if "workers" in getattr(args, "given", {"workers"}):
        return args.workers
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(args.workers, cores)


def _image_dtype(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.model_dtype) if args.model_dtype else torch.float32


def _rebuilt(loader: DataLoader, seed: int, **changes: Any) -> DataLoader:
    """A loader like timm's with some parts replaced, and a generator of its own.

    Without its own generator a loader draws from the global one, at moments that differ between
    a resumed and a straight run.
    """
    iterable = isinstance(loader.dataset, IterableDataset)
    kwargs: dict[str, Any] = {
        "dataset": loader.dataset,
        "batch_size": loader.batch_size,
        "sampler": None if iterable else loader.sampler,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "drop_last": loader.drop_last,
        "worker_init_fn": loader.worker_init_fn,
        "persistent_workers": loader.persistent_workers,
        "generator": torch.Generator().manual_seed(seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's loader has said it
        return DataLoader(**{**kwargs, **changes})


def _with_inner(
    loader: DataLoader | PrefetchLoader, inner: DataLoader
) -> DataLoader | PrefetchLoader:
    """timm's loader with another `DataLoader` in it, or in its place."""
    if not isinstance(loader, PrefetchLoader):
        return inner
    loader.loader = inner
    return loader


def _build(dataset: Dataset, args: argparse.Namespace, **kwargs: Any) -> Any:
    """timm's `create_loader`, with bad augmentation values told as a usage error."""
    try:
        return create_loader(dataset, **kwargs)
    except (AssertionError, KeyError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise UsageError(
            f"cannot build the image transforms (--aa {args.aa!r}, --scale {args.scale}, "
            f"--ratio {args.ratio}, --remode {args.remode}): {reason}"
            if kwargs["is_training"]
            else f"cannot build the image transforms: {reason}"
        ) from error


def _crops_padded(args: argparse.Namespace) -> bool:
    return args.train_crop_mode == PADDED and not args.no_aug


def _train_kwargs(args: argparse.Namespace, data_config: Mapping[str, Any]) -> dict[str, Any]:
    """timm's names for what our flags say about training images."""
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config["interpolation"]
    return {
        "no_aug": args.no_aug,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
        "re_split": args.resplit,
        "train_crop_mode": None if _crops_padded(args) else args.train_crop_mode,
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "vflip": args.vflip,
        "color_jitter": args.color_jitter,
        "color_jitter_prob": args.color_jitter_prob,
        "grayscale_prob": args.grayscale_prob or 0.0,
        "gaussian_blur_prob": args.gaussian_blur_prob or 0.0,
        "auto_augment": args.aa,
        "interpolation": interpolation,
        "worker_seeding": args.worker_seeding,
    }


def _split_kwargs(args: argparse.Namespace, num_aug_splits: int) -> dict[str, Any]:
    """Collation of split batches and their erasing, for loaders without the prefetcher."""
    if num_aug_splits < 2 and not args.resplit:
        return {}
    erasing = None
    if args.reprob > 0 and not args.no_aug:
        erasing = RandomErasing(
            args.reprob,
            mode=args.remode,
            max_count=args.recount,
            num_splits=(num_aug_splits or 2) if args.resplit else 0,
            device="cpu",
        )
    return {"collate_fn": SplitCollate(erasing), "re_prob": 0.0}


def _epoch_sampler(
    dataset: Dataset, args: argparse.Namespace, num_aug_splits: int, plan: ShardPlan | None
) -> EpochSampler | None:
    """The training order; None for streams, which have their own.

    Raises:
        UsageError: less than one step, a plan that does not fit, or a flag that streams cannot
            follow.
    """
    rank, world_size = process_place()
    if isinstance(dataset, IterableDataset):
        if args.aug_repeats or num_aug_splits > 1:
            flag = "--aug-repeats" if args.aug_repeats else "--aug-splits"
            raise UsageError(f"{flag} needs a dataset with random access, not {args.dataset!r}")
        # A stream goes round until it has filled a batch.
        images = getattr(getattr(dataset, "reader", None), "num_samples", None)
        if images and images < args.batch_size * world_size:
            raise too_large_batch(args.batch_size, world_size, images)
        return None
    if plan is None:
        plan = plan_shards(
            len(dataset), args.batch_size, world_size, args.grad_accum_steps, args.epoch_repeats
        )
    return EpochSampler(
        len(dataset),
        plan,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
        aug_repeats=args.aug_repeats,
    )


def _keyed_parts(
    loader: DataLoader, args: argparse.Namespace, sampler: EpochSampler | None, mixes: bool
) -> dict[str, Any]:
    """What makes a training loader's samples functions of their places in the run."""
    if sampler is not None:
        refuse_neighbours(loader.dataset)
        return {
            "dataset": KeyedDataset(loader.dataset, getattr(args, "strict_data", False)),
            "sampler": sampler,
            "collate_fn": KeyedCollate(loader.collate_fn),
        }
    parts: dict[str, Any] = {
        "dataset": KeyedStream(loader.dataset, args.seed, process_place()[0]),
        "collate_fn": TellingCollate(loader.collate_fn),
    }
    if mixes:
        # Persistent workers hold copies of the collate function and would never stop mixing.
        parts["persistent_workers"] = False
    return parts


def create_train_loader(
    dataset: Dataset,
    args: argparse.Namespace,
    data_config: Mapping[str, Any],
    *,
    device: torch.device,
    mixup_collate: Callable[..., Any] | None = None,
    num_aug_splits: int = 0,
    plan: ShardPlan | None = None,
) -> ImageLoader:
    """Training loader with every augmentation flag of `args`.

    Args:
        dataset: From `open_dataset`; wrapped for AugMix here when `num_aug_splits` > 1.
        args: timm's flags.
        data_config: timm's `input_size`, `interpolation`, `mean`, `std`.
        device: Where batches go.
        mixup_collate: timm's `FastCollateMixup`; needs `uses_prefetcher(args, device)`.
        num_aug_splits: Augmented copies of each sample in a batch (0: no splits).
        plan: How epochs are cut into shards; None cuts them for the flags and processes of now.

    Raises:
        UsageError: one step needs more images than there are, or an augmentation flag is wrong.
        ValueError: `mixup_collate` without the prefetcher, whose raw bytes it mixes.
    """
    if mixup_collate is not None and not uses_prefetcher(args, device):
        raise ValueError("mixup_collate mixes the prefetcher's bytes; mix in the loop instead")
    sampler = _epoch_sampler(dataset, args, num_aug_splits, plan)
    if num_aug_splits > 1 and not isinstance(dataset, AugMixDataset):
        dataset = AugMixDataset(dataset, num_splits=num_aug_splits)
    _set_image_mode(dataset, args, data_config["input_size"][0])
    img_dtype, prefetched = _image_dtype(args), uses_prefetcher(args, device)
    kwargs = {"collate_fn": mixup_collate, **_train_kwargs(args, data_config)}
    if not prefetched:
        kwargs.update(_split_kwargs(args, num_aug_splits))
    loader = _build(
        dataset,
        args,
        input_size=data_config["input_size"],
        batch_size=args.batch_size if sampler is None else sampler.plan.batch_size,
        is_training=True,
        mean=data_config["mean"],
        std=data_config["std"],
        num_aug_splits=num_aug_splits,
        num_workers=num_workers(args),
        pin_memory=args.pin_mem and device.type != "cpu",  # nothing to pin for
        img_dtype=img_dtype,
        device=device,
        use_prefetcher=prefetched,
        **kwargs,
    )
    inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
    if _crops_padded(args):
        use_padded_crop(
            inner.dataset,
            data_config["input_size"][1:],
            args.crop_padding,
            kwargs["interpolation"],
        )
    mend_posterize(inner.dataset)
    changes = _keyed_parts(inner, args, sampler, mixes=mixup_collate is not None)
    loader = _with_inner(loader, _rebuilt(inner, args.seed + process_place()[0], **changes))
    return ImageLoader(
        loader,
        device,
        img_dtype,
        data_config["input_size"],
        mixes=mixup_collate is not None,
        reads_ahead=args.use_multi_epochs_loader,
        seed=args.seed,
    )


def create_eval_loader(
    dataset: Dataset,
    args: argparse.Namespace,
    data_config: Mapping[str, Any],
    *,
    device: torch.device,
    batch_size: int,
) -> ImageLoader:
    """Evaluation loader in dataset order; each process reads every world_size-th image.

    The sampler pads the processes to equal counts; `evaluate` leaves the padding out.

    Args:
        dataset: From `open_dataset`.
        args: timm's flags.
        data_config: timm's `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        device: Where batches go.
        batch_size: Images per step of this process.

    Raises:
        UsageError: a value of `data_config` that timm's transforms refuse.
    """
    rank, world_size = process_place()
    workers = num_workers(args)
    if world_size > 1 and args.dataset.lower().startswith(_PADDING_READER):
        workers = min(2, workers)
    _set_image_mode(dataset, args, data_config["input_size"][0])
    img_dtype = _image_dtype(args)
    loader = _build(
        dataset,
        args,
        input_size=data_config["input_size"],
        batch_size=batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config.get("crop_mode"),
        crop_border_pixels=getattr(args, "crop_border_pixels", None),
        num_workers=workers,
        distributed=world_size > 1,
        pin_memory=args.pin_mem and device.type != "cpu",  # nothing to pin for
        img_dtype=img_dtype,
        device=device,
        use_prefetcher=uses_prefetcher(args, device),
    )
    inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
    changes: dict[str, Any] = {"collate_fn": TellingCollate(inner.collate_fn)}
    if isinstance(dataset, IterableDataset):
        # archives are shared out whole: a process may have more images than its share
        warnings.filterwarnings("ignore", message="Length of IterableDataset")
        changes["dataset"] = EvalStream(inner.dataset)
    else:
        refuse_neighbours(inner.dataset)
        changes["dataset"] = EvalImages(inner.dataset, getattr(args, "strict_data", False))
    loader = _with_inner(loader, _rebuilt(inner, args.seed + rank, **changes))
    return ImageLoader(loader, device, img_dtype, data_config["input_size"])
