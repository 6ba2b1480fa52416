"""The padded crop: which windows it gives, what else stays on, and what it goes with."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from qna_timm.training.data import datasets, loaders
from qna_timm.training.data.padded_crop import padded_crop
from qna_timm.training.data.views import ImageView
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args

CPU = torch.device("cpu")
SIZE = 12
CONFIG = {
    "input_size": (3, SIZE, SIZE),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
STILL = ("--hflip", "0", "--color-jitter", "0", "--train-crop-mode", "padded")


class Noise(Dataset):
    """Images of random pixels, none of them 0, so that padding can be told from image."""

    def __init__(self, count: int, height: int = SIZE, width: int = SIZE) -> None:
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(1, 256, (count, height, width, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index


def flags(*argv: str) -> Namespace:
    words = ["--dataset", "sklearn/digits", "--device", "cpu", "-j", "0", "-b", "60", *STILL]
    return parse_train_args([*words, *argv])


def batch(*argv: str, epoch: int = 0, splits: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The first batch as bytes [B, H, W, C], and the image each is from."""
    dataset = ImageView(Noise(60), "RGB")
    loader = datasets.create_train_loader(
        dataset, flags(*argv), CONFIG, device=CPU, num_aug_splits=splits
    )
    loader.set_epoch(epoch)
    inputs, target = next(iter(loader))
    pixels = ((inputs * 0.5 + 0.5) * 255).round().permute(0, 2, 3, 1)
    return pixels.to(torch.uint8).numpy(), target.numpy()


def offsets(pixels: np.ndarray, target: np.ndarray, padding: int) -> list[tuple[int, int]]:
    """Where in its image with zeros around each window lies."""
    found = []
    sides = ((padding, padding), (padding, padding), (0, 0))
    for window, index in zip(pixels, target, strict=True):
        padded = np.pad(Noise(60).pixels[index], sides)
        places = [
            (y, x)
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            if np.array_equal(padded[y : y + SIZE, x : x + SIZE], window)
        ]
        assert len(places) == 1, "a window of the padded image, and of no other"
        found += places
    return found


@pytest.mark.parametrize(("argv", "padding"), [((), 4), (("--crop-padding", "2"), 2)])
def test_windows_of_the_padded_image(argv: tuple[str, ...], padding: int) -> None:
    places = offsets(*batch(*argv), padding)
    for axis in (0, 1):
        assert {place[axis] for place in places} == set(range(2 * padding + 1))
    assert len(set(places)) > 18, "rows and columns are drawn independently"


def test_no_padding_leaves_the_image() -> None:
    assert set(offsets(*batch("--crop-padding", "0"), 0)) == {(0, 0)}


@pytest.mark.parametrize("flip", ["hflip", "vflip"])
def test_flips_follow_the_crop(flip: str) -> None:
    plain, _ = batch()
    flipped, target = batch(f"--{flip}", "1")
    back = flipped[:, :, ::-1] if flip == "hflip" else flipped[:, ::-1]
    offsets(back, target, 4)
    assert not np.array_equal(plain, flipped)


def test_windows_depend_on_seed_and_epoch_only() -> None:
    first = batch()
    again = batch("-j", "2")
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    for changed in (batch("--seed", "43"), batch(epoch=1)):
        assert not np.array_equal(changed[0], first[0])
        assert sorted(offsets(*changed, 4)) != sorted(offsets(*first, 4))


def test_prefetched_bytes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = batch()
    monkeypatch.setattr(loaders, "_PREFETCH_DEVICES", ("cpu",))
    for one, other in zip(plain, batch(), strict=True):
        assert np.array_equal(one, other)


def test_policy_erasing_and_splits_stay_on() -> None:
    plain, target = batch()
    for argv in (("--aa", "rand-m9-n2"), ("--reprob", "1"), ("--color-jitter", "0.4")):
        changed, same = batch(*argv)
        assert np.array_equal(target, same) and not np.array_equal(plain, changed)
    pixels, target = batch("--aug-splits", "2", "--aa", "augmix-m3-w3", splits=2)
    offsets(pixels[:60], target[:60], 4)
    assert not np.array_equal(pixels[:60], pixels[60:])


def test_no_augmentation_is_no_crop() -> None:
    assert set(offsets(*batch("--no-aug"), 4)) == {(4, 4)}


@pytest.mark.parametrize(("height", "width"), [(9, 9), (30, 30), (8, 24), (31, 7)])
def test_other_sizes_are_resized_with_their_ratio(height: int, width: int) -> None:
    """A grey image tells zeros from pixels: at most the padding is seen on each side."""
    image = Image.new("L", (width, height), 200)
    crop = padded_crop((SIZE, SIZE), 3, "random")
    least = []
    for seed in range(40):
        torch.manual_seed(seed)
        window = np.asarray(crop(image))
        assert window.shape == (SIZE, SIZE)
        seen = window > 0
        least.append((seen.any(1).sum(), seen.any(0).sum()))
    rows, columns = (min(values) for values in zip(*least, strict=True))
    assert rows == SIZE - 3 if height <= width else rows >= SIZE - 3
    assert columns == SIZE - 3 if width <= height else columns >= SIZE - 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--crop-padding", "4"], "--crop-padding: needs --train-crop-mode padded"),
        (["--train-crop-mode", "padded", "--scale", "0.5", "1"], "--scale: is for resized crops"),
        (["--train-crop-mode", "padded", "--crop-padding", "-1"], "zero or more, found -1"),
        (["--train-crop-mode", "pad"], "unknown value 'pad'.*did you mean 'padded'"),
    ],
)
def test_settings_that_do_not_fit(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu", *argv])
