"""Runs of train.py in forked processes, which tests kill, and what is left of them compared.

A fork of a process that has imported everything starts in milliseconds, so that many runs can be
killed. The parent must not have computed with several threads.
"""

import contextlib
import hashlib
import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from timm.models import create_model  # noqa: F401  (imported before the forks)

ROOT = Path(__file__).resolve().parents[2]
# What depends on when and where a run ran.
NOT_COMPARED = {"train.log", "environment.json", "curves.png", "spans.png", ".lock", "tensorboard"}


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
    """

    def __init__(
        self, train: ModuleType, argv: Sequence[str], log: Path, processes: int = 1
    ) -> None:
        self.pids = []
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
                _become(train, argv, log, environ)

    def kill(self, signum: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to ranks, or to all."""
        for rank, pid in enumerate(self.pids):
            if ranks is None or rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes, minus the signal's number of those that were killed.

        Raises:
            TimeoutError: Some did not end in time; they are killed.
        """
        codes: list[int | None] = [None] * len(self.pids)
        deadline = time.monotonic() + timeout
        while None in codes:
            for rank, pid in enumerate(self.pids):
                if codes[rank] is None:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"exit codes {codes} after {timeout} s")
            time.sleep(0.01)
        return codes


def _become(train: ModuleType, argv: Sequence[str], log: Path, environ: dict[str, str]) -> None:
    """Run train.py in this (forked) process, and end it."""
    code = 99
    try:
        os.setpgid(0, 0)
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environ)
        sys.argv[:] = [str(ROOT / "train.py"), *argv]
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
        torch.set_num_threads(1)
        from qna_timm.training.errors import run_cli

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
    train: ModuleType, argv: Sequence[str], log: Path, processes: int = 1, timeout: float = 240.0
) -> float:
    """A run that nobody disturbs; seconds that it took.

    Raises:
        AssertionError: It failed.
    """
    began = time.monotonic()
    codes = Run(train, argv, log, processes).wait(timeout)
    assert not any(codes), f"exit codes {codes}: {log.read_text()[-3000:]}"
    return time.monotonic() - began


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a run folder that must be the same, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in NOT_COMPARED
    }
