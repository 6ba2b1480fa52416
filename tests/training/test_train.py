"""train.py: the loop's arithmetic, whole runs, resumed runs, several processes, mistakes."""

import csv
import importlib.util
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from qna_timm.training import curves, loaders, loop, resume, run
from qna_timm.training.checkpoint import load_weights, read_metadata, read_weights
from qna_timm.training.distributed import Processes
from qna_timm.training.errors import UsageError
from qna_timm.training.optim import create_schedule, learning_rate
from qna_timm.training.precision import Precision
from qna_timm.training.recipe import parse_train_args
from qna_timm.training.session import Session
from qna_timm.training.signals import Stopped, StopSignals
from qna_timm.training.state_files import load_state
from qna_timm.training.task import TrainTask, create_loss
from qna_timm.training.tta import AveragedViews
from qna_timm.training.updates import num_updates

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits(output: Path, *argv: str) -> list[str]:
    """A run of seconds; later flags go before these."""
    words = "--dataset sklearn/digits --model test_vit --img-size 32 -b 16 -j 0 --device cpu"
    words += " --opt adamw --lr 1e-3 --warmup-epochs 1 --epochs 2 --max-steps 3"
    words += " --val-num-samples 64 --log-interval 1"
    return [*words.split(), "--output", str(output), *argv]


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two nested states differ in any bit."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [where]
        return list(itertools.chain(*(differences(one[k], other[k], f"{where}.{k}") for k in one)))
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return list(itertools.chain(*(differences(a, b, f"{where}.{i}") for i, (a, b) in pairs)))
    return [] if one == other or (one != one and other != other) else [where]


# --- the loop's arithmetic ---


def trainer_for(
    model: nn.Module, *argv: str, task_class: type = TrainTask
) -> tuple[loop.Trainer, Namespace]:
    args = parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu", *argv])
    task = task_class(model, nn.CrossEntropyLoss(), device=CPU, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr or 0.1)
    precision = Precision(args, CPU)
    processes = Processes(CPU)
    trainer = loop.Trainer(
        task, optimizer, None, args=args, processes=processes, precision=precision
    )
    return trainer, args


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 5, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def linear() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    model.get_classifier = lambda: model
    return model


def test_accumulation_is_exact_at_the_tail() -> None:
    data, model, expected = batches(7), linear(), linear()
    trainer, _ = trainer_for(model, "--grad-accum-steps", "4", "--lr", "0.1")
    metrics = trainer.train_epoch(data, 0, "train")
    assert trainer.num_updates == 2
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    losses = []
    for group in (data[:4], data[4:]):
        images, labels = (torch.cat(parts) for parts in zip(*group, strict=True))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(expected(images), labels)
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), len(images)))
    torch.testing.assert_close(model.weight, expected.weight, rtol=0, atol=1e-6)
    mean = sum(loss * n for loss, n in losses) / 28
    assert metrics["loss"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "accumulation", "max_steps", "updates"),
    [(7, 4, None, 2), (8, 4, None, 2), (3, 4, None, 1), (7, 1, 5, 5), (7, 3, 2, 2), (7, 3, 9, 3)],
)
def test_number_of_updates(
    count: int, accumulation: int, max_steps: int | None, updates: int
) -> None:
    argv = ["--grad-accum-steps", str(accumulation)]
    argv += ["--max-steps", str(max_steps)] if max_steps else []
    trainer, args = trainer_for(linear(), *argv)
    assert num_updates(args, count) == updates
    trainer.train_epoch(batches(count), 0, "train")
    assert trainer.num_updates == updates
    trainer.train_epoch(batches(count), 5, "train")
    assert trainer.num_updates == 6 * updates, "the count follows the epoch, as after a resume"


class TwoLosses(TrainTask):
    """A task with a penalty and a clamp, as other model families need."""

    steps = 0

    def loss_parts(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        penalty = self.get_trainable_module().weight.abs().mean()
        return {**super().loss_parts(output, target), "penalty": 0.5 * penalty}

    def post_step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            self.get_trainable_module().weight.clamp_(-0.01, 0.01)


def test_task_hooks() -> None:
    model = linear()
    trainer, _ = trainer_for(model, "--grad-accum-steps", "2", task_class=TwoLosses)
    trainer.task.setup_ema(decay=0.0)
    metrics = trainer.train_epoch(batches(5), 0, "train")
    assert trainer.task.steps == 3
    assert model.weight.abs().max() <= 0.01
    averaged = trainer.task.get_trainable_module(ema=True).module
    assert torch.equal(averaged.weight, model.weight), "averaged after the clamp"
    assert not averaged.training
    assert metrics["loss"] == pytest.approx(metrics["loss_class"] + metrics["loss_penalty"])


def test_skipped_step_is_no_step() -> None:
    """float16: gradients that overflow skip the update, the hook and the average."""
    model = linear()
    before = model.weight.clone()
    trainer, _ = trainer_for(model, "--amp", task_class=TwoLosses)
    images, labels = batches(1)[0]
    trainer.train_epoch([(images * 1e3, labels)], 0, "train")
    assert torch.equal(model.weight, before)
    assert trainer.task.steps == 0 and trainer.num_updates == 1
    trainer.train_epoch([(images, labels)], 1, "train")
    assert trainer.task.steps == 1


@pytest.mark.parametrize(
    ("mode", "bound"), [("norm", 1e-3), ("value", 1e-3 * 15**0.5), ("agc", None)]
)
def test_clipping(mode: str, bound: float | None) -> None:
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(3, 3))
    model.get_classifier = lambda: model[2]
    before = [p.detach().clone() for p in model.parameters()]
    trainer, _ = trainer_for(model, "--clip-grad", "1e-3", "--clip-mode", mode, "--lr", "1")
    images, labels = batches(1)[0]
    trainer.train_epoch([(images * 100, labels)], 0, "train")
    moved = [(p.detach() - b).norm() for p, b in zip(model.parameters(), before, strict=True)]
    if bound is not None:
        assert all(distance <= bound * 1.01 for distance in moved)
    else:
        rows = before[0].norm(dim=1)
        assert (moved[0] <= 1e-3 * rows.norm() * 1.01) and moved[2] > 1e-2, "the head is exempt"


def test_labels_beyond_the_model_are_told() -> None:
    """In data that does not name its classes they are seen only when they come."""
    data = [(torch.zeros(4, 5), torch.tensor([0, 1, 2, 3]))]
    loader = type("Loader", (list,), {"dataset": object()})(data)
    model = linear()
    model.num_classes = 3
    trainer, _ = trainer_for(model)
    with pytest.raises(UsageError, match=r"the label 3, but the model only 3 .*--num-classes 4"):
        trainer.train_epoch(loader, 0, "train")


def test_learning_rate_scaling() -> None:
    base = ["--dataset", "sklearn/digits", "--device", "cpu", "--lr-base", "0.1"]
    for argv, expected in [
        (["--opt", "sgd"], 0.4),
        (["--opt", "adamw"], 0.2),
        (["--opt", "lamb"], 0.2),
        (["--opt", "adamw", "--lr-base-scale", "linear"], 0.4),
        (["--opt", "sgd", "--lr-base-size", "1024"], 0.1),
        (["--opt", "sgd", "--lr", "7"], 7),
    ]:
        args = parse_train_args([*base, *argv])
        assert learning_rate(args, 1024)[0] == pytest.approx(expected)


def test_schedule_none_and_prefix() -> None:
    base = ["--dataset", "sklearn/digits", "--device", "cpu", "--epochs", "10"]
    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    assert create_schedule(parse_train_args([*base, "--sched", "none"]), optimizer, 5) == (None, 10)
    args = parse_train_args(
        [*base, "--warmup-prefix", "--warmup-epochs", "2", "--cooldown-epochs", "3"]
    )
    assert create_schedule(args, optimizer, 5)[1] == 15


def test_losses_follow_the_flags() -> None:
    base = ["--dataset", "sklearn/digits", "--device", "cpu"]
    for argv, name in [
        ([], "LabelSmoothingCrossEntropy"),
        (["--smoothing", "0"], "CrossEntropyLoss"),
        (["--mixup", "0.1"], "SoftTargetCrossEntropy"),
        (["--cutmix-minmax", "0.2", "0.8"], "SoftTargetCrossEntropy"),
        (["--bce-loss", "--bce-sum", "--bce-target-thresh", "0.2"], "BinaryCrossEntropy"),
        (["--jsd-loss", "--aug-splits", "3"], "JsdCrossEntropy"),
    ]:
        assert type(create_loss(parse_train_args([*base, *argv]))).__name__ == name


def test_views_are_averaged() -> None:
    model = nn.Flatten()
    images = torch.randn(2, 1, 16, 16)
    flat = AveragedViews(model, 2, mirror=True)(images)
    torch.testing.assert_close(flat, ((images + images.flip(-1)) / 2).flatten(1))
    assert AveragedViews(model, 10, mirror=True)(images).shape == (2, 256)
    shifted = AveragedViews(model, 2, mirror=False)(torch.ones(1, 1, 16, 16))
    assert torch.equal(shifted, torch.ones(1, 256))
    with pytest.raises(UsageError, match="--tta 6: at most 5"):
        AveragedViews(model, 6, mirror=False)


# --- whole runs ---


def test_run_folder_and_what_it_reproduces(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = digits(tmp_path, "--model-ema", "--model-ema-warmup", "--reprob", "0.5")
    assert train.main([*argv, "--experiment", "a"]) == 0
    output = capsys.readouterr()
    folder = tmp_path / "a"
    names = {path.name for path in folder.iterdir()}
    files = "args.yaml environment.json train.log summary.csv curves.png last.state.safetensors"
    files += " previous.state.safetensors"
    weights = {
        f"{n}{kind}.safetensors"
        for n in ("best", "last", "checkpoint-0", "checkpoint-1")
        for kind in ("", "_ema")
    }
    assert names == {*files.split(), *weights}
    rows = summary(folder)
    columns = "epoch train_loss eval_loss eval_top1 eval_top5 eval_loss_ema eval_top1_ema"
    assert list(rows[0]) == [*columns.split(), "eval_top5_ema", "lr"]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    log = (folder / "train.log").read_text()
    assert "16 images per process x 1 process(es) x 1 accumulation = 16 per update" in log
    assert "sklearn/digits: 1,438 training and 64 validation images, 10 classes" in log
    best = folder / "best"
    command = re.search(r"to validate: (.*)", output.err)[1].split()
    assert shutil.which(command[0]) and Path(command[1]).samefile(ROOT / "validate.py")
    assert command[2:] == ["--checkpoint", f"{best}.safetensors"]
    assert f"curves: {folder / 'curves.png'}" in output.err
    assert output.out.startswith("--result\n{")

    metadata = read_metadata(folder)
    assert metadata["class_names"] == [str(digit) for digit in range(10)]
    assert metadata["dataset"]["dataset"] == "sklearn/digits"
    model = timm.create_model(
        metadata["arch"],
        num_classes=metadata["num_classes"],
        in_chans=metadata["in_chans"],
        **metadata["model_kwargs"],
    )
    load_weights(model, folder)
    timm.models.load_checkpoint(model, str(folder / "last.safetensors"))
    assert model(torch.zeros(1, *metadata["data_config"]["input_size"])).shape == (1, 10)

    again = ["--config", str(folder / "args.yaml"), "--experiment", "b"]
    assert train.main(again) == 0
    assert (tmp_path / "b" / "summary.csv").read_text() == (folder / "summary.csv").read_text()
    with pytest.raises(UsageError, match="holds a run already"):
        train.main([*argv, "--experiment", "a"])


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
    train: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command that asked for it goes on, when it is given again, with what it has since."""
    monkeypatch.setattr(curves, "can_draw", lambda: False)
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


def test_mixing_in_the_loader(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where timm's prefetcher collates and mixes."""
    for module in (loaders, run):
        monkeypatch.setattr(module, "uses_prefetcher", lambda *_: True)
    argv = digits(tmp_path, "--mixup", "0.8", "--mixup-off-epoch", "1", "--reprob", "0.2")
    train.main([*argv, "--experiment", "straight"])
    train.main([*argv, "--experiment", "stopped", "--stop-epoch", "1"])
    train.main([*argv, "--experiment", "stopped", "--resume", "auto", "-j", "1"])
    texts = [(tmp_path / name / "summary.csv").read_text() for name in ("straight", "stopped")]
    assert texts[0] == texts[1]


def test_resume_auto_of_nothing_starts_afresh(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = digits(tmp_path, "--experiment", "a", "--resume", "auto", "--epochs", "1")
    assert train.main(argv) == 0
    assert "starting afresh" in capsys.readouterr().err
    text = (tmp_path / "a" / "summary.csv").read_text()
    assert train.main(argv) == 0, "a complete run is left as it is"
    assert (tmp_path / "a" / "summary.csv").read_text() == text


def test_nan_is_never_best(train: ModuleType, tmp_path: Path) -> None:
    argv = ["--experiment", "nan", "--opt", "sgd", "--lr", "1e30", "--warmup-epochs", "0"]
    train.main(digits(tmp_path, *argv, "--eval-metric", "loss", "--on-nonfinite", "skip"))
    rows = summary(tmp_path / "nan")
    assert rows[-1]["eval_loss"] == "nan" and rows[-1]["train_skipped_updates"] == "3"
    assert len((tmp_path / "nan" / "nonfinite.jsonl").read_text().splitlines()) == 2 + 3
    assert not (tmp_path / "nan" / "best.safetensors").exists()
    assert (tmp_path / "nan" / "last.safetensors").exists()


def test_validation_interval_and_milestones(train: ModuleType, tmp_path: Path) -> None:
    argv = ["--epochs", "5", "--val-interval", "3", "--save-epochs", "2", "--stop-epoch", "4"]
    train.main(digits(tmp_path, "--experiment", "a", *argv, "--max-steps", "1"))
    rows = summary(tmp_path / "a")
    assert [bool(row["eval_top1"]) for row in rows] == [False, True, True, True]
    assert all(row["lr"] for row in rows)
    assert read_metadata(tmp_path / "a" / "milestone-2.safetensors")["epoch"] == 1


FLAGS = {
    "jsd": "--model test_resnet --aug-splits 2 --loss jsd --split-bn --resplit --reprob 0.5",
    "bce": "--bce-loss --bce-sum --bce-target-thresh 0.2 --mixup 0.2 --mixup-off-epoch 1",
    "bfloat16": "--amp --amp-dtype bfloat16 --channels-last --grad-checkpointing",
    "ema-cpu": "--model-ema --model-ema-force-cpu --epochs 1 --torchscript",
    "compile": "--torchcompile eager --model-ema --save-images --epochs 1",
    "dtype": "--model-dtype bfloat16 --opt adafactorbv --layer-decay 0.7",
    "none": "--tta 4 --sched none --head-init-scale 0.1 --head-init-bias -2 --in-chans 1",
    "second-order": "--opt adahessian --epochs 1",
    "start": "--start-epoch 1 --num-classes 12 --lr-base 0.01 --fast-norm --gp avg",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:The .grad attribute")
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_live(train: ModuleType, tmp_path: Path, name: str) -> None:
    argv = digits(tmp_path, "--max-steps", "1", "--experiment", name, *FLAGS[name].split())
    assert train.main(argv) == 0
    folder = tmp_path / name
    rows = summary(folder)
    assert float(rows[-1]["train_loss"]) > 0
    expected = {
        "ema-cpu": (folder / "best_ema.safetensors").exists() and "eval_top1_ema" not in rows[0],
        "compile": (folder / "train-batch-0.jpg").exists()
        and all("_orig_mod" not in key for key in read_weights(folder / "last_ema.safetensors")[0]),
        "none": float(rows[-1]["lr"]) == 1e-3 and read_metadata(folder)["in_chans"] == 1,
        "start": [row["epoch"] for row in rows] == ["1"]
        and read_metadata(folder)["num_classes"] == 12,
    }
    assert expected.get(name, True)


def test_folder_of_images(train: ModuleType, tmp_path: Path) -> None:
    for split, count in (("train", 8), ("validation", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), (80 * label, 10 * index, 0)).save(
                    folder / f"{index}.png"
                )
    words = "--model test_resnet --img-size 32 -b 8 -j 0 --epochs 1 --device cpu --lr 0.01"
    argv = words.split()
    data = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    train.main([*argv, *data])
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.endswith("-test_resnet-32")
    assert read_metadata(folder)["class_names"] == ["ant", "bee", "cat"]
    with pytest.raises(UsageError, match="--num-classes 2: the data has 3 classes"):
        train.main([*argv, *data, "--num-classes", "2"])


# --- mistakes ---

MISTAKES = {
    "classes": ("--num-classes 9", "--num-classes 9: the data has 10 classes"),
    "size": ("--img-size 33", r"cannot take 3 x 33 x 33 images"),
    "kwargs": ("--model-kwargs depht=2", "--model test_vit: .*depht"),
    "tta": ("--tta 11", "--tta 11: at most 10 views"),
    "nothing": ("--resume nothing/here", "--resume.*nothing/here"),
    "foreign": ("--initial-checkpoint {self}", "not a readable checkpoint"),
    "resume-foreign": ("--resume {self}", "--resume .*not a"),
    "output": ("--output {self}", "--output: cannot write"),
    "batch": ("-b 2000", "larger than the training set"),
    "schedule": ("--sched wsd --decay-epochs 9 --warmup-epochs 0", "--sched: wsd .*decay"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags, pattern = MISTAKES[name]
    output = tmp_path / "out"
    with pytest.raises(UsageError, match=pattern) as caught:
        train.main(digits(output, *flags.format(self=__file__).split()))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""
    assert not output.exists()


def test_state_of_another_model_or_optimizer(train: ModuleType, tmp_path: Path) -> None:
    train.main(digits(tmp_path, "--experiment", "a", "--max-steps", "1", "--epochs", "1"))
    state = tmp_path / "a" / "last.state.safetensors"
    resume = ["--resume", str(state), "--output", str(tmp_path / "new")]
    for flags, pattern in (
        (
            ["--model", "test_resnet"],
            "cannot go on exactly: --model test_vit -> test_resnet, .*yway",
        ),
        (["--model", "test_resnet", "--resume-anyway"], "not a checkpoint of test_resnet"),
        (["--num-classes", "11", "--resume-anyway"], "has 10 classes, the model 11"),
        (["--opt", "sgd"], "cannot go on exactly: --opt adamw -> sgd"),
    ):
        with pytest.raises(UsageError, match=pattern):
            train.main(digits(tmp_path, *resume, *flags))
    weights = tmp_path / "a" / "last.safetensors"
    with pytest.raises(UsageError, match="weights without the state of a run"):
        train.main(digits(tmp_path, "--resume", str(weights)))
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"last\.state\.safetensors: "):
        train.main(digits(tmp_path, *resume))
    assert not (tmp_path / "new").exists()


# --- processes and signals ---


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "train.py"), *argv]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


def test_two_processes_train_like_one(train: ModuleType, tmp_path: Path) -> None:
    """Same global batch, LayerNorm model: equal up to the order of float32 sums (1e-5)."""
    shared = ["--no-aug", "--grad-accum-steps", "2", "--clip-grad", "1"]
    train.main(digits(tmp_path, *shared, "-b", "16", "--experiment", "one"))
    done = torchrun(*digits(tmp_path, *shared, "-b", "8", "--experiment", "two"))
    assert done.returncode == 0, done.stderr
    one, two = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert list(one[0]) == list(two[0])
    for first, second in zip(one, two, strict=True):
        for column, value in first.items():
            assert float(second[column]) == pytest.approx(float(value), rel=1e-5), column
    assert done.stderr.count("run folder") == 1 and done.stdout.count("--result") == 1
    assert len(load_state(tmp_path / "two" / "last.state.safetensors")["losses"]) == 2


def test_mistake_in_every_process_is_told_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = torchrun(*digits(output, "-b", "1000"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(errors) == 1 and "2 processes" in errors[0]
    assert "exitcode  : 2" in done.stderr and not output.exists()


def test_signal_ends_the_run_at_the_next_update(tmp_path: Path) -> None:
    argv = digits(tmp_path, "--experiment", "a", "--epochs", "1000", "-j", "1")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    state = tmp_path / "a" / "last.state.safetensors"
    deadline = time.monotonic() + 100
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    position = resume.Position(**load_state(state)["position"])
    assert f"{position} are saved: --resume {state.parent}" in errors
    assert errors.endswith("warning: stopped by SIGTERM\n")
    assert "Traceback" not in errors
    assert len(summary(state.parent)) == position.epoch
    assert not [path.name for path in state.parent.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("place", ["training", "evaluation", "save"])
def test_interrupt_loses_no_update(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    where = {
        "training": (loop.Trainer, "_update"),
        "evaluation": (Session, "_evaluate"),
        "save": (Session, "_save_epoch"),
    }
    owner, name = where[place]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever tests before have left
    whole, calls = getattr(owner, name), []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    assert train.main(digits(tmp_path, "--experiment", "a", "--epochs", "3")) == 130
    position = resume.Position(**load_state(tmp_path / "a" / "last.state.safetensors")["position"])
    expected = {"training": (0, 3, False), "evaluation": (1, 3, True), "save": (2, 0, False)}
    assert position == expected[place]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are put back"


def test_requeue_signal_ends_the_run_well(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.Trainer._update

    def signalled(self: loop.Trainer, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        whole(self, *args)

    monkeypatch.setattr(loop.Trainer, "_update", signalled)
    assert train.main(digits(tmp_path, "--experiment", "a")) == 0
    position = load_state(tmp_path / "a" / "last.state.safetensors")["position"]
    assert position == {"epoch": 0, "updates": 2, "evaluating": False}


def test_signal_before_the_first_epoch(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "set_up", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(digits(tmp_path / "out")) == 143
    assert not (tmp_path / "out").exists()


def test_deferred_signals_wait() -> None:
    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGTERM, "the first one counts"
    with pytest.raises(Stopped) as stopped, StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 143 and str(stopped.value) == "SIGTERM"
