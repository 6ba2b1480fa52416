"""Time and peak memory of calls that stand side by side: what all benchmarks share.

A candidate is a maker: a function without arguments that builds inputs and returns the call to
measure. `compare` runs each maker in a process of its own first, which gives the peak memory and
tells who is too slow, too large or unable to run, and then times the others in this process, in
rounds in which they take turns.
"""

import ctypes
import gc
import math
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
Maker = Callable[[], Call]
Name = TypeVar("Name", bound=Hashable)

# A process may take this long to import, to build its inputs and to compile, in seconds.
BUILD_SECONDS = 900.0
# A turn repeats calls that are shorter, so that reading the clock and waiting for a GPU drop out.
TURN_SECONDS = 5e-3
MOST_CALLS = 200
FEWEST_ROUNDS = 3
# One call that takes as long is warm-up enough.
WARM_SECONDS = 1.0
# Of the memory that is free, what a candidate may take.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call in each round: by the clock, and of the processor in all threads."""

    wall: Sequence[float]
    cpu: Sequence[float]


@dataclass(frozen=True)
class Result:
    """What is known of a candidate.

    Args:
        timing: None if the candidate was skipped.
        peak_mib: Most memory of a call at a time beyond what was there before, in MiB; None where
            it cannot be told.
        seconds: Of the one call whose memory was taken.
        skipped: Why there is no timing, or nothing.
    """

    timing: Timing | None = None
    peak_mib: float | None = None
    seconds: float = math.nan
    skipped: str = ""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds that hold the median of what the values are drawn from with 95 % confidence.

    The k-th smallest and the k-th largest, k = (n - 1.96 sqrt(n)) / 2, whatever the distribution;
    the extremes where values are few.
    """
    ordered, number = sorted(values), len(values)
    k = max(1, math.floor((number - 1.96 * math.sqrt(number)) / 2))
    return ordered[k - 1], ordered[number - k]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """over[r] / under[r] in each round r that both took part in.

    What slows the machine down for a while slows both of a pair and falls out.
    """
    return [a / b for a, b in zip(over, under, strict=False)]


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of `ratios`."""
    return quartiles(ratios(over, under))


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def _time_turn(call: Call, count: int, device: str) -> tuple[float, float]:
    """Seconds of a call, wall and processor, mean of count calls."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def time_rounds(
    calls: Mapping[Name, Call],
    rounds: int | Mapping[Name, int],
    device: str = "cpu",
    turn_seconds: float = TURN_SECONDS,
) -> dict[Name, Timing]:
    """Times calls in turns, after some to warm up.

    The order is reversed in every other round: what runs second finds other things in the caches.

    Args:
        calls: Candidates by name.
        rounds: Rounds to time, of all or by name; who has fewer takes part in the first ones.
        device: What to wait for.
        turn_seconds: Shorter calls are repeated for about so long in a turn; 0 for one to warm up
            and one a turn, where other processes must make as many.
    """
    if isinstance(rounds, int):
        rounds = dict.fromkeys(calls, rounds)
    counts = {}
    for name, call in calls.items():
        seconds, _ = _time_turn(call, 1, device)
        if turn_seconds and seconds < WARM_SECONDS:
            seconds, _ = _time_turn(call, 1, device)  # the first one tells little
        counts[name] = max(1, min(MOST_CALLS, math.ceil(turn_seconds / seconds)))
    turns: dict[Name, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(max(rounds.values(), default=0)):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            if number < rounds[name]:
                turns[name].append(_time_turn(calls[name], counts[name], device))
    return {
        name: Timing([1e3 * wall for wall, _ in taken], [1e3 * cpu for _, cpu in taken])
        for name, taken in turns.items()
    }


def _status(field: str) -> int:
    """A field of this process's status in bytes. Linux."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    return 1024 * int(match[1]) if match else 0


def free_memory(device: str) -> int:
    """Bytes that are free on the device; on a CPU those of the machine or of its container."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = 1024 * int(match[1]) if match else 0
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def _limit_memory() -> int:
    """Makes allocations beyond the free memory fail here, before the system kills someone."""
    most = int(MEMORY_SHARE * free_memory("cpu"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + most, hard))
    return most


def _gpu_peak(call: Call, device: str) -> Result:
    """What the allocator had in use at most."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds, _ = _time_turn(call, 1, device)
    return Result(
        peak_mib=(torch.cuda.max_memory_allocated(device) - before) / 2**20, seconds=seconds
    )


def _cpu_peak(call: Call) -> Result:
    """What was resident at most: this counts what libraries allocate for themselves, and is good
    to a few hundred KiB. No peak where the system keeps none that can be reset."""
    gc.collect()
    try:
        # freed memory goes back to the system, so that the call has to ask for it again
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = _status("VmRSS")
    except (AttributeError, OSError):
        return Result(seconds=_time_turn(call, 1, "cpu")[0])
    seconds, _ = _time_turn(call, 1, "cpu")
    return Result(peak_mib=(_status("VmHWM") - before) / 2**20, seconds=seconds)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = re.search("can't allocate memory|bad_alloc", str(error))
    return isinstance(error, RuntimeError) and said is not None


def one_line(error: Exception) -> str:
    """The first line of what an exception says."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _measure_alone(sender: Connection, make: Maker, device: str, threads: int) -> None:
    """The body of a process of its own: says when it has built and warmed up, then the result."""
    torch.set_num_threads(threads)
    free = 0
    try:
        free = free_memory(device) if device != "cpu" else _limit_memory()
        call = make()
        sender.send("built")
        call()
        sender.send("warm")
        sender.send(_cpu_peak(call) if device == "cpu" else _gpu_peak(call, device))
    except Exception as error:  # whatever a candidate raises is the reason to skip it
        reason = one_line(error)
        if _is_out_of_memory(error):
            reason = f"needs more than the {free / 2**30:.1f} GiB of memory that are free"
        sender.send(Result(skipped=reason))


def _listen(receiver: Connection, process: BaseProcess, skip_after: float | None) -> Result:
    """The result of a process, or why there is none."""
    limit: float | None = BUILD_SECONDS
    while receiver.poll(limit):
        try:
            message = receiver.recv()
        except EOFError:
            process.join()
            return Result(skipped=f"its process ended with exit code {process.exitcode}")
        if isinstance(message, Result):
            return message
        limit = skip_after
    process.kill()
    return Result(skipped=f"takes more than {limit:g} s")


def fresh_processes() -> ForkServerContext:
    """Of which each has computed nothing yet, and imports are made once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "qna_timm"])
    return context


def measure_alone(make: Maker, device: str = "cpu", skip_after: float = math.inf) -> Result:
    """Peak memory of a call, and its seconds, in a process of its own that warmed up with one.

    Args:
        make: Picklable, so a function of a module or a `functools.partial` of one.
        device: Where the call computes.
        skip_after: Seconds after which a call is given up.
    """
    context = fresh_processes()
    receiver, sender = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    process = context.Process(target=_measure_alone, args=(sender, make, device, threads))
    process.start()
    sender.close()
    try:
        return _listen(receiver, process, None if skip_after == math.inf else skip_after)
    finally:
        process.join(5)
        process.kill()
        process.join()


def compare(
    makers: Mapping[Name, Maker],
    rounds: int,
    device: str = "cpu",
    seconds: float = math.inf,
    skip_after: float = math.inf,
) -> dict[Name, Result]:
    """Measures candidates side by side.

    Args:
        makers: Candidates by name.
        rounds: Rounds in which they take turns.
        device: Where they compute.
        seconds: A candidate leaves the rounds when its calls have taken about so long in sum, but
            not before three.
        skip_after: Seconds of a call after which a candidate is skipped.

    Returns:
        A result for every candidate: time and memory, or why not.
    """
    torch.compiler.reset()  # else graphs of earlier shapes make it give up, or compile for any size
    if device != "cpu":
        torch.cuda.empty_cache()  # what earlier calls left, the processes to come would lack
    alone = {name: measure_alone(make, device, skip_after) for name, make in makers.items()}
    calls = {name: makers[name]() for name, result in alone.items() if not result.skipped}
    turns = {}
    for name in calls:
        affordable = seconds / alone[name].seconds
        turns[name] = int(min(rounds, max(FEWEST_ROUNDS, affordable)))
    timings = time_rounds(calls, turns, device)
    return {
        name: Result(timings.get(name), result.peak_mib, result.seconds, result.skipped)
        for name, result in alone.items()
    }
