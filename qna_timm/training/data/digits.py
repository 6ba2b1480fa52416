"""The built-in dataset: scikit-learn's 1,797 handwritten digits with a fixed split."""

import importlib

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from qna_timm.training.errors import UsageError, missing_package

CLASS_NAMES = tuple("0123456789")
_VALIDATION_FRACTION = 0.2
_GREY_LEVELS = 16  # the images hold counts 0..16


def _split_indices(labels: np.ndarray, is_validation: bool) -> np.ndarray:
    # RandomState's stream is frozen by numpy, so this split is the same with every version.
    rng = np.random.RandomState(0)
    parts = []
    for label in range(len(CLASS_NAMES)):
        indices = rng.permutation(np.flatnonzero(labels == label))
        cut = round(len(indices) * _VALIDATION_FRACTION)
        parts.append(indices[:cut] if is_validation else indices[cut:])
    return np.sort(np.concatenate(parts))


class Digits(Dataset):
    """Handwritten digits as 8x8 grey PIL images (mode `L`) with their value as label.

    The split is stratified, 80 % for training and 20 % for validation, and the same for ever.

    Args:
        is_validation: True for the validation fifth, False for the rest.

    Raises:
        UsageError: scikit-learn, which ships the images, is not installed.
    """

    classes = CLASS_NAMES

    def __init__(self, is_validation: bool) -> None:
        try:
            load_digits = importlib.import_module("sklearn.datasets").load_digits
        except ImportError as error:
            text = missing_package("--dataset sklearn/digits", "scikit-learn", "train")
            raise UsageError(text) from error
        source = load_digits()
        indices = _split_indices(source.target, is_validation)
        pixels = source.images[indices] * (255 / _GREY_LEVELS)
        self.images = pixels.round().astype(np.uint8)  # [N, 8, 8]
        self.labels = source.target[indices].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]
