"""The released learning-rate schedules of the span networks, by timm's and plain flags."""

import json
from pathlib import Path

import pytest
import torch

from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.optim import create_schedule, current_lr

RELEASED = json.loads((Path(__file__).parents[1] / "data" / "span_lr.json").read_text())
EPOCHS = 100


def rates(*argv: str, stop: int = EPOCHS) -> list[float]:
    """The learning rate of every epoch, asked for as train.py does: before its first update."""
    args = parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu", *argv])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule, epochs = create_schedule(args, optimizer, updates_per_epoch=3)
    found = []
    for epoch in range(min(epochs, stop)):
        found.append(current_lr(optimizer))
        for update in range(3):
            schedule.step_update(3 * epoch + update + 1)
            assert current_lr(optimizer) == found[-1], "it moves by epochs"
        schedule.step(epoch + 1)
    return found


@pytest.mark.parametrize("name", RELEASED)
def test_warm_up_and_cosine(name: str) -> None:
    """Ten epochs of warm-up from 2/10, the last at full height: timm's prefix of 8 from 0.2."""
    expected = RELEASED[name]["lr_per_epoch_1_to_100"]
    lr = max(expected)
    found = rates(
        "--opt", "sgd", "--lr", str(lr), "--sched", "cosine", "--warmup-epochs", "8",
        "--warmup-lr", str(0.2 * lr), "--warmup-prefix", "--min-lr", "0",
        "--epochs", "100", "--stop-epoch", "100",
    )  # fmt: skip
    assert len(found) == len(expected) == EPOCHS
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-12 * lr


@pytest.mark.parametrize("wrong", ["--epochs 92", "--warmup-epochs 10", "--no-warmup-prefix"])
def test_other_settings_are_told_apart(wrong: str) -> None:
    expected = RELEASED["adaptive_medium/local_medium"]["lr_per_epoch_1_to_100"]
    flags = "--lr 0.05 --sched cosine --warmup-epochs 8 --warmup-lr 0.01 --warmup-prefix"
    found = rates(*flags.split(), "--epochs", "100", *wrong.split())
    length = min(len(found), EPOCHS)
    assert max(abs(a - b) for a, b in zip(found[:length], expected, strict=False)) > 1e-4


def test_milestones() -> None:
    """What the release does to networks without attention: 0.3 from epoch 60, 0.09 from 80.

    It counts epochs from 1 and multiplies before it trains the epoch, which is timm's convention.
    """
    lr = 0.2
    found = rates(
        "--lr", str(lr), "--sched", "multistep", "--decay-milestones", "60", "80",
        "--decay-rate", "0.3", "--warmup-epochs", "0", "--epochs", "100",
    )  # fmt: skip
    expected = [lr] * 59 + [lr * 0.3] * 20 + [lr * 0.3 * 0.3] * 21
    assert len(found) == EPOCHS
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-12 * lr
