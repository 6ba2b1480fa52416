"""A loader that starts inside an epoch gives what an uninterrupted one would have given."""

import gc
import multiprocessing
import warnings
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from timm.data import FastCollateMixup
from torch import Tensor
from torch.utils.data import IterableDataset

from qna_timm.training.data import datasets, image_loader, loaders, sampling
from qna_timm.training.data.image_loader import ImageLoader
from qna_timm.training.data.shards import plan_shards
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args

CPU = torch.device("cpu")
CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
AUGMENTED = ("--aa", "rand-m9-mstd0.5", "--reprob", "0.5", "--remode", "pixel")
IMAGES, BATCH = 120, 12


def digits_args(*argv: str) -> Namespace:
    words = ["--dataset", "sklearn/digits", "--device", "cpu", "-j", "0", "-b", str(BATCH)]
    return parse_train_args([*words, "--train-num-samples", str(IMAGES), *AUGMENTED, *argv])


def loader(*argv: str, mixes: bool = False, **kwargs: object) -> ImageLoader:
    args = digits_args(*argv)
    dataset, _ = datasets.open_datasets(args)
    mixup = FastCollateMixup(mixup_alpha=1.0, cutmix_alpha=1.0, num_classes=10) if mixes else None
    return datasets.create_train_loader(
        dataset,
        args,
        CONFIG,
        device=CPU,
        mixup_collate=mixup,
        num_aug_splits=args.aug_splits,
        **kwargs,
    )


def test_every_draw_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of mixing are not those of a sample."""
    seeds: list[int] = []
    seed = sampling.seed_generators
    monkeypatch.setattr(
        sampling, "seed_generators", lambda value, *rest: (seeds.append(value), seed(value, *rest))
    )
    monkeypatch.setattr(loaders, "_PREFETCH_DEVICES", ("cpu",))
    of = loader(mixes=True)
    of.set_epoch(0)
    list(of)
    assert len(seeds) == len(set(seeds)) == IMAGES + IMAGES // BATCH


def batches(of: ImageLoader, epoch: int, start: int = 0) -> list[Tensor]:
    of.set_epoch(epoch, start)
    return [
        torch.cat([x.flatten(1), y.reshape(len(y), -1).to(x.dtype)], dim=1).clone() for x, y in of
    ]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("argv", "prefetched", "mixes"),
    [
        ((), False, False),
        (("-j", "2"), False, False),
        (("-j", "1", "--use-multi-epochs-loader"), False, False),
        (("--grad-accum-steps", "3", "--aug-repeats", "3"), False, False),
        (("--aug-splits", "2", "--aa", "augmix-m3-w3", "--resplit"), False, False),
        ((), True, False),
        (("-j", "1"), True, True),
        (("-j", "1", "--use-multi-epochs-loader"), True, True),
        (("--aug-splits", "2", "--resplit"), True, False),
    ],
    ids=[
        "plain",
        "workers",
        "multi-epochs",
        "repeats",
        "splits",
        "prefetched",
        "prefetched-mixed",
        "prefetched-multi-epochs",
        "prefetched-splits",
    ],
)
def test_resumed_in_an_epoch(
    argv: tuple[str, ...], prefetched: bool, mixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefetcher erases on the device, one batch ahead of the one that is trained on."""
    if prefetched:
        monkeypatch.setattr(loaders, "_PREFETCH_DEVICES", ("cpu",))
    straight, resumed = loader(*argv, mixes=mixes), loader(*argv, mixes=mixes)
    whole = [batches(straight, epoch) for epoch in (0, 1)]
    torch.rand(3), np.random.rand(3)  # what ran before must not matter
    assert_same(batches(resumed, 0, 4), whole[0][4:])
    assert_same(batches(resumed, 1, 0), whole[1])
    assert len(resumed) == len(whole[0]) == IMAGES // BATCH
    assert_same(batches(resumed, 1, 7), whole[1][7:])
    assert_same(batches(straight, 1, 9), whole[1][9:])
    assert batches(straight, 1, len(straight)) == []


def test_erasing_on_the_device_is_drawn_anew_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loaders, "_PREFETCH_DEVICES", ("cpu",))
    still = ("--aa", "", "--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0")
    erased = loader(*still, "--color-jitter", "0")
    bare = loader(*still, "--color-jitter", "0", "--reprob", "0")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    masks = [(a != b)[:, :-1] for a, b in zip(batches(erased, 0), batches(bare, 0), strict=True)]
    assert torch.equal(torch.rand(4), expected)
    share = torch.stack([mask.any(1).float().mean() for mask in masks])
    assert 0.2 < share.mean() < 0.8
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])


def test_left_in_an_epoch_and_gone_on_with() -> None:
    """As a run does that goes back to its last save; workers have read ahead by then."""
    of = loader("-j", "2")
    whole = batches(of, 2)
    of.set_epoch(2)
    for taken, _ in enumerate(of):
        if taken == 3:
            break
    assert_same(batches(of, 2, 2), whole[2:])


def test_updates_do_not_depend_on_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images as augmented and mixed, on 2 processes and on 1 with twice the accumulation."""
    monkeypatch.setattr(loaders, "_PREFETCH_DEVICES", ("cpu",))
    plan = plan_shards(IMAGES, BATCH, world_size=2, grad_accum_steps=2)

    def on(world_size: int, rank: int) -> list[Tensor]:
        for module in (loaders, image_loader):
            monkeypatch.setattr(module, "process_place", lambda: (rank, world_size))
        of = loader(mixes=True, plan=plan)
        assert of.plan == plan
        return batches(of, 1)

    alone, pair = on(1, 0), (on(2, 0), on(2, 1))
    shared = [pair[shard % 2][shard // 2] for shard in range(len(alone))]
    assert_same(alone, shared)
    with pytest.raises(UsageError, match="3 processes cannot share"):
        on(3, 0)


def test_workers_end_with_their_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a cycle would be left to the garbage collector, which cannot tell them to end."""
    monkeypatch.setattr(loaders, "_PREFETCH_DEVICES", ("cpu",))
    gc.disable()
    try:
        of = loader("-j", "1", mixes=True)
        batches(of, 0)
        assert multiprocessing.active_children()
        del of
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_samples_of_any_micro_batch() -> None:
    of = loader()
    samples = of.samples(3, 2)
    assert [path for _, path in samples] == [""] * BATCH
    of.set_epoch(3, 2)
    _, target = next(iter(of))
    assert [of.dataset[index][1] for index, _ in samples] == target.tolist()


class Stream(IterableDataset):
    """A stream that augments by adding noise, in an order of its own."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.transform = None

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.images, step):
            noise = np.random.rand() + torch.rand(()).item()
            yield np.full((3, 16, 16), index + noise, dtype=np.float32), index


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_read_again_and_passed_over(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    def stream() -> ImageLoader:
        args = digits_args("-j", str(workers))
        return datasets.create_train_loader(Stream(IMAGES), args, CONFIG, device=CPU)

    straight, resumed = stream(), stream()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about lengths of streams
        whole = [batches(straight, epoch) for epoch in (0, 1)]
        assert not torch.equal(whole[0][0], whole[1][0])
        assert not caplog.records
        assert_same(batches(resumed, 1, 4), whole[1][4:])
        assert_same(batches(resumed, 1, 6), whole[1][6:])
    assert [record.message for record in caplog.records if "is a stream" in record.message]
    assert len([record for record in caplog.records if "is a stream" in record.message]) == 1
    assert straight.plan.shards_per_epoch == len(straight)
    assert straight.samples(0, 0) == []
