"""The model of a training run: created by timm, given its weights, prepared for its device."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, get_model_args, load_pretrained, resolve_model_input_args
from torch import Tensor, nn
from torch.utils.data import Dataset

from qna_timm.convert import ConversionError
from qna_timm.training.data.datasets import dataset_classes
from qna_timm.training.errors import UsageError
from qna_timm.training.gramian_task import has_branches
from qna_timm.training.names import model_label, refused_model
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.span_task import has_spans
from qna_timm.training.storage.checkpoint import (
    check_weights,
    classes_of,
    classifier_names,
    find_weights,
    is_classifier_key,
    read_weights,
)
from qna_timm.training.task import classifier_layers

_logger = logging.getLogger(__name__)

_MOST_NAMES = 3  # of classes, in a message


def choose_classes(
    args: argparse.Namespace, dataset: Dataset
) -> tuple[int | None, list[str] | None]:
    """Number of classes for the model (None: its own) and the classes' names.

    Raises:
        UsageError: ``--num-classes`` is less than what the data has.
    """
    found, names = dataset_classes(dataset)
    if args.num_classes is None or found is None:
        return args.num_classes or found, names
    if args.num_classes < found:
        raise UsageError(
            f"--num-classes {args.num_classes}: the data has {found} classes (leave the flag out"
            " to take them from the data)"
        )
    return args.num_classes, names


def build_model(
    args: argparse.Namespace, num_classes: int | None, class_names: Sequence[str] | None = None
) -> nn.Module:
    """Create the model that the flags name, with its first weights.

    Args:
        args: Flags.
        num_classes: Classes of the data or of ``--num-classes``; None leaves the model's own.
        class_names: Of the data, where they are known: a classifier of others is not loaded.

    Raises:
        UsageError: timm refuses the name, an argument or the image size; the weights' file is not
            one, or not of this model; a flag asks for what the model does not have.
    """
    if args.fast_norm:
        set_fast_norm()
    model = _create(args, num_classes)
    _check_branches(args, model)
    _check_spans(args, model)
    if args.backbone_checkpoint:
        load_backbone(model, args.backbone_checkpoint)
    if args.pretrained_path:
        load_as_pretrained(model, args.pretrained_path, class_names)
    if args.initial_checkpoint:
        load_initial(model, args.initial_checkpoint, class_names)
    _initialise_head(model, args.head_init_scale, args.head_init_bias)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except (AttributeError, AssertionError) as error:
            raise UsageError(f"--grad-checkpointing: {args.model} does not support it") from error
    return model


def _create(args: argparse.Namespace, num_classes: int | None) -> nn.Module:
    kwargs: dict[str, Any] = {
        "in_chans": args.in_chans,
        "num_classes": num_classes,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        "drop_block_rate": args.drop_block,
        "global_pool": args.gp,
        "bn_momentum": args.bn_momentum,
        "bn_eps": args.bn_eps,
        "pretrained_cfg_overlay": args.pretrained_cfg_overlay or None,
        **args.model_kwargs,
    }
    file = (args.pretrained_cfg_overlay or {}).get("file")
    if args.pretrained and file and not Path(file).is_file():
        raise UsageError(f"--pretrained-cfg-overlay file={file}: there is no such file")
    try:
        resolved = resolve_model_input_args(args.model, vars(args), **kwargs)
        # a file goes before what is published, as in timm
        pretrained = args.pretrained and not args.pretrained_path
        return create_model(pretrained=pretrained, scriptable=args.torchscript, **resolved)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        hint = ""
        if args.pretrained:
            hint = "--pretrained-path FILE starts from weights on this machine"
            if model_label(args.model, args.model_kwargs) != args.model:
                hint += (
                    f", --backbone-checkpoint {args.model_kwargs['backbone']} from its backbone's"
                )
        if args.gp and "pool" in str(error):
            raise UsageError(f"--gp {args.gp}: {args.model}: {error}") from error
        raise refused_model(args.model, args.model_kwargs, error, hint) from error


def _check_branches(args: argparse.Namespace, model: nn.Module) -> None:
    """See that flags about branches meet a model that has them, and the reverse."""
    branched = has_branches(model)
    if args.ga_lam and not branched:
        hint = "" if has_spans(model) else f" (--model ga_{args.model} puts Gramian heads on it)"
        raise UsageError(
            f"--ga-lam {args.ga_lam:g}: {args.model} has no branches to decorrelate{hint}"
        )
    if args.torchscript and branched:
        raise UsageError(
            f"--torchscript: a scripted {args.model} returns the mean of its branches alone, but"
            " each is trained for itself; --torchcompile works"
        )


def _check_spans(args: argparse.Namespace, model: nn.Module) -> None:
    """See that flags about learned windows meet a model that has them, and the reverse."""
    learned = has_spans(model)
    if args.span_penalty and not learned:
        raise UsageError(
            f"--span-penalty {args.span_penalty:g}: {args.model} learns no windows"
            " (the sa_resnet_*_adaptive models do)"
        )
    if learned and has_branches(model):
        raise UsageError(
            f"--model {args.model}: learned windows under Gramian heads have no common objective;"
            " take the backbone alone, or one with fixed windows"
        )
    if learned and args.torchscript:
        raise UsageError(
            f"--torchscript: the learned windows of a scripted {args.model} are out of reach of"
            " their penalty and bounds; --torchcompile works"
        )


def load_backbone(model: nn.Module, source: str) -> None:
    """Load a backbone, trained for itself, into the trunk of a model with Gramian heads.

    Args:
        model: The model.
        source: A file, a run folder, or timm's name of a model with published weights.

    Raises:
        UsageError: The model has no such trunk, or the source cannot be read or does not fit.
    """
    where = f"--backbone-checkpoint {source}"
    if Path(source).is_dir():
        source = str(find_weights(source))
    if not hasattr(model, "load_backbone"):
        name = model.pretrained_cfg.get("architecture", type(model).__name__)
        raise UsageError(
            f"{where}: {name} is a backbone itself; --pretrained-path or --initial-checkpoint load"
            " its weights"
        )
    try:
        report = model.load_backbone(source)
    except ConversionError as error:
        reason = " ".join(str(error).split()).removeprefix(f"{source}: ")
        raise UsageError(f"{where}: {reason}") from error
    _logger.info("backbone %s: %s", source, report)


def load_as_pretrained(
    model: nn.Module, path: str, class_names: Sequence[str] | None = None
) -> None:
    """Load a file as timm loads published weights: other names, input channels and sizes adapted.

    The classifier is taken over if it has the model's classes, by number and, where file and data
    have names, by name; else it stays fresh, which is said.

    Raises:
        UsageError: Not a checkpoint, or not of this model.
    """
    weights, metadata = read_weights(path, prefer_ema=True)
    others = _other_classes(metadata, class_names)
    own_head = _fresh_head(model, weights, others)
    fresh = {key: value for key, value in own_head.items() if key in weights}
    found = {key: weights[key] for key in fresh}
    config = {
        **model.pretrained_cfg,
        "state_dict": {**weights, **fresh},
        "num_classes": model.num_classes,
        "label_offset": 0,
    }
    if "in_chans" in metadata:
        config["input_size"] = (metadata["in_chans"], *config["input_size"][1:])
    model_filter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)

    def fit_to_model(state: dict[str, Tensor], target: nn.Module) -> dict[str, Tensor]:
        state = model_filter(state, target) if model_filter else state
        # In a file of other names the classifier is only known now.
        late = _fresh_head(target, state, others)
        fresh.update(late)
        found.update({key: state[key] for key in late if key in state})
        return {**state, **late}

    try:
        load_pretrained(
            model,
            config,
            num_classes=model.num_classes,
            in_chans=getattr(model, "in_chans", 3),
            filter_fn=fit_to_model,
        )
    except (RuntimeError, KeyError, ValueError, AssertionError):
        # Say it in one line if the tensors do not fit; else it is not about the file.
        check_weights(model, {**weights, **own_head}, metadata, path)
        raise
    _report_weights(path, model, found, fresh, others, metadata.get("ema", False))


def load_initial(model: nn.Module, path: str, class_names: Sequence[str] | None = None) -> None:
    """Load a checkpoint of this very model; with other classes the classifier stays fresh.

    Raises:
        UsageError: Not a checkpoint, or not of this model.
    """
    weights, metadata = read_weights(path, prefer_ema=True)
    others = _other_classes(metadata, class_names)
    fresh = _fresh_head(model, weights, others)
    check_weights(model, {**weights, **fresh}, metadata, path)
    model.load_state_dict({**weights, **fresh})
    _report_weights(path, model, weights, fresh, others, metadata.get("ema", False))


def _other_classes(metadata: Mapping[str, Any], names: Sequence[str] | None) -> str:
    """In words what a checkpoint and the data call their classes, where that differs; or ''."""
    trained = metadata.get("class_names")
    if not trained or not names or list(trained) == list(names):
        return ""
    if sorted(trained) == sorted(names):
        return "the same classes in another order"
    theirs, ours = (
        ", ".join(some[:_MOST_NAMES]) + ", ..." * (len(some) > _MOST_NAMES)
        for some in (trained, names)
    )
    return f"other classes ({theirs}; the data: {ours})"


def _fresh_head(
    model: nn.Module, weights: Mapping[str, Tensor], others: str = ""
) -> dict[str, Tensor]:
    """The model's own classifier tensors that the checkpoint lacks or has for other classes."""
    return {
        key: value
        for key, value in model.state_dict().items()
        if is_classifier_key(model, key)
        and (others or key not in weights or weights[key].shape != value.shape)
    }


def _report_weights(
    path: str,
    model: nn.Module,
    found: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    others: str,
    is_ema: bool,
) -> None:
    """Say what was loaded, and that a classifier is fresh where the one `found` did not fit."""
    _logger.info("weights%s: %s", ", averaged" if is_ema else "", path)
    if fresh:
        classes = {classes_of(key, found[key]) for key in fresh if key in found}
        has = f"{min(classes)} classes" if classes else "no classifier"
        names = ", ".join(classifier_names(model))
        if classes == {model.num_classes} and others:
            _logger.warning(
                "%s has %s: its classifier (%s) is fresh, the rest is loaded", path, others, names
            )
            return
        _logger.warning(
            "%s has %s, the model %d: its classifier (%s) is fresh, the rest is loaded",
            path, has, model.num_classes, names,
        )  # fmt: skip


def _initialise_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Scale the classifier, biases too as timm does, or fill its biases."""
    if scale is None and bias is None:
        return
    layers = [layer for layer in classifier_layers(model) if hasattr(layer, "weight")]
    if not layers:
        raise UsageError("--head-init-scale, --head-init-bias: the model has no classifier")
    with torch.no_grad():
        for layer in layers:
            if scale is not None:
                layer.weight.mul_(scale)
                if layer.bias is not None:
                    layer.bias.mul_(scale)
            if bias is not None and layer.bias is not None:
                layer.bias.fill_(bias)


def prepare_model(model: nn.Module, args: argparse.Namespace, processes: Processes) -> nn.Module:
    """Move the model to its device, memory layout and precision, and convert its batch norms.

    Raises:
        UsageError: ``--sync-bn`` or ``--split-bn`` where they cannot work.
    """
    if args.split_bn:
        if args.aug_splits < 2 and not args.resplit:
            raise UsageError("--split-bn needs --aug-splits of 2 or more, or --resplit")
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    model = model.to(device=processes.device, dtype=dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.sync_bn and processes.distributed:
        if processes.device.type == "cpu":
            raise UsageError("--sync-bn works on GPUs only, this run is on the CPU")
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        if args.torchcompile or (args.sync_bn and processes.distributed):
            raise UsageError("--torchscript goes with neither --torchcompile nor --sync-bn")
        model = script(model, args.model)
    return model


def script(model: nn.Module, name: str) -> nn.Module:
    """The model as TorchScript.

    Args:
        model: In the mode it will be used in.
        name: What the error message calls it.

    Raises:
        UsageError: TorchScript cannot read the model.
    """
    try:
        return torch.jit.script(model)
    except (RuntimeError, TypeError, torch.jit.frontend.FrontendError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
        raise UsageError(
            f"--torchscript: {name} cannot be scripted ({reason}); --torchcompile may work"
        ) from error


def input_config(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Size, normalisation and crop of the images, from flags and model.

    Raises:
        UsageError: flags that do not go together.
    """
    try:
        return resolve_input_data_config(model, vars(args))
    except (ValueError, AssertionError) as error:
        raise UsageError(f"--img-size, --input-size, --in-chans, --mean, --std: {error}") from error


def _found_from_anywhere(path: str) -> str:
    """A file's absolute path; as it is if it is to be looked for in the data folder."""
    return os.path.abspath(path) if os.path.exists(path) else path


def describe(
    args: argparse.Namespace,
    model: nn.Module,
    data_config: dict[str, Any],
    class_names: list[str] | None,
) -> dict[str, Any]:
    """The checkpoints' metadata; `qna_timm.training.storage.checkpoint` lists the keys."""
    model_args = get_model_args(model)
    # Weights that a trunk started from are no part of the model that is saved.
    model_args.pop("backbone_pretrained", None)
    dataset_keys = (
        "dataset", "train_split", "val_split", "input_img_mode", "input_key", "target_key",
        "val_num_samples", "val_fraction", "val_seed",
    )  # fmt: skip
    return {
        "arch": model.pretrained_cfg.get("architecture", args.model),
        "num_classes": model_args.pop("num_classes", model.num_classes),
        "in_chans": model_args.pop("in_chans", data_config["input_size"][0]),
        "model_kwargs": model_args,
        "img_size": list(data_config["input_size"][1:]),
        "data_config": data_config,
        "class_names": class_names,
        "dataset": {
            **{key: getattr(args, key) for key in dataset_keys},
            "data_dir": args.data_dir and os.path.abspath(args.data_dir),
            "class_map": _found_from_anywhere(args.class_map),
        },
    }
