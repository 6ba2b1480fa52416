"""A run made ready from its settings: data, model, and what trains it. Nothing is written."""

import argparse
import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.utils import random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import qna_timm
from qna_timm.training.build import (
    build_model,
    choose_classes,
    describe,
    input_config,
    prepare_model,
)
from qna_timm.training.control import Control
from qna_timm.training.data.datasets import (
    ImageLoader,
    create_eval_loader,
    create_train_loader,
    open_datasets,
    uses_prefetcher,
)
from qna_timm.training.data.fingerprint import fingerprint
from qna_timm.training.data.shards import ShardPlan
from qna_timm.training.data.views import images_of
from qna_timm.training.exactness import versions
from qna_timm.training.gramian_task import GramianTask, has_branches
from qna_timm.training.kernels import choose_kernels
from qna_timm.training.loop import Trainer
from qna_timm.training.names import model_label
from qna_timm.training.optim import create_optimizer, create_schedule, learning_rate
from qna_timm.training.precision import Precision
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.reporting import report
from qna_timm.training.span_task import DEFAULT_PENALTY, SpanTask, has_spans
from qna_timm.training.task import TrainTask, create_loss, create_mixup
from qna_timm.training.trial import check_forward, check_single_images
from qna_timm.training.tta import AveragedViews
from qna_timm.training.updates import num_updates

# PyTorch's new name for sending buffers out at each step, and the old one.
BUFFERS_FLAG = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)

_logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What a run consists of once everything is set up.

    Attributes:
        args: Settings.
        processes: The run's processes.
        trainer: Trains the task for an epoch.
        train_loader: Training images.
        eval_loader: Validation images.
        epochs: Epochs of the schedule.
        metadata: What the checkpoints say about the run.
        control: Where the processes agree.
        plan: How the training images divide into updates; None for streams.
        identity: What a resumed run must find unchanged: data and versions.
        draws: Whether the run's curves are drawn.
    """

    args: argparse.Namespace
    processes: Processes
    trainer: Trainer
    train_loader: ImageLoader
    eval_loader: ImageLoader
    epochs: int
    metadata: dict[str, Any]
    control: Control
    plan: ShardPlan | None
    identity: dict[str, Any]
    draws: bool = False

    @property
    def last_epoch(self) -> int:
        """Epochs after which this session ends, as far as settings say."""
        return min(self.args.stop_epoch or self.epochs, self.epochs)


def set_up(
    args: argparse.Namespace,
    processes: Processes,
    control: Control,
    plan: ShardPlan | None = None,
) -> Run:
    """Open the data and build everything that trains on it.

    Args:
        args: Settings.
        processes: The run's processes.
        control: Where they agree.
        plan: Of the run that this one goes on with, see `elastic`.

    Raises:
        UsageError: Settings, files or data are at fault.
    """
    report.check_trackers(args)
    has_graph = bool(args.torchcompile or args.torchscript)
    choose_kernels(processes.device, args.deterministic, full_float32=args.amp or has_graph)
    train_set, eval_set = open_datasets(args)
    classes, class_names = choose_classes(args, train_set)
    # All processes start from the same weights.
    random_seed(args.seed)
    model = build_model(args, classes, class_names)
    data_config = input_config(args, model)
    metadata = describe(args, model, data_config, class_names)
    model = prepare_model(model, args, processes)
    check_forward(with_views(model, args), data_config, metadata["num_classes"])
    if args.batch_size == 1 and not (args.sync_bn and processes.distributed):
        check_single_images(model, data_config)
    device, in_loader = processes.device, uses_prefetcher(args, processes.device)
    mixup = create_mixup(args, metadata["num_classes"], in_loader)
    train_loader = create_train_loader(
        train_set,
        args,
        data_config,
        device=device,
        mixup_collate=mixup if in_loader else None,
        num_aug_splits=args.aug_splits,
        plan=plan,
    )
    eval_loader = create_eval_loader(
        eval_set,
        args,
        data_config,
        device=device,
        batch_size=args.validation_batch_size or args.batch_size,
    )
    lr, lr_text = learning_rate(args, images_per_update(args, processes))
    optimizer = create_optimizer(args, model, lr)
    updates = num_updates(args, len(train_loader))
    schedule, epochs = create_schedule(args, optimizer, updates)
    trainer = Trainer(
        build_task(args, model, processes),
        optimizer,
        schedule,
        args=args,
        processes=processes,
        precision=Precision(args, device),
        control=control,
        mixup=None if in_loader else mixup,
    )
    run = Run(
        args, processes, trainer, train_loader, eval_loader, epochs, metadata, control,
        plan=None if train_loader.sampler is None else train_loader.plan,
        identity={"data": fingerprint(train_set, eval_set), "versions": versions(device)},
    )  # fmt: skip
    _announce_data_and_model(run, model, train_set, eval_set, known_classes=classes is not None)
    _announce_arithmetic(run, updates, lr_text)
    return run


def build_task(args: argparse.Namespace, model: nn.Module, processes: Processes) -> TrainTask:
    """The task: model and loss, averaged weights, compiled, distributed; in that order."""
    loss, common = create_loss(args), {"device": processes.device, "verbose": False}
    if has_branches(model):
        task: TrainTask = GramianTask(model, loss, ga_lam=args.ga_lam, **common)
    elif has_spans(model):
        penalty = DEFAULT_PENALTY if args.span_penalty is None else args.span_penalty
        task = SpanTask(model, loss, span_penalty=penalty, **common)
    else:
        task = TrainTask(model, loss, **common)
    if args.model_ema and (processes.is_primary or not args.model_ema_force_cpu):
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device="cpu" if args.model_ema_force_cpu else None,
        )
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if not args.model_ema_force_cpu:
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if processes.distributed:
        kwargs = {BUFFERS_FLAG: False} if args.no_ddp_bb else {}
        task.prepare_distributed(device_ids=processes.ddp_device_ids, **kwargs)
    return task


def images_per_update(args: argparse.Namespace, processes: Processes) -> int:
    """The global batch: per process x processes x accumulation."""
    return args.batch_size * processes.world_size * args.grad_accum_steps


def with_views(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model as it is evaluated: on several views of an image with ``--tta``."""
    return AveragedViews(model, args.tta, mirror=args.hflip > 0) if args.tta > 1 else model


def _announce_data_and_model(
    run: Run, model: nn.Module, train_set: Dataset, eval_set: Dataset, known_classes: bool
) -> None:
    args, metadata = run.args, run.metadata
    if args.builtin_data:
        _logger.info("no data named: training on sklearn/digits with configs/quickstart.yaml")
    if not known_classes:
        _logger.info("the data does not say its classes: the model keeps its own number")
    _logger.info(
        "device %s; data %s: %s training and %s validation images, %d classes; model %s: %.2f M"
        " parameters, input %s",
        report.device_name(run.processes.device),
        args.dataset or args.data_dir,
        _count(train_set),
        _count(eval_set),
        metadata["num_classes"],
        model_label(args.model, args.model_kwargs),
        sum(p.numel() for p in model.parameters()) / 1e6,
        "x".join(map(str, metadata["data_config"]["input_size"])),
    )


def _announce_arithmetic(run: Run, updates: int, lr_text: str) -> None:
    args, processes = run.args, run.processes
    _logger.info(
        "%d images per process x %d process(es) x %d accumulation = %d per update, %d updates per"
        " epoch",
        args.batch_size,
        processes.world_size,
        args.grad_accum_steps,
        images_per_update(args, processes),
        updates,
    )
    _logger.info(
        "%s, %s, weight decay %g, %s", args.opt, lr_text, args.weight_decay, _schedule_text(run)
    )
    if run.trainer.schedule is not None and args.warmup_epochs >= run.epochs:
        _logger.warning(
            "--warmup-epochs %d: the run ends after %d epochs, before its learning rate is reached",
            args.warmup_epochs,
            run.epochs,
        )
    if args.cooldown_epochs and not hasattr(run.trainer.schedule, "get_cycle_length"):
        _logger.warning("--cooldown-epochs: --sched %s has none", args.sched)
    if args.grad_accum_steps > len(run.train_loader):
        _logger.warning(
            "--grad-accum-steps %d: an epoch has %d batches, so that an update is of fewer images",
            args.grad_accum_steps,
            len(run.train_loader),
        )
    if recipe := _paper_recipe(args):
        _logger.warning(
            "no --config and no --opt: timm's default optimizer (%s) is in force; the paper's"
            " settings for %s are in %s",
            args.opt,
            args.model,
            recipe,
        )
    if isinstance(task := run.trainer.task, SpanTask):
        layers, penalty = len(task.span_layers), task.span_penalty
        _logger.info("learned windows in %d layers, span penalty %g", layers, penalty)


def _schedule_text(run: Run) -> str:
    """``cosine over 24 epochs, 3 of warm-up``."""
    args, warmup = run.args, min(run.args.warmup_epochs, run.epochs)
    text = f"{args.sched} over {run.epochs} epochs"
    if run.trainer.schedule is None:
        text = f"no schedule, {run.epochs} epochs"
    elif warmup:
        text += f", {warmup} of warm-up"
    return text if run.last_epoch == run.epochs else f"{text}, stopping after {run.last_epoch}"


def _paper_recipe(args: argparse.Namespace) -> Path | None:
    """The recipe of one of our models that is trained on the user's data without settings."""
    if args.builtin_data or args.smoke or {"config", "opt"} & set(args.given):
        return None
    name = args.model.partition(".")[0]
    if not timm.is_model(name):
        return None
    if not timm.model_entrypoint(name).__module__.startswith("qna_timm.models."):
        return None
    root = Path(qna_timm.__file__).resolve().parents[1]
    recipe = next((root / "configs").glob(f"*/{name}.yaml"), None)
    here = Path.cwd()
    return recipe.relative_to(here) if recipe and recipe.is_relative_to(here) else recipe


def _count(dataset: Dataset) -> str:
    """Number of images for the eye; streams may not know it."""
    images = images_of(dataset)
    return "unknown" if images is None else f"{images:,}"
