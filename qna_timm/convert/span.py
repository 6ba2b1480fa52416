"""Checkpoints of the released adaptive-span networks: names, queries, keys and values stacked.

The release keeps a span in attention of fixed windows too, where nothing reads it: left out.
"""

import re
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

if TYPE_CHECKING:
    from qna_timm.models.sa_resnet import SAResNet

# Released name -> ours, {} being a block's "stage.block"
_OUTSIDE = {"init.0": "stem.conv", "init.1": "stem.bn", "dense": "head.fc"}
_BLOCK = {
    "conv1.0": "conv1.conv",
    "conv1.1": "conv1.bn",
    "conv2.0": "spatial",
    "conv2.1": "norm2",
    "conv3.0": "conv3.conv",
    "conv3.1": "conv3.bn",
    "shortcut.0": "shortcut.conv",
    "shortcut.1": "shortcut.bn",
}
_SPATIAL = {
    "weight": "weight",
    "rel_h": "rel_pos_h",
    "rel_w": "rel_pos_w",
    "qkv.weight": "qkv.weight",  # stacked here
    "adaptive_mask.current_val": "span_mask.span",
    "conv_out.weight": "conv.weight",
    "conv_out.bias": "conv.bias",
    "qkv_conv.weight": "qkv.weight",
    "qkv_conv.bias": "qkv.bias",
    "attn_out.weight": "proj.weight",
    "attn_out.bias": "proj.bias",
    "key_rel_h": "rel_pos_h",
    "key_rel_w": "rel_pos_w",
}
_PROJECTIONS = ("query_conv.weight", "key_conv.weight", "value_conv.weight")
_MAX_SPAN = 5  # pixels, in the release
_LEARNED_REL_SIZE = 33  # of every learned window in the release, whatever its radius


def is_released_span(state_dict: Mapping[str, Any]) -> bool:
    """Whether names are those of a released adaptive-span network."""
    return any(name.startswith(("init.", "layers.", "dense.")) for name in state_dict)


def _our_name(name: str) -> str | None:
    """Our name of a released tensor, projections being stacked; None for unknown ones."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{leaf}"
    match = re.fullmatch(r"layers\.(\d+)\.(\d+)\.(\w+\.\d+)\.(.+)", name)
    if match is None or match[3] not in _BLOCK:
        return None
    block = f"stages.{match[1]}.{match[2]}.{_BLOCK[match[3]]}"
    if match[3] != "conv2.0":
        return f"{block}.{match[4]}"
    return f"{block}.{_SPATIAL[match[4]]}" if match[4] in _SPATIAL else None


def _stack_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value projections of each layer as one, [3C, C, 1, 1]; released names."""
    stacked = {name: tensor for name, tensor in tensors.items() if not name.endswith(_PROJECTIONS)}
    layers = dict.fromkeys(
        name.removesuffix(end) for name in tensors for end in _PROJECTIONS if name.endswith(end)
    )
    for layer in layers:
        names = [f"{layer}{end}" for end in _PROJECTIONS]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ConversionError(f"missing: {some(missing)}")
        parts = [tensors[name] for name in names]
        if any(part.shape != parts[0].shape for part in parts):
            raise ConversionError(f"{names[0]}: other than keys and values in shape")
        stacked[f"{layer}qkv.weight"] = torch.cat(parts)
    return stacked


def _released_to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in _stack_projections(state_dict).items():
        if name.endswith(".adaptive_mask.mask_template"):
            continue  # a constant
        ours = _our_name(name)
        if ours is None:
            unknown.append(name)
            continue
        if ours.endswith("span_mask.span"):
            tensor = tensor.flatten()  # h, 1
        elif ours.endswith((".rel_pos_h", ".rel_pos_w")) and tensor.ndim == 5:
            tensor = tensor.flatten(1)  # C/2, 1, 1, k, 1 or C/2, 1, 1, 1, k
        tensors[ours] = tensor
    if unknown:
        raise ConversionError(
            f"not a checkpoint of a released adaptive-span network: {some(unknown)} "
            "tensors unknown to it"
        )
    return tensors


def _check_attention(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Windows that differ from the model's, in words; the lists of shapes do not say why."""
    for name, tensor in tensors.items():
        if not name.endswith("spatial.rel_pos_h") or name not in expected:
            continue
        found, wanted = tensor.shape[-1], expected[name].shape[-1]
        if found != wanted and tensor.shape[:-1] == expected[name].shape[:-1]:
            window = f"{found}x{found} windows (a _local model with kernel_size={found})"
            if found == _LEARNED_REL_SIZE:
                window = "learned windows (an _adaptive model)"
            raise ConversionError(f"the checkpoint has {window}, other than the model")


def _check_heads(tensors: Mapping[str, Tensor], num_heads: int) -> None:
    """Heads of fixed windows too, whose other tensors have the same shapes for any number."""
    for name, tensor in tensors.items():
        if name.endswith("span_mask.span") and tensor.shape != (num_heads,):
            raise ConversionError(
                f"the checkpoint has num_heads={tensor.numel()}, the model {num_heads}"
            )


def _check_max_span(model: "SAResNet") -> None:
    """The model's largest radius; that of released spans, fractions of it, is always the same."""
    for name, module in model.named_modules():
        if name.endswith("span_mask") and module.max_span != _MAX_SPAN:
            raise ConversionError(
                f"the checkpoint's spans are fractions of max_span={_MAX_SPAN}, the model has "
                f"max_span={module.max_span}"
            )


def span_state_dict(
    state_dict: Mapping[str, Any], model: "SAResNet", exact: bool = False
) -> dict[str, Tensor]:
    """Parameters of an adaptive-span network under the model's names and in its shapes.

    Args:
        state_dict: Released names or ours, or a training checkpoint that holds them under
            'state_dict_ema', 'state_dict' or 'model'.
        model: The model they are for.
        exact: The first convolution must have the model's input channels.

    Raises:
        ConversionError: tensors missing, unknown or of the wrong shape; another window or number
            of heads than the model's.
    """
    state_dict = unwrap(state_dict)
    expected = model.state_dict()
    if is_released_span(state_dict):
        state_dict = _released_to_ours(state_dict)
        _check_attention(state_dict, expected)
        _check_heads(state_dict, model.num_heads)
        _check_max_span(model)
        state_dict = {
            name: tensor
            for name, tensor in state_dict.items()
            if name in expected or not name.endswith("span_mask.span")
        }
    check_fit(state_dict, model, exact)
    declare_classes(num_classes_of(state_dict), model)
    return state_dict
