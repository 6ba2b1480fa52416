"""Small runs of train.py with something wrong in them, for tests."""

import builtins
import contextlib
import errno
import io
import os
import sys
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qna_timm.training.data.sampling import KeyedDataset
from qna_timm.training.reporting import curves

UPDATES = 4  # of an epoch
PER_UPDATE = 32  # images, of 4 shards


def flags(*argv: str) -> list[str]:
    """Two epochs into ``./a``, with averages, batch norm and accumulation; later flags win."""
    words = "--dataset sklearn/digits --model test_resnet --img-size 32 -b 8 --grad-accum-steps 2"
    words += f" -j 0 --device cpu --opt adamw --lr 1e-3 --epochs 2 --max-steps {UPDATES}"
    words += " --warmup-epochs 0 --val-num-samples 32 --model-ema --model-ema-decay 0.5"
    words += " --checkpoint-interval 2 --output . --experiment a --resume auto --dist-timeout 60s"
    return [*words.split(), *argv]


def without_drawing(rank: int = 0) -> None:
    """Curves take most of the time of so short a run."""
    curves.can_draw = lambda: False


class Poison:
    """Fills images with NaN as they are read; installed in each process of a run.

    Args:
        places: (epoch, position) of the images.
    """

    def __init__(self, places: Collection[tuple[int, int]]) -> None:
        self.places = frozenset(places)

    def install(self, rank: int = 0) -> None:
        without_drawing()
        read = KeyedDataset.__getitems__

        def poisoned(dataset: KeyedDataset, keys: list) -> Any:
            samples = read(dataset, keys)
            for number, key in enumerate(keys):
                if (key.epoch, key.position) in self.places:
                    image, target = samples[number]
                    samples[number] = torch.full_like(image, torch.nan), target
            return samples

        KeyedDataset.__getitems__ = poisoned


def poison(*updates: tuple[int, int]) -> Poison:
    """One image of each (epoch, update), in the last shard of four: of the last process."""
    return Poison([(epoch, update * PER_UPDATE + 3) for epoch, update in updates])


class FullDisk:
    """Refuses what is written to files of given names, as a full disk does.

    Args:
        names: Patterns of the files' final names.
        times: How often, from the first time on.
        number: The system's error.
    """

    def __init__(self, *names: str, times: int = 1, number: int = errno.ENOSPC) -> None:
        self.names = names
        self.times = times
        self.number = number

    def _refuse(self, path: object) -> None:
        name = Path(os.fsdecode(path)).name if isinstance(path, str | bytes | os.PathLike) else ""
        fits = any(fnmatch(name, pattern) for pattern in self.names)
        if fits and self.times > 0:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))

    def install(self, rank: int = 0) -> None:
        without_drawing()
        replace, whole_open = os.replace, builtins.open

        def refusing_replace(source: Any, target: Any) -> None:
            self._refuse(target)
            replace(source, target)

        def refusing_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "a" in mode or "w" in mode or "x" in mode:
                self._refuse(path)
            return whole_open(path, mode, *args, **kwargs)

        os.replace, builtins.open, io.open = refusing_replace, refusing_open, refusing_open


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def fill_the_disk_for_an_epoch() -> int:
    """Train three epochs here, without room in the second; show what there is in the end."""
    from killing import load_train

    from qna_timm.training.session import Session

    torch.set_num_threads(1)
    train_epoch = Session._train_epoch

    def filling(session: Session, epoch: int, label: str) -> dict[str, float]:
        Path("filler").unlink(missing_ok=True)
        if epoch == 1:
            with contextlib.suppress(OSError), open("filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return train_epoch(session, epoch, label)

    Session._train_epoch = filling
    argv = flags("--epochs", "3", "--log-tensorboard", "--save-images", "--checkpoint-hist", "1")
    code = load_train().main(argv)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator("a/tensorboard").Reload()
    rows = Path("a/summary.csv").read_text().splitlines()
    print("summary:", *(row.split(",")[0] for row in rows))
    print("tensorboard:", *(event.step for event in board.Scalars("train/loss")))
    return code


if __name__ == "__main__":
    sys.exit(fill_the_disk_for_an_epoch())
