"""Mixed precision of a run."""

import argparse
from contextlib import AbstractContextManager, nullcontext

import torch


class Precision:
    """Mixed precision of a run: the autocast context and, for float16, the loss scaler.

    Args:
        args: Flags, of which ``amp`` and ``amp_dtype`` are read.
        device: Where the run computes.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device_type = device.type
        self.dtype = getattr(torch, args.amp_dtype) if args.amp else None
        scaled = self.dtype == torch.float16 and device.type in ("cuda", "cpu", "xpu")
        self.scaler = torch.amp.GradScaler(device.type if scaled else "cpu", enabled=scaled)

    def autocast(self) -> AbstractContextManager:
        """Context in which the forward pass runs."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)
