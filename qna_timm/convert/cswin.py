"""CSWin's released checkpoints: PyTorch files, renamed.

The same names are in the files of Gramian models on CSWin, for trunk and fusion (`cswin_name`).
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qna_timm.convert.common import (
    ConversionError,
    check_fit,
    declare_classes,
    num_classes_of,
    some,
    unwrap,
)

if TYPE_CHECKING:
    from qna_timm.models.cswin import CSWin

# Place in the released stem, a list that also counts activations and changes of layout -> ours.
# The patch stem has the first two, the deep one all.
_STEM = {
    "0": "0.conv",
    "2": "0.norm",
    "5": "1.conv",
    "7": "1.norm",
    "10": "2.conv",
    "12": "2.norm",
}
_FUSION = {"1": "", "2": "block."}


def cswin_name(name: str) -> str | None:
    """Our name of a tensor in a file of the CSWin or GA-CSWin release.

    Args:
        name: A released name, such as 'stage3.0.attns.1.get_v.weight'.

    Returns:
        Its name in `CSWin`; 'fuse.block...', its name in a Gramian model, for the fusion
        ('stage5', which CSWin itself lacks); None for a name of neither.
    """
    block = re.fullmatch(r"stage([1-5])\.(\d+)\.(.+)", name)
    if block is not None:
        stage, index, leaf = block.groups()
        leaf = re.sub(r"^attns\.(\d)\.get_v\.", r"attn.\1.lepe.", leaf)
        if stage != "5":
            return f"stages.{int(stage) - 1}.blocks.{index}.{leaf}"
        return f"fuse.block.{_FUSION[index]}{leaf}" if index in _FUSION else None
    stem = re.fullmatch(r"stage1_conv_embed\.(\d+)\.(weight|bias)", name)
    if stem is not None:
        return f"stem.{_STEM[stem[1]]}.{stem[2]}" if stem[1] in _STEM else None
    merge = re.fullmatch(r"merge([1-3])\.((?:conv|norm)\.(?:weight|bias))", name)
    if merge is not None:
        return f"stages.{merge[1]}.downsample.{merge[2]}"
    if re.fullmatch(r"(norm|head)\.(weight|bias)", name):
        return name.replace("head.", "head.fc.")
    return None


def is_released_cswin(state_dict: Mapping[str, Any]) -> bool:
    """Whether names are those of the CSWin release (or of the Gramian one on CSWin)."""
    return any(name.startswith("stage1_conv_embed.") for name in state_dict)


def rename_cswin(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A released file's tensors under our names.

    Raises:
        ConversionError: names that are not CSWin's.
    """
    names = {name: cswin_name(name) for name in state_dict}
    unknown = [name for name, ours in names.items() if ours is None]
    if unknown:
        raise ConversionError(
            f"not a checkpoint of the released CSWin: {some(unknown)} tensors unknown to it"
        )
    return {str(ours): state_dict[name] for name, ours in names.items()}


def cswin_state_dict(
    state_dict: Mapping[str, Any], model: "CSWin", exact: bool = False
) -> dict[str, Tensor]:
    """CSWin's parameters under the model's names.

    Args:
        state_dict: A file of the CSWin release, whole or its parameters alone, or our names, which
            pass unchanged.
        model: The model they are for.
        exact: The first convolution must have the model's input channels.

    Raises:
        ConversionError: tensors missing, unknown or of the wrong shape.
    """
    tensors = unwrap(state_dict)
    converted = rename_cswin(tensors) if is_released_cswin(tensors) else dict(tensors)
    check_fit(converted, model, exact)
    declare_classes(num_classes_of(converted), model)
    return converted
