"""Where the processes of one start meet, in a store that an earlier start may have used.

torchrun that starts lost processes again gives them the store of the lost ones, addresses that
nobody listens on any more included: whoever reads these connects to nothing, or waits.
"""

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_PAUSE = 0.05  # seconds
_DEFAULT_SECONDS = 1800.0


def meets_in_used_store() -> bool:
    """Whether torchrun lends its own store, which outlives the processes that it starts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_store(rank: int, world_size: int, timeout: timedelta | None) -> dist.Store:
    """A part of the launcher's store that the processes of this start alone use.

    Rank 0 opens a part of a new number. The others leave a token of their own in the part of the
    newest number that they see, until they find it in rank 0's list there: lists of earlier starts
    lack it.

    Args:
        rank: Of this process.
        world_size: Number of processes.
        timeout: Longest wait for the others; half an hour when None.

    Raises:
        torch.distributed.DistError: They did not come in time.
    """
    store, rank, world_size = next(dist.rendezvous("env://", rank, world_size))
    seconds = _DEFAULT_SECONDS if timeout is None else timeout.total_seconds()
    deadline = time.monotonic() + seconds
    number = (
        _open_part(store, world_size, deadline) if rank == 0 else _join_part(store, rank, deadline)
    )
    return dist.PrefixStore(f"start-{number}", store)


def _open_part(store: dist.Store, world_size: int, deadline: float) -> int:
    number = store.add("qna_timm/starts", 1)
    keys = [f"qna_timm/{number}/rank-{rank}" for rank in range(1, world_size)]
    while not store.check(keys):
        _pause(deadline, f"{world_size} processes")
    tokens = [store.get(key).decode() for key in keys]
    store.set(f"qna_timm/{number}/all", json.dumps(tokens))
    return number


def _join_part(store: dist.Store, rank: int, deadline: float) -> int:
    token = uuid.uuid4().hex
    while True:
        if store.check(["qna_timm/starts"]):
            number = store.add("qna_timm/starts", 0)
            store.set(f"qna_timm/{number}/rank-{rank}", token)
            known = f"qna_timm/{number}/all"
            if store.check([known]) and token in json.loads(store.get(known)):
                return number
        _pause(deadline, "rank 0")


def _pause(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise dist.DistNetworkError(f"timed out waiting for {whom}")
    time.sleep(_PAUSE)
