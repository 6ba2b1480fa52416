"""webdataset archives, real ones: read once each in evaluation, and in an order of the epoch."""

import io
import json
import logging
import os
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from preloaded import programs
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from qna_timm.training.data import datasets
from qna_timm.training.data.reader_wds import ArchiveReader
from qna_timm.training.errors import RunFailed, UsageError, run_cli
from qna_timm.training.flags.recipe import parse_train_args

ROOT = Path(__file__).resolve().parents[2]
TRAIN, VALIDATION = (12, 9, 11, 16), (10, 5, 3)
SPLITS = ("--train-split", "train-{0..3}.tar|48", "--val-split", "validation-{0..2}.tar|18")


def write_archive(path: Path, first: int, count: int, damaged: tuple[int, ...] = ()) -> None:
    """Images whose colour is their number, of class number % 4."""
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 60 * (number % 4))).save(image, "PNG")
            content = image.getvalue()[: 20 if number in damaged else None]
            label, fields = str(number % 4), json.dumps({"other": 3 - number % 4})
            for suffix, data in (
                ("png", content),
                ("cls", label.encode()),
                ("json", fields.encode()),
            ):
                entry = tarfile.TarInfo(f"{number:03d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def write_archives(folder: Path, damaged: tuple[int, ...] = ()) -> Path:
    folder.mkdir()
    for split, counts in (("train", TRAIN), ("validation", VALIDATION)):
        for i, count in enumerate(counts):
            write_archive(folder / f"{split}-{i}.tar", sum(counts[:i]), count, damaged)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archives(tmp_path_factory.mktemp("archives") / "wds")


def flags(folder: Path, *more: str) -> list[str]:
    data = ["--dataset", "wds/numbers", "--data-dir", str(folder), *SPLITS, "--num-classes", "4"]
    model = ["--device", "cpu", "--model", "test_vit", "--img-size", "32", "--batch-size", "8"]
    return [*data, *model, "--workers", "0", *more]


def numbers(reader: ArchiveReader) -> list[int]:
    return [image.getpixel((0, 0))[0] for image, _ in reader]


def opened(folder: Path, *more: str) -> tuple[ArchiveReader, ArchiveReader]:
    train, val = datasets.open_datasets(parse_train_args(flags(folder, *more)))
    return train.reader, val.reader


def test_order_is_a_function_of_the_epoch(folder: Path) -> None:
    straight = opened(folder)[0]
    epochs = []
    for epoch in range(3):
        straight.set_epoch(epoch)
        epochs.append(numbers(straight))
    assert len({tuple(order) for order in epochs}) == 3
    assert all(sorted(order) == list(range(48)) for order in epochs)
    resumed = opened(folder)[0]
    resumed.set_epoch(2)
    assert numbers(resumed) == epochs[2]
    assert numbers(opened(folder, "--seed", "7")[0]) != epochs[0]


def test_resumed_run_equals_the_straight_one(
    folder: Path, train: ModuleType, tmp_path: Path
) -> None:
    short = ["--epochs", "2", "--warmup-epochs", "0", "--output", str(tmp_path)]
    for name, more in (
        ("straight", []),
        ("parts", ["--stop-epoch", "1"]),
        ("parts", ["--resume", "auto"]),
    ):
        assert train.main(flags(folder, *short, "--experiment", name, *more)) == 0
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("straight", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_evaluated_once(folder: Path, processes: int, workers: int) -> None:
    """Also where processes have other numbers of archives."""
    found = []
    for rank in range(processes):
        val = opened(folder)[1]
        val.dist_rank, val.dist_num_replicas = rank, processes
        for batch in DataLoader(val_images(val), batch_size=4, num_workers=workers):
            found += batch.tolist()
    assert sorted(found) == list(range(18))


def val_images(reader: ArchiveReader) -> torch.utils.data.IterableDataset:
    class Numbers(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(numbers(reader))

    return Numbers()


def test_two_processes_evaluate_as_one(folder: Path, train: ModuleType, tmp_path: Path) -> None:
    run = flags(folder, "--epochs", "1", "--output", str(tmp_path), "--experiment", "run")
    assert train.main(run) == 0
    command = [
        str(ROOT / "validate.py"), "--checkpoint", str(tmp_path / "run"), "--device", "cpu",
        "--workers", "0",
    ]  # fmt: skip
    found = []
    for starter in (["python"], ["torchrun", "--nproc_per_node=2"]):
        words = [str(programs() / starter[0]), *starter[1:], *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.partition("--result\n")[2]))
    assert found[0]["images"] == found[1]["images"] == 18
    assert found[0]["top1"] == found[1]["top1"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--input-key", "bmp"), "--input-key bmp.*which has png, cls, json.*didn't find"),
        (("--target-key", "kind"), r"--target-key kind.*not found .* available keys: \['other'\]"),
        (("--train-split", "train-{0..4}.tar|48"), r"1 of 5 archives .*train-4.tar; did you mean"),
        (("--train-split", "train-{0..3}.tar"), "--train-num-samples N gives their number"),
        (("--val-split", "test"), "--val-split 'test': split test not found"),
        (("--data-dir", "nowhere"), "--data-dir nowhere: there is no such folder"),
        (("--workers", "5"), r"--workers 5: .* has 4 archive.*; --workers 4 would do"),
        (("--class-map", "NAMES"), "--class-map .*NAMES.*KeyError"),
    ],
)
def test_told_before_anything_is_trained(
    more: tuple[str, str], message: str, folder: Path, tmp_path: Path
) -> None:
    if more[1] == "NAMES":
        (tmp_path / "NAMES.txt").write_text("ant\nbee\ncat\ndog\n")
        more = (more[0], str(tmp_path / "NAMES.txt"))
    with pytest.raises(UsageError, match=message):
        opened(folder, *more)


def test_no_folder_named() -> None:
    with pytest.raises(UsageError, match="--dataset wds/x needs --data-dir"):
        datasets.open_datasets(parse_train_args(["--dataset", "wds/x", "--device", "cpu"]))


def test_labels_of_a_field(folder: Path) -> None:
    val = opened(folder, "--target-key", "other")[1]
    assert all(label == 3 - image.getpixel((0, 0))[0] % 4 for image, label in val)


def test_damaged_samples_and_archives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = write_archives(tmp_path / "damaged", damaged=(3, 12))
    (damaged / "validation-2.tar").write_bytes(b"no archive" * 100)
    val = opened(damaged)[1]
    assert numbers(val) == [i for i in range(15) if i not in (3, 12)]
    told = [line for line in map(logging.LogRecord.getMessage, caplog.records) if "left" in line]
    assert len(told) == 3
    with pytest.raises(RunFailed, match="--strict-data: cannot read a sample: "):
        numbers(opened(damaged, "--strict-data")[1])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_nothing_that_can_be_read(
    split: str, train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Images that are all damaged end a run; no metric comes of none."""
    archives = write_archives(tmp_path / "nothing")
    for path in archives.glob(f"{split}-*.tar"):
        write_archive(path, 0, 12, damaged=tuple(range(12)))
    run = flags(archives, "--epochs", "1", "--output", str(tmp_path), "--experiment", "run")
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: train.main(run))
    assert ended.value.code == 1
    reason = {"train": "training data has no sample", "validation": "no image to evaluate on"}[
        split
    ]
    assert reason in capsys.readouterr().err


def test_says_what_was_evaluated(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = write_archives(tmp_path / "damaged", damaged=(3,))
    run = flags(damaged, "--epochs", "1", "--output", str(tmp_path), "--experiment", "run")
    assert train.main(run) == 0
    errors = capsys.readouterr().err
    assert "evaluated 17 images, the split is said to have 18" in errors
    assert "48 training and 18 validation images" in errors
