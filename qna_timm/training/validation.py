"""What validate.py measures: which models and checkpoints, on which data, with which settings."""

import argparse
import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import create_model, get_pretrained_cfg, resolve_model_input_args
from timm.utils import natural_key, reparameterize_model
from torch import Tensor, nn
from torch.utils.data import Dataset

from qna_timm.training.build import script
from qna_timm.training.data.datasets import dataset_classes, open_dataset, open_holdout
from qna_timm.training.data.holdout import HOLDOUT_SPLIT, take_holdout
from qna_timm.training.errors import UsageError
from qna_timm.training.gramian_task import has_branches
from qna_timm.training.names import (
    expand_model_names,
    model_label,
    refused_model,
    resolve_model,
)
from qna_timm.training.storage.checkpoint import (
    FOLDER_FILES,
    STATE_SUFFIX,
    WEIGHTS_SUFFIXES,
    find_weights,
    load_weights,
    read_metadata,
)

_logger = logging.getLogger(__name__)

_DATA_KEYS = ("dataset", "data_dir", "class_map", "input_img_mode", "input_key", "target_key")
_PREPROCESSING_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Candidate:
    """One thing to validate.

    Attributes:
        model: Model name; None takes the checkpoint's word for it.
        checkpoint: Weights file or run folder; empty for timm's published weights.
    """

    model: str | None
    checkpoint: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.model, self.checkpoint)))


def _checkpoints_in(folder: Path) -> list[str]:
    """The run folders and weights files in a folder, in natural order."""
    found = [
        str(path)
        for path in folder.iterdir()
        if (path.is_dir() and any((path / name).is_file() for name in FOLDER_FILES))
        or (path.name.endswith(WEIGHTS_SUFFIXES) and not path.name.endswith(STATE_SUFFIX))
    ]
    if not found:
        raise UsageError(f"--checkpoint {folder}: no checkpoint and no run folder in there")
    return sorted(found, key=natural_key)


def list_candidates(args: argparse.Namespace) -> list[Candidate]:
    """Everything that --model and --checkpoint name together.

    Raises:
        UsageError: several models for one checkpoint, an unknown model, an empty folder.
    """
    model_given = "model" in args.given
    names = expand_model_names(args.model) if model_given or not args.checkpoint else [None]
    if not args.checkpoint:
        return [Candidate(name, "") for name in names]
    if len(names) > 1:
        raise UsageError(f"--model {args.model} names {len(names)} models, --checkpoint fits one")
    folder = Path(args.checkpoint)
    is_run = any((folder / name).is_file() for name in FOLDER_FILES)
    paths = _checkpoints_in(folder) if folder.is_dir() and not is_run else [args.checkpoint]
    return [Candidate(names[0], path) for path in paths]


def settings_for(
    args: argparse.Namespace, candidate: Candidate
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """The settings of one evaluation: what the user gave, then what the checkpoint says.

    Returns:
        A copy of `args`, and the checkpoint's metadata ({} without one).

    Raises:
        UsageError: no architecture or no data is named, by neither.
    """
    settings, metadata = copy.deepcopy(args), {}
    settings.checkpoint = candidate.checkpoint
    if candidate.checkpoint:
        path = find_weights(candidate.checkpoint, args.use_ema)
        if path.name.endswith(STATE_SUFFIX):
            raise UsageError(f"--checkpoint {path} is for train.py --resume; name the run folder")
        if args.use_ema and path.suffix == ".safetensors" and not path.stem.endswith("_ema"):
            _logger.warning("--use-ema: there are no averaged weights beside %s", path)
        settings.checkpoint = str(path)
        metadata = read_metadata(path)
    settings.model = candidate.model or metadata.get("arch")
    if not settings.model:
        raise UsageError(
            f"--checkpoint {candidate.checkpoint} does not say its architecture; name it by --model"
        )
    settings.model, own_kwargs = resolve_model(settings.model, args.model_kwargs)
    if candidate.model and not _describes(metadata, settings.model, own_kwargs):
        # Another model's description does not fit; load_weights will judge the weights.
        metadata = {key: metadata[key] for key in ("arch", "dataset") if key in metadata}
    given = args.given
    if "num_classes" not in given:
        settings.num_classes = metadata.get("num_classes")
    if "in_chans" not in given and "input_size" not in given:
        settings.in_chans = metadata.get("in_chans")
    channels = settings.input_size[0] if settings.input_size else settings.in_chans
    if channels not in (None, trained_channels := metadata.get("in_chans", channels)):
        raise UsageError(
            f"--in-chans {channels}: the model of {path} takes {trained_channels} channels"
        )
    settings.model_kwargs = {**metadata.get("model_kwargs", {}), **own_kwargs}
    preprocessing = metadata.get("data_config", {})
    for key in _PREPROCESSING_KEYS:
        if key not in given and key in preprocessing:
            setattr(settings, key, preprocessing[key])
    _take_data(settings, metadata.get("dataset", {}))
    take_holdout(settings, metadata.get("dataset", {}))
    return settings, metadata


def _describes(metadata: Mapping[str, Any], name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's metadata is about a model of this name, on the backbone asked for."""
    saved = metadata.get("model_kwargs", {}).get("backbone")
    backbone = kwargs.get("backbone", saved)
    return name.partition(".")[0] == metadata.get("arch") and backbone == saved


def _take_data(settings: argparse.Namespace, saved: Mapping[str, Any]) -> None:
    """Fills in the run's own data when the user named none."""
    if not settings.builtin_data:
        return
    if not saved.get("dataset") and not saved.get("data_dir"):
        raise UsageError(
            "no data named; give --data-dir DIR or --dataset NAME (sklearn/digits is built in)"
        )
    for key in _DATA_KEYS:
        if key not in settings.given and saved.get(key):
            setattr(settings, key, saved[key])
    if "split" not in settings.given and saved.get("val_split"):
        settings.split = saved["val_split"]
        settings.given = {**settings.given, "split": settings.split}
    if "num_samples" not in settings.given:
        settings.num_samples = saved.get("val_num_samples")
    folder = settings.data_dir
    if folder and not Path(folder).exists():
        raise UsageError(
            f"no data named, and the checkpoint's folder {folder} is gone: give --data-dir DIR"
        )
    what = " in ".join(filter(None, (settings.dataset, folder)))
    _logger.info("no data named: using the checkpoint's, %s, split %s", what, settings.split)
    if saved.get("val_fraction") and settings.split != HOLDOUT_SPLIT:
        _logger.info("its run was validated on --split %s instead", HOLDOUT_SPLIT)


def _has_published_weights(name: str) -> bool:
    if ":" in name:  # a hub or a local folder
        return True
    config = get_pretrained_cfg(name)
    return config is not None and config.has_weights


def _check_published_classes(name: str, num_classes: int | None) -> None:
    """timm gives published weights a random classifier when other classes are asked for."""
    config = None if ":" in name else get_pretrained_cfg(name)
    if config is not None and num_classes not in (None, config.num_classes):
        raise UsageError(
            f"--num-classes {num_classes}: the published weights of {name} have "
            f"{config.num_classes} classes, and a new classifier would answer at random"
        )


def _trained_size(settings: argparse.Namespace, metadata: Mapping[str, Any]) -> list[int] | None:
    """Input size [C, H, W] that the model has to be built with, for weights of a trained run."""
    if not metadata.get("img_size"):
        return None
    return [metadata.get("in_chans") or settings.in_chans or 3, *metadata["img_size"]]


def build_candidate(
    settings: argparse.Namespace, metadata: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    """Creates the model and loads its weights.

    Returns:
        The model on the CPU, and where its weights are from: a path, `pretrained` or `random`.

    Raises:
        UsageError: timm refuses an argument, the weights cannot be had, or do not fit.
    """
    if settings.fast_norm:
        set_fast_norm()
    request = vars(settings)
    size_given = settings.img_size is not None or settings.input_size is not None
    if trained := _trained_size(settings, metadata):
        request = {**request, "img_size": None, "input_size": trained}
    pretrained = not settings.checkpoint and (
        settings.pretrained or _has_published_weights(settings.model)
    )
    flags = {
        "in_chans": trained[0] if trained else settings.in_chans,
        "num_classes": settings.num_classes,
        "global_pool": settings.gp,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    if pretrained:
        _check_published_classes(settings.model, settings.num_classes)
    try:
        resolved = resolve_model_input_args(
            settings.model, request, **{**settings.model_kwargs, **given}
        )
        model = create_model(pretrained=pretrained, scriptable=settings.torchscript, **resolved)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        hint = "--checkpoint FILE validates weights on this machine" if pretrained else ""
        raise refused_model(settings.model, settings.model_kwargs, error, hint) from error
    if settings.checkpoint:
        load_weights(model, settings.checkpoint, settings.use_ema)
    elif not pretrained:
        _logger.warning(
            "%s has no published weights and no --checkpoint is given: its weights are random",
            settings.model,
        )
    if trained and size_given:
        _resize(model, settings, trained)
    if settings.reparam:
        model = reparameterize_model(model)
    return model, settings.checkpoint or ("pretrained" if pretrained else "random")


def _resize(model: nn.Module, settings: argparse.Namespace, trained: Sequence[int]) -> None:
    """Moves a loaded model to the asked input size, where its weights depend on the size."""
    size = settings.input_size or [trained[0], settings.img_size, settings.img_size]
    if list(size) != list(trained) and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=tuple(size[1:]))


def data_config_for(
    settings: argparse.Namespace, model: nn.Module, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """timm's preprocessing settings for this model.

    Raises:
        UsageError: the asked size or channels do not fit the model.
    """
    request = vars(settings)
    sized = settings.img_size is not None or settings.input_size is not None
    if not sized and (trained := _trained_size(settings, metadata)):
        request = {**request, "input_size": trained}
    try:
        return resolve_input_data_config(model, request, use_test_size=not settings.use_train_size)
    except (ValueError, AssertionError) as error:
        raise UsageError(f"--img-size, --input-size, --in-chans, --mean, --std: {error}") from error


def open_labelled(
    settings: argparse.Namespace, metadata: Mapping[str, Any]
) -> tuple[Dataset, list[str] | None]:
    """Opens the split with the labels of the checkpoint; also the class names, where known.

    With --class-map or --valid-labels the user says what the labels mean, as in timm.
    """
    user_says = "class_map" in settings.given or settings.valid_labels
    trained_names = None if user_says else metadata.get("class_names")
    if settings.split == HOLDOUT_SPLIT:
        train_split = metadata.get("dataset", {}).get("train_split", "train")
        dataset = open_holdout(settings, train_split, class_names=trained_names)
    else:
        dataset = open_dataset(settings, settings.split, False, class_names=trained_names)
    return dataset, trained_names or dataset_classes(dataset)[1]


def read_valid_labels(path: str, num_classes: int) -> Tensor:
    """Class numbers, one a line, of the part of the classes that counts.

    Raises:
        UsageError: it cannot be read, is empty, or a line is no class number of the model.
    """
    wanted = f"expected class numbers from 0 to {num_classes - 1}, one a line"
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise UsageError(f"--valid-labels {path}: {wanted}, found {reason}") from error
    bad = next((n for n in lines if not n.isdecimal() or int(n) >= num_classes), None)
    if bad is not None or not lines:
        raise UsageError(f"--valid-labels {path}: {wanted}, found {repr(bad) if bad else 'none'}")
    return torch.tensor([int(line) for line in lines])


def check_classes(
    settings: argparse.Namespace,
    num_classes: int,
    dataset: Dataset,
    metadata: Mapping[str, Any],
) -> None:
    """Makes sure that labels and logits can mean the same classes.

    Args:
        settings: Flags.
        num_classes: Classes that are scored: the model's, or those of --valid-labels.
        dataset: The opened split.
        metadata: The checkpoint's.

    Raises:
        UsageError: they cannot, with both counts.
    """
    found, _ = dataset_classes(dataset)
    if not num_classes:
        raise UsageError(f"--model {settings.model} has no classifier; give --num-classes")
    if found is None or found == num_classes:
        return
    what = "--valid-labels has" if settings.valid_labels else "the model has"
    if found > num_classes:
        raise UsageError(f"the data has {found} classes, but {what} {num_classes}")
    meant = any(key in settings.given for key in ("num_classes", "class_map", "real_labels"))
    named = metadata.get("class_names") and not settings.valid_labels
    if not meant and not named:
        raise UsageError(
            f"the data has {found} classes, but {what} {num_classes}, so label 0 would mean "
            "another class; give --class-map, --valid-labels, or --num-classes "
            f"{num_classes} if the labels are right"
        )


def _set_trained_size(model: nn.Module, size: Sequence[int]) -> None:
    """Put a run's size of images into timm's configuration, and the map's that follows from it."""
    config = dict(model.default_cfg)
    channels, *published = config["input_size"]
    config["input_size"] = (channels, *size)
    if config.get("pool_size"):
        config["pool_size"] = tuple(
            max(1, side * pool // old)
            for side, pool, old in zip(size, config["pool_size"], published, strict=True)
        )
    model.default_cfg = model.pretrained_cfg = config


def apply_test_pool(
    model: nn.Module, data_config: dict[str, Any], metadata: Mapping[str, Any]
) -> nn.Module:
    """Pools maps of images larger than in training, as --test-pool asks; then nothing is cropped.

    Args:
        model: The model, on the CPU.
        data_config: Of the images; its crop becomes the whole of them.
        metadata: Of the checkpoint: a run knows its images' size, published weights have theirs in
            timm's configuration.

    Raises:
        UsageError: the model's features are no maps that can be pooled.
    """
    if has_branches(model):
        raise UsageError("--test-pool is for average pooling; Gramian heads read maps of any size")
    if size := metadata.get("img_size"):
        _set_trained_size(model, size)
    pooled, applied = apply_test_time_pool(model, data_config)
    if not applied:
        now, trained = (config["input_size"][1:] for config in (data_config, model.default_cfg))
        _logger.warning(
            "--test-pool changes nothing: images of %d x %d are no larger than those of training, "
            "%d x %d", *now, *trained
        )  # fmt: skip
        return model
    data_config["crop_pct"] = 1.0
    try:
        with torch.no_grad():
            pooled.eval()(torch.zeros(1, *data_config["input_size"]))
    except (RuntimeError, TypeError) as error:
        raise UsageError("--test-pool needs a model with feature maps [B, C, H, W]") from error
    return pooled


def place(model: nn.Module, settings: argparse.Namespace, device: torch.device) -> nn.Module:
    """Moves the model to its device, precision and memory layout, and compiles it if asked."""
    dtype = getattr(torch, settings.model_dtype) if settings.model_dtype else None
    model = model.to(device=device, dtype=dtype).eval()
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings.torchscript:
        return script(model, model_label(settings.model, settings.model_kwargs))
    if settings.torchcompile:
        torch.compiler.reset()
        return torch.compile(model, backend=settings.torchcompile, mode=settings.torchcompile_mode)
    return model
