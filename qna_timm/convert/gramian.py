"""Checkpoints of the released Gramian networks: names, and the branches' tensors stacked.

The release keeps every branch in modules of its own, numbered after the first name, as in
'ga.3.attn.q.weight'; ours holds a kind of tensor of all branches in one, stacked on dimension 0.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qna_timm.convert.common import (
    ConversionError,
    check_fit,
    declare_classes,
    num_classes_of,
    some,
    unwrap,
)
from qna_timm.convert.cswin import cswin_name

if TYPE_CHECKING:
    from qna_timm.models.gramian import GramianNet

# Released name of a branch's module, the number taken out -> ours below `head`
_BRANCH = {
    "gram_contraction.0": "gram_proj",
    "gram_contraction.1": "gram_proj_norm",
    "gram_layer.blocks.0": "gram_layer",
    "gram_layer.1": "gram_layer",
    "gram_layer.1.attns.0.get_v": "gram_layer.attn.0.lepe",
    "gram_layer.1.attns.1.get_v": "gram_layer.attn.1.lepe",
    "gram_embedding.0": "gram_embed",
    "gram_embedding.1": "gram_embed_norm",
    "ga.norm1": "block.norm1",
    "ga.norm2": "block.norm2",
    "ga.attn.q": "block.q",
    "ga.attn.k": "block.k",
    "ga.attn.v": "block.v",
    "ga.attn.proj": "block.proj",
    "ga.mlp": "block.mlp",
    "ga.gamma_1": "block.ls1.gamma",
    "ga.gamma_2": "block.ls2.gamma",
    "fc": "fc",
}
# The fusion of the ConvNeXt models, there a fifth stage
_FUSE = {
    "stages.4.downsample.0": "fuse.block.shortcut",
    "stages.4.downsample.1": "fuse.block.shortcut_bn",
    "stages.4": "fuse.block",
}


def is_released_gramian(state_dict: Mapping[str, Any]) -> bool:
    """Whether names are those of a released Gramian network."""
    return any(name.startswith("gram_contraction.") for name in state_dict)


def _replace(name: str, table: Mapping[str, str]) -> str | None:
    """The name with its longest beginning (whole parts) that the table has replaced, or None."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        start = ".".join(parts[:end])
        if start in table:
            return ".".join([table[start], *parts[end:]])
    return None


def _trunk_name(name: str, is_cswin: bool) -> str | None:
    if is_cswin:
        ours = cswin_name(name)
        return ours if ours is None or ours.startswith("fuse.") else f"trunk.{ours}"
    fuse = _replace(name, _FUSE)
    if fuse is not None:
        return fuse
    return f"trunk.{name}" if name.startswith(("stem.", "stages.")) else None


def _branch_of(name: str) -> tuple[int, str] | None:
    """(number, our name below `head`) of a branch's tensor; None for others."""
    match = re.fullmatch(r"(gram_contraction|gram_layer|gram_embedding|ga|fc)\.(\d+)\.(.+)", name)
    if match is None:
        return None
    ours = _replace(f"{match[1]}.{match[3]}", _BRANCH)
    return None if ours is None else (int(match[2]), ours)


def _stack(name: str, tensors: list[Tensor]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return tensors[0]
    if name.startswith("head.fc."):
        return torch.stack(tensors)
    stacked = torch.cat(tensors)
    # Grouped maps of single vectors are 1x1 convolutions in the release.
    if stacked.ndim == 4 and name.startswith(
        ("head.gram_embed.", "head.block.", "head.gram_layer.mlp.")
    ):
        stacked = stacked.flatten(1)
    return stacked


def _released_to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    is_cswin = any(name.startswith("stage1_conv_embed.") for name in state_dict)
    branches: dict[str, dict[int, Tensor]] = defaultdict(dict)
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        branch = _branch_of(name)
        if branch is not None:
            branches[f"head.{branch[1]}"][branch[0]] = tensor
            continue
        ours = _trunk_name(name, is_cswin)
        if ours is None:
            unknown.append(name)
        else:
            converted[ours] = tensor
    if unknown:
        raise ConversionError(
            f"not a checkpoint of a released Gramian network: {some(unknown)} tensors unknown to it"
        )
    count = max((len(tensors) for tensors in branches.values()), default=0)
    for name, tensors in branches.items():
        if sorted(tensors) != list(range(count)):
            raise ConversionError(f"{name}: {len(tensors)} of {count} branches have this tensor")
        try:
            converted[name] = _stack(name, [tensors[i] for i in range(count)])
        except RuntimeError:
            raise ConversionError(f"{name}: branches differ in shape") from None
    return converted


def gramian_state_dict(
    state_dict: Mapping[str, Any], model: "GramianNet", exact: bool = False
) -> dict[str, Tensor]:
    """Parameters of a Gramian network under the model's names and in its shapes.

    Args:
        state_dict: Released names or ours, or a training checkpoint that holds them under
            'state_dict_ema', 'state_dict' or 'model'.
        model: The model they are for.
        exact: The first convolution must have the model's input channels.

    The branches' tensors are left out where the model has no branches (global_pool='').

    Raises:
        ConversionError: tensors missing, unknown or of the wrong shape; branches that differ.
    """
    state_dict = unwrap(state_dict)
    if is_released_gramian(state_dict):
        state_dict = _released_to_ours(state_dict)
    num_classes = num_classes_of(state_dict)
    if model.head.global_pool == "":  # no branches
        state_dict = {
            name: tensor for name, tensor in state_dict.items() if not name.startswith("head.")
        }
    check_fit(state_dict, model, exact)
    declare_classes(num_classes, model)
    return state_dict
