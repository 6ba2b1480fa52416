"""A fingerprint of data sets: counts, and digests of the names, labels and classes in order."""

import os
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from qna_timm.training.data.views import class_names_of, images_of

# What torchvision's datasets, timm's readers and ours call the labels of all samples.
_LABELS = ("targets", "labels", "_labels")


def fingerprint(train_set: Dataset, eval_set: Dataset) -> dict[str, dict[str, Any]]:
    """What tells the data of a run from other data without opening an image.

    Args:
        train_set: Training images, as opened.
        eval_set: Validation images.

    Returns:
        For ``training`` and ``validation``: ``images`` (their number, None where a stream does not
        tell), ``samples`` (digest of file names below the data's folder and of labels, in order;
        None where there are neither), ``classes`` (digest of the class names, or None) and
        ``stream`` (whether samples only come in a row).
    """
    return {"training": _describe(train_set), "validation": _describe(eval_set)}


def _describe(dataset: Dataset) -> dict[str, Any]:
    stream = isinstance(dataset, IterableDataset)
    names = class_names_of(dataset)
    return {
        "images": images_of(dataset),
        "samples": None if stream else _digest_samples(dataset),
        "classes": None if not names else _digest("\0".join(map(str, names))),
        "stream": stream,
    }


def _digest(*contents: str | bytes) -> str:
    """Hex digest of byte strings, each with its length so that none runs into the next."""
    hash = blake2b(digest_size=16)
    for content in contents:
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogateescape")  # names may be any bytes
        hash.update(len(content).to_bytes(8, "little"))
        hash.update(content)
    return hash.hexdigest()


def _digest_samples(dataset: Dataset) -> str | None:
    """Digest of what is known of a dataset's samples, through the views and wrappers around it."""
    chosen = []
    while True:
        table = getattr(getattr(dataset, "target_transform", None), "table", None)
        if table:
            chosen.append(repr(sorted(table.items())))
        if (inner := getattr(dataset, "dataset", None)) is None:
            break
        if (indices := getattr(dataset, "indices", None)) is not None:
            indices = np.asarray(indices, dtype=np.int64)
            if not np.array_equal(indices, np.arange(len(inner))):
                chosen.append(indices.tobytes())
        dataset = inner
    source = getattr(dataset, "reader", None) or dataset
    names, labels = _names(source), _labels(source)
    if names is None and labels is None:
        return None
    return _digest(names or "", b"" if labels is None else labels.tobytes(), *chosen)


def _names(source: Any) -> str | None:
    """File names of all samples, one a line, below the folder of the data; None without any."""
    samples = getattr(source, "samples", None)
    if isinstance(samples, list) and samples and isinstance(samples[0][0], str):
        # Not `filenames`: its relative paths take six times as long.
        root = str(getattr(source, "root", "")).rstrip(os.sep)
        names = [sample[0].removeprefix(root) for sample in samples]
    elif hasattr(source, "filenames"):
        try:
            names = [str(name) for name in source.filenames()]
        except (AssertionError, AttributeError, KeyError, NotImplementedError, TypeError):
            return None  # readers of hubs may have no file names
    else:
        return None
    text = "\n".join(names)
    return text if os.sep == "/" else text.replace(os.sep, "/")


def _labels(source: Any) -> np.ndarray | None:
    """Labels of all samples, int64 [N]; None where the dataset does not list them."""
    samples = getattr(source, "samples", None)
    lists = [getattr(source, name, None) for name in _LABELS]
    if isinstance(samples, list) and samples and len(samples[0]) == 2:
        lists.append([label for _, label in samples])
    for labels in lists:
        if labels is None:
            continue
        try:
            return np.asarray(labels, dtype=np.int64)
        except (TypeError, ValueError):
            continue  # not numbers
    return None
