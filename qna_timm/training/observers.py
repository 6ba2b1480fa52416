"""What else an evaluation can count while it looks at every prediction."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import RealLabelsImagenet
from torch import Tensor

from qna_timm.training.errors import UsageError
from qna_timm.training.processes.distributed import process_place, sum_over_processes


class ImageCount:
    """Counts images."""

    def __init__(self) -> None:
        self.images = 0

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Counts a batch: logits [B, classes], labels [B]."""
        self.images += len(target)

    def total(self, device: torch.device) -> int:
        """Images of all processes.

        Args:
            device: Where processes exchange tensors.
        """
        return int(sum_over_processes(torch.tensor(self.images, device=device)))


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
        return sum_over_processes(self._counts).cpu()

    def matrix(self) -> Tensor:
        """Images by [true class, predicted class], of all processes."""
        return sum_over_processes(self._matrix).cpu()


class BranchCounts:
    """How often each branch of a model is right, and how often two of them say the same.

    Args:
        num_branches: Branches of the model, M.
        device: Where the predictions are.
    """

    def __init__(self, num_branches: int, device: torch.device) -> None:
        self.num_branches = num_branches
        # images; images each branch has right; pairs of branches that agree on an image, each twice
        self._counts = torch.zeros(num_branches + 2, dtype=torch.int64, device=device)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Counts a batch: logits [B, M, classes], labels [B]."""
        best = logits.argmax(dim=-1)  # [B, M]
        same = best[:, :, None] == best[:, None, :]
        self._counts[0] += len(target)
        self._counts[1:-1] += (best == target[:, None]).sum(dim=0)
        self._counts[-1] += same.sum() - best.numel()  # each agrees with itself

    def metrics(self) -> dict[str, float]:
        """Of all processes, in percent.

        Returns:
            ``branch_M_top1`` for each branch from 0; ``agreement``, the mean over pairs of branches
            of the share of images that both take for the same class. Nothing of a single branch.
        """
        pairs = self.num_branches * (self.num_branches - 1)
        if not pairs:
            return {}
        images, *right, agreeing = sum_over_processes(self._counts).tolist()
        percent = 100 / max(images, 1)
        top1 = {f"branch_{index}_top1": percent * count for index, count in enumerate(right)}
        return {**top1, "agreement": percent * agreeing / pairs}


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
        images, top1, top5 = sum_over_processes(own).tolist()
        return {"top1": 100 * top1 / max(images, 1), "top5": 100 * top5 / max(images, 1)}
