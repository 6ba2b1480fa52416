"""What readers of other libraries give is looked at before it is trained on."""

import io
import tarfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from qna_timm.training.data import datasets, factory, readers
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args


def arguments(*more: str, name: str = "hfds/animals") -> Namespace:
    return parse_train_args(["--dataset", name, "--device", "cpu", *more])


class Reader:
    """Of a hub's data set: columns, and (image, label) by index."""

    def __init__(self, label: Any = 1, class_to_idx: dict[str, int] | None = None) -> None:
        self.label = label
        self.dataset = SimpleNamespace(column_names=["image", "label", "text"])
        self._source_names = {0: "ant", 1: "bee"}
        self.class_to_idx = class_to_idx or {"ant": 0, "bee": 1}

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if isinstance(self.label, Exception):
            raise self.label
        return Image.new("RGB", (4, 4)), self.label

    def __len__(self) -> int:
        return 1


def opened(monkeypatch: pytest.MonkeyPatch, reader: Reader, *more: str) -> Any:
    class Images(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.reader)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(readers, "create", lambda *_: Images(reader=reader))
    return readers.open_reader(arguments(*more), "train", True)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            "bee",
            "--target-key label: the label .* has image, label, text, is 'bee', expected",
        ),
        (
            KeyError("kind"),
            "a sample of hfds/animals, which has image, label, text: Key",
        ),
        (RuntimeError("no shard"), "--input-key image, .*RuntimeError: no shard"),
    ],
)
def test_samples_are_looked_at(label: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=message):
        opened(monkeypatch, Reader(label))


def test_a_damaged_image_is_no_mistake_of_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(monkeypatch, Reader(OSError("truncated"))) is not None


def test_class_map_without_a_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--class-map a.txt: lacks 1 of the 2 classes .*: bee$"):
        opened(monkeypatch, Reader(class_to_idx={"ant": 0}), "--class-map", "a.txt")


def test_workers_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that archives cannot be dealt out to evenly all read all of them."""
    args = arguments("--workers", "2", name="hfids/animals")
    for processes, archives, is_enough in (
        (1, 1, False),
        (1, 2, True),
        (2, 2, False),
        (2, 3, True),
    ):
        monkeypatch.setattr(readers, "process_place", lambda count=processes: (0, count))
        if is_enough:
            readers._check_enough(args, archives, shared_by_samples=True)
            continue
        with pytest.raises(UsageError, match=f"hfids/animals has {archives} archive"):
            readers._check_enough(args, archives, shared_by_samples=True)


def test_only_training_goes_round_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(factory, "create_dataset", lambda **kwargs: given.append(kwargs["repeats"]))
    for is_training in (True, False):
        factory.create(arguments("--epoch-repeats", "2"), "train", is_training)
    assert given == [2, 0]


@pytest.mark.parametrize("before", ["", "./"])
def test_archive_of_images_without_folders(before: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number in range(4):
            image = io.BytesIO()
            Image.new("RGB", (4, 4)).save(image, "PNG")
            entry = tarfile.TarInfo(f"{before}{number}.png")
            entry.size = len(image.getvalue())
            tar.addfile(entry, io.BytesIO(image.getvalue()))
    args = parse_train_args(["--data-dir", str(tmp_path), "--device", "cpu"])
    with pytest.raises(UsageError, match="holds images directly; put them in one folder per class"):
        datasets.open_dataset(args, "train", True)


def test_misspelt_prefix() -> None:
    with pytest.raises(UsageError, match=r"unknown dataset 'wsd/birds'.*did you mean 'wds/birds'"):
        datasets.open_datasets(arguments(name="wsd/birds"))
