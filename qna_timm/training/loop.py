"""One epoch of training: forward, backward, update, and what hangs on an update."""

import argparse
import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from qna_timm.training.data import ImageLoader
from qna_timm.training.distributed import Processes, sum_over_processes
from qna_timm.training.evaluation import check_labels
from qna_timm.training.optim import current_lr
from qna_timm.training.progress import Progress
from qna_timm.training.task import TrainTask
from qna_timm.training.views import class_names_of

_logger = logging.getLogger(__name__)


class Precision:
    """Mixed precision of a run: the autocast context and, for float16, the loss scaler.

    Args:
        args: Flags, of which ``amp`` and ``amp_dtype`` are read.
        device: Where the run computes.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device_type = device.type
        self.dtype = getattr(torch, args.amp_dtype) if args.amp else None
        scaled = self.dtype == torch.float16 and device.type in ("cuda", "cpu", "xpu")
        self.scaler = torch.amp.GradScaler(device.type if scaled else "cpu", enabled=scaled)

    def autocast(self) -> AbstractContextManager:
        """Context in which the forward pass runs."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)


class LossMean:
    """Mean of the loss and its parts over images, kept on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        self._zero = torch.zeros(
            (), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )
        self._sums: dict[str, Tensor] = {}
        self._images = self._zero.clone()

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """Count the losses (scalar means) of a batch of so many images."""
        self._images += images
        for name, value in losses.items():
            total = self._sums.setdefault(name, self._zero.clone())
            total += value.detach() * images

    def compute(self, processes: Processes) -> dict[str, float]:
        """The means over all images of all processes."""
        totals = sum_over_processes(torch.stack([self._images, *self._sums.values()]), processes)
        images, *sums = totals.tolist()
        return {name: total / images for name, total in zip(self._sums, sums, strict=True)}


class Trainer:
    """Trains a task epoch by epoch.

    Args:
        task: Model and loss, wrapped for distributed training if that is wanted.
        optimizer: Of the task's parameters.
        schedule: Learning-rate schedule or None.
        args: Flags.
        processes: The run's processes.
        precision: Mixed precision.
        mixup: Applied to each batch here, unless the loader mixes.
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
        mixup: Mixup | None = None,
    ) -> None:
        self.task = task
        self.optimizer = optimizer
        self.schedule = schedule
        self.args = args
        self.processes = processes
        self.precision = precision
        self.mixup = mixup
        self.num_updates = 0
        # As the flags made them: a resumed run tells from these what was changed meanwhile.
        self.settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self.image_folder: Path | None = None

    def train_epoch(self, loader: ImageLoader, epoch: int, label: str) -> dict[str, float]:
        """Go through the loader once.

        Args:
            loader: Training images.
            epoch: Number of the epoch, from 0.
            label: What the progress bar calls it.

        Batches are taken in groups of ``--grad-accum-steps`` whose mean loss is one update; the
        last group of the epoch is divided by its own, maybe smaller, size.

        Returns:
            ``loss`` and, if it has several, its parts: means over the images of all processes.
        """
        args, total = self.args, num_batches(self.args, len(loader))
        self.num_updates = epoch * num_updates(self.args, len(loader))
        self._set_mixing(loader, epoch)
        self.task.get_trainable_module().train()
        # Data that does not name its classes is only now seen to have too many for the model.
        unnamed = hasattr(loader, "dataset") and class_names_of(loader.dataset) is None
        mean = LossMean(self.processes.device)
        self.optimizer.zero_grad()
        with Progress(
            total,
            label,
            log_interval=args.log_interval,
            enabled=self.processes.is_primary,
        ) as progress:
            groups = group_sizes(total, args.grad_accum_steps)
            # A loader that is left early restarts its workers, so only --max-steps cuts it.
            batches = loader if total == len(loader) else itertools.islice(loader, total)
            for step, ((input, target), (group, closes)) in enumerate(
                zip(batches, groups, strict=False)
            ):
                images = len(input)
                if unnamed and target.ndim == 1:  # mixing in the loader makes soft targets
                    check_labels(target, self.task.num_classes)
                losses = self._forward_backward(input, target, group, closes)
                mean.add(losses, images)
                if closes:
                    self._update()
                if self.image_folder is not None and step % args.log_interval == 0:
                    save_images(input, self.image_folder / f"train-batch-{step}.jpg")
                progress.update(
                    images * self.processes.world_size,
                    **losses,
                    lr=current_lr(self.optimizer),
                )
        if hasattr(self.optimizer, "sync_lookahead"):
            self.optimizer.sync_lookahead()
            self.task.post_step()
        return mean.compute(self.processes)

    def _set_mixing(self, loader: ImageLoader, epoch: int) -> None:
        """Mixing ends at ``--mixup-off-epoch``; a resumed run may start after it."""
        enabled = not self.args.mixup_off_epoch or epoch < self.args.mixup_off_epoch
        for mixer in (self.mixup, loader):
            if hasattr(mixer, "mixup_enabled"):
                mixer.mixup_enabled = enabled

    def _forward_backward(
        self, input: Tensor, target: Tensor, group: int, closes: bool
    ) -> dict[str, Tensor]:
        """Add one batch's share to the gradients; the losses of the batch come back unscaled."""
        if self.mixup is not None:
            input, target = self.mixup(input, target)
        if self.args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        second_order = getattr(self.optimizer, "is_second_order", False)
        # Only the plain form of PyTorch's attention can be differentiated twice.
        attention = sdpa_kernel(SDPBackend.MATH) if second_order else nullcontext()
        # Gradients need to be summed over the processes only once per group.
        with nullcontext() if closes else self.task.no_sync(), attention:
            with self.precision.autocast():
                result = self.task(input, target)
            loss = self.precision.scaler.scale(result["loss"] / group)
            loss.backward(create_graph=second_order)
        losses = {"loss": result["loss"].detach()}
        if len(result["parts"]) > 1:
            losses.update({f"loss_{name}": part for name, part in result["parts"].items()})
        return losses

    def _update(self) -> None:
        """Clip, step, and everything that follows a step."""
        args, scaler = self.args, self.precision.scaler
        if args.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            parameters = self.task.get_clip_parameters(exclude_head=args.clip_mode == "agc")
            dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()
        self.num_updates += 1
        # A scale that fell says that gradients were not finite and the step was left out.
        if scaler.get_scale() >= scale:
            self.task.post_step()
            self.task.update_ema(step=self.num_updates)
        if args.synchronize_step and self.processes.device.type != "cpu":
            torch.accelerator.synchronize()
        if self.schedule is not None:
            self.schedule.step_update(num_updates=self.num_updates)


def num_batches(args: argparse.Namespace, loader_batches: int) -> int:
    """Batches of one epoch: the loader's, or what ``--max-steps`` updates take."""
    if args.max_steps is None:
        return loader_batches
    return min(loader_batches, args.max_steps * args.grad_accum_steps)


def num_updates(args: argparse.Namespace, loader_batches: int) -> int:
    """Updates of one epoch; the last may be of fewer batches."""
    return math.ceil(num_batches(args, loader_batches) / args.grad_accum_steps)


def group_sizes(batches: int, accumulation: int) -> Iterator[tuple[int, bool]]:
    """For each batch the size of the group it is accumulated in, and whether it closes it."""
    for index in range(batches):
        start = index - index % accumulation
        size = min(accumulation, batches - start)
        yield size, index + 1 == start + size


def save_images(input: Tensor, path: Path) -> None:
    """Write a batch [B, C, H, W] as one picture, each batch stretched to the full range."""
    from torchvision.utils import save_image

    save_image(input.float(), path, padding=0, normalize=True)
