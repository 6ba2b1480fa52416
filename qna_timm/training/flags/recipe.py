"""Recipes: the settings of a run, from command line, YAML and defaults to a checked namespace.

The command line goes before the YAML file, the file before the defaults. Every mistake that can be
found without opening data or making a model is found here, before anything is written.
"""

import sys
from argparse import Namespace
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import yaml

from qna_timm.training.errors import UsageError, closest
from qna_timm.training.flags.checks import check_train_values, check_validate_values
from qna_timm.training.flags.declaration import (
    FlagTable,
    all_flags,
    convert,
    flags_by_key,
    parse_command_line,
)
from qna_timm.training.flags.train import TRAIN_FLAGS
from qna_timm.training.flags.validate import VALIDATE_FLAGS
from qna_timm.training.names import resolve_model

BUILTIN_DATASET = "sklearn/digits"

# What the quickstart recipe sets to suit its own model, optimizer or schedule: beside another one
# it may be refused, and the user, who never wrote it, could not tell why.
_TIED = {
    "model": ("drop_path",),
    "opt": ("opt_kwargs",),
    "sched": ("sched_on_updates",),
    "train_crop_mode": ("scale", "ratio"),
}
# Two ways to say one thing: that of a later layer replaces the other of an earlier one.
_SAME = {"img_size": "input_size", "input_size": "img_size"}
# Given on the command line they are meant for one session, not for those that resume it.
_OF_SESSION = ("start_epoch", "stop_epoch", "no_resume_opt", "resume_anyway")

_POSITIONAL = "DATA (the argument without a flag)"

# Derived by the parser, not settings: they have no flag and are left out of args.yaml.
_DERIVED = ("given", "of_session", "builtin_data")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping.

        Raises:
            yaml.constructor.ConstructorError: A key is there twice.
        """
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key '{key}' is there twice", problem_mark=key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _load_yaml(path: Path) -> dict[Hashable, Any]:
    """Read a YAML file that holds one mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not a text file, expected YAML") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UsageError(f"{path}: {line}is not YAML that can be read: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UsageError(f"{path}: expected lines of 'key: value', found a {kind}")
    return content


def read_recipe(path: Path, table: FlagTable) -> dict[str, Any]:
    """Read a flat YAML recipe into converted values, by key.

    A key is a flag's name with underscores or dashes; null stands for the default.

    Args:
        path: The YAML file.
        table: Flags that are valid keys.

    Raises:
        UsageError: The file cannot be read or is no mapping, a key is unknown or there twice, or a
            value is of the wrong type or out of range.
    """
    aliases = {
        option.lstrip("-").replace("-", "_"): flag
        for flag in all_flags(table)
        if flag.yaml
        for option in flag.options
        if option.startswith("--") or not option.startswith("-")
    }
    values: dict[str, Any] = {}
    for name, value in _load_yaml(path).items():
        flag = aliases.get(str(name).replace("-", "_"))
        if flag is None:
            raise UsageError(f"{path}: unknown key '{name}'{closest(str(name), aliases)}")
        if flag.key in values:
            raise UsageError(f"{path}: key '{name}' is there twice (as '{flag.key}')")
        values[flag.key] = convert(flag, value, f"{path}: key '{name}'")
    return values


def _merge(
    table: FlagTable, layers: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[Namespace, dict[str, str]]:
    """Lay settings over defaults, later layers first in rank; also tell where each came from.

    Args:
        table: All flags.
        layers: Label of a layer ("" for the command line, else its file) and its values.
    """
    flags = flags_by_key(table)
    args = Namespace(**{key: flag.fresh_default() for key, flag in flags.items()})
    origins = {key: flag.long for key, flag in flags.items()}
    for label, values in layers:
        for key, value in values.items():
            if value and key in _SAME and not values.get(_SAME[key]):
                setattr(args, _SAME[key], None)
            setattr(args, key, value)
            origins[key] = f"{label}: key '{key}'" if label else flags[key].long
    return args, origins


def _without_positional(label: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of settings, as in `_merge`, with its positional data folder as data_dir."""
    values = dict(values)
    folder, named = values.pop("data", None), values.get("data_dir")
    if folder and named and folder != named:
        where = f"{label}: key 'data_dir'" if label else "--data-dir"
        other = "key 'data'" if label else _POSITIONAL
        raise UsageError(
            f"{where}: two data folders are named, '{named}' and, by {other}, '{folder}'; give one"
        )
    return {**values, "data_dir": folder} if folder else values


def _tell_positional(command: Mapping[str, Any], origins: dict[str, str]) -> None:
    if command.get("data"):
        origins["data_dir"] = _POSITIONAL


def _without_tied(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what is tied to a choice of its own that `given` makes otherwise."""
    dropped = {
        key
        for choice, keys in _TIED.items()
        if given.get(choice, recipe.get(choice)) != recipe.get(choice)
        for key in keys
    }
    return {key: value for key, value in recipe.items() if key not in dropped}


def _smoke_side(args: Namespace) -> int:
    """Side of a smoke run's images: small, and a multiple of 32 to suit every stride."""
    side = args.input_size[-1] if args.input_size else args.img_size or 0
    # A recipe for larger images is about its windows and tables: leave these something to do.
    least = 64 if side > 224 else 32
    name, kwargs = resolve_model(args.model, args.model_kwargs)
    name = kwargs.get("backbone", name)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    smallest = (getattr(config, "min_input_size", None) or (3, 1, 1))[-1]
    return max(least, -(-smallest // 32) * 32)


def _apply_smoke(args: Namespace, command: Mapping[str, Any]) -> None:
    """Shrink a recipe to two updates on a few small digits, leaving its other keys in force.

    The schedule keeps its length and stops after one epoch, so that warm-up, milestones and decays
    are still built as the recipe asks.

    Args:
        args: Settings, changed in place.
        command: Those given on the command line: a file named in the recipe alone may be missing.
    """
    args.dataset, args.data_dir, args.builtin_data = BUILTIN_DATASET, None, False
    args.train_split, args.val_split, args.class_map = "train", "validation", ""
    args.train_num_samples, args.val_num_samples = None, 8
    args.dataset_download = args.pretrained = args.log_wandb = False
    if "pretrained_path" not in command and not Path(args.pretrained_path or "").is_file():
        args.pretrained_path = None
    if "backbone_checkpoint" not in command and not Path(args.backbone_checkpoint).is_file():
        args.backbone_checkpoint = ""
    args.batch_size, args.validation_batch_size = min(args.batch_size, 2), 8
    args.grad_accum_steps = min(args.grad_accum_steps, 2)
    args.workers = 0
    args.img_size = _smoke_side(args)
    if args.input_size:
        args.input_size = [args.input_size[0], args.img_size, args.img_size]
    if "img_size" in args.model_kwargs:
        args.model_kwargs = {**args.model_kwargs, "img_size": args.img_size}
    args.num_classes = None
    args.max_steps, args.stop_epoch, args.save_epochs, args.log_interval = 2, 1, None, 1


def parse_train_args(
    argv: Sequence[str] | None = None, quickstart: Path | None = None
) -> Namespace:
    """Parse and check the settings of train.py.

    Args:
        argv: Arguments after the script's name; those of this process when None.
        quickstart: Recipe whose values become defaults when no data is named.

    Returns:
        Every flag by timm's name for it (`batch_size`, `data_dir`, ...), and `given`, the values
        that command line and YAML set, `of_session`, what the command line says of this session
        alone, and `builtin_data`, whether the built-in dataset was taken
        because no data was named. `device` is never None.

    Raises:
        UsageError: Anything wrong with them, in one line.
        SystemExit: `--help` was asked for.
    """
    command = parse_command_line(
        TRAIN_FLAGS,
        sys.argv[1:] if argv is None else argv,
        "train.py",
        "Train any timm or qna_timm model. With no data named it learns handwritten digits, by "
        "configs/quickstart.yaml in place of the defaults below.",
    )
    layers: list[tuple[str, Mapping[str, Any]]] = [("", _without_positional("", command))]
    if command.get("config"):
        label = str(Path(command["config"]))
        recipe = read_recipe(Path(label), TRAIN_FLAGS)
        layers.insert(0, (label, _without_positional(label, recipe)))
    given = {key: value for _, values in layers for key, value in values.items()}
    builtin = not any(key in given for key in ("data_dir", "dataset"))
    if builtin and quickstart is not None:
        defaults = _without_tied(read_recipe(quickstart, TRAIN_FLAGS), given)
        layers.insert(0, (str(quickstart), defaults))
    args, origins = _merge(TRAIN_FLAGS, layers)
    if builtin:
        args.dataset = BUILTIN_DATASET
    args.given, args.builtin_data = given, builtin
    args.of_session = [key for key in _OF_SESSION if key in command]
    _tell_positional(command, origins)
    del args.data
    if args.smoke:
        _apply_smoke(args, command)
    check_train_values(args, origins, TRAIN_FLAGS)
    if args.smoke and args.device == "cpu":
        # Most CPUs emulate float16: 15 times slower than float32 on a smoke run here.
        args.amp_dtype = "bfloat16"
    return args


def parse_validate_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse and check the settings of validate.py.

    Args:
        argv: Arguments after the script's name; those of this process when None.

    Returns:
        Every flag by timm's name for it, and `given`, the values set on the command line, and
        `builtin_data`, whether no data was named (`dataset` is then left empty: the checkpoint may
        know better). `device` is never None.

    Raises:
        UsageError: Anything wrong with them, in one line.
        SystemExit: `--help` was asked for.
    """
    command = parse_command_line(
        VALIDATE_FLAGS,
        sys.argv[1:] if argv is None else argv,
        "validate.py",
        "Measure top-1, top-5, loss and speed of any timm or qna_timm model or checkpoint.",
    )
    given = _without_positional("", command)
    args, origins = _merge(VALIDATE_FLAGS, [("", given)])
    args.given = given
    args.builtin_data = not any(key in given for key in ("data_dir", "dataset"))
    _tell_positional(command, origins)
    del args.data
    check_validate_values(args, origins, VALIDATE_FLAGS)
    return args


def as_yaml_dict(args: Namespace) -> dict[str, Any]:
    """Settings of a run as flat plain values that `--config` reads back.

    The device is kept only where it was asked for, so that a run made on one machine can be
    repeated on another.
    """
    left_out = (*_DERIVED, "config")
    values = {key: value for key, value in vars(args).items() if key not in left_out}
    values["device"] = args.given.get("device")
    return values


def as_recipe(args: Namespace) -> dict[str, Any]:
    """`as_yaml_dict` without what was meant for one session: what later ones start from."""
    return {key: v for key, v in as_yaml_dict(args).items() if key not in args.of_session}
