"""What the converters of all releases share: their error, and checks against the model."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

HEAD_NAMES = ("head.fc.weight", "head.fc.bias")


class ConversionError(ValueError):
    """A checkpoint that cannot become this model's, told in one line."""


def some(names: list[str]) -> str:
    """How many names, and the first three."""
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def num_classes_of(state_dict: Mapping[str, Tensor]) -> int:
    """Classes of a state dict's classifier, weight [..., classes, features]; 0 without one."""
    weight = state_dict.get("head.fc.weight")
    return 0 if weight is None or weight.ndim < 2 else weight.shape[-2]


def check_fit(state_dict: Mapping[str, Tensor], model: Any, exact: bool) -> None:
    """Compare names and shapes with the model's.

    A classifier of another number of classes is not compared: timm drops it.

    Args:
        state_dict: Tensors under the model's names.
        model: The model they are for; its cfg names the first convolution.
        exact: The first convolution must have the model's input channels, which timm would adapt.

    Raises:
        ConversionError: tensors missing, unknown or of the wrong shape.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    cfg = getattr(model, "pretrained_cfg", None) or {}
    head = [shapes[name] for name in HEAD_NAMES if name in shapes]
    optional = set(HEAD_NAMES) if len(head) != 1 else set()
    missing = [name for name in {**expected, **dict.fromkeys(HEAD_NAMES)} if name not in shapes]
    missing = [name for name in missing if name not in optional and not _is_counter(name)]
    unknown = [name for name in shapes if name not in expected and name not in HEAD_NAMES]
    if num_classes_of(state_dict) != model.num_classes:
        expected = {name: shape for name, shape in expected.items() if name not in HEAD_NAMES}
        if len(head) == 2:
            expected["head.fc.bias"] = head[0][:-1]
    first = f"{cfg.get('first_conv')}.weight"
    if not exact and first in expected and len(shapes.get(first, ())) == len(expected[first]):
        out_chans, _, *kernel = expected[first]
        expected[first] = torch.Size((out_chans, shapes[first][1], *kernel))
    wrong = [
        f"{name} {tuple(shape)} for {tuple(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    lists = (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
    parts = [f"{what}: {some(names)}" for what, names in lists if names]
    if parts:
        arch = cfg.get("architecture", type(model).__name__)
        raise ConversionError(f"the checkpoint is not one of {arch}: {'; '.join(parts)}")


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def declare_classes(found: int, model: Any) -> None:
    """Tell timm how many classes the file has, and the user where the classifier stays fresh.

    timm compares the model's number with the cfg's and drops the classifier where they differ, in
    silence and whatever the file holds.

    Args:
        found: Classes of the file's classifier, 0 without one.
        model: The model that the file is for.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg:
        cfg["num_classes"] = found
    if model.num_classes not in (0, found):
        _logger.warning(
            f"checkpoint has {found or 'no'} classes, the model {model.num_classes}: "
            "the classifier is fresh, the rest is loaded"
        )


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, averaged weights first; or what was given.

    Names lose what wrappers put before them: DistributedDataParallel's and torch.compile's.
    """
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): x for name, x in state_dict.items()}
