#!/usr/bin/env python
"""Whole models side by side: images per second and peak memory, inference and training step.

    python benchmarks/bench_models.py [--models NAME ...] [--batches 1 8] [--compile] \\
        [--device cuda --amp bfloat16] [--out benchmarks/results/NAME.csv]
    python benchmarks/bench_models.py --scaling [--sizes 224 448 672 896] [--out ...]
    python benchmarks/bench_models.py --read benchmarks/results/NAME.csv   # tables, figure again

Any of timm's models, random weights, at their own input size, with input and weights contiguous
(nchw) and channels-last; tables show the faster of the two. "step" is forward, cross entropy,
backward and, without --no-update, AdamW's update. `ratio` is a model's time over the first one's
in its faster layout, the median over the rounds with quartiles: so many times as fast is the
first. Peak memory is what a call needs beyond weights, optimizer and input, in a process of its
own. Compiling is not in any time.

--scaling: time and peak memory per pixel, of qna_vit_tiny unless --models names others, square
images of several sizes, windows as the model has them, in the last of --layouts; ratios are per
pixel and over the first size.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

from arguments import device_name, model_name, positive_number, positive_seconds
from figures import Bar, draw_bars
from measuring import Result, compare
from model_calls import LAYOUTS, MODES, input_size, make_call
from model_scaling import draw_scaling, measure_scaling, print_scaling
from reporting import (
    Row,
    markdown_table,
    memory_cell,
    print_skipped,
    result_columns,
    run_benchmark,
    short,
    time_cell,
)

MODELS = ("qna_vit_tiny", "qna_vit_tiny_7x7", "convnext_tiny", "swin_tiny_patch4_window7_224")
QUICK = {
    "models": ["test_convnext", "test_vit"],
    "batches": [1],
    "sizes": [32, 64],
    "rounds": 2,
}

Key = tuple[str, str, bool]  # model, layout, whether compiled


def _faster_layout(results: Mapping[Key, Result], name: str, compiled: bool) -> Result:
    """A model's result in the layout in which it is faster."""
    timed = [
        result
        for (model, _, is_compiled), result in results.items()
        if model == name and is_compiled == compiled and result.timing
    ]
    return min(timed, key=lambda result: median(result.timing.wall), default=Result())


def measure_models(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of all candidates for each batch size and mode; they take turns."""
    ways = [False, True] if args.compile else [False]
    for batch, mode in product(args.batches, args.modes):
        makers = {
            (name, layout, compiled): partial(
                make_call, name, mode, layout, compiled, (batch, *input_size(name)), args
            )
            for name, layout, compiled in product(args.models, args.layouts, ways)
        }
        results = compare(makers, args.rounds, args.device, args.seconds, args.skip_after)
        rows = []
        for (name, layout, compiled), result in results.items():
            way = "compiled" if compiled else "eager"
            row = {"model": name, "layout": layout, "way": way, "mode": mode, "batch": str(batch)}
            columns = result_columns(result, _faster_layout(results, args.models[0], compiled))
            row["images_per_s"] = short(1e3 * batch / float(columns["ms"])) if columns["ms"] else ""
            rows.append({**row, **columns})
        yield rows


def faster_rows(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ in the layout alone the fastest."""
    best: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "way", "mode", "batch"))
        if key not in best or float(row["ms"] or "inf") < float(best[key]["ms"] or "inf"):
            best[key] = row
    return list(best.values())


def print_models(rows: Sequence[Row]) -> None:
    """Tables of images per second and of memory, with ratios of time and memory."""
    speed_cell = partial(time_cell, key="images_per_s", unit="")
    for mode, way in dict.fromkeys((row["mode"], row["way"]) for row in rows):
        part = faster_rows(row for row in rows if (row["mode"], row["way"]) == (mode, way))
        for what, cell in (("images per second", speed_cell), ("peak memory", memory_cell)):
            print(f"\n{mode}, {way}, {what} by batch size:\n")
            print("\n".join(markdown_table(part, "model", "batch", cell)))


def draw_models(rows: Sequence[Row], path: Path) -> None:
    """A figure of images per second."""
    panels: dict[str, list[Bar]] = {}
    for row in faster_rows(rows):
        if row["ms"]:
            title = f"images per second: {row['mode']}, batch {row['batch']}"
            spread = tuple(1e3 * int(row["batch"]) / float(row[f"ms_{e}"]) for e in ("high", "low"))
            bar = Bar(row["model"], row["way"], float(row["images_per_s"]), spread)
            panels.setdefault(title, []).append(bar)
    draw_bars(panels, path)


def report(rows: Sequence[Row], path: Path | None) -> None:
    """Tables, and a figure beside the CSV file."""
    scaling = "size" in rows[0]
    (print_scaling if scaling else print_models)(rows)
    print_skipped(rows, ("model", "layout", "way", "mode", "batch", "size"))
    if path:
        (draw_scaling if scaling else draw_models)(rows, path.with_suffix(".png"))


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of all that was asked for, in parts."""
    args.models = args.models or list(MODELS[: 1 if args.scaling else None])
    args.batches = args.batches or ([1] if args.scaling else [1, 8])
    return (measure_scaling if args.scaling else measure_models)(args)


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", type=model_name, nargs="+", help=f"of timm; {', '.join(MODELS)} if not given"
    )
    parser.add_argument(
        "--batches", type=positive_number, nargs="+", help="1 and 8, for --scaling 1"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast")
    parser.add_argument("--update", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scaling", action="store_true", help="against the image's size")
    parser.add_argument("--sizes", type=positive_number, nargs="+", default=[224, 448, 672, 896])
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--rounds", type=positive_number, default=15)
    parser.add_argument(
        "--seconds", type=positive_seconds, default=30.0, help="of one's rounds, about"
    )
    parser.add_argument(
        "--skip-after", type=positive_seconds, default=60.0, help="seconds of a call"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write a CSV file and a figure if asked to."""
    run_benchmark(make_parser(), QUICK, measure, argv, report)


if __name__ == "__main__":
    main()
