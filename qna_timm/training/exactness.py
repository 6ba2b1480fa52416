"""Whether a resumed run can go on exactly: with the saved one's settings, data and versions."""

import logging
import platform
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import PIL
import timm
import torch
import torchvision

import qna_timm
from qna_timm.ops.compiled import compiled_attention
from qna_timm.training.data.fingerprint import fingerprint
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.declaration import flags_by_key
from qna_timm.training.flags.exact import DATA_PLACE, EXACT, OPTIMIZER, SCHEDULE
from qna_timm.training.flags.train import TRAIN_FLAGS
from qna_timm.training.processes.distributed import process_place

__all__ = ["check_exact", "differences", "fingerprint", "versions"]

# `resume.restore` tells the learning rate that these come to.
_TOLD_BY_OPTIMIZER = frozenset({"lr", "lr_base", "lr_base_size", "lr_base_scale"})
_FLAGS = flags_by_key(TRAIN_FLAGS)
_OPTIMIZER_FLAGS = frozenset(_FLAGS[key].long for key in OPTIMIZER)

_logger = logging.getLogger(__name__)


def versions(device: torch.device) -> dict[str, str]:
    """What computes, to be called once the run is set up: versions, device, precision switches.

    Args:
        device: Where the run computes.
    """
    cudnn = torch.backends.cudnn
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "qna_timm": qna_timm.__version__,
        "device": device.type,
        "deterministic algorithms": _shown(torch.are_deterministic_algorithms_enabled()),
        "deterministic cudnn": _shown(cudnn.deterministic),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "hardware": _hardware(device),
        "processes": str(process_place()[1]),
    }


def _hardware(device: torch.device) -> str:
    """What the last bits of results depend on besides: ``NVIDIA H100``, ``cpu AVX2, 2 threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    capability = torch.backends.cpu.get_cpu_capability()
    kind = compiled_attention()
    compiled = f" with compiled attention ({kind})" if kind else ""
    return f"cpu {capability}{compiled}, {torch.get_num_threads()} threads"


def differences(
    saved_args: Mapping[str, Any],
    args: Mapping[str, Any],
    saved_data: Mapping[str, Any] | None,
    data: Mapping[str, Any] | None,
    saved_versions: Mapping[str, str] | None,
    versions: Mapping[str, str] | None,
    *,
    same_plan: bool = False,
) -> list[str]:
    """What keeps a resumed run from being the saved one, one phrase each; none where it is.

    Args:
        saved_args: Flags of the saved run by key. A flag that it did not know had its default.
        args: Flags of this run.
        saved_data: `fingerprint` of the saved run's data; None where unknown, as in
            what follows.
        data: The same of this run's.
        saved_versions: `versions` of the saved run.
        versions: The same of this run.
        same_plan: Whether processes and ``--grad-accum-steps`` give the saved number of shards per
            update.
    """
    required = set(EXACT | {"batch_size"})
    if not args.get("no_resume_opt"):
        required |= OPTIMIZER
    if args.get("val_interval") == 1:
        required -= {"save_epochs"}  # every row has metrics anyway
    if not same_plan:
        required |= {"grad_accum_steps"}
    if not _same_known_samples(saved_data, data):
        required |= DATA_PLACE
    if data is not None and any(part["stream"] for part in data.values()):
        required |= {"workers"}  # they share a stream out
    return [
        *_changed_flags(saved_args, args, required),
        *_changed_versions(saved_versions, versions, {"processes"} if same_plan else set()),
        *_changed_data(saved_data, data),
    ]


def check_exact(
    where: str | Path,
    state: Mapping[str, Any],
    args: Namespace,
    identity: Mapping[str, Mapping[str, Any]],
) -> None:
    """See that a resumed run can go on exactly, and log what has changed without harm.

    Args:
        where: The folder or file to resume from, for messages.
        state: The saved state: its ``args``, ``plan`` (`ShardPlan` as a dictionary, None of a
            stream), ``data`` and ``versions``.
        args: Flags of this run.
        identity: ``data``, the `fingerprint`, and ``versions`` of this run.

    Raises:
        UsageError: It cannot, and ``--resume-anyway`` is not given.
    """
    saved_args, now, plan = state["args"], vars(args), state["plan"]
    data, saved_data = identity["data"], state["data"]
    found_versions, saved_versions = identity["versions"], state["versions"]
    shards = args.grad_accum_steps * process_place()[1]
    same_plan = plan is not None and plan["shards_per_update"] == shards
    found = differences(
        saved_args, now, saved_data, data, saved_versions, found_versions, same_plan=same_plan
    )
    if found and not args.resume_anyway:
        raise UsageError(
            f"--resume {where}: cannot go on exactly: {', '.join(found)}; {_advice(found)}"
        )
    if found := [*found, *_asked(saved_args, now)]:
        _logger.warning("--resume %s: does not go on exactly: %s", where, ", ".join(found))
    _tell_machine(saved_versions, found_versions, same_plan)
    known = DATA_PLACE if _same_known_samples(saved_data, data) else frozenset()
    harmless = _changed_flags(saved_args, now, SCHEDULE - _TOLD_BY_OPTIMIZER | known)
    if harmless:
        _logger.info("changed since the state was saved: %s", ", ".join(harmless))


def set_aside_repeated(args: Namespace, saved_args: Mapping[str, Any]) -> Namespace:
    """The flags of a run that goes on in its own folder, without what they ask for once more.

    A command that is given again to go on does not start over: its ``--start-epoch`` and, unless
    the optimizer is another now, its ``--no-resume-opt`` have had their effect.

    Args:
        args: Flags of this run.
        saved_args: Those of the state.
    """
    kept = Namespace(**vars(args))
    if saved_args.get("start_epoch") == args.start_epoch:
        kept.start_epoch = None
    if saved_args.get("no_resume_opt") and not _changed_flags(saved_args, vars(args), OPTIMIZER):
        kept.no_resume_opt = False
    return kept


def _advice(found: Sequence[str]) -> str:
    """What to do about differences; another optimizer cannot take over the state of this one."""
    afresh = any(text.startswith("--opt ") for text in found)
    # a fresh optimizer may have all settings of its own
    answered = _OPTIMIZER_FLAGS if afresh else frozenset()
    advice = []
    if any(text.split()[0] not in answered for text in found):
        advice.append("--resume-anyway goes on all the same")
    if afresh:
        advice.append("--no-resume-opt starts the optimizer afresh")
    return ", ".join(advice)


def _tell_machine(saved: Mapping[str, str], now: Mapping[str, str], same_plan: bool) -> None:
    """Log that the same computation goes on elsewhere, or shared out differently."""
    was, count = (values.get("processes") for values in (saved, now))
    if was != count and same_plan:
        _logger.info(
            "saved by %s process(es), goes on with %s: every update sees the same images, "
            "augmented and mixed alike; sums of more than two differ in rounding, batch norm's "
            "running statistics by what each process sees",
            was,
            count,
        )
    was, hardware = (values.get("hardware") for values in (saved, now))
    if was != hardware:
        _logger.info("saved on %s, goes on with %s: results may differ in rounding", was, hardware)


def _asked(saved_args: Mapping[str, Any], args: Mapping[str, Any]) -> list[str]:
    """What the flags of `ASKED` have asked to be different."""
    asked = []
    if args.get("start_epoch") is not None:
        asked.append(f"--start-epoch {args['start_epoch']}")
    if args.get("no_resume_opt"):
        asked += ["--no-resume-opt", *_changed_flags(saved_args, args, OPTIMIZER)]
    return asked


def _changed_flags(
    saved: Mapping[str, Any], args: Mapping[str, Any], keys: frozenset[str] | set[str]
) -> list[str]:
    """Flags among `keys` that are not as saved, in the order of ``--help``."""
    changed = []
    for key, flag in _FLAGS.items():
        if key not in keys or key not in args:
            continue
        was, now = saved.get(key, flag.default), args[key]
        if _plain(was) != _plain(now):
            changed.append(f"{flag.long} {_shown(was)} -> {_shown(now)}")
    return changed


def _plain(value: Any) -> Any:
    """A value as JSON and YAML give it back: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _shown(value: Any) -> str:
    """A flag's value for the eye."""
    if value is None or value == "" or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_shown(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value))
    return str(value)


def _changed_versions(
    saved: Mapping[str, str] | None, now: Mapping[str, str] | None, besides: set[str]
) -> list[str]:
    if saved is None or now is None:
        return []
    names = [*now, *(name for name in saved if name not in now)]
    return [
        f"{name} {saved.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in names
        if name not in {"hardware", *besides} and saved.get(name) != now.get(name)
    ]


def _changed_data(
    saved: Mapping[str, Mapping[str, Any]] | None, now: Mapping[str, Mapping[str, Any]] | None
) -> list[str]:
    if saved is None or now is None:
        return []
    changed = []
    for part in now:
        was, is_now = saved.get(part, {}), now[part]
        if was.get("images") != is_now["images"]:
            was_count, count = (_shown(values.get("images")) for values in (was, is_now))
            changed.append(f"{was_count} {part} images -> {count}")
        elif was.get("samples") != is_now["samples"]:
            changed.append(f"other names, labels or order of the {part} images")
        if was.get("classes") != is_now["classes"]:
            changed.append(f"other class names of the {part} images")
    return changed


def _same_known_samples(
    saved: Mapping[str, Mapping[str, Any]] | None, now: Mapping[str, Mapping[str, Any]] | None
) -> bool:
    """Whether both fingerprints know every sample, and know the same."""
    if saved is None or now is None:
        return False
    return saved == now and all(part["samples"] is not None for part in now.values())
