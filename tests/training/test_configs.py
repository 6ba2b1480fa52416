"""Recipes: complete, the paper's, and running; and the script that reproduces the table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

import qna_timm  # noqa: F401  (registers its models)
from qna_timm.training.optim import create_optimizer, create_schedule, learning_rate
from qna_timm.training.recipe import parse_train_args

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
RECIPES = sorted((ROOT / "configs" / "qna").glob("*.yaml"))
TABLE_SCRIPT = ROOT / "scripts" / "qna_table.sh"
WARMUP = {"qna_vit_tiny": 5, "qna_vit_tiny_7x7": 5, "qna_vit_small": 5, "qna_vit_base": 20}
DROP_PATH = {"qna_vit_tiny": 0.05, "qna_vit_tiny_7x7": 0.05, "qna_vit_small": 0.2}
PAPER_TOP1 = {
    "qna_vit_tiny": "81.7",
    "qna_vit_tiny_7x7": "82.0",
    "qna_vit_small": "83.2",
    "qna_vit_base": "83.9",
}
FINETUNE = "qna_vit_base_384_finetune"
PROCESSES = 8


def recipe_args(name, tmp_path):
    config = ROOT / "configs" / "qna" / f"{name}.yaml"
    extra = ["--pretrained-path", str(tmp_path)] if name == FINETUNE else []
    return parse_train_args(["--config", str(config), "--data-dir", str(tmp_path), *extra])


def header(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    return "\n".join(line.removeprefix("#") for line in lines[: lines.index("")])


def test_every_row_has_its_recipe():
    assert [path.stem for path in RECIPES] == sorted([*WARMUP, FINETUNE])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_what_a_reader_needs(path):
    text = header(path)
    for part in ("2112.11435", "Table row", "Expected top-1", "Hardware", "Deviations"):
        assert part in text
    assert PAPER_TOP1.get(path.stem, "unknown") in text
    command = re.search(r"torchrun --nproc_per_node=8 train.py --config (\S+)", text)
    assert ROOT / command[1] == path
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    batch, accumulation = settings["batch_size"], settings["grad_accum_steps"]
    assert f"{batch} images x {accumulation} accumulation = 1024 per update" in text
    assert batch * accumulation * PROCESSES == 1024


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_without_data_does_not_learn_digits(path):
    with pytest.raises(Exception, match="--data-dir"):
        parse_train_args(["--config", str(path)], QUICKSTART)


@pytest.mark.parametrize("name", WARMUP)
def test_recipe_is_the_papers(name, tmp_path):
    args = recipe_args(name, tmp_path)
    assert args.model == name
    assert args.drop_path == DROP_PATH.get(name, 0.5) and args.drop == 0
    # the model's own default is the paper's too
    blocks = timm.create_model(name, num_classes=1).stages[-1].modules()
    rates = [block.drop_prob for block in blocks if type(block).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(args.drop_path)
    assert (args.opt, args.opt_eps, args.opt_betas) == ("adamw", 1e-8, [0.9, 0.999])
    assert (args.weight_decay, args.clip_grad, args.layer_decay) == (0.05, None, None)
    assert (args.epochs, args.warmup_epochs) == (300 - WARMUP[name], WARMUP[name])
    assert (args.img_size, args.crop_pct, args.interpolation) == (224, 0.875, "bicubic")
    check_augmentation(args)


def test_finetune_recipe_is_the_released_one(tmp_path):
    args = recipe_args(FINETUNE, tmp_path)
    assert args.model == "qna_vit_base" and args.model_kwargs == {"img_size": 384}
    assert (args.img_size, args.crop_pct, args.weight_decay) == (384, 0.923, 1e-8)
    lr, _ = learning_rate(args, 1024)
    assert lr == pytest.approx(4e-5)
    rates, epochs = schedule_rates(args, updates=3)
    assert epochs == 30 and rates == pytest.approx([4e-5] * 90)
    check_augmentation(args)


def check_augmentation(args):
    assert args.aa == "rand-m9-mstd0.5-n2-p0.5" and args.grayscale_prob == 0.2
    assert (args.mixup, args.cutmix, args.mixup_prob, args.mixup_switch_prob) == (0.8, 1, 1, 0.5)
    assert (args.reprob, args.remode, args.recount) == (0.25, "pixel", 1)
    assert (args.loss, args.smoothing, args.hflip, args.vflip) == ("ce", 0.1, 0.5, 0.0)
    assert args.scale == [0.08, 1.0] and args.ratio == pytest.approx([3 / 4, 4 / 3])
    assert args.train_interpolation == "bicubic" and not args.model_ema
    assert args.amp and args.amp_dtype == "float16"


def schedule_rates(args, updates):
    """Learning rate of every update of the run."""
    lr, _ = learning_rate(args, args.batch_size * args.grad_accum_steps * PROCESSES)
    optimizer = create_optimizer(args, torch.nn.Linear(2, 2), lr)
    schedule, epochs = create_schedule(args, optimizer, updates)
    rates = []
    for update in range(updates * epochs):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates, epochs


@pytest.mark.parametrize("name", WARMUP)
def test_schedule_is_the_papers(name, tmp_path):
    updates = 4
    rates, epochs = schedule_rates(recipe_args(name, tmp_path), updates)
    assert epochs == 300
    peak = WARMUP[name] * updates
    steps = torch.arange(epochs * updates, dtype=torch.float64)
    up = 2e-3 * steps / peak
    down = 1e-3 * (1 + torch.cos(torch.pi * (steps - peak) / (epochs * updates - peak)))
    expected = torch.where(steps < peak, up, down)
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected)


def test_all_but_tables_and_query_weights_decay(tmp_path):
    args = recipe_args("qna_vit_tiny", tmp_path)
    model = timm.create_model("qna_vit_tiny", num_classes=3)
    optimizer = create_optimizer(args, model, 1e-3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups
             for p in group["params"]}  # fmt: skip
    kept = {name for name, p in model.named_parameters() if decay[id(p)] == 0}
    tables = {name for name, _ in model.named_parameters()
              if name.rsplit(".")[-1] in ("query_weight", "rel_pos_bias")}  # fmt: skip
    assert kept == tables and len(kept) > 10
    assert set(decay.values()) == {0, 0.05}


@pytest.mark.parametrize("path", [QUICKSTART, *RECIPES], ids=lambda path: path.stem)
def test_recipe_runs(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import train

    argv = ["--config", str(path), "--smoke", "--output", str(tmp_path), "--experiment", "run"]
    assert train.main(argv) == 0
    assert (tmp_path / "run" / "last.safetensors").is_file()
    rows = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    assert len(rows) == 2


def test_quickstart_is_what_no_data_gives():
    args = parse_train_args([], QUICKSTART)
    settings = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    assert args.builtin_data
    assert {key: getattr(args, key) for key in settings} == settings
    assert args.hflip == 0, "mirrored digits are other digits, or none"


def run_table(*argv, **env):
    return subprocess.run(
        ["bash", str(TABLE_SCRIPT), *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize(
    "argv, fragment",
    [
        ([], "train or eval"),
        (["test"], "'test'"),
        (["train"], "--data-dir"),
        (["train", "--data-dir", "/no/such"], "/no/such"),
        (["train", "--data-dir"], "needs a value"),
        (["train", "--smoke", "--fast"], "'--fast'"),
        (["train", "--smoke", "--nproc", "3"], "'3'"),
        (["train", "--smoke", "--rows", "qna_vit_huge"], "qna_vit_huge"),
        (["eval", "--smoke", "--rows", FINETUNE], FINETUNE),
    ],
)
def test_table_script_refuses(argv, fragment):
    result = run_table(*argv, PYTHON="false")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and fragment in result.stderr


def test_table_script_tells_failed_rows():
    result = run_table("train", "--smoke", "--rows", "qna_vit_tiny", PYTHON="false")
    assert result.returncode == 1
    assert re.search(r"qna_vit_tiny .* 81.7 \| +failed \|", result.stdout)


def test_table_script_tells_missing_weights(tmp_path):
    result = run_table("eval", "--data-dir", tmp_path, "--weights-dir", tmp_path, PYTHON="false")
    assert result.returncode == 0
    assert result.stdout.count("not run") == 4
    for name, top1 in PAPER_TOP1.items():
        assert re.search(rf"\| {name} +\| .* {top1} \| +not run \|", result.stdout)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_table_script_runs_a_row(mode, tmp_path):
    result = run_table(mode, "--smoke", "--rows", "qna_vit_tiny", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"\| qna_vit_tiny +\| .* 81.7 \| +\d+\.\d\d \|", result.stdout)
