#!/usr/bin/env python
"""Gramian heads computed together, against branch by branch and against the plain formulation.

    python benchmarks/bench_gramian.py [--batches 1 8 128] [--device cuda] [--models] \\
        [--profile] [--out benchmarks/results/NAME.csv]

The head stage of GA-ConvNeXt-T: a map of 14 x 14 x 688, 5 branches, Gram width 192, 1000 classes,
float32 (bfloat16 under autocast on a GPU). Forms:

    batched    GramianHead, all branches at once
    branches   the same layers, a GramianHead of one branch for each
    reference  tests/gramian_reference.py: modules of each branch, keys and values of all tokens,
               float64 Gram while training with fewer than 128 images, numpy index

One process, rounds interleaved: medians of wall time with quartiles, and of processor time, which
neighbours on a busy machine disturb less; peak memory of a call in a process of its own. "forward"
is evaluation without gradients, "step" a training forward and backward, the map's gradient
included; with one image all batch norms use running statistics, as the reference could not train
otherwise. --models adds whole networks, ga_convnext_tiny against timm's convnext_tiny; --profile
prints where the step of each form spends its time.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from arguments import device_name, positive_number
from measuring import compare
from reporting import Row, print_profile, run_benchmark, speedup_columns
from torch import Tensor, nn

import qna_timm  # noqa: F401  registers the models
from qna_timm.layers.gramian_head import GramianHead

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gramian_reference import ReferenceHead

FEATURES, CLASSES, BRANCHES, SIZE = 688, 1000, 5, 14
MODES = ("forward", "step")
FORMS = ("batched", "branches", "reference")
MODELS = ("convnext_tiny", "ga_convnext_tiny")
QUICK = {"batches": [1], "rounds": 1}


class OneByOne(nn.Module):
    """`GramianHead`s of one branch each, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(GramianHead(FEATURES, CLASSES, 1) for _ in range(BRANCHES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x) for head in self.heads], dim=1)


def make_form(name: str) -> nn.Module:
    """A head stage or a network by name."""
    torch.manual_seed(0)
    if name == "batched":
        head = GramianHead(FEATURES, CLASSES, BRANCHES)
        head.branch_outputs = True
        return head
    if name == "branches":
        return OneByOne()
    if name == "reference":
        return ReferenceHead(FEATURES, CLASSES, BRANCHES)
    return timm.create_model(name)


def make_call(name: str, mode: str, batch: int, device: str) -> Callable[[], None]:
    """The call to measure: a forward pass, or a training forward and backward."""
    module = make_form(name).to(device).train(mode == "step")
    if name in FORMS:
        x = torch.randn(batch, FEATURES, SIZE, SIZE, device=device, requires_grad=True)
    else:
        x = torch.randn(batch, 3, 224, 224, device=device)
    if batch == 1:  # which plain batch norms refuse
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=device != "cpu"):
            logits = module(x)
        return torch.stack(logits, dim=1) if isinstance(logits, list) else logits

    def step() -> None:
        forward().float().square().mean().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return step if mode == "step" else torch.no_grad()(forward)


def rows_of(names: Sequence[str], base: str, batch: int, args: argparse.Namespace) -> list[Row]:
    """A row for every form and mode; ratios are to the form named base."""
    rows = []
    rounds = min(args.rounds, max(2, 64 // batch))
    for mode in MODES:
        makers = {name: partial(make_call, name, mode, batch, args.device) for name in names}
        results = compare(makers, rounds, args.device)
        for name, result in results.items():
            row = {"form": name, "batch": batch, "mode": mode}
            row.update(speedup_columns(result, results[base].timing))
            row["images_per_s"] = round(1e3 * batch / row["ms"], 1) if row["ms"] else ""
            rows.append(row)
    return rows


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=positive_number, nargs="+", default=[1, 8, 128])
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument(
        "--rounds", type=positive_number, default=15, help="at most; fewer for large batches"
    )
    parser.add_argument("--models", action="store_true", help="whole networks too, batch 8")
    parser.add_argument("--profile", action="store_true", help="print operators of a step")
    return parser


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of each batch size, then of whole networks."""
    for batch in args.batches:
        yield rows_of(FORMS, "reference", batch, args)
    if args.profile:
        for name in FORMS:
            call = make_call(name, "step", 8, args.device)
            print_profile(f"{name}, batch 8, step", call, args.device)
    if args.models:
        yield rows_of(MODELS, MODELS[0], 8, args)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write a CSV file if asked to."""
    run_benchmark(make_parser(), QUICK, measure, argv)


if __name__ == "__main__":
    main()
