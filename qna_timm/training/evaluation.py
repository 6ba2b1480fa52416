"""One pass over a labelled split: loss and top-k accuracy, exact over several processes."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from qna_timm.training.data.image_loader import ImageLoader
from qna_timm.training.data.views import class_names_of, images_of
from qna_timm.training.errors import RunFailed, UsageError
from qna_timm.training.observers import BranchCounts
from qna_timm.training.processes.distributed import process_place, sum_over_processes
from qna_timm.training.reporting.progress import Progress

_logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Something that looks at every prediction of an evaluation, each image once."""

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Takes a batch: logits [B, classes], labels [B]."""


def _logits_of(output: Tensor | Sequence[Tensor]) -> Tensor:
    """The first output of models that return several, as timm's training script takes it."""
    return output[0] if isinstance(output, list | tuple) else output


def check_labels(target: Tensor, num_classes: int) -> None:
    """Says what an out-of-range label means; the losses say it badly, on CUDA not at all.

    Raises:
        UsageError: a label of `target` [B] is none of `num_classes` classes.
    """
    low, high = int(target.min()), int(target.max())
    if low < 0:
        raise UsageError("the split has images without labels, so there is nothing to compare with")
    if high >= num_classes:
        raise UsageError(
            f"the data has the label {high}, but the model only {num_classes} classes "
            f"(--num-classes {high + 1} or more)"
        )


def _check_counted(count: int, dataset: Dataset) -> None:
    """See that there were images, and tell if a stream had others than it is said to have.

    Raises:
        RunFailed: there were none.
    """
    if not count:
        raise RunFailed("no image to evaluate on could be read", everywhere=True)
    expected = images_of(dataset)
    if isinstance(dataset, IterableDataset) and expected not in (None, count):
        _logger.warning("evaluated %d images, the split is said to have %d", count, expected)


def _so_far(evaluator: ClassificationEvaluator) -> dict[str, Tensor]:
    """This process's loss and top-1, left on the device: only shown steps need to wait for them."""
    seen = evaluator.counts[0].clamp(min=1)
    return {"loss": evaluator.loss_sum / seen, "top1": 100 * evaluator.counts[1] / seen}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ImageLoader,
    *,
    device: torch.device,
    amp_autocast: Callable[[], AbstractContextManager] = nullcontext,
    criterion: nn.Module | None = None,
    channels_last: bool = False,
    progress: Progress | None = None,
    valid_labels: Tensor | None = None,
    observers: Iterable[Observer] = (),
    branch_counts: BranchCounts | None = None,
    after_batch: Callable[[int], None] = lambda batch: None,
) -> dict[str, float]:
    """Evaluates a classifier; every image counts once, whatever the number of processes.

    Args:
        model: Returns logits [B, classes] or a sequence that begins with them; with
            `branch_counts` those of its branches, [B, M, classes]. It is put into evaluation mode
            and back.
        loader: Yields (input, target) on `device`.
        device: Where the model is.
        amp_autocast: Makes the context of a forward pass.
        criterion: Loss of (logits, labels), a mean; cross-entropy when None.
        channels_last: Give the model channels-last input.
        progress: Updated once a step.
        valid_labels: Class numbers whose logits are kept, [labels]; the labels then count
            positions in it.
        observers: Also see every prediction.
        branch_counts: For models that return their branches, whose mean is the prediction; also
            sees every branch's.
        after_batch: Called with each batch's number; may raise to end the evaluation.

    Returns:
        `loss`, `top1` and `top5` (percent; the best of all classes when there are fewer than 5),
        then the metrics of `branch_counts`.

    Raises:
        UsageError: a label that the model has no class for.
        RunFailed: there was no image at all.
    """
    evaluator = ClassificationEvaluator(device, criterion=criterion)
    watching = [evaluator, *observers]
    world_size = process_place()[1]
    remaining = evaluation_sample_limit(loader)
    # Looking at labels makes an accelerator wait, so datasets that name their classes are
    # trusted there after the first step.
    always_check = device.type == "cpu" or class_names_of(loader.dataset) is None
    was_training = model.training
    model.eval()
    for step, (inputs, target) in enumerate(loader):
        if channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with amp_autocast():
            logits = _logits_of(model(inputs))
        if remaining is not None:
            # The sampler pads ranks to equal lengths at their ends.
            logits, target = logits[:remaining], target[:remaining]
            remaining -= len(target)
        if valid_labels is not None:
            logits = logits[..., valid_labels]
        if len(target):
            logits = logits.float()
            if always_check or step == 0:
                check_labels(target, logits.shape[-1])
            if branch_counts is not None:
                branch_counts.update(logits, target)
                logits = logits.mean(1)  # [B, M, classes] -> [B, classes]
            for observer in watching:
                observer.update(logits, target)
        if progress is not None:
            progress.update(len(inputs) * world_size, **_so_far(evaluator))
        after_batch(step)
    model.train(was_training)
    _check_counted(int(sum_over_processes(evaluator.counts)[0]), loader.dataset)
    metrics = dict(evaluator.compute(distributed=world_size > 1))
    return metrics if branch_counts is None else {**metrics, **branch_counts.metrics()}
