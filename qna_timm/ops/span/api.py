"""The public local self-attention: argument checks, then the only dispatch.

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets.
"""

from functools import partial

import torch
from torch import Tensor

from qna_timm.ops.dispatch import Choice, against_triton, choose
from qna_timm.ops.float32 import full_float32
from qna_timm.ops.library import has_tangents
from qna_timm.ops.reference import span_attention_reference
from qna_timm.ops.span import native
from qna_timm.ops.span.offsets import check_span, span_offsets
from qna_timm.ops.span.operator import FORMS, span_operator, span_triton

SPAN_FORMS = (*FORMS, "reference", "offsets", "triton")


def _unsupported_by_triton(qkv: Tensor, kernel_size: int, num_heads: int) -> str | None:
    from qna_timm.ops.span.triton import launch  # an optional package

    return launch.unsupported(qkv, kernel_size, num_heads)


def _unsupported_by_native(qkv: Tensor, _: bool) -> str | None:
    return native.unsupported(qkv)


def _choose_span(impl: str, qkv: Tensor, kernel_size: int, num_heads: int) -> Choice:
    """The ladder: kernels where they are known to serve, else compiled functions, else tiles."""
    if impl not in SPAN_FORMS:
        raise ValueError(f"impl must be one of {SPAN_FORMS}, got {impl!r}")
    if impl == "auto" and has_tangents():
        reason = "it has no forward-mode derivatives"
        return Choice("offsets", dict.fromkeys(("triton", "native", "tiles"), reason))
    # no functions in here: PyTorch 2.6 cannot compile one with annotations
    unsupported = partial(_unsupported_by_triton, qkv, kernel_size, num_heads)
    against = partial(against_triton, "span_attention", qkv, unsupported)
    against_native = partial(_unsupported_by_native, qkv)
    return choose(impl, (("triton", against), ("native", against_native)), "tiles")


def span_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    floor: Tensor | None = None,
    scale: float = 1.0,
    mask_padding: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Local self-attention with relative keys and a weighted window.

        score[o] = scale * q[y] . (k[y+o] + rel_pos_h[:, o_y] + rel_pos_w[:, o_x])
        e[o]     = exp(score[o] - max score)
        out[y]   = sum_o m[o] e[o] v[y+o] / sum_o (m[o] + floor[o]) e[o]

    for every head, o over the offsets of a k x k window centred at y in row-major order, index 0
    up and left. Offsets with m + floor = 0 are left out, of the maximum and of m's gradient too; a
    window in which none is left has no defined output. Keys and values off the map are zero and
    take part. Everything inside is float32 (float64 for a float64 qkv), also under autocast.
    (arXiv:1906.05909, section 2.2; arXiv:2004.08708.)

    Args:
        qkv: [B, H, W, 3*C], queries, keys and values one after the other, heads inside each.
        rel_pos_h: Relative vectors of rows [C, k], k odd.
        rel_pos_w: Relative vectors of columns [C, k].
        num_heads: h, a divisor of C.
        mask: m, weights of the offsets [h, K]; None is 1, with which this is a softmax.
        floor: What offsets add to the denominator alone [K], no gradient; None is 0.
        scale: Of the scores.
        mask_padding: Leave offsets off the map out.
        impl: 'auto', or one form with no fall-back: 'reference' (position by position), 'offsets'
            (any order of gradients, forward-mode ones, scripts; keeps B*h*H*W*K scores), 'tiles'
            (gradients by hand, not forward-mode; keeps qkv), 'native' (the same by compiled
            functions, on a CPU in float32, where the package was installed with a C++ compiler at
            hand) or 'triton' (in fused kernels, for GPUs; keeps the output too; m + floor must not
            be negative). 'auto' is 'triton' on GPUs where that was measured, else 'native' where it
            serves, else 'tiles'; 'offsets' in scripts and where forward-mode derivatives may be
            taken. `explain_span_attention` tells which.

    Returns:
        [B, H, W, C] in qkv's dtype.

    Raises:
        ValueError: shapes that do not go together, an unknown impl, or one that cannot compute
            this.
    """
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    rel_pos_h, rel_pos_w = rel_pos_h.to(dtype), rel_pos_w.to(dtype)
    if mask is not None:
        mask = mask.to(dtype)
    if floor is not None:
        floor = floor.detach().to(dtype)
    if torch.jit.is_scripting():
        if impl != "auto" and impl != "offsets":
            raise ValueError("impl must be 'auto' or 'offsets' in scripts, got '" + impl + "'")
        out = span_offsets(
            qkv.to(dtype), rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale
        )
        return out.to(qkv.dtype)
    else:  # TorchScript skips an else branch, not code after a return
        if not torch.jit.is_tracing():  # sizes are tensors there
            check_span(qkv, rel_pos_h, rel_pos_w, mask, floor, num_heads)
        rest = (rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale)
        chosen = _choose_span(impl, qkv, rel_pos_h.shape[1], num_heads).impl
        if chosen == "triton":
            return span_triton(qkv, *rest)
        if chosen in ("native", "tiles"):
            return span_operator(qkv, *rest, impl)
        form = span_offsets if chosen == "offsets" else span_attention_reference
        with full_float32(qkv.device):
            return form(qkv.to(dtype), *rest).to(qkv.dtype)


def explain_span_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    floor: Tensor | None = None,
) -> Choice:
    """Which form impl='auto' takes outside of scripts, and why not others.

    Arguments and errors as in `span_attention`; what is not asked for here decides nothing.
    """
    check_span(qkv, rel_pos_h, rel_pos_w, mask, floor, num_heads)
    return _choose_span("auto", qkv, rel_pos_h.shape[1], num_heads)
