"""Flags reach what they are for: loss, mixing, model, transforms, orders, averages, views."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from qna_timm.training import run
from qna_timm.training.build import build_model
from qna_timm.training.data import datasets, loaders
from qna_timm.training.data.image_loader import ImageLoader
from qna_timm.training.flags.recipe import parse_train_args, parse_validate_args
from qna_timm.training.optim import learning_rate
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.task import create_loss, create_mixup
from qna_timm.training.tta import AveragedViews

CPU = torch.device("cpu")
CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "nearest",
    "mean": (0.4, 0.5, 0.6),
    "std": (0.1, 0.2, 0.3),
    "crop_pct": 0.8,
    "crop_mode": "border",
}


def flags(line: str = "", *more: str) -> Namespace:
    return parse_train_args(["--dataset", "sklearn/digits", "-j", "0", *line.split(), *more])


def attributes(of: object, *names: str) -> list[Any]:
    return [getattr(of, name) for name in names]


@pytest.mark.parametrize("in_loader", [False, True])
def test_mixing(in_loader: bool) -> None:
    words = "--mixup .3 --cutmix .7 --mixup-prob .6 --mixup-switch-prob .4 --mixup-mode elem"
    mixup = create_mixup(flags(f"{words} --smoothing .2"), 10, in_loader)
    names = ("mixup_alpha", "cutmix_alpha", "mix_prob", "switch_prob", "mode", "label_smoothing")
    assert attributes(mixup, *names) == [0.3, 0.7, 0.6, 0.4, "elem", 0.2]
    assert (mixup.cutmix_minmax, mixup.num_classes) == (None, 10)
    sides = create_mixup(flags("--cutmix-minmax .2 .5"), 10, in_loader).cutmix_minmax
    assert list(sides) == [0.2, 0.5]


def test_losses() -> None:
    words = "--bce-loss --bce-sum --bce-target-thresh .2 --bce-pos-weight 3 --smoothing .05"
    loss = create_loss(flags(words))
    names = ("sum_classes", "target_threshold", "smoothing")
    assert attributes(loss, *names) == [True, 0.2, 0.05] and float(loss.pos_weight) == 3
    assert create_loss(flags("--loss poly --poly-epsilon 1.5")).epsilon == 1.5
    assert create_loss(flags("--smoothing .05")).smoothing == 0.05


def test_models() -> None:
    model = build_model(flags("--model test_vit --drop-path .3 --drop .2 --gp avg"), 10)
    rates = [layer.drop_prob for layer in model.modules() if isinstance(layer, DropPath)]
    assert max(rates) == pytest.approx(0.3)
    assert (model.head_drop.p, model.global_pool) == (0.2, "avg")
    model = build_model(flags("--model test_efficientnet --bn-momentum .03 --bn-eps 2e-4"), 10)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.03, 2e-4)}
    model = build_model(flags("--model test_vit", "--pretrained-cfg-overlay", "crop_pct=0.77"), 10)
    assert model.pretrained_cfg["crop_pct"] == 0.77


class Recorded(Exception):
    """What timm's loader was asked for."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of timm's loader, which is not built."""
    kept: dict[str, Any] = {}

    def create_loader(_: object, **kwargs: Any) -> None:
        kept.update(kwargs)
        raise Recorded

    monkeypatch.setattr(loaders, "create_loader", create_loader)
    return kept


def test_training_transforms(recorded: dict[str, Any]) -> None:
    words = {
        "re_prob": "--reprob .2",
        "re_mode": "--remode const",
        "re_count": "--recount 3",
        "train_crop_mode": "--train-crop-mode rkrc",
        "scale": "--scale .3 .9",
        "ratio": "--ratio .8 1.3",
        "hflip": "--hflip .4",
        "vflip": "--vflip .1",
        "color_jitter": "--color-jitter .25",
        "color_jitter_prob": "--color-jitter-prob .7",
        "grayscale_prob": "--grayscale-prob .15",
        "gaussian_blur_prob": "--gaussian-blur-prob .35",
        "auto_augment": "--aa rand-m5-n1",
        "interpolation": "--train-interpolation bicubic",
    }
    args = flags(" ".join(words.values()))
    with pytest.raises(Recorded):
        datasets.create_train_loader(
            datasets.open_datasets(args)[0], args, CONFIG, device=CPU, num_aug_splits=0
        )
    for name, line in words.items():
        found = recorded[name]
        found = found if isinstance(found, (list, tuple)) else [found]
        assert [str(x) for x in found] == [
            str(float(x)) if x[0] == "." or "." in x else x for x in line.split()[1:]
        ], name
    assert [recorded[name] for name in ("mean", "std")] == [CONFIG["mean"], CONFIG["std"]]


def test_evaluation_transforms(recorded: dict[str, Any]) -> None:
    words = ["--crop-border-pixels", "4", "--dataset", "sklearn/digits"]
    args = parse_validate_args(["--model", "test_vit", "-j", "0", *words])
    with pytest.raises(Recorded):
        datasets.create_eval_loader(
            datasets.open_dataset(args, "validation", False),
            args,
            CONFIG,
            device=CPU,
            batch_size=8,
        )
    assert {name: recorded[name] for name in CONFIG} == CONFIG
    assert recorded["crop_border_pixels"] == 4


def train_loader(line: str) -> ImageLoader:
    args = flags(f"-b 64 {line}")
    return datasets.create_train_loader(
        datasets.open_datasets(args)[0], args, dict(CONFIG, crop_mode="center"), device=CPU
    )


def test_orders() -> None:
    assert train_loader("--aug-repeats 3").sampler.aug_repeats == 3
    assert len(train_loader("--epoch-repeats 2")) == 2 * len(train_loader(""))


def test_erasing_differs_from_epoch_to_epoch() -> None:
    loader = train_loader("--reprob 1 --train-num-samples 64 --no-aug")
    seen = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        seen.append(torch.cat([images for images, _ in loader]).sum(dim=(0, 1)))
    torch.testing.assert_close(seen[0], seen[2], rtol=0, atol=0)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("warmup", [False, True])
def test_averages(warmup: bool) -> None:
    words = "--model test_vit --img-size 32 --model-ema --model-ema-decay .9"
    args = flags(words + " --model-ema-warmup" * warmup)
    task = run.build_task(args, build_model(args, 10), Processes(CPU))
    ema = task.get_trainable_module(ema=True)
    assert (ema.decay, ema.use_warmup) == (0.9, warmup)


def test_rates_of_adaptive_optimizers() -> None:
    """timm scales a base rate by the root of the batch for those whose name holds 'ada'."""
    for name, factor in (("sgd", 4.0), ("adamw", 2.0), ("adagrad", 2.0), ("adafactor", 2.0)):
        args = flags(f"--opt {name} --lr-base .1 --lr-base-size 64 -b 256")
        assert learning_rate(args, 256)[0] == pytest.approx(0.1 * factor), name


class Same(nn.Module):
    """The image as it came, as if they were logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def test_views() -> None:
    """Shifted by a sixteenth of each side, the border reflected; mirrored where that is allowed."""
    image = torch.arange(16 * 32, dtype=torch.float32).view(1, 1, 16, 32)
    views = AveragedViews(Same(), 5, mirror=False)
    assert len(set(views.views)) == 5 and not any(flip for _, flip in views.views)
    rows, columns = [1, *range(16), 14], [2, 1, *range(32), 30, 29]
    padded = image[:, :, rows][:, :, :, columns]
    shifted = [
        padded[:, :, 1 + down : 17 + down, 2 + 2 * across : 34 + 2 * across]
        for down, across in ((0, 0), (-1, -1), (1, 1), (-1, 1), (1, -1))
    ]
    torch.testing.assert_close(views(image), torch.stack(shifted).mean(0).flatten(1))
    for hflip, mirrored in (("0", False), (".5", True)):
        model = run.with_views(Same(), flags(f"--hflip {hflip} --tta 2"))
        assert [flip for _, flip in model.views] == [False, mirrored]
