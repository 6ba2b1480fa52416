#!/usr/bin/env python
"""Train any timm or qna_timm model on images; timm's flags, recipes and datasets work.

    python train.py                                       # handwritten digits, minutes on a CPU
    python train.py --data-dir DATA --model qna_vit_tiny  # DATA/train/CLASS, DATA/validation/CLASS
    torchrun --nproc_per_node=8 train.py -c configs/qna/qna_vit_tiny.yaml --data-dir DATA

The story: read the settings, open the data, build the model, the task around it and what trains
it, choose the run folder; then epoch by epoch train, evaluate, save. Nothing is written before all
of it has proved possible.
"""

import argparse
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel

import qna_timm  # noqa: F401  (registers its models)
from qna_timm.training import curves, report, resume
from qna_timm.training.data import set_epoch
from qna_timm.training.distributed import decide_on_primary, join_processes, leave_processes
from qna_timm.training.early_stop import stops_early
from qna_timm.training.errors import run_cli
from qna_timm.training.evaluation import evaluate
from qna_timm.training.holdout import check_same_holdout
from qna_timm.training.logs import RunLog
from qna_timm.training.loop import num_updates
from qna_timm.training.optim import current_lr
from qna_timm.training.progress import Progress
from qna_timm.training.recipe import as_yaml_dict, parse_train_args
from qna_timm.training.run import Run, set_up, with_views
from qna_timm.training.saver import EMA, Saver
from qna_timm.training.signals import Stopped, StopSignals
from qna_timm.training.span_report import SPAN_CURVES_NAME, span_lines, write_spans

QUICKSTART = Path(__file__).resolve().parent / "configs" / "quickstart.yaml"

_logger = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: Arguments after the script's name; those of this process when None.

    Returns:
        Exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        UsageError: Settings, files or data are at fault; nothing has been written.
    """
    command = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    args, in_place = read_settings(command[1:])
    processes = join_processes(args.device)
    try:
        with RunLog(processes.is_primary) as log, StopSignals() as signals:
            try:
                run = set_up(args, processes)
                return train(run, command, in_place, log, signals)
            except Stopped as stopped:
                _logger.warning("stopped by %s", stopped)
                return stopped.exit_code
    finally:
        leave_processes()


def read_settings(argv: Sequence[str]) -> tuple[argparse.Namespace, bool]:
    """The run's settings, and whether a resumed run goes on in its own folder.

    A run resumed by its folder brings its settings along: the command line goes before them.
    """
    args = parse_train_args(argv, QUICKSTART)
    if not args.resume or args.resume == "auto":
        return args, False
    folder = resume.find_state(args.resume).parent
    in_place = report.goes_on_in(folder, args.given)
    if args.config or not (folder / report.ARGS_NAME).is_file():
        return args, in_place
    saved = parse_train_args(["--config", str(folder / report.ARGS_NAME), *argv], QUICKSTART)
    # What was meant for the first session only.
    for key in ("start_epoch", "stop_epoch", "no_resume_opt"):
        setattr(saved, key, getattr(args, key))
    if not in_place:
        saved.output, saved.experiment = args.output, args.experiment
    return saved, in_place


def train(
    run: Run, command: Sequence[str], in_place: bool, log: RunLog, signals: StopSignals
) -> int:
    """Resume if asked to, make the run folder, and train to the last epoch or a signal."""
    args, processes = run.args, run.processes
    folder, state_path = decide_on_primary(
        processes, lambda: report.plan_run(args, run.metadata["img_size"], in_place)
    )
    saver = Saver(
        folder,
        run.metadata,
        metric_name=args.eval_metric,
        keep=args.checkpoint_hist,
        milestones=args.save_epochs,
    )
    state = None if state_path is None else resume.load_state(state_path)
    start, rows = find_start(run, state, state_path)
    stop = min(args.stop_epoch or run.epochs, run.epochs)
    decide_on_primary(processes, lambda: report.make_folder(folder))
    trackers = None
    if processes.is_primary:
        log.to_file(folder / report.LOG_NAME)
        _logger.info("run folder %s", folder)
        if state is not None and state["args"]["eval_metric"] == args.eval_metric:
            saver.adopt(state["saver"], state_path.parent)
        report.write_args(folder, as_yaml_dict(args))
        report.write_environment(folder, report.environment(processes, command))
        trackers = report.Trackers(args, folder, as_yaml_dict(args), start)
        run.trainer.image_folder = folder if args.save_images else None
        run.draws = curves.can_draw()
    try:
        for epoch in range(start, stop):
            if stops_early(args, rows):
                break
            rows.append(train_and_evaluate(run, epoch, last=epoch + 1 == stop))
            with signals.held():
                save(run, epoch, saver, rows)
            if trackers is not None:
                trackers.log(rows[-1])
    except Stopped:
        done = rows[-1]["epoch"] + 1 if rows else 0
        advice = f": --resume {folder} goes on from there" if done else ""
        _logger.warning("%d whole epochs are saved%s", done, advice)
        raise
    finally:
        if trackers is not None:
            trackers.close()
    if processes.is_primary:
        conclude(args, saver, rows)
    return 0


def find_start(
    run: Run, state: Mapping[str, Any] | None, state_path: Path | None
) -> tuple[int, list[dict[str, Any]]]:
    """Put a saved state in place, if there is one; the first epoch to train and the rows so far."""
    args, schedule = run.args, run.trainer.schedule
    start, rows = 0, []
    if state is not None:
        check_same_holdout(args, state["args"], state_path)
        resume.restore(run.trainer, state, state_path, with_optimizer=not args.no_resume_opt)
        start, rows = state["epochs_done"], list(state["rows"])
        _logger.info("resumed %s after %d epochs", state_path, start)
    if args.start_epoch is not None:
        start = args.start_epoch
        rows = [row for row in rows if row["epoch"] < start]
        if schedule is not None:
            schedule.step_update(start * num_updates(args, len(run.train_loader)))
            schedule.step(start)
    return start, rows


def train_and_evaluate(run: Run, epoch: int, last: bool) -> dict[str, Any]:
    """One epoch: train, evaluate where it is due, move the schedule; returns the summary's row."""
    args, trainer, processes = run.args, run.trainer, run.processes
    began, label = time.perf_counter(), f"{epoch + 1}/{run.epochs}"
    set_epoch(run.train_loader, epoch)
    losses = trainer.train_epoch(run.train_loader, epoch, f"train {label}")
    if math.isnan(losses["loss"]):
        _logger.warning("epoch %d: the training loss is not a number", epoch + 1)
    task, lr = trainer.task, current_lr(trainer.optimizer)
    if processes.distributed and args.dist_bn and not args.sync_bn:
        distribute_bn(task.get_trainable_module(), processes.world_size, args.dist_bn == "reduce")
        if task.has_ema() and not args.model_ema_force_cpu:
            ema = task.get_trainable_module(ema=True)
            distribute_bn(ema, processes.world_size, args.dist_bn == "reduce")
    evaluated: dict[str, float] = {}
    due = (epoch + 1) % args.val_interval == 0 or epoch + 1 in (args.save_epochs or ())
    if due or last:
        evaluated = evaluate_model(run, ema=False)
        if task.has_ema() and not args.model_ema_force_cpu:
            averaged = evaluate_model(run, ema=True)
            evaluated.update({name + EMA: value for name, value in averaged.items()})
    if trainer.schedule is not None:
        trainer.schedule.step(epoch + 1, evaluated.get(args.eval_metric))
    metrics = report.metrics_text({"training loss": losses["loss"], **evaluated})
    _logger.info("epoch %s: %s, lr %.3g, %.1f s", label, metrics, lr, time.perf_counter() - began)
    spans = task.spans()
    for line in span_lines(spans):
        _logger.info("epoch %s: %s", label, line)
    return report.summary_row(epoch, losses, evaluated, lr, spans)


def evaluate_model(run: Run, ema: bool) -> dict[str, float]:
    """Metrics of the model, or of its averaged weights, on the validation images."""
    args, processes = run.args, run.processes
    model = run.trainer.task.get_eval_model(ema=ema)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # evaluation needs no communication
    with Progress(
        len(run.eval_loader),
        "evaluate averaged weights" if ema else "evaluate",
        log_interval=args.log_interval,
        enabled=processes.is_primary,
    ) as progress:
        return evaluate(
            with_views(model, args),
            run.eval_loader,
            device=processes.device,
            amp_autocast=run.trainer.precision.autocast,
            channels_last=args.channels_last,
            progress=progress,
            branch_counts=run.trainer.task.branch_counts(),
        )


def save(run: Run, epoch: int, saver: Saver, rows: list[dict[str, Any]]) -> None:
    """Write weights, summary, curves and, last, the state to resume from."""
    task = run.trainer.task
    if run.processes.is_primary:
        metrics = {key[5:]: value for key, value in rows[-1].items() if key.startswith("eval_")}
        saver.save(epoch, task.get_trainable_module(), task.get_trainable_module(ema=True), metrics)
        report.write_summary(saver.folder, rows)
        if run.draws:
            curves.draw_curves(rows, saver.folder / report.CURVES_NAME, saver.folder.name)
        write_spans(saver.folder, rows, saver.folder.name if run.draws else None)
    state = resume.collect_state(
        run.trainer,
        epoch + 1,
        {
            "rows": rows,
            "saver": saver.state_dict(),
            "args": as_yaml_dict(run.args),
            "metadata": run.metadata,
        },
    )
    if run.processes.is_primary:
        resume.save_state(saver.folder / resume.STATE_NAME, state)


def conclude(args: argparse.Namespace, saver: Saver, rows: list[dict[str, Any]]) -> None:
    """Say what came out of the run and what to do with it."""
    best = saver.best.get(saver.best_kind() or "")
    if best is not None:
        averaged = " of the averaged weights" if saver.best_kind() == EMA else ""
        _logger.info(
            "best %s%s: %.4g in epoch %d",
            args.eval_metric, averaged, best["metric"], best["epoch"] + 1,
        )  # fmt: skip
    for what, name in (("curves", report.CURVES_NAME), ("spans", SPAN_CURVES_NAME)):
        if (picture := saver.folder / name).is_file():
            _logger.info("%s: %s", what, picture)
    _logger.info("to validate: %s --checkpoint %s", validate_command(), saver.best_file())
    print(f"--result\n{json.dumps({'best': saver.best, 'last': rows[-1] if rows else {}})}")


def validate_command() -> str:
    """How to start validate.py from here, with a path to each of the two that is not at hand."""
    # A virtual environment that is used but not activated is not what `python` means to the user.
    elsewhere = sys.prefix not in (sys.base_prefix, os.environ.get("VIRTUAL_ENV"))
    script = Path(__file__).resolve().with_name("validate.py")
    if script.parent == Path.cwd():
        script = Path(script.name)
    return shlex.join([sys.executable if elsewhere else "python", str(script)])


if __name__ == "__main__":
    run_cli(main)
