"""Runs killed again and again, whose folders must be those of runs that nobody killed."""

import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import span_model  # noqa: F401  (registers its model)
from kill_phases import PHASES, Phases, Strike
from killing import Run, any_ended, contents, differing, to_the_end

from qna_timm.training.reporting.report import ARGS_NAME, SUMMARY_NAME
from qna_timm.training.storage.state_files import PREVIOUS_NAME, STATE_NAME, state_in

EVERYTHING = (
    "--drop-path 0.1 --mixup 0.2 --cutmix 1 --aa rand-m5-mstd0.5-inc1 --reprob 0.3 --model-ema"
    " --model-ema-decay 0.9"
)


class Case(NamedTuple):
    """What is run.

    Attributes:
        flags: Beside the common ones.
        processes: Ranks.
        elastic: Whether there may be fewer once there is a state; only weights are compared then.
    """

    flags: str
    processes: int = 1
    elastic: bool = False


CASES = {
    "vit": Case(f"--model test_vit {EVERYTHING} --grad-accum-steps 2"),
    "vit, workers": Case(f"--model test_vit {EVERYTHING} -j 2 --checkpoint-interval 1"),
    "vit, ranks": Case(
        f"--model test_vit {EVERYTHING} --grad-accum-steps 2 --checkpoint-interval 1", 2
    ),
    "vit, ranks, workers": Case(f"--model test_vit {EVERYTHING} -j 2", 2),
    # In float16 a loss scaler has a state of its own; its first scale is too large.
    "vit, float16": Case(f"--model test_vit {EVERYTHING} --amp --amp-dtype float16"),
    "resnet, workers": Case(f"--model test_resnet {EVERYTHING} -j 2 --clip-grad 1"),
    # Without broadcasts every rank has running statistics of its own.
    "resnet, ranks": Case(f"--model test_resnet {EVERYTHING} --no-ddp-bb --grad-accum-steps 2", 2),
    "spans": Case(
        "--model test_spans --model-ema --sched plateau --patience-epochs 0 --warmup-epochs 0"
    ),
}


def flags_of(case: Case, output: Path, *more: str) -> list[str]:
    """The run's command line; what comes later goes before."""
    words = (
        "--dataset sklearn/digits --img-size 32 -b 16 -j 0 --device cpu --opt adamw --lr 1e-3"
        " --warmup-epochs 1 --epochs 3 --max-steps 4 --train-num-samples 250 --val-num-samples 48"
        " --log-interval 100 --checkpoint-interval 2 --checkpoint-hist 2 --experiment run"
        " --resume auto"
    )
    return [*words.split(), *case.flags.split(), "--output", str(output), *more]


@dataclass
class Trial:
    """What became of a run that was killed.

    Attributes:
        kills: By phase that the first of its processes to die was in.
        late: Whether a start ran to its end before it was to be killed; then no more are made.
        survived: Whether the last start ran to its end.
        differing: Files that are not those of the run that nobody killed.
        trouble: What was wrong, for the eye.
    """

    kills: Counter[str] = field(default_factory=Counter)
    late: bool = False
    survived: bool = False
    differing: list[str] = field(default_factory=list)
    trouble: str = ""

    @property
    def identical(self) -> bool:
        """Whether the run ended as if nobody had killed it."""
        return self.survived and not self.differing


class Trials:
    """Trials of one case, each in a folder of its own below `place`.

    Args:
        train: From `killing.load_train`.
        case: What is run.
        place: An empty folder.

    Attributes:
        seconds: That the run takes when nobody kills it.
    """

    def __init__(self, train: ModuleType, case: Case, place: Path) -> None:
        self.train = train
        self.case = case
        self.place = place
        place.mkdir(parents=True)
        self.log = place / "straight.log"
        # All runs are told the same path, which their files mention.
        self.output = place / "output"
        self.seconds = self._run_to_the_end()
        self.expected = contents(self.output / "run")
        self._put_away("straight")

    def run(self, name: str, ends: Sequence[Strike | float], rng: random.Random) -> Trial:
        """Start as often as there are `ends`, or until done, then once more, and compare.

        Args:
            name: Of the trial; its folder stays there if it is not identical.
            ends: Where a process of each start kills itself, or after how many seconds one is
                killed; the other ranks are killed at once or a little later.
            rng: Chooses among the ranks.
        """
        trial = Trial()
        self.log = self.place / f"{name}.log"
        try:
            for end in ends:
                self._start_and_end(end, rng, trial)
                if trial.late:
                    break
            self._run_to_the_end()
            trial.survived = True
            trial.differing = self._differing()
        except (AssertionError, TimeoutError) as error:
            trial.trouble = str(error)
        if trial.identical:
            shutil.rmtree(self.output)
        else:
            self._put_away(name)
        return trial

    def _run_to_the_end(self) -> float:
        case = self.case
        phases = Phases(self.train, case.processes)
        argv = flags_of(case, self.output)
        return to_the_end(self.train, argv, self.log, case.processes, 240, phases.watch)

    def _start_and_end(self, end: Strike | float, rng: random.Random, trial: Trial) -> None:
        processes, others_at_once = self._choose_processes(rng), rng.random() < 0.5
        first = end.rank if isinstance(end, Strike) else rng.randrange(processes)
        strike = end if isinstance(end, Strike) else None
        phases = Phases(self.train, processes, strike)
        run = Run(self.train, flags_of(self.case, self.output), self.log, processes, phases.watch)
        if strike is None:
            time.sleep(end)
            run.kill(ranks=[first])
        run.wait(until=any_ended)
        if 0 not in run.codes and not others_at_once:
            time.sleep(rng.uniform(0, 0.1))
        if 0 not in run.codes:
            run.kill()
        codes = run.wait()
        if codes[first] == -9:
            trial.kills[phases.of(first)] += 1
        elif not any(codes):
            trial.late = True
        else:
            raise AssertionError(f"exit codes {codes}: {self.log.read_text()[-3000:]}")

    def _choose_processes(self, rng: random.Random) -> int:
        elastic = self.case.elastic and state_in(self.output / "run") is not None
        return rng.randint(1, self.case.processes) if elastic else self.case.processes

    def _differing(self) -> list[str]:
        found = differing(self.expected, contents(self.output / "run"))
        # The loss of an evaluation is summed over the images of each process, and the start that
        # did the last of the work may have been one process, which accumulates more.
        inexact = {SUMMARY_NAME, STATE_NAME, PREVIOUS_NAME, ARGS_NAME} if self.case.elastic else ()
        return [name for name in found if name not in inexact]

    def _put_away(self, name: str) -> None:
        if self.output.is_dir():
            self.output.rename(self.place / name)


def strikes_everywhere(case: Case, rng: random.Random) -> list[Strike]:
    """One in every phase, at random entries and ranks, in random order.

    Those that a short run may not come to any more when little of it is left come first.
    """
    most = {"start-up": 1, "between": 1, "evaluation": 2}
    strikes = [
        Strike(
            phase,
            rng.randint(1, most.get(phase, 2)),
            rng.randrange(case.processes),
            leaving=phase != "between" and rng.random() < 0.5,
        )
        for phase in rng.sample(PHASES, len(PHASES))
    ]
    return sorted(strikes, key=lambda strike: strike.phase not in ("saving", "evaluation"))
