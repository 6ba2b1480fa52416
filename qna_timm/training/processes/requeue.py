"""Runs that a scheduler or a launcher starts again: asking for it, and noticing it."""

import argparse
import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from qna_timm.training.processes.distributed import Processes, decide_on_primary, reduce_flags
from qna_timm.training.storage.state_files import state_in

# Variables that count how often torchrun has started this process's group, and SLURM the job.
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
SCONTROL_SECONDS = 10
FAILED = 128 + signal.SIGTERM

_logger = logging.getLogger(__name__)


def job_name(environ: Mapping[str, str]) -> str | None:
    """SLURM's name for the job of this process, None outside SLURM.

    In an array it names the one task: the plain number of the task that has the array's own number
    would mean all of them.
    """
    array, task = (environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID") or None


def requeue_job(processes: Processes) -> int:
    """Put the job of this run back into SLURM's queue; to be called when everything is saved.

    Args:
        processes: The run's processes, of which the first one asks.

    Returns:
        Exit code: 0 where the job is queued again, or there is no job; 143 where SLURM refused,
        after a warning, since nobody would start the run again.
    """
    job = job_name(os.environ)
    if job is None or not processes.is_primary:
        return 0
    try:
        asked = subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True,
            text=True,
            timeout=SCONTROL_SECONDS,
            check=False,
        )
        problem = asked.stderr.strip() or asked.stdout.strip() or f"exit code {asked.returncode}"
        if asked.returncode == 0:
            _logger.info("job %s is queued again", job)
            return 0
    except subprocess.TimeoutExpired:
        problem = f"no answer in {SCONTROL_SECONDS} s"
    except OSError as error:
        problem = str(error)
    _logger.warning(
        "job %s is not queued again: scontrol requeue: %s", job, problem.splitlines()[0]
    )
    return FAILED


def restarted(environ: Mapping[str, str]) -> bool:
    """Whether torchrun or SLURM has started this process again, after the first had ended."""
    return any(environ.get(name, "0").strip() not in ("", "0") for name in RESTART_COUNTS)


def resume_if_restarted(args: argparse.Namespace, processes: Processes) -> None:
    """In a run that was started again, go on in its folder as ``--resume auto`` does.

    The flags are those of the first start. Where the run that ``--experiment`` names has saved
    since, the flags that were meant for its beginning, ``--resume`` of another run among them,
    have had their effect and are set aside.

    Args:
        args: Flags, changed in place, the same on every process.
        processes: The run's processes; one that was started again means that all were, though a
            new machine's torchrun counts anew.
    """
    if not any(reduce_flags([restarted(os.environ)], processes)) or args.resume == "auto":
        return
    if not args.experiment:
        if processes.is_primary and not args.resume:
            _logger.warning("started again, but without --experiment: a new run begins")
        return
    folder = Path(args.output) / args.experiment
    if decide_on_primary(processes, lambda: state_in(folder)) is not None:
        args.start_epoch, args.no_resume_opt = None, False
    elif args.resume:
        return
    args.resume = "auto"
    if processes.is_primary:
        _logger.info("started again: goes on as with --resume auto")
