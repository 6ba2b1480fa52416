"""Learned-query attention from stock PyTorch operators, for any device.

Two forms of the same function. `qna_offsets` is exact for any scores: it walks over the window's
offsets and shifts every window by its own maximum. `qna_depthwise` is the paper's efficient form,
two depthwise convolutions over exponentials; they share one shift per map, so it may only serve
where `fits_shared_shift` says that no window can underflow.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, K = kh*kw offsets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# How far scores and bias may spread over a map for the depthwise form. Forward: a window's sum of
# exponentials is at least exp(-spread), far above float32's smallest number. Backward: the gradient
# of a score is a difference of two sums there, good to float32's rounding of either; where one
# token of a window has all the weight, its true value is exp(-spread) of them, and 16 is where that
# reaches the rounding, 2^-23.
MAX_SPREAD = 60.0
MAX_SPREAD_GRAD = 16.0


def _window_max(scores: Tensor, kernel_size: tuple[int, int], stride: int) -> Tensor:
    """Maximum of padded scores [B, H, W, Q, h] over every window, [B, Y, X, Q, h], no gradient."""
    num_heads = scores.shape[-1]
    flat = scores.detach().flatten(3).permute(0, 3, 1, 2)
    # rows, then columns: kh + kw instead of kh * kw comparisons
    flat = F.max_pool2d(flat, (kernel_size[0], 1), (stride, 1))
    flat = F.max_pool2d(flat, (1, kernel_size[1]), (1, stride))
    return flat.permute(0, 2, 3, 1).unflatten(3, (-1, num_heads))


def qna_offsets(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> Tensor:
    """Exact form. Arguments as in `qna_attention`, scores float32 or float64; result likewise.

    Memory for backward: about 3*K*Q*h numbers for each output position.
    """
    kernel_h, kernel_w = kernel_size
    num_heads = scores.shape[4]
    out_h = (scores.shape[1] + 2 * padding - kernel_h) // stride + 1
    out_w = (scores.shape[2] + 2 * padding - kernel_w) // stride + 1
    p = padding
    scores = F.pad(scores, [0, 0, 0, 0, p, p, p, p], value=float("-inf"))
    value = F.pad(value.to(scores.dtype), [0, 0, p, p, p, p]).unflatten(3, (num_heads, -1))
    # The window's maximum goes before the bias comes: at scores of 1e4 a float32 sum with the
    # bias would keep only three decimals of it. softmax then removes the maximum of the sum.
    shift = _window_max(scores, kernel_size, stride)
    logits = []
    for ky in range(kernel_h):
        for kx in range(kernel_w):
            rows = scores[:, ky : ky + (out_h - 1) * stride + 1 : stride]
            shifted = rows[:, :, kx : kx + (out_w - 1) * stride + 1 : stride] - shift
            if rel_pos_bias is not None:
                shifted = shifted + rel_pos_bias[ky * kernel_w + kx]
            logits.append(shifted)
    attn = torch.stack(logits).softmax(dim=0)  # K, B, Y, X, Q, h
    if query_weight is not None:
        attn = attn * query_weight[:, None, None, None]
    weight = attn.sum(dim=4).unsqueeze(5)  # K, B, Y, X, h, 1: queries share the value
    out = torch.zeros_like(value[:, :out_h, :out_w])
    for ky in range(kernel_h):
        for kx in range(kernel_w):
            rows = value[:, ky : ky + (out_h - 1) * stride + 1 : stride]
            tokens = rows[:, :, kx : kx + (out_w - 1) * stride + 1 : stride]
            out = torch.addcmul(out, weight[ky * kernel_w + kx], tokens)
    return out.flatten(3)


def max_spread() -> float:
    """The spread that the depthwise form allows now, with or without gradients."""
    return MAX_SPREAD_GRAD if torch.is_grad_enabled() else MAX_SPREAD


def fits_shared_shift(scores: Tensor, rel_pos_bias: Tensor | None) -> bool:
    """Whether scores [B, H, W, Q, h] and bias [K, Q, h] spread little enough for `qna_depthwise`,
    and for its gradients where these are recorded.

    Waits for the device. False where the answer cannot be had (under `torch.func.vmap`, fake
    tensors) and for scores that are not finite.
    """
    try:
        low, high = torch.aminmax(scores.detach().flatten(1, 2).float(), dim=1)
        spread = (high - low).amax()
        if rel_pos_bias is not None:
            low, high = torch.aminmax(rel_pos_bias.detach().float(), dim=0)
            spread = spread + (high - low).amax()
        return bool(spread <= max_spread())
    except RuntimeError:
        return False


def qna_depthwise(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> Tensor:
    """Depthwise form, right only where `fits_shared_shift`; arguments as in `qna_offsets`.

        out = sum_q conv(e * value, exp(bias) * query_weight) / conv(e, exp(bias)), e = exp(scores)

    Zero padding adds nothing to either sum, which keeps it out of the softmax. Channels-last
    throughout, the faster layout for the convolutions' weight gradients on CPU.
    """
    num_queries, num_heads = scores.shape[3:]
    offsets = kernel_size[0] * kernel_size[1]
    value = value.to(scores.dtype).unflatten(3, (num_heads, -1))
    head_dim = value.shape[-1]
    attn = (scores - scores.detach().amax(dim=(1, 2), keepdim=True)).exp()
    if rel_pos_bias is None:
        den_kernel = scores.new_ones(offsets, num_queries, num_heads)
    else:
        den_kernel = (rel_pos_bias - rel_pos_bias.detach().amax(dim=0)).exp()
    num_kernel = den_kernel if query_weight is None else den_kernel * query_weight
    # K, Q, h -> one kernel for each of the Q*h*d (Q*h) depthwise channels
    num_kernel = num_kernel.permute(1, 2, 0).unsqueeze(2).expand(-1, -1, head_dim, -1)
    num_kernel = num_kernel.reshape(-1, 1, *kernel_size)
    den_kernel = den_kernel.permute(1, 2, 0).reshape(-1, 1, *kernel_size)
    weighted = (attn.unsqueeze(5) * value.unsqueeze(3)).flatten(3)  # B, H, W, Q*h*d
    with torch.autocast(scores.device.type, enabled=False):
        num, den = (
            F.conv2d(x.permute(0, 3, 1, 2), k, None, stride, padding, groups=k.shape[0])
            for x, k in ((weighted, num_kernel), (attn.flatten(3), den_kernel))
        )
    num = num.permute(0, 2, 3, 1).unflatten(3, (num_queries, num_heads, head_dim))
    den = den.permute(0, 2, 3, 1).unflatten(3, (num_queries, num_heads, 1))
    return (num / den).sum(dim=3).flatten(3)
