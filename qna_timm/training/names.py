"""Names that users misspell: models and datasets, checked against who knows them."""

import inspect
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm

from qna_timm.training.errors import UsageError, closest

TORCH_DATASETS = (
    "cifar10",
    "cifar100",
    "mnist",
    "kmnist",
    "qmnist",
    "fashion_mnist",
    "inaturalist",
    "inat",
    "places365",
    "imagenet",
    "image_folder",
    "folder",
)
"""What timm's factory knows of torchvision, after `torch/`."""

TINY_IMAGENET = "tiny_imagenet"
"""TinyImageNet as its archive unpacks."""

_DATASET_KINDS = ("torch", "hfds", "hfids", "tfds", "wds", "sklearn")
_REMOTE_MODELS = ("hf-hub:", "hf_hub:", "local-dir:")


_MOST_NAMES_SHOWN = 8

_HEADED = "ga_backbone"
_HEADED_PREFIX = "ga_"


def resolve_model(
    name: str, kwargs: Mapping[str, Any], where: str = "--model"
) -> tuple[str, dict[str, Any]]:
    """What a model name stands for: `ga_NAME`, unless registered, is Gramian heads on timm's NAME.

    Args:
        name: Name as given.
        kwargs: More arguments of the constructor.
        where: Begins the error message.

    Returns:
        A registered name, or `name` as it is, and the arguments it takes.

    Raises:
        UsageError: The arguments name another backbone.
    """
    backbone = _backbone_of(name)
    if backbone is None:
        return name, dict(kwargs)
    if kwargs.get("backbone", backbone) != backbone:
        raise UsageError(
            f"{where} {name}: the model arguments name another backbone, '{kwargs['backbone']}'"
        )
    return _HEADED, {"backbone": backbone, **kwargs}


def _backbone_of(name: str) -> str | None:
    """The backbone that `ga_NAME` puts Gramian heads on; None for any other name."""
    backbone = name.removeprefix(_HEADED_PREFIX)
    if backbone == name or timm.is_model(name.partition(".")[0]):
        return None
    return backbone if timm.is_model(backbone.partition(".")[0]) else None


def model_label(name: str, kwargs: Mapping[str, Any]) -> str:
    """The short name of a resolved model: `ga_NAME` for Gramian heads on a backbone."""
    backbone = kwargs.get("backbone")
    return f"{_HEADED_PREFIX}{backbone}" if name == _HEADED and backbone else name


# Arguments of models that flags of their own set.
_FLAG_OF_ARGUMENT = {
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
    "drop_block_rate": "--drop-block",
    "global_pool": "--gp",
    "bn_momentum": "--bn-momentum",
    "bn_eps": "--bn-eps",
}


def refused_model(
    name: str, kwargs: Mapping[str, Any], error: Exception, hint: str = ""
) -> UsageError:
    """What to tell of a model that timm could not create.

    Args:
        name: Of the model, resolved.
        kwargs: Those of ``--model-kwargs``.
        error: As it was raised.
        hint: What may work.
    """
    if said := unknown_argument(error, kwargs):
        return UsageError(said)
    reason = re.split(r"\n|[.] ", str(error).strip() or type(error).__name__)[0]
    reason += f" ({hint})" if hint else ""
    return UsageError(f"--model {model_label(name, kwargs)}: {reason}")


def unknown_argument(error: Exception, kwargs: Mapping[str, Any]) -> str | None:
    """Name the flag behind an argument that a model does not take, and the closest it takes.

    Args:
        error: Raised while the model was created.
        kwargs: Those of ``--model-kwargs``.

    Returns:
        One line; None for other errors.
    """
    found = re.match(r"(\w+)\S*\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        return None
    owner, argument = found.groups()
    if argument in kwargs:
        known = _arguments_known(error, owner)
        return f"--model-kwargs {argument}: {owner} has no such argument{closest(argument, known)}"
    flag = _FLAG_OF_ARGUMENT.get(argument)
    return flag and f"{flag}: {owner} has no argument {argument}"


def _arguments_known(error: Exception, owner: str) -> list[str]:
    """Arguments of the classes that were under construction: the model's, and its part's."""
    classes: list[Any] = []
    trace = error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        # timm's factory has the model's class at hand, whoever calls the part's its name
        classes += [frame.f_locals.get("model_cls"), frame.f_globals.get(owner)]
    signatures = [inspect.signature(cls) for cls in classes if isinstance(cls, type)]
    return list(dict.fromkeys(name for signature in signatures for name in signature.parameters))


def check_model_name(name: str, where: str = "--model") -> None:
    """Check that a model is registered; names of hubs and local folders are left to timm.

    Args:
        name: Model name, with or without the tag of its weights.
        where: Begins the error message.

    Raises:
        UsageError: It is not, or a pattern; the closest names, or those that fit, are given.
    """
    if name.startswith(_REMOTE_MODELS):
        return
    if fitting := _fitting(name, where):
        shown = ", ".join(fitting[:_MOST_NAMES_SHOWN])
        more = len(fitting) - _MOST_NAMES_SHOWN
        shown += f" and {more} more" if more > 0 else ""
        raise UsageError(f"{where}: '{name}' is a pattern, name one model: {shown}")
    name = _backbone_of(name) or name
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        known = timm.list_models()
        if base.startswith(_HEADED_PREFIX):
            plain = [model for model in known if not model.startswith(_HEADED_PREFIX)]
            known += [f"{_HEADED_PREFIX}{model}" for model in plain]
        raise UsageError(f"{where}: unknown model '{name}'{closest(base, known)}")
    tagged = timm.list_models(f"{base}.*", include_tags=True)
    if tag and name not in tagged:
        raise UsageError(f"{where}: model '{base}' has no weights '{tag}'{closest(name, tagged)}")


def _fitting(name: str, where: str = "--model") -> list[str]:
    """The models that a pattern such as `qna_*` fits; none for a plain name.

    Raises:
        UsageError: A pattern fits none.
    """
    if not any(sign in name for sign in "*?["):
        return []
    fitting = [model for model in timm.list_models() if fnmatch(model, name)]
    if not fitting:
        raise UsageError(f"{where}: no model fits the pattern '{name}'")
    return fitting


def expand_model_names(spec: str, where: str = "--model") -> list[str]:
    """List the models that validate.py's --model means.

    Args:
        spec: A name, a comma list, a pattern such as `qna_*`, `all` (every model with published
            weights) or a text file with a name a line.
        where: Begins the error message.

    Returns:
        Registered names, each once.

    Raises:
        UsageError: A name is unknown or a pattern fits none; the closest names are given.
    """
    if spec == "all":
        return timm.list_models(pretrained=True)
    parts = spec.split(",")
    if Path(spec).is_file() and not timm.is_model(spec):
        parts = _read_lines(Path(spec), where)
    models: list[str] = []
    for name in filter(None, (part.strip() for part in parts)):
        if fitting := _fitting(name, where):
            models += fitting
        else:
            check_model_name(name, where)
            models.append(name)
    if not models:
        raise UsageError(f"{where}: '{spec}' names no model")
    return list(dict.fromkeys(models))


def _read_lines(path: Path, where: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{where}: '{path}' is not a text file with model names") from None


def check_dataset_name(name: str, where: str = "--dataset") -> None:
    """Check a dataset's kind and, where the kind's names are known, its name.

    Args:
        name: KIND/NAME, or empty for a folder or archive.
        where: Begins the error message.

    Raises:
        UsageError: Neither of the known kinds, or not one of its names; the closest are given.
    """
    if not name:
        return
    kind, _, rest = name.partition("/")
    kind = kind.lower()
    known = ["sklearn/digits", TINY_IMAGENET, *(f"torch/{dataset}" for dataset in TORCH_DATASETS)]
    if name.lower() == TINY_IMAGENET:
        return
    near = closest(name, known) or closest(rest or name, known)
    if kind not in _DATASET_KINDS or not rest:
        kinds = ", ".join(f"{valid}/NAME" for valid in _DATASET_KINDS[:-1])
        near = near or closest(name, [f"{valid}/{rest}" for valid in _DATASET_KINDS[:-1]])
        raise UsageError(
            f"{where}: unknown dataset '{name}', expected sklearn/digits, {TINY_IMAGENET}, "
            f"{kinds}, or nothing for a folder{near}"
        )
    if kind in ("torch", "sklearn") and name.lower() not in known:
        raise UsageError(f"{where}: unknown dataset '{name}'{near}")
