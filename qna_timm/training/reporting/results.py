"""What validate.py leaves behind: results, averages and a table over classes, a picture."""

import csv
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qna_timm.training.errors import UsageError, missing_package
from qna_timm.training.storage.files import replacing

TABLE_COLUMNS = ("label", "class", "images", "top1", "top5", "precision", "f1_score")

# --per-class without a file.
TO_TERMINAL = "-"

# Beyond these the picture's texts run into one another.
_MOST_NAMES = 60
_MOST_NUMBERS = 20


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise quotient, 0 where there is nothing to divide by."""
    return np.divide(
        numerator, denominator, out=np.zeros(len(numerator)), where=np.asarray(denominator) > 0
    )


def averaged_scores(totals: Tensor, average: str) -> dict[str, float]:
    """Precision, recall and F1 score in percent, as scikit-learn averages them.

    Args:
        totals: `ClassCounts.totals()`, [4, classes].
        average: `micro`, `macro` (over classes that occur or were predicted) or `weighted` (by
            the images of a class).

    Returns:
        `AVERAGE_precision`, `AVERAGE_recall` and `AVERAGE_f1_score`, timm's names.
    """
    images, predicted, right, _ = totals.numpy().astype(np.float64)
    if average == "micro":
        images, predicted, right = (row.sum(keepdims=True) for row in (images, predicted, right))
    weights = images if average == "weighted" else (images + predicted > 0).astype(np.float64)
    scores = {
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, images),
        "f1_score": _ratio(2 * right, images + predicted),
    }
    return {
        f"{average}_{name}": float(100 * (values * weights).sum() / max(weights.sum(), 1))
        for name, values in scores.items()
    }


def class_table(totals: Tensor, class_names: Sequence[str] | None) -> list[dict[str, object]]:
    """One row per class that occurs or was predicted, with the keys `TABLE_COLUMNS`.

    Args:
        totals: `ClassCounts.totals()`, [4, classes].
        class_names: Names by label; labels stand in for missing names.
    """
    images, predicted, right1, right5 = totals.numpy()
    columns = {
        "top1": _ratio(right1, images),
        "top5": _ratio(right5, images),
        "precision": _ratio(right1, predicted),
        "f1_score": _ratio(2 * right1, images + predicted),
    }
    return [
        {
            "label": label,
            "class": name_of(label, class_names),
            "images": int(images[label]),
            **{name: round(100 * float(values[label]), 2) for name, values in columns.items()},
        }
        for label in range(len(images))
        if images[label] or predicted[label]
    ]


def name_of(label: int, class_names: Sequence[str] | None) -> str:
    """A class's name, or its number where it has none."""
    return class_names[label] if class_names and label < len(class_names) else str(label)


def format_table(rows: Sequence[dict[str, object]]) -> str:
    """The class table as aligned text."""
    cells = [TABLE_COLUMNS, *(tuple(str(row[name]) for name in TABLE_COLUMNS) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(TABLE_COLUMNS))]
    return "\n".join(
        "  ".join(
            # names to the left, numbers to the right
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def require_writable(flag: str, path: Path) -> None:
    """See, before the work and without writing, that a result can be kept at `path`.

    Args:
        flag: The flag that names it, for the message.
        path: A file, there or not; missing folders above it are made when it is written.

    Raises:
        UsageError: It is a folder, or a file or a folder that is not ours is in its way.
    """
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; name a file")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UsageError(f"{flag} {path}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path}: the folder {nearest} cannot be written to")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the class table as CSV."""
    _write_csv(path, rows, TABLE_COLUMNS)


def write_results(
    path: Path, results: Mapping[str, Any] | Sequence[Mapping[str, Any]], file_format: str
) -> None:
    """Writes the results of one model, or of several.

    Args:
        path: File to write.
        results: One row, or several; a key that a row lacks leaves its column empty.
        file_format: `csv`, or `json` (an object for one row, a list for several).
    """
    if file_format == "csv":
        rows = [results] if isinstance(results, Mapping) else results
        # Models differ in their number of branches.
        _write_csv(path, rows, list(dict.fromkeys(key for row in rows for key in row)))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")


def require_matplotlib() -> None:
    """Raises a UsageError if the picture could not be drawn, before the evaluation is run."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        text = missing_package("--confusion-matrix", "matplotlib", "train")
        raise UsageError(text) from error


def draw_confusion_matrix(path: Path, matrix: Tensor, class_names: Sequence[str] | None) -> None:
    """Draws which class was taken for which, as a PNG.

    Colours are shares of the true class's images; numbers, while they fit, are counts.

    Args:
        path: File to write.
        matrix: `ClassCounts.matrix()`, images by [true class, predicted class].
        class_names: Names by label.
    """
    figure_class = importlib.import_module("matplotlib.figure").Figure
    counts = matrix.numpy()
    occurring = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    counts = counts[np.ix_(occurring, occurring)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(occurring)
    side = float(np.clip(2.5 + 0.35 * size, 5, 20))
    figure = figure_class(figsize=(side, side * 0.9), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class")
    accuracy = 100 * counts.trace() / max(counts.sum(), 1)
    axes.set_title(f"{counts.sum()} images, top-1 {accuracy:.2f} %")
    if size <= _MOST_NAMES:
        names = [name_of(int(label), class_names) for label in occurring]
        turned = max(map(len, names)) > 2
        axes.set_xticks(range(size), names, rotation=90 if turned else 0)
        axes.set_yticks(range(size), names)
    if size <= _MOST_NUMBERS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
