"""QnA-ViT's released checkpoints: Flax files, read and renamed without JAX or Flax.

One msgpack file each (`read_flax_checkpoint`), whose parameters become ours (`qna_vit_state_dict`).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
from qna_timm.ops import resize_offset_table

if TYPE_CHECKING:
    from qna_timm.models.qna_vit import QnAViT


# msgpack extension types of Flax's serialisation
_EXT_ARRAY, _EXT_COMPLEX, _EXT_SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"


def _decode_array(data: bytes) -> np.ndarray:
    """(shape, dtype name, C-order bytes), itself msgpack; only plain number types are made."""
    import msgpack

    shape, dtype, raw = msgpack.unpackb(data, raw=False)
    if dtype == "bfloat16":
        bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    if np.dtype(dtype).kind not in "biufc":
        raise ValueError(f"array of type {dtype}")
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)


def _decode_ext(code: int, data: bytes) -> Any:
    if code in (_EXT_ARRAY, _EXT_SCALAR):
        return _decode_array(data)
    if code == _EXT_COMPLEX:
        import msgpack

        return complex(*msgpack.unpackb(data))
    raise ValueError(f"unknown extension type {code}")


def _join_chunks(node: Any) -> Any:
    """Put arrays together that Flax stores in chunks (above 2^30 bytes)."""
    if not isinstance(node, dict):
        return node
    if node.get(_CHUNKED):
        shape = [node["shape"][str(i)] for i in range(len(node["shape"]))]
        chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
        return np.concatenate(chunks).reshape([int(side) for side in shape])
    return {key: _join_chunks(value) for key, value in node.items()}


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{path}/"))
        elif isinstance(value, np.ndarray):
            flat[path] = value
    return flat


def _checkpoint_file(path: Path) -> Path:
    """The file itself, or a folder's checkpoint_<step> of the largest step."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConversionError("no such file or folder")
    steps = {
        int(match[1]): file
        for file in path.iterdir()
        if (match := re.fullmatch(r"checkpoint_(\d+)", file.name)) and file.is_file()
    }
    if not steps:
        raise ConversionError("no file checkpoint_<step> in this folder")
    return steps[max(steps)]


def _other_format(content: bytes) -> str | None:
    """What a file is that is not msgpack, by its first bytes."""
    if content.startswith((b"PK\x03\x04", b"\x80\x02")):  # torch.save's archive, or a pickle
        return "PyTorch"
    return "safetensors" if content[8:10] == b'{"' else None


def read_flax_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Parameters and batch statistics of a Flax checkpoint file, or of a folder's newest one.

    Optimizer state and the rest are left out. Nothing in the file is executed.

    Args:
        path: A msgpack file as `flax.training.checkpoints` wrote them in 2022, or a folder of
            `checkpoint_<step>` files.

    Returns:
        Arrays by '/'-joined path, as in 'QnAStage_0/QnA_Block_1/FusedKQnA_0/query'.

    Raises:
        ConversionError: no such file, not msgpack, of another format, truncated, or without
            parameters.
    """
    import msgpack

    file = _checkpoint_file(Path(path))
    content = file.read_bytes()
    if other := _other_format(content):
        raise ConversionError(
            f"{file.name} is a {other} file; the released QnA-ViT files are Flax msgpack"
        )
    try:
        tree = msgpack.unpackb(content, ext_hook=_decode_ext, raw=False, strict_map_key=False)
        tree = _join_chunks(tree)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ConversionError(
            f"{file.name} is not a whole Flax msgpack checkpoint ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'truncated'})"
        ) from None
    if not isinstance(tree, dict) or not isinstance(tree.get("params"), dict):
        raise ConversionError(f"{file.name} is a msgpack file without a 'params' entry")
    arrays = _flatten(tree["params"])
    if isinstance(tree.get("batch_stats"), dict):
        arrays.update(_flatten(tree["batch_stats"]))
    if not arrays:
        raise ConversionError(f"{file.name}: 'params' holds no arrays")
    return arrays


# Flax leaf of a block -> (our name inside the block, layout)
_QNA_LAYER = {
    "query": ("query", "same"),
    "Wk": ("k.weight", "matrix"),
    "Wk_b": ("k.bias", "flat"),
    "to_v/kernel": ("v.weight", "matrix"),
    "to_v/bias": ("v.bias", "same"),
    "to_out/kernel": ("proj.weight", "matrix"),
    "to_out/bias": ("proj.bias", "same"),
    "attn_scale_weights": ("query_weight", "offsets"),
    "attn_scale_pos": ("query_weight", "offsets"),
    "rpe_bias": ("rel_pos_bias", "offsets"),
    "absolute_pos_embedding": ("pos_embed", "same"),
}
_MSA_LAYER = {
    "to_qkv/kernel": ("qkv.weight", "qkv"),
    "to_qkv/bias": ("qkv.bias", "qkv"),
    "to_out/kernel": ("proj.weight", "matrix"),
    "to_out/bias": ("proj.bias", "same"),
    "RelativePositionalEmbedding_0/rpe_bias": ("rel_pos_bias", "same"),
}
_BLOCK = {
    "LayerNorm_0/scale": ("norm1.weight", "same"),
    "LayerNorm_0/bias": ("norm1.bias", "same"),
    "LayerNorm_1/scale": ("norm2.weight", "same"),
    "LayerNorm_1/bias": ("norm2.bias", "same"),
    "MlpBlock_0/Dense_0/kernel": ("mlp.fc1.weight", "matrix"),
    "MlpBlock_0/Dense_0/bias": ("mlp.fc1.bias", "same"),
    "MlpBlock_0/Dense_1/kernel": ("mlp.fc2.weight", "matrix"),
    "MlpBlock_0/Dense_1/bias": ("mlp.fc2.bias", "same"),
    "LayerScale_0/scale_param": ("ls1.gamma", "same"),
    "LayerScale_1/scale_param": ("ls2.gamma", "same"),
    "Conv_0/kernel": ("shortcut.proj.weight", "conv1x1"),
    "AvgPool1x1Conv_0/Conv_0/kernel": ("shortcut.proj.weight", "conv1x1"),
    **{f"FusedKQnA_0/{k}": (f"attn.{name}", layout) for k, (name, layout) in _QNA_LAYER.items()},
    **{
        f"MultiHeadSelfAttention_0/{k}": (f"attn.{name}", layout)
        for k, (name, layout) in _MSA_LAYER.items()
    },
}
_HEAD = {
    "LayerNorm_0/scale": ("norm.weight", "same"),
    "LayerNorm_0/bias": ("norm.bias", "same"),
    "head_logits/kernel": ("head.fc.weight", "matrix"),
    "head_logits/bias": ("head.fc.bias", "same"),
    **{
        f"FusedKQnA_0/{k}": (f"attn_pool.{name}", layout)
        for k, (name, layout) in _QNA_LAYER.items()
    },
}
_STEM = {
    "BatchNorm_0/scale": ("stem.bn.weight", "same"),
    "BatchNorm_0/bias": ("stem.bn.bias", "same"),
    "BatchNorm_0/mean": ("stem.bn.running_mean", "same"),
    "BatchNorm_0/var": ("stem.bn.running_var", "same"),
}


def _qna_vit_name(path: str, window_depths: Counter[str]) -> tuple[str, str] | None:
    """Our name and the layout of a Flax leaf; None for a path that is not QnA-ViT's.

    Args:
        path: '/'-joined path.
        window_depths: Window-attention blocks by stage number: they come first in a stage, and
            the release numbers the QnA blocks after them from 1 again.
    """
    scope, _, leaf = path.partition("/")
    if scope == "ClassificationHead_0":
        return _HEAD.get(leaf)
    if scope == "StemBlock_0":
        # the convolution is 'conv_1x1' in the patch stem and named otherwise in the ResNet one
        return ("stem.conv.weight", "conv") if leaf.endswith("/kernel") else _STEM.get(leaf)
    match = re.fullmatch(r"(LSA|QnA)Stage_(\d+)/(MSA|QnA)_Block_(\d+)(_stride_2)?/(.+)", path)
    if match is None or match[6] not in _BLOCK:
        return None
    stage, number = int(match[2]), int(match[4])
    if match[5]:
        block = f"stages.{stage + 1}.downsample"
    else:
        first = window_depths[match[2]] if match[3] == "QnA" else 0
        block = f"stages.{stage}.blocks.{first + number - 1}"
    name, layout = _BLOCK[match[6]]
    return f"{block}.{name}", layout


def _to_layout(array: Tensor, layout: str, num_queries: int, num_heads: int) -> Tensor:
    """A Flax leaf in our layout; see the tables above for who has which."""
    if layout == "matrix":  # in, out
        return array.t()
    if layout == "conv":  # kh, kw, in, out
        return array.permute(3, 2, 0, 1)
    if layout == "conv1x1":  # 1, 1, in, out
        return array[0, 0].t()
    if layout == "flat":
        return array.flatten()
    if layout == "offsets":  # [1, 1,] K, Q*h or Q, h, query-major
        size = math.prod(array.shape)
        return array.reshape(size // (num_queries * num_heads), num_queries, num_heads)
    if layout == "qkv":  # columns go head, part, d there and part, head, d here
        columns = array.unflatten(-1, (num_heads, 3, -1)).transpose(-3, -2).flatten(-3)
        return columns.t() if columns.ndim == 2 else columns
    return array


def is_flax_qna_vit(state_dict: Mapping[str, Any]) -> bool:
    """Whether names are those of the released QnA-ViT."""
    return any(name.startswith(("StemBlock_0/", "QnAStage_0/")) for name in state_dict)


def _attention_layer(name: str, model: "QnAViT") -> Any:
    """The attention layer that the parameter belongs to, or None."""
    match = re.match(r"(.+\.attn|attn_pool)\.", name)
    try:
        return model.get_submodule(match[1]) if match else None
    except AttributeError:
        return None


def _flax_to_ours(arrays: Mapping[str, Any], model: "QnAViT") -> dict[str, Tensor]:
    blocks = {
        match[0]: match[1]
        for path in arrays
        if (match := re.match(r"LSAStage_(\d+)/MSA_Block_\d+", path))
    }
    window_depths = Counter(blocks.values())
    state_dict: dict[str, Tensor] = {}
    unknown = []
    for path, array in arrays.items():
        found = _qna_vit_name(path, window_depths)
        if found is None:
            unknown.append(path)
            continue
        name, layout = found
        if isinstance(array, np.ndarray):  # a copy of its own, in the machine's byte order
            array = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        tensor = torch.as_tensor(array)
        if not tensor.is_floating_point():
            raise ConversionError(f"{path} holds {tensor.dtype}, not floating-point numbers")
        layer = _attention_layer(name, model)
        heads = getattr(layer, "num_queries", 1), getattr(layer, "num_heads", 1)
        try:
            state_dict[name] = _to_layout(tensor, layout, *heads).contiguous()
        except (RuntimeError, IndexError):
            state_dict[name] = tensor  # of another model: `check_fit` tells its shape
    if unknown:
        raise ConversionError(
            f"not a checkpoint of the released QnA-ViT: {some(unknown)} tensors unknown to it"
        )
    return state_dict


def _table_sizes(module: Any, rows: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(grid of a file's table, grid of the module's) for a table with that many rows."""
    size = getattr(module, "window_size", None)
    new = (2 * size[0] - 1, 2 * size[1] - 1) if size is not None else module.kernel_size
    if rows == new[0] * new[1]:
        return None  # made for the same window, square or not
    side = math.isqrt(rows)
    return ((side, side), new) if side * side == rows else None


def _resize_tables(state_dict: dict[str, Tensor], model: "QnAViT") -> None:
    for name, tensor in state_dict.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf not in ("rel_pos_bias", "query_weight", "pos_embed"):
            continue
        if tensor.ndim == 0 or tensor.shape[0] < 2:
            continue
        try:
            module = model.get_submodule(prefix)
        except AttributeError:
            continue
        sizes = _table_sizes(module, tensor.shape[0])
        if sizes is not None:
            state_dict[name] = resize_offset_table(tensor, *sizes)


def qna_vit_state_dict(
    state_dict: Mapping[str, Any], model: "QnAViT", exact: bool = False
) -> dict[str, Tensor]:
    """QnA-ViT parameters under the model's names and in its shapes.

    Args:
        state_dict: Released names (`read_flax_checkpoint`) or ours; ours pass unchanged but for
            tables of another window or kernel size, which are resized.
        model: The model they are for.
        exact: Resize nothing: tables of another size are tensors of the wrong shape.

    Raises:
        ConversionError: tensors missing, unknown or of the wrong shape.
    """
    converted = unwrap(state_dict)
    if is_flax_qna_vit(converted):
        converted = _flax_to_ours(converted, model)
    if not exact:
        _resize_tables(converted, model)
    if "stem.bn.running_mean" in converted:
        converted.setdefault("stem.bn.num_batches_tracked", torch.tensor(0))
    check_fit(converted, model, exact)
    declare_classes(num_classes_of(converted), model)
    return converted
