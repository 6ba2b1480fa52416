"""Which weights of a run are kept: the last, the best, the best few, the asked-for epochs."""

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from timm.utils import unwrap_model
from torch import nn

from qna_timm.training.errors import UsageError
from qna_timm.training.storage.checkpoint import save_weights, stored_metadata
from qna_timm.training.storage.files import replacing, second_name

EMA = "_ema"
"""Ending of the names of averaged weights and of their metrics."""


def is_better(metric: float | None, than: float | None, minimise: bool) -> bool:
    """Whether `metric` beats `than`; NaN and None beat nothing, every number beats them."""
    if metric is None or math.isnan(metric):
        return False
    if than is None or math.isnan(than):
        return True
    return metric < than if minimise else metric > than


class Saver:
    """Writes the weights of a run into its folder.

    Per kind of weights (the model's, and with EMA the averaged ones, ending in ``_ema``):
    ``last.safetensors``; ``best.safetensors`` by that kind's own metric; ``checkpoint-N`` for the
    best epochs; ``milestone-N`` after N epochs where asked for.

    Args:
        folder: The run folder.
        metadata: What all files say about the run, see `checkpoint`.
        metric_name: ``top1``, ``top5`` or ``loss``; the loss is minimised.
        keep: Number of ``checkpoint-N`` kept, the best ones.
        milestones: Numbers of completed epochs whose weights are kept for good.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Mapping[str, Any],
        *,
        metric_name: str,
        keep: int,
        milestones: list[int] | None = None,
    ) -> None:
        self.folder = folder
        self.metadata = dict(metadata)
        self.metric_name = metric_name
        self.minimise = metric_name == "loss"
        self.keep = keep
        self.milestones = set(milestones or ())
        self.best: dict[str, dict[str, Any]] = {}
        self.kept: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"best": self.best, "kept": self.kept}

    def adopt(self, state: Mapping[str, Any], folder: Path, before: int | None = None) -> None:
        """Take over what `state_dict` said, as far as the files are there.

        Args:
            state: From the run that is resumed.
            folder: Its folder; if it is not ours, its best weights are copied into ours.
            before: Epoch, from 0, that the run goes on in: what was best from there on is so no
                longer. Files stay until others take their place.
        """
        for kind, best in state["best"].items():
            if before is not None and best["epoch"] >= before:
                continue
            own, other = self._file("best", kind), folder / self._file("best", kind).name
            if not own.is_file() and other.is_file():
                with replacing(own) as temporary:
                    shutil.copyfile(other, temporary)
            if own.is_file():
                self.best[kind] = best
        self.kept = [
            entry
            for entry in state["kept"]
            if self._file(f"checkpoint-{entry['epoch']}", "").is_file()
            and (before is None or entry["epoch"] < before)
        ]

    def save(
        self,
        epoch: int,
        model: nn.Module,
        ema: nn.Module | None,
        metrics: Mapping[str, float],
        *,
        update: int | None = None,
    ) -> None:
        """Write the weights after an epoch.

        Nothing is removed before what takes its place is on disk and proven.

        Args:
            epoch: Number of the epoch just done, from 0.
            model: The model, wrapped or not.
            ema: The averaged model, wrapped or not.
            metrics: Of this epoch's evaluation, the averaged model's ending in ``_ema``; empty
                after an epoch without evaluation.
            update: Updates done in the run.

        Raises:
            OSError: A file could not be written. What was kept before is whole, and what is known
                as best and kept is what is on disk: the next save goes on from that.
        """
        kinds = {"": model} if ema is None else {"": model, EMA: ema}
        try:
            self._save(epoch, kinds, metrics, update)
        except OSError:
            self._take_stock(epoch, list(kinds), metrics)
            raise

    def _save(
        self,
        epoch: int,
        kinds: Mapping[str, nn.Module],
        metrics: Mapping[str, float],
        update: int | None,
    ) -> None:
        for kind, module in kinds.items():
            # Averages kept on the CPU are not evaluated and follow the model's metric.
            own = metrics.get(self.metric_name + kind)
            metric = metrics.get(self.metric_name) if own is None else own
            about = {
                "epoch": epoch,
                "update": update,
                "metric": own,
                "metric_name": self.metric_name,
                "ema": kind == EMA,
            }
            save_weights(self._file("last", kind), unwrap_model(module), {**self.metadata, **about})
            best = self.best.get(kind)
            if is_better(metric, best and best["metric"], self.minimise):
                self._copy_last("best", kind)
                self.best[kind] = {"epoch": epoch, "metric": metric, "measured": own is not None}
            if epoch + 1 in self.milestones:
                self._copy_last(f"milestone-{epoch + 1}", kind)
        self._keep_best(epoch, list(kinds), self._rank_metric(metrics))

    def _keep_best(self, epoch: int, kinds: list[str], metric: float | None) -> None:
        """Keep this epoch's weights if it is one of the best so far, and drop the one it beats."""
        if metric is None or math.isnan(metric):
            return
        ranked = self._ranked(epoch, metric)
        kept, dropped = ranked[: self.keep], ranked[self.keep :]
        if any(entry["epoch"] == epoch for entry in kept):
            for kind in reversed(kinds):  # an epoch counts as kept if the model's weights are there
                self._copy_last(f"checkpoint-{epoch}", kind)
        self.kept = ranked
        for entry in dropped:
            for kind in (EMA, ""):
                self._file(f"checkpoint-{entry['epoch']}", kind).unlink(missing_ok=True)
            self.kept.remove(entry)

    def _rank_metric(self, metrics: Mapping[str, float]) -> float | None:
        """What epochs are kept by: as in timm of the averaged weights where they are evaluated."""
        return metrics.get(self.metric_name + EMA, metrics.get(self.metric_name))

    def _ranked(self, epoch: int, metric: float) -> list[dict[str, Any]]:
        """The epochs kept and this one, the best first."""
        # After a resume that goes back, an epoch is done a second time.
        others = [entry for entry in self.kept if entry["epoch"] != epoch]
        # The sort is stable: of equal epochs the earlier stays, as timm has it.
        return sorted(
            [*others, {"epoch": epoch, "metric": metric}],
            key=lambda entry: entry["metric"],
            reverse=not self.minimise,
        )

    def _take_stock(self, epoch: int, kinds: list[str], metrics: Mapping[str, float]) -> None:
        """After a failure, know as best and kept what is on disk."""
        metric, rank = metrics.get(self.metric_name), self._rank_metric(metrics)
        for kind in kinds:
            try:
                found = stored_metadata(self._file("best", kind))
            except UsageError:
                continue  # There is none, or the disk does not even read.
            # The failure may have come after the rename.
            own = found.get("metric")
            if found.get("epoch") == epoch and (own is not None or metric is not None):
                best = {"metric": metric if own is None else own, "measured": own is not None}
                self.best[kind] = {"epoch": epoch, **best}
        if not self._file(f"checkpoint-{epoch}", "").is_file():
            with suppress(OSError):  # what had no room may not leave the half of itself
                self._file(f"checkpoint-{epoch}", EMA).unlink(missing_ok=True)
        elif rank is not None and not math.isnan(rank):
            self.kept = self._ranked(epoch, rank)
        self.kept = [
            entry for entry in self.kept if self._file(f"checkpoint-{entry['epoch']}", "").is_file()
        ]

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}{kind}.safetensors"

    def _copy_last(self, name: str, kind: str) -> None:
        """Give the last weights a second name; they are never written in place, so link them."""
        with replacing(self._file(name, kind)) as temporary:
            second_name(self._file("last", kind), temporary)

    def best_kind(self) -> str | None:
        """Of the model's and the averaged weights, the kind with the better best metric."""
        winner = None
        for kind, best in self.best.items():
            metric = best["metric"]
            if winner is None or is_better(metric, self.best[winner]["metric"], self.minimise):
                winner = kind
        return winner

    def best_file(self) -> Path:
        """The weights to go on with: the best there are, or the last without any metric."""
        kind = self.best_kind()
        return self._file("last", "") if kind is None else self._file("best", kind)
