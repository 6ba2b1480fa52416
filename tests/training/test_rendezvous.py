"""Processes that meet in a store which an earlier start has filled."""

import threading
import time

import pytest
import torch.distributed as dist

from qna_timm.training.processes.rendezvous import _join_part, _open_part


def start(store: dist.Store, world_size: int, first_waits: float = 0.0) -> list[int]:
    """Numbers of the parts that the ranks of one start agree on."""
    numbers = [0] * world_size
    deadline = time.monotonic() + 20

    def meet(rank: int) -> None:
        if rank == 0:
            time.sleep(first_waits)
            numbers[0] = _open_part(store, world_size, deadline)
        else:
            numbers[rank] = _join_part(store, rank, deadline)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return numbers


def test_every_start_has_a_part_of_its_own() -> None:
    """Also where the others come first, and see only what the start before them left."""
    store = dist.HashStore()
    assert start(store, 3) == [1, 1, 1]
    assert start(store, 3, first_waits=0.3) == [2, 2, 2]
    assert start(store, 2) == [3, 3]


def test_who_never_comes() -> None:
    for meet in (_open_part, _join_part):
        with pytest.raises(dist.DistNetworkError, match="timed out waiting for"):
            meet(dist.HashStore(), 2, time.monotonic() + 0.2)
