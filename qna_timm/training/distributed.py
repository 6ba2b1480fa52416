"""The processes of a run: one without a launcher, several under torchrun or SLURM."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device
from torch import Tensor

from qna_timm.training.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run.

    Attributes:
        device: The device of this process.
        rank: Number of this process over all machines; 0 reports and writes.
        world_size: Number of processes over all machines.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def distributed(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1

    @property
    def is_primary(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    @property
    def ddp_device_ids(self) -> list[torch.device] | None:
        """``device_ids`` for DistributedDataParallel, which wants none on the CPU."""
        return None if self.device.type == "cpu" else [self.device]


def join_processes(device: str) -> Processes:
    """Find the launcher's other processes, if any, and choose this process's device.

    Args:
        device: Kind of device, such as ``cuda`` or ``cpu``; under a launcher each process gets
            the device of its number on the machine.

    Raises:
        UsageError: More processes on this machine than devices.
    """
    place = Namespace(device=device)
    try:
        resolved = init_distributed_device(place)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return Processes(resolved, place.rank, place.world_size)


def leave_processes() -> None:
    """Close the connections to the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def decide_on_primary(processes: Processes, decide: Callable[[], T]) -> T:
    """Call `decide` on the first process only and give its answer to all.

    For decisions that look at the file system, which the first process's own writes would change
    under the others' eyes.

    Raises:
        UsageError: On every process, if `decide` raised it.
    """
    outcome: list = [None, None]
    if processes.is_primary:
        try:
            outcome = [decide(), None]
        except UsageError as error:
            outcome = [None, str(error)]
    if processes.distributed:
        dist.broadcast_object_list(outcome, device=processes.device)
    answer, problem = outcome
    if problem is not None:
        raise UsageError(problem)
    return answer


def sum_over_processes(values: Tensor, processes: Processes) -> Tensor:
    """Element-wise sum of a tensor over all processes; `values` is left as it is."""
    if not processes.distributed:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def gather_to_primary(value: T, processes: Processes) -> list[T] | None:
    """A value of every process in the order of ranks, on the first process; None on the others."""
    if not processes.distributed:
        return [value]
    gathered = [None] * processes.world_size if processes.is_primary else None
    dist.gather_object(value, gathered)
    return gathered
