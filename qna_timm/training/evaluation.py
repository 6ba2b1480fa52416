"""One pass over a labelled split: loss and top-k accuracy, exact over several processes."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from timm.data import RealLabelsImagenet
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn

from .errors import UsageError
from .loaders import ImageLoader, process_place
from .progress import Progress
from .views import class_names_of


class Observer(Protocol):
    """Something that looks at every prediction of an evaluation, each image once."""

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Takes a batch: logits [B, classes], labels [B]."""


def sum_processes(tensor: Tensor) -> Tensor:
    """Element-wise sum over all processes; the tensor itself without torch.distributed."""
    if process_place()[1] > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def _logits_of(output: Tensor | Sequence[Tensor]) -> Tensor:
    """The first output of models that return several, as timm's training script takes it."""
    return output[0] if isinstance(output, list | tuple) else output


def _check_labels(target: Tensor, num_classes: int) -> None:
    """Says what an out-of-range label means; the losses say it badly, on CUDA not at all."""
    low, high = int(target.min()), int(target.max())
    if low < 0:
        raise UsageError("the split has images without labels, so there is nothing to compare with")
    if high >= num_classes:
        raise UsageError(
            f"the data has the label {high}, but the model only {num_classes} classes "
            f"(--num-classes {high + 1} or more)"
        )


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
) -> dict[str, float]:
    """Evaluates a classifier; every image counts once, whatever the number of processes.

    Args:
        model: Returns logits [B, classes] or a sequence that begins with them. It is put into
            evaluation mode and back.
        loader: Yields (input, target) on `device`.
        device: Where the model is.
        amp_autocast: Makes the context of a forward pass.
        criterion: Loss of (logits, labels), a mean; cross-entropy when None.
        channels_last: Give the model channels-last input.
        progress: Updated once a step.
        valid_labels: Class numbers whose logits are kept, [labels]; the labels then count
            positions in it.
        observers: Also see every prediction.

    Returns:
        `loss`, `top1` and `top5` (percent; the best of all classes when there are fewer than 5).

    Raises:
        UsageError: a label that the model has no class for.
    """
    evaluator = ClassificationEvaluator(device, criterion=criterion)
    observers = list(observers)
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
            logits = logits[:, valid_labels]
        if len(target):
            if always_check or step == 0:
                _check_labels(target, logits.shape[1])
            evaluator.update(logits, target)
            for observer in observers:
                observer.update(logits.float(), target)
        if progress is not None:
            seen = evaluator.counts[0].clamp(min=1)
            progress.update(
                len(inputs) * world_size,
                loss=evaluator.loss_sum / seen,
                top1=100 * evaluator.counts[1] / seen,
            )
    model.train(was_training)
    return dict(evaluator.compute(distributed=world_size > 1))


class ClassCounts:
    """Counts per class: how many there are, how many were predicted, and what was taken for what.

    Args:
        num_classes: Classes of the labels.
        device: Where the predictions are.
        with_matrix: Also count pairs of classes, which takes num_classes squared numbers.
    """

    def __init__(self, num_classes: int, device: torch.device, with_matrix: bool = False) -> None:
        self.num_classes = num_classes
        # rows: images of the class, predictions of it, right at first, right among five
        self._counts = torch.zeros(4, num_classes, dtype=torch.int64, device=device)
        self._matrix = torch.zeros(
            (num_classes, num_classes) if with_matrix else 0, dtype=torch.int64, device=device
        )

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Counts a batch: logits [B, classes], labels [B]."""
        ranked = logits.topk(min(5, logits.shape[1])).indices
        right = ranked == target[:, None]
        first = ranked[:, 0]
        for row, labels in enumerate(
            (target, first, target[right[:, 0]], target[right.any(dim=1)])
        ):
            self._counts[row] += torch.bincount(labels, minlength=self.num_classes)
        if self._matrix.numel():
            pairs = torch.bincount(target * self.num_classes + first, minlength=self.num_classes**2)
            self._matrix += pairs.view_as(self._matrix)

    def totals(self) -> Tensor:
        """Images, predictions, right at first, right among five: [4, classes], of all processes."""
        return sum_processes(self._counts).cpu()

    def matrix(self) -> Tensor:
        """Images by [true class, predicted class], of all processes."""
        return sum_processes(self._matrix).cpu()


class RealLabels:
    """Accuracy against ImageNet's reassessed labels, where an image may have several or none.

    Args:
        filenames: Base names of the whole split in loader order.
        path: timm's JSON file: a list of label lists, one per validation image.

    Raises:
        UsageError: the file is not such a list or the split is not ImageNet's validation set.
    """

    def __init__(self, filenames: Sequence[str], path: str) -> None:
        try:
            self._labels = RealLabelsImagenet(filenames, real_json=path)
        except AssertionError as error:
            count = len(json.loads(Path(path).read_text(encoding="utf-8")))
            raise UsageError(
                f"--real-labels {path} has labels for {count} images, the split {len(filenames)}"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"--real-labels {path}: not a JSON list of labels") from error
        unknown = next((n for n in filenames if n not in self._labels.real_labels), None)
        if unknown is not None:
            raise UsageError(f"--real-labels needs ImageNet's validation images, found {unknown!r}")
        rank, world_size = process_place()
        self._labels.filenames = filenames[rank::world_size]  # those this process sees

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Judges a batch of logits [B, 1000]; the split's own labels do not matter."""
        self._labels.add_result(logits)

    def accuracy(self, device: torch.device) -> dict[str, float]:
        """`top1` and `top5` in percent of the images that have labels, over all processes.

        Args:
            device: Where processes exchange tensors.
        """
        right = self._labels.is_correct
        own = torch.tensor([len(right[1]), sum(right[1]), sum(right[5])], device=device)
        images, top1, top5 = sum_processes(own).tolist()
        return {"top1": 100 * top1 / max(images, 1), "top5": 100 * top5 / max(images, 1)}
