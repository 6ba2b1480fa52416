"""What a run has trained, ready for use in other programs."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
from timm.data import create_transform
from torch import Tensor, nn

import qna_timm.models  # noqa: F401  (registers them)
from qna_timm.training.errors import UsageError
from qna_timm.training.storage.checkpoint import find_weights, load_weights, read_metadata


class Trained(NamedTuple):
    """A trained model and what goes before and after it.

    Attributes:
        model: In evaluation mode, on the CPU.
        transform: Of a PIL image, to what the model was evaluated on [in_chans, H, W].
        class_names: In the order of the logits; None where the data has no names.
    """

    model: nn.Module
    transform: Callable[..., Tensor]
    class_names: list[str] | None


def load_run(path: str | Path, use_ema: bool = False) -> Trained:
    """The model that `train.py` has trained, as its checkpoint describes it.

    Args:
        path: A run folder (its best weights, else its last) or one of its weights files.
        use_ema: Prefer the averaged weights, where there are any.

    Raises:
        UsageError: There are no weights at `path`, they are damaged, or the file does not describe
            its model (it is not from `train.py`).
    """
    file = find_weights(path, use_ema)
    about = read_metadata(file)
    if "model_kwargs" not in about:
        raise UsageError(
            f"{file}: does not describe its model, as files of train.py do;"
            f" timm.create_model(NAME, checkpoint_path={str(file)!r}) loads weights alone"
        )
    sizes = {key: about[key] for key in ("num_classes", "in_chans")}
    model = timm.create_model(about["arch"], **sizes, **about["model_kwargs"]).eval()
    load_weights(model, file)
    return Trained(model, create_transform(**about["data_config"]), about["class_names"])
