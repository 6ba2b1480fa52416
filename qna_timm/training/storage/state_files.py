"""State files: the state of a run, tensors as such and all else as JSON in the header.

A run folder has two: the last state and the one before it, which a run falls back on should the
last be damaged.
"""

import functools
import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qna_timm.training.errors import UsageError
from qna_timm.training.storage.checkpoint import STATE_SUFFIX, read_header
from qna_timm.training.storage.files import STEP_KEY, check_digest, find_damage, save_tensors
from qna_timm.training.storage.packing import pack, unpack

STATE_KEY = "qna_timm_state"
STATE_NAME = f"last{STATE_SUFFIX}"
PREVIOUS_NAME = f"previous{STATE_SUFFIX}"

_logger = logging.getLogger(__name__)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state to a file; at every instant it or the one before it is there, whole.

    Args:
        path: If it is called `STATE_NAME`, its predecessor goes on as `PREVIOUS_NAME`.
        state: Nested values, see `packing`. Its ``position`` (``epoch`` from 0, ``updates`` done
            in it) is told in words where the file turns out damaged.

    Raises:
        OSError: It could not be written; the files are what they were.
    """
    tensors: dict[str, Tensor] = {}
    header = {STATE_KEY: json.dumps(pack(dict(state), tensors))}
    position = state.get("position")
    if position is not None:
        epoch, updates = position["epoch"], position["updates"]
        begun = updates or not epoch
        header[STEP_KEY] = f"update {updates} of epoch {epoch + 1}" if begun else f"epoch {epoch}"
    previous = path.with_name(PREVIOUS_NAME) if path.name == STATE_NAME else None
    save_tensors(path, tensors, header, previous=previous)


def load_state(path: Path) -> dict[str, Any]:
    """Read a state, its tensors on the CPU.

    Raises:
        UsageError: `path` is not a whole state file.
    """
    try:
        check_digest(path, digested=True)
    except UsageError as error:
        raise UsageError(f"--resume {error}") from error
    return _read(path, with_tensors=True)


def read_state_header(path: Path) -> dict[str, Any]:
    """A state without its tensors, with None in their places, from the file that `whole_state`
    names.

    Raises:
        UsageError: See `whole_state`.
    """
    return _read(whole_state(path), with_tensors=False)


def whole_state(path: Path) -> Path:
    """`path`, or the state before it if `path` is a run's last state and damaged.

    What is wrong is told in one warning.

    Raises:
        UsageError: `path` is damaged and no run's last state, or both are damaged.
    """
    damage = find_damage(path, digested=True)
    if damage is None:
        return path
    previous = path.with_name(PREVIOUS_NAME)
    if path.name != STATE_NAME or not previous.is_file():
        raise UsageError(f"--resume {path}: damaged ({damage})")
    other = find_damage(previous, digested=True)
    if other is not None:
        raise UsageError(
            f"--resume {path}: damaged ({damage}), and so is {previous.name} ({other})"
        )
    _warn_once(f"{path}: damaged ({damage}): going on from {previous.name}, the state before it")
    return previous


@functools.cache
def _warn_once(line: str) -> None:
    _logger.warning(line)


def _read(path: Path, *, with_tensors: bool) -> dict[str, Any]:
    header = read_header(path)
    try:
        tensors = load_file(path) if with_tensors else defaultdict(lambda: None)
        return unpack(json.loads(header[STATE_KEY]), tensors)
    except (SafetensorError, AttributeError, KeyError, ValueError, OSError) as error:
        raise UsageError(f"--resume {path}: not a state of this train.py ({error})") from error


def state_in(folder: Path) -> Path | None:
    """The path of a run folder's last state; None if it has neither that nor the one before it.

    Only the one before it may be there: `whole_state` sees to that.
    """
    there = (folder / STATE_NAME).is_file() or (folder / PREVIOUS_NAME).is_file()
    return folder / STATE_NAME if there else None


def find_state(resume: str) -> Path:
    """The state file that ``--resume`` names, a file or a run folder; it may yet be damaged.

    Raises:
        UsageError: There is none, or it is another kind of file.
    """
    path = Path(resume)
    if path.is_dir():
        state = state_in(path)
        if state is None:
            raise UsageError(f"--resume {resume}: no {STATE_NAME} in this folder")
        return state
    if not path.is_file():
        raise UsageError(f"--resume {resume}: no such file or folder")
    if path.suffix != ".safetensors":
        raise UsageError(
            f"--resume {resume}: not a state file of this train.py (*{STATE_SUFFIX});"
            " --initial-checkpoint starts from the weights of others"
        )
    if not path.name.endswith(STATE_SUFFIX) and STATE_KEY not in read_header(path):
        hint = f"--resume takes the run folder or its {STATE_NAME}"
        raise UsageError(f"--resume {resume}: weights without the state of a run; {hint}")
    return path
