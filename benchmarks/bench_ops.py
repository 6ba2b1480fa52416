#!/usr/bin/env python
"""Local attention against its window: time and peak memory, forward and with all gradients.

    python benchmarks/bench_ops.py [--what operator layer] [--windows 3 7 15 31] [--device cuda] \\
        [--out benchmarks/results/NAME.csv]
    python benchmarks/bench_ops.py --read benchmarks/results/NAME.csv   # tables and figures again

Maps of 8 x 56 x 56 x 64. "operator" is learned-query attention without projections, in float32
unless --dtype says otherwise:

    auto ... triton    qna_attention's forms (impl)
    eager-*            the paper's formula in eager PyTorch, grouped convolutions and autograd, maps
                       contiguous (nchw) or channels-last
    compiled-*         the same, torch.compile
    conv               a depthwise convolution of the same kernel: not attention, a yardstick

"layer" is attention with its projections, each layer as its library offers it:

    qna                LearnedQueryAttention, 8 heads, 2 queries
    span               SpanAttention, fixed windows
    unfold             stand-alone self-attention written plainly, keys and values unfolded
    halo               timm's HaloAttn: blocks of 8 x 8 with a halo of k//2, so that every token
                       sees its window of k x k and more
    flex, flex-tiled   FlexAttention, compiled, tokens by rows or in tiles of 8 x 8; on a CPU it has
                       no gradients
    natten             NATTEN's na2d, where installed

of 4 heads but for qna. `ratio` is a candidate's time over that of the first of its group (auto,
qna), the median over the rounds of both with quartiles: so many times as fast is ours. Peak memory
is what a call needs beyond what is there, in a process of its own. Who would take longer than
--skip-after seconds a call, or more memory than is free, or cannot run, is in the table with the
reason. --quick leaves out whoever must be compiled.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from itertools import product
from pathlib import Path

import attention_layers
import operator_forms
import torch
from arguments import device_name, odd_number, positive_number, positive_seconds
from figures import Point, draw_panels
from measuring import Maker, Result, compare
from problem import Problem
from reporting import (
    Row,
    markdown_table,
    memory_cell,
    print_skipped,
    result_columns,
    run_benchmark,
    time_cell,
)

KINDS = ("operator", "layer")
NAMES = {"operator": operator_forms.FORMS, "layer": tuple(attention_layers.LAYERS)}
COMPILED = ("compiled", "flex")  # beginnings of names
GPU_ONLY = ("triton", "qna-triton", "span-triton")
QUICK = {"windows": [3], "batch": 1, "size": 16, "channels": 32, "rounds": 2, "skip_after": 30.0}


def choose_names(kind: str, args: argparse.Namespace) -> list[str]:
    """Candidates of a table: those asked for, else those that suit the machine."""
    if args.candidates:
        return [name for name in NAMES[kind] if name in args.candidates]
    left_out = {"reference", *(GPU_ONLY if args.device == "cpu" else ())}
    if args.quick:
        left_out.update(name for name in NAMES[kind] if name.startswith(COMPILED))
    return [name for name in NAMES[kind] if name not in left_out]


def make_makers(kind: str, window: int, mode: str, args: argparse.Namespace) -> dict[str, Maker]:
    """Candidates of a table's column."""
    settings = {field.name: getattr(args, field.name, None) for field in fields(Problem)}
    problem = Problem(**{**settings, "window": window, "dtype": getattr(torch, args.dtype)})
    make_call = (operator_forms if kind == "operator" else attention_layers).make_call
    return {name: partial(make_call, problem, name, mode) for name in choose_names(kind, args)}


def rows_of(kind: str, window: int, mode: str, results: dict[str, Result]) -> list[Row]:
    """Rows of the candidates of one column and mode."""
    base = next((result for result in results.values() if result.timing), Result())
    return [
        {
            "what": kind,
            "window": str(window),
            "candidate": name,
            "mode": mode,
            **result_columns(result, base),
        }
        for name, result in results.items()
    ]


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of a table's column at a time."""
    for kind, window, mode in product(args.what, args.windows, args.modes):
        makers = make_makers(kind, window, mode, args)
        results = compare(makers, args.rounds, args.device, args.seconds, args.skip_after)
        yield rows_of(kind, window, mode, results)


def print_tables(rows: Sequence[Row]) -> None:
    """Time and memory of every table, then who was skipped and why."""
    for kind, mode in dict.fromkeys((row["what"], row["mode"]) for row in rows):
        part = [row for row in rows if (row["what"], row["mode"]) == (kind, mode)]
        base = next((row["candidate"] for row in part if row["ms"]), "nobody")
        for what, cell in (("time", time_cell), ("peak memory", memory_cell)):
            print(f"\n{kind}, {mode}, {what} by window, and over that of {base}:\n")
            print("\n".join(markdown_table(part, "candidate", "window", cell)))
    print_skipped(rows, ("what", "candidate", "window", "mode"))


def draw(rows: Sequence[Row], path: Path) -> None:
    """A figure of every table beside the CSV file: time and memory against the window."""
    for kind in dict.fromkeys(row["what"] for row in rows):
        part = [row for row in rows if row["what"] == kind]
        panels: dict[str, list[Point]] = {}
        for key, title in (("ms", "time, ms"), ("peak_mib", "peak memory, MiB")):
            for row in part:
                points = panels.setdefault(f"{row['mode']}: {title}", [])
                if row[key]:
                    ends = (float(row["ms_low"]), float(row["ms_high"])) if key == "ms" else None
                    x, y = float(row["window"]), float(row[key])
                    points.append(Point(row["candidate"], x, y, ends))
        draw_panels(panels, "side of the window, tokens", path.with_name(f"{path.stem}_{kind}.png"))


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--windows", type=odd_number, nargs="+", default=[3, 7, 15, 31], help="odd")
    parser.add_argument(
        "--modes", nargs="+", choices=operator_forms.MODES, default=list(operator_forms.MODES)
    )
    every = sorted({name for names in NAMES.values() for name in names})
    parser.add_argument(
        "--candidates", nargs="+", choices=every, help="those that suit the machine"
    )
    parser.add_argument("--batch", type=positive_number, default=8)
    parser.add_argument("--size", type=positive_number, default=56, help="height and width of maps")
    parser.add_argument("--channels", type=positive_number, default=64)
    parser.add_argument(
        "--heads", type=positive_number, default=8, help="of learned-query attention"
    )
    parser.add_argument("--peer-heads", type=positive_number, default=4, help="of other layers")
    parser.add_argument("--queries", type=positive_number, default=2)
    parser.add_argument("--score-std", type=float, default=1.0, help="operator's random scores")
    parser.add_argument("--bias-std", type=float, default=0.2, help="operator's random bias")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--rounds", type=positive_number, default=15)
    parser.add_argument(
        "--seconds", type=positive_seconds, default=20.0, help="of a candidate's rounds, about"
    )
    parser.add_argument(
        "--skip-after", type=positive_seconds, default=60.0, help="seconds of a call"
    )
    return parser


def report(rows: Sequence[Row], path: Path | None) -> None:
    """Tables, and figures beside the CSV file."""
    print_tables(rows)
    if path:
        draw(rows, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write a CSV file and figures if asked to."""
    run_benchmark(make_parser(), QUICK, measure, argv, report)


if __name__ == "__main__":
    main()
