"""validate.py as a user runs it."""

import csv
import importlib.util
import json
import os
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from preloaded import programs
from torch import nn

from qna_timm.training import measure, validation
from qna_timm.training.data.digits import CLASS_NAMES, Digits
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_validate_args
from qna_timm.training.kernels import choose_kernels
from qna_timm.training.storage.checkpoint import save_weights

ROOT = Path(__file__).resolve().parents[2]
DATA_CONFIG = {
    "input_size": [3, 32, 32],
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "crop_pct": 1.0,
    "crop_mode": "center",
}
METADATA = {
    "arch": "test_vit",
    "num_classes": 10,
    "in_chans": 3,
    "model_kwargs": {"img_size": [32, 32]},
    "img_size": [32, 32],
    "data_config": DATA_CONFIG,
    "class_names": list(CLASS_NAMES),
    "dataset": {"dataset": "sklearn/digits", "data_dir": None, "val_split": "validation"},
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("validate", ROOT / "validate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(num_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=num_classes, img_size=32)
    # A fresh head is so near zero that top-1 would hang on rounding.
    nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@pytest.fixture
def run_folder(tmp_path: Path, model: nn.Module) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    save_weights(folder / "best.safetensors", model, METADATA)
    return folder


@pytest.fixture(scope="module")
def logits(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [359, 10] and labels of the validation digits, by Pillow and arithmetic alone."""
    digits = Digits(is_validation=True)
    images = [
        np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
        for image, _ in digits
    ]
    inputs = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        return model(inputs), torch.tensor(digits.labels)


def result(capsys: pytest.CaptureFixture) -> Any:
    """What the script printed after timm's mark."""
    return json.loads(capsys.readouterr().out.split("--result\n")[1])


COMMON = ["--device", "cpu", "-j", "0"]


def test_a_run_folder_alone_is_enough(
    script: ModuleType,
    run_folder: Path,
    logits: tuple[torch.Tensor, torch.Tensor],
    capsys: pytest.CaptureFixture,
) -> None:
    assert script.main([*COMMON, "--checkpoint", str(run_folder)]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out.split("--result\n")[1])
    assert "no data named: using the checkpoint's, sklearn/digits" in output.err
    scores, labels = logits
    right = scores.argsort(descending=True)[:, :5] == labels[:, None]
    assert found["top1"] == pytest.approx(100 * right[:, 0].double().mean().item(), abs=1e-3)
    assert found["top5"] == pytest.approx(100 * right.any(1).double().mean().item(), abs=1e-3)
    loss = nn.functional.cross_entropy(scores, labels).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    for name in ("top1", "top5"):
        assert found[f"{name}_err"] == pytest.approx(100 - found[name])
    assert found["images"] == 359
    assert found["img_size"] == 32
    parameters = sum(p.numel() for p in make_model().parameters())
    assert found["param_count"] == round(parameters / 1e6, 2)
    assert found["img_per_s"] > 0
    assert found["weights"] == str(run_folder / "best.safetensors")


def test_what_a_checkpoint_says_of_images(run_folder: Path, model: nn.Module) -> None:
    """Everything that was not said on the command line."""
    said = {"interpolation": "nearest", "crop_mode": "border", "crop_pct": 0.8}
    data = {**METADATA["dataset"], "input_img_mode": "L", "val_num_samples": 20}
    metadata = {**METADATA, "data_config": {**DATA_CONFIG, **said}, "dataset": data}
    save_weights(run_folder / "best.safetensors", model, metadata)
    args = parse_validate_args(["--checkpoint", str(run_folder), "--device", "cpu"])
    settings, found = validation.settings_for(args, *validation.list_candidates(args))
    assert (settings.num_samples, settings.input_img_mode) == (20, "L")
    config = validation.data_config_for(settings, model, found)
    assert {key: config[key] for key in said} == said
    given = ["--interpolation", "bilinear", "--crop-pct", "0.5", "--num-samples", "5"]
    args = parse_validate_args(["--checkpoint", str(run_folder), "--device", "cpu", *given])
    settings, found = validation.settings_for(args, *validation.list_candidates(args))
    config = validation.data_config_for(settings, model, found)
    assert (config["interpolation"], config["crop_pct"], settings.num_samples) == (
        "bilinear",
        0.5,
        5,
    )


def test_size_for_evaluation() -> None:
    """timm's cfgs may have another than for training, unless that is asked for."""
    model = timm.create_model("convnext_tiny", device="meta")
    sizes = []
    for more in ([], ["--use-train-size"]):
        args = parse_validate_args(
            ["--model", "convnext_tiny", "--dataset", "sklearn/digits", *more]
        )
        sizes.append(validation.data_config_for(args, model, {})["input_size"][1])
    assert sizes == [288, 224]


def test_precision_is_mixed(
    script: ModuleType, run_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [*COMMON, "--checkpoint", str(run_folder), "--num-samples", "32"]
    losses = []
    for more in ([], ["--amp", "--amp-dtype", "bfloat16"]):
        script.main([*argv, *more])
        losses.append(result(capsys)["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


def test_averaged_weights_that_are_not_there_are_told(
    script: ModuleType, run_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    script.main([*COMMON, "--checkpoint", str(run_folder), "--use-ema", "--num-samples", "8"])
    assert "--use-ema: there are no averaged weights beside" in capsys.readouterr().err


def test_reparameterized(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse_validate_args(
        ["--model", "fastvit_t8", "--dataset", "sklearn/digits", "--reparam"]
    )
    monkeypatch.setattr(validation, "_has_published_weights", lambda name: False)
    args.num_classes = 3
    model, _ = validation.build_candidate(args, {})
    assert not any(name.endswith("conv_scale") for name, _ in model.named_modules())


def test_tables_and_picture(
    script: ModuleType,
    run_folder: Path,
    tmp_path: Path,
    logits: tuple[torch.Tensor, torch.Tensor],
    capsys: pytest.CaptureFixture,
) -> None:
    flags = ["--checkpoint", str(run_folder), "--metrics-avg", "macro"]
    table, picture, rows = (tmp_path / "new" / name for name in ("t.csv", "m.png", "r.csv"))
    files = [f"--per-class={table}", f"--confusion-matrix={picture}", f"--results-file={rows}"]
    script.main([*COMMON, *flags, *files])
    found = result(capsys)
    scores, labels = logits
    for row in csv.DictReader(table.open()):
        mine = labels == int(row["label"])
        assert int(row["images"]) == mine.sum()
        share = 100 * (scores.argmax(1)[mine] == int(row["label"])).double().mean().item()
        assert float(row["top1"]) == pytest.approx(share, abs=0.01)
    saved = list(csv.DictReader(rows.open()))
    assert len(saved) == 1
    assert float(saved[0]["macro_f1_score"]) == found["macro_f1_score"]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    script.main([*COMMON, *flags, "--per-class", "--results-file", str(tmp_path / "r.json")])
    assert "precision" in capsys.readouterr().out.splitlines()[0]
    assert json.loads((tmp_path / "r.json").read_text())["top1"] == found["top1"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_folder_of_checkpoints_best_first(
    script: ModuleType, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(dict.fromkeys("ab", 1), run_folder.parent / "broken.pth")
    shuffled = make_model()
    with torch.no_grad():
        shuffled.head.bias[3] += 100  # always answers three
    save_weights(run_folder.parent / "a-three.safetensors", shuffled, METADATA)
    file = tmp_path / "rows.csv"
    code = script.main([*COMMON, "--checkpoint", str(tmp_path), "--results-file", str(file)])
    output = capsys.readouterr()
    rows = json.loads(output.out.split("--result\n")[1])
    assert code == 1
    assert "broken.pth" in output.err
    assert len(rows) == len(list(csv.DictReader(file.open()))) == 2
    assert rows[0]["top1"] >= rows[1]["top1"]
    three = next(row for row in rows if row["weights"].endswith("a-three.safetensors"))
    assert three["top1"] == pytest.approx(100 * 37 / 359, abs=1e-3)  # the threes among the digits


def test_several_models_by_pattern_and_precision(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("qna_timm.training.validation._has_published_weights", lambda name: False)
    flags = ["--dataset", "sklearn/digits", "--num-classes", "10", "--num-samples", "20"]
    script.main([*COMMON, *flags, "--model", "test_resne?,test_vit", "--img-size", "32"])
    rows = result(capsys)
    assert {row["model"] for row in rows} == {"test_resnet", "test_vit"}
    assert all(row["weights"] == "random" and row["images"] == 20 for row in rows)
    more = ["--channels-last", "--amp", "--amp-dtype", "bfloat16", "--in-chans", "1"]
    script.main([*COMMON, *flags, *more, "--model", "test_resnet", "--img-size", "32"])
    assert result(capsys)["images"] == 20


def test_folder_labels_follow_the_checkpoint(
    script: ModuleType, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A folder with some of the classes, whose own numbering would be another."""
    digits, kept = Digits(is_validation=True), 0
    for index, (image, label) in enumerate(digits):
        if label in (3, 8):
            (tmp_path / "data" / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "data" / str(label) / f"{index}.png")
            kept += 1
    script.main([*COMMON, "--checkpoint", str(run_folder), "--per-class", str(tmp_path / "1.csv")])
    whole = {row["label"]: row for row in csv.DictReader((tmp_path / "1.csv").open())}
    flags = ["--data-dir", str(tmp_path / "data"), "--per-class", str(tmp_path / "2.csv")]
    script.main([*COMMON, "--checkpoint", str(run_folder), *flags])
    assert json.loads(capsys.readouterr().out.split("--result\n")[2])["images"] == kept
    part = {row["label"]: row for row in csv.DictReader((tmp_path / "2.csv").open())}
    for label in ("3", "8"):
        assert part[label]["top1"] == whole[label]["top1"]
        assert part[label]["images"] == whole[label]["images"]


def test_valid_labels_count_positions_in_the_file(
    script: ModuleType,
    run_folder: Path,
    tmp_path: Path,
    logits: tuple[torch.Tensor, torch.Tensor],
    capsys: pytest.CaptureFixture,
) -> None:
    for index, (image, label) in enumerate(Digits(is_validation=True)):
        if label in (3, 8):
            (tmp_path / "data" / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "data" / str(label) / f"{index}.png")
    (tmp_path / "labels.txt").write_text("3\n8\n")
    flags = ["--data-dir", str(tmp_path / "data"), "--valid-labels", str(tmp_path / "labels.txt")]
    script.main([*COMMON, "--checkpoint", str(run_folder), *flags])
    scores, labels = logits
    kept = (labels == 3) | (labels == 8)
    right = (scores[kept][:, 8] > scores[kept][:, 3]) == (labels[kept] == 8)
    top1 = 100 * right.double().mean().item()
    assert result(capsys)["top1"] == pytest.approx(top1, abs=1e-3)


def test_other_size_and_test_time_pooling(
    script: ModuleType, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    script.main([*COMMON, "--checkpoint", str(run_folder), "--img-size", "64"])
    assert result(capsys)["img_size"] == 64
    resnet = timm.create_model("test_resnet", num_classes=10)
    save_weights(tmp_path / "r.safetensors", resnet, {**METADATA, "arch": "test_resnet",
                 "model_kwargs": {}, "data_config": {**DATA_CONFIG, "crop_pct": 0.9}})  # fmt: skip
    flags = ["--checkpoint", str(tmp_path / "r.safetensors"), "--num-samples", "8"]
    script.main([*COMMON, *flags, "--img-size", "192", "--test-pool"])
    assert result(capsys)["crop_pct"] == 1.0


def test_pooling_knows_the_size_of_training(caplog: pytest.LogCaptureFixture) -> None:
    """A run's, not that of timm's weights: 160 of test_resnet, with maps of 5 x 5."""

    def pooled(trained: int, size: int) -> nn.Module:
        model = timm.create_model("test_resnet", num_classes=10)
        config = {"input_size": (3, size, size), "crop_pct": 0.9}
        return validation.apply_test_pool(model, config, {"img_size": [trained, trained]})

    assert pooled(32, 64).original_pool == (1, 1)
    assert pooled(96, 128).original_pool == (3, 3)
    assert not hasattr(pooled(320, 192), "original_pool")
    assert "images of 192 x 192 are no larger than those of training, 320 x 320" in caplog.text


def test_smaller_batches_when_memory_runs_out(
    script: ModuleType,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    tried = []
    measure = script.measure

    def out_of_memory(settings: Any, *rest: Any) -> dict[str, Any]:
        tried.append(settings.batch_size)
        if settings.batch_size > 128:
            raise RuntimeError("CUDA out of memory.\nTried to allocate")
        return measure(settings, *rest)

    monkeypatch.setattr(script, "measure", out_of_memory)
    script.main([*COMMON, "--checkpoint", str(run_folder), "--retry"])
    assert tried == [256, 192, 128]
    assert result(capsys)["images"] == 359
    with pytest.raises(RuntimeError, match="out of memory"):
        script.main([*COMMON, "--checkpoint", str(run_folder)])


def test_what_was_begun_before_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU still computes what came before when Python looks at the clock."""
    order: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: order.append(device.type))
    monkeypatch.setattr(time, "perf_counter", lambda: order.append("clock") or 1.0)
    assert measure._seconds(torch.device("cuda")) == measure._seconds(torch.device("cpu")) == 1
    assert order == ["cuda", "clock", "clock"]


def test_kernels_are_those_of_training(
    script: ModuleType, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[torch.device, bool]] = []

    def keep(device: torch.device, full_float32: bool) -> None:
        chosen.append((device, full_float32))

    monkeypatch.setattr(measure, "choose_kernels", keep)
    for flags in ([], ["--torchscript"]):  # in whose graphs nothing switches TF32 off
        argv = ["--checkpoint", str(run_folder), "--device", "cpu", *flags]
        assert script.main(argv) == 0
    assert chosen == [(torch.device("cpu"), False), (torch.device("cpu"), True)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, chosen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    choose_kernels(torch.device(device))
    assert (cudnn.benchmark, chosen) == ((True, ["high"]) if device == "cuda" else (False, []))
    choose_kernels(torch.device(device), full_float32=True)
    assert chosen[1:] == (["highest"] if device == "cuda" else [])


class TestMistakes:
    def fails(self, script: ModuleType, *argv: str) -> str:
        with pytest.raises(UsageError) as caught:
            script.main([*COMMON, *argv])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_no_data(self, script: ModuleType, model: nn.Module, tmp_path: Path) -> None:
        metadata = {key: METADATA[key] for key in METADATA if key != "dataset"}
        save_weights(tmp_path / "w.safetensors", model, metadata)
        line = self.fails(script, "--checkpoint", str(tmp_path / "w.safetensors"))
        assert "--data-dir" in line

    def test_no_architecture(self, script: ModuleType, model: nn.Module, tmp_path: Path) -> None:
        save_weights(tmp_path / "w.safetensors", model, {})
        line = self.fails(script, "--checkpoint", str(tmp_path / "w.safetensors"))
        assert "name it by --model" in line

    def test_other_numbers_of_classes(
        self, script: ModuleType, tmp_path: Path, run_folder: Path
    ) -> None:
        flags = ["--dataset", "sklearn/digits", "--model", "test_vit", "--img-size", "32"]
        for count, said in ((5, "10 classes, but the model has 5"), (20, "--class-map")):
            torch.save(make_model(count).state_dict(), tmp_path / "w.pth")
            weights = ["--checkpoint", str(tmp_path / "w.pth")]
            assert f"{count} classes" in self.fails(script, *flags, *weights)
            metadata = {**METADATA, "num_classes": count, "class_names": None}
            save_weights(tmp_path / "w.safetensors", make_model(count), metadata)
            weights = ["--checkpoint", str(tmp_path / "w.safetensors")]
            assert said in self.fails(script, *weights)
        line = self.fails(script, "--checkpoint", str(run_folder), "--num-classes", "5")
        assert "10 classes, the model 5" in line
        line = self.fails(script, *flags[:2], "--model", "qna_vit_tiny", "--pretrained")
        assert "No pretrained weights exist for qna_vit_tiny (--checkpoint FILE" in line
        line = self.fails(script, *flags, "--model-kwargs", "depht=2")
        assert "--model-kwargs depht: VisionTransformer has no such argument" in line
        line = self.fails(script, *flags, "--pretrained", "--num-classes", "10")
        assert "published weights of test_vit have 1000 classes" in line

    def test_class_that_the_checkpoint_lacks(
        self, script: ModuleType, run_folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "data" / "eel").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "eel" / "1.png")
        flags = ["--checkpoint", str(run_folder), "--data-dir", str(tmp_path / "data")]
        assert "the class 'eel', which is not among the 10" in self.fails(script, *flags)

    def test_files_and_flags(self, script: ModuleType, run_folder: Path, tmp_path: Path) -> None:
        weights = ["--checkpoint", str(run_folder)]
        (tmp_path / "labels.txt").write_text("0\n99\n")
        (tmp_path / "empty").mkdir()
        line = self.fails(script, *weights, "--valid-labels", str(tmp_path / "labels.txt"))
        assert "0 to 9" in line
        assert "'99'" in line
        (tmp_path / "labels.txt").write_text("")
        assert "found none" in self.fails(
            script, *weights, "--valid-labels", str(tmp_path / "labels.txt")
        )
        (tmp_path / "labels.txt").write_bytes(b"\xff\xfe")
        line = self.fails(script, *weights, "--valid-labels", str(tmp_path / "labels.txt"))
        assert "found no text" in line
        line = self.fails(script, "--checkpoint", str(tmp_path / "empty"))
        assert "no checkpoint and no run folder" in line
        line = self.fails(script, *weights, "--model", "test_vit,test_resnet")
        assert "--checkpoint fits one" in line
        line = self.fails(script, *weights, "--model", "test_resnet")
        assert "not a checkpoint of test_resnet but of test_vit" in line
        line = self.fails(script, *weights, "--results-file", str(tmp_path))
        assert "is a folder" in line
        (tmp_path / "file").touch()
        for flag in ("--results-file", "--per-class", "--confusion-matrix"):
            line = self.fails(script, *weights, flag, str(tmp_path / "file" / "new" / "x.png"))
            assert f"{flag} {tmp_path}/file/new/x.png: {tmp_path}/file is a file" in line
        line = self.fails(script, *weights, "--in-chans", "1")
        assert "\n" not in line
        models = ["--model", "test_vit,test_resnet", "--dataset", "sklearn/digits"]
        line = self.fails(script, *models, "--num-classes", "10")
        assert "none of 2 could be validated; the first, test_vit: --num-classes 10" in line
        assert not list(tmp_path.rglob("*.csv"))


def test_two_processes_on_the_command_line(
    script: ModuleType, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """torchrun with two gloo ranks prints, once, what one process prints."""
    flags = [*COMMON, "--checkpoint", str(run_folder), "--metrics-avg", "weighted"]
    launch = [str(programs() / "torchrun"), "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(ROOT / "validate.py"), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--result") == 1
    shared = json.loads(done.stdout.split("--result\n")[1])
    script.main(flags)
    alone = result(capsys)
    for key in ("top1", "top5", "loss", "images", "weighted_f1_score"):
        assert shared[key] == pytest.approx(alone[key], rel=1e-6), key
