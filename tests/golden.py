"""Golden outputs of the released code, and the rule that makes its weights (tests/data)."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_data import thin
from torch import Tensor

DATA = Path(__file__).parent / "data"


@cache
def info(family: str = "qna") -> dict[str, Any]:
    """The golden files' descriptions."""
    return json.loads((DATA / f"{family}.json").read_text())


@cache
def arrays(family: str = "qna") -> dict[str, np.ndarray]:
    """Outputs, thinned."""
    with np.load(DATA / f"{family}.npz") as data:
        return dict(data)


def flax_leaf(path: str, shape: list[int]) -> np.ndarray:
    """Value of the parameter at a path of the released model, by the golden files' rule."""
    seed = zlib.crc32(path.encode())
    value = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    name = path.rsplit("/", 1)[-1]
    if name in ("kernel", "Wk"):
        return value / np.sqrt(np.prod(shape[:-1])).astype(np.float32)
    if name in ("bias", "mean"):
        return np.float32(0.1) * value
    if name == "scale":
        return 1 + np.float32(0.1) * value
    if name == "var":
        return 1 + np.float32(0.1) * np.abs(value)
    return value if name == "query" else np.float32(0.5) * value


def flax_params(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """All parameters of a released model."""
    return {path: flax_leaf(path, shape) for path, shape in shapes.items()}


def torch_leaf(name: str, shape: list[int]) -> Tensor:
    """Value of a state dict entry of a released PyTorch model, by the golden files' rule."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    value = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    value = value.astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        value = 1 + np.float32(0.1) * np.abs(value)
    elif leaf in ("gamma", "gamma_1", "gamma_2"):
        value = np.float32(0.5) * value
    elif len(shape) >= 2:
        value = value / np.float32(np.sqrt(np.prod(shape[1:])))
    elif leaf == "weight":
        value = 1 + np.float32(0.1) * value
    else:
        value = np.float32(0.1) * value
    return torch.from_numpy(np.asarray(value))


def released_gramian(model: str) -> dict[str, Tensor]:
    """A checkpoint of a released Gramian model, by the rule."""
    entries = info("gramian")[f"entries_{model}"]
    return {name: torch_leaf(name, shape) for name, shape in entries.items()}


def span_leaf(name: str, shape: list[int]) -> Tensor:
    """Value of a state dict entry of a released adaptive-span network, by the golden rule."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    if leaf == "mask_template":
        return torch.linspace(-4.0, 0.0, 5)
    value = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    value = value.astype(np.float32)
    if leaf == "current_val":
        value = np.clip(np.float32(0.1) + np.float32(0.6) * np.abs(np.sin(value)), 0, 1)
    elif leaf == "running_var":
        value = 1 + np.float32(0.1) * np.abs(value)
    elif leaf in ("running_mean", "bias"):
        value = np.float32(0.1) * value
    elif leaf == "weight" and len(shape) >= 2:
        value = value / np.float32(np.sqrt(np.prod(shape[1:])))
    elif leaf == "weight":
        value = 1 + np.float32(0.1) * value
    return torch.from_numpy(np.asarray(value))


def released_span(variant: str) -> dict[str, Tensor]:
    """A checkpoint's tensors of a released adaptive-span network, by the rule."""
    entries = info("sa_resnet")["entries"]
    variant, _, span = variant.partition("_z")  # one span everywhere
    same = variant if variant in entries else "small_adaptive_R2"
    state = {name: span_leaf(name, shape) for name, shape in entries[same].items()}
    for name in state:
        if span and name.endswith("current_val"):
            state[name] = torch.full_like(state[name], float(span))
    return state


def images(seed: int, *shape: int) -> Tensor:
    """The golden files' input, channels-last as they have it."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def relative_error(found: Tensor | np.ndarray, wanted: np.ndarray) -> float:
    """max|found - wanted| / max|wanted|, found being thinned first if it is the whole array."""
    found = found.detach().double().numpy() if isinstance(found, Tensor) else found
    if found.size != wanted.size:
        found = thin(found)
    return float(np.abs(found.ravel() - wanted.ravel()).max() / np.abs(wanted).max())


def projection(path: str, gradient: np.ndarray) -> float:
    """Sum of a gradient against the golden files' signed direction for that path."""
    seed = zlib.crc32(f"proj:{path}".encode())
    return float((gradient * np.random.RandomState(seed).standard_normal(gradient.shape)).sum())
