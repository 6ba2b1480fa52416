"""Runs that go on: what they share with straight ones, what may change, what is refused."""

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from short_runs import differences, digits, summary
from timm.scheduler import PlateauLRScheduler

from qna_timm.training import loop, resume
from qna_timm.training.errors import UsageError
from qna_timm.training.storage.checkpoint import read_metadata, read_weights
from qna_timm.training.storage.state_files import load_state

pytestmark = pytest.mark.usefixtures("one_thread")


RESUMED = {
    "augmented": "--model test_resnet --mixup 0.8 --cutmix 1 --aa rand-m5 --reprob 0.3 --model-ema"
    " --model-ema-warmup --grad-accum-steps 2 --clip-grad 1",
    "dropping": "--drop-path 0.2 --drop 0.1 --sched-on-updates --opt lookahead_lamb",
    "half": "--amp --model-ema --model-ema-decay 0.9 --max-steps 1 --val-num-samples 16",
    "plateau": "--sched plateau --patience-epochs 0 --warmup-epochs 0 --momentum 0.9 --opt sgd",
}


# timm's own warnings about itself and about what it calls
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_equals_the_straight_one(train: ModuleType, tmp_path: Path, name: str) -> None:
    argv = digits(tmp_path, "--epochs", "4", *RESUMED[name].split())
    train.main([*argv, "--experiment", "straight"])
    train.main([*argv, "--experiment", "stopped", "--stop-epoch", "2"])
    assert len(summary(tmp_path / "stopped")) == 2
    # Whatever happened in the process since must not matter.
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    train.main([*argv, "--experiment", "stopped", "--resume", "auto"])
    straight, resumed = (
        load_state(tmp_path / name / "last.state.safetensors") for name in ("straight", "stopped")
    )
    del straight["args"], resumed["args"]
    assert differences(straight, resumed) == []
    texts = [(tmp_path / name / "summary.csv").read_text() for name in ("straight", "stopped")]
    assert texts[0] == texts[1]
    for kind in ("best", "last"):
        one, other = (read_weights(tmp_path / n / f"{kind}.safetensors") for n in
                      ("straight", "stopped"))  # fmt: skip
        assert differences(one[0], other[0]) == []


def test_resume_by_folder_brings_its_settings(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(digits(tmp_path, "--experiment", "a", "--stop-epoch", "1", "--epochs", "3"))
    folder = tmp_path / "a"
    before = read_metadata(folder / "checkpoint-0.safetensors")
    capsys.readouterr()
    train.main(["--resume", str(folder), "--stop-epoch", "2", "--lr", "5e-4"])
    assert "lr 0.001 -> 0.0005" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    rows = summary(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    # 5e-4 cosine after one of three epochs
    assert float(rows[1]["lr"]) == pytest.approx(5e-4 * 0.75)
    saved = yaml.safe_load((folder / "args.yaml").read_text())
    assert saved["model"] == "test_vit" and saved["resume"] == "" and saved["experiment"] == "a"
    assert read_metadata(folder / "checkpoint-0.safetensors") == before
    # from its state file into a new folder, without the optimizer
    state = str(folder / "last.state.safetensors")
    argv = ["--resume", state, "--output", str(tmp_path), "--experiment", "b"]
    train.main([*argv, "--no-resume-opt", "--opt", "sgd"])
    assert [row["epoch"] for row in summary(tmp_path / "b")] == ["0", "1", "2"]
    assert (tmp_path / "b" / "best.safetensors").is_file()
    assert len(summary(folder)) == 2


def test_fresh_optimizer_is_asked_for_once(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that asked for it goes on, when it is given again, with what it has since."""
    for name, stops in (("straight", ("3",)), ("stopped", ("2", "3"))):
        argv = digits(tmp_path, "--experiment", name, "--resume", "auto", "--epochs", "3")
        train.main([*argv, "--stop-epoch", "1"])
        for stop in stops:
            capsys.readouterr()
            fresh = ["--no-resume-opt", "--opt", "sgd", "--momentum", "0.9", "--stop-epoch", stop]
            train.main([*argv, *fresh])
            told = "does not go on exactly: --no-resume-opt" in capsys.readouterr().err
            assert told == (stop == stops[0])
    one, other = (read_weights(tmp_path / n / "last.safetensors") for n in ("straight", "stopped"))
    assert differences(one[0], other[0]) == []


def test_run_that_begins_in_another_has_a_state_at_once(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first save it would be told to go on, and start afresh."""
    train.main(digits(tmp_path, "--experiment", "a", "--stop-epoch", "1"))

    def killed(*args: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(loop.Trainer, "train_epoch", killed)
    argv = ["--resume", str(tmp_path / "a"), "--output", str(tmp_path), "--experiment", "b"]
    with pytest.raises(RuntimeError, match="killed"):
        train.main(argv)
    assert load_state(tmp_path / "b" / "last.state.safetensors")["position"]["epoch"] == 1


# timm's own warnings about itself and about what it calls
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
def test_plateau_flags_take_effect_on_resume(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = digits(tmp_path, "--experiment", "a", "--resume", "auto", "--warmup-epochs", "0")
    argv += ["--sched", "plateau"]
    train.main([*argv, "--patience-epochs", "3", "--stop-epoch", "1"])
    found = {}
    restore = resume.restore

    def noted(trainer: loop.Trainer, *args: Any, **kwargs: Any) -> resume.Position:
        position = restore(trainer, *args, **kwargs)
        found.update(trainer.schedule.lr_scheduler.state_dict())
        return position

    monkeypatch.setattr(resume, "restore", noted)
    train.main([*argv, "--patience-epochs", "7", "--decay-rate", "0.25"])
    assert (found["patience"], found["factor"], found["last_epoch"]) == (7, 0.25, 1)


def test_resume_auto_of_nothing_starts_afresh(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = digits(tmp_path, "--experiment", "a", "--resume", "auto", "--epochs", "1")
    assert train.main(argv) == 0
    assert "starting afresh" in capsys.readouterr().err
    files = [tmp_path / "a" / name for name in ("summary.csv", "args.yaml", "environment.json")]
    texts = [file.read_text() for file in files]
    assert train.main([*argv, "--lr", "7e-4"]) == 0, "a complete run is left as it is"
    assert [file.read_text() for file in files] == texts


def test_run_that_starts_at_an_epoch_of_choice(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At that epoch's learning rate; what was best from there on is forgotten."""
    argv = digits(tmp_path, "--epochs", "3", "--warmup-epochs", "0", "--experiment", "a")
    train.main([*argv, "--start-epoch", "1"])
    rows = summary(tmp_path / "a")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    # of three epochs of a cosine one is done
    assert float(rows[0]["lr"]) == pytest.approx(7.5e-4)
    capsys.readouterr()
    train.main([*argv, "--resume", "auto", "--start-epoch", "1"])  # the same command: nothing left
    assert summary(tmp_path / "a") == rows
    best = json.loads(capsys.readouterr().out.split("--result\n")[1])["best"]["model"]
    assert best["metric"] == max(float(row["eval_top1"]) for row in rows)
    train.main([*argv, "--resume", "auto", "--start-epoch", "0", "--lr", "1e-5"])
    rows = summary(tmp_path / "a")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    result = json.loads(capsys.readouterr().out.split("--result\n")[1])
    best = result["best"]["model"]
    found = {int(row["epoch"]): float(row["eval_top1"]) for row in rows}
    assert best["metric"] == pytest.approx(found[best["epoch"]])
    assert read_metadata(tmp_path / "a" / "best.safetensors")["epoch"] == best["epoch"]


def test_averages_switched_on_at_a_resume_start_at_the_weights(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = digits(tmp_path, "--experiment", "a", "--resume", "auto")
    train.main([*argv, "--stop-epoch", "1"])
    found = []
    restore = resume.restore

    def noted(trainer: loop.Trainer, *args: Any, **kwargs: Any) -> resume.Position:
        position = restore(trainer, *args, **kwargs)
        ema = trainer.task.get_trainable_module(ema=True).module
        found.append(
            differences(ema.state_dict(), trainer.task.get_trainable_module().state_dict())
        )
        return position

    monkeypatch.setattr(resume, "restore", noted)
    train.main([*argv, "--model-ema", "--resume-anyway", "--stop-epoch", "1"])
    assert found == [[]]


# timm's own warnings about itself and about what it calls
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
def test_plateau_goes_by_the_metric_that_is_asked_for(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its counts are saved."""
    given = []
    step = PlateauLRScheduler.step

    def noted(schedule: PlateauLRScheduler, epoch: int, metric: float | None = None) -> None:
        given.append(metric)
        step(schedule, epoch, metric)
        schedule.lr_scheduler.cooldown_counter = 2

    monkeypatch.setattr(PlateauLRScheduler, "step", noted)
    argv = digits(tmp_path, "--experiment", "a", "--warmup-epochs", "0", "--sched", "plateau")
    train.main([*argv, "--eval-metric", "loss", "--epochs", "1"])
    assert given == [pytest.approx(float(summary(tmp_path / "a")[0]["eval_loss"]))]
    state = load_state(tmp_path / "a" / "last.state.safetensors")
    assert state["plateau"]["cooldown_counter"] == 2


def test_state_of_another_model_or_optimizer(train: ModuleType, tmp_path: Path) -> None:
    train.main(digits(tmp_path, "--experiment", "a", "--max-steps", "1", "--epochs", "1"))
    state = tmp_path / "a" / "last.state.safetensors"
    resume = ["--resume", str(state), "--output", str(tmp_path / "new")]
    of_another = "not a checkpoint of test_resnet: .*; --model test_vit goes on with it$"
    for flags, pattern in (
        (["--model", "test_resnet"], of_another),
        (["--model", "test_resnet", "--resume-anyway"], of_another),
        (["--model-kwargs", "depth=2"], "not a checkpoint of test_vit: .* tensors unexpected"),
        (["--num-classes", "11"], "has 10 classes, the model 11"),
        (["--model-kwargs", "qkv_bias=True"], "--model-kwargs .* --resume-anyway goes on"),
        (["--opt", "sgd"], "cannot go on exactly: --opt adamw -> sgd"),
    ):
        with pytest.raises(UsageError, match=pattern):
            train.main(digits(tmp_path, *resume, *flags))
    named = ["--experiment", "c", "--model-kwargs", "depth=2"]
    train.main(digits(tmp_path, *named, "--max-steps", "1", "--epochs", "1"))
    with pytest.raises(UsageError, match=of_another):
        train.main(["--resume", str(tmp_path / "c"), "--model", "test_resnet"])
    with pytest.raises(UsageError, match=r"not a checkpoint of test_vit: .* missing"):
        train.main(["--resume", str(tmp_path / "c"), "--model-kwargs"])
    weights = tmp_path / "a" / "last.safetensors"
    with pytest.raises(UsageError, match="weights without the state of a run"):
        train.main(digits(tmp_path, "--resume", str(weights)))
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"last\.state\.safetensors: "):
        train.main(digits(tmp_path, *resume))
    assert not (tmp_path / "new").exists()
