"""Loader workers that are really killed: the same batches come, or a clear end."""

import multiprocessing
import os
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from qna_timm.training.data import datasets
from qna_timm.training.data.batches import Batches
from qna_timm.training.data.collate import Collated
from qna_timm.training.data.image_loader import ImageLoader
from qna_timm.training.data.views import ImageView
from qna_timm.training.errors import RunFailed
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
IMAGES, BATCH = 48, 6


class Deadly(Dataset):
    """Grey images; the worker that reads number `victim` does something first, if `armed` exists.

    Reading it uses up the file, so that the next attempt succeeds, unless it is `forever`.
    """

    def __init__(self, armed: Path, act: Callable[[], None], forever: bool = False) -> None:
        self.armed, self.act, self.forever = armed, act, forever
        self.victim = 20

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == self.victim and get_worker_info() is not None and self.armed.exists():
            if not self.forever:
                self.armed.unlink()
            self.act()
        return Image.fromarray(np.full((16, 16), 5 * index, np.uint8)), index


def kill_me(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def bus_error() -> None:
    kill_me(signal.SIGBUS)


def no_memory() -> None:
    raise MemoryError


def flags(*argv: str) -> Namespace:
    words = ["--dataset", "sklearn/digits", "--device", "cpu", "-b", str(BATCH), *argv]
    return parse_train_args([*words, "--aa", "rand-m9-mstd0.5"])


_opened: list[ImageLoader] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Else the garbage collector would, at its leisure, in any thread."""
    yield
    while _opened:
        _opened.pop().close()
    assert not multiprocessing.active_children()


def train_loader(dataset: Dataset, *argv: str) -> ImageLoader:
    view = ImageView(dataset, "RGB", class_names=[str(n) for n in range(IMAGES)])
    _opened.append(datasets.create_train_loader(view, flags(*argv), CONFIG, device=CPU))
    return _opened[-1]


def batches(of: ImageLoader, epoch: int, each: Callable[[int], None] | None = None) -> list[Tensor]:
    of.set_epoch(epoch)
    seen = []
    for number, (inputs, target) in enumerate(of):
        seen.append(torch.cat([inputs.flatten(1), target[:, None]], dim=1).clone())
        if each is not None:
            each(number)
    return seen


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) == IMAGES // BATCH
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def armed(tmp_path: Path) -> Path:
    path = tmp_path / "armed"
    path.touch()
    return path


@pytest.fixture
def straight(tmp_path: Path) -> list[list[Tensor]]:
    of = train_loader(Deadly(tmp_path / "never", kill_me), "-j", "0")
    return [batches(of, epoch) for epoch in range(3)]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("act", [kill_me, bus_error])
def test_killed_while_it_reads(
    workers: str,
    act: Callable[[], None],
    armed: Path,
    straight: list[list[Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    of = train_loader(Deadly(armed, act), "-j", workers)
    for epoch in (0, 1):
        assert_same(batches(of, epoch), straight[epoch])
    assert not armed.exists()
    (message,) = (r.getMessage() for r in caplog.records if "workers are started" in r.message)
    assert "epoch 1 (time 1): DataLoader worker (pid " in message
    assert f"was killed by {'SIGKILL' if act is kill_me else 'SIGBUS'}" in message


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("multi_epochs", [False, True])
def test_killed_while_the_model_computes(
    workers: str, multi_epochs: bool, armed: Path, straight: list[list[Tensor]]
) -> None:
    """PyTorch would raise in the middle of it; here the work between two batches goes on."""
    extra = ("--use-multi-epochs-loader",) if multi_epochs else ()
    of = train_loader(Deadly(armed.with_name("never"), kill_me), "-j", workers, *extra)
    finished: list[int] = []

    def compute(number: int) -> None:
        if number == 2:
            victim, *_ = multiprocessing.active_children()
            os.kill(victim.pid, signal.SIGKILL)
            end = time.monotonic() + 0.2
            while time.monotonic() < end:  # bytecodes, between which a handler would raise
                pass
        finished.append(number)

    assert_same(batches(of, 0, compute), straight[0])
    assert finished == list(range(IMAGES // BATCH))
    for victim in multiprocessing.active_children():  # between two epochs
        os.kill(victim.pid, signal.SIGKILL)
    began = time.monotonic()
    assert_same(batches(of, 1), straight[1])
    assert time.monotonic() - began < 4  # PyTorch alone looks after 5 seconds
    assert_same(batches(of, 2), straight[2])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_evaluation(workers: str, armed: Path) -> None:
    view = ImageView(Deadly(armed, kill_me), "RGB")
    args = flags("-j", workers)
    of = datasets.create_eval_loader(view, args, CONFIG, device=CPU, batch_size=BATCH)
    _opened.append(of)
    for _ in range(2):
        assert torch.cat([target for _, target in of]).tolist() == list(range(IMAGES))
    assert not armed.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_again_and_again(workers: str, armed: Path) -> None:
    of = train_loader(Deadly(armed, kill_me, forever=True), "-j", workers)
    with pytest.raises(RunFailed, match=r"^loader workers die, 3 times .*pid.*--workers") as caught:
        batches(of, 0)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    armed.unlink()
    assert len(batches(of, 0)) == IMAGES // BATCH  # nothing is left that hinders a new start


def test_no_shared_memory_left(
    armed: Path,
    straight: list[list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PyTorch's queue would print this and drop the batch, and the run would wait for ever."""
    share = Tensor.share_memory_

    def full(tensor: Tensor) -> Tensor:
        if armed.exists():
            armed.unlink()
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space"
            )
        return share(tensor)

    monkeypatch.setattr(Tensor, "share_memory_", full)
    of = train_loader(Deadly(armed.with_name("never"), kill_me), "-j", "2")
    assert_same(batches(of, 0), straight[0])
    assert not armed.exists()
    assert caplog.records[-1].getMessage().endswith("file </torch_1>: No space")


def test_batches_are_shared_by_the_worker_itself() -> None:
    of = train_loader(Deadly(Path("never"), kill_me), "-j", "1")
    inner: Batches = of._batches
    collated = next(iter(inner.loader))
    assert isinstance(collated, Collated)
    assert all(part.is_shared() for part in collated.batch)


def test_other_errors_keep_their_traceback(armed: Path) -> None:
    of = train_loader(Deadly(armed, no_memory), "-j", "1")
    with pytest.raises(MemoryError, match="Original Traceback"):
        batches(of, 0)
