"""State files: the state of a run, tensors as such and all else as JSON in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qna_timm.training.checkpoint import STATE_SUFFIX, read_header
from qna_timm.training.errors import UsageError
from qna_timm.training.files import save_tensors
from qna_timm.training.packing import pack, unpack

STATE_KEY = "qna_timm_state"
STATE_NAME = f"last{STATE_SUFFIX}"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state to a file, atomically."""
    tensors: dict[str, Tensor] = {}
    header = {STATE_KEY: json.dumps(pack(dict(state), tensors))}
    save_tensors(path, tensors, header)


def load_state(path: Path) -> dict[str, Any]:
    """Read a state, its tensors on the CPU.

    Raises:
        UsageError: `path` is not a whole state file.
    """
    header = read_header(path)
    try:
        return unpack(json.loads(header[STATE_KEY]), load_file(path))
    except (SafetensorError, AttributeError, KeyError, ValueError, OSError) as error:
        raise UsageError(f"--resume {path}: damaged state file ({error})") from error


def find_state(resume: str) -> Path:
    """The state file that ``--resume`` names, a file or a run folder.

    Raises:
        UsageError: There is none, or it is another kind of file.
    """
    path = Path(resume)
    state = path / STATE_NAME if path.is_dir() else path
    if not state.is_file():
        what = f"no {STATE_NAME} in this folder" if path.is_dir() else "no such file or folder"
        raise UsageError(f"--resume {resume}: {what}")
    if state.suffix != ".safetensors":
        raise UsageError(
            f"--resume {resume}: not a state file of this train.py (*{STATE_SUFFIX});"
            " --initial-checkpoint starts from the weights of others"
        )
    if STATE_KEY not in read_header(state):
        hint = f"--resume takes the run folder or its {STATE_NAME}"
        raise UsageError(f"--resume {resume}: weights without the state of a run; {hint}")
    return state
