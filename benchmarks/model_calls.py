"""Whole networks as calls to measure: inference, and a training step."""

import argparse
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch.nn.functional import cross_entropy

import qna_timm  # noqa: F401  registers the models

MODES = ("inference", "step")
LAYOUTS = ("nchw", "channels-last")


def input_size(name: str) -> tuple[int, int, int]:
    """(3, H, W) that a model is made for."""
    return timm.get_pretrained_cfg(name).input_size


def make_call(
    name: str,
    mode: str,
    layout: str,
    compiled: bool,
    shape: tuple[int, ...],
    args: argparse.Namespace,
) -> Callable[[], object]:
    """A call of a network with random weights on random images.

    Args:
        name: timm's name of it.
        mode: "inference", or "step": forward, cross entropy, backward and AdamW's update.
        layout: Of weights and input, one of `LAYOUTS`.
        compiled: With torch.compile.
        shape: Of the input, [B, 3, H, W].
        args: device; amp, a type's name or None; update, whether a step has one.
    """
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    model = timm.create_model(name).to(args.device, memory_format=memory_format)
    model.train(mode == "step")
    images = torch.randn(shape, device=args.device).to(memory_format=memory_format)
    target = torch.arange(len(images), device=args.device)
    dtype = getattr(torch, args.amp) if args.amp else None
    autocast = partial(torch.autocast, images.device.type, dtype, dtype is not None)
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def infer() -> None:
        with torch.inference_mode(), autocast():
            run(images)

    def step() -> None:
        with autocast():
            loss = cross_entropy(run(images).float(), target)
        loss.backward()
        if args.update:
            optimizer.step()
        optimizer.zero_grad()

    call = step if mode == "step" else infer
    if compiled:
        call()  # compiles now, not in the time that is measured
    return call
