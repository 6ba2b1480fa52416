"""A run that goes on with another number of processes: the same images at every update."""

import argparse
import logging
from collections.abc import Mapping
from typing import Any

from qna_timm.training.data.shards import ShardPlan
from qna_timm.training.processes.distributed import Processes

_logger = logging.getLogger(__name__)


def keep_plan(
    args: argparse.Namespace, state: Mapping[str, Any] | None, processes: Processes
) -> ShardPlan | None:
    """The saved run's division of its images, if this run asks for as many in an update.

    It asks for them if its batch size and accumulation are the saved run's, or those that the run
    began with, whatever the number of processes, or if its product of batch size, accumulation and
    processes is. ``args`` is changed so that the processes make the updates of the plan: shards of
    the same size, accumulated.

    Args:
        args: Flags, of which ``batch_size`` and ``grad_accum_steps`` are read and changed.
        state: Header of the state that is resumed, if there is one.
        processes: The run's processes.

    Returns:
        The plan, or None where the run makes its own.

    Raises:
        UsageError: So many processes cannot share the updates out evenly.
    """
    if state is None or not state.get("plan"):
        return None
    plan, saved = ShardPlan(**state["plan"]), state["args"]
    asked = args.batch_size * args.grad_accum_steps
    same = asked in (saved["batch_size"] * saved["grad_accum_steps"], images_asked(state))
    if not same and asked * processes.world_size != plan.batch_size * plan.shards_per_update:
        return None
    accumulation = plan.accumulation(processes.world_size)
    if (args.batch_size, args.grad_accum_steps) != (plan.batch_size, accumulation):
        _logger.info(
            "updates of %d images as before: %d images per process x %d process(es) x %d"
            " accumulation",
            plan.batch_size * plan.shards_per_update,
            plan.batch_size,
            processes.world_size,
            accumulation,
        )
    args.batch_size, args.grad_accum_steps = plan.batch_size, accumulation
    return plan


def images_asked(state: Mapping[str, Any]) -> int:
    """Images of an update that each process took in when a run began.

    The command that began it asks for so many whenever it is given again, although the state's
    ``args`` may be those of fewer processes, which accumulate more.

    Args:
        state: The run's state or its header.
    """
    saved = state["args"]
    return state.get("images_asked") or saved["batch_size"] * saved["grad_accum_steps"]
