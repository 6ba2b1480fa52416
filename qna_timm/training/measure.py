"""The evaluation of one model by validate.py, from settings to a row of results."""

import argparse
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from qna_timm.training.data.datasets import create_eval_loader
from qna_timm.training.data.image_loader import ImageLoader
from qna_timm.training.errors import UsageError
from qna_timm.training.evaluation import Observer, evaluate
from qna_timm.training.gramian_task import has_branches
from qna_timm.training.kernels import choose_kernels
from qna_timm.training.names import model_label
from qna_timm.training.observers import BranchCounts, ClassCounts, ImageCount, RealLabels
from qna_timm.training.precision import Precision
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.reporting.progress import Progress
from qna_timm.training.reporting.results import (
    TO_TERMINAL,
    averaged_scores,
    class_table,
    draw_confusion_matrix,
    format_table,
    write_table,
)
from qna_timm.training.validation import (
    apply_test_pool,
    build_candidate,
    check_classes,
    data_config_for,
    open_labelled,
    place,
    read_valid_labels,
)

_logger = logging.getLogger(__name__)


def measure(
    settings: argparse.Namespace, metadata: Mapping[str, Any], processes: Processes
) -> dict[str, Any]:
    """Builds the model, opens the data, evaluates, and writes what was asked for on classes.

    Args:
        settings: From `settings_for`.
        metadata: The checkpoint's, likewise.
        processes: The run's processes.

    Returns:
        `model`, `top1`, `top1_err`, `top5`, `top5_err` (percent), the branches' metrics and the
        averaged scores if asked for, `loss`, `param_count` (millions), `img_size`, `crop_pct`,
        `interpolation`, `images`, `img_per_s` and `weights` (a path, `pretrained` or `random`).

    Raises:
        UsageError: the settings, the data, the checkpoint and the model do not go together.
    """
    has_graph = bool(settings.torchcompile or settings.torchscript)
    choose_kernels(processes.device, full_float32=settings.amp or has_graph)
    random_seed(settings.seed)  # the same random weights on all processes
    dataset, class_names = open_labelled(settings, metadata)
    model, weights = build_candidate(settings, metadata)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    data_config = data_config_for(settings, model, metadata)
    valid_labels, num_classes = None, model.num_classes
    if settings.valid_labels:
        valid_labels = read_valid_labels(settings.valid_labels, num_classes)
        num_classes = len(valid_labels)
    check_classes(settings, num_classes, dataset, metadata)
    if settings.test_pool:
        model = apply_test_pool(model, data_config, metadata)
    counts = _Counts(settings, num_classes, dataset, processes)
    if settings.branches:
        counts.branches = _show_branches(settings, model, processes)
    loader = create_eval_loader(
        dataset, settings, data_config, device=processes.device, batch_size=settings.batch_size
    )
    model = place(model, settings, processes.device)
    metrics, seconds = _evaluate(model, loader, settings, processes, counts, valid_labels)
    metrics = counts.finish(metrics, class_names)
    images = counts.images.total(processes.device)
    row = {
        "model": model_label(settings.model, settings.model_kwargs),
        **_rounded(metrics),
        "param_count": round(parameters / 1e6, 2),
        "img_size": data_config["input_size"][-1],
        "crop_pct": data_config["crop_pct"],
        "interpolation": data_config["interpolation"],
        "images": images,
        "img_per_s": round(images / seconds, 1),
        "weights": weights,
    }
    _logger.info(
        "%s: top-1 %.3f %%, top-5 %.3f %%, loss %.4f; %d images at %.1f img/s; %d parameters",
        *(row[key] for key in ("model", "top1", "top5", "loss", "images", "img_per_s")),
        parameters,
    )
    return row


def _show_branches(
    settings: argparse.Namespace, model: nn.Module, processes: Processes
) -> BranchCounts:
    """Let the model return its branches; what counts them."""
    if not has_branches(model):
        raise UsageError(f"--branches: {settings.model} has one classifier, not several branches")
    model.set_branch_outputs(True)
    return BranchCounts(model.num_branches, processes.device)


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics and errors (percent) in the order of timm's results, then the loss."""
    rest = {key: metrics[key] for key in metrics if key not in ("loss", "top1", "top5")}
    percent = {
        "top1": metrics["top1"],
        "top1_err": 100 - metrics["top1"],
        "top5": metrics["top5"],
        "top5_err": 100 - metrics["top5"],
        **rest,
    }
    rounded = {key: round(value, 4) for key, value in percent.items()}
    return {**rounded, "loss": round(metrics["loss"], 6)}


def _evaluate(
    model: nn.Module,
    loader: ImageLoader,
    settings: argparse.Namespace,
    processes: Processes,
    counts: "_Counts",
    valid_labels: Tensor | None,
) -> tuple[dict[str, float], float]:
    """The metrics, and the seconds that the pass over the data took."""
    precision = Precision(settings, processes.device)
    with Progress(
        len(loader),
        f"validate {model_label(settings.model, settings.model_kwargs)}",
        log_interval=settings.log_freq,
        enabled=processes.is_primary,
    ) as progress:
        _warm_up(model, loader, settings, precision)
        start = _seconds(processes.device)
        metrics = evaluate(
            model,
            loader,
            device=processes.device,
            amp_autocast=precision.autocast,
            channels_last=settings.channels_last,
            progress=progress,
            valid_labels=None if valid_labels is None else valid_labels.to(processes.device),
            observers=counts.observers,
            branch_counts=counts.branches,
        )
        return metrics, _seconds(processes.device) - start


def _seconds(device: torch.device) -> float:
    """The clock, once the device is through with all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _warm_up(
    model: nn.Module, loader: ImageLoader, settings: argparse.Namespace, precision: Precision
) -> None:
    """One step on nothing, so that compilation and kernel selection are not in the rate.

    Raises:
        UsageError: the model refuses the input size that was asked for.
    """
    plain_cpu = loader.device.type == "cpu" and not settings.torchcompile
    images = len(loader.dataset) if not isinstance(loader.dataset, IterableDataset) else None
    size = 1 if plain_cpu else min(loader.batch_size, images or loader.batch_size)
    inputs = torch.zeros(size, *loader.input_size, device=loader.device, dtype=loader.img_dtype)
    if settings.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    try:
        with precision.autocast():
            model(inputs)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        if settings.img_size is None and settings.input_size is None:
            raise
        shape = "x".join(map(str, loader.input_size))
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(f"--model {settings.model} cannot take {shape} input: {reason}") from error


def _file_names(dataset: Dataset) -> list[str]:
    """Base names of a dataset's files in loader order."""
    try:
        return dataset.filenames(basename=True)
    except (AttributeError, AssertionError) as error:
        raise UsageError("--real-labels needs ImageNet's images in a folder or archive") from error


class _Counts:
    """What is counted beside loss and accuracy, and what becomes of it."""

    def __init__(
        self,
        settings: argparse.Namespace,
        num_classes: int,
        dataset: Dataset,
        processes: Processes,
    ) -> None:
        self.settings = settings
        self.processes = processes
        self.images = ImageCount()
        self.observers: list[Observer] = [self.images]
        self.branches: BranchCounts | None = None
        self.classes: ClassCounts | None = None
        self.real_labels: RealLabels | None = None
        if settings.metrics_avg or settings.per_class or settings.confusion_matrix:
            self.classes = ClassCounts(
                num_classes, processes.device, with_matrix=bool(settings.confusion_matrix)
            )
            self.observers.append(self.classes)
        if settings.real_labels:
            self.real_labels = RealLabels(_file_names(dataset), settings.real_labels)
            self.observers.append(self.real_labels)

    def finish(
        self, metrics: Mapping[str, float], class_names: list[str] | None
    ) -> dict[str, float]:
        """The metrics with averaged scores and real-label accuracy; writes table and picture."""
        metrics, settings = dict(metrics), self.settings
        if self.real_labels is not None:
            metrics.update(self.real_labels.accuracy(self.processes.device))
        if self.classes is None:
            return metrics
        totals = self.classes.totals()
        if settings.metrics_avg:
            metrics.update(averaged_scores(totals, settings.metrics_avg))
        matrix = self.classes.matrix() if settings.confusion_matrix else None
        if not self.processes.is_primary:
            return metrics
        if settings.per_class:
            rows = class_table(totals, class_names)
            if settings.per_class == TO_TERMINAL:
                print(format_table(rows))
            else:
                write_table(Path(settings.per_class), rows)
                _logger.info("class table: %s", settings.per_class)
        if matrix is not None:
            draw_confusion_matrix(Path(settings.confusion_matrix), matrix, class_names)
            _logger.info("confusion matrix: %s", settings.confusion_matrix)
        return metrics
