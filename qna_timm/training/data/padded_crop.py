"""The training crop of small images, beyond timm's three: zeros around the image, then a window."""

import argparse
from collections.abc import Mapping, Sequence

from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch.utils.data import Dataset
from torchvision import transforms

from qna_timm.training.errors import UsageError

PADDED = "padded"
"""Value of `--train-crop-mode` that asks for this crop."""

DEFAULT_PADDING = 4

_RESIZED_CROPS = {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3]}


def check_crop_flags(args: argparse.Namespace, origins: Mapping[str, str]) -> None:
    """See that settings of one kind of crop do not meet another; settles `crop_padding`.

    Args:
        args: Flags of train.py.
        origins: Where each came from, to begin a message with.

    Raises:
        UsageError: a setting that would not be used.
    """
    if args.train_crop_mode != PADDED:
        if args.crop_padding is not None:
            raise UsageError(f"{origins['crop_padding']}: needs --train-crop-mode {PADDED}")
        return
    for key, default in _RESIZED_CROPS.items():
        if getattr(args, key) != default:
            raise UsageError(
                f"{origins[key]}: is for resized crops, --train-crop-mode {PADDED} keeps the size"
            )
    if args.crop_padding is None:
        args.crop_padding = DEFAULT_PADDING


def padded_crop(size: Sequence[int], padding: int, interpolation: str) -> transforms.Compose:
    """A window of `size` at a random place of the image with `padding` zeros on each side.

    An image of another size is first resized, its ratio kept, so that its shorter side fits.

    Args:
        size: Height and width of the window, in pixels.
        padding: Pixels added to each of the four sides.
        interpolation: timm's name; `random` is bilinear or bicubic.
    """
    return transforms.Compose(
        [
            ResizeKeepRatio(size, interpolation=interpolation),
            transforms.RandomCrop(size, padding=padding),
        ]
    )


def use_padded_crop(
    dataset: Dataset, size: Sequence[int], padding: int, interpolation: str
) -> None:
    """Put `padded_crop` where timm's training transform of a dataset crops and resizes.

    Flips, policies, colours and erasing stay as timm has built them.

    Args:
        dataset: With timm's transform for the crop mode `rrc`, split for AugMix or whole.
        size: As for `padded_crop`.
        padding: Likewise.
        interpolation: Likewise.
    """
    steps = dataset.transform.transforms
    where = [isinstance(step, RandomResizedCropAndInterpolation) for step in steps].index(True)
    steps[where] = padded_crop(size, padding, interpolation)
