"""Datasets behind readers of other libraries, each tried before it is trained on.

timm's readers look at keys, labels and archives only when a loader's worker asks for a sample, and
some of them pass over what they cannot read: a misspelt key would be an epoch without images.
"""

import argparse
import importlib.util
import itertools
import numbers
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from timm.data import IterableImageDataset
from timm.data.readers.class_map import remap_target
from torch.utils.data import Dataset

from qna_timm.training.data.bad_images import one_line
from qna_timm.training.data.factory import create, image_mode, prefix_of, samples_asked
from qna_timm.training.data.loaders import num_workers
from qna_timm.training.data.splits import split_flag
from qna_timm.training.errors import UsageError, closest
from qna_timm.training.processes.distributed import process_place

_MODULES = {
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "wds": ("webdataset",),
}
# of images and of labels
_DEFAULT_KEYS = {
    "hfds": ("image", "label"),
    "hfids": ("image", "label"),
    "wds": ("jpg;png;webp", "cls"),
}
_MOST_NAMES_SHOWN = 5


def open_reader(args: argparse.Namespace, split: str, is_training: bool) -> Dataset:
    """Opens a split of tfds, wds, hfds or hfids, and reads a sample of it.

    Raises:
        UsageError: a package is missing, there is no such split, its samples have no such image or
            label, a class map lacks a class, or there are fewer archives than readers.
    """
    kind = prefix_of(args.dataset)
    for module in _MODULES[kind]:
        if importlib.util.find_spec(module) is None:
            packages = " ".join(name.replace("_", "-") for name in _MODULES[kind])
            raise UsageError(f"--dataset {args.dataset} needs {module}: pip install {packages}")
    if kind == "wds":
        dataset = _open_archives(args, split, is_training)
    else:
        dataset = create(args, split, is_training)
    if args.class_map:
        _check_class_map_is_whole(args, dataset.reader)
    if kind == "hfds" and len(dataset):
        _try_sample(args, dataset.reader.dataset.column_names, lambda: dataset.reader[0])
    elif kind == "hfids":
        _try_stream(args, split, is_training, dataset.reader)
    elif kind == "wds":
        _try_archives(args, split, is_training, dataset.reader)
    return dataset


def _check_class_map_is_whole(args: argparse.Namespace, reader: Any) -> None:
    """timm's readers of hubs stop at a class that a map lacks, wherever it comes."""
    names = getattr(reader, "_source_names", None) or {}
    missing = [str(name) for name in names.values() if name not in reader.class_to_idx]
    if missing:
        shown = ", ".join(missing[:_MOST_NAMES_SHOWN]) + ", ..." * bool(missing[_MOST_NAMES_SHOWN:])
        raise UsageError(
            f"--class-map {args.class_map}: lacks {len(missing)} of the {len(names)} classes of "
            f"{args.dataset}: {shown}"
        )


def _try_sample(
    args: argparse.Namespace, fields: Iterable[str], read: Callable[[], tuple[Any, Any]]
) -> None:
    """Read a sample: its image may be damaged, but it has to be there, and a label.

    Args:
        args: Flags.
        fields: What samples have.
        read: Gives (image, label).

    Raises:
        UsageError: it has no such image or label.
    """
    image_key, label_key = _DEFAULT_KEYS[prefix_of(args.dataset)]
    keys = f"--input-key {args.input_key or image_key}, --target-key {args.target_key or label_key}"
    has = f"which has {', '.join(fields)}"
    try:
        label = read()[1]
    except OSError:
        return
    except Exception as error:  # readers of other libraries raise what they like
        if args.class_map:
            keys += f", --class-map {args.class_map}"
        raise UsageError(
            f"{keys}: cannot read a sample of {args.dataset}, {has}: {one_line(error)}"
        ) from error
    if not isinstance(label, numbers.Integral):
        raise UsageError(
            f"{keys}: the label of a sample of {args.dataset}, {has}, is {label!r}, expected a "
            "number of a class"
        )


def _try_stream(args: argparse.Namespace, split: str, is_training: bool, reader: Any) -> None:
    """Read the first sample of a hub's stream, and see that all workers get some."""
    flag = split_flag(args, is_training)
    try:
        if reader.download:
            stream = reader.builder.as_dataset(split=split)
        else:
            stream = reader.builder.as_streaming_dataset(split=split)
    except ValueError as error:
        raise UsageError(f"{flag} {split!r}: {args.dataset}: {one_line(error)}") from error
    image_key, label_key = _DEFAULT_KEYS["hfids"]

    def read() -> tuple[Any, Any]:
        sample = next(iter(stream))
        label = sample[args.target_key or label_key]
        if reader.remap_class:
            label = remap_target(label, reader.class_to_idx, reader._source_names)
        return sample[args.input_key or image_key], label

    _try_sample(args, reader.builder.info.features or (), read)
    if is_training and not reader.download:
        _check_enough(args, stream.num_shards, shared_by_samples=True)


def _check_enough(args: argparse.Namespace, archives: int, shared_by_samples: bool = False) -> None:
    """See that every worker of every process has an archive.

    Args:
        args: Flags.
        archives: Of the training split.
        shared_by_samples: Whether processes that archives cannot be dealt out to evenly read all of
            them, each its share of the samples.

    Raises:
        UsageError: there are not enough.
    """
    world_size, workers = process_place()[1], max(1, num_workers(args))
    if shared_by_samples and archives % world_size:
        world_size = 1
    if archives < world_size * workers:
        most = archives // world_size
        hint = f"--workers {most}" if most else "fewer processes"
        raise UsageError(
            f"--workers {workers}: {args.dataset} has {archives} archive(s) to train on for "
            f"{world_size} process(es) of {workers} reader(s) each; {hint} would do"
        )


def _is_local(root: str) -> bool:
    return "::" not in root and "://" not in root and not root.startswith("pipe:")


def _open_archives(args: argparse.Namespace, split: str, is_training: bool) -> IterableImageDataset:
    """A split of webdataset archives.

    Raises:
        UsageError: the folder, the split or an archive is not there.
    """
    from qna_timm.training.data.reader_wds import ArchiveReader  # an optional package

    flag, root = split_flag(args, is_training), args.data_dir
    if not root:
        raise UsageError(f"--dataset {args.dataset} needs --data-dir, the folder of its archives")
    if _is_local(root) and not Path(root).is_dir():
        raise UsageError(f"--data-dir {root}: there is no such folder")
    settings = {
        "num_samples": samples_asked(args, is_training),
        "input_key": args.input_key,
        "target_key": args.target_key,
        "class_map": args.class_map,
    }
    try:
        reader = ArchiveReader(
            strict=getattr(args, "strict_data", False),
            root=root,
            name=args.dataset.partition("/")[2],
            split=split,
            is_training=is_training,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode=image_mode(args),
            **{key: value for key, value in settings.items() if value},
        )
    except Exception as error:  # what is wrong with a split is said in many ways
        count = "; --train-num-samples N gives their number" if "num_samples" in str(error) else ""
        raise UsageError(
            f"{flag} {split!r}: {' '.join(str(error).split())} (in {root}; a split of its "
            f"_info.json, or archives and their samples, such as 'train-{{0000..0003}}.tar|1000'"
            f"{count})"
        ) from error
    if _is_local(root):
        names = [name for name in reader.split_info.filenames if _is_local(name)]
        absent = [name for name in names if not os.path.exists(os.path.join(root, name))]
        if absent:
            raise UsageError(
                f"{flag} {split!r}: {len(absent)} of {len(names)} archives are not in {root}: "
                f"{absent[0]}{closest(absent[0], os.listdir(root))}"
            )
    return IterableImageDataset(root, reader=reader)


def _try_archives(args: argparse.Namespace, split: str, is_training: bool, reader: Any) -> None:
    """Read the first sample that is whole, and see that all workers get an archive."""
    import webdataset
    from timm.data.readers.reader_wds import _decode

    paths = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
    archives = webdataset.SimpleShardList(paths)
    samples = webdataset.DataPipeline(
        archives, webdataset.tarfile_to_samples(handler=webdataset.ignore_and_continue)
    )
    sample = next(itertools.chain(samples, [None]))
    if sample is None:
        raise UsageError(
            f"{split_flag(args, is_training)} {split!r}: no archive of it can be read ({paths[0]})"
        )

    def read() -> tuple[Any, Any]:
        label_key = reader.target_keys or reader.target_key
        found = _decode(
            sample, reader.input_key, reader.input_img_mode, label_key, reader.split_info.alt_label
        )
        return found["jpg"], reader.label(found["target"])

    _try_sample(args, [key for key in sample if not key.startswith("__")], read)
    if is_training:
        _check_enough(args, len(paths))
