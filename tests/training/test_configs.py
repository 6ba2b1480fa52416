"""Recipes: complete, the papers', and running."""

import functools
import re
import shlex
import shutil

import pytest
import timm
import torch
import yaml
from recipe_files import (
    ABLATIONS,
    FINETUNE,
    GRAMIAN,
    PAPER_TOP1,
    QNA,
    RECIPES,
    ROOT,
    SPAN,
    header,
    settings_of,
)
from torch.utils.flop_counter import FlopCounterMode

import qna_timm  # noqa: F401  (registers its models)
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.optim import create_optimizer, create_schedule, learning_rate

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
PAPERS = [*QNA, *GRAMIAN]
ARXIV = {"qna": "2112.11435", "gramian": "2310.16483"}
PROCESSES = {"qna": 8, "gramian": 2}

WARMUP = {"qna_vit_tiny": 5, "qna_vit_tiny_7x7": 5, "qna_vit_small": 5, "qna_vit_base": 20}
DROP_PATH = {"qna_vit_tiny": 0.05, "qna_vit_tiny_7x7": 0.05, "qna_vit_small": 0.2}

# The five commands of the released README, but for the data folder: model, lr, drop path.
COMMAND = (
    "-b 128 --grad-accumulation 4 --smoothing 0.1 --bce-loss --opt lamb --opt-eps 1e-8 "
    "--momentum 0.8 --weight-decay 0.05 --sched cosine --epochs 300 --lr {} --warmup-lr 1e-6 "
    "--sched cosine -j 8 --amp --channels-last --model {} --GA_lam -0.8 --drop-path {}"
)
RELEASED = {
    "ga_convnext_tiny": ("5e-3", "ga_convnext_tiny", ".2"),
    "ga_convnext_small": ("5e-3", "ga_convnext_small", ".4"),
    "ga_convnext_base": ("5e-3", "ga_convnext_base", ".5"),
    "ga_cswin_tiny": ("2e-3", "ga_CSWin_64_12211_tiny_224", ".2"),
    "ga_cswin_small": ("2e-3", "ga_CSWin_64_24322_small_224", ".4"),
}


def recipe_args(name, tmp_path):
    extra = ["--pretrained-path", str(tmp_path)] if name == FINETUNE else []
    return parse_train_args(["--config", str(RECIPES[name]), "--data-dir", str(tmp_path), *extra])


@functools.cache
def counts(model, branches):
    """Parameters / 1e6 and multiply-adds / 1e9 at 224, without memory for the weights."""
    with torch.device("meta"):
        network = timm.create_model(model, num_branches=branches).eval()
        images = torch.empty(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    parameters = sum(p.numel() for p in network.parameters())
    return parameters / 1e6, counter.get_total_flops() / 2e9


def test_every_row_has_its_recipe():
    assert sorted([*WARMUP, FINETUNE]) == QNA
    ablations = [
        f"ablation_{network}_branches{branches}_lam{size}"
        for network in ("resnet50", "vit_small")
        for branches in (1, 5)
        for size in ("0.4", "0.8", "0")
    ]
    assert sorted([*ablations, *PAPER_TOP1]) == sorted([*GRAMIAN, *WARMUP])


@pytest.mark.parametrize("name", PAPERS)
def test_recipe_opens_with_what_a_reader_needs(name):
    path, settings, text = RECIPES[name], settings_of(name), header(name)
    family = path.parent.name
    for part in (ARXIV[family], "Table row", "Expected top-1", "Hardware", "Deviations"):
        assert part in text
    if name not in ABLATIONS:
        assert f"Expected top-1: {PAPER_TOP1.get(name, 'unknown')} (" in text
    command = re.search(r"torchrun --nproc_per_node=(\d) train.py (?:\\\s+)?--config (\S+)", text)
    assert ROOT / command[2] == path and int(command[1]) == PROCESSES[family]
    batch, accumulation = settings["batch_size"], settings["grad_accum_steps"]
    assert (
        f"{command[1]} processes x {batch} images x {accumulation} accumulation = 1024 per update"
        in text
    )
    assert batch * accumulation * PROCESSES[family] == 1024


@pytest.mark.parametrize("name", [*PAPERS, *SPAN])
def test_recipe_without_data_does_not_learn_digits(name):
    with pytest.raises(Exception, match="--data-dir"):
        parse_train_args(["--config", str(RECIPES[name])], QUICKSTART)


@pytest.mark.parametrize("name", GRAMIAN)
def test_counts_are_as_the_recipe_says(name):
    said = re.search(r"As we count: ([\d.]+) M parameters, ([\d.]+) GMACs", header(name))
    settings = settings_of(name)
    branches = settings.get("model_kwargs", {}).get("num_branches", 5)
    parameters, gmacs = counts(settings["model"], branches)
    assert (f"{parameters:.2f}", f"{gmacs:.2f}") == said.groups()


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
    assert args.drop_path == 0.5
    lr, _ = learning_rate(args, 1024)
    assert lr == pytest.approx(4e-5)
    rates, epochs = schedule_rates(args, updates=3, processes=8)
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
    assert (args.opt, args.opt_kwargs) == ("adamw", {"filter_bias_and_bn": False})
    assert (args.color_jitter, args.aug_repeats, args.drop) == (0, 0, 0)
    assert (args.mixup_mode, args.mixup_off_epoch) == ("batch", 0)
    check_all(args)


def check_all(args):
    """What all recipes on ImageNet have in common."""
    assert (args.mean, args.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (args.eval_metric, args.clip_grad, args.smoothing) == ("top1", None, 0.1)
    assert (args.train_split, args.val_split) == ("train", "validation")


def schedule_rates(args, updates, processes):
    """Learning rate of every update of the run."""
    lr, _ = learning_rate(args, args.batch_size * args.grad_accum_steps * processes)
    optimizer = create_optimizer(args, torch.nn.Linear(2, 2), lr)
    schedule, epochs = create_schedule(args, optimizer, updates)
    rates = []
    for epoch in range(epochs):
        for update in range(updates):
            schedule.step_update(epoch * updates + update)
            rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(epoch + 1)
    return rates, epochs


@pytest.mark.parametrize("name", WARMUP)
def test_schedule_is_the_papers(name, tmp_path):
    updates = 4
    rates, epochs = schedule_rates(recipe_args(name, tmp_path), updates, processes=8)
    assert epochs == 300
    peak = WARMUP[name] * updates
    steps = torch.arange(epochs * updates, dtype=torch.float64)
    up = 2e-3 * steps / peak
    down = 1e-3 * (1 + torch.cos(torch.pi * (steps - peak) / (epochs * updates - peak)))
    expected = torch.where(steps < peak, up, down)
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected)


@pytest.mark.parametrize("name", ["qna_vit_tiny", "qna_vit_small", "qna_vit_base"])
def test_all_but_tables_and_query_weights_decay(name, tmp_path):
    args = recipe_args(name, tmp_path)
    model = timm.create_model(name, num_classes=3, device="meta")
    optimizer = create_optimizer(args, model, 1e-3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups
             for p in group["params"]}  # fmt: skip
    kept = {name for name, p in model.named_parameters() if decay[id(p)] == 0}
    tables = {name for name, _ in model.named_parameters()
              if name.rsplit(".")[-1] in ("query_weight", "rel_pos_bias")}  # fmt: skip
    assert kept == tables and len(kept) > 10
    assert set(decay.values()) == {0, 0.05}


@pytest.mark.parametrize("name", RELEASED)
def test_recipe_does_what_the_released_command_does(name, tmp_path):
    """What the command gives, then the defaults of its train.py where they are not timm's."""
    args = recipe_args(name, tmp_path)
    command = parse_train_args([str(tmp_path), *shlex.split(COMMAND.format(*RELEASED[name]))])
    said = {"loss", "ga_lam", *command.given} - {"data_dir", "model", "momentum"}
    assert len(said) == 17
    assert {key: getattr(args, key) for key in said} == {key: getattr(command, key) for key in said}
    assert (args.model, args.ga_lam, args.loss, args.bce_target_thresh) == (name, -0.8, "bce", None)
    assert (args.aa, args.aug_repeats, args.reprob) == ("rand-m9-mstd0.5-inc1", 3, 0)
    assert (args.mixup, args.cutmix, args.mixup_prob, args.mixup_switch_prob) == (0.2, 1, 1, 0.5)
    assert args.train_interpolation == "random" and not args.model_ema and args.clip_grad is None
    assert args.scale == [0.08, 1.0] and args.ratio == pytest.approx([3 / 4, 4 / 3])
    assert (args.hflip, args.vflip, args.dist_bn, args.sync_bn) == (0.5, 0, "reduce", False)
    crop = 0.9 if "cswin" in name else 0.875
    assert (args.img_size, args.crop_pct, args.interpolation) == (224, crop, "bicubic")
    assert args.amp_dtype == "float16"
    assert (args.color_jitter, args.opt_kwargs) == (0.4, {})
    check_all(args)


# Derived: those of the authors' next heads on ResNet50, and DeiT's.
DERIVED = {
    "ga_resnet50": ("lamb", 0.02, 0.1, "rand-m20-mstd0.5-inc1", 0.1, "bce", 0.95, 1e-6),
    "ga_vit_small": ("adamw", 0.05, 0.1, "rand-m9-mstd0.5-inc1", 0.8, "ce", 0.9, 1e-8),
    "ga_vit_medium": ("adamw", 0.05, 0.1, "rand-m9-mstd0.5-inc1", 0.8, "ce", 0.9, 1e-8),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derived_recipe_is_as_its_head_says(name, tmp_path):
    args = recipe_args(name, tmp_path)
    keys = "opt", "weight_decay", "drop_path", "aa", "mixup", "loss", "crop_pct", "opt_eps"
    assert tuple(getattr(args, key) for key in keys) == DERIVED[name]
    assert (args.cutmix, args.reprob, args.aug_repeats, args.color_jitter) == (1, 0.25, 3, 0.4)
    assert (args.bce_target_thresh, args.opt_kwargs, args.drop) == (None, {}, 0)
    check_all(args)


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("configs/*/digits.yaml")), QUICKSTART])
def test_digits_are_not_mirrored(path):
    args = parse_train_args(["--config", str(path)])
    assert (args.hflip, args.vflip, args.dataset) == (0, 0, "sklearn/digits")


@pytest.mark.parametrize("name", GRAMIAN)
def test_gramian_schedule(name, tmp_path):
    args = recipe_args(name, tmp_path)
    rates, epochs = schedule_rates(args, updates=2, processes=2)
    peak = 1e-3 if "vit" in name else 2e-3 if "cswin" in name else 5e-3
    assert epochs == (100 if name in ABLATIONS else 300)
    t = torch.arange(epochs, dtype=torch.float64).repeat_interleave(2)
    up = 1e-6 + (peak - 1e-6) * t / 3
    down = 1e-6 + (peak - 1e-6) / 2 * (1 + torch.cos(torch.pi * t / epochs))
    expected = torch.where(t < 3, up, down)
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_branches_lambda_and_length_alone(name):
    _, network, branches, size = re.fullmatch(r"(\w+?)_(\w+)_branches(\d)_lam(\S+)", name).groups()
    settings, main = settings_of(name), settings_of(f"ga_{network}")
    assert settings.pop("model_kwargs", {"num_branches": 5}) == {"num_branches": int(branches)}
    assert settings.pop("ga_lam") == -float(size)
    assert settings.pop("epochs") == 100
    assert settings == {key: value for key, value in main.items() if key in settings}
    assert set(main) - set(settings) == {"ga_lam", "epochs"} and main["ga_lam"] == -0.8


def to_run(path):
    """A recipe, marked where another of its architecture stands for it."""
    name = path.stem
    if name in ABLATIONS:
        stands = name == "ablation_vit_small_branches1_lam0"
    else:
        larger = re.search("_(small|base|medium|large)$|_(medium|large)_", name)
        stands = larger is None or name == "ga_vit_small" or name in QNA
    marks = [] if stands else [pytest.mark.thorough]
    return pytest.param(path, marks=marks, id=name)


@pytest.mark.parametrize("path", [to_run(path) for path in (QUICKSTART, *RECIPES.values())])
def test_recipe_runs(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import train

    argv = ["--config", str(path), "--smoke", "--output", str(tmp_path), "--experiment", "run"]
    argv += ["--model", "qna_vit_tiny"] * (path.stem == FINETUNE)  # of its architecture, at 384 too
    assert train.main(argv) == 0
    assert (tmp_path / "run" / "last.safetensors").is_file()
    rows = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    assert len(rows) == 2
    shutil.rmtree(tmp_path / "run")  # pytest would keep them, a GB each


def test_quickstart_is_what_no_data_gives():
    args = parse_train_args([], QUICKSTART)
    settings = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    assert args.builtin_data
    assert {key: getattr(args, key) for key in settings} == settings
    assert args.hflip == 0, "mirrored digits are other digits, or none"
