"""Real signals to one process of a run, wherever it is: all agree, save, and lose nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from faulty_runs import without_drawing
from killing import ROOT, Run, contents, differing, free_port, to_the_end
from preloaded import programs

from qna_timm.training import loop
from qna_timm.training.data.sampling import KeyedDataset
from qna_timm.training.resume import Position
from qna_timm.training.session import Session
from qna_timm.training.signals import SIGNALS, Stopped, StopSignals
from qna_timm.training.storage import files
from qna_timm.training.storage.state_files import STATE_NAME, load_state

UPDATES = 3  # of each of the two epochs
SECONDS = 30  # in which a stopped run has to be gone


pytestmark = pytest.mark.usefixtures("in_own_folder")


def flags(*argv: str) -> list[str]:
    words = "--dataset sklearn/digits --model test_vit --img-size 32 -b 8 -j 0 --device cpu"
    words += f" --opt adamw --lr 1e-3 --epochs 2 --max-steps {UPDATES} --val-num-samples 32"
    words += " --mixup 0.2 --drop-path 0.1 --model-ema --model-ema-decay 0.5"
    words += " --output . --experiment a --resume auto --dist-timeout 60s"
    return [*words.split(), *argv]


@pytest.fixture(scope="module")
def undisturbed(
    train: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, str]]:
    """Contents of the folder of a run on so many processes that no signal reaches."""
    done: dict[int, dict[str, str]] = {}

    def run(processes: int) -> dict[str, str]:
        if processes not in done:
            output = tmp_path_factory.mktemp("undisturbed")

            def prepare(rank: int) -> None:
                os.chdir(output)
                without_drawing(rank)

            to_the_end(train, flags(), output / "log", processes, prepare=prepare)
            done[processes] = contents(output / "a")
        return done[processes]

    return run


class Sender:
    """Has a process send itself a signal, and others right after it, when it calls a function.

    Args:
        owner: Of the function.
        name: Of the function.
        signum: Of the signal.
        rank: Of the process.
        call: How often the function has been called by then.
    """

    def __init__(self, owner: Any, name: str, signum: int, rank: int, call: int = 1) -> None:
        self.owner = owner
        self.name = name
        self.signum = signum
        self.rank = rank
        self.call = call

    def install(self, rank: int) -> None:
        without_drawing(rank)
        whole, calls = getattr(self.owner, self.name), [0]

        def signalled(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if rank == self.rank and calls[0] == self.call:
                self._send(args)
            return whole(*args, **kwargs)

        setattr(self.owner, self.name, signalled)

    def _send(self, args: tuple[Any, ...]) -> None:
        if self.name == "backward":  # while gradients are computed, and reduced
            args[0].register_hook(lambda gradient: self._kill())
        else:
            self._kill()

    def _kill(self) -> None:
        for signum in (self.signum, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)


def places(train: ModuleType) -> dict[str, tuple[Any, str, int, Position | None]]:
    """Owner and name of a function, number of the call, and where the run has to stop then."""
    return {
        "joining": (train, "join_processes", 1, None),
        "joined": (train, "set_up", 1, None),
        "loading": (KeyedDataset, "__getitems__", 2, Position(0, 2)),
        "backward": (torch.Tensor, "backward", 2, Position(0, 2)),
        "optimizer": (loop.Trainer, "_update", 2, Position(0, 3)),
        "evaluation": (Session, "_evaluate", 1, Position(0, 3, True)),
        "saving": (Session, "save_state", 1, Position(1)),
        "writing": (files, "sync_folder", 3, Position(1)),
        "last save": (Session, "_save_epoch", 2, Position(2)),
    }


CASES = [
    (2, "joining", signal.SIGTERM),
    (2, "joined", signal.SIGUSR1),
    (2, "loading", signal.SIGUSR1),
    (2, "backward", signal.SIGTERM),
    (2, "optimizer", signal.SIGINT),
    (2, "evaluation", signal.SIGTERM),
    (2, "saving", signal.SIGINT),
    (2, "last save", signal.SIGUSR1),
    (1, "joining", signal.SIGUSR1),
    (1, "backward", signal.SIGINT),
    (1, "evaluation", signal.SIGUSR1),
    (1, "writing", signal.SIGTERM),
]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for SLURM's command writes its arguments; every run is of job 41."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    return tmp_path / "asked"


@pytest.mark.parametrize("processes, place, signum", CASES)
def test_signal_to_one_process(
    processes: int,
    place: str,
    signum: int,
    train: ModuleType,
    undisturbed: Callable[[int], dict[str, str]],
    scontrol: Path,
    tmp_path: Path,
) -> None:
    owner, name, call, position = places(train)[place]
    sender = Sender(owner, name, signum, processes - 1, call)
    argv, log, folder = flags(), tmp_path / "log", tmp_path / "a"
    code = 0 if signum == signal.SIGUSR1 else 128 + signum
    codes = Run(train, argv, log, processes, sender.install).wait(SECONDS)
    text = log.read_text()
    assert codes == [code] * processes, text
    assert "Traceback" not in text
    assert text.count(f"warning: stopped by {signum.name}\n") == 1
    asked = scontrol.read_text() if scontrol.is_file() else ""
    assert asked == ("requeue 41\n" if signum == signal.SIGUSR1 else "")
    if position is None:
        assert not folder.exists(), "nothing was to be saved"
    else:
        assert Position(**load_state(folder / STATE_NAME)["position"]) == position
        assert f"saved after {position}: --resume a goes on from there" in text
        assert not [path for path in folder.iterdir() if path.name.endswith((".tmp", ".lock"))]
    to_the_end(train, argv, log, processes, prepare=without_drawing)
    assert differing(contents(folder), undisturbed(processes)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_signal_when_all_is_done(
    processes: int,
    train: ModuleType,
    undisturbed: Callable[[int], dict[str, str]],
    tmp_path: Path,
) -> None:
    sender = Sender(train, "leave_processes", signal.SIGTERM, processes - 1)
    run = Run(train, flags(), tmp_path / "log", processes, sender.install)
    assert run.wait(60) == [0] * processes
    assert differing(contents(tmp_path / "a"), undisturbed(processes)) == []


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def test_torchrun_passes_a_signal_on(
    train: ModuleType, undisturbed: Callable[[int], dict[str, str]], tmp_path: Path
) -> None:
    """As a scheduler sends it: to the launcher, in training."""
    argv = flags()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "train.py")]
    log = tmp_path / "log"
    with open(log, "w") as output:
        launcher = subprocess.Popen(
            [*command, *argv, "--epochs", "200", "--max-steps", "90", "--log-interval", "1"],
            env=environment(PYTHON_EXEC=str(programs() / "python")), stdout=output, stderr=output,
        )  # fmt: skip
        wait_for(lambda: re.search(r"train 1/200 \[2/", log.read_text()), log)
        launcher.send_signal(signal.SIGTERM)
        began = time.monotonic()
        launcher.wait(SECONDS + 20)
    text = log.read_text()
    assert time.monotonic() - began < SECONDS
    assert text.count("warning: stopped by SIGTERM\n") == 1, text
    assert "train.py: " not in text and "SIGKILL" not in text
    state = load_state(tmp_path / "a" / STATE_NAME)
    position = Position(**state["position"])
    assert f"saved after {position}" in text and state["num_updates"] >= 2


def wait_for(condition: Callable[[], Any], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def bit_of(signum: int, mask: str, pid: int) -> bool:
    """Whether a process has a signal in a mask: SigCgt has those caught, SigBlk those blocked."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(rf"{mask}:\s*(\w+)", status)[1], 16) >> (signum - 1) & 1)


def catches(signum: int, pid: Path) -> bool:
    """Whether a process that tells its number in a file has told it, and catches a signal."""
    return pid.is_file() and bit_of(signum, "SigCgt", int(pid.read_text()))


IMPATIENT = f"""
import os, runpy
from pathlib import Path

file = Path("pid" + os.environ["RANK"])
file.with_suffix(".new").write_text(str(os.getpid()))
file.with_suffix(".new").rename(file)
from qna_timm.training import signals
signals._PATIENCE = 1.0
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_waiting_for_processes_that_never_come() -> None:
    """PyTorch waits outside Python, where no handler runs; here for half an hour."""
    waiting = []
    for rank in "01":
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        with open(rank, "w") as log:
            command = [programs() / "python", "-c", IMPATIENT, *flags("--dist-timeout", "30m")]
            environ = environment(**launched, MASTER_PORT=str(free_port()))
            waiting.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
    for rank, process in enumerate(waiting):
        wait_for(lambda pid=Path(f"pid{rank}"): catches(signal.SIGUSR1, pid), Path(str(rank)))
        process.send_signal(signal.SIGTERM)
    for rank, process in enumerate(waiting):
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 143
        assert Path(str(rank)).read_text().endswith("stopped by SIGTERM\n")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_signal_before_anything_is_imported() -> None:
    """Importing PyTorch takes longer than many updates; a signal then is obeyed like any other."""
    started = {}
    for signum in (signal.SIGUSR1, signal.SIGINT):
        with open(signum.name, "w") as log:
            command = [sys.executable, str(ROOT / "train.py"), *flags()]
            started[signum] = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    for signum, process in started.items():
        wait_for(lambda pid=process.pid: bit_of(signal.SIGUSR1, "SigBlk", pid), Path(signum.name))
        process.send_signal(signum)
    for signum, process in started.items():
        assert process.wait(120) == (0 if signum == signal.SIGUSR1 else 130)
        assert Path(signum.name).read_text() == f"warning: stopped by {signum.name}\n"
    assert not Path("a").exists()


def test_signals_are_obeyed_at_once_or_wait() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.give_up_waiting()  # not yet
        assert signals.received == signal.SIGUSR1, "the first one counts"
        with pytest.raises(Stopped) as stopped:
            signals.obey()
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(Stopped, match="SIGINT") as stopped, StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 130


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with StopSignals() as signals:
        signals.defer()
        signals.give_up_waiting()
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 9
        signals.give_up_waiting()
        clock[0] += 2
        with pytest.raises(Stopped, match="SIGTERM"):
            signals.give_up_waiting()
