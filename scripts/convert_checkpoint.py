#!/usr/bin/env python
"""Convert a released checkpoint to a safetensors file that timm, train.py and validate.py load.

python scripts/convert_checkpoint.py checkpoint_375300 --model qna_vit_tiny --out tiny.safetensors
python scripts/convert_checkpoint.py last.pth.tar --model ga_convnext_tiny --out ga.safetensors
python scripts/convert_checkpoint.py x_ckpt.tar --model sa_resnet_large_local --out sa.safetensors
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.utils import ParseKwargs
from torch import Tensor, nn

from qna_timm.convert import (
    ConversionError,
    cswin_state_dict,
    gramian_state_dict,
    qna_vit_state_dict,
    read_flax_checkpoint,
    span_state_dict,
)
from qna_timm.convert.common import HEAD_NAMES, some
from qna_timm.models import CSWin, GramianNet, QnAViT, SAResNet  # and registers the models
from qna_timm.training.errors import UsageError, closest, missing_package, run_cli
from qna_timm.training.flags.declaration import OneLineParser
from qna_timm.training.names import unknown_argument
from qna_timm.training.storage.checkpoint import METADATA_KEY, read_weights
from qna_timm.training.storage.files import save_tensors


@dataclass(frozen=True)
class Release:
    """How the checkpoints of one release are read and converted.

    Args:
        model_class: What the models are instances of.
        classifier_bias: Name in the file of a tensor whose length is the number of classes.
        convert: From the file's tensors and the model to the model's tensors.
        is_flax: A msgpack file or folder instead of a PyTorch or safetensors file.
    """

    model_class: type[nn.Module]
    classifier_bias: str
    convert: Callable[..., dict[str, Tensor]]
    is_flax: bool = False

    def read(self, args: argparse.Namespace) -> Mapping[str, Any]:
        """The file's arrays or tensors by name."""
        if self.is_flax:
            return read_flax_checkpoint(args.checkpoint)
        return read_weights(args.checkpoint, args.use_ema)[0]


# By the beginning of the model's name
RELEASES = {
    "qna_vit_": Release(
        QnAViT, "ClassificationHead_0/head_logits/bias", qna_vit_state_dict, is_flax=True
    ),
    "ga_": Release(GramianNet, "fc.0.bias", gramian_state_dict),
    "cswin_": Release(CSWin, "head.bias", cswin_state_dict),
    "sa_resnet": Release(SAResNet, "dense.bias", span_state_dict),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="QnA-ViT: Flax msgpack checkpoint, or a folder of checkpoint_<step> files (the newest"
        " is read); all others: PyTorch or safetensors file",
    )
    parser.add_argument("--model", required=True, help="model name, such as qna_vit_tiny")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument(
        "--num-classes",
        type=int,
        default=None,
        help="classes wanted; another number than the file's leaves the classifier out",
    )
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="NAME=VALUE",
        help="arguments of the model, for other constructions than the named ones",
    )
    parser.add_argument(
        "--use-ema",
        action="store_true",
        help="take the averaged weights of a PyTorch file that holds both",
    )
    return parser.parse_args(argv)


def _check_args(args: argparse.Namespace) -> Release:
    names = [name for start in RELEASES for name in timm.list_models(f"{start}*")]
    if args.model not in names:
        families = ", ".join(f"{start}*" for start in RELEASES)
        raise UsageError(
            f"--model {args.model}: no converter for this model, only for {families}"
            f"{closest(args.model, names)}"
        )
    if args.out.suffix != ".safetensors":
        raise UsageError(f"--out {args.out}: the name must end in .safetensors")
    if args.out.is_dir():
        raise UsageError(f"--out {args.out}: is a folder")
    if not args.out.parent.is_dir():
        raise UsageError(f"--out {args.out}: no such folder {args.out.parent}")
    if args.num_classes is not None and args.num_classes < 0:
        raise UsageError(f"--num-classes {args.num_classes}: must be 0 or more")
    release = next(value for start, value in RELEASES.items() if args.model.startswith(start))
    if release.is_flax and args.use_ema:
        raise UsageError(f"--use-ema: {args.model}'s checkpoints hold one set of weights")
    if release.is_flax and importlib.util.find_spec("msgpack") is None:
        raise UsageError(missing_package(f"--model {args.model}", "msgpack", "convert"))
    return release


def _describe(args: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    return {
        "arch": args.model,
        "num_classes": num_classes,
        "in_chans": 3,
        "model_kwargs": args.model_kwargs,
        "class_names": None,
        "source": args.checkpoint.name,
    }


def _create_model(args: argparse.Namespace, release: Release, num_classes: int) -> nn.Module:
    """On the meta device: names and shapes are all that is asked of it."""
    try:
        model = timm.create_model(
            args.model, num_classes=num_classes, device="meta", **args.model_kwargs
        )
    except TypeError as error:
        said = unknown_argument(error, args.model_kwargs)
        raise UsageError(said or f"--model-kwargs {args.model_kwargs}: {error}") from None
    except (ValueError, LookupError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise UsageError(f"--model-kwargs {args.model_kwargs}: {error}") from None
    if not isinstance(model, release.model_class):
        raise UsageError(f"--model-kwargs {args.model_kwargs}: features_only cannot be converted")
    return model


def _count_classes(tensors: Mapping[str, Any], release: Release) -> int:
    bias = tensors.get(release.classifier_bias, tensors.get("head.fc.bias"))
    return 0 if bias is None or bias.ndim == 0 else bias.shape[-1]


def main(argv: list[str] | None = None) -> None:
    """Read, convert, check against the model, write."""
    args = parse_args(argv)
    release = _check_args(args)
    try:
        tensors = release.read(args)
        found = _count_classes(tensors, release)
        model = _create_model(args, release, found)
        state_dict = release.convert(tensors, model, exact=True)
    except (ConversionError, OSError) as error:
        reason = str(error).removeprefix(args.checkpoint.name).lstrip(": ")
        raise UsageError(f"{args.checkpoint}: {reason}") from None
    wanted = found if args.num_classes is None else args.num_classes
    if wanted != found:
        for name in HEAD_NAMES:
            state_dict.pop(name, None)
        print(
            f"the file has {found} classes, {wanted} were asked for: its trunk is kept, "
            "the classifier will be fresh"
        )
    if bad := [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]:
        print(f"warning: numbers that are not finite in {some(bad)}", file=sys.stderr)
    metadata = _describe(args, found if wanted == found else 0)
    save_tensors(args.out, state_dict, {METADATA_KEY: json.dumps(metadata)})
    total = sum(tensor.numel() for tensor in state_dict.values())
    print(f"{args.out}: {args.model}, {total:,} values, {metadata['num_classes']} classes")


if __name__ == "__main__":
    run_cli(main)
