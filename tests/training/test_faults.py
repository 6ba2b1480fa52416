"""Runs in which something goes wrong: numbers, disks, other runs, images, workers."""

import csv
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from faulty_runs import (
    Poison,
    flags,
    poison,
    tensors_in,
    without_drawing,
)
from killing import Run, contents, differing, to_the_end

from qna_timm.training import loop, run
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.nonfinite import NonFinite
from qna_timm.training.precision import Precision
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.resume import Position
from qna_timm.training.session import Session
from qna_timm.training.storage.checkpoint import read_metadata
from qna_timm.training.storage.state_files import PREVIOUS_NAME, STATE_NAME, load_state
from qna_timm.training.task import TrainTask

CPU = torch.device("cpu")
FOLDER = Path("a")
LOG = Path("log")


pytestmark = pytest.mark.usefixtures("in_own_folder")


Kept = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def undisturbed(train: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Contents of the folder of a run that ends well, by its flags and what is wrong in it."""
    done: dict[tuple, dict[str, str]] = {}

    def run(*argv: str, processes: int = 1, fault: Poison | None = None) -> dict[str, str]:
        key = (argv, processes, fault and fault.places)
        if key not in done:
            output = tmp_path_factory.mktemp("undisturbed")

            def prepare(rank: int) -> None:
                os.chdir(output)
                (fault.install if fault else without_drawing)(rank)

            to_the_end(train, flags(*argv), output / "log", processes, prepare=prepare)
            done[key] = contents(output / FOLDER)
        return done[key]

    return run


def different(expected: dict[str, str]) -> list[str]:
    """Names of files that differ from a run's; which state is the last but one depends on stops."""
    return [name for name in differing(contents(FOLDER), expected) if name != PREVIOUS_NAME]


def position() -> Position:
    return Position(**load_state(FOLDER / STATE_NAME)["position"])


def summary() -> list[dict[str, str]]:
    with open(FOLDER / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def nonfinite() -> list[tuple[int, int]]:
    lines = (FOLDER / "nonfinite.jsonl").read_text().splitlines()
    return [(record["epoch"], record["update"]) for record in map(json.loads, lines)]


def failure_in(text: str) -> str:
    """The one line that says why a run ended."""
    (line,) = [line for line in text.splitlines() if line.startswith("train.py: failed")]
    assert "Traceback" not in text
    return line


def test_stop_before_a_bad_update(train: ModuleType, undisturbed: Kept) -> None:
    """One of two processes has a bad image in its second micro-batch; all stop."""
    codes = Run(train, flags(), LOG, 2, poison((1, 1)).install).wait(60)
    assert codes == [1, 1], LOG.read_text()
    line = failure_in(LOG.read_text())
    assert line.startswith("train.py: failed: epoch 2, update 2: loss is nan on rank 1 (samples ")
    assert "first bad tensor" in line and "input, nan at [" in line
    assert line.endswith("weights are those before the update")
    (record,) = map(json.loads, (FOLDER / "nonfinite.jsonl").read_text().splitlines())
    (fault,) = record["faults"]
    assert (fault["rank"], fault["micro_batch"], len(fault["samples"])) == (1, 3, 8)
    state = load_state(FOLDER / STATE_NAME)
    assert position() == (1, 1, False)
    assert all(tensor.isfinite().all() for tensor in tensors_in(state))
    # what was saved is untouched by the bad update: without it the run is one of healthy images
    shutil.copytree(FOLDER, "saved")
    to_the_end(train, flags(), LOG, 2, prepare=without_drawing)
    assert different(undisturbed(processes=2)) == []
    # and where it is there, it can be left out
    shutil.rmtree(FOLDER)
    os.rename("saved", FOLDER)
    again = flags("--on-nonfinite", "skip")
    to_the_end(train, again, LOG, 2, prepare=poison((1, 1)).install)
    assert [row["train_skipped_updates"] for row in summary()] == ["", "1"]
    assert nonfinite() == [(1, 1)], "told once, though met twice"


@pytest.mark.parametrize(
    ("signum", "policy"),
    [
        (signal.SIGTERM, "rewind"),
        (signal.SIGKILL, "skip"),
        pytest.param(signal.SIGTERM, "skip", marks=pytest.mark.thorough),
        pytest.param(signal.SIGKILL, "rewind", marks=pytest.mark.thorough),
    ],
)
def test_killed_after_a_bad_update(
    policy: str, signum: int, train: ModuleType, undisturbed: Kept
) -> None:
    """What a run leaves out, counts and goes back to is the same after a kill."""
    argv, fault = ("--on-nonfinite", policy), poison((0, 1), (0, 3), (1, 0))
    expected = undisturbed(*argv, processes=2, fault=fault)

    def prepare(rank: int) -> None:
        fault.install()
        update, made = loop.Trainer._update, [0]

        def killed(trainer: loop.Trainer, *args: object) -> None:
            update(trainer, *args)
            made[0] += 1
            if made[0] == (3 if policy == "skip" else 2):  # of the second epoch, the first
                os.kill(os.getpid(), signum)

        loop.Trainer._update = killed

    codes = Run(train, flags(*argv), LOG, 2, prepare).wait(60)
    assert codes == [143 if signum == signal.SIGTERM else -9] * 2, LOG.read_text()
    to_the_end(train, flags(*argv), LOG, 2, prepare=fault.install)
    assert different(expected) == []
    assert [row["train_skipped_updates"] for row in summary()] == ["2", "1"]
    assert nonfinite() == [(0, 1), (0, 3), (1, 0)]
    weights = load_state(FOLDER / STATE_NAME)
    assert all(tensor.isfinite().all() for tensor in tensors_in(weights))


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_bad_updates_in_a_row_end_the_run(policy: str, train: ModuleType) -> None:
    argv = flags("--on-nonfinite", policy, "--max-steps", "20", "-b", "16")
    bad = poison(*((0, update) for update in range(3, 20)))
    assert Run(train, argv, LOG, 1, bad.install).wait(60) == [1], LOG.read_text()
    told = {"skip": "10 updates before it", "rewind": "gone back 10 times"}[policy]
    assert told in failure_in(LOG.read_text())
    assert nonfinite() == [(0, update) for update in range(3, 14)]
    assert position() == (0, 13, False)
    assert all(tensor.isfinite().all() for tensor in tensors_in(load_state(FOLDER / STATE_NAME)))


@pytest.mark.parametrize("policy", [pytest.param("skip", marks=pytest.mark.thorough), "rewind"])
def test_bad_updates_now_and_then_do_not_end_the_run(policy: str, train: ModuleType) -> None:
    argv = flags("--on-nonfinite", policy, "--max-steps", "24", "-b", "16", "--epochs", "1")
    bad = poison(*((0, update) for update in range(1, 24, 2)))
    argv += ["--checkpoint-interval", "1"]
    assert Run(train, argv, LOG, 1, bad.install).wait(60) == [0], LOG.read_text()
    assert len(nonfinite()) == 12


def test_count_of_bad_updates_survives_a_kill(train: ModuleType) -> None:
    argv = flags("--on-nonfinite", "skip", "--max-steps", "20", "-b", "16")
    bad = poison(*((0, update) for update in range(3, 20)))

    def prepare(rank: int) -> None:
        bad.install()
        refuse, refused = loop.Trainer._refuse, [0]

        def killed(trainer: loop.Trainer, *args: Any) -> None:
            refuse(trainer, *args)
            refused[0] += 1
            if refused[0] == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.Trainer._refuse = killed

    assert Run(train, argv, LOG, 1, prepare).wait(60) == [-9]
    assert Run(train, argv, LOG, 1, bad.install).wait(60) == [1]
    assert "10 updates before it" in failure_in(LOG.read_text())
    assert nonfinite() == [(0, update) for update in range(3, 14)]


def test_rewind_with_a_fresh_optimizer(train: ModuleType) -> None:
    """The state that it was resumed from has another optimizer's."""
    to_the_end(train, flags("--stop-epoch", "1"), LOG, prepare=without_drawing)
    argv = flags("--on-nonfinite", "rewind", "--no-resume-opt", "--opt", "sgd")
    to_the_end(train, argv, LOG, prepare=Poison([(1, 17)]).install)
    assert nonfinite() == [(1, 1)] and len(summary()) == 2


def test_rewind_with_a_plateau_schedule(train: ModuleType) -> None:
    """A rewind is no epoch without improvement."""
    argv = flags("--on-nonfinite", "rewind", "--sched", "plateau", "--patience-epochs", "0")
    to_the_end(train, [*argv, "--epochs", "3"], LOG, prepare=Poison([(2, 17)]).install)
    assert nonfinite() == [(2, 1)] and len(summary()) == 3


def test_loss_scaler(train: ModuleType) -> None:
    """What it leaves out while it looks for its scale is no fault; a loss that is inf is."""
    argv = flags("--amp", "--amp-dtype", "float16", "--lr", "1e-4")
    to_the_end(train, argv, LOG, prepare=without_drawing)
    scale = load_state(FOLDER / STATE_NAME)["scaler"]["scale"]
    assert 1 <= scale < 65536 and not (FOLDER / "nonfinite.jsonl").exists()
    shutil.rmtree(FOLDER)
    assert Run(train, argv, LOG, 1, Poison([(1, 17)]).install).wait(60) == [1]
    assert "epoch 2, update 2: loss is nan (samples" in failure_in(LOG.read_text())
    assert position() == (1, 1, False)


def test_gradients_that_no_scale_helps() -> None:
    """A loss scaler would leave out update after update, for ever."""
    model = torch.nn.Linear(2, 3)
    model.get_classifier = lambda: model
    args = parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu", "--amp"])
    task = TrainTask(model, torch.nn.CrossEntropyLoss(), device=CPU, verbose=False)
    trainer = loop.Trainer(
        task, torch.optim.SGD(model.parameters()), None,
        args=args, processes=Processes(CPU), precision=Precision(args, CPU),
    )  # fmt: skip
    model.weight.register_hook(lambda gradient: gradient * torch.nan)
    data = [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))] * 40
    with pytest.raises(NonFinite, match="gradients are not finite"):
        trainer.train_epoch(data, 0, "train")
    assert trainer.num_updates == 17, "65536 halved until it is below 1"


def test_nan_metric_is_never_best(train: ModuleType) -> None:
    """Nor once the run was resumed."""

    def prepare(rank: int) -> None:
        without_drawing()
        evaluate = Session._evaluate

        def failing(session: Session, ema: bool) -> dict[str, float]:
            metrics = evaluate(session, ema)
            return {**metrics, "top1": math.nan} if session.position.epoch != 1 else metrics

        Session._evaluate = failing

    to_the_end(train, flags("--stop-epoch", "1"), LOG, prepare=prepare)
    assert not (FOLDER / "best.safetensors").exists() and summary()[0]["eval_top1"] == "nan"
    to_the_end(train, flags("--epochs", "3", "--stop-epoch", "3"), LOG, prepare=prepare)
    assert read_metadata(FOLDER / "best.safetensors")["epoch"] == 1
    assert [row["eval_top1"] == "nan" for row in summary()] == [True, False, True]


@pytest.mark.parametrize("resume", ["auto", ""])
@pytest.mark.parametrize("processes", [1, 2])
def test_second_run_is_refused(processes: int, resume: str, train: ModuleType) -> None:
    def waits(rank: int) -> None:
        without_drawing()
        update = loop.Trainer._update

        def waiting(trainer: loop.Trainer, *args: Any) -> None:
            while (FOLDER / STATE_NAME).is_file() and not Path("refused").exists():
                time.sleep(0.02)
            update(trainer, *args)

        loop.Trainer._update = waiting

    argv = flags("--resume", resume)
    first = Run(train, argv, LOG, processes, waits)
    first_log, second_log = LOG, Path("log2")
    try:
        first.wait(60, until=lambda codes: (FOLDER / STATE_NAME).is_file() or any(codes))
        second = Run(train, argv, second_log, processes, without_drawing)
        assert second.wait(60) == [2] * processes, second_log.read_text()
        Path("refused").touch()
        (line,) = second_log.read_text().splitlines()
        assert line.startswith("train.py: error: ")
        assert f"in use by process {first.pids[0]} on " in line and "train.py --dataset" in line
        assert first.wait(60) == [0] * processes
    finally:
        first.kill()
    assert "Traceback" not in first_log.read_text() and len(summary()) == 2
    assert not [path.name for path in FOLDER.iterdir() if path.name.startswith(".")]


def test_killed_runs_are_in_nobodys_way(train: ModuleType, undisturbed: Kept) -> None:
    """Ten times killed, each time at once started again; two processes and their workers."""
    argv = flags("-j", "1")
    for _ in range(10):
        run = Run(train, argv, LOG, 2, without_drawing)
        run.wait(60, until=lambda codes: (FOLDER / ".lock").is_file() or any(codes))
        run.kill()
        assert run.wait(60) == [-9, -9], LOG.read_text()
        assert (FOLDER / ".lock").is_file(), "it held the lock"
    to_the_end(train, argv, LOG, 2, prepare=without_drawing)
    assert different(undisturbed("-j", "1", processes=2)) == []


def test_mistake_on_one_machine_is_told_by_it(train: ModuleType) -> None:
    def prepare(rank: int) -> None:
        def missing(*args: Any) -> None:
            raise UsageError("--data-dir: not on this machine")

        if rank == 1:
            run.open_datasets = missing

    codes = Run(train, flags(), LOG, 2, prepare).wait(60)
    lines = [line for line in LOG.read_text().splitlines() if line.startswith("train.py: ")]
    assert codes == [1, 2] and "train.py: error: --data-dir: not on this machine" in lines
