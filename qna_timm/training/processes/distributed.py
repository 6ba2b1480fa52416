"""The processes of a run: one without a launcher, several under torchrun or SLURM.

What hosts tell each other (flags, decisions, objects) goes over gloo, whatever the device: NCCL
would have them wait for the device, which may wait for a process that is gone until NCCL's own time
is out. NCCL carries what is computed on the device: gradients, statistics, sums of metrics.
"""

import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from timm.utils import world_info_from_env
from torch import Tensor

from qna_timm.training.errors import UsageError
from qna_timm.training.processes.launch import launched_by_slurm, set_interface, set_rendezvous
from qna_timm.training.processes.rendezvous import fresh_store, meets_in_used_store

T = TypeVar("T")

# Longest wait for connections to close, in seconds.
LEAVE_SECONDS = 10
# Between two looks at signals while processes meet.
_POLL_SECONDS = 0.1
# gloo reports a process that is gone, hangs or cannot be reached as a plain RuntimeError, most of
# them with the place in its source before the message.
GLOO_PLACE = re.compile(r"\[[^\]]*gloo/[^\]]*\]\s*")
GLOO_MESSAGE = re.compile(
    r"Application timeout caused|Connect(ion closed by peer| timeout)|Peer disconnected"
    r"|Remote peer closed|Socket (unexpectedly )?closed|Timed out waiting \d"
)
# NCCL's cause comes after its advice; what does not sound like a loss is wrong on this machine.
NCCL_CAUSE = re.compile(r"Last error: *\n(.+)")
NCCL_LOSS = re.compile(
    r"broken pipe|connection|ncclRemoteError|network error|remote (peer|process)"
    r"|tim(ed|ing) out|timeout",
    re.IGNORECASE,
)


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


def join_processes(
    device: str, timeout: timedelta | None = None, while_waiting: Callable[[], None] = lambda: None
) -> Processes:
    """Find the launcher's other processes, if any, and choose this process's device.

    torchrun's variables are read, or those of SLURM's tasks, for which rank 0 is met on the first
    machine of the job unless ``MASTER_ADDR`` and ``MASTER_PORT`` say otherwise.

    Args:
        device: Kind of device, such as ``cuda`` or ``cpu``; under a launcher each process gets
            the device of its number on the machine.
        timeout: Longest wait for the other processes, here and in each collective operation;
            PyTorch's when None.
        while_waiting: Called again and again while the others are waited for; may raise.

    Raises:
        UsageError: No such device, more processes on this machine than devices, or variables of
            a launcher that do not fit together.
        torch.distributed.DistError: Other processes did not come in time (`lost_connection`).
    """
    try:
        local_rank, rank, world_size = world_info_from_env()
    except ValueError as error:
        raise UsageError(f"the launcher's variables: {error}") from error
    by_slurm = launched_by_slurm(os.environ)
    if "WORLD_SIZE" not in os.environ and not by_slurm:
        local_rank, rank, world_size = 0, 0, 1
    resolved = _choose_device(device, local_rank if world_size > 1 else None, by_slurm)
    if world_size > 1:
        if by_slurm:
            set_rendezvous(os.environ)
        set_interface(os.environ)
        backends = _backends(resolved)
        _in_thread(lambda: _connect(backends, rank, world_size, timeout), while_waiting)
        # What later looks for these, in this process or in its loader workers, finds one kind.
        os.environ.update(LOCAL_RANK=str(local_rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    return Processes(resolved, rank, world_size)


def device_count(kind: str) -> int:
    """How many devices of a kind, such as ``cuda``, PyTorch finds here."""
    try:
        module = torch.get_device_module(kind)
        return module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError):  # of a kind that it does not know, or that has no count
        return 0


def _choose_device(device: str, local_rank: int | None, by_slurm: bool) -> torch.device:
    """The device for this process; `local_rank` is None without a launcher."""
    kind, _, index = device.partition(":")
    if kind != "cpu":
        if not (count := device_count(kind)):
            raise UsageError(f"--device {device}: PyTorch finds no {kind} device here; cpu works")
        if local_rank is not None and by_slurm and count == 1:
            local_rank = 0  # SLURM shows each task its own device only
        if (number := int(index or 0) if local_rank is None else local_rank) >= count:
            raise UsageError(
                f"--device {device}: process {number} of this machine has no device, {count} found"
            )
    try:
        if local_rank is not None and kind != "cpu":
            device = f"{kind}:{local_rank}"
        resolved = torch.device(device)
        if resolved.index is not None and hasattr(getattr(torch, kind, None), "set_device"):
            getattr(torch, kind).set_device(resolved)
    except RuntimeError as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return resolved


def _backends(device: torch.device) -> str:
    """Gloo for what is on the host and the device's own for what is there, as PyTorch spells it."""
    own = dist.get_default_backend_for_device(device)
    return own if own == "gloo" else f"cpu:gloo,{device.type}:{own}"


def _in_thread(work: Callable[[], None], while_waiting: Callable[[], None]) -> None:
    """Do what waits outside Python, where no signal's handler would run before it is through."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        while_waiting()
    if problems:
        raise problems[0]


def _connect(backends: str, rank: int, world_size: int, timeout: timedelta | None) -> None:
    """Connect to the other processes where the environment says that rank 0 is met."""
    try:
        store = fresh_store(rank, world_size, timeout) if meets_in_used_store() else None
        dist.init_process_group(
            backends, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except ValueError as error:  # without MASTER_ADDR or MASTER_PORT
        raise UsageError(f"{world_size} processes: {error}; torchrun and srun set it") from error
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            port = os.environ["MASTER_PORT"]
            raise UsageError(
                f"MASTER_PORT={port}: in use on this machine, another number is needed"
            ) from error
        if isinstance(error, dist.DistNetworkError) or "connectFullMesh" not in str(error):
            raise
        hint = "GLOO_SOCKET_IFNAME=eth0 or the like names the network between the machines"
        raise dist.DistNetworkError(f"{_reason(error)}; {hint}") from error


def leave_processes() -> None:
    """Close the connections to the other processes, without waiting long for lost ones."""
    if dist.is_available() and dist.is_initialized():
        # Where others are gone, NCCL may wait for them until its own time is out.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(LEAVE_SECONDS)


def first_to_tell() -> bool | None:
    """Whether this process is the first of its run to ask; None where nobody can say.

    What befalls all processes is so told once, and what befalls one alone is told by it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        return dist.distributed_c10d._get_default_store().add("told", 1) == 1
    except RuntimeError:  # who keeps the count is gone, and has told
        return False


def lost_connection(error: BaseException) -> str | None:
    """Say in one line that other processes are gone, if that is what an exception means.

    Args:
        error: Raised by a collective operation, by a backward pass that contains one, or by
            `join_processes`.

    Returns:
        The line, or NCCL's own where it cannot work for another reason; None for any other
        exception.
    """
    while error is not None:
        text = str(error)
        by_gloo = GLOO_PLACE.search(text) or GLOO_MESSAGE.match(text)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and by_gloo):
            reason = _reason(error)
            if isinstance(error, dist.DistBackendError) and not NCCL_LOSS.search(text):
                return reason
            return f"the connection to other processes is lost ({reason})"
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException) -> str:
    """What helps who runs this: the first line without advice on PyTorch, and NCCL's cause."""
    text = GLOO_PLACE.sub("", str(error)).strip()
    first, *_ = text.splitlines() or [type(error).__name__]
    reason = first.partition(". This is typically")[0].rstrip(".")
    cause = NCCL_CAUSE.search(text)
    return f"{reason}: {cause[1].strip()}" if cause else reason


def reduce_flags(values: Sequence[bool | Tensor], processes: Processes) -> list[int]:
    """Element-wise maximum of a few flags over all processes, in one or two small all-reduces.

    What the host knows goes first, over gloo, while an accelerator still computes the rest: a
    process that was lost before it came here is noticed at once, not when NCCL's time is out. The
    host has little else to do then; P processes need 2 (P - 1) messages, one after the other (two
    on a busy machine with two cores: 0.5 ms). Then it waits for the device, once: who is lost while
    that computes is missed when NCCL's time is out. On the CPU all flags go together.

    Args:
        values: Whole numbers or booleans, those computed on the device as scalar tensors; as many
            on every process.
        processes: The run's processes.

    Returns:
        The maxima, the same on every process.
    """
    later = [processes.device.type != "cpu" and isinstance(value, Tensor) for value in values]
    given = [0 if waits else int(value) for value, waits in zip(values, later, strict=True)]
    known = _maxima(torch.tensor(given, dtype=torch.int32), processes)
    if not any(later):
        return known
    flags = [value.to(processes.device) for value in values if isinstance(value, Tensor)]
    computed = iter(_maxima(torch.stack([flag.int() for flag in flags]), processes))
    return [next(computed) if waits else value for value, waits in zip(known, later, strict=True)]


def _maxima(flags: Tensor, processes: Processes) -> list[int]:
    """`flags` [N] or, if others have larger ones, theirs; read by the host."""
    if processes.distributed:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()


def decide_on_primary(processes: Processes, decide: Callable[[], T]) -> T:
    """Call `decide` on the first process only and give its answer to all.

    For decisions that look at the file system, which the first process's own writes would change
    under the others' eyes.

    Raises:
        UsageError: On every process, if `decide` raised it, or the file system an error.
    """
    outcome: list = [None, None]
    if processes.is_primary:
        try:
            outcome = [decide(), None]
        except UsageError as error:
            outcome = [None, str(error)]
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            outcome = [None, f"{where}{error.strerror or error}"]
    if processes.distributed:
        dist.broadcast_object_list(outcome)
    answer, problem = outcome
    if problem is not None:
        raise UsageError(problem)
    return answer


def process_place() -> tuple[int, int]:
    """This process's (rank, world_size); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Element-wise sum of a tensor over all processes, where it is; `values` is left as it is."""
    if process_place()[1] == 1:
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


def gather_to_all(value: T, processes: Processes) -> list[T]:
    """A value of every process in the order of ranks, on all of them."""
    gathered = [value] * processes.world_size
    if processes.distributed:
        dist.all_gather_object(gathered, value)
    return gathered
