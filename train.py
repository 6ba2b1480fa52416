#!/usr/bin/env python
"""Train any timm or qna_timm model on images; timm's flags, recipes and datasets work.

    python train.py                                   # handwritten digits, minutes on a CPU
    python train.py -c configs/qna/qna_vit_tiny.yaml --data-dir DATA
    torchrun --nproc_per_node=8 train.py -c configs/qna/qna_vit_tiny.yaml --data-dir DATA

DATA holds train/CLASS/*.jpg and validation/CLASS/*.jpg (or val/). Without a recipe the settings of
a run on data of your own are timm's defaults.

The story: read the settings, open the data, build the model, the task around it and what trains
it, choose the run folder; then epoch by epoch train, evaluate, save. Nothing is written before all
of it has proved possible.
"""

import gc
import signal

if __name__ == "__main__":
    # Importing PyTorch takes seconds: a signal waits until `StopSignals` takes it.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    # What imports make stays: to look for garbage among it takes a tenth of their time.
    gc.disable()

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils import unwrap_model, world_info_from_env

import qna_timm  # noqa: F401  (registers its models)
from qna_timm.training.control import Control
from qna_timm.training.data.holdout import check_same_holdout
from qna_timm.training.elastic import keep_plan
from qna_timm.training.errors import RunFailed, UsageError, run_cli
from qna_timm.training.exactness import check_exact, set_aside_repeated
from qna_timm.training.flags.intervals import parse_duration, parse_interval
from qna_timm.training.flags.recipe import as_recipe, as_yaml_dict, parse_train_args
from qna_timm.training.names import model_label
from qna_timm.training.processes.distributed import (
    Processes,
    decide_on_primary,
    first_to_tell,
    join_processes,
    leave_processes,
    lost_connection,
)
from qna_timm.training.processes.requeue import requeue_job, resume_if_restarted
from qna_timm.training.reporting import curves, report
from qna_timm.training.reporting.logs import RunLog
from qna_timm.training.reporting.span_report import SPAN_CURVES_NAME
from qna_timm.training.run import Run, set_up
from qna_timm.training.session import Session
from qna_timm.training.signals import REQUEUE_SIGNAL, Stopped, StopSignals
from qna_timm.training.storage.checkpoint import check_weights
from qna_timm.training.storage.lock import RunLock
from qna_timm.training.storage.saver import EMA, Saver
from qna_timm.training.storage.state_files import (
    find_state,
    load_state,
    read_state_header,
    state_in,
    whole_state,
)
from qna_timm.training.storage.writes import Writes

QUICKSTART = Path(__file__).resolve().parent / "configs" / "quickstart.yaml"

# Exit code of a run that is done, but could not write everything (EX_IOERR).
WRITE_FAILED = 74

# Kinds of weights, as `Saver` names them, in what is printed.
_KIND_NAMES = {"": "model", EMA: "ema"}

_logger = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: Arguments after the script's name; those of this process when None.

    Returns:
        Exit code: 0; 74 if something could not be written; 128 + the number of the signal that
        stopped the run, but 0 after SIGUSR1.

    Raises:
        UsageError: Settings, files or data are at fault; nothing has been written.
        RunFailed: The run could not go on.
    """
    command = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    processes = None
    with StopSignals() as signals:
        signals.defer()  # nobody leaves alone what all wait in
        try:
            args, in_place = read_settings(command[1:])
            processes = join_processes(
                args.device, parse_duration(args.dist_timeout), signals.give_up_waiting
            )
            with RunLog(processes.is_primary) as log:
                try:
                    return start(args, processes, command, in_place, log, signals)
                except Stopped as stopped:
                    return leave(stopped, processes)
        except Stopped as stopped:
            return leave(stopped, processes)
        except UsageError as error:
            first = first_to_tell()
            error.told = None if first is None else not first
            raise
        except Exception as error:
            if (reason := lost_connection(error)) is None:
                raise
            raise RunFailed(reason) from error
        finally:
            leave_processes()


def leave(stopped: Stopped, processes: Processes | None) -> int:
    """Say that a signal has stopped the run, and ask for the job again if it was meant so.

    Returns:
        Exit code.
    """
    _logger.warning("stopped by %s", stopped)
    if stopped.signum != REQUEUE_SIGNAL:
        return stopped.exit_code
    return requeue_job(processes or Processes(torch.device("cpu"), *world_info_from_env()[1:]))


def read_settings(argv: Sequence[str]) -> tuple[argparse.Namespace, bool]:
    """The run's settings, and whether a resumed run goes on in its own folder.

    A run resumed by its folder brings its settings along: the command line goes before them.
    """
    args = parse_train_args(argv, QUICKSTART)
    if not args.resume or args.resume == "auto":
        return args, False
    folder = find_state(args.resume).parent
    in_place = report.goes_on_in(folder, args.given)
    if args.config or not (folder / report.ARGS_NAME).is_file():
        return args, in_place
    recipe = ["--config", str(folder / report.ARGS_NAME)]
    without_kwargs = "model" in args.given and "model_kwargs" not in args.given
    if without_kwargs and parse_train_args(recipe, QUICKSTART).model != args.model:
        argv = [*argv, "--model-kwargs"]  # none: the saved ones are of another model
    saved = parse_train_args([*recipe, *argv], QUICKSTART)
    if not in_place:
        saved.output, saved.experiment = args.output, args.experiment
    return saved, in_place


def start(
    args: argparse.Namespace,
    processes: Processes,
    command: Sequence[str],
    in_place: bool,
    log: RunLog,
    signals: StopSignals,
) -> int:
    """Make everything ready, resume if asked to, and train to the last epoch or a signal."""
    if not processes.distributed:
        signals.obey()  # until there is something to be saved
    control = Control(processes, signals, parse_interval(args.checkpoint_interval))
    control.stop_if_asked()
    resume_if_restarted(args, processes)
    header = decide_on_primary(processes, lambda: saved_header(args))
    run = set_up(args, processes, control, keep_plan(args, header, processes))
    control.stop_if_asked()
    folder, state_path = decide_on_primary(
        processes, lambda: report.plan_run(args, run.metadata["img_size"], in_place)
    )
    with ExitStack() as stack:
        session = enter_folder(run, folder, state_path, command, log, stack)
        signals.defer()
        control.stop_if_asked()
        train(session)
    if not session.writes.failed:
        return 0
    _logger.warning("at some time not written: %s", ", ".join(session.writes.failed))
    return WRITE_FAILED


def enter_folder(
    run: Run,
    folder: Path,
    state_path: Path | None,
    command: Sequence[str],
    log: RunLog,
    stack: ExitStack,
) -> Session:
    """Lock the run folder, put a saved state in place, and begin to write; or change nothing.

    Args:
        run: Everything that trains.
        folder: The run folder, there already or not.
        state_path: State to go on from, if there is one.
        command: The command line.
        log: What the run says.
        stack: Holds the lock.

    Raises:
        UsageError: Another run has the folder, it cannot be written to, or the state does not fit.
    """
    args, processes = run.args, run.processes
    lock = RunLock(folder, command) if processes.is_primary else nullcontext()
    if is_there := decide_on_primary(processes, folder.is_dir):
        decide_on_primary(processes, lambda: stack.enter_context(lock) and None)
    writes = Writes()
    saver = Saver(
        folder,
        run.metadata,
        metric_name=args.eval_metric,
        keep=args.checkpoint_hist,
        milestones=args.save_epochs,
    )
    session = Session(run, saver, writes)
    state = None
    if state_path is not None:
        state = go_on(session, state_path)
    elif args.start_epoch is not None:
        session.start_at(args.start_epoch)
    decide_on_primary(processes, lambda: report.make_folder(folder))
    if not is_there:
        decide_on_primary(processes, lambda: stack.enter_context(lock) and None)
    if state_path is None:
        decide_on_primary(processes, lambda: check_still_new(folder))
    if processes.is_primary:
        log.to_file(folder / report.LOG_NAME, writes)
        _logger.info("run folder %s", folder)
        if state is not None and state["args"]["eval_metric"] == args.eval_metric:
            with writes.trying("best weights"):
                saver.adopt(state["saver"], state_path.parent, before=session.position.epoch)
        begin_writing(session, command)
    return session


def check_still_new(folder: Path) -> None:
    """See that no other run has ended in a run's folder between its choice and its lock.

    Raises:
        UsageError: One has.
    """
    if state_in(folder) is not None:
        raise UsageError(f"{folder}: another run has saved here meanwhile; start again")


def begin_writing(session: Session, command: Sequence[str]) -> None:
    """What the first process writes into the folder before it trains."""
    run, folder, writes = session.run, session.folder, session.writes
    args, position = run.args, session.position
    environment = report.environment(run.processes, command)
    if position.epoch < run.last_epoch:  # else they stay those of what was trained
        writes.keep_trying(report.ARGS_NAME, lambda: report.write_args(folder, as_recipe(args)))
        writes.keep_trying(
            report.ENVIRONMENT_NAME, lambda: report.write_environment(folder, environment)
        )
    with writes.trying(report.NONFINITE_NAME):
        report.cut_nonfinite(folder, position.epoch, position.updates)
    session.trackers = report.Trackers(args, folder, as_yaml_dict(args), position.epoch)
    run.trainer.image_folder = folder if args.save_images else None
    run.draws = curves.can_draw()


def saved_header(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the state to resume from says of its run, without its tensors; None for a new run."""
    if not args.resume:
        return None
    if args.resume != "auto":
        return read_state_header(find_state(args.resume))
    state = state_in(Path(args.output) / args.experiment)
    return None if state is None else read_state_header(state)


def go_on(session: Session, path: Path) -> dict[str, Any]:
    """Put a saved state in place, if the run can go on from it exactly or is asked not to.

    Every process calls this.

    Returns:
        The state.

    Raises:
        UsageError: It is damaged, or settings, data or versions are others now.
    """
    run = session.run
    path = decide_on_primary(run.processes, lambda: whole_state(path))
    state, asked = load_state(path), run.args
    if path.parent.resolve() == session.folder.resolve():
        asked = set_aside_repeated(run.args, state["args"])
    check_same_holdout(run.args, state["args"], path)
    check_same_model(run, state, path)
    check_exact(path, state, asked, run.identity)
    session.restore(state, path, with_optimizer=not asked.no_resume_opt)
    if asked.start_epoch is not None:
        session.start_at(asked.start_epoch)
    return state


def check_same_model(run: Run, state: dict[str, Any], path: Path) -> None:
    """See that a state's tensors fit the model: where they do not, no flag makes the run go on.

    Raises:
        UsageError: They do not.
    """
    model = unwrap_model(run.trainer.task.get_trainable_module())
    try:
        check_weights(model, state["model"], {}, path)
    except UsageError as error:
        saved = model_label(state["args"]["model"], state["args"].get("model_kwargs", {}))
        if saved == model_label(run.args.model, run.args.model_kwargs):
            raise
        raise UsageError(f"--resume {error}; --model {saved} goes on with it") from None


def train(session: Session) -> None:
    """Train to the last epoch, and say what came out."""
    run, args = session.run, session.run.args
    try:
        session.train(run.last_epoch)
    except (Stopped, RunFailed):
        if session.saved is not None:
            _logger.warning(
                "saved after %s: --resume %s goes on from there",
                session.saved, shlex.quote(str(session.folder)),
            )  # fmt: skip
        raise
    finally:
        for loader in (run.train_loader, run.eval_loader):
            loader.close()  # whoever trains again here would wait 5 s for each worker left behind
        if session.trackers is not None:
            with session.writes.trying("trackers"):
                session.trackers.close()
    if run.processes.is_primary:
        conclude(args, session.saver, session.rows)


def conclude(args: argparse.Namespace, saver: Saver, rows: list[dict[str, Any]]) -> None:
    """Say what came out of the run and what to do with it."""
    best = saver.best.get(saver.best_kind() or "")
    if best is not None:
        averaged = " of the averaged weights" if saver.best_kind() == EMA else ""
        _logger.info(
            "best %s%s: %.4g in epoch %d, %s",
            args.eval_metric, averaged, best["metric"], best["epoch"] + 1, saver.best_file().name,
        )  # fmt: skip
    for what, name in (
        ("curves", report.CURVES_NAME),
        ("spans", SPAN_CURVES_NAME),
        ("images that could not be read", report.BAD_IMAGES_NAME),
        ("losses and gradients that were not finite", report.NONFINITE_NAME),
    ):
        if (file := saver.folder / name).is_file():
            _logger.info("%s: %s", what, file)
    best_file = shlex.quote(str(saver.best_file()))
    _logger.info("to validate: %s --checkpoint %s", validate_command(), best_file)
    # averages that were not evaluated are chosen by the model's metric, which is none of theirs
    bests = {
        _KIND_NAMES[kind]: {"epoch": best["epoch"], "metric": best["metric"]}
        for kind, best in saver.best.items()
        if best.get("measured", True)
    }
    print(f"--result\n{json.dumps({'best': bests, 'last': rows[-1] if rows else {}})}")


def validate_command() -> str:
    """How to start validate.py from here, with a path to each of the two that is not at hand."""
    # A virtual environment that is used but not activated is not what `python` means to the user.
    elsewhere = sys.prefix not in (sys.base_prefix, os.environ.get("VIRTUAL_ENV"))
    script = Path(__file__).resolve().with_name("validate.py")
    if script.parent == Path.cwd():
        script = Path(script.name)
    return shlex.join([sys.executable if elsewhere else "python", str(script)])


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    run_cli(main)
