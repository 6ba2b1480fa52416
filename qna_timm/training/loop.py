"""One epoch of training, or the rest of one: forward, backward, update, and what hangs on it."""

import argparse
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from qna_timm.training.control import Control, Decision
from qna_timm.training.data.datasets import ImageLoader
from qna_timm.training.data.sampling import seed_shard
from qna_timm.training.data.views import class_names_of
from qna_timm.training.diagnosis import diagnose
from qna_timm.training.evaluation import check_labels
from qna_timm.training.flags.intervals import Interval
from qna_timm.training.generators import derive_seed, seed_average, seed_optimizer
from qna_timm.training.loss_mean import LossMean
from qna_timm.training.nonfinite import BufferKeeper, Fault, NonFinite, all_finite, bad_loss
from qna_timm.training.optim import current_lr
from qna_timm.training.precision import Precision
from qna_timm.training.processes.distributed import (
    Processes,
    gather_to_all,
    reduce_flags,
)
from qna_timm.training.reporting.progress import Progress
from qna_timm.training.signals import StopSignals
from qna_timm.training.storage.writes import Writes
from qna_timm.training.task import TrainTask
from qna_timm.training.updates import group_of, num_batches, num_updates

# Updates left out in a row before the run ends all the same.
MOST_SKIPPED = 10

_logger = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """A batch whose gradients wait for the rest of their update.

    Attributes:
        number: In this process's epoch.
        images: Size.
        closes: Whether it is the last of its update.
        losses: Loss and parts, on the device.
    """

    number: int
    images: int
    closes: bool
    losses: dict[str, Tensor]


class Trainer:
    """Trains a task epoch by epoch.

    Args:
        task: Model and loss, wrapped for distributed training if that is wanted.
        optimizer: Of the task's parameters.
        schedule: Learning-rate schedule or None.
        args: Flags.
        processes: The run's processes.
        precision: Mixed precision.
        control: Where the processes agree before each update; None neither saves nor stops.
        mixup: Applied to each batch here, unless the loader mixes.

    Attributes:
        num_updates: Updates since the run began.
        mean: Losses of the epoch so far.
        skipped: Updates of the epoch so far that were left out.
        skipped_in_a_row: How many of the run's last updates were.
        on_skip: Told of each.
        writes: Told of pictures that cannot be written.
    """

    def __init__(
        self,
        task: TrainTask,
        optimizer: Optimizer,
        schedule: Scheduler | None,
        *,
        args: argparse.Namespace,
        processes: Processes,
        precision: Precision,
        control: Control | None = None,
        mixup: Mixup | None = None,
    ) -> None:
        self.task = task
        self.optimizer = optimizer
        self.schedule = schedule
        self.args = args
        self.processes = processes
        self.precision = precision
        self.control = control or Control(processes, StopSignals(), Interval())
        self.mixup = mixup
        self.num_updates = 0
        self.mean = LossMean(processes.device)
        self.skipped = 0
        self.on_skip: Callable[[NonFinite], None] = lambda bad: None
        self.skipped_in_a_row = 0
        self.writes = Writes()
        self._scale = 1.0  # of the loss, as the host knows it
        self._group: list[MicroBatch] = []
        self._unnamed = False
        self.buffers = BufferKeeper(unwrap_model(task.get_trainable_module()))
        # As the flags made them: a resumed run tells from these what was changed meanwhile.
        self.settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self.image_folder: Path | None = None

    def train_epoch(
        self,
        loader: ImageLoader,
        epoch: int,
        label: str,
        start: int = 0,
        between: Callable[[int, Decision], None] = lambda updates, decision: None,
    ) -> dict[str, float]:
        """Go through the loader once, or through what is left of it.

        Args:
            loader: Training images.
            epoch: Number of the epoch, from 0.
            label: What the progress bar calls it.
            start: Updates of the epoch that are behind us, their losses in `mean`; the loader
                gives the batches that follow them.
            between: Called where processes have decided to save or to stop, with the epoch's
                updates so far.

        Batches are taken in groups of ``--grad-accum-steps`` whose mean loss is one update; the
        last group of the epoch is divided by its own, maybe smaller, size.

        Returns:
            ``loss`` and, if it has several, its parts: means over the images of all processes.

        Raises:
            NonFinite: A loss or gradient is no number and ``--on-nonfinite`` is not ``skip``.
        """
        args, total = self.args, num_batches(self.args, len(loader))
        first = min(start * args.grad_accum_steps, total)
        self._begin_epoch(loader, epoch, start)
        with Progress(
            total,
            label,
            log_interval=args.log_interval,
            enabled=self.processes.is_primary,
            start_step=first,
        ) as progress:
            for number, batch in enumerate(_batches(loader, first, total), first):
                size, closes = group_of(number, total, args.grad_accum_steps)
                losses = self._add_batch(loader, epoch, number, batch, size, closes)
                decision = self._close_group(loader, epoch, batch) if closes else None
                if self.image_folder is not None and number % args.log_interval == 0:
                    with self.writes.trying("images of batches"):
                        save_images(batch[0], self.image_folder / f"train-batch-{number}.jpg")
                progress.update(
                    len(batch[0]) * self.processes.world_size,
                    **losses,
                    lr=current_lr(self.optimizer),
                )
                if decision is not None and (decision.save or decision.signum):
                    between(number // args.grad_accum_steps + 1, decision)
        return self.mean.compute()

    def _begin_epoch(self, loader: ImageLoader, epoch: int, start: int) -> None:
        """Counters and modes as they are after `start` updates of an epoch."""
        self.num_updates = epoch * num_updates(self.args, len(loader)) + start
        if not start:
            self.mean.clear()
            self.skipped = 0
        self._group = []
        # Data that does not name its classes is only now seen to have too many for the model.
        self._unnamed = hasattr(loader, "dataset") and class_names_of(loader.dataset) is None
        self._scale = self.precision.scaler.get_scale()
        self._set_mixing(loader, epoch)
        self.task.get_trainable_module().train()
        self.optimizer.zero_grad()

    def _add_batch(
        self,
        loader: ImageLoader,
        epoch: int,
        number: int,
        batch: tuple[Tensor, Tensor],
        size: int,
        closes: bool,
    ) -> dict[str, Tensor]:
        """Add a micro-batch's share to the gradients of its group; its losses, on the device."""
        input, target = batch
        if self._unnamed and target.ndim == 1:  # mixing in the loader makes soft targets
            check_labels(target, self.task.num_classes)
        if not self._group:
            self.buffers.keep()
        self._seed(epoch, number)
        losses = self._forward_backward(input, target, size, closes)
        self._group.append(MicroBatch(number, len(input), closes, losses))
        return losses

    def _close_group(
        self, loader: ImageLoader, epoch: int, last: tuple[Tensor, Tensor]
    ) -> Decision:
        """Make the update of a group, or leave it out if some process has found it bad."""
        group, self._group = self._group, []
        decision = self.control.decide(self._is_bad(group))
        if decision.bad:
            self._refuse(loader, epoch, group, last)
        else:
            self._update(group)
        return decision

    def _seed(self, epoch: int, number: int) -> None:
        """Make what is drawn for a micro-batch a function of its place in the run."""
        processes = self.processes
        shard = number * processes.world_size + processes.rank
        seed_shard(self.args.seed, epoch, shard, processes.device)

    def _is_bad(self, group: Sequence[MicroBatch]) -> Tensor:
        """Whether a loss, or a gradient that no loss scaler watches, is not finite."""
        # Below 1 it is not the scale that makes them overflow.
        scaled = self.precision.scaler.is_enabled() and self._scale >= 1
        parameters = () if scaled else self.task.get_trainable_module().parameters()
        losses = [value for micro in group for value in micro.losses.values()]
        return ~all_finite(parameters, losses)

    def _set_mixing(self, loader: ImageLoader, epoch: int) -> None:
        """Mixing ends at ``--mixup-off-epoch``; a resumed run may start after it."""
        enabled = not self.args.mixup_off_epoch or epoch < self.args.mixup_off_epoch
        for mixer in (self.mixup, loader):
            if hasattr(mixer, "mixup_enabled"):
                mixer.mixup_enabled = enabled

    def _forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Losses of a batch, mixed here unless the loader mixes."""
        if self.mixup is not None:
            input, target = self.mixup(input, target)
        if self.args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            return self.task(input, target)

    def _forward_backward(
        self, input: Tensor, target: Tensor, group: int, closes: bool
    ) -> dict[str, Tensor]:
        """Add one batch's share to the gradients; the losses of the batch come back unscaled."""
        second_order = getattr(self.optimizer, "is_second_order", False)
        # Only the plain form of PyTorch's attention can be differentiated twice.
        attention = sdpa_kernel(SDPBackend.MATH) if second_order else nullcontext()
        # Gradients need to be summed over the processes only once per group.
        with nullcontext() if closes else self.task.no_sync(), attention:
            result = self._forward(input, target)
            loss = self.precision.scaler.scale(result["loss"] / group)
            loss.backward(create_graph=second_order)
        losses = {"loss": result["loss"].detach()}
        if len(result["parts"]) > 1:
            losses.update({f"loss_{name}": part for name, part in result["parts"].items()})
        return losses

    def _refuse(
        self,
        loader: ImageLoader,
        epoch: int,
        group: Sequence[MicroBatch],
        last: tuple[Tensor, Tensor],
    ) -> None:
        """Leave an update out: nothing of it stays, if the run goes on with the next.

        Raises:
            NonFinite: It does not.
        """
        self.buffers.restore()
        self.optimizer.zero_grad()
        update = group[0].number // self.args.grad_accum_steps
        faults = self._find_faults(loader, epoch, group, last)
        bad = NonFinite(epoch, update, faults, self.processes.world_size)
        self.skipped_in_a_row += 1
        if self.args.on_nonfinite != "skip" or self.skipped_in_a_row > MOST_SKIPPED:
            raise bad
        self.on_skip(bad)
        self.skipped += 1
        self.num_updates += 1
        if self.schedule is not None:
            self.schedule.step_update(num_updates=self.num_updates)
        self.control.count_update()

    def _find_faults(
        self,
        loader: ImageLoader,
        epoch: int,
        group: Sequence[MicroBatch],
        last: tuple[Tensor, Tensor],
    ) -> list[Fault]:
        """What is not finite, of all processes and on all of them; see `nonfinite`."""
        whats = [bad_loss(micro.losses) for micro in group]
        if not any(reduce_flags([any(whats)], self.processes)):
            whats = ["gradients are not finite"] * len(group)
        faults = []
        for micro, what in zip(group, whats, strict=True):
            if what is None:
                continue
            found, samples = "", []
            if isinstance(loader, ImageLoader):
                samples = loader.samples(epoch, micro.number)
            if batch := self._batch_again(loader, epoch, micro, last):
                found = diagnose(
                    self.task,
                    lambda number=micro.number, batch=batch: self._again(epoch, number, *batch),
                    self.processes.device,
                )
            rank = self.processes.rank
            faults.append(Fault(what, rank, micro.number, samples, found))
        return list(itertools.chain(*gather_to_all(faults, self.processes)))

    def _batch_again(
        self,
        loader: ImageLoader,
        epoch: int,
        micro: MicroBatch,
        last: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor] | None:
        """A micro-batch as it came out of the loader; None if it is gone."""
        again = loader.read_again(epoch, micro.number) if isinstance(loader, ImageLoader) else None
        if again is not None:
            return again
        # mixing has changed the one at hand
        return last if micro.closes and self.mixup is None else None

    def _again(self, epoch: int, number: int, input: Tensor, target: Tensor) -> dict[str, Any]:
        """What the task made of a micro-batch."""
        self._seed(epoch, number)
        return self._forward(input, target)

    def _update(self, group: Sequence[MicroBatch]) -> None:
        """Clip, step, and everything that follows a step."""
        args, scaler = self.args, self.precision.scaler
        self.skipped_in_a_row = 0
        if args.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            parameters = self.task.get_clip_parameters(exclude_head=args.clip_mode == "agc")
            dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
        scale = self._scale
        seed = derive_seed("optimizer", args.seed, self.num_updates)
        seed_optimizer(self.optimizer, seed, self.processes.device)
        scaler.step(self.optimizer)
        scaler.update()
        self._scale = scaler.get_scale()
        self.optimizer.zero_grad()
        self.num_updates += 1
        # A scale that fell says that gradients were not finite and the step was left out.
        if self._scale >= scale:
            self.task.post_step()
            average = self.task.get_trainable_module(ema=True)
            seed_average(average, derive_seed("average", args.seed, self.num_updates))
            self.task.update_ema(step=self.num_updates)
        if args.synchronize_step and self.processes.device.type != "cpu":
            torch.accelerator.synchronize()
        if self.schedule is not None:
            self.schedule.step_update(num_updates=self.num_updates)
        for micro in group:
            self.mean.add(micro.losses, micro.images)
        self.control.count_update()


def _batches(loader: ImageLoader, first: int, total: int) -> Iterable[tuple[Tensor, Tensor]]:
    """What is left of the epoch.

    A loader that is left early restarts its workers, so only --max-steps cuts it.
    """
    if first >= total:
        return ()
    return loader if total == len(loader) else itertools.islice(loader, total - first)


def save_images(input: Tensor, path: Path) -> None:
    """Write a batch [B, C, H, W] as one picture, each batch stretched to the full range."""
    from torchvision.utils import save_image

    save_image(input.float(), path, padding=0, normalize=True)
