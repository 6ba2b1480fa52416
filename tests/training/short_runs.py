"""Runs of seconds on the digits, and what they leave."""

import csv
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digits(output: Path, *argv: str) -> list[str]:
    """A run of seconds; later flags go before these."""
    words = "--dataset sklearn/digits --model test_vit --img-size 32 -b 16 -j 0 --device cpu"
    words += " --opt adamw --lr 1e-3 --warmup-epochs 1 --epochs 2 --max-steps 3"
    words += " --val-num-samples 64 --log-interval 1"
    return [*words.split(), "--output", str(output), *argv]


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two nested states differ in any bit."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [where]
        return list(itertools.chain(*(differences(one[k], other[k], f"{where}.{k}") for k in one)))
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return list(itertools.chain(*(differences(a, b, f"{where}.{i}") for i, (a, b) in pairs)))
    return [] if one == other or (one != one and other != other) else [where]
