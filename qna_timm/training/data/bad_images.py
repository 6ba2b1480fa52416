"""Images that cannot be read: replaced by others, the same ones in every run, and told about."""

import errno
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image
from timm.data import AugMixDataset, ImageDataset
from torch.utils.data import Dataset, Subset

from qna_timm.training.data.views import ImageView, in_mode
from qna_timm.training.errors import RunFailed, UsageError

_logger = logging.getLogger(__name__)

_MOST_TRIES = 20
_MOST_NAMED = 3
_MOST_WARNINGS = 10
# What a shared file system says in passing: the image itself may be fine.
_PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE})
_PAUSES = (0.1, 0.5, 2.0)  # seconds


class Replacement(NamedTuple):
    """An image that could not be read, and what stood in for it.

    Attributes:
        split: `train` or `validation`.
        epoch: From 0; None in validation, whose images are the same in every epoch.
        position: In the epoch's order over all processes; None in validation.
        index: Of the image in its split.
        path: Its file, or its name in its archive; empty where there is none.
        error: Why it could not be read.
        replacement: Index of the image that was taken instead.
    """

    split: str
    epoch: int | None
    position: int | None
    index: int
    path: str
    error: str
    replacement: int


def merge_replaced(*lists: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of `ImageLoader.replaced` from several processes or sessions: sorted, each once."""
    found = {_rank(entry): dict(entry) for entries in lists for entry in entries}
    return [found[key] for key in sorted(found)]


def _rank(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where an entry comes in a list; two of one rank are the same."""
    numbers = (-1 if entry[key] is None else entry[key] for key in ("epoch", "position", "index"))
    return entry["split"], *numbers


class Samples(list):
    """Samples of a batch, and which of them are replacements."""

    def __init__(self, samples: Iterable[Any], replaced: Sequence[Replacement] = ()) -> None:
        super().__init__(samples)
        self.replaced = tuple(replaced)


class ReadableImages:
    """Reads samples of a dataset, others in place of those that cannot be read.

    The t-th candidate for sample i of n is (i + t * stride) mod n, with a stride that is a
    function of the seed and has no factor in common with n.

    Args:
        dataset: Map-style dataset, with its transform.
        split: `train` or `validation`, for messages.
        strict: Fail instead (--strict-data).
    """

    def __init__(self, dataset: Dataset, split: str, strict: bool = False) -> None:
        self.dataset = dataset
        self.split = split
        self.strict = strict

    def read(
        self, index: int, seed: int = 0, begin: Callable[[], None] | None = None
    ) -> tuple[Any, Replacement | None]:
        """A sample, and what it stands in for unless it is the one that was asked for.

        Args:
            index: Of the sample.
            seed: Chooses what would replace it.
            begin: Called before each attempt, to seed what augments the sample.

        Raises:
            RunFailed: It and its replacements cannot be read, or it cannot and `strict` is set.
        """
        failures: list[str] = []
        for candidate in _candidates(index, len(self.dataset), seed):
            try:
                sample = self._attempt(candidate, begin)
            except Exception as error:  # readers and codecs raise what they like
                if _is_no_fault_of_the_image(error):
                    raise
                reason = one_line(error)
                if not failures:
                    first = reason
                failures.append(f"{self._name(candidate)} ({reason})")
                if self.strict:
                    raise RunFailed(f"--strict-data: cannot read {failures[0]}") from error
                continue
            if not failures:
                return sample, None
            path = path_of(self.dataset, index)
            fault = Replacement(self.split, None, None, index, path, first, candidate)
            return sample, fault
        shown = ", ".join(failures[:_MOST_NAMED]) + (", ..." if failures[_MOST_NAMED:] else "")
        raise RunFailed(f"cannot read {len(failures)} {self.split} image(s) in a row: {shown}")

    def _attempt(self, index: int, begin: Callable[[], None] | None) -> Any:
        for pause in (*_PAUSES, None):
            if begin is not None:
                begin()
            try:
                return self.dataset[index]
            except OSError as error:
                if pause is None or error.errno not in _PASSING:
                    raise
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _name(self, index: int) -> str:
        return path_of(self.dataset, index) or f"{self.split} image {index}"


def _candidates(index: int, count: int, seed: int) -> Iterator[int]:
    yield index
    stride = 1 + seed % max(1, count - 1)
    while math.gcd(stride, count) != 1:
        stride += 1
    for attempt in range(1, min(_MOST_TRIES, count)):
        yield (index + attempt * stride) % count


def _is_no_fault_of_the_image(error: Exception) -> bool:
    return (
        isinstance(error, (MemoryError, UsageError, RunFailed))
        or getattr(error, "errno", None) == errno.ENOMEM
    )


def one_line(error: BaseException) -> str:
    """`Type: message` without addresses in memory, which differ from run to run."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return printable(re.sub(r" at 0x[0-9a-fA-F]+", "", text).rstrip(": "))


def printable(path: str) -> str:
    """A path that any encoding can write: bytes that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def path_of(dataset: Dataset, index: int) -> str:
    """File of a sample, or its name in its archive; empty where the dataset does not know."""
    while isinstance(dataset, (AugMixDataset, ImageView, Subset)):
        if not isinstance(dataset, AugMixDataset):
            index = dataset.indices[index]
        dataset = dataset.dataset
    try:
        if hasattr(dataset, "filename"):
            path = dataset.filename(index, absolute=True)
        else:  # as torchvision keeps them
            files = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
            path = files[index][0] if files else ""
    except Exception:  # some readers must read the broken sample itself to tell
        return ""
    return printable(path) if isinstance(path, (str, os.PathLike)) else ""


class SingleImageDataset(ImageDataset):
    """timm's dataset, raising for an unreadable image where timm silently takes the next one."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, target, *features = self.reader[index]
        if self.load_bytes:
            image = image.read()
        else:
            image = Image.open(image)
            if self.input_img_mode:
                image = in_mode(image, self.input_img_mode)
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (image, target) if self.additional_features is None else (image, target, *features)


def refuse_neighbours(dataset: Dataset) -> None:
    """Makes the timm dataset at the bottom of views and splits a `SingleImageDataset`."""
    while isinstance(inner := getattr(dataset, "dataset", None), Dataset):
        dataset = inner
    # In place: views of the validation images may share it, and the caller holds it too.
    if type(dataset) is ImageDataset:
        dataset.__class__ = SingleImageDataset
    elif isinstance(dataset, ImageDataset):
        dataset._max_retries = 1


class EvalImages(Dataset):
    """Samples of a split by index for evaluation, the next one for any that cannot be read.

    Args:
        dataset: Map-style dataset, with its transform.
        strict: Fail instead (--strict-data).
    """

    def __init__(self, dataset: Dataset, strict: bool = False) -> None:
        self.dataset = dataset
        self.images = ReadableImages(dataset, "validation", strict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.images.read(index)[0]

    def __getitems__(self, indices: Sequence[int]) -> Samples:
        samples, replaced = zip(*map(self.images.read, indices), strict=True)
        return Samples(samples, [one for one in replaced if one is not None])


class ReplacedImages:
    """The replacements that have come out of a loader, warned about once per image."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[tuple[int, int], dict[str, Any]]] = {}
        self._warned: set[tuple[str, int]] = set()

    def add(self, replaced: Iterable[Replacement], epoch: int, micro_batch: int) -> None:
        """Notes those of a micro-batch that is being handed out."""
        for one in replaced:
            entry = one._asdict()
            self._entries[_rank(entry)] = ((epoch, micro_batch), entry)
            self._warn(one)

    def _warn(self, one: Replacement) -> None:
        if (one.split, one.index) in self._warned:
            return
        self._warned.add((one.split, one.index))
        if len(self._warned) <= _MOST_WARNINGS:
            last = len(self._warned) == _MOST_WARNINGS
            _logger.warning(
                "cannot read %s image %d%s (%s): image %d stands in for it%s",
                one.split,
                one.index,
                f", {one.path}" if one.path else "",
                one.error,
                one.replacement,
                "; further ones are not told one by one" if last else "",
            )

    def entries(self, before: tuple[int, int] | None) -> list[dict[str, Any]]:
        """Those of earlier places than (epoch, micro-batch) `before`, or all; sorted."""
        chosen = (
            entry
            for place, entry in self._entries.values()
            if before is None or place < tuple(before)
        )
        return merge_replaced(chosen)
