"""Learning rate, optimizer and schedule from flags."""

import argparse
from typing import Any

from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn
from torch.optim import Optimizer

from qna_timm.training.errors import UsageError

ADAPTIVE = ("ada", "lamb")
"""Parts of the names of optimizers whose learning rate grows with the square root of the batch."""


def learning_rate(args: argparse.Namespace, global_batch: int) -> tuple[float, str]:
    """The run's learning rate, and the arithmetic that led to it.

    ``--lr`` as it is; else ``--lr-base`` x (global batch / ``--lr-base-size``), the ratio under a
    square root for adaptive optimizers unless ``--lr-base-scale`` says otherwise.

    Args:
        args: Flags.
        global_batch: Images per update: per process x processes x accumulation.
    """
    if args.lr is not None:
        return args.lr, f"lr {args.lr:g}"
    adaptive = any(part in args.opt.lower() for part in ADAPTIVE)
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    ratio = global_batch / args.lr_base_size
    lr = args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)
    text = f"{args.lr_base:g} x {scale} scaling of {global_batch}/{args.lr_base_size}"
    return lr, f"lr {lr:g} ({text})"


def create_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> Optimizer:
    """timm's optimizer for the run's flags.

    Raises:
        UsageError: The optimizer does not take one of the values.
    """
    kwargs: dict[str, Any] = {**optimizer_kwargs(cfg=args), "lr": lr, **args.opt_kwargs}
    try:
        return create_optimizer_v2(model, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"--opt {args.opt}: {str(error).splitlines()[0]}") from error


def create_schedule(
    args: argparse.Namespace, optimizer: Optimizer, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """timm's learning-rate schedule (None for ``--sched none``) and the epochs to train.

    The epochs include warm-up prefix and cool-down.

    Raises:
        UsageError: The schedule does not fit into the epochs.
    """
    try:
        return create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
        )
    except (ValueError, AssertionError) as error:
        raise UsageError(f"--sched {args.sched}: {error}") from error


def current_lr(optimizer: Optimizer) -> float:
    """The learning rate, averaged over the parameter groups as timm's summary does."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
