"""What the converters of all releases share: their error, and checks against the model."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_logger = logging.getLogger(__name__)


class ConversionError(ValueError):
    """A checkpoint that cannot become this model's, told in one line."""


def some(names: list[str]) -> str:
    """How many names, and the first three."""
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def raise_misfit(
    model: Any, missing: Iterable[str], unknown: Iterable[str], wrong: Iterable[str]
) -> None:
    """Tell tensors that do not fit the model, if there are any.

    Args:
        model: Named in the message by its architecture.
        missing: Names of the model's tensors that the file lacks.
        unknown: Names in the file that the model lacks.
        wrong: Names with the shapes found and wanted.

    Raises:
        ConversionError: one of the lists is not empty.
    """
    lists = (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
    parts = [f"{what}: {some(list(names))}" for what, names in lists if names]
    if parts:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        arch = cfg.get("architecture", type(model).__name__)
        raise ConversionError(f"the checkpoint is not one of {arch}: {'; '.join(parts)}")


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


def shape_misfits(shapes: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Names in both mappings whose shapes differ, each with both shapes."""
    return [
        f"{name} {tuple(shape)} for {tuple(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]


def unwrap(state_dict: Mapping[str, Any], *keys: str) -> Mapping[str, Tensor]:
    """The state dict inside a training checkpoint: under the first of the keys that is there."""
    for key in keys:
        if isinstance(state_dict.get(key), Mapping):
            return state_dict[key]
    return state_dict
