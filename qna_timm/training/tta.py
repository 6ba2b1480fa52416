"""Test-time augmentation: logits averaged over several views of an image."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qna_timm.training.errors import UsageError

_SHIFTS = ((0, 0), (-1, -1), (1, 1), (-1, 1), (1, -1))


class AveragedViews(nn.Module):
    """Averages a model's logits over views: the image, its mirror image, then shifted ones.

    Shifts are by a sixteenth of the side, diagonally, the border reflected.

    Args:
        model: Returns logits [B, classes].
        views: Number of views, 1 to 10; 1 to 5 without mirroring.
        mirror: Whether mirror images are views: not for data whose classes mirroring changes.

    Raises:
        UsageError: More views than there are.
    """

    def __init__(self, model: nn.Module, views: int, mirror: bool) -> None:
        super().__init__()
        self.model = model
        flips = (False, True) if mirror else (False,)
        available = [(shift, flip) for shift in _SHIFTS for flip in flips]
        if views > len(available):
            raise UsageError(f"--tta {views}: at most {len(available)} views (mirrored: {mirror})")
        self.views = available[:views]

    def forward(self, images: Tensor) -> Tensor:
        """Average logits [B, classes] of images [B, C, H, W]."""
        # A compiled model may write its next output over the last one: CUDA graphs do.
        logits = [self.model(_view(images, shift, flip)).clone() for shift, flip in self.views]
        return torch.stack(logits).mean(0)


def _view(images: Tensor, shift: tuple[int, int], flip: bool) -> Tensor:
    height, width = images.shape[-2:]
    if any(shift):
        pad_h, pad_w = max(1, height // 16), max(1, width // 16)
        padded = F.pad(images, (pad_w, pad_w, pad_h, pad_h), mode="reflect")
        top, left = (1 + shift[0]) * pad_h, (1 + shift[1]) * pad_w
        images = padded[..., top : top + height, left : left + width]
    return images.flip(-1) if flip else images
