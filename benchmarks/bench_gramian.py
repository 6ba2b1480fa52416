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
neighbours on a busy machine disturb less; peak memory of what a round allocates. "forward" is
evaluation without gradients, "step" a training forward and backward, the map's gradient included;
with one image all batch norms use running statistics, as the reference could not train otherwise.
--models adds whole networks, ga_convnext_tiny against timm's convnext_tiny; --profile prints
where the step of each form spends its time.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import qna_timm  # noqa: F401  registers the models
from qna_timm.layers.gramian_head import GramianHead

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gramian_reference import ReferenceHead

FEATURES, CLASSES, BRANCHES, SIZE = 688, 1000, 5, 14
MODES = ("forward", "step")


class OneByOne(nn.Module):
    """`GramianHead`s of one branch each, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(GramianHead(FEATURES, CLASSES, 1) for _ in range(BRANCHES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x) for head in self.heads], dim=1)


def make_forms() -> dict[str, nn.Module]:
    """Head stages by name."""
    torch.manual_seed(0)
    batched = GramianHead(FEATURES, CLASSES, BRANCHES)
    batched.branch_outputs = True
    reference = ReferenceHead(FEATURES, CLASSES, BRANCHES)
    return {"batched": batched, "branches": OneByOne(), "reference": reference}


def make_call(module: nn.Module, x: Tensor, mode: str, amp: bool) -> Callable[[], None]:
    """One round: a forward pass, or a training forward and backward."""

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = module(x)
        return torch.stack(logits, dim=1) if isinstance(logits, list) else logits

    def step() -> None:
        module.train().zero_grad(set_to_none=True)
        if len(x) == 1:  # which plain batch norms refuse
            for norm in module.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.eval()
        x.grad = None
        forward().float().square().mean().backward()

    def evaluate() -> None:
        module.eval()
        with torch.no_grad():
            forward()

    return step if mode == "step" else evaluate


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], None], device: str) -> float:
    """Most memory that a call holds at a time beyond what was there before, in MiB."""
    if device != "cpu":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def measure(calls: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list]:
    """(wall, processor) milliseconds of each round, forms taking turns after a warm-up each."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            synchronize(device)
            spent = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
            if turn:
                times[name].append(spent)
    return times


def rows_of(
    forms: dict[str, nn.Module],
    make_input: Callable[[], Tensor],
    base: str,
    batch: int,
    args: argparse.Namespace,
) -> list[dict]:
    """A row for every form and mode; ratios are to the form named base."""
    rows = []
    rounds = max(2, min(args.rounds, 64 // batch))
    for mode in MODES:
        x = make_input()
        calls = {
            name: make_call(module, x, mode, args.device != "cpu") for name, module in forms.items()
        }
        times = measure(calls, rounds, args.device)
        wall = {name: [pair[0] for pair in values] for name, values in times.items()}
        cpu = {name: statistics.median(pair[1] for pair in v) for name, v in times.items()}
        for name, call in calls.items():
            low, median, high = statistics.quantiles(wall[name], n=4, method="inclusive")
            row = dict(
                form=name,
                batch=batch,
                mode=mode,
                ms=round(median, 1),
                quartiles=f"{low:.1f}-{high:.1f}",
                cpu_ms=round(cpu[name], 1),
                images_per_s=round(1e3 * batch / median, 1),
                speedup=round(statistics.median(wall[base]) / median, 2),
                cpu_speedup=round(cpu[base] / cpu[name], 2),
                peak_mib=round(peak_memory(call, args.device), 1),
            )
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            rows.append(row)
    return rows


def print_profiles(forms: dict[str, nn.Module], args: argparse.Namespace) -> None:
    """Operators of a training step of each form, by their own time."""
    x = torch.randn(8, FEATURES, SIZE, SIZE, device=args.device, requires_grad=True)
    activities = [ProfilerActivity.CPU]
    if args.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    for name, module in forms.items():
        call = make_call(module, x, "step", args.device != "cpu")
        call()
        with profile(activities=activities) as record:
            call()
        key = "self_cpu_time_total" if args.device == "cpu" else "self_device_time_total"
        print(f"\n{name}, batch 8, step")
        print(record.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40))


def main() -> None:
    """Measure, print, and write a CSV file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 128])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="at most; fewer for large batches")
    parser.add_argument("--models", action="store_true", help="whole networks too, batch 8")
    parser.add_argument("--profile", action="store_true", help="print operators of a step")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    name = platform.processor() or platform.machine()
    if args.device != "cpu":
        name = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    forms = {form: module.to(args.device) for form, module in make_forms().items()}
    rows = []
    for batch in args.batches:
        shape = (batch, FEATURES, SIZE, SIZE)
        rows += rows_of(
            forms,
            lambda shape=shape: torch.randn(shape, device=args.device, requires_grad=True),
            "reference",
            batch,
            args,
        )
    if args.profile:
        print_profiles(forms, args)
    if args.models:
        names = ("convnext_tiny", "ga_convnext_tiny")
        networks = {name: timm.create_model(name).to(args.device) for name in names}
        rows += rows_of(
            networks, lambda: torch.randn(8, 3, 224, 224, device=args.device), names[0], 8, args
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
