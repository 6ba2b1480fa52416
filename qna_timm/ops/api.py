"""The public operators: argument checks, then the only dispatch.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
K = kh*kw offsets of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops.qna_eager import fits_shared_shift, max_spread, qna_depthwise, qna_offsets
from qna_timm.ops.reference import qna_attention_reference
from qna_timm.ops.window_attn import tiled_window_attention


def normalize_query(query: Tensor, num_heads: int, normalize: bool, stop_grad: bool) -> Tensor:
    """Learned queries [Q, C] as score vectors [Q, h, d]: q / (|q| + 1e-6) / sqrt(d) per head.

    Args:
        query: [Q, C].
        num_heads: h, a divisor of C.
        normalize: Divide by the norm; without it only by sqrt(d).
        stop_grad: Take the norm as a constant in backward.
    """
    query = query.unflatten(1, (num_heads, -1))
    scale = query.shape[2] ** -0.5
    if normalize:
        norm = torch.linalg.vector_norm(query, dim=2, keepdim=True)
        if stop_grad:
            norm = norm.detach()
        query = query / (norm + 1e-6)
    return query * scale


def _folded_scores(x: Tensor, weight: Tensor, bias: Tensor | None, query: Tensor) -> Tensor:
    num_queries, num_heads, head_dim = query.shape
    # C, D -> Q, h, D: the key projection seen by each query
    folded = torch.einsum("qhd,hdi->qhi", query, weight.view(num_heads, head_dim, -1))
    offset: Tensor | None = None
    if bias is not None:
        offset = (query * bias.view(num_heads, head_dim)).sum(dim=2).flatten()
    return F.linear(x, folded.flatten(0, 1), offset).unflatten(3, (num_queries, num_heads))


def learned_query_scores(
    x: Tensor, key_weight: Tensor, key_bias: Tensor | None, query: Tensor
) -> Tensor:
    """Scores of every token for every learned query, in float32 (float64 for float64 input).

        scores[b, y, x, q, j] = query[q, j] . key_j(x[b, y, x]),  key(x) = key_weight x + key_bias

    Queries do not depend on the input, so they are folded into the key projection: D*Q*h
    multiplications for a token in place of D*C. Autocast is off inside: a half-precision score
    of 1000 would be good to the nearest half only, and goes into an exponential.

    Args:
        x: [B, H, W, D].
        key_weight: [C, D].
        key_bias: [C] or None.
        query: [Q, h, d] from `normalize_query`.

    Returns:
        [B, H, W, Q, h].
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, key_weight, query = x.to(dtype), key_weight.to(dtype), query.to(dtype)
    if key_bias is not None:
        key_bias = key_bias.to(dtype)
    if torch.jit.is_scripting():
        return _folded_scores(x, key_weight, key_bias, query)
    else:  # in so many words: the script compiler skips an else branch, not code that follows
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return _folded_scores(x, key_weight, key_bias, query)
        with torch.autocast(x.device.type, enabled=False):
            return _folded_scores(x, key_weight, key_bias, query)


def _check_qna(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> None:
    if scores.dim() != 5 or value.dim() != 4 or scores.shape[:3] != value.shape[:3]:
        raise ValueError(
            "scores must be [B, H, W, Q, h] and value [B, H, W, C] of the same B, H, W, "
            f"got {list(scores.shape)} and {list(value.shape)}"
        )
    if value.shape[3] % scores.shape[4] != 0:
        raise ValueError(
            f"value's {value.shape[3]} channels must divide into scores' {scores.shape[4]} heads"
        )
    if min(kernel_size) < 1 or stride < 1 or padding < 0 or padding >= min(kernel_size):
        raise ValueError(
            "kernel_size and stride must be at least 1 and padding in 0..kernel_size-1, "
            f"got {kernel_size}, {stride}, {padding}"
        )
    for axis in (0, 1):
        if scores.shape[1 + axis] + 2 * padding < kernel_size[axis]:
            raise ValueError(
                f"a kernel of {kernel_size} with padding {padding} does not fit the map "
                f"{list(scores.shape[1:3])}"
            )
    offsets = kernel_size[0] * kernel_size[1]
    table = [offsets, scores.shape[3], scores.shape[4]]
    if rel_pos_bias is not None and list(rel_pos_bias.shape) != table:
        raise ValueError(
            f"rel_pos_bias must be [K, Q, h] = {table}, got {list(rel_pos_bias.shape)}"
        )
    if query_weight is not None:
        shape = list(query_weight.shape)
        if shape != table and shape != [1, table[1], table[2]]:
            raise ValueError(f"query_weight must be {table} or {[1, *table[1:]]}, got {shape}")


def qna_attention(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Learned-query attention over overlapping windows ("QnA", CVPR 2022, sections 3 and 4).

        attn[o] = softmax_o(scores[s*y - p + o, q, j] + rel_pos_bias[o, q, j])
        out[y, j] = sum_q sum_o attn[o] * query_weight[o, q, j] * value[s*y - p + o, j]

    o runs over the window's offsets in row-major order; tokens off the map take no part.
    Everything inside is float32 (float64 for float64 scores); right for scores up to +-1e4, also
    where one of them towers over a whole map.

    Args:
        scores: [B, H, W, Q, h] before softmax, best given in float32 (`learned_query_scores`).
        value: [B, H, W, C].
        rel_pos_bias: [K, Q, h] or None (no bias).
        query_weight: [K, Q, h] or [1, Q, h]; None is 1.
        kernel_size: Window (kh, kw) in tokens.
        stride: Tokens between windows.
        padding: Tokens around the map, below the kernel size; (k-1)//2 keeps an odd kernel centred.
        impl: 'auto', or one form with no fall-back: 'reference', 'offsets' (exact for any scores)
            or 'depthwise' (raises where the scores spread too far for it). 'auto' is 'depthwise'
            where that is exact, which a look at the scores tells, else 'offsets'; where a look is
            impossible (scripting, compiling, exporting, meta tensors) it is 'offsets'.

    Returns:
        [B, Y, X, C] in value's dtype, Y = (H + 2*padding - kh) // stride + 1.

    Raises:
        ValueError: shapes that do not go together, unknown impl, or 'depthwise' out of its range.
    """
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scores = scores.to(dtype)
    if rel_pos_bias is not None:
        rel_pos_bias = rel_pos_bias.to(dtype)
    if query_weight is not None:
        query_weight = query_weight.to(dtype)

    if torch.jit.is_scripting():
        out = qna_offsets(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
    else:
        _check_qna(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
        form = _QNA_FORMS[_choose_form(impl, scores, rel_pos_bias, kernel_size)]
        out = form(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
    return out.to(value.dtype)


_QNA_FORMS = {
    "reference": qna_attention_reference,
    "offsets": qna_offsets,
    "depthwise": qna_depthwise,
}


def _choose_form(
    impl: str, scores: Tensor, rel_pos_bias: Tensor | None, kernel_size: tuple[int, int]
) -> str:
    """The dispatch ladder: the form for an explicit request (no fall-back) or for 'auto'."""
    if impl in ("reference", "offsets"):
        return impl
    if impl == "depthwise":
        if not fits_shared_shift(scores, rel_pos_bias):
            raise ValueError(
                f"impl='depthwise' needs scores and bias that spread by {max_spread():g} at most; "
                "use impl='auto'"
            )
        return impl
    if impl != "auto":
        raise ValueError(f"impl must be one of {['auto', *_QNA_FORMS]}, got {impl!r}")
    # The choice reads a value on the host: not while a graph is being recorded.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or scores.is_meta:
        return "offsets"
    if scores.is_cuda and torch.cuda.is_current_stream_capturing():
        return "offsets"
    # A window of one token has no gradient for its score: exactly none with a softmax, a rounding
    # error with two sums.
    if scores.shape[1] * scores.shape[2] == 1 or kernel_size == (1, 1):
        return "offsets"
    return "depthwise" if fits_shared_shift(scores, rel_pos_bias) else "offsets"


def window_attention(
    qkv: Tensor,
    rel_pos_bias: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    fused: bool = True,
) -> Tensor:
    """Multi-head self-attention inside non-overlapping windows that tile the map.

        out_a = sum_b softmax_b(q_a . k_b / sqrt(d) + bias[a - b]) v_b,  a, b in the same window

    A map smaller than the window is one window. A map that windows do not divide is continued by
    padding at the bottom and right that takes no part in any softmax.

    Args:
        qkv: [B, H, W, 3*C], queries, keys and values one after the other, heads inside each.
        rel_pos_bias: [(2*Wh-1) * (2*Ww-1), h] or None.
        num_heads: h.
        window_size: (Wh, Ww) in tokens.
        fused: PyTorch's fused attention; otherwise matrix products (for exporters).

    Returns:
        [B, H, W, C].
    """
    return tiled_window_attention(qkv, rel_pos_bias, num_heads, window_size, fused)
