"""Checks of settings against each other, timm's registries, the device and the file system."""

import importlib
import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from qna_timm.training.data.holdout import check_holdout_flags, check_holdout_split
from qna_timm.training.data.padded_crop import check_crop_flags
from qna_timm.training.errors import UsageError, closest, closest_path
from qna_timm.training.flags.declaration import FlagTable, all_flags
from qna_timm.training.flags.learning import MULTILABEL_LOSSES
from qna_timm.training.names import (
    TINY_IMAGENET,
    check_dataset_name,
    check_model_name,
    expand_model_names,
    resolve_model,
)
from qna_timm.training.processes.distributed import device_count
from qna_timm.training.storage.checkpoint import WEIGHTS_SUFFIXES, find_weights

_OPTIMIZER_FLAGS = {"eps": "--opt-eps", "betas": "--opt-betas"}

Origins = Mapping[str, str]
"""Where a setting came from, by key: "--lr" or "FILE: key 'lr'"; begins an error message."""


def _refuse_unsupported(args: Namespace, origins: Origins, table: FlagTable) -> None:
    for flag in all_flags(table):
        where = origins[flag.key]
        passed_over = flag.inert and not where.startswith("-")
        if flag.refusal and not passed_over and getattr(args, flag.key) != flag.default:
            raise UsageError(f"{where}: {flag.refusal}")


def _import_device_modules(args: Namespace, origins: Origins) -> None:
    for name in args.device_modules or []:
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(
                f"{origins['device_modules']}: cannot import '{name}': {reason}"
            ) from None


def choose_device() -> str:
    """Name the accelerator that PyTorch finds (cuda, xpu, mps, ...), else cpu."""
    if not torch.accelerator.is_available():
        return "cpu"
    return torch.accelerator.current_accelerator().type


def _check_device(args: Namespace, origins: Origins) -> None:
    if args.device in (None, "auto"):
        args.device = choose_device()
        return
    where = origins["device"]
    try:
        device = torch.device(args.device)
    except RuntimeError:
        known = ("cpu", "cuda", "mps", "xpu")
        raise UsageError(
            f"{where}: unknown device '{args.device}', expected one like cpu, cuda or cuda:1"
            + closest(args.device, known)
        ) from None
    if device.type == "cpu":
        return
    count = device_count(device.type)
    if count == 0:
        raise UsageError(
            f"{where}: '{args.device}' asked for, but PyTorch finds no {device.type} device here; "
            "leave the flag out to take the best one present, or give cpu"
        )
    if device.index is not None and device.index >= count:
        raise UsageError(f"{where}: '{args.device}' asked for, but they end at {count - 1}")


def _check_precision(args: Namespace, origins: Origins) -> None:
    if args.amp and args.model_dtype not in (None, "float32"):
        raise UsageError(
            f"{origins['model_dtype']}: {args.model_dtype} weights do not go with --amp; "
            "give one of the two"
        )
    if args.torchscript and args.torchcompile:
        raise UsageError(f"{origins['torchscript']}: does not go with --torchcompile")
    backend = args.torchcompile
    if backend and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UsageError(
            f"{origins['torchcompile']}: torch.compile has no backend '{backend}', "
            f"expected one like inductor or eager{closest(backend, known)}"
        )
    if backend and args.torchcompile_mode:
        mode = args.torchcompile_mode
        _attempt(
            origins["torchcompile_mode"],
            lambda: torch.compile(torch.nn.Identity(), backend=backend, mode=mode),
        )


def _check_data_dir(args: Namespace, origins: Origins) -> None:
    kind = args.dataset.partition("/")[0].lower()
    if args.data_dir is None:
        if not args.dataset and not args.builtin_data:
            raise UsageError(
                f"{origins['dataset']}: a dataset of folders needs --data-dir; "
                "for the built-in one give --dataset sklearn/digits"
            )
        if kind in ("torch", TINY_IMAGENET):
            raise UsageError(f"--data-dir: '{args.dataset}' needs a folder to be in")
        return
    if kind == "sklearn":
        raise UsageError(
            f"{origins['data_dir']}: '{args.data_dir}' would not be read, {args.dataset} is built "
            "in; give --dataset '' too for a dataset of folders"
        )
    # A set that is downloaded makes its own folder, and the other kinds may name an address.
    if kind in ("", TINY_IMAGENET) or (kind == "torch" and not args.dataset_download):
        _check_path(args, origins, "data_dir")


def _check_path(args: Namespace, origins: Origins, key: str) -> None:
    value = getattr(args, key)
    if not value or Path(value).exists():
        return
    raise UsageError(f"{origins[key]}: there is no file or folder '{value}'{closest_path(value)}")


def _check_input(args: Namespace, origins: Origins) -> None:
    if args.input_size and args.in_chans and args.input_size[0] != args.in_chans:
        raise UsageError(
            f"{origins['input_size']}: has {args.input_size[0]} channels, "
            f"but --in-chans is {args.in_chans}"
        )
    sizes = args.img_size and args.input_size and args.input_size[1:]
    if sizes and sizes != [args.img_size] * 2:
        raise UsageError(
            f"{origins['input_size']}: {' x '.join(map(str, sizes))} pixels are not --img-size "
            f"{args.img_size}; give one"
        )
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    for key in ("mean", "std"):
        values = getattr(args, key)
        if values and len(values) not in (1, channels):
            raise UsageError(
                f"{origins[key]}: expected 1 or {channels} values (channels), found {len(values)}"
            )


def _check_ordered_pairs(args: Namespace, origins: Origins) -> None:
    for key in ("scale", "ratio", "cutmix_minmax"):
        pair = getattr(args, key)
        if pair and pair[0] > pair[1]:
            raise UsageError(f"{origins[key]}: expected the lesser value first, found {pair}")
    if args.decay_milestones != sorted(set(args.decay_milestones)):
        raise UsageError(f"{origins['decay_milestones']}: must grow, found {args.decay_milestones}")


def _check_mixing(args: Namespace, origins: Origins) -> None:
    mixed = [key for key in ("mixup", "cutmix", "cutmix_minmax") if getattr(args, key)]
    if mixed and args.batch_size % 2:
        raise UsageError(
            f"{origins['batch_size']}: mixup and cutmix need an even batch, found {args.batch_size}"
        )
    if args.aug_splits == 1:
        raise UsageError(f"{origins['aug_splits']}: must be 0 or at least 2, found 1")
    if mixed and args.aug_splits:
        raise UsageError(f"{origins[mixed[0]]}: mixing does not go with --aug-splits")
    if args.no_aug and args.aug_splits:
        raise UsageError(f"{origins['aug_splits']}: splits of augmented images, but --no-aug")
    if args.split_bn and not args.aug_splits:
        raise UsageError(f"{origins['split_bn']}: needs --aug-splits of at least 2")


def _check_loss(args: Namespace, origins: Origins) -> None:
    """Settle on one loss: `loss` is set, and `bce_loss` and `jsd_loss` agree with it."""
    asked = {args.loss} if args.loss else set()
    asked |= {name for name in ("bce", "jsd") if getattr(args, f"{name}_loss")}
    where = origins["loss" if args.loss else "bce_loss"]
    if len(asked) > 1:
        raise UsageError(f"{where}: several losses asked for, {' and '.join(sorted(asked))}")
    args.loss = asked.pop() if asked else "ce"
    args.bce_loss, args.jsd_loss = args.loss == "bce", args.loss == "jsd"
    if args.loss in MULTILABEL_LOSSES:
        raise UsageError(
            f"{where}: '{args.loss}' is for multi-label training, which is not supported; "
            "use ce, bce, poly or jsd"
        )
    if args.jsd_loss and not args.aug_splits:
        raise UsageError(f"{origins['jsd_loss']}: the jsd loss needs --aug-splits of at least 2")
    if args.bce_pos_weight is None:
        args.bce_pos_weight = args.loss_pos_weight
    elif args.loss_pos_weight not in (None, args.bce_pos_weight):
        raise UsageError(f"{origins['loss_pos_weight']}: --bce-pos-weight says otherwise")
    for key in ("bce_sum", "bce_target_thresh", "bce_pos_weight"):
        if getattr(args, key) not in (None, False) and not args.bce_loss:
            raise UsageError(f"{origins[key]}: needs --bce-loss, the loss is {args.loss}")


def _attempt(where: str, build: Callable[[], Any]) -> None:
    """Let timm build something small, and tell in one line why it will not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is built in earnest warns again
            build()
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"{where}: {' '.join(reason.split())}") from None


def _works(build: Callable[[], Any]) -> bool:
    try:
        _attempt("", build)
    except UsageError:
        return False
    return True


def _check_optimizer(args: Namespace, origins: Origins) -> None:
    """Check the optimizer's name, then all of its arguments by making one for a small layer."""
    known = list_optimizers()
    name = args.opt.lower()
    if name.removeprefix("lookahead_") not in known:
        raise UsageError(
            f"{origins['opt']}: unknown optimizer '{args.opt}'"
            + closest(name, [*known, *(f"lookahead_{opt}" for opt in known)])
        )
    flags = optimizer_kwargs(cfg=args)
    for key in sorted(flags.keys() & args.opt_kwargs.keys()):
        flag = _OPTIMIZER_FLAGS.get(key, f"--{key.replace('_', '-')}")
        raise UsageError(f"{origins['opt_kwargs']}: '{key}' is for {flag} to say")
    settings = {**flags, **args.opt_kwargs}
    for key in ("layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale"):
        settings.pop(key, None)
    where = origins["opt_kwargs" if "opt_kwargs" in args.given else "opt"]

    def build(left_out: str = "") -> None:
        given = {key: value for key, value in settings.items() if key != left_out}
        create_optimizer_v2(torch.nn.Linear(2, 2), **given)

    try:
        _attempt(where, build)
    except UsageError as error:
        reason = str(error).removeprefix(f"{where}: ")
        for key in ("betas", "eps"):
            if key in settings and _works(lambda left_out=key: build(left_out)):
                flag, value = origins[f"opt_{key}"], settings[key]
                if "index out of range" in reason:  # a list of betas
                    reason = f"it needs more than {len(value)}"
                raise UsageError(f"{flag}: {args.opt} does not take {value}: {reason}") from None
        raise


def _check_schedule(args: Namespace, origins: Origins) -> None:
    if args.sched == "plateau" and args.sched_on_updates:
        raise UsageError(f"{origins['sched_on_updates']}: the plateau schedule moves by epochs")
    if args.lr_noise and len(args.lr_noise) > 2:
        raise UsageError(
            f"{origins['lr_noise']}: expected 1 or 2 values, found {len(args.lr_noise)}"
        )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    settings = scheduler_kwargs(args, decreasing_metric=args.eval_metric == "loss")
    lengths: list[int] = []  # with what the kind of schedule adds: prefix, cool-down, cycles

    def build() -> None:
        lengths.append(create_scheduler_v2(optimizer, **settings, updates_per_epoch=10)[1])

    _attempt(origins["sched"], build)
    for key in ("start_epoch", "stop_epoch", "save_epochs"):
        value = getattr(args, key)
        last = max(value) if isinstance(value, list) else value
        if last is not None and last > lengths[0]:
            raise UsageError(f"{origins[key]}: {last} is beyond the run's {lengths[0]} epochs")


# What timm reads in an augmentation policy after its name; without a value it passes a part over.
_POLICY_PARTS = {
    "rand": ("m", "n", "p", "mstd", "mmax", "inc", "t"),
    "augmix": ("m", "w", "d", "a", "b", "mstd"),
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), ("mstd",)),
}


def _check_augmentation_policy(args: Namespace, origins: Origins) -> None:
    if not args.aa:
        return
    builders = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    build = builders.get(args.aa.partition("-")[0], auto_augment_transform)
    hparams = {"translate_const": 100, "img_mean": (124, 116, 104)}
    where = f"{origins['aa']} '{args.aa}'"
    kind, *parts = args.aa.split("-")
    if (known := _POLICY_PARTS.get(kind)) is None:
        raise UsageError(
            f"{where}: unknown policy '{kind}', expected one of {', '.join(_POLICY_PARTS)}"
            + closest(kind, _POLICY_PARTS)
        )
    for part in parts:
        name = re.split(r"\d", part)[0]
        names_set = "t" in known and part.startswith("t")
        if not names_set and (name not in known or name == part):
            raise UsageError(
                f"{where}: unknown part '{part}', expected one of {', '.join(known)} with its value"
            )
    _attempt(where, lambda: build(args.aa, hparams))


def _check_backbone(args: Namespace, origins: Origins) -> None:
    """--backbone-checkpoint names weights or a run, and nothing else loads the trunk."""
    source, where = args.backbone_checkpoint, origins["backbone_checkpoint"]
    if not source:
        return
    for key in ("initial_checkpoint", "pretrained_path", "pretrained"):
        if getattr(args, key):
            raise UsageError(f"{origins[key]}: loads the whole model, {where} its trunk; give one")
    if Path(source).is_file():
        return
    if Path(source).is_dir():
        _attempt(where, lambda: find_weights(source))
        return
    if "/" in source or source.endswith(WEIGHTS_SUFFIXES):
        _check_path(args, origins, "backbone_checkpoint")
    check_model_name(source, where)


def _check_run(args: Namespace, origins: Origins) -> None:
    for key in ("initial_checkpoint", "pretrained_path"):
        _check_path(args, origins, key)
    if args.initial_checkpoint and args.pretrained_path:
        raise UsageError(
            f"{origins['initial_checkpoint']}: loads the whole model, and so does "
            f"{origins['pretrained_path']}; give one"
        )
    _check_backbone(args, origins)
    name = Path(args.experiment)
    if name.is_absolute() or ".." in name.parts:
        raise UsageError(
            f"{origins['experiment']}: expected a folder name under --output, "
            f"found '{args.experiment}'"
        )
    if args.resume == "auto":
        if not args.experiment:
            raise UsageError(
                f"{origins['resume']}: 'auto' needs --experiment, the name of the run to go on with"
            )
    else:
        _check_path(args, origins, "resume")


def check_train_values(args: Namespace, origins: Origins, table: FlagTable) -> None:
    """Check train.py's settings; sets `device`, settles `loss` and resolves `model`.

    Args:
        args: Settings, each of the right type.
        origins: Where each came from.
        table: All flags.

    Raises:
        UsageError: Settings that cannot work, in one line.
    """
    _refuse_unsupported(args, origins, table)
    check_dataset_name(args.dataset, origins["dataset"])
    _check_data_dir(args, origins)
    _check_input(args, origins)
    _check_ordered_pairs(args, origins)
    check_holdout_flags(args, origins)
    check_crop_flags(args, origins)
    _check_mixing(args, origins)
    _check_loss(args, origins)
    _check_run(args, origins)
    _import_device_modules(args, origins)
    check_model_name(args.model, origins["model"])
    args.model, args.model_kwargs = resolve_model(args.model, args.model_kwargs, origins["model"])
    _check_precision(args, origins)
    _check_augmentation_policy(args, origins)
    _check_optimizer(args, origins)
    _check_schedule(args, origins)
    _check_device(args, origins)


def check_validate_values(args: Namespace, origins: Origins, table: FlagTable) -> None:
    """Check validate.py's settings; sets `device` and, by the results file, `results_format`.

    Raises:
        UsageError: Settings that cannot work, in one line.
    """
    _refuse_unsupported(args, origins, table)
    check_dataset_name(args.dataset, origins["dataset"])
    _check_data_dir(args, origins)
    _check_input(args, origins)
    check_holdout_split(args, origins)
    for key in ("checkpoint", "real_labels", "valid_labels"):
        _check_path(args, origins, key)
    suffix = Path(args.results_file).suffix.removeprefix(".").lower()
    if suffix in ("csv", "json") and "results_format" not in args.given:
        args.results_format = suffix
    matrix = args.confusion_matrix
    if matrix and Path(matrix).suffix.lower() != ".png":
        raise UsageError(f"--confusion-matrix: expected a name ending in .png, found '{matrix}'")
    if args.branches and args.real_labels:
        raise UsageError("--branches: counts the split's own labels, so not with --real-labels")
    _import_device_modules(args, origins)
    expand_model_names(args.model, origins["model"])
    _check_precision(args, origins)
    _check_device(args, origins)
