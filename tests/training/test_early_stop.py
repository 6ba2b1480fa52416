"""--early-stop-epochs: when a run ends, what it leaves behind, and that a resume agrees."""

import csv
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from killing import to_the_end

from qna_timm.training.early_stop import last_gain, stops_early
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.session import Session

NAN = float("nan")


def digits(output: Path, *argv: str) -> list[str]:
    words = "--dataset sklearn/digits --model test_vit --img-size 32 -b 16 -j 0 --device cpu"
    words += " --epochs 12 --warmup-epochs 0 --max-steps 1 --val-num-samples 16 --experiment a"
    return [*words.split(), "--output", str(output), *argv]


def rows_of(metric: str, values: list[float | None], first: int = 0) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch} if value is None else {"epoch": epoch, f"eval_{metric}": value}
        for epoch, value in enumerate(values, first)
    ]


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def saved_epochs(folder: Path) -> list[int]:
    return [int(row["epoch"]) for row in summary(folder)]


@pytest.mark.parametrize(
    ("metric", "values", "gain"),
    [
        ("top1", [1, 3, 2], 1),
        ("top1", [1, 3, 3], 1),  # strictly better
        ("loss", [3, 1, 2], 1),
        ("top1", [None, 3, None, 4, None], 3),
        ("top1", [NAN, 3, NAN], 1),
        ("top1", [NAN, NAN], 0),
        ("top1", [None, None], 0),
    ],
)
def test_last_gain(metric: str, values: list[float | None], gain: int) -> None:
    assert last_gain(rows_of(metric, values), metric) == gain
    assert last_gain(rows_of(metric, values, first=5), metric) == gain + 5


def test_averaged_weights_count_too() -> None:
    """Their own best is what they have to beat, not the model's."""
    model, averaged = [5, 6, 6, 6], [1, 2, 3, 3]
    rows = [
        {"epoch": epoch, "eval_top1": one, "eval_top1_ema": other}
        for epoch, (one, other) in enumerate(zip(model, averaged, strict=True))
    ]
    assert last_gain(rows, "top1") == 2


@pytest.mark.parametrize(
    ("epochs", "values", "ends"),
    [
        (2, [1, 2, 2, 2], False),  # two epochs without gain are allowed
        (2, [1, 2, 2, 2, 2], True),
        (2, [1, 2, 2, 2, 3], False),
        (2, [1, 2, 2, 2, None], False),  # only an evaluated epoch ends a run
        (2, [1, None, None, None, 1], True),
        (0, [1] * 50, False),
        (None, [1] * 50, False),
        (2, [], False),
        (2, [NAN] * 4, True),
    ],
)
def test_when_a_run_ends(epochs: int | None, values: list[float | None], ends: bool) -> None:
    args = Namespace(early_stop_epochs=epochs, eval_metric="top1")
    assert stops_early(args, rows_of("top1", values)) is ends


def test_a_run_ends_finished_and_stays_ended(
    train: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    top1 = {0: 10.0, 1: 30.0, 2: 20.0, 3: 30.0, 4: 30.0, 5: 40.0}
    trained: list[int] = []

    def train_epoch(self: Session, epoch: int, label: str) -> dict[str, float]:
        trained.append(epoch)
        return whole(self, epoch, label)

    def metrics(self: Session, ema: bool) -> dict[str, float]:
        return {"loss": 1.0, "top1": top1[trained[-1]], "top5": 50.0}

    whole = Session._train_epoch
    monkeypatch.setattr(Session, "_train_epoch", train_epoch)
    monkeypatch.setattr(Session, "_evaluate", metrics)
    folder, early = tmp_path / "a", ["--early-stop-epochs", "2"]
    # Interrupted and resumed, it ends where it would have ended.
    assert train.main(digits(tmp_path, *early, "--stop-epoch", "3")) == 0
    capsys.readouterr()
    assert train.main(["--resume", str(folder)]) == 0
    errors = capsys.readouterr().err
    assert trained == [0, 1, 2, 3, 4] == saved_epochs(folder)
    line = "ended after epoch 5: top1 has not got better since epoch 2 (--early-stop-epochs 2)"
    assert errors.count(line) == 1 == (folder / "train.log").read_text().count(line)
    assert "best top1: 30 in epoch 2" in errors and "to validate: " in errors

    assert train.main(["--resume", str(folder)]) == 0
    assert trained == [0, 1, 2, 3, 4] and line in capsys.readouterr().err
    # Who wants to go on says so.
    argv = ["--resume", str(folder), "--early-stop-epochs", "3", "--stop-epoch", "6"]
    assert train.main(argv) == 0
    assert trained == [0, 1, 2, 3, 4, 5] == saved_epochs(folder)
    assert "best top1: 40 in epoch 6" in capsys.readouterr().err


def test_two_processes_end_together(train: ModuleType, tmp_path: Path) -> None:
    """A learning rate of 0 never makes anything better; both hold out what one process does."""
    argv = ["--lr", "0", "--val-fraction", "0.1"]
    assert train.main(digits(tmp_path / "one", *argv, "--stop-epoch", "1")) == 0
    words, log = digits(tmp_path / "two", *argv, "--early-stop-epochs", "1"), tmp_path / "log"
    to_the_end(train, words, log, processes=2)
    assert saved_epochs(tmp_path / "two" / "a") == [0, 1, 2]
    one, two = (summary(tmp_path / name / "a")[0] for name in ("one", "two"))
    assert float(two["eval_loss"]) == pytest.approx(float(one["eval_loss"]), rel=1e-5)
    assert log.read_text().count("ended after epoch 3") == 1


def test_negative_epochs() -> None:
    with pytest.raises(UsageError, match="--early-stop-epochs: must be zero or more, found -1"):
        parse_train_args(["--dataset", "sklearn/digits", "--early-stop-epochs", "-1"])
