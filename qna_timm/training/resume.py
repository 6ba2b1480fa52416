"""The state of a run between two updates: collected, and put in place again.

It holds everything that the rest of the run depends on: where it stands, weights and their
average, optimizer, loss scaler, plateau counters, and what the caller adds (summary, best epochs,
arguments). Random numbers are not in it: they are functions of what they are drawn for, see
`sampling`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.scheduler import PlateauLRScheduler
from timm.utils import unwrap_model
from torch import Tensor, nn

from qna_timm.training.errors import UsageError
from qna_timm.training.loop import Trainer
from qna_timm.training.processes.distributed import gather_to_primary
from qna_timm.training.storage.checkpoint import check_weights

_PLATEAU_COUNTS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")

_logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where a run stands.

    Attributes:
        epoch: Whole epochs behind it.
        updates: Updates of the epoch it is in.
        evaluating: Whether the epoch's training is done and its evaluation is not.
    """

    epoch: int = 0
    updates: int = 0
    evaluating: bool = False

    def __str__(self) -> str:
        text = f"{self.epoch} whole epoch{'' if self.epoch == 1 else 's'}"
        if self.evaluating:
            return f"{text} and the training of another"
        if not self.updates:
            return text
        return f"{text} and {self.updates} update{'' if self.updates == 1 else 's'}"


def collect_state(trainer: Trainer, position: Position, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The run's state, to be called by every process.

    Args:
        trainer: What trains.
        position: Where the run stands.
        extra: More nested values to save.

    Returns:
        The state on the first process; the others' lacks what the first has gathered.
    """
    task, schedule = trainer.task, trainer.schedule
    ema = task.get_trainable_module(ema=True)
    plateau = isinstance(schedule, PlateauLRScheduler)
    return {
        "position": position._asdict(),
        "num_updates": trainer.num_updates,
        "skipped": trainer.skipped,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "model": unwrap_model(task.get_trainable_module()).state_dict(),
        "task": task.get_task_state(),
        "ema": None if ema is None else unwrap_model(ema).state_dict(),
        "buffers": gather_to_primary(_own_buffers(trainer), trainer.processes),
        "losses": gather_to_primary(trainer.mean.state(), trainer.processes),
        "optimizer": trainer.optimizer.state_dict(),
        "settings": trainer.settings,
        "scaler": trainer.precision.scaler.state_dict(),
        "plateau": _plateau_state(schedule) if plateau else None,
        **extra,
    }


def _modules(trainer: Trainer) -> dict[str, nn.Module]:
    """The model and, if there is one, the averaged model, without their wrappers."""
    modules = {
        kind: trainer.task.get_trainable_module(ema=kind == "ema") for kind in ("model", "ema")
    }
    return {kind: unwrap_model(module) for kind, module in modules.items() if module is not None}


def _own_buffers(trainer: Trainer) -> dict[str, dict[str, Tensor]] | None:
    """What may differ between processes: statistics of each one's own batches."""
    if not trainer.processes.distributed:
        return None
    return {
        kind: {name: buffer.cpu() for name, buffer in module.named_buffers()}
        for kind, module in _modules(trainer).items()
    }


def restore(
    trainer: Trainer, state: Mapping[str, Any], path: Path, *, with_optimizer: bool = True
) -> Position:
    """Put a loaded state in place, to be called by every process before it trains.

    Settings of the optimizer that the flags have changed since (such as the learning rate) take
    effect, and are logged.

    Args:
        trainer: What trains, freshly made from the flags.
        state: From `load_state`.
        path: Where it is from, for messages.
        with_optimizer: False starts optimizer, scaler and schedule afresh (--no-resume-opt).

    Returns:
        Where the run goes on.

    Raises:
        UsageError: The state is of another model or optimizer.
    """
    task, position = trainer.task, Position(**state["position"])
    model = unwrap_model(task.get_trainable_module())
    check_weights(model, state["model"], {}, path)
    model.load_state_dict(state["model"])
    task.load_task_state(state["task"])
    ema = task.get_trainable_module(ema=True)
    if ema is not None and state["ema"] is not None:
        unwrap_model(ema).load_state_dict(state["ema"])
    elif ema is not None:
        ema.set(model)
        _logger.warning("%s has no averaged weights: the average starts at its weights", path)
    _restore_own(trainer, state)
    trainer.num_updates, trainer.skipped = state["num_updates"], state["skipped"]
    trainer.skipped_in_a_row = state["skipped_in_a_row"]
    if with_optimizer:
        _restore_optimizer(trainer, state, path)
        trainer.precision.scaler.load_state_dict(state["scaler"])
    if not isinstance(trainer.schedule, PlateauLRScheduler):
        move_schedule(trainer, position.epoch, trainer.num_updates)
    elif with_optimizer and state["plateau"] is not None:
        _restore_plateau(trainer, state)
    return position


@torch.no_grad()
def _restore_own(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """This process's own buffers and losses; after a change of their number the first has all."""
    processes = trainer.processes
    same = len(state["losses"]) == processes.world_size
    if same and processes.distributed:
        for kind, module in _modules(trainer).items():
            saved = state["buffers"][processes.rank].get(kind, {})
            for name, buffer in module.named_buffers():
                if name in saved:
                    buffer.copy_(saved[name])
    trainer.mean.clear()
    if same:
        trainer.mean.load(state["losses"][processes.rank])
        return
    for losses in state["losses"]:
        if not processes.is_primary:
            losses = {"images": 0.0, "sums": dict.fromkeys(losses["sums"], 0.0)}
        trainer.mean.load(losses)


def _restore_optimizer(trainer: Trainer, state: Mapping[str, Any], path: Path) -> None:
    optimizer = trainer.optimizer
    was, now = state["args"]["opt"], trainer.args.opt
    hint = "--no-resume-opt starts the optimizer afresh"
    if was != now:
        raise UsageError(f"--opt {now}: {path} was trained with {was}; {hint}")
    if len(state["settings"]) != len(trainer.settings):
        raise UsageError(f"{path}: the optimizer's parameter groups differ now; {hint}")
    # The state dict comes back with this run's settings where they were changed on purpose, with
    # the saved ones (step counts and the like) elsewhere.
    changes: dict[str, str] = {}
    groups = []
    for group, old, new in zip(
        state["optimizer"]["param_groups"], state["settings"], trainer.settings, strict=True
    ):
        changed = {key: value for key, value in new.items() if value != old.get(key)}
        for key, value in changed.items():
            name = key.removeprefix("initial_")
            changes.setdefault(name, f"{name} {old.get(key)} -> {value}")
        if "initial_lr" in changed:
            changed["lr"] = changed["initial_lr"]
        groups.append({**group, **changed})
    try:
        optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path}: not the state of this optimizer ({error}); {hint}") from error
    if changes:
        _logger.info("changed since the state was saved: %s", ", ".join(changes.values()))


def move_schedule(trainer: Trainer, epoch: int, num_updates: int) -> None:
    """Give the optimizer the learning rates that it has there in a run that was never stopped.

    timm's schedules are functions of the count. The exception, ``plateau``, is left as it is.

    Args:
        trainer: What trains.
        epoch: Whole epochs behind it.
        num_updates: Updates behind it, since the run began.
    """
    schedule = trainer.schedule
    if schedule is None or isinstance(schedule, PlateauLRScheduler):
        return
    # What a schedule begins with may be another number than its formula's at 0, in the last bit or
    # by its noise.
    for group, first in zip(trainer.optimizer.param_groups, trainer.settings, strict=True):
        group["lr"] = first["lr"]
    if num_updates:
        schedule.step_update(num_updates=num_updates)
    if epoch:
        schedule.step(epoch)


def _plateau_state(schedule: PlateauLRScheduler) -> dict[str, Any]:
    """What has happened, without what the flags say."""
    counted = schedule.lr_scheduler.state_dict()
    return {
        **{key: counted[key] for key in _PLATEAU_COUNTS},
        "restore_lr": schedule.restore_lr,  # what the learning rates are without noise
    }


def _restore_plateau(trainer: Trainer, state: Mapping[str, Any]) -> None:
    schedule, saved = trainer.schedule, state["plateau"]
    schedule.lr_scheduler.load_state_dict({key: saved[key] for key in _PLATEAU_COUNTS})
    now, was = trainer.optimizer.param_groups, state["optimizer"]["param_groups"]
    # A learning rate that the flags have changed has no noise yet.
    if [group["lr"] for group in now] == [group["lr"] for group in was]:
        schedule.restore_lr = saved["restore_lr"]
