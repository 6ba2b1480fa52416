"""Mean losses of an epoch."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qna_timm.training.processes.distributed import sum_over_processes


class LossMean:
    """Mean of the loss and its parts over images, kept on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        self._zero = torch.zeros(
            (), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )
        self._sums: dict[str, Tensor] = {}
        self._images = self._zero.clone()

    def add(self, losses: Mapping[str, Tensor], images: int) -> None:
        """Count the losses (scalar means) of a batch of so many images."""
        self._images += images
        for name, value in losses.items():
            total = self._sums.setdefault(name, self._zero.clone())
            total += value.detach() * images

    def state(self) -> dict[str, Any]:
        """This process's sums, as `load` takes them."""
        sums = {name: total.item() for name, total in self._sums.items()}
        return {"images": self._images.item(), "sums": sums}

    def load(self, state: Mapping[str, Any]) -> None:
        """Add sums from `state`."""
        self._images += state["images"]
        for name, value in state["sums"].items():
            total = self._sums.setdefault(name, self._zero.clone())
            total += value

    def clear(self) -> None:
        """Forget everything: a new epoch begins."""
        self._sums.clear()
        self._images.zero_()

    def compute(self) -> dict[str, float]:
        """The means over all images of all processes; a loss of NaN where none was counted."""
        totals = sum_over_processes(torch.stack([self._images, *self._sums.values()]))
        images, *sums = totals.tolist()
        if not images:
            return {"loss": math.nan}
        return {name: total / images for name, total in zip(self._sums, sums, strict=True)}
