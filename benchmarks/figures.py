"""Figures of benchmarks, PNG files: curves on logarithmic axes, and bars, with their spread."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
MARKS = "os^vDPX*<>"


class Point(NamedTuple):
    """A point of a curve, with the lower and upper end of y's spread."""

    curve: str
    x: float
    y: float
    ends: tuple[float, float] | None = None


class Bar(NamedTuple):
    """A bar: its place, which of several there, its length and the ends of its spread."""

    place: str
    kind: str
    value: float
    ends: tuple[float, float]


def _errors(values: Sequence[float], ends: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Lengths of bars below and above; a value and its ends are rounded each on its own."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    return [below, above]


def _make_panels(count: int, height: float, path: Path) -> tuple["Figure", list["Axes"]] | None:
    """A figure of panels, or None and a message if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} was not drawn: matplotlib is not installed", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-count // COLUMNS)
    size = (5.0 * COLUMNS, height * rows)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def _save(figure: "Figure", axes: Sequence["Axes"], path: Path) -> None:
    """Writes a figure with one legend for all panels."""
    from matplotlib import pyplot

    labels = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc="outside right upper")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_panels(panels: Mapping[str, Sequence[Point]], x_label: str, path: Path) -> None:
    """Curves. A curve has the same colour and mark in all panels; the first one is drawn bold.

    Args:
        panels: Points by the panel's title.
        x_label: What x is.
        path: File to write.
    """
    made = _make_panels(len(panels), 3.8, path)
    if made is None:
        return
    from matplotlib.ticker import NullLocator

    figure, axes = made
    names = list(dict.fromkeys(point.curve for points in panels.values() for point in points))
    for (title, points), axis in zip(panels.items(), axes, strict=True):
        for number, name in enumerate(names):
            curve = sorted((p.x, p.y, p.ends or (p.y, p.y)) for p in points if p.curve == name)
            if not curve:
                continue
            xs, ys, ends = zip(*curve, strict=True)
            spread = _errors(ys, ends)
            style = {"color": f"C{number % 10}", "marker": MARKS[number % len(MARKS)]}
            width = 2.5 if number == 0 else 1.2
            axis.errorbar(xs, ys, spread, label=name, capsize=3, linewidth=width, **style)
        ticks = sorted({point.x for point in points})
        axis.set(title=title, xscale="log", yscale="log", xlabel=x_label)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    _save(figure, axes, path)


def draw_bars(panels: Mapping[str, Sequence[Bar]], path: Path) -> None:
    """Horizontal bars, longer is better.

    Args:
        panels: Bars by the panel's title.
        path: File to write.
    """
    made = _make_panels(len(panels), 2.6, path)
    if made is None:
        return
    figure, axes = made
    kinds = list(dict.fromkeys(bar.kind for bars in panels.values() for bar in bars))
    for (title, bars), axis in zip(panels.items(), axes, strict=True):
        places = list(dict.fromkeys(bar.place for bar in bars))
        for number, kind in enumerate(kinds):
            these = [bar for bar in bars if bar.kind == kind]
            axis.barh(
                [places.index(bar.place) + 0.8 * number / len(kinds) for bar in these],
                [bar.value for bar in these],
                height=0.8 / len(kinds),
                xerr=_errors([bar.value for bar in these], [bar.ends for bar in these]),
                color=f"C{number}",
                label=kind,
                capsize=3,
            )
        axis.set_yticks([i + 0.4 * (1 - 1 / len(kinds)) for i in range(len(places))], places)
        axis.invert_yaxis()
        axis.set(title=title)
    _save(figure, axes, path)
