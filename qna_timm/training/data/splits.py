"""Which folder or archive a split name means, without timm's silent fall-back to the root."""

import argparse
from pathlib import Path

from qna_timm.training.errors import UsageError, closest, closest_path

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "valid", "validation", "eval", "evaluation")
_SPLIT_LIKE = {*TRAIN_NAMES, *EVAL_NAMES, "test"}
_MOST_NAMES_SHOWN = 8


def split_flag(args: argparse.Namespace, is_training: bool) -> str:
    """The flag that names this split: train.py has two, validate.py one."""
    if not hasattr(args, "train_split"):
        return "--split"
    return "--train-split" if is_training else "--val-split"


def is_train_split(split: str, flag: str, eval_names: tuple[str, ...] = ()) -> bool:
    """Whether a split of a dataset with two parts is the training part.

    Args:
        split: Name as given.
        flag: Flag it came from, for the message.
        eval_names: Names of the other part beyond timm's synonyms of `validation`.

    Raises:
        UsageError: the name is a synonym of neither.
    """
    if split in TRAIN_NAMES:
        return True
    known_eval = (*EVAL_NAMES, *eval_names)
    if split in known_eval:
        return False
    raise UsageError(
        f"{flag} {split!r}: this dataset has 'train' and 'validation'"
        f"{closest(split, (*TRAIN_NAMES, *known_eval))}"
    )


def _synonyms(split: str) -> tuple[str, ...]:
    for names in (TRAIN_NAMES, EVAL_NAMES):
        if split in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def _check_root(args: argparse.Namespace) -> Path:
    if not args.data_dir:
        raise UsageError("no data folder named; give one with --data-dir")
    root = Path(args.data_dir)
    if not root.exists():
        raise UsageError(f"--data-dir {root} does not exist{closest_path(root)}")
    if root.is_file() and root.suffix.lower() != ".tar":
        raise UsageError(f"--data-dir {root} is neither a folder nor a .tar archive")
    return root


def _missing_split(root: Path, split: str, flag: str) -> UsageError:
    found = sorted(path.name for path in root.iterdir() if path.is_dir() or path.suffix == ".tar")
    if not found:
        return UsageError(f"--data-dir {root} has no folders; expected {split!r} with images in it")
    shown = ", ".join(found[:_MOST_NAMES_SHOWN])
    if len(found) > _MOST_NAMES_SHOWN:
        shown += f" and {len(found) - _MOST_NAMES_SHOWN} more"
    hint = f"{flag} '' reads {root} itself"
    if root.resolve().name in _SPLIT_LIKE:
        above = root.resolve().parent if root.parent == root else root.parent
        hint = f"{root} is one split: name the folder that holds all of them, {above}"
    return UsageError(
        f"{flag} {split!r}: no such folder in {root}, which holds {shown}"
        f"{closest(split, found)} ({hint})"
    )


def find_split(args: argparse.Namespace, split: str, is_training: bool) -> str:
    """Path of a split's images below `args.data_dir`.

    Tried in this order: the folder or `.tar` of that name, then of timm's synonyms (train,
    training; val, valid, validation, eval, evaluation); the root itself when it bears such a
    name, when the split is the empty string, and in validate.py when nobody named a split and
    nothing in the root looks like one.

    Raises:
        UsageError: the root or the split is missing, naming what was found instead.
    """
    root = _check_root(args)
    flag = split_flag(args, is_training)
    if root.is_file():
        if flag != "--split" and split:
            raise UsageError(
                f"--data-dir {root} is one archive, which holds one split; "
                "put train.tar and validation.tar into a folder and name the folder"
            )
        return str(root)
    names = _synonyms(split.split("[")[0])
    try:
        for name in names:
            for path in (root / name, root / f"{name}.tar"):
                if path.exists():
                    return str(path)
        if root.resolve().name in names:
            return str(root)
        folders = {path.name for path in root.iterdir() if path.is_dir()}
    except OSError as error:
        raise UsageError(f"--data-dir {root}: cannot be read: {error.strerror}") from error
    chosen_by_default = flag == "--split" and "split" not in getattr(args, "given", {})
    if chosen_by_default and folders and not folders & _SPLIT_LIKE:
        return str(root)
    raise _missing_split(root, split, flag)
