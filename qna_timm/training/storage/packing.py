"""Nested Python state as JSON and named tensors: what safetensors can hold, without pickle."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TENSOR, _DICT, _TUPLE, _DTYPE = "tensor", "dict", "tuple", "dtype"


def pack(value: Any, tensors: dict[str, Tensor], name: str = "state") -> Any:
    """Turn nested state into JSON values, moving its tensors aside.

    Dictionaries may have any keys, order and tuples are kept, numpy scalars and arrays become
    numbers and tensors.

    Args:
        value: Dictionaries, lists, tuples, tensors, dtypes, strings, numbers, None.
        tensors: Receives the tensors; JSON refers to them by their keys here.
        name: Path of `value` inside the state, from which the tensors are named.

    Raises:
        TypeError: Something else is inside; the message has its path.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        while name in tensors:  # keys with dots, or 1 beside "1", can spell the same path
            name += "+"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        items = [
            [pack(key, tensors, name), pack(item, tensors, f"{name}.{key}")]
            for key, item in value.items()
        ]
        return {_DICT: items}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    raise TypeError(f"{name}: state of type {type(value).__name__} cannot be saved")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`.

    Raises:
        AttributeError, KeyError, ValueError: `packed` is malformed, or refers to a tensor that
            is not there.
    """
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    (kind, content), *rest = packed.items()
    if rest:
        raise ValueError("malformed state")
    if kind == _TENSOR:
        return tensors[content]
    if kind == _DTYPE and isinstance(getattr(torch, content), torch.dtype):
        return getattr(torch, content)
    if kind == _TUPLE:
        return tuple(unpack(item, tensors) for item in content)
    if kind == _DICT:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    raise ValueError(f"malformed state: {kind}")
