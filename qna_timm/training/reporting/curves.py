"""The run's curves as one picture: loss, accuracy, learning rate and branches against epochs."""

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qna_timm.training.errors import missing_package
from qna_timm.training.reporting.pictures import Margins, count_epochs, make_panels, write_png

# Inches.
_PANEL, _GAPS, _MARGINS = (3.5, 2.7), (0.8, 0.0), Margins(0.7, 0.15, 0.55, 0.75)
_TRAIN, _EVAL, _EMA, _RATE = "#8a8f98", "#1f6fb4", "#d9772b", "#3c8d5a"
# Column of the summary, label, colour, line style.
_VALIDATION_LOSS_LINES = (
    ("eval_loss", "validation", _EVAL, "-"),
    ("eval_loss_ema", "validation, averaged weights", _EMA, "-"),
)
_ACCURACY_LINES = (
    ("eval_top1", "top-1", _EVAL, "-"),
    ("eval_top5", "top-5", _EVAL, ":"),
    ("eval_top1_ema", "top-1, averaged weights", _EMA, "-"),
    ("eval_top5_ema", "top-5, averaged weights", _EMA, ":"),
)

# For models with several branches.
_AGREEMENT_LINES = (
    ("eval_agreement", "agreement", _EVAL, "-"),
    ("eval_agreement_ema", "agreement, averaged weights", _EMA, "-"),
)
_DECORRELATION_LINES = (("train_loss_decorrelation", "", _TRAIN, "-"),)
_BRANCH_COLUMN = re.compile(r"eval_branch_\d+_top1")

_logger = logging.getLogger(__name__)


def can_draw() -> bool:
    """Whether matplotlib is there; if not, one line says how to get it."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        _logger.warning(missing_package("a picture of the curves", "matplotlib", "train"))
        return False
    return True


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the summary's rows as a PNG.

    Args:
        rows: Rows of the summary, one per epoch; metrics may be missing from some.
        path: Ends in ``.png``; written atomically.
        title: Shown above.
    """
    branches = max(sum(map(bool, map(_BRANCH_COLUMN.fullmatch, row))) for row in rows)
    branched = any(row.get("eval_agreement") is not None for row in rows)
    panels = 5 if branched else 3
    figure, axes_of = make_panels(1, panels, _PANEL, _GAPS, _MARGINS)
    loss, accuracy, rate = axes_of[:3]
    figure.suptitle(title, fontsize=11)
    _draw_losses(loss, rows, branches)
    _draw_lines(accuracy, rows, _ACCURACY_LINES, "Accuracy (%)")
    _draw_lines(rate, rows, (("lr", "", _RATE, "-"),), "Learning rate")
    if branched:
        _draw_branches(accuracy, rows)
        _draw_lines(axes_of[3], rows, _AGREEMENT_LINES, "Agreement of branches (%)")
        _draw_lines(axes_of[4], rows, _DECORRELATION_LINES, "Decorrelation part of the loss")
    _mark_best(accuracy, rows)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in axes_of:
        axes.set_xlabel("epoch")
        count_epochs(axes)
    write_png(figure, path)


def _draw_lines(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    lines: Sequence[tuple[str, str, str, str]],
    title: str,
) -> None:
    """Draw those columns that the summary has; epochs count from 1 here, as people do."""
    axes.set_title(title, fontsize=10)
    labelled = False
    for column, label, colour, style in lines:
        points = [(row["epoch"] + 1, row[column]) for row in rows if row.get(column) is not None]
        if points:
            marker = "o" if len(points) == 1 else ""
            axes.plot(
                *zip(*points, strict=True),
                style,
                marker=marker,
                color=colour,
                label=label,
                linewidth=1.6,
            )
            labelled = labelled or bool(label)
    if labelled:
        axes.legend(frameon=False, fontsize=8)


def _draw_losses(axes: Any, rows: Sequence[Mapping[str, Any]], branches: int) -> None:
    """Training and validation; of a sum over branches the mean, as validation's is one model's."""
    column, label = "train_loss", "training"
    if branches:
        column, label = "mean", f"training, mean of {branches} branches"
        sums = [row.get("train_loss_class") for row in rows]
        rows = [
            {**row, "mean": None if total is None else total / branches}
            for row, total in zip(rows, sums, strict=True)
        ]
    _draw_lines(axes, rows, ((column, label, _TRAIN, "-"), *_VALIDATION_LOSS_LINES), "Loss")


def _draw_branches(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shade the range from the worst to the best branch."""
    points = []
    for row in rows:
        top1 = [row[name] for name in row if _BRANCH_COLUMN.fullmatch(name)]
        if top1 and None not in top1:
            points.append((row["epoch"] + 1, min(top1), max(top1)))
    axes.fill_between(
        *zip(*points, strict=True), color=_EVAL, alpha=0.2, linewidth=0, label="top-1, branches"
    )
    axes.legend(frameon=False, fontsize=8)


def _mark_best(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Point at the best top-1 accuracy of all epochs."""
    points = [
        (row[column], row["epoch"] + 1)
        for row in rows
        for column in ("eval_top1", "eval_top1_ema")
        if row.get(column) is not None and row[column] == row[column]
    ]
    if points:
        best, epoch = max(points, key=lambda point: (point[0], -point[1]))
        axes.plot(epoch, best, "o", markersize=5, color="black")
        axes.set_title(f"Accuracy (%), best top-1 {best:.2f} in epoch {epoch}", fontsize=10)
