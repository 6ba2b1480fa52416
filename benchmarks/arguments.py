"""Flags that benchmarks share, and types of values: what is wrong is told before anything runs."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qna_timm.training.errors import UsageError
from qna_timm.training.names import check_model_name


def whole_number(text: str, least: int = 0) -> int:
    """A whole number from `least` on."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, found {text!r}")
    return int(text)


def positive_number(text: str) -> int:
    """A whole number from 1 on."""
    return whole_number(text, least=1)


def odd_number(text: str) -> int:
    """An odd number from 1 on: windows have a middle."""
    if positive_number(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"must be an odd number, found {text!r}")
    return int(text)


def positive_seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, found {text!r}")
    return value


def device_name(text: str) -> str:
    """A device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        have = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise argparse.ArgumentTypeError(
            f"this machine has no device {text!r}, but {' and '.join(have)}"
        ) from None
    return text


def model_name(text: str) -> str:
    """A model's name in timm's registry."""
    try:
        check_model_name(text, "name")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _output(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with open(path, "a"):
            pass
        if is_new:
            path.unlink()  # another flag may be wrong, and a run takes minutes
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    return path


def _result(text: str) -> Path:
    """A file that a benchmark wrote."""
    path = Path(text)
    try:
        with open(path, encoding="utf-8") as file:
            ours = file.readline().startswith("# command: ")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise argparse.ArgumentTypeError(f"cannot read {text!r}: {reason}") from None
    if not ours:
        raise argparse.ArgumentTypeError(f"{text!r} is no benchmark's CSV file (see --out)")
    return path


def parse_arguments(
    parser: argparse.ArgumentParser,
    quick: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    readable: bool = False,
) -> argparse.Namespace:
    """Parses, with the flags that all benchmarks have.

    Args:
        parser: Of a script, with --rounds and --device if it has use for them.
        quick: Defaults under --quick.
        argv: Words of the command line, `sys.argv`'s if None.
        readable: Whether its CSV files can be reported again, by --read.
    """
    parser.add_argument(
        "--threads", type=positive_number, help="as OMP_NUM_THREADS says if not given"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=_output, help="CSV file to write; figures go beside it")
    if readable:
        parser.add_argument("--read", type=_result, help="report a CSV file, measure nothing")
    argv = sys.argv[1:] if argv is None else argv
    if "--quick" in argv:
        parser.set_defaults(**quick)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", f"benchmarks/{Path(parser.prog).name}", *argv])
    if args.threads:
        torch.set_num_threads(args.threads)
    return args
