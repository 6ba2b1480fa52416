#!/usr/bin/env python
"""Validate any timm or qna_timm model: top-1, top-5, loss, images per second, parameters.

    python validate.py --checkpoint output/train/RUN            # all else is in the checkpoint
    python validate.py --model resnet50 --data-dir IMAGENET     # timm's published weights
    torchrun --nproc_per_node=2 validate.py --checkpoint RUN/best.safetensors --data-dir DATA

Several models (a pattern, a list, a file) or a folder of checkpoints are validated one by one.
"""

import argparse
import gc
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # What imports make stays: to look for garbage among it takes a tenth of their time.
    gc.disable()

import torch
from timm.utils import check_batch_size_retry, decay_batch_step

import qna_timm  # noqa: F401  (registers its models)
from qna_timm.training.errors import RunFailed, UsageError, run_cli
from qna_timm.training.flags.recipe import parse_validate_args
from qna_timm.training.measure import measure
from qna_timm.training.processes.distributed import (
    Processes,
    join_processes,
    leave_processes,
    lost_connection,
)
from qna_timm.training.reporting.logs import RunLog
from qna_timm.training.reporting.results import (
    TO_TERMINAL,
    require_matplotlib,
    require_writable,
    write_results,
)
from qna_timm.training.validation import Candidate, list_candidates, settings_for

_logger = logging.getLogger("validate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: Arguments after the script's name; those of this process when None.

    Returns:
        Exit code: 0, or 1 if some of several models could not be validated.

    Raises:
        UsageError: settings, files or data are at fault.
        RunFailed: other processes are lost.
    """
    args = parse_validate_args(argv)
    try:
        processes = join_processes(args.device)
        with RunLog(processes.is_primary):
            return validate_all(args, processes)
    except Exception as error:
        if (reason := lost_connection(error)) is None:
            raise
        raise RunFailed(reason) from error
    finally:
        leave_processes()


def validate_all(args: argparse.Namespace, processes: Processes) -> int:
    """Validate what the flags name and report it; the exit code.

    Raises:
        UsageError: nothing could be validated, or what the only candidate lacks.
        RunFailed: the results could not be written.
    """
    candidates = list_candidates(args)
    check_outputs(args, len(candidates), processes)
    if len(candidates) == 1:
        results = validate_retrying(args, candidates[0], processes)
        report(args, results, processes)
        return 0
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, candidate in enumerate(candidates, start=1):
        _logger.info("%d of %d: %s", number, len(candidates), candidate)
        try:
            rows.append(validate_retrying(args, candidate, processes))
        except UsageError as error:
            _logger.error("%s: %s", candidate, error)
            problems.append(f"{candidate}: {error}")
            continue
        rows.sort(key=lambda row: row["top1"], reverse=True)
        save_results(args, rows, processes)  # now, so that a long list is not lost by its last
    if not rows:
        raise UsageError(f"none of {len(candidates)} could be validated; the first, {problems[0]}")
    report(args, rows, processes)
    return int(len(rows) < len(candidates))


def check_outputs(args: argparse.Namespace, candidates: int, processes: Processes) -> None:
    """Find out before the work whether its results can be kept.

    Raises:
        UsageError: a missing package, a place where no file can be written, or one for several.
    """
    if args.confusion_matrix:
        require_matplotlib()
    single = {"--per-class": args.per_class, "--confusion-matrix": args.confusion_matrix}
    for flag, path in {**single, "--results-file": args.results_file}.items():
        if path and path != TO_TERMINAL:
            require_writable(flag, Path(path))
        if path and flag in single and candidates > 1:
            raise UsageError(f"{flag} is for one model, but {candidates} are named")
    if args.retry and processes.distributed:
        raise UsageError("--retry works in one process; under torchrun choose --batch-size")


def validate_retrying(
    args: argparse.Namespace, candidate: Candidate, processes: Processes
) -> dict[str, Any]:
    """Validate one model; with --retry again with smaller batches when memory runs out."""
    settings, metadata = settings_for(args, candidate)
    while True:
        try:
            return measure(settings, metadata, processes)
        except RuntimeError as error:
            smaller = decay_batch_step(settings.batch_size)
            if not (args.retry and smaller and check_batch_size_retry(str(error))):
                raise
            reason = str(error).splitlines()[0]
        # Outside the handler, whose traceback would keep the failed attempt's memory.
        _logger.warning("%s; trying --batch-size %d", reason, smaller)
        settings.batch_size = smaller
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()


def save_results(
    args: argparse.Namespace, results: dict[str, Any] | list[dict[str, Any]], processes: Processes
) -> None:
    """Write --results-file, if it is asked for.

    Raises:
        RunFailed: it could not be written.
    """
    if args.results_file and processes.is_primary:
        try:
            write_results(Path(args.results_file), results, args.results_format)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise RunFailed(f"--results-file {args.results_file}: {reason}") from error


def report(
    args: argparse.Namespace, results: dict[str, Any] | list[dict[str, Any]], processes: Processes
) -> None:
    """Write --results-file and print the results as JSON after a mark, as timm's script does."""
    save_results(args, results, processes)
    if processes.is_primary:
        print(f"--result\n{json.dumps(results, indent=4)}")


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    run_cli(main)
