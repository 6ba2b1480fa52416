"""Datasets by timm's names, opened through timm's factory with its silent traps closed.

`open_datasets` gives the two datasets of a training run, `open_dataset` one split. What they
return fits `create_train_loader` and `create_eval_loader`, which live in `loaders.py`.
"""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset

from qna_timm.training.data.digits import Digits
from qna_timm.training.data.factory import (
    TORCH_TWO_SPLITS,
    create,
    image_mode,
    prefix_of,
    samples_asked,
)
from qna_timm.training.data.holdout import hold_out
from qna_timm.training.data.image_loader import ImageLoader
from qna_timm.training.data.loaders import (
    create_eval_loader,
    create_train_loader,
    uses_prefetcher,
)
from qna_timm.training.data.readers import open_reader
from qna_timm.training.data.splits import find_split, is_train_split, split_flag
from qna_timm.training.data.tiny_imagenet import TinyImageNetReader
from qna_timm.training.data.views import ImageView, class_names_of, use_class_names
from qna_timm.training.errors import UsageError
from qna_timm.training.names import TINY_IMAGENET, check_dataset_name

__all__ = [
    "ImageLoader",
    "create_eval_loader",
    "create_train_loader",
    "dataset_classes",
    "open_dataset",
    "open_datasets",
    "open_holdout",
    "uses_prefetcher",
]

_logger = logging.getLogger(__name__)

_MOST_NAMES_SHOWN = 5
_TORCH_FOLDERS = ("image_folder", "folder")


def _open_digits(args: argparse.Namespace, split: str, is_training: bool) -> ImageView:
    digits = Digits(is_validation=not is_train_split(split, split_flag(args, is_training)))
    return ImageView(digits, image_mode(args), class_names=digits.classes)


def _torch_name(args: argparse.Namespace) -> str:
    """torchvision's name of the dataset; empty for another kind."""
    return args.dataset.split("/", 2)[-1].lower() if prefix_of(args.dataset) == "torch" else ""


def _open_torch(args: argparse.Namespace, split: str, is_training: bool) -> ImageView:
    name = _torch_name(args)
    if not args.data_dir:
        raise UsageError(f"--dataset {args.dataset} needs --data-dir, the folder it is kept in")
    root = args.data_dir
    if name in TORCH_TWO_SPLITS:
        # timm takes every name it does not know for the test part
        is_train = is_train_split(split, split_flag(args, is_training), ("test",))
        split = "train" if is_train else "validation"
    elif name in _TORCH_FOLDERS:
        root = find_split(args, split, is_training)
    dataset = create(args, split, is_training, root=root)
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", ())
    # ImageNet names a class by a tuple of synonyms
    flat = [name if isinstance(name, str) else ", ".join(name) for name in names]
    return ImageView(dataset, image_mode(args), class_names=flat)


def _open_folder(args: argparse.Namespace, split: str, is_training: bool) -> Dataset:
    root = find_split(args, split, is_training)
    dataset = create(args, split, is_training, root=root)
    if {"", "."} & set(class_names_of(dataset) or ()):  # "." where an archive's names begin with it
        raise UsageError(
            f"{root} holds images directly; put them in one folder per class, "
            f"for example {root}/cat and {root}/dog"
        )
    if isinstance(dataset.reader, ReaderImageFolder):
        _refuse_tiny_imagenet(root, dataset)
        if not args.class_map:
            _refuse_hidden(root, class_names_of(dataset))
        folders = {os.path.dirname(path) for path, _ in dataset.reader.samples}
        _report_merged_classes(folders)
        if is_training:
            _report_passed_over(root, folders, args.class_map)
            _report_other_kinds(root, folders)
    return dataset


def _refuse_hidden(root: str, names: Sequence[str] | None) -> None:
    """Such as .ipynb_checkpoints, in which a notebook keeps copies of images."""
    hidden = [name for name in names or () if name.startswith(".")]
    if hidden:
        raise UsageError(
            f"{root}: the hidden folder {hidden[0]} holds images and would be a class; remove it, "
            "or name the classes in a --class-map"
        )


def _report_other_kinds(root: str, folders: Iterable[str]) -> None:
    """timm reads some kinds of images only, and passes the others of a class over."""
    read, known = set(get_img_extensions()), Image.registered_extensions()
    passed_over = Counter(
        suffix
        for folder in folders
        for entry in os.scandir(folder)
        if (suffix := os.path.splitext(entry.name)[1].lower()) in known and suffix not in read
    )
    if passed_over:
        _logger.warning(
            "%s: only %s are read; passed over: %s",
            root,
            " ".join(sorted(read)),
            ", ".join(f"{count} {suffix}" for suffix, count in sorted(passed_over.items())),
        )


def _refuse_tiny_imagenet(root: str, dataset: ImageDataset) -> None:
    """Its archive keeps every image in a folder `images`, which timm would take for the class."""
    if class_names_of(dataset) == ["images"]:
        raise UsageError(
            f"{root}: every image lies in a folder 'images', which would be the only class; "
            f"--dataset {TINY_IMAGENET} reads TinyImageNet as it unpacks"
        )


def _report_merged_classes(folders: Iterable[str]) -> None:
    """timm names a class by the last folder only, so two folders can be one class."""
    by_name: dict[str, set[str]] = {}
    for folder in folders:
        by_name.setdefault(os.path.basename(folder), set()).add(folder)
    for name, places in by_name.items():
        if len(places) > 1:
            _logger.warning(
                "class %r is the name of %d folders: %s",
                name,
                len(places),
                ", ".join(sorted(places)),
            )


def _report_passed_over(root: str, folders: Iterable[str], class_map: str) -> None:
    """timm makes no class of a folder whose images are missing or of another kind, or that a class
    map does not have."""
    used = {os.path.relpath(folder, root).split(os.sep)[0] for folder in folders}
    unused = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and entry.name not in used and not entry.name.startswith(".")
    )
    if unused:
        _logger.warning(
            "%s: folders without images (%s)%s make no class: %s%s",
            root,
            " ".join(get_img_extensions()),
            f", or that --class-map {class_map} does not have," if class_map else "",
            ", ".join(unused[:_MOST_NAMES_SHOWN]),
            ", ..." if len(unused) > _MOST_NAMES_SHOWN else "",
        )


def _limited(dataset: Dataset, num_samples: int | None) -> Dataset:
    """At most `num_samples` samples, spread evenly so that sorted classes all stay."""
    if not num_samples or num_samples >= len(dataset):
        return dataset
    indices = [i * len(dataset) // num_samples for i in range(num_samples)]
    mode = getattr(dataset, "input_img_mode", None)
    return ImageView(dataset, mode, indices=indices, class_names=class_names_of(dataset))


def _open_tiny_imagenet(args: argparse.Namespace, split: str, is_training: bool) -> ImageDataset:
    flag = split_flag(args, is_training)
    if split == "test":
        raise UsageError(
            f"{flag} 'test': TinyImageNet's test images have no labels; 'validation' has"
        )
    for key in ("class_map", "input_key", "target_key"):
        if getattr(args, key):
            name = key.replace("_", "-")
            raise UsageError(f"--{name}: is not for --dataset {TINY_IMAGENET}, which has its own")
    reader = TinyImageNetReader(args.data_dir, is_train_split(split, flag))
    dataset = ImageDataset(args.data_dir, reader=reader, input_img_mode=image_mode(args))
    dataset.class_names = reader.class_names
    return dataset


_OPENERS = {
    "": _open_folder,
    "sklearn": _open_digits,
    TINY_IMAGENET: _open_tiny_imagenet,
    "torch": _open_torch,
}


def open_dataset(
    args: argparse.Namespace,
    split: str,
    is_training: bool,
    *,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Opens one split of the dataset that the flags name; `create_*_loader` sets its transform.

    Args:
        args: timm's dataset flags.
        split: Name of the split.
        is_training: Whether it is read for training.
        class_names: Class names by label that the labels must follow: those of the training
            split, or of the checkpoint. A split in another order is relabelled by name.

    Raises:
        UsageError: unknown dataset, missing folder or split, no images, missing package, not
            downloaded, or a class that is not among `class_names`.
    """
    dataset = _open_whole(args, split, is_training)
    if not isinstance(dataset, IterableDataset):
        dataset = _limited(dataset, samples_asked(args, is_training))
    if class_names is not None:
        use_class_names(dataset, class_names, f"split {split!r}")
    return dataset


def _open_whole(args: argparse.Namespace, split: str, is_training: bool) -> Dataset:
    check_dataset_name(args.dataset)
    dataset = _OPENERS.get(prefix_of(args.dataset), open_reader)(args, split, is_training)
    if not isinstance(dataset, IterableDataset) and not len(dataset):
        raise UsageError(f"{split_flag(args, is_training)} {split!r} holds no samples")
    return dataset


def open_datasets(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Opens the training and the validation images with the labels of the training split.

    With `--val-fraction` both are parts of the training split, and no other split is opened.

    Raises:
        UsageError: as `open_dataset`; also when validation has a class that training lacks, or
            nothing can be held out.
    """
    if args.val_fraction is not None:
        whole = _open_whole(args, args.train_split, True)
        train, held_out = hold_out(whole, args.val_fraction, args.val_seed)
        _logger.info(
            "validating on %d of the %d images of split %r (--val-fraction %g, --val-seed %d)",
            len(held_out), len(whole), args.train_split, args.val_fraction, args.val_seed,
        )  # fmt: skip
        train = _limited(train, samples_asked(args, True))
        return train, _limited(held_out, samples_asked(args, False))
    if _torch_name(args) in TORCH_TWO_SPLITS:
        _logger.info(
            "%s has no validation part: epochs are judged by its test part (--val-fraction 0.1 "
            "leaves that to validate.py)",
            args.dataset,
        )
    train = open_dataset(args, args.train_split, True)
    names = class_names_of(train)
    return train, open_dataset(args, args.val_split, False, class_names=names)


def open_holdout(
    args: argparse.Namespace, train_split: str, *, class_names: Sequence[str] | None = None
) -> Dataset:
    """Opens what a run with `args.val_fraction` and `args.val_seed` held out.

    Args:
        args: timm's dataset flags of validate.py.
        train_split: Name of the run's training split.
        class_names: As for `open_dataset`.

    Raises:
        UsageError: as `open_dataset`; also when nothing can be held out.
    """
    whole = _open_whole(args, train_split, False)
    dataset = _limited(hold_out(whole, args.val_fraction, args.val_seed)[1], args.num_samples)
    if class_names is not None:
        use_class_names(dataset, class_names, f"split {train_split!r}")
    return dataset


def dataset_classes(dataset: Dataset) -> tuple[int | None, list[str] | None]:
    """Number of classes and their names by label; (None, None) where the data does not say."""
    names = class_names_of(dataset)
    return (len(names), names) if names else (None, None)
