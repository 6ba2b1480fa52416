"""Shards: the same samples at every update, whoever computes them and wherever one starts."""

import hashlib
import random
import time

import numpy as np
import pytest
import torch

from qna_timm.training.data.sampling import EpochSampler, seed_shard
from qna_timm.training.data.shards import ShardPlan, plan_shards
from qna_timm.training.errors import UsageError

CPU = torch.device("cpu")
IMAGES, SEED = 107, 7


def sampler(plan: ShardPlan, rank: int = 0, world_size: int = 1, **kwargs: float) -> EpochSampler:
    return EpochSampler(IMAGES, plan, seed=SEED, rank=rank, world_size=world_size, **kwargs)


def updates(plan: ShardPlan, world_size: int, epoch: int, **kwargs: float) -> list[dict]:
    """What each update of an epoch takes in: keys by number of the shard."""
    accumulation = plan.accumulation(world_size)
    taken: list[dict] = [{} for _ in range(plan.updates())]
    for rank in range(world_size):
        own = sampler(plan, rank, world_size, **kwargs)
        own.set_epoch(epoch)
        keys = list(own)
        assert len(keys) == len(own)
        for micro_batch in range(len(keys) // plan.batch_size):
            first = micro_batch * plan.batch_size
            shard = own.shard_number(micro_batch)
            taken[micro_batch // accumulation][shard] = keys[first : first + plan.batch_size]
    return taken


def test_order_of_one_process_is_that_of_the_first_release() -> None:
    """A change would make runs that were begun before it impossible to go on with."""
    own = sampler(plan_shards(53, 4, 1))
    own.num_samples = 53
    own.set_epoch(2)
    keys = [(key.index, key.seed) for key in own]
    assert len(keys) == 52
    assert hashlib.sha256(repr(keys).encode()).hexdigest().startswith("70761878c2629fa6")


@pytest.mark.parametrize("kwargs", [{}, {"aug_repeats": 3}], ids=["plain", "repeats"])
def test_updates_are_those_of_any_number_of_processes(kwargs: dict[str, float]) -> None:
    plan = plan_shards(IMAGES, 3, world_size=4, grad_accum_steps=2)
    assert plan == ShardPlan(3, 8, 32)
    began = updates(plan, 4, epoch=1, **kwargs)
    assert [len(shards) for shards in began] == [8] * 4
    for world_size in (1, 2, 8):
        assert updates(plan, world_size, epoch=1, **kwargs) == began


def test_last_update_may_have_fewer_shards() -> None:
    plan = plan_shards(IMAGES, 3, world_size=2, grad_accum_steps=5)
    assert plan == ShardPlan(3, 10, 34)
    assert [plan.update_shards(u) for u in range(plan.updates())] == [10, 10, 10, 4]
    assert [len(shards) for shards in updates(plan, 2, 0)] == [10, 10, 10, 4]
    assert updates(plan, 2, 0) == updates(plan, 1, 0)
    with pytest.raises(UsageError, match=r"^5 processes cannot share .* 1 or 2 would do$"):
        plan.accumulation(5)  # divides the updates, but not the last one


def test_an_update_holds_the_samples_that_one_large_batch_would() -> None:
    """The global batch is a stretch of the order, dealt out to the shards one by one."""
    plan, whole = plan_shards(IMAGES, 3, 2, 2), plan_shards(IMAGES, 12, 1, 1)
    large = sampler(whole)
    for update, shards in enumerate(updates(plan, 2, 0)[: whole.updates()]):
        ours = sorted(key.position for keys in shards.values() for key in keys)
        assert ours == [key.position for key in large.keys(0, update)]
        for number, keys in shards.items():
            assert [key.position for key in keys] == list(plan.positions(number))


def test_every_image_once() -> None:
    plan = plan_shards(IMAGES, 1, 1, 4)
    keys = [key for shards in updates(plan, 1, 3) for own in shards.values() for key in own]
    assert sorted(key.index for key in keys) == list(range(IMAGES))
    assert len({key.seed for key in keys}) == IMAGES


@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_an_epoch_from_anywhere(start: int) -> None:
    plan = plan_shards(IMAGES, 3, 2, 2)
    own = sampler(plan, 1, 2)
    own.set_epoch(4)
    whole = list(own)
    own.set_epoch(4, start)
    assert list(own) == whole[3 * start :]
    assert own.keys(4, start) == whole[3 * start : 3 * start + 3]
    assert len(own) == len(whole)
    own.set_epoch(4)
    assert list(own) == whole


def test_processes_that_do_not_fit() -> None:
    plan = plan_shards(IMAGES, 3, world_size=4)
    with pytest.raises(UsageError) as caught:
        sampler(plan, 0, 3)
    assert str(caught.value) == (
        "3 processes cannot share updates of 4 x 3 images, 32 x 3 an epoch, as the run began; "
        "1, 2 or 4 would do"
    )
    with pytest.raises(UsageError, match=r"--batch-size 40 x 3 processes = 120 images a step"):
        plan_shards(IMAGES, 40, 3)


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_numbers_of_the_loop_belong_to_the_shard() -> None:
    seed_shard(1, 2, 3, CPU)
    first = draws()
    draws()
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3, 0)):
        seed_shard(*other, CPU)
        assert not set(draws()) & set(first)
    seed_shard(1, 2, 3, CPU)
    assert draws() == first


def test_seeding_costs_next_to_nothing() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        for shard in range(100):
            seed_shard(1, 2, shard, CPU)
        return (time.perf_counter() - began) / 100

    assert min(seconds() for _ in range(5)) < 50e-6
