"""The training task of models with branches: each learns for itself, and apart from the others."""

from typing import Any

from torch import Tensor, nn

from qna_timm.training.branch_loss import branch_losses
from qna_timm.training.observers import BranchCounts
from qna_timm.training.task import TrainTask


def has_branches(model: nn.Module) -> bool:
    """Whether a model can return the logits of its branches, [B, M, classes], beside their mean."""
    return hasattr(model, "set_branch_outputs")


class GramianTask(TrainTask):
    """Trains a model with Gramian heads by `branch_losses`.

    The model, and averages made of it, return their branches from now on;
    ``set_branch_outputs(False)`` gives their mean again. Weights and their names are the same.

    Args:
        model: Has ``set_branch_outputs`` and ``num_branches``; not yet compiled or distributed.
        criterion: Loss of each branch, see `branch_losses`.
        ga_lam: Weight of the decorrelation.
        **kwargs: timm's, such as ``device``.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, *, ga_lam: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(model, criterion, **kwargs)
        self.ga_lam = ga_lam
        self.num_branches = model.num_branches
        model.set_branch_outputs(True)

    def loss_parts(self, output: Any, target: Tensor) -> dict[str, Tensor]:
        """`branch_losses` of logits [B, M, classes] and labels [B] or soft targets."""
        return branch_losses(output, target, self.criterion, self.ga_lam)

    def branch_counts(self) -> BranchCounts:
        """Fresh counts for one evaluation."""
        return BranchCounts(self.num_branches, self.device)
