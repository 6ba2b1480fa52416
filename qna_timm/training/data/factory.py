"""timm's factory of datasets, called with what our flags say; what it raises becomes one line."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from qna_timm.training.data.loaders import default_image_mode
from qna_timm.training.data.splits import split_flag
from qna_timm.training.errors import UsageError, closest, closest_path
from qna_timm.training.processes.distributed import process_place

TORCH_TWO_SPLITS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_DOWNLOADABLE = tuple(
    f"torch/{name}" for name in (*TORCH_TWO_SPLITS, "inaturalist", "inat", "places365")
)


def prefix_of(name: str) -> str:
    """What timm chooses a dataset's reader by."""
    return name.partition("/")[0].lower()


def image_mode(args: argparse.Namespace) -> str:
    """The PIL mode to read; `create_*_loader` corrects the default to the model's channels."""
    if args.input_img_mode:
        if args.input_img_mode not in Image.MODES:
            raise UsageError(
                f"--input-img-mode {args.input_img_mode!r} is no image mode of Pillow"
                f"{closest(args.input_img_mode, Image.MODES)}"
            )
        if getattr(args, "aa", None) and args.input_img_mode not in ("L", "RGB"):
            raise UsageError(
                f"--aa {args.aa}: its operations are for images of modes L and RGB, found "
                f"--input-img-mode {args.input_img_mode}"
            )
        return args.input_img_mode
    channels = args.input_size[0] if args.input_size else args.in_chans
    return "RGB" if channels is None else default_image_mode(channels)


def samples_asked(args: argparse.Namespace, is_training: bool) -> int | None:
    """How many samples of a split the flags ask for; None for all."""
    names = ("train_num_samples",) if is_training else ("val_num_samples", "num_samples")
    return next((value for name in names if (value := getattr(args, name, None))), None)


@contextmanager
def _first_rank_first(enabled: bool) -> Iterator[None]:
    """Lets rank 0 download before the other ranks look."""
    rank, world_size = process_place()
    wait = enabled and world_size > 1
    if wait and rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if wait and rank == 0:
            dist.barrier()


def _check_class_map(name: str, root: str | None) -> None:
    """A text file of class names, one a line, here or in the data's folder."""
    where = f"--class-map {name}"
    places = [Path(name), Path(root or "", name)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UsageError(f"{where}: there is no such file, here or in {root}{closest_path(name)}")
    if path.suffix.lower() != ".txt":
        raise UsageError(f"{where}: expected a text file .txt with a class name a line")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UsageError(f"{where}: is not UTF-8 text, expected a class name a line") from None
    for number, found in enumerate(names, start=1):
        if not found:
            raise UsageError(f"{where}: line {number} is empty, expected a class name")
        if (first := names.index(found) + 1) < number:
            raise UsageError(f"{where}: '{found}' is in lines {first} and {number}")


def create(args: argparse.Namespace, split: str, is_training: bool, **kwargs: Any) -> Dataset:
    """timm's factory; whatever a reader raises becomes one line."""
    common = {
        "name": args.dataset,
        "root": args.data_dir,
        "split": split,
        "search_split": False,
        "is_training": is_training,
        "class_map": args.class_map,
        "download": args.dataset_download,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "repeats": getattr(args, "epoch_repeats", 0) if is_training else 0,
        "num_samples": samples_asked(args, is_training),
        "input_img_mode": image_mode(args),
        "input_key": args.input_key,
        "target_key": args.target_key,
        "trust_remote_code": args.dataset_trust_remote_code,
    }
    if args.class_map:
        _check_class_map(args.class_map, kwargs.get("root", args.data_dir))
    try:
        with _first_rank_first(args.dataset_download):
            return create_dataset(**{**common, **kwargs})
    except Exception as error:
        # Readers of four libraries raise what they like; here it can only be the user's data.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f" in {args.data_dir}" if args.data_dir else ""
        hint = ""
        is_absent = isinstance(error, (RuntimeError, OSError))
        if args.dataset.lower() in _DOWNLOADABLE and is_absent and not args.dataset_download:
            hint = "; --dataset-download fetches it"
        elif args.class_map and "0 images" in reason:
            hint = f"; are its folders named in --class-map {args.class_map}?"
        elif "num_samples" in reason:
            flag = "--train-num-samples" if is_training else "--val-num-samples"
            hint = f"; {flag} gives their number, if the split's name is right"
        raise UsageError(
            f"cannot open dataset {args.dataset or 'folder'!r}, {split_flag(args, is_training)} "
            f"{split!r}{where}: {reason}{hint}"
        ) from error
