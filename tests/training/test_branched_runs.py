"""Models with branches in train.py and validate.py: runs, processes, flags, names, classifiers."""

import csv
import importlib.util
import json
import logging
from pathlib import Path
from types import ModuleType

import branched_model  # noqa: F401  (registers its model)
import pytest
import timm
import torch
import yaml
from killing import to_the_end
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from qna_timm.convert import ConversionError
from qna_timm.training import build, names
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import as_yaml_dict, parse_train_args
from qna_timm.training.reporting import curves, report
from qna_timm.training.reporting.progress import epoch_text
from qna_timm.training.storage.checkpoint import (
    check_weights,
    load_weights,
    read_metadata,
    read_weights,
    save_weights,
)
from qna_timm.training.validation import Candidate, settings_for

HERE = Path(__file__).resolve().parent

ROOT = HERE.parents[1]
METRICS = ["branch_0_top1", "branch_1_top1", "branch_2_top1", "agreement"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def validate() -> ModuleType:
    return script("validate")


def digits(output: Path, *argv: str) -> list[str]:
    """A run of seconds; later flags go before these."""
    words = "--dataset sklearn/digits --model test_branched --img-size 32 -b 16 -j 0 --device cpu"
    words += " --opt adamw --lr 1e-2 --warmup-epochs 1 --epochs 2 --max-steps 3"
    words += " --val-num-samples 64 --log-interval 1 --ga-lam -0.8"
    return [*words.split(), "--output", str(output), *argv]


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_branches_are_measured_everywhere(
    train: ModuleType,
    validate: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    argv = digits(tmp_path, "--experiment", "a", "--model-ema", "--model-ema-decay", "0.5")
    assert train.main([*argv, "--log-tensorboard"]) == 0
    folder = tmp_path / "a"
    (_, row) = summary(folder)
    losses = {name: float(row[f"train_{name}"]) for name in ("loss", "loss_class")}
    decorrelation = float(row["train_loss_decorrelation"])
    assert decorrelation < 0
    assert losses["loss"] == pytest.approx(losses["loss_class"] + decorrelation, rel=1e-5)
    for ending in ("", "_ema"):
        assert all(0 <= float(row[f"eval_{name}{ending}"]) <= 100 for name in METRICS)
    log = (folder / "train.log").read_text()
    assert f"branches_top1 {float(row['eval_branch_0_top1']):.4g} " in log
    assert f"agreement {float(row['eval_agreement']):.4g}," in log
    (events,) = (folder / "tensorboard").iterdir()
    for tag in (b"eval/agreement", b"eval/branch_2_top1", b"train/loss_decorrelation"):
        assert tag in events.read_bytes()

    # the weights are the model's own, and validate.py sees what the run saw
    model = timm.create_model("test_branched", num_classes=10)
    load_weights(model, folder)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    capsys.readouterr()
    last = ["--checkpoint", str(folder / "last.safetensors"), "--num-samples", "64"]
    results = []
    for flags in ([], ["--branches"]):
        assert validate.main([*last, *flags, "--device", "cpu", "-j", "0"]) == 0
        results.append(json.loads(capsys.readouterr().out.split("--result")[1]))
    plain, branched = results
    assert [name for name in branched if name not in plain] == METRICS
    for name in ("top1", *METRICS):
        assert branched[name] == pytest.approx(float(row[f"eval_{name}"]), abs=1e-3)
    assert branched["top1"] == plain["top1"] and branched["loss"] == plain["loss"]


FLAGS = {
    "mixed": "--mixup 0.2 --cutmix 1 --bce-loss --smoothing 0.1 --grad-accumulation 2",
    "jsd": "--aug-splits 2 --loss jsd",
    "float16": "--amp --clip-grad 1 --channels-last",
    "bfloat16": "--amp --amp-dtype bfloat16 --grad-checkpointing --model-ema",
    "weights": "--model-dtype bfloat16",
    "compile": "--torchcompile eager --model-ema --epochs 1",
    "views": "--tta 2",
    "agc": "--clip-grad 0.01 --clip-mode agc --opt lamb",
    "head": "--head-init-scale 0 --head-init-bias 1 --lr 0 --sched none",
    "one": "--model-kwargs num_branches=1",
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_go_with_branches(train: ModuleType, tmp_path: Path, name: str) -> None:
    argv = digits(tmp_path, "--max-steps", "2", "--experiment", name, *FLAGS[name].split())
    assert train.main(argv) == 0
    row = summary(tmp_path / name)[-1]
    assert float(row["train_loss"]) > 0
    weights, _ = read_weights(tmp_path / name)
    assert all(value.isfinite().all() for value in weights.values())
    if name == "head":
        assert not weights["fc.weight"].any() and (weights["fc.bias"] == 1).all()
    assert ("eval_agreement" in row) == (name != "one")
    if "ema" in FLAGS[name]:
        assert float(row["eval_agreement_ema"]) >= 0


def test_resumed_run_equals_the_straight_one(train: ModuleType, tmp_path: Path) -> None:
    argv = digits(tmp_path, "--mixup", "0.2", "--model-ema", "--model-ema-warmup")
    train.main([*argv, "--experiment", "straight"])
    train.main([*argv, "--experiment", "stopped", "--stop-epoch", "1"])
    train.main(["--resume", str(tmp_path / "stopped"), "--stop-epoch", "2"])
    texts = [(tmp_path / name / "summary.csv").read_text() for name in ("straight", "stopped")]
    assert texts[0] == texts[1]


def test_two_processes_train_like_one(train: ModuleType, tmp_path: Path) -> None:
    """Same global batch, no batch norm: equal up to the order of float32 sums."""
    shared = ["--no-aug", "--grad-accumulation", "2", "--epochs", "1", "--lr", "1e-3"]
    train.main(digits(tmp_path, *shared, "-b", "16", "--experiment", "one"))
    argv = digits(tmp_path, *shared, "-b", "8", "--experiment", "two")
    to_the_end(train, argv, tmp_path / "log", processes=2)
    (one,), (two,) = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert list(one) == list(two) and "eval_agreement" in one
    for column, value in one.items():
        assert float(two[column]) == pytest.approx(float(value), rel=1e-5), column


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--model test_vit", r"--ga-lam -0.8: test_vit has no branches .*--model ga_test_vit"),
        ("--torchscript", "--torchscript: a scripted test_branched .*--torchcompile works"),
        ("--ga-lam nan", "--ga-lam: expected a number, found 'nan'"),
        ("--backbone-checkpoint no/such.pth", "--backbone-checkpoint: there is no file"),
        ("--backbone-checkpoint no.pth.tar", "--backbone-checkpoint: there is no file"),
        ("--backbone-checkpoint .", r"--backbone-checkpoint: \.: no weights in this folder"),
        ("--backbone-checkpoint test_vitt", "--backbone-checkpoint: unknown model .*'test_vit'"),
        (
            "--backbone-checkpoint test_vit --initial-checkpoint {self}",
            "--initial-checkpoint: loads the whole model, --backbone-checkpoint its trunk",
        ),
        (
            "--backbone-checkpoint {self} --model test_vit --ga-lam 0",
            "--backbone-checkpoint .*: test_vit is a backbone itself; --pretrained-path",
        ),
        ("--model ga_test_vitt", "--model: unknown model 'ga_test_vitt'.*'ga_test_vit'"),
        ("--model ga_convnext_tiy", r"'ga_convnext_tiny'(?!.*ga_ga_)"),
        (
            "--model ga_test_vit --pretrained",
            "--model ga_test_vit: .*--backbone-checkpoint test_vit from its backbone's",
        ),
        (
            "--model ga_test_vit --model-kwargs backbone=test_resnet",
            "--model ga_test_vit: .*another backbone, 'test_resnet'",
        ),
    ],
)
def test_mistakes_are_one_line(train: ModuleType, tmp_path: Path, flags: str, pattern: str) -> None:
    argv = digits(tmp_path / "out", *flags.format(self=__file__).split())
    with pytest.raises(UsageError, match=pattern) as caught:
        train.main(argv)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_weight_for_a_model_without_branches(train: ModuleType, tmp_path: Path) -> None:
    """args.yaml of any run names every key."""
    flags = ["--model", "test_vit", "--GA_lam", "0", "--experiment", "a", "--epochs", "1"]
    assert train.main(digits(tmp_path, *flags)) == 0
    assert "eval_agreement" not in summary(tmp_path / "a")[0]


def test_authors_spellings(tmp_path: Path) -> None:
    base = ["--dataset", "sklearn/digits", "--model", "test_branched", "--device", "cpu"]
    for name in ("--ga-lam", "--ga_lam", "--GA_lam", "--GA-lam"):
        assert parse_train_args([*base, name, "-0.8"]).ga_lam == -0.8
        assert parse_train_args([*base, f"{name}=-8e-1"]).ga_lam == -0.8
    recipe = tmp_path / "r.yaml"
    recipe.write_text("GA_lam: -0.4\ngrad-accumulation: 4\n")
    args = parse_train_args([*base, "--config", str(recipe)])
    assert (args.ga_lam, args.grad_accum_steps) == (-0.4, 4)


AUTHORS = (
    "-b 128 --grad-accumulation 4 --smoothing 0.1 --bce-loss --opt lamb --opt-eps 1e-8"
    " --momentum 0.8 --weight-decay 0.05 --sched cosine --epochs 300 --lr {lr} --warmup-lr 1e-6"
    " --sched cosine -j 8 --amp --channels-last --model {model} --GA_lam -0.8 --drop-path {drop}"
)


@pytest.mark.parametrize(
    ("model", "lr", "drop"),
    [
        ("ga_convnext_tiny", "5e-3", ".2"),
        ("ga_convnext_small", "5e-3", ".4"),
        ("ga_convnext_base", "5e-3", ".5"),
        ("ga_CSWin_64_12211_tiny_224", "2e-3", ".2"),
        ("ga_CSWin_64_24322_small_224", "2e-3", ".4"),
    ],
)
def test_authors_commands_are_read(tmp_path: Path, model: str, lr: str, drop: str) -> None:
    command = AUTHORS.format(model=model, lr=lr, drop=drop).split()
    args = parse_train_args([str(tmp_path), *command])
    assert (args.model, args.lr, args.drop_path) == (model, float(lr), float(drop))
    assert (args.data_dir, args.ga_lam, args.grad_accum_steps) == (str(tmp_path), -0.8, 4)
    assert args.bce_loss and args.amp and args.channels_last and args.opt_eps == 1e-8


def test_authors_command_trains(train: ModuleType, tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture = Image.new("RGB", (40, 36), (80 * label, 10 * index, 0))
                picture.save(folder / f"{index}.png")
    command = AUTHORS.format(model="test_branched", lr="5e-3", drop=".2").split()
    small = "--device cpu -b 4 -j 0 --stop-epoch 1 --epochs 5 --amp-dtype bfloat16 --experiment a"
    argv = [str(tmp_path / "data"), *command, *small.split(), "--output", str(tmp_path / "out")]
    assert train.main(argv) == 0
    (row,) = summary(tmp_path / "out" / "a")
    assert float(row["train_loss_decorrelation"]) < 0 and row["eval_agreement"]


def test_backbone_is_loaded_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = timm.create_model("test_branched", num_classes=10)
    model.load_backbone = lambda source: "150 tensors loaded"
    caplog.set_level(logging.INFO)
    build.load_backbone(model, "resnet50.a1_in1k")
    assert caplog.messages == ["backbone resnet50.a1_in1k: 150 tensors loaded"]

    def fails(source: str) -> str:
        raise ConversionError(f"{source}: no tensor fits")

    model.load_backbone = fails
    with pytest.raises(UsageError, match=r"^--backbone-checkpoint x\.pth: no tensor fits$"):
        build.load_backbone(model, "x.pth")


def test_a_run_is_a_backbone_file_too(
    train: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plain = "--model test_vit --img-size 160 --ga-lam 0 --epochs 1 --max-steps 1 --experiment a"
    assert train.main(digits(tmp_path, *plain.split())) == 0
    model = timm.create_model("ga_backbone", backbone="test_vit", num_classes=10)
    build.load_backbone(model, str(tmp_path / "a"))
    assert f"backbone {tmp_path / 'a' / 'best.safetensors'}: " in caplog.messages[-1]
    weights, _ = read_weights(tmp_path / "a")
    assert torch.equal(model.trunk.cls_token, weights["cls_token"])


def test_trunk_weights_are_no_argument_of_the_checkpoint() -> None:
    """Else whoever builds the model of the checkpoint downloads them, to overwrite them."""
    model = timm.create_model("ga_backbone", backbone="test_vit", num_classes=10)
    model._model_args["backbone_pretrained"] = True
    args = parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu"])
    config = build.input_config(args, model)
    metadata = build.describe(args, model, config, None)
    assert metadata["model_kwargs"]["backbone"] == "test_vit"
    assert "backbone_pretrained" not in metadata["model_kwargs"]


def test_ga_name_means_heads_on_a_backbone(tmp_path: Path) -> None:
    argv = ["--dataset", "sklearn/digits", "--device", "cpu", "--model", "ga_test_vit.r160_in1k"]
    args = parse_train_args([*argv, "--model-kwargs", "num_branches=3"])
    assert args.model == "ga_backbone"
    assert args.model_kwargs == {"backbone": "test_vit.r160_in1k", "num_branches": 3}
    report.write_args(tmp_path, as_yaml_dict(args))
    saved = yaml.safe_load((tmp_path / "args.yaml").read_text())
    assert (saved["model"], saved["model_kwargs"]) == (args.model, args.model_kwargs)
    assert names.model_label(args.model, args.model_kwargs) == "ga_test_vit.r160_in1k"
    folder, _ = report.plan_run(args, (32, 32), False)
    assert folder.name.split("-")[2].startswith("ga_test_vit")
    for name in ("test_vit", "qna_vit_tiny", "hf-hub:ga_test_vit"):
        assert names.resolve_model(name, {"depth": 1}) == (name, {"depth": 1})


def test_ga_name_and_its_checkpoint(tmp_path: Path) -> None:
    """The name stands for what the checkpoint describes, unless it is another backbone's."""
    metadata = {
        "arch": "ga_backbone",
        "num_classes": 10,
        "model_kwargs": {"backbone": "test_vit", "num_branches": 3},
        "dataset": {"dataset": "sklearn/digits"},
    }
    path = tmp_path / "best.safetensors"
    save_weights(path, nn.Linear(1, 1), metadata)
    args = script("validate").parse_validate_args(["--checkpoint", str(path), "--device", "cpu"])
    for name, expected in (
        (None, metadata["model_kwargs"]),
        ("ga_test_vit", metadata["model_kwargs"]),
        ("ga_test_resnet", {"backbone": "test_resnet"}),
    ):
        settings, _ = settings_for(args, Candidate(name, str(path)))
        assert (settings.model, settings.model_kwargs) == ("ga_backbone", expected)
        assert settings.num_classes == (None if name == "ga_test_resnet" else 10)


def weights_of(path: Path, num_classes: int, **kwargs: int) -> Path:
    torch.manual_seed(1)
    model = timm.create_model("test_branched", num_classes=num_classes, **kwargs)
    save_weights(path, model, {"arch": "test_branched", "num_classes": num_classes})
    return path


def test_other_classes_leave_a_fresh_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = weights_of(tmp_path / "weights.safetensors", 12)
    weights, metadata = read_weights(path)
    for load in (build.load_initial, build.load_as_pretrained):
        model = timm.create_model("test_branched", num_classes=10)
        own = model.fc.weight.clone()
        caplog.clear()
        load(model, str(path))
        assert torch.equal(model.stem[0].weight, weights["stem.0.weight"])
        assert torch.equal(model.fc.weight, own)
        assert "has 12 classes, the model 10: its classifier (fc) is fresh" in caplog.text
    with pytest.raises(UsageError, match=r"has 12 classes, the model 10 \(--num-classes 12 fits\)"):
        check_weights(model, weights, metadata, path)
    same = timm.create_model("test_branched", num_classes=12)
    build.load_as_pretrained(same, str(path))
    assert torch.equal(same.fc.weight, weights["fc.weight"])


def test_other_branches_are_not_other_classes(tmp_path: Path) -> None:
    path = weights_of(tmp_path / "weights.safetensors", 10, num_branches=2)
    weights, metadata = read_weights(path)
    model = timm.create_model("test_branched", num_classes=10)
    with pytest.raises(UsageError, match=r"fc\.weight \(2, 10, 16\) not \(3, 10, 16\)"):
        check_weights(model, weights, metadata, path)


def test_fine_tuning_to_other_classes(train: ModuleType, tmp_path: Path) -> None:
    path = weights_of(tmp_path / "weights.safetensors", 12)
    argv = ["--initial-checkpoint", str(path), "--experiment", "a", "--epochs", "1"]
    assert train.main(digits(tmp_path, *argv)) == 0
    assert read_metadata(tmp_path / "a")["num_classes"] == 10


def test_branches_of_a_model_without(validate: ModuleType, tmp_path: Path) -> None:
    argv = ["--dataset", "sklearn/digits", "--device", "cpu", "-j", "0", "--branches"]
    with pytest.raises(UsageError, match="--branches: qna_vit_tiny has one classifier"):
        validate.main([*argv, "--model", "qna_vit_tiny", "--num-classes", "10"])
    with pytest.raises(UsageError, match=r"--branches: .*not with --real-labels"):
        validate.main([*argv, "--real-labels", __file__])
    branched = ["--model", "test_branched", "--num-classes", "10", "--img-size", "64"]
    with pytest.raises(UsageError, match="--test-pool is for average pooling"):
        validate.main([*argv, *branched, "--test-pool"])


def test_what_cannot_be_scripted(validate: ModuleType) -> None:
    argv = "--dataset sklearn/digits --num-classes 10 --num-samples 8 --model ga_test_resnet"
    words = [*argv.split(), "--device", "cpu", "-j", "0", "--torchscript"]
    with pytest.raises(UsageError, match="--torchscript: ga_test_resnet cannot be scripted") as no:
        validate.main(words)
    assert "\n" not in str(no.value)


def test_results_of_different_numbers_of_branches(validate: ModuleType, tmp_path: Path) -> None:
    for count in (2, 3):
        metadata = {
            "arch": "test_branched",
            "num_classes": 10,
            "model_kwargs": {"num_branches": count},
        }
        model = timm.create_model("test_branched", num_classes=10, num_branches=count)
        save_weights(tmp_path / f"{count}.safetensors", model, metadata)
    table = tmp_path / "results.csv"
    words = "--dataset sklearn/digits --device cpu -j 0 --img-size 32 --branches"
    argv = [*words.split(), "--checkpoint", str(tmp_path), "--results-file", str(table)]
    assert validate.main(argv) == 0
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(bool(row["branch_2_top1"]) for row in rows) == [False, True]
    assert all(row["agreement"] and row["branch_1_top1"] for row in rows)


def test_curves_of_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = {"loss": 1.0, "top1": 50.0, "branch_0_top1": 45.0, "branch_1_top1": 49.0}
    rows = [
        report.summary_row(epoch, {"loss": total, "loss_class": total + 0.1 + 0.1 * epoch,
                                   "loss_decorrelation": -0.1 - 0.1 * epoch}, metrics, 0.1)
        for epoch, total, metrics in ((0, 2.0, {}), (1, 1.5, {**evaluated, "agreement": 80.0}))
    ]  # fmt: skip
    figures: list[Figure] = []
    monkeypatch.setattr(curves, "write_png", lambda figure, path: figures.append(figure))
    curves.draw_curves(rows, tmp_path / "curves.png", "title")
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles[3:] == ["Agreement of branches (%)", "Decorrelation part of the loss"]
    (line,) = figures[0].axes[4].lines
    assert list(line.get_ydata()) == [-0.1, -0.2]
    training, validation = figures[0].axes[0].lines
    assert training.get_label() == "training, mean of 2 branches"
    assert list(training.get_ydata()) == pytest.approx([1.05, 0.85])
    assert list(validation.get_ydata()) == [1.0]


def test_epoch_line_tells_training_from_validation() -> None:
    train = {"loss": 2.3, "loss_class": 2.4, "loss_decorrelation": -0.1}
    evaluated = {"loss": 1.0, "top1": 50.0, "branch_0_top1": 45.0, "branch_1_top1": 49.0}
    assert epoch_text(train, evaluated, 2) == (
        "training loss 2.3, per branch 1.2, val loss 1, val top1 50, val branches_top1 45 49"
    )
    assert epoch_text({"loss": 2.3}, {}) == "training loss 2.3"
