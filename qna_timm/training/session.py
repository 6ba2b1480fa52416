"""A run under way: epoch after epoch, what is saved when, and how it stops before its end."""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.scheduler import PlateauLRScheduler
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel

from qna_timm.training import resume
from qna_timm.training.control import Decision
from qna_timm.training.data.bad_images import merge_replaced
from qna_timm.training.data.shards import ShardPlan
from qna_timm.training.early_stop import stops_early
from qna_timm.training.elastic import images_asked
from qna_timm.training.errors import RunFailed
from qna_timm.training.evaluation import evaluate
from qna_timm.training.flags.recipe import as_yaml_dict
from qna_timm.training.nonfinite import NonFinite
from qna_timm.training.optim import current_lr
from qna_timm.training.processes.distributed import decide_on_primary, gather_to_primary
from qna_timm.training.reporting import curves, report
from qna_timm.training.reporting.progress import Progress, epoch_text
from qna_timm.training.reporting.span_report import span_lines, write_spans
from qna_timm.training.resume import Position
from qna_timm.training.run import Run, with_views
from qna_timm.training.signals import Stopped
from qna_timm.training.storage.saver import EMA, Saver
from qna_timm.training.storage.state_files import (
    PREVIOUS_NAME,
    STATE_NAME,
    load_state,
    save_state,
    whole_state,
)
from qna_timm.training.storage.writes import Writes
from qna_timm.training.updates import num_updates

# Batches of an accelerator's evaluation between two looks at signals: a reduction costs more than
# it is worth where a batch takes milliseconds.
_POLL_BATCHES = 10
# What may fail to be written, for the log.
WEIGHTS, SPANS = "weights", "spans"
_OF_EPOCHS = (WEIGHTS, SPANS, report.SUMMARY_NAME, report.CURVES_NAME)
# Times in a row that a run goes back to its saved state.
_MOST_REWINDS = 10

_logger = logging.getLogger(__name__)


class Session:
    """Trains a run from where it stands to its end, or to a signal.

    Args:
        run: Everything that trains.
        saver: Of weights, into the run folder.
        writes: Lets a write fail without ending the run.

    Attributes:
        position: Where the run stands.
        rows: Summary of the epochs behind it.
        saved: Where the run stood when its state was saved in its folder.
        trackers: TensorBoard and the like, on the first process.
    """

    def __init__(self, run: Run, saver: Saver, writes: Writes) -> None:
        self.run = run
        self.saver = saver
        self.writes = writes
        self.folder: Path = saver.folder
        self.position = Position()
        self.rows: list[dict[str, Any]] = []
        self.trackers: report.Trackers | None = None
        self._bad_images: list[dict[str, Any]] = []
        self.saved: Position | None = None
        self._rewinds = 0
        self._records: list[str] = []  # of updates that were not made, to be written
        self._epoch_written = True
        self._images_asked = run.args.batch_size * run.args.grad_accum_steps
        run.trainer.on_skip = self.record
        run.trainer.writes = writes

    def restore(self, state: Mapping[str, Any], path: Path, with_optimizer: bool = True) -> None:
        """Go on from a saved state.

        Args:
            state: From `load_state`.
            path: Where it is from.
            with_optimizer: See `resume.restore`.

        Raises:
            UsageError: It is of another model or optimizer.
        """
        position = resume.restore(self.run.trainer, state, path, with_optimizer=with_optimizer)
        self.position = self._in_own_updates(position, state.get("plan"))
        self.rows, self._bad_images = list(state["rows"]), list(state["bad_images"])
        self._epoch_written = state["epoch_written"]
        if self.run.plan and state.get("plan") == self.run.plan._asdict():
            self._images_asked = images_asked(state)
        by_choice = Path(self.run.args.resume).name == PREVIOUS_NAME  # the last may be whole
        if path.parent.resolve() == self.folder.resolve() and not by_choice:
            self.saved = self.position
        _logger.info("resumed %s after %s", path, self.position)

    def _in_own_updates(self, position: Position, plan: Mapping[str, int] | None) -> Position:
        """Where a run stands that now makes updates of another size: not further than it was."""
        if not (plan and self.run.plan) or plan == self.run.plan._asdict():
            return position
        saved, now = ShardPlan(**plan), self.run.plan
        images = position.updates * saved.batch_size * saved.shards_per_update
        updates = images // (now.batch_size * now.shards_per_update)
        return position._replace(updates=min(updates, self._updates_per_epoch()))

    def start_at(self, epoch: int) -> None:
        """Start at an epoch of the user's choice, ``--start-epoch``."""
        run = self.run
        self.position = Position(epoch)
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        self._epoch_written = True
        schedule = run.trainer.schedule
        if isinstance(schedule, PlateauLRScheduler):
            schedule.step(epoch)
        else:
            resume.move_schedule(run.trainer, epoch, epoch * self._updates_per_epoch())

    def train(self, stop: int) -> None:
        """Train until so many epochs are done.

        Raises:
            Stopped: A signal came; the state has been saved.
            RunFailed: The run cannot go on from what was last saved, which of a loss that is not
                finite is the state before its update.
        """
        if not self._epoch_written and self.position == Position(self.position.epoch):
            self._save_epoch()
        args = self.run.args
        rewinds, elsewhere = args.on_nonfinite == "rewind", self.position != Position()
        if (self.saved is None and (rewinds or elsewhere)) or (rewinds and args.no_resume_opt):
            # There has to be something to go back to; and a run that has begun in the middle of
            # another does not depend on that one any more.
            self.save_state()
        if self.position.epoch >= stop:
            _logger.info("nothing is left to train: %s", self.position)
        while self.position.epoch < stop:
            if not self.position.updates and stops_early(args, self.rows):
                return
            self.rows.append(self._train_and_evaluate(stop))
            self.position = Position(self.position.epoch + 1)
            self._save_epoch()
            self._obey(self.run.control.decide())

    def _obey(self, decision: Decision) -> None:
        """Save and stop, as the processes have decided."""
        if (decision.save or decision.signum) and self.saved != self.position:
            self.writes.retry()
            self.save_state()
        if decision.signum:
            raise Stopped(decision.signum)

    def _between(self, updates: int, decision: Decision) -> None:
        """See `Trainer.train_epoch`."""
        self.position = Position(self.position.epoch, updates)
        self._obey(decision)

    def _updates_per_epoch(self) -> int:
        return num_updates(self.run.args, len(self.run.train_loader))

    def _train_and_evaluate(self, stop: int) -> dict[str, Any]:
        """What is left of an epoch: train, evaluate where it is due, move the schedule.

        Returns:
            The summary's row.
        """
        run, epoch = self.run, self.position.epoch
        args, trainer = run.args, run.trainer
        began, label = time.perf_counter(), f"{epoch + 1}/{run.last_epoch}"
        if self.position.evaluating:
            losses = trainer.mean.compute()
        else:
            losses = self._train_epoch(epoch, label)
            self._average_statistics()
            self.position = Position(epoch, self._updates_per_epoch(), evaluating=True)
            self._obey(run.control.decide())
        if math.isnan(losses["loss"]):
            _logger.warning("epoch %d: the training loss is not a number", epoch + 1)
        task, lr = trainer.task, current_lr(trainer.optimizer)
        evaluated: dict[str, float] = {}
        due = (epoch + 1) % args.val_interval == 0 or epoch + 1 in (args.save_epochs or ())
        if due or epoch + 1 == stop:
            evaluated = self._evaluate(ema=False)
            if task.has_ema() and not args.model_ema_force_cpu:
                averaged = self._evaluate(ema=True)
                evaluated.update({name + EMA: value for name, value in averaged.items()})
        if trainer.schedule is not None:
            # as timm has it, a plateau is one of the averaged weights where they are evaluated
            own = evaluated.get(args.eval_metric)
            trainer.schedule.step(epoch + 1, evaluated.get(args.eval_metric + EMA, own))
        if trainer.skipped:
            losses["skipped_updates"] = trainer.skipped
        metrics = epoch_text(losses, evaluated, getattr(task, "num_branches", None))
        seconds = time.perf_counter() - began
        _logger.info("epoch %s: %s, lr %.3g, %.1f s", label, metrics, lr, seconds)
        spans = task.spans()
        for line in span_lines(spans):
            _logger.info("epoch %s: %s", label, line)
        return report.summary_row(epoch, losses, evaluated, lr, spans)

    def _train_epoch(self, epoch: int, label: str) -> dict[str, float]:
        """Mean losses of the epoch; goes back to the last saved state if that is the policy."""
        run, updates = self.run, self.position.updates
        while True:
            run.train_loader.set_epoch(epoch, updates * run.args.grad_accum_steps)
            try:
                return run.trainer.train_epoch(
                    run.train_loader, epoch, f"train {label}", updates, self._between
                )
            except NonFinite as bad:
                self.record(bad)
                updates = self._go_on_behind(bad)

    def record(self, bad: NonFinite) -> None:
        """Say what was not finite, and write it down."""
        _logger.warning("%s", bad)
        if self.run.processes.is_primary:
            self._records.append(bad.as_json())
            self.writes.keep_trying(report.NONFINITE_NAME, self._write_records)

    def _write_records(self) -> None:
        report.append_lines(self.folder / report.NONFINITE_NAME, self._records)
        self._records.clear()

    def _go_on_behind(self, bad: NonFinite) -> int:
        """Weights of the last saved state, for the updates behind the bad one.

        Returns:
            Updates of the epoch that are behind us.

        Raises:
            RunFailed: Going back is not the policy, or does not help.
        """
        run, trainer = self.run, self.run.trainer
        path = self.folder / STATE_NAME
        can_rewind = self.saved is not None and self._rewinds < _MOST_REWINDS
        if run.args.on_nonfinite != "rewind" or not can_rewind:
            text = str(bad)
            if run.args.on_nonfinite == "skip":
                text += f"; the {trainer.skipped_in_a_row - 1} updates before it were left out"
            elif self._rewinds:
                text += f"; gone back {self._rewinds} times since the last save"
            trainer.skipped_in_a_row = 0
            self.position = Position(bad.epoch, bad.update)
            self.save_state()
            raise RunFailed(text, everywhere=True)
        self._rewinds += 1
        path = decide_on_primary(run.processes, lambda: whole_state(path))
        state = load_state(path)
        mean, skipped = trainer.mean.state(), trainer.skipped
        resume.restore(trainer, state, path)
        trainer.mean.clear()
        trainer.mean.load(mean)
        trainer.skipped = skipped + 1
        updates = bad.epoch * self._updates_per_epoch() + bad.update + 1
        resume.move_schedule(trainer, bad.epoch, updates)
        _logger.warning("gone back to the weights of %s", path)
        return bad.update + 1

    def _average_statistics(self) -> None:
        """Batch norm's running statistics, over all processes."""
        run, task = self.run, self.run.trainer.task
        args, processes = run.args, run.processes
        if not (processes.distributed and args.dist_bn) or args.sync_bn:
            return
        reduce = args.dist_bn == "reduce"
        distribute_bn(task.get_trainable_module(), processes.world_size, reduce)
        if task.has_ema() and not args.model_ema_force_cpu:
            distribute_bn(task.get_trainable_module(ema=True), processes.world_size, reduce)

    def _evaluate(self, ema: bool) -> dict[str, float]:
        """Metrics of the model, or of its averaged weights, on the validation images."""
        run, args, processes = self.run, self.run.args, self.run.processes
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
                after_batch=self._poll,
            )

    def _poll(self, batch: int) -> None:
        """Look for signals between two batches of an evaluation."""
        processes = self.run.processes
        # Streams may have more batches on one process than on another.
        if processes.distributed and self.run.eval_loader.sampler is None:
            return
        if processes.device.type == "cpu" or batch % _POLL_BATCHES == 0:
            self._obey(self.run.control.decide())

    def _save_epoch(self) -> None:
        """Write weights, summary, curves and, last, the state to resume from."""
        run, folder, rows = self.run, self.folder, self.rows
        task, writes = run.trainer.task, self.writes
        if run.processes.is_primary:
            metrics = {key[5:]: value for key, value in rows[-1].items() if key.startswith("eval_")}
            model, ema = task.get_trainable_module(), task.get_trainable_module(ema=True)
            title = folder.name if run.draws else None
            with writes.trying(WEIGHTS):
                updates = run.trainer.num_updates
                self.saver.save(rows[-1]["epoch"], model, ema, metrics, update=updates)
            tables = {report.SUMMARY_NAME: lambda: report.write_summary(folder, rows)}
            if run.draws:
                picture = folder / report.CURVES_NAME
                tables[report.CURVES_NAME] = lambda: curves.draw_curves(rows, picture, folder.name)
            tables[SPANS] = lambda: write_spans(folder, rows, title)
            for name, write in tables.items():
                writes.keep_trying(name, write, now=False)
            writes.retry()
        self.save_state()
        if self.trackers is not None:
            with writes.trying("trackers"):
                self.trackers.log(rows[-1])

    def save_state(self) -> None:
        """Write what the run can go on from; called by every process."""
        run, position = self.run, self.position
        self._bad_images = self._all_bad_images()
        state = resume.collect_state(
            run.trainer,
            position,
            {
                "rows": self.rows,
                "saver": self.saver.state_dict(),
                "args": as_yaml_dict(run.args),
                "metadata": run.metadata,
                "plan": run.plan and run.plan._asdict(),
                "images_asked": self._images_asked,
                "bad_images": self._bad_images,
                "epoch_written": self.writes.missing.isdisjoint(_OF_EPOCHS),
                **run.identity,
            },
        )
        if run.processes.is_primary:
            with self.writes.trying(STATE_NAME):
                save_state(self.folder / STATE_NAME, state)
            if self._bad_images:
                with self.writes.trying(report.BAD_IMAGES_NAME):
                    report.write_bad_images(self.folder, self._bad_images)
        run.control.restart()
        if decide_on_primary(run.processes, lambda: STATE_NAME not in self.writes.missing):
            self.saved, self._rewinds = position, 0

    def _all_bad_images(self) -> list[dict[str, Any]]:
        """Images replaced up to now, on the first process; elsewhere an empty list."""
        run, position = self.run, self.position
        batches = position.updates * run.args.grad_accum_steps
        train, evaluated = run.train_loader, run.eval_loader
        mine = train.replaced((position.epoch, batches)) + evaluated.replaced()
        found = gather_to_primary(mine, run.processes) or ()
        return merge_replaced(self._bad_images, *found)
