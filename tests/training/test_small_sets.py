"""CIFAR, MNIST and TinyImageNet as they lie on disk, from the files to a batch."""

import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import cifar

from qna_timm.training.data import datasets
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args, parse_validate_args
from qna_timm.training.names import check_dataset_name

CPU = torch.device("cpu")
WNIDS = ("n02124075", "n01443537", "n04067472")  # wnids.txt is in no order
WORDS = {
    "n01443537": "goldfish, Carassius auratus",
    "n02124075": "Egyptian cat",
    "n00000001": "of no class",
}


def train_args(dataset: str, root: Path, *argv: str) -> Namespace:
    words = ["--dataset", dataset, "--data-dir", str(root), "--device", "cpu", "-j", "0"]
    return parse_train_args([*words, "--train-crop-mode", "padded", *argv])


def first_batch(dataset: torch.utils.data.Dataset, args: Namespace, channels: int, size: int = 32):
    config = {
        "input_size": (channels, size, size),
        "interpolation": "bilinear",
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    train = next(iter(datasets.create_train_loader(dataset, args, config, device=CPU)))
    plain = next(iter(datasets.create_eval_loader(dataset, args, config, device=CPU, batch_size=4)))
    return train, plain


def write_cifar(root: Path, classes: int) -> None:
    """Ten training and four test images: red is the label, green the number of the image."""

    def save(name: str, labels: list[int], start: int) -> None:
        pixels = np.zeros((len(labels), 3, 32, 32), np.uint8)
        pixels[:, 0] = np.array(labels)[:, None, None]
        pixels[:, 1] = np.arange(start, start + len(labels))[:, None, None]
        key = "labels" if classes == 10 else "fine_labels"
        content = {"data": pixels.reshape(len(labels), -1), key: labels}
        (folder / name).write_bytes(pickle.dumps(content))

    names = [f"class {label}" for label in range(classes)]
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir()
    if classes == 10:
        for part in range(5):
            save(f"data_batch_{part + 1}", [part, 9 - part], 2 * part)
        save("test_batch", [0, 3, 6, 9], 100)
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    else:
        save("train", list(range(5, 100, 10)), 0)
        save("test", [0, 33, 66, 99], 100)
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))


@pytest.fixture
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision knows the published files by their checksums; these are others."""
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.usefixtures("any_checksum")
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(classes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_cifar(tmp_path, classes)
    args = train_args(f"torch/cifar{classes}", tmp_path, "-b", "4", "--color-jitter", "0")
    caplog.set_level("INFO")
    train, test = datasets.open_datasets(args)
    assert "judged by its test part" in caplog.text
    assert (len(train), len(test)) == (10, 4)
    assert datasets.dataset_classes(train) == (classes, [f"class {i}" for i in range(classes)])
    for part in (train, test):
        assert all(image.getpixel((0, 0))[0] == label for image, label in part)
    (images, labels), (plain, _) = first_batch(train, args, 3)
    assert images.shape == (4, 3, 32, 32)
    # Padding is zero, the rest is the image.
    assert torch.equal((images[:, 0] * 255).round().amax(dim=(1, 2)).long(), labels)
    assert (plain[:, 1] * 255).round()[:, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("any_checksum")
def test_cifar_with_a_held_out_part_is_never_tested(tmp_path: Path) -> None:
    write_cifar(tmp_path, 10)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"not to be read")
    args = train_args("torch/cifar10", tmp_path, "--val-fraction", "0.2", "-b", "4")
    train, held_out = datasets.open_datasets(args)
    numbers = [[image.getpixel((0, 0))[1] for image, _ in part] for part in (train, held_out)]
    assert [len(part) for part in numbers] == [8, 2]
    assert sorted(numbers[0] + numbers[1]) == list(range(10))


@pytest.mark.parametrize("channels", [1, 3])
def test_mnist(channels: int, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 10), ("t10k", 4)):
        grey = np.repeat(np.arange(count, dtype=np.uint8) * 20 + 20, 28 * 28)
        head = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + grey.tobytes())
        head = bytes([0, 0, 8, 1]) + np.array([count], ">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(head + bytes(range(count)))
    # A model of its own may ask for one channel without any flag.
    args = train_args(
        "torch/mnist", tmp_path, "--val-fraction", "0.4", "-b", "4", "--color-jitter", "0"
    )
    train, held_out = datasets.open_datasets(args)
    assert (len(train), len(held_out)) == (6, 4)
    (images, labels), _ = first_batch(train, args, channels)
    assert images.shape == (4, channels, 32, 32)
    assert torch.equal((images * 255).round().amax(dim=(1, 2, 3)).long(), labels * 20 + 20)
    _, (plain, labels) = first_batch(held_out, args, channels)
    expected = ((labels + 1) * 20 / 255)[:, None, None, None].expand(4, channels, 32, 32)
    torch.testing.assert_close(plain, expected)


def write_tiny_imagenet(root: Path) -> Path:
    """Three training images and one validation image a class; the red of each tells its class."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "test" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "words.txt").write_text("".join(f"{k}\t{v}\n" for k, v in WORDS.items()))
    lines = []
    for label, wnid in enumerate(sorted(WNIDS)):
        image = Image.new("RGB", (64, 64), (60 * label, 0, 0))
        place = folder / "train" / wnid / "images"
        place.mkdir(parents=True)
        (place.parent / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
        for index in range(3):
            image.save(place / f"{wnid}_{index}.JPEG")
        image.save(folder / "val" / "images" / f"val_{2 - label}.JPEG")
        lines.append(f"val_{2 - label}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def assert_labels_fit(dataset: torch.utils.data.Dataset) -> None:
    for image, label in dataset:
        assert abs(image.getpixel((5, 5))[0] - 60 * label) < 4


def test_tiny_imagenet_as_it_unpacks(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    for root in (tmp_path, folder):
        args = train_args("tiny_imagenet", root, "-b", "4")
        train, val = datasets.open_datasets(args)
        assert (len(train), len(val)) == (9, 3)
        names = ["goldfish, Carassius auratus", "Egyptian cat", "n04067472"]
        assert datasets.dataset_classes(train) == datasets.dataset_classes(val) == (3, names)
        assert_labels_fit(train), assert_labels_fit(val)
        assert [label for _, label in val] == [2, 1, 0], "in the order of the file names"
    (images, _), (plain, _) = first_batch(train, args, 3, size=64)
    assert images.shape == plain.shape == (4, 3, 64, 64)
    assert val.filenames(basename=True) == ["val_0.JPEG", "val_1.JPEG", "val_2.JPEG"]


def test_tiny_imagenet_with_a_held_out_part(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    (folder / "val" / "val_annotations.txt").unlink()
    args = train_args("tiny_imagenet", tmp_path, "--val-fraction", "0.3")
    train, held_out = datasets.open_datasets(args)
    assert (len(train), len(held_out)) == (6, 3)
    assert_labels_fit(train), assert_labels_fit(held_out)


def test_tiny_imagenet_in_class_folders(tmp_path: Path) -> None:
    """Copies in which each image lies in its class's folder, by either dataset."""
    folder = write_tiny_imagenet(tmp_path)
    for label, wnid in enumerate(sorted(WNIDS)):
        for path in (folder / "train" / wnid / "images").iterdir():
            path.rename(path.parents[1] / path.name)
        (folder / "train" / wnid / "images").rmdir()
        (folder / "val" / wnid).mkdir()
        (folder / "val" / "images" / f"val_{2 - label}.JPEG").rename(
            folder / "val" / wnid / "0.JPEG"
        )
    (folder / "val" / "images").rmdir()
    (folder / "val" / "val_annotations.txt").unlink()
    for dataset in ("", "tiny_imagenet"):
        train, val = datasets.open_datasets(train_args(dataset, folder))
        assert (len(train), len(val)) == (9, 3)
        assert_labels_fit(train), assert_labels_fit(val)


def test_tiny_imagenet_is_no_plain_folder(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    with pytest.raises(UsageError, match=r"'images'.*--dataset tiny_imagenet") as caught:
        datasets.open_datasets(train_args("", folder))
    assert "\n" not in str(caught.value)


def test_part_of_tiny_imagenet_keeps_its_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_imagenet(tmp_path)
    for path in (folder / "train" / "n02124075" / "images").iterdir():
        path.unlink()
    train, val = datasets.open_datasets(train_args("tiny_imagenet", folder))
    assert (len(train), len(val)) == (6, 3)
    assert_labels_fit(train), assert_labels_fit(val)
    assert "no image of 1 of the 3 classes" in caplog.text


def test_same_words_are_told_apart(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    (folder / "words.txt").write_text("".join(f"{wnid}\tcrane\n" for wnid in WNIDS))
    train, val = datasets.open_datasets(train_args("tiny_imagenet", folder))
    assert datasets.dataset_classes(train)[1] == [f"crane ({wnid})" for wnid in sorted(WNIDS)]
    assert_labels_fit(val)


def break_nothing(folder: Path) -> None:
    pass


def break_root(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def break_class(folder: Path) -> None:
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n01443537", "n99999999"))


def break_list(folder: Path) -> None:
    path = folder / "val" / "val_annotations.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("spoil", "argv", "message"),
    [
        (break_root, [], "neither wnids.txt nor train"),
        (break_class, [], "gives val_2.JPEG the class 'n99999999', which is none of the 3"),
        (break_list, [], "does not tell the class of val_2.JPEG"),
        (break_nothing, ["--val-split", "test"], "--val-split 'test'.*no labels"),
        (break_nothing, ["--class-map", "x.txt"], "--class-map: is not for"),
    ],
)
def test_what_is_wrong_with_tiny_imagenet(
    spoil, argv: list[str], message: str, tmp_path: Path
) -> None:
    spoil(write_tiny_imagenet(tmp_path))
    with pytest.raises(UsageError, match=message) as caught:
        datasets.open_datasets(train_args("tiny_imagenet", tmp_path, *argv))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny-imagenet", "tinyimagenet", "torch/tiny_imagenet"])
def test_the_name_is_suggested(name: str) -> None:
    with pytest.raises(UsageError, match=r"did you mean .*'tiny_imagenet'"):
        check_dataset_name(name)


def test_folder_is_needed_and_has_to_exist() -> None:
    for parse in (parse_train_args, parse_validate_args):
        with pytest.raises(UsageError, match="--data-dir"):
            parse(["--dataset", "tiny_imagenet", "--device", "cpu"])
        with pytest.raises(UsageError, match="no file or folder 'nowhere'"):
            parse(["--dataset", "tiny_imagenet", "--data-dir", "nowhere", "--device", "cpu"])
