"""Runs whose writes fail: nothing good is lost, all is written later, the exit code tells."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from faulty_runs import FullDisk, flags, without_drawing
from killing import ROOT, Run, contents, differing, to_the_end
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qna_timm.training.session import Session
from qna_timm.training.storage.checkpoint import read_weights
from qna_timm.training.storage.state_files import PREVIOUS_NAME, STATE_NAME, load_state

FOLDER, LOG = Path("a"), Path("log")


pytestmark = pytest.mark.usefixtures("in_own_folder")


@pytest.fixture(scope="module")
def undisturbed(train: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Contents of the folder of a run with room for all."""
    output = tmp_path_factory.mktemp("undisturbed")

    def prepare(rank: int) -> None:
        os.chdir(output)
        without_drawing()

    to_the_end(train, flags(), output / "log", prepare=prepare)
    return contents(output / FOLDER)


def different(expected: dict[str, str], *but: str) -> list[str]:
    """Names of files that differ, but for the last state but one: it is there for another save."""
    found = differing(contents(FOLDER), expected)
    return [name for name in found if name not in (PREVIOUS_NAME, *but)]


def logged() -> list[str]:
    """Warnings, but for the end's list of what was not written."""
    lines = LOG.read_text().splitlines()
    return [
        line
        for line in lines
        if line.startswith("warning: ") and not line.startswith("warning: at some time not written")
    ]


WRITES = {
    "args.yaml": ("args.yaml",),
    "environment.json": ("environment.json",),
    "train.log": ("train.log",),
    STATE_NAME: (STATE_NAME,),
    "weights": ("last.safetensors",),
    "summary.csv": ("summary.csv",),
}


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_write_that_fails_once(
    what: str, number: int, train: ModuleType, undisturbed: dict[str, str]
) -> None:
    """It is said in a line, tried again at the next save, and told by the exit code."""
    disk = FullDisk(*WRITES[what], number=number)
    assert Run(train, flags(), LOG, 1, disk.install).wait(60) == [74], LOG.read_text()
    (line,) = logged()
    reason = os.strerror(number)
    assert line.startswith(f"warning: {what}: not written ({reason}): training goes on")
    text = LOG.read_text()
    assert f"{what}: written again" in text or what == "train.log"
    assert "Traceback" not in text
    # the weights of the first epoch have come and gone
    lost = {
        STATE_NAME,
        "best.safetensors",
        "checkpoint-0.safetensors",
        "checkpoint-0_ema.safetensors",
    }
    assert set(different(undisturbed)) <= (lost if what == "weights" else set())
    # the file has every line of the output but the progress
    said = [line for line in text.splitlines() if line.startswith(("epoch", "run folder", "warn"))]
    assert all(line in (FOLDER / "train.log").read_text() for line in said)


@pytest.mark.parametrize("what", [STATE_NAME, "weights", "summary.csv"])
def test_last_write_that_fails(what: str, train: ModuleType, undisturbed: dict[str, str]) -> None:
    """The same command then writes what is missing."""
    disk = FullDisk(*WRITES[what], times=0)

    def prepare(rank: int) -> None:
        disk.install()
        save = Session._save_epoch

        def failing(session: Session) -> None:
            disk.times = 10 * (session.position.epoch == 2)
            save(session)

        Session._save_epoch = failing

    assert Run(train, flags(), LOG, 1, prepare).wait(60) == [74], LOG.read_text()
    assert different(undisturbed) != []
    load_state(FOLDER / STATE_NAME)
    read_weights(FOLDER / "best.safetensors")
    to_the_end(train, flags(), LOG, prepare=without_drawing)
    # a state that was saved with something missing keeps the word of it until the next
    assert different(undisturbed) == []


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_full_for_good(processes: int, train: ModuleType) -> None:
    """From the second epoch on nothing can be written; the run is done again from there."""
    disk = FullDisk("*.safetensors", "*.csv", "*.yaml", "*.json", "train.log", times=0)

    def prepare(rank: int) -> None:
        disk.install()
        train_epoch = Session._train_epoch

        def filling(session: Session, epoch: int, label: str) -> dict[str, float]:
            disk.times = 1000 * epoch
            return train_epoch(session, epoch, label)

        Session._train_epoch = filling

    to_the_end(train, flags(), LOG, processes, prepare=without_drawing)
    expected = contents(FOLDER)
    shutil.rmtree(FOLDER)
    codes = Run(train, flags(), LOG, processes, prepare).wait(60)
    # all processes train to the end, the one that writes tells
    assert codes == [74, *[0] * (processes - 1)], LOG.read_text()
    assert load_state(FOLDER / STATE_NAME)["position"]["epoch"] == 1
    assert not [path.name for path in FOLDER.iterdir() if path.name.endswith(".tmp")]
    to_the_end(train, flags(), LOG, processes, prepare=without_drawing)
    assert different(expected) == []


def test_folder_that_vanishes(train: ModuleType, undisturbed: dict[str, str]) -> None:
    """Said at once; what was lost with it is gone, the last save is whole."""

    def prepare(rank: int) -> None:
        without_drawing()
        train_epoch = Session._train_epoch

        def removing(session: Session, epoch: int, label: str) -> dict[str, float]:
            if epoch == 1:
                os.rename(FOLDER, "elsewhere")
            return train_epoch(session, epoch, label)

        Session._train_epoch = removing

    assert Run(train, flags(), LOG, 1, prepare).wait(60) == [74], LOG.read_text()
    text = LOG.read_text()
    assert "Traceback" not in text and not FOLDER.exists()
    assert logged()[0].endswith("not written (No such file or directory): training goes on, the "
                                "next save tries again")  # fmt: skip
    os.rename("elsewhere", FOLDER)
    to_the_end(train, flags(), LOG, prepare=without_drawing)
    assert different(undisturbed) == []


def test_tensorboard(train: ModuleType) -> None:
    """Its writer fails for good once it has failed: another one writes all again."""
    disk = FullDisk("events.out*")
    argv = flags("--log-tensorboard", "--epochs", "3")
    assert Run(train, argv, LOG, 1, disk.install).wait(60) == [74], LOG.read_text()
    assert [line.split(" (")[0] for line in logged()] == ["warning: trackers: not written"]
    assert "trackers: written again" in LOG.read_text()
    board = EventAccumulator(str(FOLDER / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("eval/top1")] == [0, 1, 2]


@pytest.mark.parametrize("argv", [(), ("--experiment", "new")], ids=["folder", "output"])
def test_read_only_from_the_start(argv: tuple[str, ...], train: ModuleType) -> None:
    def read_only(call: Callable) -> Callable:
        def refused(path: Any, *args: Any, **kwargs: Any) -> Any:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

        return refused

    def prepare(rank: int) -> None:
        os.mkdir = read_only(os.mkdir)
        whole = os.open
        os.open = lambda path, mode, *args, **kwargs: (
            read_only(whole)(path) if mode & os.O_CREAT else whole(path, mode, *args, **kwargs)
        )

    FOLDER.mkdir()
    assert Run(train, flags(*argv), LOG, 1, prepare).wait(60) == [2]
    (line,) = LOG.read_text().splitlines()
    assert line.startswith("train.py: error: ") and line.endswith(os.strerror(errno.EROFS))
    assert list(FOLDER.iterdir()) == []


def test_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """A real file system of 24 MB, TensorBoard and pictures of batches included."""
    script = (
        f'mount -t tmpfs -o size=24m none "{tmp_path}" || exit 77; cd "{tmp_path}";'
        f' exec "{sys.executable}" "{ROOT}/tests/training/faulty_runs.py"'
    )
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["unshare", "-rm", "sh", "-c", script]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount is allowed here: {done.stderr.strip()}")
    assert done.returncode == 74, done.stderr
    lines = done.stderr.splitlines()
    for what in ("last.state.safetensors", "weights", "summary.csv", "curves.png"):
        assert any(line.startswith(f"warning: {what}: not written (No space") for line in lines)
        assert f"{what}: written again" in lines
    assert done.stdout.endswith("summary: epoch 0 1 2\ntensorboard: 0 1 2\n")
