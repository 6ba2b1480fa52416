"""A model tried on an image before anything is written."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qna_timm.training.errors import UsageError


def check_forward(model: nn.Module, data_config: Mapping[str, Any], num_classes: int) -> None:
    """See that the model takes an image of the run's size and gives a logit per class.

    Args:
        model: On any device, in any precision; its mode is kept.
        data_config: Of which ``input_size`` is read.
        num_classes: Logits expected.

    Raises:
        UsageError: It does not.
    """
    size = tuple(data_config["input_size"])
    parameter = next(model.parameters())
    was_training = model.training
    try:
        image = torch.zeros((1, *size), device=parameter.device, dtype=parameter.dtype)
        with torch.no_grad():
            output = model.eval()(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        shape = " x ".join(map(str, size))
        raise UsageError(
            f"--model, --img-size: the model cannot take {shape} images: {reason}"
        ) from error
    finally:
        model.train(was_training)
    logits = output[0] if isinstance(output, (tuple, list)) else output
    if logits.shape != (1, num_classes):
        raise UsageError(f"--model: gives {tuple(logits.shape[1:])} values, not {num_classes}")


def check_single_images(model: nn.Module, data_config: Mapping[str, Any]) -> None:
    """See that the model trains on batches of one image, which not every batch norm does.

    Raises:
        UsageError: It does not.
    """
    size, parameter = tuple(data_config["input_size"]), next(model.parameters())
    image = torch.zeros((1, *size), device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            copy.deepcopy(model).train()(image)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--batch-size 1: the model needs 2 images or larger ones: {reason}"
        ) from (error)
