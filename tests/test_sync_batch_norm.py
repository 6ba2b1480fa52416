"""What --sync-bn makes of our batch norms: timm's conversion knows nothing of them."""

import pytest
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from qna_timm.layers import BiasedBatchNorm2d, SmallBatchNorm2d


@pytest.mark.parametrize("kind", [BiasedBatchNorm2d, SmallBatchNorm2d])
def test_ours_become_the_usual_one_with_their_state(kind: type[nn.BatchNorm2d]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 2)
    ours = kind(4)
    ours(x)
    theirs = convert_sync_batchnorm(ours)
    assert type(theirs) is nn.SyncBatchNorm
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))


def test_what_it_averages_differs_by_the_number_of_values() -> None:
    """By 1 / (n - 1) of the variance: beyond float32 in training, as `BiasedBatchNorm2d` says."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 2)
    ours, theirs = BiasedBatchNorm2d(4), convert_sync_batchnorm(BiasedBatchNorm2d(4))
    torch.testing.assert_close(theirs(x), ours(x))
    difference = 0.1 * x.var(dim=(0, 2, 3), unbiased=False) / (x[:, 0].numel() - 1)
    torch.testing.assert_close(theirs.running_var - ours.running_var, difference, rtol=1e-4, atol=0)
