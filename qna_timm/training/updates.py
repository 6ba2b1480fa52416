"""How many batches and updates an epoch has, and which batches make an update."""

import argparse
import math


def num_batches(args: argparse.Namespace, loader_batches: int) -> int:
    """Batches of one epoch: the loader's, or what ``--max-steps`` updates take."""
    if args.max_steps is None:
        return loader_batches
    return min(loader_batches, args.max_steps * args.grad_accum_steps)


def num_updates(args: argparse.Namespace, loader_batches: int) -> int:
    """Updates of one epoch; the last may be of fewer batches."""
    return math.ceil(num_batches(args, loader_batches) / args.grad_accum_steps)


def group_of(number: int, batches: int, accumulation: int) -> tuple[int, bool]:
    """Size of the group that a micro-batch is accumulated in, and whether it closes it.

    Args:
        number: Of the micro-batch in the epoch.
        batches: Of the epoch.
        accumulation: Batches of a whole group; the epoch's last has what is left.
    """
    start = number - number % accumulation
    size = min(accumulation, batches - start)
    return size, number + 1 == start + size
