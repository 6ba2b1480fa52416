"""The recipes of the adaptive spans: the released commands, for each size and kind of window."""

import json
import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from recipe_files import RECIPES, ROOT, SPAN, header, settings_of
from torch.utils.flop_counter import FlopCounterMode

from qna_timm.layers import SpanAttention
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.optim import create_optimizer, create_schedule, current_lr
from qna_timm.training.span_task import span_layers

SIZES, KINDS = ("small", "medium", "large"), ("cnn", "local", "adaptive")
HOURS = {"small": 3, "medium": 6, "large": 11}
# The three commands of the released README, and what is a default of its script there.
COMMANDS = {
    "adaptive": "--all_attention True --eta_min 0 --warmup_epochs 10 --lr 0.05 --batch-size 50 "
    "--small_version True --cuda True --num-workers 2 --xpid best_adaptive_medium --groups 4 "
    "--attention_kernel 5 --epochs 100 --dataset CIFAR100 --weight-decay 0.0005 "
    "--adaptive_span True --R 2 --span_penalty 0.01",
    "local": "--all_attention True --eta_min 0 --warmup_epochs 10 --lr 0.05 --batch-size 50 "
    "--small_version True --cuda True --num-workers 2 --xpid best_local_medium --groups 4 "
    "--attention_kernel 5 --epochs 100 --dataset CIFAR100 --weight-decay 0.0005",
    "cnn": "--eta_min 0 --warmup_epochs 10 --lr 0.2 --batch-size 50 --small_version True "
    "--cuda True --num-workers 2 --T_max 100 --xpid best_cnn_medium --dataset CIFAR100 "
    "--force_cosine_annealing True --weight-decay 0.0001",
}
DEFAULTS = {"--epochs": "100", "--momentum": "0.9", "--z_init": "0.1", "--print-interval": "100"}
RATES = json.loads((ROOT / "tests" / "data" / "span_lr.json").read_text())


def recipe_args(name: str, folder: Path) -> Namespace:
    argv = ["--config", str(RECIPES[name]), "--data-dir", str(folder), "--dataset-download"]
    return parse_train_args(argv)


def model_of(name: str) -> torch.nn.Module:
    settings = settings_of(name)
    return timm.create_model(settings["model"], num_classes=100, **settings["model_kwargs"])


def count(name: str, radius: int) -> str:
    """Parameters / 1e6 and multiply-adds / 1e9 of one image at 32.

    As PyTorch counts it, which knows the attention's operator.

    Args:
        name: A recipe.
        radius: Of learned windows, in pixels.
    """
    with torch.device("meta"):
        model, images = model_of(name).eval(), torch.empty(1, 3, 32, 32)
    for layer in model.modules():
        if isinstance(layer, SpanAttention) and layer.span_mask is not None:
            layer.fixed_radius = radius
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    parameters = sum(p.numel() for p in model.parameters())
    gmacs = counter.get_total_flops() / 2e9
    return f"{parameters / 1e6:.2f} M parameters, {gmacs:.3f} GMACs"


def test_every_size_and_kind_has_its_recipe() -> None:
    names = [f"sa_resnet_{size}_{kind}" for size in SIZES for kind in KINDS]
    assert sorted(names) == sorted(SPAN)
    assert all(settings_of(name)["model"] == name for name in names)


@pytest.mark.parametrize("name", SPAN)
def test_recipe_opens_with_what_a_reader_needs(name: str) -> None:
    settings, text = settings_of(name), header(name)
    size, kind = name.split("_")[2:]
    for part in ("arXiv:2004.08708", f"Table row: {size}", "Deviations", "--dataset-download"):
        assert part in text
    assert "Expected top-1: unknown (accuracy of the paper not known to us); ours: not run" in text
    time = f"{HOURS[size]} hours" if kind == "adaptive" else "Hours: not measured"
    assert f"Hardware: 2 P100 GPUs{', ' if kind == 'adaptive' else '. '}{time}" in text
    assert ('"best performing medium" command' in text) == (size == "medium")
    assert "1 process x 50 images x 1 accumulation = 50 per update, 900 updates" in text
    assert settings["batch_size"] * settings["grad_accum_steps"] == 50
    assert 50000 * (1 - settings["val_fraction"]) / 50 == 900
    command = re.search(r"--config (\S+) --experiment (\S+)", text)
    assert ROOT / command[1] == RECIPES[name] and command[2] == name
    assert f"validate.py --checkpoint output/train/{name}" in text


@pytest.mark.parametrize("name", SPAN)
def test_counts_are_as_the_recipe_says(name: str) -> None:
    radius = 3 if name.endswith("adaptive") else 0
    assert f"As we count: {count(name, radius)}" in header(name)
    if radius:
        spans = span_layers(model_of(name)).values()
        assert {layer.running_radius() for layer in spans} == {radius}
        widest = count(name, 5).split(", ")[1].removesuffix(" GMACs")
        assert f"{widest} at the widest (kernel 11)" in header(name)


@pytest.mark.parametrize("kind", KINDS)
def test_medium_recipe_does_what_the_released_command_does(kind: str, tmp_path: Path) -> None:
    args = recipe_args(f"sa_resnet_medium_{kind}", tmp_path)
    words = shlex.split(COMMANDS[kind])
    asked = {**DEFAULTS, **dict(zip(words[::2], words[1::2], strict=True))}
    assert f"torch/{asked['--dataset'].lower()}" == args.dataset
    for flag, value in {
        "--batch-size": args.batch_size,
        "--epochs": args.epochs,
        "--num-workers": args.workers,
        "--print-interval": args.log_interval,
        "--lr": args.lr,
        "--eta_min": args.min_lr,
        "--momentum": args.momentum,
        "--weight-decay": args.weight_decay,
    }.items():
        assert float(asked[flag]) == value, flag
    kwargs = args.model_kwargs
    if kind == "adaptive":  # --attention_kernel has no effect on learned windows
        assert float(asked["--span_penalty"]) == args.span_penalty
        ours = kwargs["num_heads"], kwargs["span_ramp"], kwargs["span_init"], kwargs["max_span"]
        assert ours == (int(asked["--groups"]), float(asked["--R"]), float(asked["--z_init"]), 5)
    elif kind == "local":
        assert kwargs == {
            "num_heads": int(asked["--groups"]),
            "kernel_size": int(asked["--attention_kernel"]),
        }
    assert (args.stop_epoch, args.early_stop_epochs) == (args.epochs, int(0.2 * args.epochs))


@pytest.mark.parametrize("name", SPAN)
def test_other_sizes_have_the_settings_of_medium(name: str) -> None:
    medium = f"sa_resnet_medium_{name.rpartition('_')[2]}"
    assert {**settings_of(name), "model": medium} == settings_of(medium)


@pytest.mark.parametrize("name", SPAN)
def test_nothing_else_is_done_to_images_loss_and_weights(name: str, tmp_path: Path) -> None:
    args = recipe_args(name, tmp_path)
    assert (args.train_crop_mode, args.crop_padding, args.hflip) == ("padded", 4, 0.5)
    assert (args.img_size, args.crop_pct) == (32, 1.0)
    config = timm.get_pretrained_cfg(name)
    assert tuple(args.mean) == config.mean and tuple(args.std) == config.std
    off = ("color_jitter", "reprob", "mixup", "cutmix", "vflip", "smoothing", "drop", "drop_path")
    assert {key: getattr(args, key) for key in off} == dict.fromkeys(off, 0)
    assert (args.aa, args.clip_grad, args.layer_decay, args.loss) == (None, None, None, "ce")
    assert not (args.amp or args.model_ema or args.sync_bn)
    assert (args.val_fraction, args.val_seed, args.eval_metric) == (0.1, 42, "top1")
    assert (args.span_penalty is None) != name.endswith("adaptive")


@pytest.mark.parametrize("name", SPAN)
def test_learning_rate_is_the_released_one(name: str, tmp_path: Path) -> None:
    args = recipe_args(name, tmp_path)
    key = next(key for key in RATES if ("cnn" in key) == name.endswith("cnn"))
    expected = RATES[key]["lr_per_epoch_1_to_100"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule, _ = create_schedule(args, optimizer, 900)
    found = []
    for epoch in range(args.stop_epoch):
        found.append(current_lr(optimizer))
        schedule.step(epoch + 1)
    assert len(found) == len(expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-12 * args.lr


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_decays(kind: str, tmp_path: Path) -> None:
    args, model = (
        recipe_args(f"sa_resnet_small_{kind}", tmp_path),
        model_of(f"sa_resnet_small_{kind}"),
    )
    optimizer = create_optimizer(args, model, args.lr)
    assert type(optimizer) is torch.optim.SGD
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )
    for group in optimizer.param_groups:
        assert group["weight_decay"] == args.weight_decay > 0
        assert (group["momentum"], group["dampening"], group["nesterov"]) == (0.9, 0, True)
