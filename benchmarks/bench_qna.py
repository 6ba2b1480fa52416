#!/usr/bin/env python
"""The learned-query operator's forms side by side, against a depthwise convolution.

    python benchmarks/bench_qna.py [--kernels 3 7] [--out benchmarks/results/NAME.csv]

One process, rounds interleaved, medians with their spread (quartiles); 8 x 56 x 56 x 64, 8 heads,
2 queries, float32. "conv" is one depthwise convolution over the same map and kernel: the yardstick
of the paper's claim. The forms compute the same function (tests/test_ops.py).
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops import qna_attention

BATCH, SIZE, QUERIES, HEADS, HEAD_DIM = 8, 56, 2, 8, 8


def make_inputs(kernel: int, train: bool) -> list[Tensor]:
    """Scores, value, bias and weight."""
    torch.manual_seed(0)
    shapes = (
        (BATCH, SIZE, SIZE, QUERIES, HEADS),
        (BATCH, SIZE, SIZE, HEADS * HEAD_DIM),
        (kernel**2, QUERIES, HEADS),
        (kernel**2, QUERIES, HEADS),
    )
    return [torch.randn(shape, requires_grad=train) for shape in shapes]


def candidates(kernel: int, train: bool) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name: each call is one forward or one training step."""
    inputs = make_inputs(kernel, train)
    channels = HEADS * HEAD_DIM
    conv_weight = torch.randn(channels, 1, kernel, kernel, requires_grad=train)

    def conv() -> Tensor:
        x = inputs[1].permute(0, 3, 1, 2)  # channels-last, as the operator has it
        return F.conv2d(x, conv_weight, None, 1, kernel // 2, groups=channels)

    def form(impl: str) -> Callable[[], Tensor]:
        return lambda: qna_attention(*inputs, (kernel, kernel), 1, kernel // 2, impl)

    calls = {"conv": conv, **{impl: form(impl) for impl in ("depthwise", "offsets", "auto")}}
    if not train:
        return calls
    return {
        name: (lambda call=call: call().square().mean().backward()) for name, call in calls.items()
    }


def measure(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, candidates taking turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Measure, print a table, and write it as CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, nargs="+", default=[3, 7, 15])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    rows = []
    for kernel in args.kernels:
        for train in (False, True):
            with torch.set_grad_enabled(train):
                times = measure(candidates(kernel, train), args.rounds)
            base = statistics.median(times["conv"])
            for name, values in times.items():
                low, median, high = statistics.quantiles(values, n=4)
                row = dict(
                    kernel=kernel,
                    mode="train" if train else "forward",
                    form=name,
                    ms=round(median, 2),
                    quartiles=f"{low:.2f}-{high:.2f}",
                    over_conv=round(median / base, 2),
                )
                print("  ".join(f"{key}={value}" for key, value in row.items()))
                rows.append(row)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
