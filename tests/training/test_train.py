"""train.py: whole runs, mistakes, several processes, signals."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from killing import Run
from PIL import Image
from preloaded import programs
from short_runs import digits, summary

from qna_timm.training import loop, resume, run
from qna_timm.training.data import loaders
from qna_timm.training.errors import UsageError
from qna_timm.training.session import Session
from qna_timm.training.signals import Stopped, StopSignals
from qna_timm.training.storage.checkpoint import load_weights, read_metadata, read_weights
from qna_timm.training.storage.state_files import load_state

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.draws
def test_run_folder_and_what_it_reproduces(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = digits(tmp_path, "--model-ema", "--model-ema-warmup", "--reprob", "0.5")
    assert train.main([*argv, "--experiment", "a run"]) == 0
    output = capsys.readouterr()
    folder = tmp_path / "a run"
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
    assert "adamw, lr 0.001, weight decay 2e-05, cosine over 2 epochs, 1 of warm-up" in log
    best = folder / "best"
    command = shlex.split(re.search(r"to validate: (.*)", output.err)[1])
    assert shutil.which(command[0]) and Path(command[1]).samefile(ROOT / "validate.py")
    assert command[2:] == ["--checkpoint", f"{best}.safetensors"]
    assert f"curves: {folder / 'curves.png'}" in output.err
    assert re.search(
        r"best top1( of the averaged weights)?: \S+ in epoch \d, best\S*tensors\n", log
    )
    assert output.out.startswith("--result\n{")
    assert set(json.loads(output.out.split("\n", 1)[1])["best"]) == {"model", "ema"}

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
        train.main([*argv, "--experiment", "a run"])


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


def test_nan_is_never_best(train: ModuleType, tmp_path: Path) -> None:
    argv = ["--experiment", "nan", "--opt", "sgd", "--lr", "1e30", "--warmup-epochs", "0"]
    train.main(digits(tmp_path, *argv, "--eval-metric", "loss", "--on-nonfinite", "skip"))
    rows = summary(tmp_path / "nan")
    assert rows[-1]["eval_loss"] == "nan" and rows[-1]["train_skipped_updates"] == "3"
    assert len((tmp_path / "nan" / "nonfinite.jsonl").read_text().splitlines()) == 2 + 3
    assert not (tmp_path / "nan" / "best.safetensors").exists()
    assert (tmp_path / "nan" / "last.safetensors").exists()


def test_leaves_no_workers(train: ModuleType, tmp_path: Path) -> None:
    """Where several runs share a process, garbage with workers takes 5 s for each of them."""
    before = multiprocessing.active_children()
    train.main(digits(tmp_path, "--experiment", "a", "--max-steps", "1", "-j", "1"))
    assert set(multiprocessing.active_children()) <= set(before)


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


MODULE = """
import timm

@timm.models.register_model
def test_from_elsewhere(**kwargs):
    return timm.create_model("test_vit", **kwargs)
"""


def test_modules_to_import_bring_models(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models_from_elsewhere.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = "--device-modules models_from_elsewhere --model test_from_elsewhere --epochs 1"
    assert train.main(digits(tmp_path, "--experiment", "a", *words.split())) == 0
    assert len(summary(tmp_path / "a")) == 1


def test_settings_that_a_newcomer_did_not_mean_are_told(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm's optimizer for a model of ours, and a warm-up as long as the run."""
    words = "--dataset sklearn/digits --model sa_resnet_small_cnn --img-size 32 -b 16 -j 0"
    words += " --epochs 3 --stop-epoch 1 --max-steps 1 --val-num-samples 16 --device cpu"
    assert train.main([*words.split(), "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert "sgd, lr 0.00625 (0.1 x linear scaling of 16/256), weight decay 2e-05" in told
    assert "cosine over 3 epochs, 3 of warm-up, stopping after 1\n" in told
    assert "warning: --warmup-epochs 5: the run ends after 3 epochs, before its learning" in told
    assert re.search(
        r"optimizer \(sgd\).*sa_resnet_small_cnn are in \S*sa_resnet_small_cnn.yaml", told
    )
    assert train.main([*words.split(), "--opt", "adamw", "--output", str(tmp_path)]) == 0
    assert "the paper's" not in capsys.readouterr().err


MISTAKES = {
    "classes": ("--num-classes 9", "--num-classes 9: the data has 10 classes"),
    "single": ("--model test_resnet -b 1", "--batch-size 1: .* needs 2 .* more than 1 value"),
    "pool": ("--gp foo", "--gp foo: "),
    "overlay": (
        "--pretrained --pretrained-cfg-overlay file=nosuch.pth",
        "--pretrained-cfg-overlay file=nosuch.pth: there is no such file",
    ),
    "size": ("--img-size 33", r"cannot take 3 x 33 x 33 images"),
    "kwargs": ("--model-kwargs depht=2", "--model-kwargs depht: VisionT.* has no .*mean 'depth'"),
    "part": (
        "--model ga_test_resnet --model-kwargs num_branch=2",
        "--model-kwargs num_branch: GramianHead has no such argument; did you mean 'num_branches'",
    ),
    "flag": ("--drop-block 0.1", "--drop-block: VisionTransformer has no argument drop_block_rate"),
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


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [str(programs() / "torchrun"), "--nproc_per_node=2"]
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


def test_mistake_in_every_process_is_told_once(train: ModuleType, tmp_path: Path) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    assert Run(train, digits(output, "-b", "1000"), log, processes=2).wait() == [2, 2]
    errors = [line for line in log.read_text().splitlines() if line.startswith("train.py: error:")]
    assert len(errors) == 1 and "2 processes" in errors[0]
    assert not output.exists()


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
    assert f"saved after {position}: --resume {state.parent}" in errors
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


def test_a_plateau_is_one_of_the_averages(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in timm: of the weights that are averaged, where there are some."""

    def metrics(self: Session, ema: bool) -> dict[str, float]:
        return {"loss": 1.0, "top1": 10.0 if ema else 20.0 + self.position.epoch, "top5": 50.0}

    monkeypatch.setattr(Session, "_evaluate", metrics)
    flags = "--sched plateau --patience-epochs 0 --warmup-epochs 0 --epochs 4 --max-steps 1"
    for name, averages in (("own", []), ("averaged", ["--model-ema"])):
        argv = digits(tmp_path, *flags.split(), *averages, "--experiment", name)
        assert train.main(argv) == 0
    rates = {n: [float(row["lr"]) for row in summary(tmp_path / n)] for n in ("own", "averaged")}
    assert rates["own"] == [1e-3] * 4
    assert rates["averaged"] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])


def test_deferred_signals_wait() -> None:
    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGTERM, "the first one counts"
    with pytest.raises(Stopped) as stopped, StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 143 and str(stopped.value) == "SIGTERM"
