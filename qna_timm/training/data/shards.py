"""How an epoch is cut into shards, whoever computes them.

A shard is a micro-batch of `batch_size` images that are drawn, augmented and mixed together. The
cut is fixed for the life of a run; a resumed run may share the shards out over another number of
processes, and every update still sees the same ones.

Letters: b images of a shard, S shards of an update, N of an epoch, P processes.
"""

from typing import NamedTuple

from qna_timm.training.errors import UsageError


class ShardPlan(NamedTuple):
    """The shards of every epoch.

    Update u takes in the positions from u * S * b of the epoch's order, shared out over its
    L = min(S, N - u * S) shards one by one: its shard j has the positions u * S * b + j + L * i,
    i < b. Shards are numbered through the epoch, n = u * S + j.

    Attributes:
        batch_size: Images of a shard, b.
        shards_per_update: Shards of an update, S; the last update of an epoch may have fewer.
        shards_per_epoch: N.
    """

    batch_size: int
    shards_per_update: int
    shards_per_epoch: int

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` processes adds up for an update, S / P.

        Raises:
            UsageError: The shards cannot be shared out equally.
        """
        shards, epoch = self.shards_per_update, self.shards_per_epoch
        if shards % world_size or epoch % world_size:
            fitting = [str(n) for n in range(1, shards + 1) if not (shards % n or epoch % n)]
            *most, last = fitting
            would = f"{', '.join(most)} or {last}" if most else last
            raise UsageError(
                f"{world_size} processes cannot share updates of {shards} x {self.batch_size} "
                f"images, {epoch} x {self.batch_size} an epoch, as the run began; {would} would do"
            )
        return shards // world_size

    def updates(self) -> int:
        """Updates of an epoch."""
        return -(-self.shards_per_epoch // self.shards_per_update)

    def update_shards(self, update: int) -> int:
        """Shards L of an update of the epoch, counted from 0."""
        return min(self.shards_per_update, self.shards_per_epoch - update * self.shards_per_update)

    def positions(self, shard: int) -> range:
        """Where in the epoch's order the images of a shard are."""
        update, place = divmod(shard, self.shards_per_update)
        first = update * self.shards_per_update * self.batch_size + place
        step = self.update_shards(update)
        return range(first, first + step * self.batch_size, step)


def plan_shards(
    num_images: int,
    batch_size: int,
    world_size: int,
    grad_accum_steps: int = 1,
    epoch_repeats: float = 0,
) -> ShardPlan:
    """The plan of a run that begins: every process gets as many shards, images left over none.

    Args:
        num_images: Images of the training set.
        batch_size: Images of a micro-batch of one process.
        world_size: Number of processes.
        grad_accum_steps: Micro-batches that a process adds up for an update.
        epoch_repeats: Passes over the images per epoch (0 means 1).

    Raises:
        UsageError: The processes cannot fill one micro-batch each.
    """
    images = round(num_images * (epoch_repeats or 1))
    shards = images // (batch_size * world_size) * world_size
    if not shards:
        raise too_large_batch(batch_size, world_size, num_images)
    return ShardPlan(batch_size, world_size * grad_accum_steps, shards)


def too_large_batch(batch_size: int, world_size: int, num_images: int) -> UsageError:
    """The error of a training set that does not fill one micro-batch of every process."""
    step = f"{batch_size}"
    if world_size > 1:
        step += f" x {world_size} processes = {batch_size * world_size} images a step"
    return UsageError(
        f"--batch-size {step} is larger than the training set of {num_images} images; "
        f"use --batch-size {max(1, num_images // world_size)} or less"
    )
