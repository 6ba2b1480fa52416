"""What goes wrong with timm's own checkpoints, reproduced, and right with ours; hostile files."""

import importlib.util
import json
import math
import os
import pickle
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from faulty_runs import UPDATES, flags, without_drawing
from killing import ROOT, Run, to_the_end
from timm.models import load_checkpoint, resume_checkpoint
from timm.utils import CheckpointSaver

from qna_timm.training import loop
from qna_timm.training.data.sampling import KeyedDataset
from qna_timm.training.errors import UsageError
from qna_timm.training.resume import Position
from qna_timm.training.session import Session
from qna_timm.training.storage.checkpoint import read_metadata, read_weights
from qna_timm.training.storage.saver import Saver
from qna_timm.training.storage.state_files import STATE_NAME, load_state

FOLDER, LOG = Path("a"), Path("log")
MODEL = "test_resnet"


def script(name: str) -> ModuleType:
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.usefixtures("in_own_folder")


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(MODEL, num_classes=10)


def timm_saver(net: torch.nn.Module) -> CheckpointSaver:
    Path("timm").mkdir(exist_ok=True)
    optimizer = torch.optim.AdamW(net.parameters())
    args = Namespace(model=MODEL, lr=0.1)
    return CheckpointSaver(net, optimizer, args, checkpoint_dir="timm", recovery_dir="timm")


def test_timm_resumes_the_next_epoch_from_the_middle_of_one() -> None:
    timm_saver(model()).save_recovery(3, batch_idx=500)
    assert resume_checkpoint(model(1), "timm/recovery-3-500.pth.tar", log_info=False) == 4


def test_ours_resumes_the_next_batch(train: ModuleType) -> None:
    """Every image is trained on, in the order of a run that was not stopped."""

    def told(name: str, stops: bool) -> Callable[[int], None]:
        def prepare(rank: int) -> None:
            without_drawing()
            update = loop.Trainer._update
            read = KeyedDataset.__getitems__

            def reading(dataset: KeyedDataset, keys: list) -> Any:
                with open(name, "a") as file:
                    file.write(json.dumps(keys) + "\n")
                return read(dataset, keys)

            def updating(trainer: loop.Trainer, *args: Any) -> None:
                update(trainer, *args)
                if stops and trainer.num_updates == UPDATES + 1:
                    os.kill(os.getpid(), signal.SIGTERM)

            KeyedDataset.__getitems__, loop.Trainer._update = reading, updating

        return prepare

    to_the_end(train, flags("--experiment", "straight"), LOG, prepare=told("straight.txt", False))
    assert Run(train, flags(), LOG, 1, told("stopped.txt", True)).wait(60) == [143]
    assert Position(**load_state(FOLDER / STATE_NAME)["position"]) == (1, 2, False)
    to_the_end(train, flags(), LOG, prepare=told("stopped.txt", False))
    straight = Path("straight.txt").read_text().splitlines()
    assert Path("stopped.txt").read_text().splitlines() == straight
    assert len(straight) == 2 * UPDATES * 2  # micro-batches


def test_timm_forgets_its_best() -> None:
    """Unless whoever resumes hands the new saver the old one's state."""
    timm_saver(model()).save_checkpoint(0, metric=90.0)
    timm_saver(model()).save_checkpoint(1, metric=10.0)
    best = torch.load("timm/model_best.pth.tar", weights_only=False)
    assert best["metric"] == 10.0


def test_ours_keeps_its_best(train: ModuleType) -> None:
    def prepare(rank: int) -> None:
        without_drawing()
        evaluate = Session._evaluate

        def worse(session: Session, ema: bool) -> dict[str, float]:
            return {**evaluate(session, ema), "top1": 10.0 if session.position.epoch else 90.0}

        Session._evaluate = worse

    to_the_end(train, flags("--stop-epoch", "1"), LOG, prepare=prepare)
    to_the_end(train, flags("--stop-epoch", "2"), LOG, prepare=prepare)
    best, last = (read_metadata(FOLDER / f"{name}.safetensors") for name in ("best", "last"))
    assert (best["epoch"], best["metric"], last["metric"]) == (0, 90.0, 10.0)


def test_nan_stays_timms_best() -> None:
    saver = timm_saver(model())
    saver.save_checkpoint(0, metric=math.nan)
    assert saver.save_checkpoint(1, metric=90.0)[1] == 0


def test_nan_is_never_ours(tmp_path: Path) -> None:
    saver = Saver(tmp_path, {}, metric_name="top1", keep=2)
    for epoch, metric in enumerate((math.nan, 90.0, math.nan)):
        saver.save(epoch, model(), None, {"top1": metric})
    assert saver.best[""]["epoch"] == 1
    assert read_metadata(tmp_path / "best.safetensors")["metric"] == 90.0


def test_timms_checkpoint_starts_our_run(train: ModuleType) -> None:
    net = model(3)
    timm_saver(net).save_checkpoint(0, metric=1.0)
    argv = flags("--initial-checkpoint", "timm/last.pth.tar", "--lr", "0", "--epochs", "1")
    to_the_end(train, argv, LOG, prepare=without_drawing)
    weights, _ = read_weights(FOLDER / "last.safetensors")
    trained = dict(net.named_parameters())
    assert all(torch.equal(weights[name], trained[name]) for name in trained)


def test_our_weights_load_in_timm(train: ModuleType) -> None:
    to_the_end(train, flags("--epochs", "1"), LOG, prepare=without_drawing)
    for name in ("last", "last_ema"):
        path = FOLDER / f"{name}.safetensors"
        weights, _ = read_weights(path)
        loaded = model(5)
        load_checkpoint(loaded, str(path))
        created = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(path))
        for net in (loaded, created):
            state = net.state_dict()
            assert all(torch.equal(weights[key], state[key]) for key in weights)


class Attack:
    """Unpickled as a program would, it makes a file."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("executed",))


def hostile_files() -> list[Path]:
    """Pickles, bare, as torch saves them, within what looks right, and under other names."""
    whole = {"state_dict": model().state_dict(), "arch": MODEL, "args": Attack()}
    folder = Path("hostile")
    folder.mkdir()
    paths = []
    for suffix in (".pth.tar", ".bin", ".safetensors", ".state.safetensors"):
        for name, value in (("bare", Attack()), ("inside", whole)):
            for form, new in (("new", True), ("old", False), ("pickle", None)):
                path = folder / f"{name}-{form}{suffix}"
                if new is None:
                    path.write_bytes(pickle.dumps(value))
                else:
                    torch.save(value, path, _use_new_zipfile_serialization=new)
                paths.append(path)
    # in a run's own folder
    Path("b").mkdir()
    for name in (STATE_NAME, "previous.state.safetensors", "best.safetensors"):
        torch.save(whole, Path("b") / name)
    return [*paths, Path("b")]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_files_are_never_executed(train: ModuleType) -> None:
    validate, convert = script("validate.py"), script("scripts/convert_checkpoint.py")
    data = ["--dataset", "sklearn/digits", "--device", "cpu", "--model", MODEL]
    ga = ("--model", "ga_convnext_tiny", "--backbone-checkpoint")
    refused = 0
    for path in hostile_files():
        calls = [
            lambda p: train.main(flags("--resume", p, "--experiment", "")),
            lambda p: train.main(flags("--initial-checkpoint", p)),
            lambda p: train.main(flags("--pretrained-path", p)),
            lambda p: validate.main([*data, "--checkpoint", p]),
            *(
                lambda p, name=name: convert.main([p, "--model", name, "--out", "out.safetensors"])
                for name in ("qna_vit_tiny", "sa_resnet_small_local")
            ),
        ]
        if path.name.startswith("inside-True"):  # the model is large
            calls.append(lambda p: train.main(flags(*ga, p)))
        for call in calls:
            with pytest.raises(UsageError) as caught:
                call(str(path))
            assert path.name in str(caught.value) and "\n" not in str(caught.value)
            assert not Path("executed").exists()
            refused += 1
    with pytest.raises(UsageError, match="damaged"):
        train.main(flags("--experiment", "b"))
    assert not Path("executed").exists() and refused >= 150
    pickle.loads(pickle.dumps(Attack()))
    assert Path("executed").is_dir(), "the canary sings"
