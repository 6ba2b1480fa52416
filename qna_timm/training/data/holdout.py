"""A part of the training split that is held out for validation: chosen by a seed of its own."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from qna_timm.training.data.views import ImageView, class_names_of
from qna_timm.training.errors import UsageError

HOLDOUT_SPLIT = "train-holdout"
"""What validate.py's `--split` calls the part that training held out."""

DEFAULT_SEED = 42


def check_holdout_flags(args: argparse.Namespace, origins: Mapping[str, str]) -> None:
    """See that train.py's flags name one validation set; settles `val_seed`.

    Args:
        args: Flags of train.py.
        origins: Where each came from, to begin a message with.

    Raises:
        UsageError: --val-seed without --val-fraction, or --val-split beside it.
    """
    if args.val_fraction is None:
        if args.val_seed is not None:
            raise UsageError(f"{origins['val_seed']}: needs --val-fraction, whose share it chooses")
        return
    if args.val_split != "validation":
        raise UsageError(
            f"{origins['val_split']} '{args.val_split}': --val-fraction validates on a part of the "
            "training split instead; give one of the two"
        )
    if args.val_seed is None:
        args.val_seed = DEFAULT_SEED


def check_holdout_split(args: argparse.Namespace, origins: Mapping[str, str]) -> None:
    """See that validate.py's --val-fraction and --val-seed are about the split it reads.

    Raises:
        UsageError: they are given with another split.
    """
    for key in ("val_fraction", "val_seed"):
        if getattr(args, key) is not None and args.split != HOLDOUT_SPLIT:
            raise UsageError(f"{origins[key]}: needs --split {HOLDOUT_SPLIT}")


def take_holdout(args: argparse.Namespace, saved: Mapping[str, Any]) -> None:
    """Fill in what the run held out where validate.py's flags do not say it.

    Args:
        args: Flags of validate.py; with another split nothing happens.
        saved: What the checkpoint says of the run's data.

    Raises:
        UsageError: neither says it.
    """
    if args.split != HOLDOUT_SPLIT:
        return
    if args.val_fraction is None:
        args.val_fraction = saved.get("val_fraction")
    if args.val_fraction is None:
        raise UsageError(
            f"--split {HOLDOUT_SPLIT}: the checkpoint does not say what its run held out; "
            "--val-fraction does"
        )
    if args.val_seed is None:
        seed = saved.get("val_seed")
        args.val_seed = DEFAULT_SEED if seed is None else seed


def split_indices(num_samples: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out, each ascending.

    Held out are the first round(fraction * num_samples) of a permutation seeded by `seed`.

    Args:
        num_samples: Samples of the training split.
        fraction: Share to hold out, above 0 and below 1.
        seed: 0 to 2**32 - 1.

    Raises:
        UsageError: one of the two parts would be empty.
    """
    count = round(num_samples * fraction)
    if not 0 < count < num_samples:
        raise UsageError(
            f"--val-fraction {fraction:g}: of {num_samples} training images it holds out {count}; "
            "both parts need at least one"
        )
    # RandomState's stream is frozen by numpy, so a split is the same with every version.
    order = np.random.RandomState(seed).permutation(num_samples)
    return np.sort(order[count:]), np.sort(order[:count])


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[ImageView, ImageView]:
    """The training part and the held-out part of a training split, each with its own transform.

    Args:
        dataset: The whole training split.
        fraction: Share to hold out.
        seed: Chooses which.

    Raises:
        UsageError: the dataset is a stream, or a part would be empty.
    """
    if isinstance(dataset, IterableDataset):
        raise UsageError(
            "--val-fraction: this dataset is a stream, which cannot be split by number; "
            "--val-split names its validation part"
        )
    mode, names = getattr(dataset, "input_img_mode", None), class_names_of(dataset)
    train, held_out = (
        ImageView(dataset, mode, indices=indices.tolist(), class_names=names)
        for indices in split_indices(len(dataset), fraction, seed)
    )
    return train, held_out


def check_same_holdout(
    args: argparse.Namespace, saved: Mapping[str, Any], state_path: Path
) -> None:
    """See that a resumed run does not validate on images that it has trained on.

    Args:
        args: Flags of this run.
        saved: Flags of the run that is resumed.
        state_path: Where they are from, for the message.

    Raises:
        UsageError: another part was held out.
    """
    now, was = (
        (args.val_fraction, args.val_seed),
        (saved.get("val_fraction"), saved.get("val_seed")),
    )
    if now != was:
        raise UsageError(
            f"--val-fraction: {state_path} has {_told(*was)}, this run {_told(*now)}; a resumed "
            "run keeps its split (--initial-checkpoint starts a new one from the weights)"
        )


def _told(fraction: float | None, seed: int | None) -> str:
    return "nothing held out" if fraction is None else f"{fraction:g} held out by seed {seed}"
