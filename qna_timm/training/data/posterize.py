"""timm's Posterize on Pillow 13, which refuses the 0 bits that it may ask for.

At full magnitude timm's policies (`rand-m9-mstd0.5-inc1` among them, now and then) keep no bits of
an image. Pillow used to return black for that, from 13 on it raises and the run ends.
"""

from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp
from timm.data.auto_augment import posterize as timm_posterize

# where datasets and transforms of timm and torchvision keep what they are made of
_PARTS = ("dataset", "transform", "transforms", "augmentation", "normalize", "ops", "policy")


def posterize(img: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's operation, black at 0 bits as Pillow had it."""
    if bits_to_keep < 1:
        return Image.new(img.mode, img.size)
    return timm_posterize(img, bits_to_keep, **kwargs)


def mend_posterize(part: Any) -> None:
    """Put `posterize` into every augmentation operation of a dataset or transform that uses timm's.

    timm itself stays as it is: only the objects below `part` change.
    """
    if isinstance(part, AugmentOp):
        if part.aug_fn is timm_posterize:
            part.aug_fn = posterize
    elif isinstance(part, list | tuple):
        for item in part:
            mend_posterize(item)
    else:
        for name in _PARTS:
            inner = getattr(part, name, None)
            if inner is not None and not callable(getattr(inner, "__func__", None)):
                mend_posterize(inner)
