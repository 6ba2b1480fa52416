"""A small model with branches, as `GramianNet` shows itself to training; without batch norm.

Registered as `test_branched`; scripts import it by ``--device-modules branched_model``.
"""

import torch
from timm.layers import LayerNorm2d
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn


class BranchLinear(nn.Module):
    """A linear classifier for each branch: weight [M, classes, D], bias [M, classes]."""

    def __init__(self, num_branches: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_branches, num_classes, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_branches, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to [B, M, classes]."""
        return torch.einsum("bd,mcd->bmc", x, self.weight) + self.bias


class Branched(nn.Module):
    """A convolution, its average, and a classifier for each branch."""

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        num_branches: int = 3,
        dim: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_branches = num_classes, num_branches
        self.branch_outputs = False
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dim, 8, stride=8), LayerNorm2d(dim))
        self.fc = BranchLinear(num_branches, dim, num_classes)

    @torch.jit.ignore
    def set_branch_outputs(self, enable: bool = True) -> None:
        """Return [B, M, classes] instead of the mean."""
        self.branch_outputs = enable

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing is worth it."""

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """All branches' classifiers."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Logits of branches, or their mean."""
        logits = self.fc(self.stem(x).relu().mean((2, 3)))
        return logits if self.branch_outputs else logits.mean(1)


default_cfgs = {
    "test_branched": {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.0",
        "classifier": "fc",
    }
}


@register_model
def test_branched(pretrained: bool = False, **kwargs: object) -> Branched:
    """Three branches of width 16."""
    return build_model_with_cfg(Branched, "test_branched", pretrained, **kwargs)


test_branched.__test__ = False
