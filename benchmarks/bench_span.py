#!/usr/bin/env python
"""Local self-attention with learned spans, against unfolded keys and timm's halo attention.

    python benchmarks/bench_span.py [--kernels 5 7 11] [--models] [--profile] [--device cuda] \\
        [--out benchmarks/results/NAME.csv]

One layer, 64 channels, 4 heads, on maps of 50 x 32 x 32, float32, forward and forward + backward:

    tiles      SpanAttention
    offsets    the same, offset by offset through autograd
    unfold     tests/span_reference.py: the released formulation, [B, C, H, W, k, k] keys
    halo       timm's HaloAttn, blocks of 8 x 8 that see the window around each of their positions

--models adds the training step of sa_resnet_medium_adaptive, of sa_resnet_medium_local, and of both
with unfolded keys. One process, rounds interleaved: medians of wall time with quartiles, and of
processor time. Peak memory is what a process of its own needs for a training step beyond what it
had before. --profile prints where a step spends its time.
"""

import argparse
import csv
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import nn
from torch.profiler import profile

import qna_timm  # noqa: F401  registers the models
from qna_timm.layers import SpanAttention

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from span_reference import UnfoldedAttention

BATCH, CHANNELS, HEADS, SIZE = 50, 64, 4, 32
LAYERS = ("tiles", "offsets", "unfold", "halo")
MODELS = ("sa_resnet_medium_adaptive", "sa_resnet_medium_local")


def make_layer(form: str, kernel_size: int) -> nn.Module:
    """A layer by form."""
    torch.manual_seed(0)
    if form == "halo":
        radius = kernel_size // 2
        return HaloAttn(CHANNELS, num_heads=HEADS, block_size=8, halo_size=radius)
    impl = "offsets" if form == "offsets" else "auto"
    layer = SpanAttention(CHANNELS, CHANNELS, HEADS, kernel_size, impl=impl)
    return UnfoldedAttention(layer) if form == "unfold" else layer


def make_model(name: str, form: str) -> nn.Module:
    """A network by name, with unfolded keys if form says so."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    if form == "unfold":
        for parent in list(model.modules()):
            for child, layer in parent.named_children():
                if isinstance(layer, SpanAttention):
                    setattr(parent, child, UnfoldedAttention(layer))
    return model


def make_call(case: str, form: str, mode: str, device: str) -> Callable[[], None]:
    """One round of a case, a kernel size or a model's name."""
    if case.isdigit():
        module, shape = make_layer(form, int(case)), (BATCH, CHANNELS, SIZE, SIZE)
    else:
        module, shape = make_model(case, form), (BATCH, 3, SIZE, SIZE)
    module = module.to(device).train()
    x = torch.randn(shape, device=device, requires_grad=case.isdigit())

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).square().mean().backward()

    return step if mode == "step" else forward


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def print_peak(case: str, form: str, device: str) -> None:
    """In a process of its own: most memory of a training step beyond that before it, MiB."""
    call = make_call(case, form, "step", device)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        call()
        synchronize(device)
        print(json.dumps((torch.cuda.max_memory_allocated() - before) / 2**20))
        return
    before = resident("VmRSS")
    call()
    print(json.dumps(resident("VmHWM") - before))


def resident(field: str) -> float:
    """This process's memory now (VmRSS) or at most (VmHWM), MiB. Linux."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 2**10


def peak_memory(case: str, form: str, device: str) -> float:
    """`print_peak`'s figure."""
    command = [sys.executable, __file__, "--peak", case, form, "--device", device]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def measure(calls: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list]:
    """(wall, processor) milliseconds of each round, forms taking turns after a warm-up each."""
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in calls}
    for turn in range(rounds + 1):
        for form, call in calls.items():
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            synchronize(device)
            spent = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
            if turn:
                times[form].append(spent)
    return times


def rows_of(case: str, forms: tuple[str, ...], args: argparse.Namespace) -> list[dict]:
    """A row for every form and mode; ratios are to the unfolded form."""
    rows = []
    for mode in ("forward", "step"):
        calls = {form: make_call(case, form, mode, args.device) for form in forms}
        times = measure(calls, args.rounds, args.device)
        wall = {form: [pair[0] for pair in values] for form, values in times.items()}
        cpu = {form: statistics.median(pair[1] for pair in v) for form, v in times.items()}
        for form in forms:
            low, median, high = statistics.quantiles(wall[form], n=4, method="inclusive")
            row = dict(
                case=case,
                form=form,
                mode=mode,
                ms=round(median, 1),
                quartiles=f"{low:.1f}-{high:.1f}",
                cpu_ms=round(cpu[form], 1),
                speedup=round(statistics.median(wall["unfold"]) / median, 2),
                cpu_speedup=round(cpu["unfold"] / cpu[form], 2),
                peak_mib=round(peak_memory(case, form, args.device), 1) if mode == "step" else "",
            )
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            rows.append(row)
    return rows


def print_profile(case: str, args: argparse.Namespace) -> None:
    """Operators of a layer's or a network's step by their own time."""
    call = make_call(case, "tiles", "step", args.device)
    call()
    with profile() as record:
        call()
    key = "self_cpu_time_total" if args.device == "cpu" else "self_device_time_total"
    print(f"\n{f'kernel {case}' if case.isdigit() else case}, step")
    print(record.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40))


def main() -> None:
    """Measure, print, and write a CSV file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, nargs="*", default=[5, 7, 11])
    parser.add_argument("--forms", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", action="store_true", help="training steps of whole networks")
    parser.add_argument("--profile", action="store_true", help="print operators of steps")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(*args.peak, args.device)
        return
    name = platform.processor() or platform.machine()
    if args.device != "cpu":
        name = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    rows = []
    cases = {str(kernel_size): tuple(args.forms) for kernel_size in args.kernels}
    if args.models:
        cases.update({model: ("tiles", "unfold") for model in MODELS})
    for case, forms in cases.items():
        rows += rows_of(case, forms, args)
        if args.profile:
            print_profile(case, args)
    if args.out and rows:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
