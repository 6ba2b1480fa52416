"""When a run ends before its last epoch because its metric has stopped getting better."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qna_timm.training.storage.saver import EMA, is_better

_logger = logging.getLogger(__name__)


def last_gain(rows: Sequence[Mapping[str, Any]], metric_name: str) -> int:
    """The latest epoch in which the model, or its averaged weights, beat their own best metric.

    Args:
        rows: The summary so far, at least one row; epochs without evaluation have no metric.
        metric_name: `top1`, `top5` or `loss`; the loss is minimised.

    Returns:
        Number of the epoch, from 0; the first one where no metric was a number.
    """
    gain, best = rows[0]["epoch"], {"": None, EMA: None}
    for row in rows:
        for kind in best:
            metric = row.get(f"eval_{metric_name}{kind}")
            if is_better(metric, best[kind], minimise=metric_name == "loss"):
                best[kind], gain = metric, row["epoch"]
    return gain


def stops_early(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the run is over: `epoch - last gain > --early-stop-epochs` in an evaluated epoch.

    A function of the summary, and so the same on every process and after a resume. Epochs that are
    not evaluated never end a run.

    Args:
        args: Flags, of which `early_stop_epochs` and `eval_metric` are read.
        rows: The summary so far.
    """
    if not args.early_stop_epochs or not rows or f"eval_{args.eval_metric}" not in rows[-1]:
        return False
    epoch, gain = rows[-1]["epoch"], last_gain(rows, args.eval_metric)
    if epoch - gain <= args.early_stop_epochs:
        return False
    _logger.info(
        "ended after epoch %d: %s has not got better since epoch %d (--early-stop-epochs %d)",
        epoch + 1,
        args.eval_metric,
        gain + 1,
        args.early_stop_epochs,
    )
    return True
