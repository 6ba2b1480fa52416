"""The loop's arithmetic: accumulation, clipping, skipped steps, rates, losses, views."""

import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qna_timm.training import loop
from qna_timm.training.control import Control
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.intervals import Interval
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.loss_mean import LossMean
from qna_timm.training.optim import create_schedule, current_lr, learning_rate
from qna_timm.training.precision import Precision
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.signals import StopSignals
from qna_timm.training.task import TrainTask, create_loss
from qna_timm.training.tta import AveragedViews
from qna_timm.training.updates import num_updates

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer_for(
    model: nn.Module, *argv: str, task_class: type = TrainTask
) -> tuple[loop.Trainer, Namespace]:
    args = parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu", *argv])
    task = task_class(model, nn.CrossEntropyLoss(), device=CPU, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr or 0.1)
    precision = Precision(args, CPU)
    processes = Processes(CPU)
    trainer = loop.Trainer(
        task, optimizer, None, args=args, processes=processes, precision=precision
    )
    return trainer, args


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 5, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def linear() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    model.get_classifier = lambda: model
    return model


def test_accumulation_is_exact_at_the_tail() -> None:
    data, model, expected = batches(7), linear(), linear()
    trainer, _ = trainer_for(model, "--grad-accum-steps", "4", "--lr", "0.1")
    metrics = trainer.train_epoch(data, 0, "train")
    assert trainer.num_updates == 2
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    losses = []
    for group in (data[:4], data[4:]):
        images, labels = (torch.cat(parts) for parts in zip(*group, strict=True))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(expected(images), labels)
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), len(images)))
    torch.testing.assert_close(model.weight, expected.weight, rtol=0, atol=1e-6)
    mean = sum(loss * n for loss, n in losses) / 28
    assert metrics["loss"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "accumulation", "max_steps", "updates"),
    [(7, 4, None, 2), (8, 4, None, 2), (3, 4, None, 1), (7, 1, 5, 5), (7, 3, 2, 2), (7, 3, 9, 3)],
)
def test_number_of_updates(
    count: int, accumulation: int, max_steps: int | None, updates: int
) -> None:
    argv = ["--grad-accum-steps", str(accumulation)]
    argv += ["--max-steps", str(max_steps)] if max_steps else []
    trainer, args = trainer_for(linear(), *argv)
    assert num_updates(args, count) == updates
    trainer.train_epoch(batches(count), 0, "train")
    assert trainer.num_updates == updates
    trainer.train_epoch(batches(count), 5, "train")
    assert trainer.num_updates == 6 * updates, "the count follows the epoch, as after a resume"


class TwoLosses(TrainTask):
    """A task with a penalty and a clamp, as other model families need."""

    steps = 0

    def loss_parts(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        penalty = self.get_trainable_module().weight.abs().mean()
        return {**super().loss_parts(output, target), "penalty": 0.5 * penalty}

    def post_step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            self.get_trainable_module().weight.clamp_(-0.01, 0.01)


def test_task_hooks() -> None:
    model = linear()
    trainer, _ = trainer_for(model, "--grad-accum-steps", "2", task_class=TwoLosses)
    trainer.task.setup_ema(decay=0.0)
    metrics = trainer.train_epoch(batches(5), 0, "train")
    assert trainer.task.steps == 3
    assert model.weight.abs().max() <= 0.01
    averaged = trainer.task.get_trainable_module(ema=True).module
    assert torch.equal(averaged.weight, model.weight), "averaged after the clamp"
    assert not averaged.training
    assert metrics["loss"] == pytest.approx(metrics["loss_class"] + metrics["loss_penalty"])


def test_average_of_bfloat16_is_rounded_by_its_place_in_the_run() -> None:
    """Not by how many updates this process has made: timm's own generator would know that."""
    averages = []
    for updates_before in (0, 3):
        trainer, _ = trainer_for(linear().bfloat16(), "--lr", "0.1")
        average = trainer.task.setup_ema(decay=0.9)
        for _ in range(updates_before):
            average.update(linear().bfloat16(), step=9)
        average.set(linear().bfloat16())
        data = [(x.bfloat16(), target) for x, target in batches(4)]
        trainer.train_epoch(data, 2, "train")
        averages.append(average.module.weight)
    assert averages[0].equal(averages[1])


def test_skipped_step_is_no_step() -> None:
    """float16: gradients that overflow skip the update, the hook and the average."""
    model = linear()
    before = model.weight.clone()
    trainer, _ = trainer_for(model, "--amp", task_class=TwoLosses)
    images, labels = batches(1)[0]
    trainer.train_epoch([(images * 1e3, labels)], 0, "train")
    assert torch.equal(model.weight, before)
    assert trainer.task.steps == 0 and trainer.num_updates == 1
    trainer.train_epoch([(images, labels)], 1, "train")
    assert trainer.task.steps == 1


@pytest.mark.parametrize(
    ("mode", "bound"), [("norm", 1e-3), ("value", 1e-3 * 15**0.5), ("agc", None)]
)
def test_clipping(mode: str, bound: float | None) -> None:
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(3, 3))
    model.get_classifier = lambda: model[2]
    before = [p.detach().clone() for p in model.parameters()]
    trainer, _ = trainer_for(model, "--clip-grad", "1e-3", "--clip-mode", mode, "--lr", "1")
    images, labels = batches(1)[0]
    trainer.train_epoch([(images * 100, labels)], 0, "train")
    moved = [(p.detach() - b).norm() for p, b in zip(model.parameters(), before, strict=True)]
    if bound is not None:
        assert all(distance <= bound * 1.01 for distance in moved)
    else:
        rows = before[0].norm(dim=1)
        assert (moved[0] <= 1e-3 * rows.norm() * 1.01) and moved[2] > 1e-2, "the head is exempt"


@pytest.mark.parametrize("precision", [[], ["--amp"]])
def test_clipped_gradients_move_as_far_as_they_may(precision: list[str]) -> None:
    """Those of scaled losses too: it is not the scaled gradient that is clipped."""
    model = linear()
    before = model.weight.detach().clone()
    trainer, _ = trainer_for(model, "--clip-grad", "1e-2", "--lr", "1", *precision)
    trainer.train_epoch(batches(1), 0, "train")
    assert 9e-3 < (model.weight - before).norm() <= 1.01e-2


def test_mixing_ends_with_its_last_epoch() -> None:
    trainer, _ = trainer_for(linear(), "--mixup-off-epoch", "1")
    loader = type("Loader", (), {"mixup_enabled": None})()
    found = []
    for epoch in range(3):
        trainer._set_mixing(loader, epoch)
        found.append(loader.mixup_enabled)
    assert found == [True, False, False]


def test_averages_know_their_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up of the decay goes by the number of updates."""
    trainer, _ = trainer_for(linear(), "--model-ema")
    trainer.task.setup_ema(decay=0.9, use_warmup=True)
    seen: list[int] = []
    monkeypatch.setattr(trainer.task, "update_ema", lambda step: seen.append(step))
    trainer.train_epoch(batches(3), 0, "train")
    assert seen == [1, 2, 3]


def test_skipped_updates_in_a_row_are_counted_anew() -> None:
    trainer, _ = trainer_for(linear())
    trainer.skipped_in_a_row = 3
    trainer.train_epoch(batches(1), 0, "train")
    assert trainer.skipped_in_a_row == 0


def test_a_skipped_update_counts_as_one() -> None:
    """Rates, averages and the next save go by the updates behind the run, made or not."""
    trainer, _ = trainer_for(linear(), "--on-nonfinite", "skip")
    rates: list[int] = []
    trainer.schedule = SimpleNamespace(step_update=lambda num_updates: rates.append(num_updates))
    trainer.control = Control(trainer.processes, StopSignals(), Interval(updates=3))
    data = batches(3)
    data[1][0].fill_(torch.nan)
    trainer.train_epoch(data, 0, "train")
    assert (trainer.skipped, trainer.num_updates, rates) == (1, 3, [1, 2, 3])
    assert trainer.control.decide().save


def test_labels_beyond_the_model_are_told() -> None:
    """In data that does not name its classes they are seen only when they come."""
    data = [(torch.zeros(4, 5), torch.tensor([0, 1, 2, 3]))]
    loader = type("Loader", (list,), {"dataset": object()})(data)
    model = linear()
    model.num_classes = 3
    trainer, _ = trainer_for(model)
    with pytest.raises(UsageError, match=r"the label 3, but the model only 3 .*--num-classes 4"):
        trainer.train_epoch(loader, 0, "train")


def test_losses_are_means_over_images() -> None:
    """A smaller batch counts for less; of no image there is no mean."""
    mean = LossMean(CPU)
    assert math.isnan(mean.compute()["loss"])
    mean.add({"loss": torch.tensor(1.0)}, 6)
    mean.add({"loss": torch.tensor(5.0)}, 2)
    assert mean.compute() == {"loss": 2.0}
    data = [*batches(1, 6), *batches(1, 2)]
    model, losses = linear(), []
    trainer, _ = trainer_for(model, "--lr", "1e-9")
    for images, labels in data:
        losses.append(nn.functional.cross_entropy(model(images), labels).item() * len(images))
    found = trainer.train_epoch(data, 0, "train")["loss"]
    assert found == pytest.approx(sum(losses) / 8, abs=1e-6)


def test_speed_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = trainer_for(linear())
    trainer.processes = Processes(CPU, world_size=2)
    counted: list[int] = []
    monkeypatch.setattr(loop.Progress, "update", lambda _, images, **values: counted.append(images))
    trainer.train_epoch(batches(2), 0, "train")
    assert counted == [8, 8]


def test_learning_rate_scaling() -> None:
    base = ["--dataset", "sklearn/digits", "--device", "cpu", "--lr-base", "0.1"]
    for argv, expected in [
        (["--opt", "sgd"], 0.4),
        (["--opt", "adamw"], 0.2),
        (["--opt", "lamb"], 0.2),
        (["--opt", "adamw", "--lr-base-scale", "linear"], 0.4),
        (["--opt", "sgd", "--lr-base-size", "1024"], 0.1),
        (["--opt", "sgd", "--lr", "7"], 7),
    ]:
        args = parse_train_args([*base, *argv])
        assert learning_rate(args, 1024)[0] == pytest.approx(expected)


def test_schedule_none_and_prefix() -> None:
    base = ["--dataset", "sklearn/digits", "--device", "cpu", "--epochs", "10"]
    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    assert create_schedule(parse_train_args([*base, "--sched", "none"]), optimizer, 5) == (None, 10)
    args = parse_train_args(
        [*base, "--warmup-prefix", "--warmup-epochs", "2", "--cooldown-epochs", "3"]
    )
    assert create_schedule(args, optimizer, 5)[1] == 15


def test_losses_follow_the_flags() -> None:
    base = ["--dataset", "sklearn/digits", "--device", "cpu"]
    for argv, name in [
        ([], "LabelSmoothingCrossEntropy"),
        (["--smoothing", "0"], "CrossEntropyLoss"),
        (["--mixup", "0.1"], "SoftTargetCrossEntropy"),
        (["--cutmix-minmax", "0.2", "0.8"], "SoftTargetCrossEntropy"),
        (["--bce-loss", "--bce-sum", "--bce-target-thresh", "0.2"], "BinaryCrossEntropy"),
        (["--jsd-loss", "--aug-splits", "3"], "JsdCrossEntropy"),
    ]:
        assert type(create_loss(parse_train_args([*base, *argv]))).__name__ == name


class OneOutput(nn.Module):
    """Flattens each batch into the same memory, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.empty(2, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.out.copy_(x.flatten(1))


def test_views_are_averaged_where_outputs_are_overwritten() -> None:
    images = torch.randn(2, 1, 16, 16)
    averaged = AveragedViews(OneOutput(), 4, mirror=True)(images)
    assert torch.equal(averaged, AveragedViews(nn.Flatten(), 4, mirror=True)(images))


def test_views_are_averaged() -> None:
    model = nn.Flatten()
    images = torch.randn(2, 1, 16, 16)
    flat = AveragedViews(model, 2, mirror=True)(images)
    torch.testing.assert_close(flat, ((images + images.flip(-1)) / 2).flatten(1))
    assert AveragedViews(model, 10, mirror=True)(images).shape == (2, 256)
    shifted = AveragedViews(model, 2, mirror=False)(torch.ones(1, 1, 16, 16))
    assert torch.equal(shifted, torch.ones(1, 256))
    with pytest.raises(UsageError, match="--tta 6: at most 5"):
        AveragedViews(model, 6, mirror=False)


def test_shifted_views_of_wide_images() -> None:
    """By a sixteenth of either side, the border reflected."""
    images = torch.randn(2, 1, 32, 16)
    rows, cols = torch.arange(-2, 30).abs(), torch.arange(-1, 15).abs()
    shifted = images[..., rows[:, None], cols]
    averaged = AveragedViews(nn.Identity(), 2, mirror=False)(images)
    torch.testing.assert_close(averaged, (images + shifted) / 2)


def test_learning_rate_of_several_groups_is_their_mean() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.2, 0.6)]
    assert current_lr(torch.optim.SGD(groups)) == pytest.approx(0.3)
