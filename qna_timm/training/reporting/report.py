"""The run folder: where it is, and what is written into it beside checkpoints."""

import argparse
import csv
import datetime
import errno
import json
import logging
import math
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import safe_model_name

import qna_timm
from qna_timm.ops.compiled import compiled_attention
from qna_timm.training.errors import UsageError, missing_package
from qna_timm.training.names import model_label
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.reporting.span_report import span_scalars
from qna_timm.training.storage.files import replacing
from qna_timm.training.storage.lock import holder
from qna_timm.training.storage.state_files import STATE_NAME, find_state, state_in

ARGS_NAME = "args.yaml"
SUMMARY_NAME = "summary.csv"
CURVES_NAME = "curves.png"
ENVIRONMENT_NAME = "environment.json"
LOG_NAME = "train.log"
BAD_IMAGES_NAME = "bad_images.csv"
NONFINITE_NAME = "nonfinite.jsonl"

_logger = logging.getLogger(__name__)


def goes_on_in(folder: Path, given: Mapping[str, Any]) -> bool:
    """Whether a run resumed from `folder` goes on in it, or the command line names another.

    Args:
        folder: Where the state to resume is.
        given: Settings given on the command line.
    """
    if not (folder / ARGS_NAME).is_file():
        return False
    folder = folder.resolve()
    output = Path(given.get("output", folder.parent))
    return (output / given.get("experiment", folder.name)).resolve() == folder


def plan_run(
    args: argparse.Namespace, image_size: Sequence[int], resumed_in_place: bool
) -> tuple[Path, Path | None]:
    """Decide on the run folder and on the state to go on from, without writing anything.

    Args:
        args: Flags, of which ``output``, ``experiment``, ``resume``, ``model`` and
            ``model_kwargs`` are read.
        image_size: Height and width in pixels, part of the default name.
        resumed_in_place: Whether a run given by ``--resume`` goes on in its own folder.

    Returns:
        The folder (there already only if a run goes on in it) and the state file or None.

    Raises:
        UsageError: ``--experiment`` names a run that is there and no resume was asked for, or
            there is nothing to resume.
    """
    folder = Path(args.output) / args.experiment
    if args.resume and args.resume != "auto":
        state = find_state(args.resume)
        folder = state.parent if resumed_in_place else _new_folder(args, image_size)
        return folder, state
    if args.resume == "auto":
        state = state_in(folder)
        if state is not None:
            return folder, state
        _logger.info("--resume auto: no %s in %s, starting afresh", STATE_NAME, folder)
        return folder, None
    return _new_folder(args, image_size), None


def _new_folder(args: argparse.Namespace, image_size: Sequence[int]) -> Path:
    """The folder of a new run: ``--experiment``'s, or one named after now, the model and size."""
    output = Path(args.output)
    if args.experiment:
        folder = output / args.experiment
        # A hidden file is the lock of a run that was killed before it wrote anything.
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            if (run := holder(folder)) is not None:
                raise UsageError(f"--experiment {args.experiment}: {folder} is in use by {run}")
            raise UsageError(
                f"--experiment {args.experiment}: {folder} holds a run already; --resume auto goes"
                " on with it, another name starts a new one"
            )
        return folder
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    model = safe_model_name(model_label(args.model, args.model_kwargs))
    name = f"{now}-{model}-{image_size[-1]}"
    folder, count = output / name, 1
    while folder.exists():
        count += 1
        folder = output / f"{name}-{count}"
    return folder


def make_folder(folder: Path) -> None:
    """Create the run folder, or see that one that is there can be written to.

    Raises:
        UsageError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output: cannot write to {folder}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_args(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the run's settings so that ``--config`` reads them back.

    The state that a run was resumed from is left out: read back, the settings start it anew.
    """
    values = dict(values)
    if values["resume"] != "auto":
        values["resume"] = ""
    text = yaml.safe_dump(values, sort_keys=True, default_flow_style=False)
    write_text(folder / ARGS_NAME, text)


def environment(processes: Processes, command: Sequence[str]) -> dict[str, Any]:
    """What a run depends on besides its settings: versions, device, code, command line."""
    device = processes.device
    cuda = device.type == "cuda"
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": list(command),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "qna_timm": qna_timm.__version__,
        "compiled_attention": compiled_attention() or None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "device": device_name(device),
        "processes": processes.world_size,
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        **_git_state(Path(qna_timm.__file__).parent),
    }


def device_name(device: torch.device) -> str:
    """``cpu (8 threads)``, ``cuda:0 (NVIDIA H100)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def _git_state(folder: Path) -> dict[str, Any]:
    """Commit of the code, and whether files differ from it; None where there is no repository."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }


def write_environment(folder: Path, current: Mapping[str, Any]) -> None:
    """Write environment.json; a resumed run adds its own environment to the first one's."""
    path = folder / ENVIRONMENT_NAME
    content = dict(current)
    if path.is_file():
        try:
            first = json.loads(path.read_text(encoding="utf-8"))
            content = {**first, "resumed": [*first.get("resumed", ()), content]}
        except (ValueError, AttributeError):
            _logger.warning("%s was damaged and is written anew", path)
    write_text(path, json.dumps(content, indent=2) + "\n")


def summary_row(
    epoch: int,
    train: Mapping[str, float],
    evaluated: Mapping[str, float],
    lr: float,
    spans: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """One epoch's row of the summary, in timm's columns.

    Args:
        epoch: From 0.
        train: Means over the epoch (``train_`` columns).
        evaluated: The model's metrics and, ending in ``_ema``, the averaged model's (``eval_``).
        lr: Learning rate at the epoch's end.
        spans: Learned windows by layer, kept under ``spans`` if there are any: they have a table
            of their own, see `span_report`.
    """
    return {
        "epoch": epoch,
        **{f"train_{name}": value for name, value in train.items()},
        **{f"eval_{name}": value for name, value in evaluated.items()},
        "lr": lr,
        **({"spans": dict(spans)} if spans else {}),
    }


def write_summary(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write summary.csv whole; epochs without evaluation leave their columns empty."""
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("lr", "spans"))
    _write_table(folder / SUMMARY_NAME, [*columns, "lr"], rows)


def write_bad_images(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write bad_images.csv whole: images that could not be read, and what stood in for them.

    Args:
        folder: The run folder.
        entries: From `bad_images.merge_replaced`, at least one.
    """
    _write_table(folder / BAD_IMAGES_NAME, list(entries[0]), entries)


def _write_table(path: Path, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Add lines to a text file, all or none.

    Raises:
        OSError: they could not be written; the file is as it was.
    """
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            content = "".join(f"{line}\n" for line in lines).encode()
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def cut_nonfinite(folder: Path, epoch: int, update: int) -> None:
    """Drop from nonfinite.jsonl what a run has met that goes on from before it.

    Args:
        folder: The run folder.
        epoch: That the run goes on in, from 0.
        update: That it goes on with.
    """
    path = folder / NONFINITE_NAME
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _place_of(line) < (epoch, update)]
    if not kept:
        path.unlink()
    elif len(kept) < len(lines):
        write_text(path, "".join(f"{line}\n" for line in kept))


def _place_of(record: str) -> tuple[float, float]:
    """Epoch and update of a line of nonfinite.jsonl; of half a line what is never before."""
    try:
        place = json.loads(record)
        return place["epoch"], place["update"]
    except (ValueError, LookupError, TypeError):
        return math.inf, math.inf


class Trackers:
    """TensorBoard and Weights & Biases, each only if asked for.

    Args:
        args: Flags.
        folder: The run folder; TensorBoard's files go to ``tensorboard`` inside it.
        settings: The run's settings, shown with it.
        first_epoch: First epoch of this process; a resumed run replaces what came after it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        settings: Mapping[str, Any],
        first_epoch: int,
    ) -> None:
        self._board = self._wandb = None
        self._board_folder = folder / "tensorboard" if args.log_tensorboard else None
        self._first_epoch = first_epoch
        self._waiting: list[dict[str, Any]] = []
        if args.log_wandb:
            import wandb

            resumed = {"id": args.wandb_resume_id, "resume": "must"} if args.wandb_resume_id else {}
            self._wandb = wandb.init(
                project=args.wandb_project,
                name=args.experiment or folder.name,
                config=dict(settings),
                tags=args.wandb_tags,
                **resumed,
            )

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one row of the summary, and those before it that could not be written.

        Raises:
            OSError: TensorBoard's file cannot be written; the next row tries again.
        """
        row = dict(row)
        spans = span_scalars(row.pop("spans", {}))
        if self._wandb is not None:
            self._wandb.log({**row, **spans})
        if self._board_folder is not None:
            columns = {key.replace("_", "/", 1): value for key, value in row.items()}
            del columns["epoch"]
            self._waiting.append({"epoch": row["epoch"], **columns, **spans})
            self._log_to_board()

    def _log_to_board(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        board, self._board = self._board, None  # one that has failed once fails for good
        if board is None:
            folder = str(self._board_folder)
            first = max(self._first_epoch, self._waiting[0]["epoch"])
            board = SummaryWriter(folder, purge_step=first)
        for row in self._waiting:
            for key, value in row.items():
                if key != "epoch":
                    board.add_scalar(key, value, row["epoch"])
        board.flush()
        self._board = board
        self._waiting.clear()

    def close(self) -> None:
        """Finish writing."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_trackers(args: argparse.Namespace) -> None:
    """See that what the flags ask for is installed.

    Raises:
        UsageError: It is not; the line says how to install it.
    """
    wanted = (
        (args.log_tensorboard, "--log-tensorboard", "tensorboard", "train"),
        (args.log_wandb, "--log-wandb", "wandb", ""),
    )
    for asked, flag, module, extra in wanted:
        if asked:
            try:
                __import__(module)
            except ImportError as error:
                raise UsageError(missing_package(flag, module, extra)) from error
