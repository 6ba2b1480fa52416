"""The Gramian family's objective: every branch learns the labels, pushed away from the mean."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def decorrelation(logits: Tensor) -> Tensor:
    """How far the branches are from what they say together.

    sum over m of mean over batch and classes of p (log p - log q_m), where q_m = softmax(z_m) is
    the prediction of branch m and p = softmax(mean over m of z_m), a constant for the gradient.
    The mean over classes makes this 1/classes of the usual sum of Kullback-Leibler divergences.

    Args:
        logits: z, [B, M, classes].
    """
    anchor = F.log_softmax(logits.detach().mean(1, keepdim=True), dim=-1)  # [B, 1, classes]
    predictions = F.log_softmax(logits, dim=-1)
    total = F.kl_div(predictions, anchor.expand_as(predictions), reduction="sum", log_target=True)
    return total / (logits.shape[0] * logits.shape[2])


def branch_losses(
    logits: Tensor, target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor], ga_lam: float
) -> dict[str, Tensor]:
    """The parts of arXiv:2310.16483's objective, whose sum is minimised.

    Computed in float32 at least, inside autocast too: a difference of close predictions and a sum
    over branches are beyond half precision.

    Args:
        logits: [B, M, classes].
        target: Labels [B] or soft targets [B, classes].
        criterion: Loss of (logits [N, classes], targets of N samples), a mean over samples.
        ga_lam: Weight of the decorrelation, negative to drive branches apart.

    Returns:
        ``class``, the sum over branches of the criterion; ``decorrelation``, `ga_lam` times
        `decorrelation`. Scalars.

    Raises:
        ValueError: The logits are not those of branches.
    """
    if logits.ndim != 3:
        raise ValueError(
            f"logits: expected [batch, branches, classes], found {list(logits.shape)}"
            " (set_branch_outputs(True) makes a model return its branches)"
        )
    num_branches = logits.shape[1]
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if target.is_floating_point():
            target = target.to(logits.dtype)
        # Branches of an image side by side keep the order of images, which splits rely on.
        task = criterion(logits.flatten(0, 1), target.repeat_interleave(num_branches, dim=0))
        return {"class": num_branches * task, "decorrelation": ga_lam * decorrelation(logits)}
