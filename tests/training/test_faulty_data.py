"""Runs on folders with images that cannot be read, and with loader workers that are killed."""

import csv
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from faulty_runs import without_drawing
from killing import Run, contents, differing, to_the_end
from PIL import Image

from qna_timm.training import loop
from qna_timm.training.storage.state_files import PREVIOUS_NAME

FOLDER, LOG = Path("a"), Path("log")
BAD_TRAIN = {"ant/03.png": "OSError", "bee/07.jpg": "FileNotFoundError", "bee/11.jpg": "Unident"}
BAD_VALIDATION = "bee/02.jpg"
UPDATES = 5  # of 8 images, all of an epoch's


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut PNG, a link to nothing and a text among 40 images; a cut one among 8."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 20), ("validation", 4)):
        for label, (name, kind) in enumerate((("ant", "png"), ("bee", "jpg"))):
            folder = Path("data", split, name)
            folder.mkdir(parents=True)
            for number in range(count):
                color = (100 * label, 12 * number, 90)
                Image.new("RGB", (40, 36), color).save(folder / f"{number:02}.{kind}")
    for path in (Path("data/train/ant/03.png"), Path("data/validation", BAD_VALIDATION)):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    vanished = Path("data/train/bee/07.jpg")
    vanished.unlink()
    vanished.symlink_to("gone.jpg")
    Path("data/train/bee/11.jpg").write_text("not an image")


def flags(*argv: str) -> list[str]:
    words = "--data-dir data --model test_resnet --img-size 32 -b 4 --grad-accum-steps 2 -j 0"
    words += " --device cpu --opt adamw --lr 1e-3 --epochs 2 --warmup-epochs 0"
    words += " --output . --experiment a --resume auto --dist-timeout 60s"
    return [*words.split(), *argv]


def replaced() -> list[dict[str, str]]:
    with open(FOLDER / "bad_images.csv", newline="") as file:
        return list(csv.DictReader(file))


def at_update(number: int, act: Callable[[], None]) -> Callable[[int], None]:
    """Has every process do something when so many updates are behind it."""

    def prepare(rank: int) -> None:
        without_drawing()
        update = loop.Trainer._update

        def updating(trainer: loop.Trainer, *args: Any) -> None:
            update(trainer, *args)
            if trainer.num_updates == number:
                act()

        loop.Trainer._update = updating

    return prepare


def different(expected: dict[str, str]) -> list[str]:
    found = differing(contents(FOLDER), expected)
    return [name for name in found if name != PREVIOUS_NAME]


def put_away() -> dict[str, str]:
    """Contents of the run's folder, which makes room for another."""
    found = contents(FOLDER)
    FOLDER.rename(f"was-{len(list(Path().iterdir()))}")
    return found


def test_replaced_images_are_listed(train: ModuleType) -> None:
    """The same images in their place, and the same list, on two processes and after kills."""
    to_the_end(train, flags(), LOG, prepare=without_drawing)
    rows = replaced()
    found = {(row["split"], row["epoch"], row["path"].partition("data/")[2]) for row in rows}
    expected = {("train", epoch, f"train/{name}") for epoch in "01" for name in BAD_TRAIN}
    assert found == {*expected, ("validation", "", f"validation/{BAD_VALIDATION}")}
    assert len(rows) == len(found)
    for row in rows:
        name = row["path"].partition("data/train/")[2]
        assert row["error"].startswith(BAD_TRAIN.get(name, "OSError")) and row["replacement"]
    text = LOG.read_text()
    assert text.count("warning: cannot read ") == 4, "once for each image"
    listed = (FOLDER / "bad_images.csv").read_text()
    undisturbed = put_away()

    for signum in (signal.SIGTERM, signal.SIGKILL):
        kill = at_update(UPDATES + 2, lambda signum=signum: os.kill(os.getpid(), signum))
        (code,) = Run(train, flags(), LOG, 1, kill).wait(60)
        assert code in (143, -9), LOG.read_text()
        to_the_end(train, flags(), LOG, prepare=without_drawing)
        assert different(undisturbed) == []
        put_away()

    pair = flags("--grad-accum-steps", "1")
    to_the_end(train, pair, LOG, 2, prepare=without_drawing)
    assert (FOLDER / "bad_images.csv").read_text() == listed


@pytest.mark.parametrize("rank, workers", [(0, "0"), (1, "0"), (1, "1")])
def test_strict_data_names_the_image(rank: int, workers: str, train: ModuleType) -> None:
    """Validation images are taken in turns: the seventh by the first process."""
    for name in BAD_TRAIN:
        Path("data/train", name).unlink()
    name = BAD_VALIDATION
    if rank == 1:
        name = "bee/01.jpg"
        Path("data/validation", BAD_VALIDATION).rename(Path("data/validation", name))
        Image.new("RGB", (40, 36)).save(Path("data/validation", BAD_VALIDATION))
    argv = flags("--strict-data", "--grad-accum-steps", "1", "-j", workers)
    codes = Run(train, argv, LOG, 2, without_drawing).wait(60)
    text = LOG.read_text()
    assert codes == [1, 1] and "Traceback" not in text, text
    path = Path("data/validation", name)
    line = f"train.py: failed on rank {rank}: --strict-data: cannot read {path} (OSError: "
    assert sum(told.startswith(line) for told in text.splitlines()) == 1, text


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="needs signals of dead children")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_worker_changes_nothing(processes: int, train: ModuleType) -> None:
    argv = flags("-j", "1")
    to_the_end(train, argv, LOG, processes, prepare=without_drawing)
    undisturbed = put_away()

    def kill() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    to_the_end(train, argv, LOG, processes, prepare=at_update(2, kill))
    assert "loader workers are started anew" in LOG.read_text()
    assert different(undisturbed) == []
