"""Pictures of panels, drawn with matplotlib's figure alone: no window system, no global state.

Margins and gaps are fixed lengths. A layout that is fitted to its labels would draw everything
once more to know them, and doubles the time of a picture that is redrawn after every epoch.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

from qna_timm.training.storage.files import replacing

_DOTS_PER_INCH = 130


class Margins(NamedTuple):
    """Inches between the picture's edges and its panels."""

    left: float
    right: float
    bottom: float
    top: float


def make_panels(
    down: int,
    across: int,
    panel: tuple[float, float],
    gaps: tuple[float, float],
    margins: Margins,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """A figure and its panels, ``down * across`` of them in an array of one dimension.

    Args:
        down: Rows of panels.
        across: Panels in a row.
        panel: Width and height of a panel in inches.
        gaps: Inches between panels side by side, and between rows; labels stand there.
        margins: What is left around all panels.
        kwargs: For matplotlib's ``Figure.subplots``.
    """
    width = margins.left + across * panel[0] + (across - 1) * gaps[0] + margins.right
    height = margins.bottom + down * panel[1] + (down - 1) * gaps[1] + margins.top
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(width, height), dpi=_DOTS_PER_INCH
    )
    figure.subplots_adjust(
        left=margins.left / width,
        right=1 - margins.right / width,
        bottom=margins.bottom / height,
        top=1 - margins.top / height,
        wspace=gaps[0] / panel[0],
        hspace=gaps[1] / panel[1],
    )
    return figure, figure.subplots(down, across, squeeze=False, **kwargs).flatten()


def count_epochs(axes: Any) -> None:
    """Whole numbers on the axis of epochs, a grid, no frame."""
    ticker = importlib.import_module("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write_png(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    agg = importlib.import_module("matplotlib.backends.backend_agg")
    with replacing(path) as temporary:
        agg.FigureCanvasAgg(figure).print_png(temporary)
