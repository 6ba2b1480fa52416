"""Faults by the hundred, which tests have no time for; scripts/stress.sh runs it.

    python tests/training/stress.py [--quick] [--seed 0] [PART...]

Prints a table: how many faults were tried, after how many the run or the file went on, and after
how many all came out as it does without faults. Exits with 1 if any did not.
"""

import argparse
import json
import logging
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faulty_calls import FaultyCalls, full_disk, save_two, updates_in
from kill_phases import Phases
from kill_trials import CASES, EVERYTHING, Case, Trial, Trials, flags_of
from killing import Run, contents, differing, load_train, to_the_end
from test_files_killed import STAGES, check_goes_on

from qna_timm.training.errors import UsageError
from qna_timm.training.session import Session
from qna_timm.training.storage.state_files import PREVIOUS_NAME, STATE_NAME, load_state, whole_state

HERE = Path(__file__).resolve().parent
ELASTIC = Case(f"--model test_vit {EVERYTHING} --checkpoint-interval 1", 2, elastic=True)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        what: The faults.
        tried: How many.
        survived: After how many of them it went on.
        identical: After how many nothing was other than without.
        note: For the eye.
    """

    what: str
    tried: int
    survived: int
    identical: int
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether all came out as they should."""
        return self.tried == self.survived == self.identical


class Stress:
    """The parts, each of which yields rows.

    Args:
        place: An empty folder.
        seed: Of what is chosen at random.
        quick: A tenth of it.
    """

    def __init__(self, place: Path, seed: int, quick: bool) -> None:
        self.train = load_train()
        self.place = place
        self.rng = random.Random(seed)
        self.quick = quick

    def _count(self, number: int) -> int:
        return -(-number // 10) if self.quick else number

    def instants(self) -> Iterator[Row]:
        """SIGKILL at instants that are uniform over the time that a run takes."""
        cases = {**CASES, "vit, 1 or 2 ranks": ELASTIC}
        for number, (name, case) in enumerate(cases.items()):
            trials = Trials(self.train, case, self.place / f"instants-{number}")
            done: list[Trial] = []
            while sum(trial.kills.total() for trial in done) < self._count(25):
                ends = [self.rng.uniform(0, trials.seconds) for _ in range(5)]
                done.append(trials.run(f"trial-{len(done)}", ends, self.rng))
                if done[-1].trouble:
                    break
            yield Row(
                f"killed at any instant: {name}",
                sum(trial.kills.total() for trial in done),
                sum(trial.kills.total() for trial in done if trial.survived),
                sum(trial.kills.total() for trial in done if trial.identical),
                _phases_text(done),
            )

    def restarts(self) -> Iterator[Row]:
        """One run killed with SIGKILL again and again and started again without a pause."""
        case = Case(f"--model test_vit {EVERYTHING} -j 1 --epochs {self._count(120)}")
        trials = Trials(self.train, case, self.place / "restarts")
        argv, killed = flags_of(case, trials.output), []
        wanted, ended = self._count(50), False
        while len(killed) < wanted and not ended:
            run = Run(self.train, argv, trials.log, 1, Phases(self.train).watch)
            time.sleep(self.rng.uniform(0.1, 0.7))
            ended = run.poll() == [0]
            run.kill()
            if not ended:
                killed.append(run)
        refused = sum(run.wait() != [-signal.SIGKILL] for run in killed)
        to_the_end(self.train, argv, trials.log, prepare=Phases(self.train).watch)
        same = contents(trials.output / "run") == trials.expected
        tried = len(killed)
        yield Row("killed and started again at once", tried, tried - refused, tried if same else 0)

    def calls_of_a_run(self) -> Iterator[Row]:
        """A fault at calls to the system of what a run writes after an epoch.

        At every one that makes, names, removes or syncs a file, and at some of those that fill it.
        """
        case = Case(f"--model test_vit {EVERYTHING} --epochs 2 --max-steps 2")
        trials = Trials(self.train, case, self.place / "calls")
        self._run_with_fault(trials, FaultyCalls(), [0])
        names = json.loads((self.place / "calls.json").read_text())
        numbers = [
            number
            for number, name in enumerate(names, 1)
            if name not in ("read", "write") or self.rng.random() < 0.1
        ]
        for what, fault, codes in (
            ("killed", _kill_self, [-signal.SIGKILL]),
            ("no space left", full_disk, [0, 74]),
        ):
            results = Counter()
            for number in numbers[:: 10 if self.quick else 1]:
                results.update(self._run_with_fault(trials, FaultyCalls(number, fault), codes))
            yield Row(
                f"{what} at one of {len(names)} calls of a run's save",
                results["tried"],
                results["survived"],
                results["identical"],
            )

    def _run_with_fault(self, trials: Trials, calls: FaultyCalls, codes: list[int]) -> list[str]:
        """What is true of a run whose first epoch is saved with a fault, and its exit codes."""
        argv = flags_of(trials.case, trials.output)

        def prepare(rank: int) -> None:
            Phases(self.train).watch(rank)
            _at_the_first_save(calls, self.place / "calls.json")

        (code,) = Run(self.train, argv, trials.log, 1, prepare).wait()
        (last,) = Run(self.train, argv, trials.log, 1, Phases(self.train).watch).wait()
        outcome = ["tried"]
        if code in codes and last == 0:
            outcome.append("survived")
        # An epoch that had no room is not kept; what the saver knows of it is in the states.
        missing = ("checkpoint-", "best", STATE_NAME, PREVIOUS_NAME) if code == 74 else ()
        different = differing(trials.expected, contents(trials.output / "run"))
        if all(name.startswith(missing) for name in different):
            outcome.append("identical")
        shutil.rmtree(trials.output)
        return outcome

    def calls_of_a_state(self) -> Iterator[Row]:
        """Faults at each call to the system of the save of one state, most of them by strace."""
        modes = ["patched", *(["kill", "ENOSPC", "EIO"] if shutil.which("strace") else ())]
        place = self.place / "state"
        place.mkdir()
        command = [sys.executable, str(HERE / "save_faults.py"), str(place), *modes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        results: dict[str, Counter] = {mode: Counter() for mode in modes}
        for line in done.stdout.splitlines():
            met = json.loads(line)
            result = results[met["mode"]]
            result["tried"] += 1
            try:
                updates = check_goes_on(place / met["mode"] / met["save"])
            except (AssertionError, OSError, UsageError):
                continue
            result["survived"] += 1
            result["identical"] += updates in STAGES
        names = {"patched": "killed at a call of Python's", "kill": "killed at a system call"}
        for mode, result in results.items():
            what = f"{names.get(mode, f'{mode} of a system call')} of a state's save"
            note = done.stderr.strip()[-80:] if not result else ""
            yield Row(what, result["tried"], result["survived"], result["identical"], note)

    def damage(self) -> Iterator[Row]:
        """Bits flipped in a state, and every length that it can be cut to."""
        folder = self.place / "damage"
        save_two(folder)
        path = folder / STATE_NAME
        whole = path.read_bytes()
        places = [self.rng.randrange(8 * len(whole)) for _ in range(self._count(1000))]
        flipped = (_flip(whole, place) for place in places)
        cut = (whole[:size] for size in range(0, len(whole), 10 if self.quick else 1))
        logging.disable(logging.WARNING)  # each damage is told
        for what, versions in (("a bit flipped", flipped), ("cut short", cut)):
            results = Counter()
            for version in versions:
                path.write_bytes(version)
                results["tried"] += 1
                used = whole_state(path)
                state = load_state(used)
                results["survived"] += used.name == PREVIOUS_NAME
                results["identical"] += state["position"]["updates"] == 1
            path.write_bytes(whole)
            assert updates_in(folder) == [1, 2]
            numbers = (results[name] for name in ("tried", "survived", "identical"))
            yield Row(f"{what}: state of {len(whole)} bytes", *numbers)
        logging.disable(logging.NOTSET)

    def link(self) -> Iterator[Row]:
        """The link between two nodes, network namespaces, is cut."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-k",
            "link",
            str(HERE / "test_lost_processes.py"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        *_, last = done.stdout.strip().splitlines() or [done.stderr]
        skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
        passed = int(not skipped and done.returncode == 0)
        yield Row(
            "link between two nodes cut",
            1 - len(skipped[:1]),
            passed,
            passed,
            (skipped or [last])[0],
        )


def _phases_text(trials: list[Trial]) -> str:
    kills = sum((trial.kills for trial in trials), Counter())
    text = ", ".join(f"{phase} {count}" for phase, count in kills.most_common())
    bad = [trial for trial in trials if not trial.identical]
    wrong = [f"; NOT IDENTICAL: {trial.differing} {trial.trouble}" for trial in bad]
    return text + "".join(wrong)


def _flip(whole: bytes, place: int) -> bytes:
    version = bytearray(whole)
    version[place // 8] ^= 1 << place % 8
    return bytes(version)


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_the_first_save(calls: FaultyCalls, names: Path) -> None:
    """In this process, the fault is met in the first save after an epoch, or its calls noted."""
    whole = Session._save_epoch

    def save(self: Session, *args: Any) -> None:
        Session._save_epoch = whole
        with pytest.MonkeyPatch.context() as patch:
            calls.install(patch)
            whole(self, *args)
        names.write_text(json.dumps(calls.names))

    Session._save_epoch = save


PARTS = {
    "instants": Stress.instants,
    "restarts": Stress.restarts,
    "calls": Stress.calls_of_a_run,
    "state": Stress.calls_of_a_state,
    "damage": Stress.damage,
    "link": Stress.link,
}


def main() -> int:
    """Run the parts; exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a tenth of the faults")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)}: not a part")
    torch.set_num_threads(1)
    began, rows = time.monotonic(), []
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} processors")
    print(f"{'fault':50} {'tried':>6} {'survived':>9} {'identical':>10}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        stress = Stress(Path(folder), args.seed, args.quick)
        for name in args.parts or PARTS:
            for row in PARTS[name](stress):
                rows.append(row)
                numbers = f"{row.tried:6} {row.survived:9} {row.identical:10}"
                print(f"{row.what:50} {numbers}  {row.note}", flush=True)
    tried, survived, identical = (sum(row[place] for row in rows) for place in (1, 2, 3))
    minutes = (time.monotonic() - began) / 60
    print(f"{'all':50} {tried:6} {survived:9} {identical:10}  {minutes:.1f} minutes")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
