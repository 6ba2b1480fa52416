"""Runs killed at random instants end, started again, with the bits of runs that nobody killed."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from faulty_runs import without_drawing
from kill_phases import PHASES, Phases
from kill_trials import CASES, Case, Trials, flags_of, strikes_everywhere
from killing import Run, contents, differing, to_the_end

from qna_timm.training.loop import Trainer
from qna_timm.training.storage.state_files import PREVIOUS_NAME, STATE_NAME, read_state_header

# Cases that are also killed by the clock; scripts/stress.sh does that to all, many times.
TIMED = ("vit", "vit, ranks")
# What these have, others here have too; scripts/stress.sh kills them as often as the others.
ELSEWHERE = ("vit", "vit, workers", "vit, ranks, workers", "resnet, ranks")


def anywhere(name: str) -> Any:
    marks = [pytest.mark.thorough] * (name in ELSEWHERE)
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [anywhere(name) for name in CASES])
def test_killed_anywhere(train: ModuleType, tmp_path: Path, name: str) -> None:
    """In each phase once; in some cases also at two instants that ignore phases."""
    case, rng = CASES[name], random.Random(name)
    trials = Trials(train, case, tmp_path / "trials")
    struck = trials.run("struck", strikes_everywhere(case, rng), rng)
    trials_done = [struck]
    if name in TIMED:
        instants = [rng.uniform(0, trials.seconds) for _ in range(2)]
        trials_done.append(trials.run("killed", instants, rng))
    for trial in trials_done:
        assert trial.survived, trial.trouble
        assert trial.differing == []
    assert dict(struck.kills) == dict.fromkeys(PHASES, 1)


def stop_after_update() -> None:
    """This process, in which the run is, gets SIGTERM in the first micro-batch that it computes."""
    whole = Trainer._forward_backward

    def signalled(self: Trainer, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *args)

    Trainer._forward_backward = signalled


def prepared(phases: Phases) -> Callable[[int], None]:
    def prepare(rank: int) -> None:
        phases.watch(rank)
        stop_after_update()

    return prepare


def stopping(rank: int) -> None:
    without_drawing()
    stop_after_update()


SETTINGS = {
    "cosine": "--lr 1.3e-3 --min-lr 1e-5 --warmup-epochs 0",
    "noise": "--sched tanh --lr-noise 0 0.9 --warmup-epochs 0",
    "plateau": "--sched plateau --lr-noise 0.3 0.9 --patience-epochs 0 --warmup-epochs 0",
    "adahessian": "--opt adahessian --lr 0.05",
    "bfloat16": "--model-dtype bfloat16 --model-ema --model-ema-decay 0.9",
}


@pytest.mark.parametrize(
    "name",
    # there are killed runs with a plateau, too
    [pytest.param(name, marks=[pytest.mark.thorough] * (name == "plateau")) for name in SETTINGS],
)
def test_schedules_and_optimizers(train: ModuleType, tmp_path: Path, name: str) -> None:
    """Learning rates before a schedule's first step, noise on them; an optimizer and an average
    that draw."""
    argv = flags_of(Case(f"--model test_vit {SETTINGS[name]}"), tmp_path / "output")
    log, folder = tmp_path / "log", tmp_path / "output" / "run"
    to_the_end(train, argv, log, prepare=without_drawing)
    straight = contents(folder)
    folder.rename(tmp_path / "straight")
    for _ in range(5):
        codes = Run(train, argv, log, prepare=stopping).wait()
        assert codes == [143], log.read_text()[-3000:]
    to_the_end(train, argv, log, prepare=without_drawing)
    assert set(differing(straight, contents(folder))) <= {PREVIOUS_NAME}


@pytest.mark.parametrize(
    "name",
    # ranks that stop together are among the runs that are killed, and in test_signals.py
    ["vit", pytest.param("resnet, ranks", marks=pytest.mark.thorough)],
)
def test_stopped_and_resumed_after_every_update(
    train: ModuleType, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    trials = Trials(train, case, tmp_path / "trials")
    argv, positions = flags_of(case, trials.output), []
    for _ in range(20):
        phases = Phases(train, case.processes)
        codes = Run(train, argv, trials.log, case.processes, prepared(phases)).wait()
        if not any(codes):
            break
        assert codes == [143] * case.processes, trials.log.read_text()[-3000:]
        position = read_state_header(trials.output / "run" / STATE_NAME)["position"]
        positions.append((position["epoch"], position["updates"]))
    assert positions == [(epoch, update) for epoch in range(3) for update in (1, 2, 3, 4)]
    # it was saved elsewhere last but once
    elsewhere = {PREVIOUS_NAME}
    assert set(differing(trials.expected, contents(trials.output / "run"))) <= elsewhere
