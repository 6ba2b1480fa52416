"""Errors that a user can cause, and how a command reports them."""

import atexit
import contextlib
import difflib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from qna_timm.training.signals import ignore_signals


class UsageError(Exception):
    """A mistake in flags, files or data, told in one line.

    The message names the flag, key, file or shape, what was found and what would be right.
    `run_cli` turns it into exit code 2 without a traceback.

    Attributes:
        told: Whether another process has told it; None where the first process tells.
    """

    told: bool | None = None


class RunFailed(Exception):
    """A run cannot go on, through no mistake in its settings; told in one line.

    `run_cli` turns it into exit code 1 without a traceback.

    Args:
        message: What happened.
        everywhere: Whether every process of the run raises it, so that one telling is enough.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def closest(name: str, candidates: Iterable[str], n: int = 3, prefix: str = "") -> str:
    """Suggest valid names near a misspelt one.

    Args:
        name: What the user wrote.
        candidates: Every valid name.
        n: Most names to suggest.
        prefix: Written before each suggestion.

    Returns:
        `"; did you mean 'a', 'b' or 'c'?"`, or `""` where nothing is near.
    """
    spelled = {str(candidate).lower(): str(candidate) for candidate in candidates if candidate}
    near = difflib.get_close_matches(name.lower(), spelled, n=n, cutoff=0.6)
    if not near and len(name) >= 3:
        near = sorted((key for key in spelled if name.lower() in key), key=len)[:n]
    if not near:
        return ""
    quoted = [f"'{prefix}{spelled[key]}'" for key in near]
    return f"; did you mean {' or '.join(filter(None, [', '.join(quoted[:-1]), quoted[-1]]))}?"


def closest_path(path: str | Path) -> str:
    """Suggest what is there in place of a path that is not: of its first part that is missing.

    Names are compared inside their folder: whole paths are alike because their beginnings are.

    Returns:
        As `closest` does.
    """
    path = Path(path)
    while not os.path.exists(path.parent):
        path = path.parent
    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:
        return ""
    return closest(path.name, names, prefix=str(path.parent / "_")[:-1])


def missing_package(what: str, package: str, extra: str = "") -> str:
    """Say how to get a package; ours is on no index, so that its extras need its folder.

    Args:
        what: What needs it: a flag, mostly.
        package: Its name on PyPI.
        extra: Of ours, if it is in one.

    Returns:
        ``--log-wandb needs wandb: pip install wandb``.
    """
    text = f"{what} needs {package}: pip install {package}"
    return f"{text} (or pip install -e '.[{extra}]' in qna_timm's folder)" if extra else text


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with its code.

    A `UsageError` is printed as one line, once, and ends every rank with exit code 2. A
    `RunFailed`, which may befall one rank alone, is printed by every rank that it befalls and ends
    it with exit code 1. Anything else keeps its traceback: it is a defect of ours, not of the
    user's.
    """
    try:
        code = main() or 0
    except UsageError as error:
        told = _rank() not in (None, 0) if error.told is None else error.told
        if not told:
            _print_line("error", error)
        code = 2
    except RunFailed as error:
        rank = None if error.everywhere else _rank()
        if not error.everywhere or _rank() in (None, 0):
            _print_line("failed" if rank is None else f"failed on rank {rank}", error)
        code = 1
    ignore_signals()
    if _rank() is not None:
        _end(code)
    sys.exit(code)


def _end(code: int) -> NoReturn:
    """End as Python does, but for taking objects apart.

    A thread of gloo's that lets go of a tensor meanwhile would wait for the interpreter, which ends
    it; C++ then aborts the process, also after a run that went well.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)


def _rank() -> int | None:
    """Number of this process under torchrun or SLURM, which may not have been asked yet."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    return int(rank) if rank else None


def _print_line(what: str, error: Exception) -> None:
    message = " ".join(str(error).split())
    print(f"{os.path.basename(sys.argv[0])}: {what}: {message}", file=sys.stderr)
