"""Time and peak memory of whole networks against the size of the image.

Rows have ms and peak_mib of a call; their ratios are per pixel, over the first size.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from figures import Point, draw_panels
from measuring import Result, compare
from model_calls import make_call
from reporting import Row, markdown_table, memory_cell, result_columns, time_cell


def _per_pixel(result: Result, pixels: int) -> Result:
    timing, peak = result.timing, result.peak_mib
    if timing:
        timing = replace(timing, wall=[ms / pixels for ms in timing.wall])
    return replace(result, timing=timing, peak_mib=peak and peak / pixels)


def measure_scaling(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of all sizes for each model, batch size and mode; sizes take turns."""
    for name, batch, mode in product(args.models, args.batches, args.modes):
        makers = {
            size: partial(
                make_call, name, mode, args.layouts[-1], args.compile, (batch, 3, size, size), args
            )
            for size in args.sizes
        }
        results = compare(makers, args.rounds, args.device, args.seconds, args.skip_after)
        shares = {size: _per_pixel(result, size**2) for size, result in results.items()}
        rows = []
        for size, result in results.items():
            row = {"model": name, "batch": str(batch), "mode": mode, "size": str(size)}
            row.update(result_columns(result, Result()))
            per_pixel = result_columns(shares[size], shares[args.sizes[0]])
            row.update({key: text for key, text in per_pixel.items() if "ratio" in key})
            rows.append(row)
        yield rows


def print_scaling(rows: Sequence[Row]) -> None:
    """Tables of time and memory."""
    for name, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        part = [row for row in rows if (row["model"], row["batch"]) == (name, batch)]
        for what, cell in (("time", time_cell), ("peak memory", memory_cell)):
            first = part[0]["size"]
            print(f"\n{name}, batch {batch}, {what}, and per pixel over that at {first}:\n")
            print("\n".join(markdown_table(part, "size", "mode", cell)))


def draw_scaling(rows: Sequence[Row], path: Path) -> None:
    """A figure of time and memory per megapixel."""
    panels: dict[str, list[Point]] = {}
    for row in rows:
        curve = f"{row['model']}, {row['mode']}, batch {row['batch']}"
        size = float(row["size"])
        megapixels = 1e-6 * float(row["batch"]) * size**2
        for key, title in (("ms", "ms per megapixel"), ("peak_mib", "peak MiB per megapixel")):
            points = panels.setdefault(title, [])
            if row[key]:
                keys = ("ms_low", "ms_high") if key == "ms" else (key, key)
                low, high = (float(row[k]) / megapixels for k in keys)
                points.append(Point(curve, size, float(row[key]) / megapixels, (low, high)))
    draw_panels(panels, "height and width of the image, pixels", path)
