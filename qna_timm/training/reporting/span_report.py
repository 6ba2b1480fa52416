"""What a run says of learned windows: lines in the log, a table, a picture, scalars to track.

All of it is read from the ``spans`` of the summary's rows, see `SpanTask.spans`; these are part of
the saved state, so that a resumed run goes on with the table and picture of the first.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qna_timm.training.reporting.pictures import Margins, count_epochs, make_panels, write_png
from qna_timm.training.storage.files import replacing

SPANS_NAME = "spans.csv"
SPAN_CURVES_NAME = "spans.png"
_COLUMNS = ("epoch", "layer", "head", "span_px", "kernel")
_HEAD_COLOURS = (
    "#1f6fb4",
    "#d9772b",
    "#3c8d5a",
    "#8c5aa8",
    "#b4483f",
    "#2a9d9d",
    "#8f7a2a",
    "#c25f9a",
)
_MAX_PANELS_ACROSS = 5
# Inches; of the legend those of a head.
_LEGEND = 0.9
_PANEL, _GAPS, _MARGINS = (2.7, 2.1), (0.35, 0.6), Margins(0.7, 0.15, 0.95, 0.75)


def span_lines(spans: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each layer: ``stages.0.0.spatial: spans 0.50 1.23 0.00 3.10 px, kernel 11``."""
    for name, layer in spans.items():
        pixels = " ".join(f"{value:.2f}" for value in layer["span_px"])
        yield f"{name}: spans {pixels} px, kernel {layer['kernel']}"


def span_scalars(spans: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Spans and kernels under one name each: ``span_px/LAYER/head_0``, ``span_kernel/LAYER``."""
    scalars: dict[str, float] = {}
    for name, layer in spans.items():
        for head, pixels in enumerate(layer["span_px"]):
            scalars[f"span_px/{name}/head_{head}"] = pixels
        scalars[f"span_kernel/{name}"] = layer["kernel"]
    return scalars


def write_spans(folder: Path, rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Write spans.csv and, if there is a title, spans.png; nothing of models without spans.

    Args:
        folder: The run folder.
        rows: Rows of the summary, one per epoch.
        title: Shown above the picture; None where nothing can be drawn.
    """
    rows = [row for row in rows if row.get("spans")]
    if not rows:
        return
    with (
        replacing(folder / SPANS_NAME) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in rows:
            for name, layer in row["spans"].items():
                for head, pixels in enumerate(layer["span_px"]):
                    writer.writerow((row["epoch"], name, head, pixels, layer["kernel"]))
    if title is not None:
        draw_spans(rows, folder / SPAN_CURVES_NAME, title)


def draw_spans(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw spans against epochs as a PNG: a panel for each layer, a line for each head.

    Above each panel stands the kernel that its heads ran in after the first and the last epoch.

    Args:
        rows: Rows of the summary, all with ``spans``.
        path: Ends in ``.png``; written atomically.
        title: Shown above.
    """
    names = list(rows[-1]["spans"])
    down = -(-len(names) // _MAX_PANELS_ACROSS)
    across = -(-len(names) // down)
    heads = max(len(layer["span_px"]) for layer in rows[-1]["spans"].values())
    width = max(_PANEL[0], _LEGEND * heads / across)
    figure, panels = make_panels(
        down, across, (width, _PANEL[1]), _GAPS, _MARGINS, sharex=True, sharey=True
    )
    figure.suptitle(title, fontsize=11)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        _draw_layer(axes, name, [row for row in rows if name in row["spans"]])
    panels[0].set_ylim(bottom=-0.03 * panels[0].get_ylim()[1])
    for axes in panels[::across]:
        axes.set_ylabel("span (pixels)")
    for axes in panels[max(0, len(names) - across) : len(names)]:
        axes.set_xlabel("epoch")
        axes.tick_params(labelbottom=True)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    write_png(figure, path)


def _draw_layer(axes: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One panel; epochs count from 1 here, as people do."""
    layers = [row["spans"][name] for row in rows]
    epochs = [row["epoch"] + 1 for row in rows]
    marker = "o" if len(rows) == 1 else ""
    for head in range(len(layers[-1]["span_px"])):
        colour = _HEAD_COLOURS[head % len(_HEAD_COLOURS)]
        pixels = [layer["span_px"][head] for layer in layers]
        label = f"head {head}"
        axes.plot(epochs, pixels, marker=marker, color=colour, label=label, linewidth=1.6)
    kernels = dict.fromkeys((layers[0]["kernel"], layers[-1]["kernel"]))
    axes.set_title(f"{name}, kernel {' → '.join(map(str, kernels))}", fontsize=9)
    count_epochs(axes)
