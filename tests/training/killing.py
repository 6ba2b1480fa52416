"""Runs of train.py in forked processes, which tests kill, and what is left of them compared.

A fork of a process that has imported everything starts in milliseconds, so that many runs can be
killed. The parent must not have computed with several threads.
"""

import atexit
import contextlib
import hashlib
import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import sklearn.datasets  # noqa: F401  (imported before the forks, which need it)
import torch
import torch.distributed.nn.functional
import torch.nn.parallel.distributed

ROOT = Path(__file__).resolve().parents[2]
# What depends on when and where a run ran.
NOT_COMPARED = {"train.log", "environment.json", "curves.png", "spans.png", ".lock", "tensorboard"}

# Autograd starts its threads once, at the first backward pass. Where a trace of torch.compile comes
# first it finds the devices of fake tensors, starts threads for them, and forks cannot go backward.
torch.ones((), requires_grad=True).backward()


def load_train() -> ModuleType:
    """train.py as a module."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Run:
    """A run under way: a process for each rank.

    Args:
        train: From `load_train`.
        argv: Flags.
        log: Where the processes' output goes.
        processes: Number of ranks.
        prepare: Called with the rank in each process before it starts; what it patches there is
            patched nowhere else.

    Attributes:
        codes: Exit codes so far, minus the signal's number of those that were killed.
    """

    def __init__(
        self,
        train: ModuleType,
        argv: Sequence[str],
        log: Path,
        processes: int = 1,
        prepare: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self.pids: list[int] = []
        self.codes: list[int | None] = [None] * processes
        port = str(free_port())
        for rank in range(processes):
            environ = {}
            if processes > 1:
                environ = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            if pid := os.fork():
                self.pids.append(pid)
            else:
                _become(train, argv, log, environ, lambda rank=rank: prepare(rank))

    def kill(self, signum: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to ranks, or to all, that have not been seen to end."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None and (ranks is None or rank in ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def poll(self) -> list[int | None]:
        """See who has ended; `codes`."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                self.codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
        return self.codes

    def wait(
        self, timeout: float = 120.0, until: Callable[[list[int | None]], bool] | None = None
    ) -> list[int | None]:
        """Wait until all have ended, or until what `until` makes of their exit codes is true.

        Raises:
            TimeoutError: It took too long; all are killed.
        """
        deadline = time.monotonic() + timeout
        while not (until or all_ended)(self.poll()):
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"exit codes {self.codes} after {timeout} s")
            time.sleep(0.005)
        return self.codes


def all_ended(codes: Sequence[int | None]) -> bool:
    """For `Run.wait`."""
    return None not in codes


def any_ended(codes: Sequence[int | None]) -> bool:
    """For `Run.wait`."""
    return any(code is not None for code in codes)


def _become(
    train: ModuleType,
    argv: Sequence[str],
    log: Path,
    environ: dict[str, str],
    prepare: Callable[[], None],
) -> None:
    """Run train.py in this (forked) process, and end it."""
    code = 99
    atexit._clear()  # which are of the process that this one was forked from
    try:
        os.setpgid(0, 0)
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environ)
        sys.argv[:] = [str(ROOT / "train.py"), *argv]
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
        torch.set_num_threads(1)
        from qna_timm.training.errors import run_cli

        prepare()
        run_cli(lambda: train.main(list(argv)))
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 98
    finally:
        sys.stdout.flush()
        os._exit(code)


def to_the_end(
    train: ModuleType,
    argv: Sequence[str],
    log: Path,
    processes: int = 1,
    timeout: float = 240.0,
    prepare: Callable[[int], None] = lambda rank: None,
) -> float:
    """A run that nobody disturbs; seconds that it took.

    Raises:
        AssertionError: It failed.
    """
    began = time.monotonic()
    codes = Run(train, argv, log, processes, prepare).wait(timeout)
    assert not any(codes), f"exit codes {codes}: {log.read_text()[-3000:]}"
    return time.monotonic() - began


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a run folder that must be the same, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in NOT_COMPARED
    }


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of files that only one of two folders has, or that are not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
