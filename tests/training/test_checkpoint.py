"""Checkpoint files: what they hold, who can read them, and what is said of damaged ones."""

import argparse
import copy
import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import convert_splitbn_model
from timm.models import load_checkpoint
from torch import nn

from qna_timm.training.build import build_model
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.storage.checkpoint import (
    load_weights,
    read_metadata,
    read_weights,
    save_weights,
)
from qna_timm.training.storage.files import replacing
from qna_timm.training.storage.packing import pack, unpack
from qna_timm.training.storage.saver import Saver, is_better

METADATA = {"arch": "test_vit", "num_classes": 3, "class_names": ["ant", "bee", "cat"]}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def make(seed: int, num_classes: int = 3, name: str = "test_vit", **kwargs: object) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def model_args(name: str, flag: str, path: Path) -> argparse.Namespace:
    data = str(path.parent)
    return parse_train_args(
        ["--model", name, "--device", "cpu", "--data-dir", data, flag, str(path)]
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "best.safetensors"
    path.parent.mkdir()
    save_weights(path, make(0), METADATA)
    return path


def test_file_round_trip(saved: Path) -> None:
    model = make(1)
    assert load_weights(model, saved) == METADATA
    assert same_weights(model, make(0))
    assert read_metadata(saved) == METADATA
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["qna_timm"])["class_names"] == ["ant", "bee", "cat"]


def test_timm_loads_the_file(saved: Path) -> None:
    model = make(1)
    load_checkpoint(model, str(saved))
    assert same_weights(model, make(0))
    overlay = {"file": str(saved), "num_classes": 3}
    model = make(2, pretrained=True, pretrained_cfg_overlay=overlay)
    assert same_weights(model, make(0))


@pytest.mark.parametrize("ema", [False, True])
def test_timm_checkpoints_are_read(tmp_path: Path, ema: bool) -> None:
    path = tmp_path / "model_best.pth.tar"
    wrapped = {f"module.{key}": value for key, value in make(0).state_dict().items()}
    content = {
        "arch": "test_vit",
        "epoch": 7,
        "metric": 71.5,
        "args": argparse.Namespace(lr=0.1),
        "optimizer": {"state": {}, "param_groups": []},
        "state_dict": wrapped,
        "state_dict_ema": make(5).state_dict(),
    }
    torch.save(content, path)
    model = make(1)
    metadata = load_weights(model, path, use_ema=ema)
    about = {"arch": "test_vit", "epoch": 7, "metric": 71.5}
    assert metadata == about | ({"ema": True} if ema else {})
    assert same_weights(model, make(5 if ema else 0))


def test_old_torch_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(make(0).state_dict(), path, _use_new_zipfile_serialization=False)
    assert read_weights(path)[1] == {}


def test_run_folder_stands_for_its_best_weights(saved: Path) -> None:
    folder = saved.parent
    save_weights(folder / "last.safetensors", make(1), {})
    save_weights(folder / "best_ema.safetensors", make(2), {"ema": True})
    model = make(9)
    load_weights(model, folder)
    assert same_weights(model, make(0))
    assert load_weights(model, folder, use_ema=True) == {"ema": True}
    assert same_weights(model, make(2))
    saved.unlink()
    load_weights(model, folder)
    assert same_weights(model, make(1))


def test_tied_and_strided_tensors_survive(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    model = model.to(memory_format=torch.channels_last)
    model[2].weight = model[1].weight
    save_weights(tmp_path / "tied.safetensors", model, {})
    weights, _ = read_weights(tmp_path / "tied.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files_are_one_line(saved: Path, tmp_path: Path, kept: int, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(make(0).state_dict(), whole)
    else:
        whole = saved
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[:kept])
    for read in (read_metadata, read_weights, lambda path: load_weights(make(0), path)):
        with pytest.raises(UsageError, match="cut") as caught:
            read(cut)
        assert "\n" not in str(caught.value)


class Attack:
    """Unpickling it as a program would makes a file."""

    path: Path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_files_are_refused_unexecuted(tmp_path: Path) -> None:
    Attack.path = tmp_path / "executed"
    path = tmp_path / "bad.pth"
    for content in (b"", b"hello", pickle.dumps(Attack())):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.pth: not a readable checkpoint"):
            read_weights(path)
    for value in (Attack(), [1, 2], {"a": 1}, {}):
        torch.save(value, path)
        with pytest.raises(UsageError, match=r"bad\.pth: not a"):
            read_weights(path)
    assert not Attack.path.exists()


def test_missing_file_names_the_nearest(saved: Path) -> None:
    with pytest.raises(UsageError, match=r"no such .* did you mean 'best\.safetensors'"):
        read_weights(saved.with_name("bets.safetensors"))
    with pytest.raises(UsageError, match="no weights in this folder"):
        read_weights(saved.parent.parent)


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (("test_vit", 10), "has 3 classes, the model 10"),
        (("test_resnet", 3), "not a checkpoint of test_resnet but of test_vit: .*missing"),
        (("test_vit", 3, {"mlp_ratio": 1}), "of another shape, such as blocks"),
        (("test_vit", 3, {"reg_tokens": 1}), "missing, such as reg_token"),
    ],
)
def test_wrong_model_is_one_line(saved: Path, model: tuple, pattern: str) -> None:
    name, classes, *rest = model
    with pytest.raises(UsageError, match=pattern) as caught:
        load_weights(make(0, classes, name, **(rest[0] if rest else {})), saved)
    assert "\n" not in str(caught.value)


def test_failed_write_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(OSError, match="disk full"), replacing(saved) as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk full")
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_first_weights_keep_a_fitting_head(saved: Path) -> None:
    for flag in ("--pretrained-path", "--initial-checkpoint"):
        model = build_model(model_args("test_vit", flag, saved), 3)
        assert same_weights(model, make(0))


@pytest.mark.parametrize("flag", ["--pretrained-path", "--initial-checkpoint"])
def test_first_weights_are_the_averaged_ones_of_a_timm_checkpoint(
    tmp_path: Path, flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "last.pth.tar"
    both = {"state_dict": make(0).state_dict(), "state_dict_ema": make(1).state_dict()}
    torch.save({"arch": "test_vit", **both}, path)
    with caplog.at_level("INFO"):
        assert same_weights(build_model(model_args("test_vit", flag, path), 3), make(1))
    assert f"weights, averaged: {path}" in caplog.text


def test_scaled_head(tmp_path: Path) -> None:
    """Biases with it, as in timm: they are of what was loaded, and not 0."""
    path, source = tmp_path / "resnet.pth", make(0, name="test_resnet")
    torch.save(source.state_dict(), path)
    args = model_args("test_resnet", "--initial-checkpoint", path)
    args.head_init_scale = 0.5
    head = build_model(args, 3).get_classifier()
    assert source.fc.bias.abs().min() > 0
    assert torch.equal(head.weight, 0.5 * source.fc.weight)
    assert torch.equal(head.bias, 0.5 * source.fc.bias)


@pytest.mark.parametrize("flag", ["--pretrained-path", "--initial-checkpoint"])
def test_first_weights_of_other_classes_leave_a_fresh_head(
    saved: Path, flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    args = model_args("test_vit", flag, saved)
    with caplog.at_level("WARNING"):
        model = build_model(args, 5)
    assert "has 3 classes, the model 5: its classifier (head) is fresh" in caplog.text
    source, loaded = make(0).state_dict(), model.state_dict()
    trunk = [key for key in loaded if not key.startswith("head.")]
    assert all(torch.equal(loaded[key], source[key]) for key in trunk)
    assert loaded["head.weight"].shape == (5, 64)


@pytest.mark.parametrize("flag", ["--pretrained-path", "--initial-checkpoint"])
@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["ant", "bee", "cat"], ""),
        (["cat", "ant", "bee"], "has the same classes in another order: its classifier (head) is"),
        (["elk", "fox", "yak"], "has other classes (ant, bee, cat; the data: elk, fox, yak): its"),
    ],
)
def test_first_weights_of_classes_by_name(
    saved: Path, flag: str, names: list[str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        model = build_model(model_args("test_vit", flag, saved), 3, names)
    assert told in caplog.text and bool(told) == bool(caplog.records)
    same = torch.equal(model.head.weight, make(0).head.weight)
    assert same == (not told)
    assert torch.equal(model.norm.weight, make(0).norm.weight)


def test_first_weights_of_a_file_are_not_downloaded(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("published weights")

    monkeypatch.setattr("timm.models._builder.load_pretrained", load)
    args = model_args("test_vit", "--pretrained-path", saved)
    args.pretrained = True
    assert same_weights(build_model(args, 3), make(0))
    both = ["--pretrained-path", str(saved), "--initial-checkpoint", str(saved)]
    with pytest.raises(UsageError, match=r"^--initial-checkpoint: loads the whole model, and so"):
        parse_train_args(["--data-dir", str(saved.parent), *both])


def test_first_weights_of_another_model_are_refused(saved: Path) -> None:
    for flag in ("--pretrained-path", "--initial-checkpoint"):
        args = model_args("test_resnet", flag, saved)
        with pytest.raises(UsageError, match="not a checkpoint of test_resnet"):
            build_model(args, 5)


def test_packing_round_trip() -> None:
    state = {
        "numbers": [1, 2.5, None, True, float("inf"), "text"],
        7: {"step": torch.tensor(3.0), ("a", 1): (torch.arange(4), torch.float16)},
        "numpy": np.random.RandomState(3).get_state(),
        "scalar": np.float64(0.1),
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
    }
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(state, tensors))
    back = unpack(json.loads(text), tensors)
    assert back["numbers"] == state["numbers"]
    assert back[7]["step"].item() == 3
    assert torch.equal(back[7]["a", 1][0], torch.arange(4)) and back[7]["a", 1][1] == torch.float16
    assert back["scalar"] == 0.1 and back["a.b"] == 0 and back["a"]["b"] == 1
    again = np.random.RandomState()
    name, keys, *rest = back["numpy"]
    again.set_state((name, np.asarray(keys), *rest))
    assert again.rand() == np.random.RandomState(3).rand()
    with pytest.raises(TypeError, match=r"state\.a\.0: state of type .*Path"):
        pack({"a": [Path()]}, {})


@pytest.mark.parametrize(
    ("metric", "than", "minimise", "expected"),
    [
        (1.0, None, False, True),
        (None, None, False, False),
        (float("nan"), None, False, False),
        (float("nan"), 1.0, True, False),
        (1.0, float("nan"), False, True),
        (2.0, 1.0, False, True),
        (2.0, 1.0, True, False),
        (1.0, 1.0, False, False),
    ],
)
def test_better(metric: float | None, than: float | None, minimise: bool, expected: bool) -> None:
    assert is_better(metric, than, minimise) is expected


def test_saver_keeps_what_it_says(tmp_path: Path) -> None:
    saver = Saver(tmp_path, METADATA, metric_name="top1", keep=2, milestones=[1])
    scores = [50.0, 70.0, float("nan"), 60.0, 70.0]
    averages = [20.0, 40.0, 60.0, 35.0, 50.0]
    for epoch, (score, average) in enumerate(zip(scores, averages, strict=True)):
        saver.save(epoch, make(epoch), make(100 + epoch), {"top1": score, "top1_ema": average})
    names = sorted(path.name for path in tmp_path.iterdir())
    stems = ["best", "checkpoint-2", "checkpoint-4", "last", "milestone-1"]
    assert names == sorted(f"{stem}{kind}.safetensors" for stem in stems for kind in ("", "_ema"))
    expected = {
        "best": 1,
        "best_ema": 102,
        "last": 4,
        "last_ema": 104,
        "checkpoint-2": 2,
        "checkpoint-4_ema": 104,
        "milestone-1_ema": 100,
    }
    for name, seed in expected.items():
        model = make(999)
        metadata = load_weights(model, tmp_path / f"{name}.safetensors")
        assert same_weights(model, make(seed)), name
        assert metadata["epoch"] == seed % 100 and metadata["ema"] == name.endswith("_ema")
    assert saver.best_kind() == "" and saver.best_file().name == "best.safetensors"
    state = json.loads(json.dumps(saver.state_dict()))
    (tmp_path / "new").mkdir()
    for folder in (tmp_path, tmp_path / "new"):
        again = Saver(folder, METADATA, metric_name="top1", keep=2)
        again.adopt(state, tmp_path)
        again.save(5, make(5), None, {"top1": 49.0})
        model = make(999)
        load_weights(model, folder / "best.safetensors")
        assert same_weights(model, make(1)), "a worse epoch after a resume must not be the best"
    assert not (tmp_path / "checkpoint-5.safetensors").exists()
    assert (tmp_path / "new" / "checkpoint-5.safetensors").exists()


def test_averages_that_are_not_evaluated_have_no_metric(tmp_path: Path) -> None:
    """They follow the model's, which is said to be none of theirs."""
    saver = Saver(tmp_path, METADATA, metric_name="top1", keep=1)
    for epoch, score in enumerate([50.0, 70.0, 60.0]):
        saver.save(epoch, make(epoch), make(100 + epoch), {"top1": score})
    found = read_metadata(tmp_path / "best_ema.safetensors")
    assert (found["epoch"], found["metric"]) == (1, None)
    assert read_metadata(tmp_path / "best.safetensors")["metric"] == 70
    assert [saver.best[kind]["measured"] for kind in ("", "_ema")] == [True, False]
    assert saver.best_kind() == ""


@pytest.mark.parametrize(("model", "average", "kind"), [(70, 60, ""), (60, 70, "_ema"), (7, 7, "")])
def test_the_better_kind_is_told(tmp_path: Path, model: float, average: float, kind: str) -> None:
    saver = Saver(tmp_path, METADATA, metric_name="top1", keep=1)
    saver.save(0, make(0), make(1), {"top1": float(model), "top1_ema": float(average)})
    assert saver.best_kind() == kind


def test_epochs_that_are_trained_anew_are_not_the_best(tmp_path: Path) -> None:
    saver = Saver(tmp_path, METADATA, metric_name="top1", keep=2)
    for epoch, score in enumerate([50.0, 90.0, 80.0]):
        saver.save(epoch, make(epoch), None, {"top1": score})
    state = json.loads(json.dumps(saver.state_dict()))
    again = Saver(tmp_path, METADATA, metric_name="top1", keep=2)
    again.adopt(state, tmp_path, before=1)
    assert again.kept == []
    again.save(1, make(10), None, {"top1": 60.0})
    assert again.best[""]["epoch"] == 1
    assert read_metadata(tmp_path / "best.safetensors")["metric"] == 60
    assert [entry["epoch"] for entry in again.kept] == [1]


def test_of_equal_epochs_the_earlier_is_kept(tmp_path: Path) -> None:
    saver = Saver(tmp_path, METADATA, metric_name="top1", keep=1)
    for epoch in range(2):
        saver.save(epoch, make(epoch), None, {"top1": 50.0})
    assert [entry["epoch"] for entry in saver.kept] == [0] and saver.best[""]["epoch"] == 0


def test_kind_with_the_lesser_loss_is_the_best(tmp_path: Path) -> None:
    saver = Saver(tmp_path, METADATA, metric_name="loss", keep=1)
    saver.save(0, make(0), make(100), {"loss": 2.0, "loss_ema": 1.0})
    assert saver.best_kind() == "_ema" and saver.best_file().name == "best_ema.safetensors"


def test_failure_behind_the_best_of_averages_without_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known as best is what is on disk: they follow the model's metric."""
    saver = Saver(tmp_path, METADATA, metric_name="top1", keep=1)
    saver.save(0, make(0), make(100), {"top1": 50.0})
    copy_last = Saver._copy_last

    def failing(self: Saver, name: str, kind: str) -> None:
        copy_last(self, name, kind)
        if (name, kind) == ("best", "_ema"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Saver, "_copy_last", failing)
    with pytest.raises(OSError, match="Input/output"):
        saver.save(1, make(1), make(101), {"top1": 60.0})
    assert saver.best["_ema"] == {"epoch": 1, "metric": 60.0, "measured": False}


def test_norms_of_splits_stay_out_of_weights(tmp_path: Path) -> None:
    """timm's model has none, whose batch norm is that of the clean split."""
    model = timm.create_model("test_resnet", num_classes=10)
    split = convert_splitbn_model(copy.deepcopy(model), 2)
    save_weights(tmp_path / "x.safetensors", split, {"arch": "test_resnet"})
    load_weights(model, tmp_path / "x.safetensors")
    torch.testing.assert_close(model.bn1.weight, split.bn1.weight)


def test_saver_minimises_the_loss(tmp_path: Path) -> None:
    saver = Saver(tmp_path, METADATA, metric_name="loss", keep=1)
    for epoch, loss in enumerate([2.0, 1.0, 3.0]):
        saver.save(epoch, make(epoch), None, {"loss": loss, "top1": 10.0 * epoch})
    assert read_metadata(tmp_path / "best.safetensors")["epoch"] == 1
    assert (tmp_path / "checkpoint-1.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2.safetensors").exists()
