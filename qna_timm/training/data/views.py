"""Views of datasets: choose, convert and relabel samples, and know their class names."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from qna_timm.training.errors import UsageError, closest

_logger = logging.getLogger(__name__)

_MOST_NAMES_SHOWN = 5


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in another of PIL's modes; 16 bits a pixel by their upper 8, where PIL would make
    all but the darkest white."""
    has_16 = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
    if has_16 and mode[0] not in "IF":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(mode)


class ImageView(Dataset):
    """A map-style dataset of (PIL image, label), chosen, converted and relabelled.

    timm's own folder and hub datasets convert by themselves; torchvision's and the digits do not.

    Args:
        dataset: Source of (PIL image, label).
        input_img_mode: PIL mode the image is converted to; None leaves it alone.
        indices: Samples to keep, in this order; None keeps all.
        class_names: Class names by label, where known.
    """

    def __init__(
        self,
        dataset: Dataset,
        input_img_mode: str | None = None,
        indices: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.dataset = dataset
        self.input_img_mode = input_img_mode
        self.indices = range(len(dataset)) if indices is None else indices
        self.class_names = list(class_names or [])
        self.transform: Callable[[Image.Image], Any] | None = None
        self.target_transform: Callable[[int], int] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[self.indices[index]]
        if self.input_img_mode:
            image = in_mode(image, self.input_img_mode)
        if self.transform is not None:
            image = self.transform(image)
        return image, label if self.target_transform is None else self.target_transform(label)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """File names in the view's order, for datasets that have them."""
        names = self.dataset.filenames(basename=basename, absolute=absolute)
        return [names[index] for index in self.indices]


class LabelTable:
    """Maps labels to labels; a class because loader workers may have to pickle it.

    Args:
        table: New label by old label.
    """

    def __init__(self, table: Mapping[int, int]) -> None:
        self.table = dict(table)

    def __call__(self, label: int) -> int:
        return self.table[int(label)]


def images_of(dataset: Dataset) -> int | None:
    """How many images a dataset has over all processes; None where a stream does not tell."""
    if not isinstance(dataset, IterableDataset):
        return len(dataset)
    while not hasattr(dataset, "reader") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    images = getattr(getattr(dataset, "reader", None), "num_samples", None)
    return int(images) if images else None


def class_names_of(dataset: Dataset) -> list[str] | None:
    """Class names by label; None where the data does not say.

    Several names of one label (a class map may have them) are joined by a slash.
    """
    names = getattr(dataset, "class_names", None)
    if names:
        return names
    reader = getattr(dataset, "reader", None)
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if not mapping:
        return None
    by_label: dict[int, list[str]] = {}
    for name, label in mapping.items():
        by_label.setdefault(int(label), []).append(str(name))
    return ["/".join(by_label.get(label, [str(label)])) for label in range(max(by_label) + 1)]


def use_class_names(dataset: Dataset, class_names: Sequence[str], where: str) -> None:
    """Makes a dataset's labels mean these classes, by name.

    Args:
        dataset: Any dataset with a `target_transform`.
        class_names: The classes by label.
        where: What the dataset is, for messages.

    Raises:
        UsageError: the dataset has a class that is not among `class_names`.
    """
    own = class_names_of(dataset)
    if own is None or own == list(class_names):
        return
    wanted = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in own if name not in wanted]
    if unknown:
        raise UsageError(
            f"{where} has the class {unknown[0]!r}"
            f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}, which is not among "
            f"the {len(class_names)} classes trained{closest(unknown[0], wanted)}"
        )
    absent = [name for name in class_names if name not in set(own)]
    if absent:
        shown = ", ".join(absent[:_MOST_NAMES_SHOWN])
        _logger.warning(
            "%s has no image of %d of the %d classes: %s%s",
            where,
            len(absent),
            len(class_names),
            shown,
            ", ..." if len(absent) > _MOST_NAMES_SHOWN else "",
        )
    dataset.target_transform = LabelTable({old: wanted[name] for old, name in enumerate(own)})
    dataset.class_names = list(class_names)
