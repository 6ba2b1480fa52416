"""The state of a run after an epoch: written to one file, read back, put in place.

The file holds everything that the rest of the run depends on: weights and their average, optimizer,
loss scaler, plateau counters, random number generators of every process, and what the caller adds
(summary, best epochs, arguments). Tensors are stored as such, all else as JSON in the header.
"""

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler import PlateauLRScheduler
from timm.utils import random_seed, unwrap_model

from qna_timm.training.checkpoint import check_weights
from qna_timm.training.distributed import Processes, gather_to_primary
from qna_timm.training.errors import UsageError
from qna_timm.training.loop import Trainer
from qna_timm.training.state_files import (  # noqa: F401  (known by these names to scripts)
    STATE_KEY,
    STATE_NAME,
    find_state,
    load_state,
    save_state,
)

_logger = logging.getLogger(__name__)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of this process's generators: Python's, NumPy's, PyTorch's, the accelerator's."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `random_state`; generators that `state` does not know stay as they are."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def collect_state(trainer: Trainer, epochs_done: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The run's state, to be called by every process.

    Args:
        trainer: What trains.
        epochs_done: Number of whole epochs behind us.
        extra: More nested values to save.

    Returns:
        The state on the first process; on the others without the random states of the rest.
    """
    task, schedule = trainer.task, trainer.schedule
    ema = task.get_trainable_module(ema=True)
    plateau = isinstance(schedule, PlateauLRScheduler)
    return {
        "epochs_done": epochs_done,
        "num_updates": trainer.num_updates,
        "model": unwrap_model(task.get_trainable_module()).state_dict(),
        "task": task.get_task_state(),
        "ema": None if ema is None else unwrap_model(ema).state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "settings": trainer.settings,
        "scaler": trainer.precision.scaler.state_dict(),
        "plateau": schedule.lr_scheduler.state_dict() if plateau else None,
        "random": gather_to_primary(
            random_state(trainer.processes.device), trainer.processes
        ),
        **extra,
    }  # fmt: skip


def restore(
    trainer: Trainer, state: Mapping[str, Any], path: Path, *, with_optimizer: bool = True
) -> None:
    """Put a loaded state in place, to be called by every process before its first epoch.

    Settings of the optimizer that the flags have changed since (such as the learning rate) take
    effect, and are logged.

    Args:
        trainer: What trains, freshly made from the flags.
        state: From `load_state`.
        path: Where it is from, for messages.
        with_optimizer: False starts optimizer, scaler and schedule afresh (--no-resume-opt).

    Raises:
        UsageError: The state is of another model or optimizer.
    """
    task = trainer.task
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
    trainer.num_updates = state["num_updates"]
    if with_optimizer:
        _restore_optimizer(trainer, state, path)
        trainer.precision.scaler.load_state_dict(state["scaler"])
    _restore_schedule(trainer, state, with_optimizer)
    restore_random(state["random"], trainer.processes, trainer.args.seed + state["epochs_done"])


def restore_random(states: list[Mapping[str, Any]], processes: Processes, seed: int) -> None:
    """Set this process's generators, or seed them where the number of processes has changed."""
    if len(states) == processes.world_size:
        set_random_state(states[processes.rank], processes.device)
    else:
        random_seed(seed, processes.rank)
        _logger.warning(
            "saved by %d processes, resumed by %d: random numbers start afresh",
            len(states),
            processes.world_size,
        )


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
            changes.setdefault(key, f"{key.replace('initial_', '')} {old.get(key)} -> {value}")
        if "initial_lr" in changed:
            changed["lr"] = changed["initial_lr"]
        groups.append({**group, **changed})
    try:
        optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path}: not the state of this optimizer ({error}); {hint}") from error
    if changes:
        _logger.info("changed since the state was saved: %s", ", ".join(changes.values()))


def _restore_schedule(trainer: Trainer, state: Mapping[str, Any], with_state: bool) -> None:
    """Move the schedule to where the run stands; timm's schedules are functions of the count."""
    schedule, epoch = trainer.schedule, state["epochs_done"]
    if isinstance(schedule, PlateauLRScheduler):
        if with_state and state["plateau"] is not None:
            schedule.lr_scheduler.load_state_dict(state["plateau"])
    elif schedule is not None:
        schedule.step_update(num_updates=state["num_updates"])
        schedule.step(epoch)
