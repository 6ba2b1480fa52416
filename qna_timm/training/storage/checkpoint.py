"""Weights on disk: one safetensors file per set of weights, described in the file's header.

The tensors carry timm's names, so timm loads the files as they are. The header holds, under one
key, a JSON object (the *metadata*) that says what the weights are:

- ``arch``, ``num_classes``, ``in_chans``, ``model_kwargs``: ``timm.create_model(arch,
  num_classes=..., in_chans=..., **model_kwargs)`` builds the model;
- ``img_size`` ([height, width], pixels) and ``data_config`` (timm's ``input_size``, ``mean``,
  ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``): the images it was evaluated on;
- ``class_names`` (list, or None where the data has no names);
- ``dataset`` (the data flags of the run: ``dataset``, ``data_dir``, ``val_split``, ...);
- ``epoch`` (from 0), ``update`` (done in the run, None where not known), ``metric``,
  ``metric_name``, ``ema`` (whether the weights are the averaged ones).

The header also holds the digest of the file, see `files`: what is read here is what was written.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from timm.utils import unwrap_model
from torch import Tensor, nn

from qna_timm.training.errors import UsageError, closest
from qna_timm.training.names import model_label
from qna_timm.training.storage.files import STEP_KEY, check_digest, save_tensors

METADATA_KEY = "qna_timm"
STATE_SUFFIX = ".state.safetensors"
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin")
# Where a folder's weights are looked for, first match first; the last two are hub exports.
FOLDER_FILES = ("best.safetensors", "last.safetensors", "model.safetensors", "pytorch_model.bin")
# In the names of timm's `SplitBatchNorm2d`.
_OF_SPLIT_NORM = ".aux_bn."


def ema_path(path: Path) -> Path:
    """``best.safetensors`` -> ``best_ema.safetensors``."""
    return path.with_name(f"{path.stem}_ema{path.suffix}")


def find_weights(path: str | Path, use_ema: bool = False) -> Path:
    """The weights file that `path` stands for.

    Args:
        path: A file, or a run folder (its best weights, else its last).
        use_ema: Prefer the averaged weights beside the plain ones, where there are any.

    Raises:
        UsageError: There is nothing at `path`, or a folder without weights.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            names = ", ".join(FOLDER_FILES)
            raise UsageError(f"{path}: no weights in this folder (looked for {names})")
        path = found[0]
    elif not path.is_file():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UsageError(f"{path}: no such checkpoint file or folder{closest(path.name, siblings)}")
    if use_ema and ema_path(path).is_file():
        return ema_path(path)
    return path


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the readers raise on a damaged or foreign file into one line."""
    try:
        yield
    except (
        SafetensorError,
        pickle.UnpicklingError,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = re.split(r"\n|[.] ", str(error).strip())[0][:160] or "the file ends early"
        kind = type(error).__name__
        raise UsageError(f"{path}: not a readable checkpoint ({kind}: {reason})") from error


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def read_header(path: Path) -> dict[str, str]:
    """The string-to-string header of a safetensors file.

    Raises:
        UsageError: `path` is not a whole safetensors file.
    """
    with _readable(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _torch_load(path: Path) -> Any:
    """A `torch.save` file, tensors and plain Python only; timm's hold their arguments too."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        # Files in torch's old format cannot be mapped; mapping saves reading what is not wanted.
        mmap = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _foreign_metadata(checkpoint: Any) -> dict[str, Any]:
    """What timm's own checkpoints say about themselves, in our words."""
    if not isinstance(checkpoint, Mapping):
        return {}
    return {key: checkpoint[key] for key in ("arch", "epoch", "metric") if key in checkpoint}


def read_metadata(path: str | Path, use_ema: bool = False) -> dict[str, Any]:
    """The metadata of a checkpoint file or run folder (see the module's docstring for its keys).

    timm's own checkpoints give ``arch``, ``epoch``, ``metric``; other files give ``{}``.

    Raises:
        UsageError: There is no such file, or it is damaged or not a checkpoint.
    """
    path = find_weights(path, use_ema)
    if _is_safetensors(path):
        check_digest(path)
        return stored_metadata(path)
    with _readable(path):
        return _foreign_metadata(_torch_load(path))


def stored_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file, without a look at the rest of the file.

    Raises:
        UsageError: There is no such file, or its header is not readable.
    """
    with _readable(path):
        return json.loads(read_header(path).get(METADATA_KEY, "{}"))


def read_weights(
    path: str | Path, use_ema: bool = False, prefer_ema: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata of a checkpoint file or run folder, on the CPU.

    Reads our files, any ``.safetensors``, and timm's ``.pth``/``.pth.tar`` (tensors and plain
    Python only, nothing in the file is executed).

    Args:
        path: File, or run folder (its best weights, else its last).
        use_ema: Take the averaged weights if there are any.
        prefer_ema: Do so within a file that holds both, as timm does where it loads weights to
            start from; the metadata's ``ema`` says whether it had them.

    Raises:
        UsageError: There is no such file, or it is damaged or not a checkpoint.
    """
    path = find_weights(path, use_ema)
    if path.name.endswith(STATE_SUFFIX):
        weights = path.name.replace(STATE_SUFFIX, ".safetensors")
        raise UsageError(f"{path}: state for --resume, not weights; the weights are in {weights}")
    if _is_safetensors(path):
        check_digest(path)
        with _readable(path):
            return load_file(path), stored_metadata(path)
    with _readable(path):
        checkpoint = _torch_load(path)
        weights, is_ema = _weights_entry(checkpoint, use_ema or prefer_ema)
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{path}: not a checkpoint (no dictionary of tensors inside)")
    metadata = _foreign_metadata(checkpoint)
    return clean_state_dict(weights), {**metadata, "ema": True} if is_ema else metadata


def _weights_entry(checkpoint: Any, use_ema: bool) -> tuple[dict[str, Tensor], bool]:
    """The state dict inside what ``torch.load`` returned, under the names timm and others use, and
    whether it is that of averaged weights."""
    if not isinstance(checkpoint, Mapping):
        return {}, False
    ema_keys = ("state_dict_ema", "model_ema") if use_ema else ()
    for key in (*ema_keys, "state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            return dict(checkpoint[key]), key in ema_keys
    return dict(checkpoint), False


def load_weights(model: nn.Module, path: str | Path, use_ema: bool = False) -> dict[str, Any]:
    """Load a checkpoint into `model`, every tensor of it and no other.

    Returns:
        The checkpoint's metadata.

    Raises:
        UsageError: Not a checkpoint, or not of this model; the line says what differs.
    """
    weights, metadata = read_weights(path, use_ema)
    model = unwrap_model(model)
    check_weights(model, weights, metadata, path)
    model.load_state_dict(weights)
    return metadata


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Module names of the model's classifier layers, from its pretrained cfg."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def is_classifier_key(model: nn.Module, key: str) -> bool:
    """Whether the state dict entry `key` belongs to the model's classifier."""
    return key.rpartition(".")[0] in classifier_names(model)


def classes_of(key: str, tensor: Tensor) -> int:
    """Classes of the classifier that has this weight or bias.

    They come first, or after the branches: weight [M, classes, D], bias [M, classes].
    """
    of_branches = tensor.ndim == (3 if key.endswith("weight") else 2)
    return tensor.shape[int(of_branches)]


def check_weights(
    model: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping[str, Any], path: str | Path
) -> None:
    """Compare a state dict with what `model` expects.

    Raises:
        UsageError: Names or shapes differ; one line that says which, and what to do about it.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    extra = [key for key in weights if key not in expected]
    shapes = [k for k in expected if k in weights and expected[k].shape != weights[k].shape]
    if not (missing or extra or shapes):
        return
    if not missing and not extra and all(is_classifier_key(model, key) for key in shapes):
        key = shapes[0]
        found, wanted = classes_of(key, weights[key]), classes_of(key, expected[key])
        if found != wanted:
            raise UsageError(
                f"{path}: the checkpoint has {found} classes, the model {wanted}"
                f" (--num-classes {found} fits)"
            )
    arch = model_label(metadata.get("arch", ""), metadata.get("model_kwargs", {}))
    ours = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    ours = model_label(ours, getattr(model, "_model_args", {}))
    text = f"{path}: not a checkpoint of {ours}"
    if arch and arch != ours:
        text += f" but of {arch}"
    details = []
    for what, keys in (("missing", missing), ("unexpected", extra)):
        if keys:
            details.append(f"{len(keys)} tensors {what}, such as {keys[0]}")
    if shapes:
        found, wanted = tuple(weights[shapes[0]].shape), tuple(expected[shapes[0]].shape)
        details.append(f"{len(shapes)} of another shape, such as {shapes[0]} {found} not {wanted}")
    raise UsageError(f"{text}: {'; '.join(details)}")


def save_weights(path: Path, model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a model's weights with timm's names, wrappers (DDP, compile, EMA) left out.

    Left out as well are the batch norms that ``--split-bn`` has for augmented images alone: what is
    evaluated and loaded elsewhere is the model that timm creates.

    Args:
        path: Ends in ``.safetensors``.
        model: The model, wrapped or not.
        metadata: JSON values, see the module's docstring.
    """
    header = {METADATA_KEY: json.dumps(dict(metadata))}
    if metadata.get("epoch") is not None:
        update = metadata.get("update")
        done = "" if update is None else f", update {update}"
        header[STEP_KEY] = f"epoch {metadata['epoch'] + 1}{done}"
    weights = unwrap_model(model).state_dict()
    own = {name: tensor for name, tensor in weights.items() if _OF_SPLIT_NORM not in name}
    save_tensors(path, own, header)
