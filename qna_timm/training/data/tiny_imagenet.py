"""TinyImageNet as its archive unpacks, which a reader of class folders would misread.

    tiny-imagenet-200/wnids.txt                        the 200 WordNet ids, a line each
    tiny-imagenet-200/words.txt                        id, tab, names (of more ids than the 200)
    tiny-imagenet-200/train/n01443537/images/*.JPEG
    tiny-imagenet-200/val/images/*.JPEG                labelled by val/val_annotations.txt

Every image lies in a folder called `images`, so that timm's reader finds one class of that name.
Copies with `n01443537/*.JPEG` in `train` or `val` are read too.
"""

import logging
import os
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from qna_timm.training.errors import UsageError

UNPACKED = "tiny-imagenet-200"
ANNOTATIONS = "val_annotations.txt"

_logger = logging.getLogger(__name__)


class TinyImageNetReader(Reader):
    """A timm reader of one part of TinyImageNet: (open file, label) by index.

    Labels number the WordNet ids in ascending order, as readers of class folders do.

    Args:
        root: Folder `tiny-imagenet-200`, or the one that it lies in.
        is_train: True for `train`, False for `val`.

    Raises:
        UsageError: not TinyImageNet, no image, or annotations that do not fit.
    """

    def __init__(self, root: str | os.PathLike[str], is_train: bool) -> None:
        super().__init__()
        root = Path(root)
        self.root = root / UNPACKED if (root / UNPACKED).is_dir() else root
        wnids = _read_wnids(self.root)
        self.class_names = _read_names(self.root, wnids)
        labels = {wnid: label for label, wnid in enumerate(wnids)}
        folder = self.root / ("train" if is_train else "val")
        if not is_train and (folder / ANNOTATIONS).is_file():
            self.samples = _annotated(folder, labels)
        else:
            self.samples = _in_class_folders(folder, labels)
        if not self.samples:
            raise UsageError(f"--dataset tiny_imagenet: no images in {folder}")
        absent = len(wnids) - len({label for _, label in self.samples})
        if absent:
            _logger.warning("%s has no image of %d of the %d classes", folder, absent, len(wnids))

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--dataset tiny_imagenet: {path} cannot be read: {error}") from None
    return [line for line in text.splitlines() if line.strip()]


def _read_wnids(root: Path) -> list[str]:
    """The WordNet ids of the classes, ascending: of wnids.txt, else the folders in train."""
    if (root / "wnids.txt").is_file():
        return sorted({line.strip() for line in _read_lines(root / "wnids.txt")})
    if (root / "train").is_dir():
        return sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    raise UsageError(
        f"--dataset tiny_imagenet: --data-dir {root} has neither wnids.txt nor train; expected the "
        f"folder {UNPACKED} that the archive unpacks to"
    )


def _read_names(root: Path, wnids: list[str]) -> list[str]:
    """`goldfish, Carassius auratus` by words.txt; the WordNet id where that does not tell."""
    words: dict[str, str] = {}
    if (root / "words.txt").is_file():
        pairs = (line.partition("\t") for line in _read_lines(root / "words.txt"))
        words = {wnid.strip(): name.strip() for wnid, _, name in pairs}
    names = [words.get(wnid) or wnid for wnid in wnids]
    # Labels of two splits are matched by name, so that names have to differ.
    return [
        f"{name} ({wnid})" if names.count(name) > 1 else name
        for name, wnid in zip(names, wnids, strict=True)
    ]


def _images_in(folder: Path) -> list[str]:
    """Names of the images in a folder, in natural order."""
    if not folder.is_dir():
        return []
    endings = get_img_extensions()
    return sorted(
        (name for name in os.listdir(folder) if name.lower().endswith(endings)), key=natural_key
    )


def _in_class_folders(folder: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
    return [
        (str(place / name), label)
        for wnid, label in labels.items()
        for place in (folder / wnid / "images", folder / wnid)
        for name in _images_in(place)
    ]


def _annotated(folder: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
    """Images and labels of val; a line of its annotations is file, id and box, tabs between."""
    by_file: dict[str, int] = {}
    for line in _read_lines(folder / ANNOTATIONS):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in labels:
            raise UsageError(
                f"--dataset tiny_imagenet: {folder / ANNOTATIONS} gives {name} the class "
                f"'{wnid}', which is none of the {len(labels)} of the dataset"
            )
        by_file[name] = labels[wnid]
    images = _images_in(folder / "images")
    unknown = next((name for name in images if name not in by_file), None)
    if unknown:
        raise UsageError(
            f"--dataset tiny_imagenet: {folder / ANNOTATIONS} does not tell the class of {unknown}"
        )
    return [(str(folder / "images" / name), by_file[name]) for name in images]
