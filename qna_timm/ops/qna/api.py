"""The public operators: argument checks, then the only dispatch.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
K = kh*kw offsets of a window.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops.dispatch import Choice, against_triton, choose
from qna_timm.ops.float32 import full_float32, is_plain_float32
from qna_timm.ops.library import has_tangents
from qna_timm.ops.qna import native
from qna_timm.ops.qna.forms import FORMS, Problem
from qna_timm.ops.qna.offsets import FUSED_OFFSETS, qna_offsets
from qna_timm.ops.qna.operator import qna_operator
from qna_timm.ops.qna.windows import check_problem
from qna_timm.ops.reference import qna_attention_reference

QNA_FORMS = (*FORMS, "reference", "offsets", "triton")


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
    # C, D -> h, Q, D: the key projection seen by each query
    folded = torch.bmm(query.transpose(0, 1), weight.view(num_heads, head_dim, -1))
    folded = folded.transpose(0, 1)
    offset: Tensor | None = None
    if bias is not None:
        offset = (query * bias.view(num_heads, head_dim)).sum(dim=2).flatten()
    return F.linear(x, folded.flatten(0, 1), offset).unflatten(3, (num_queries, num_heads))


# PyTorch 2.6 does not tell compiling from exporting, both are exporting there; and inside compiled
# transforms operators have no gradients.
_TELLS_EXPORTS = hasattr(torch.compiler, "is_exporting")
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def learned_query_scores(
    x: Tensor, key_weight: Tensor, key_bias: Tensor | None, query: Tensor
) -> Tensor:
    """Scores of every token for every learned query, in float32 (float64 for float64 input).

        scores[b, y, x, q, j] = query[q, j] . key_j(x[b, y, x]),  key(x) = key_weight x + key_bias

    Queries do not depend on the input, so they are folded into the key projection: D*Q*h
    multiplications for a token in place of D*C. Autocast and TF32 are off inside (TF32 as the
    caller has set it in compiled and scripted graphs): a half-precision score of 1000 would be good
    to the nearest half only, and goes into an exponential.

    Args:
        x: [B, H, W, D].
        key_weight: [C, D].
        key_bias: [C] or None.
        query: [Q, h, d] from `normalize_query`.

    Returns:
        [B, H, W, Q, h].

    Raises:
        ValueError: x is not a channels-last map of D channels.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, key_weight, query = x.to(dtype), key_weight.to(dtype), query.to(dtype)
    if key_bias is not None:
        key_bias = key_bias.to(dtype)
    if torch.jit.is_scripting():
        return _folded_scores(x, key_weight, key_bias, query)
    else:  # TorchScript skips an else branch, not code after a return
        wanted, shape = key_weight.shape[1], list(x.shape)
        if not torch.jit.is_tracing() and (len(shape) != 4 or shape[3] != wanted):
            raise ValueError(f"x must be a channels-last map [B, H, W, {wanted}], got {shape}")
        if is_plain_float32(x):
            return _folded_scores(x, key_weight, key_bias, query)
        with full_float32(x.device):
            return _folded_scores(x, key_weight, key_bias, query)


def scores_of_keys(key: Tensor, query: Tensor) -> Tensor:
    """`learned_query_scores` of keys that have been computed: in float32, or float64 like them.

        scores[b, y, x, q, j] = query[q, j] . key_j[b, y, x]

    Args:
        key: [B, H, W, C].
        query: [Q, h, d] from `normalize_query`, C = h*d.

    Returns:
        [B, H, W, Q, h].

    Raises:
        ValueError: key is not a channels-last map of C channels.
    """
    channels, shape = query.shape[1] * query.shape[2], list(key.shape)
    if not torch.jit.is_tracing() and (len(shape) != 4 or shape[3] != channels):
        raise ValueError(f"key must be a channels-last map [B, H, W, {channels}], got {shape}")
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    key = key.to(dtype).unflatten(3, query.shape[1:])
    with full_float32(key.device):
        return torch.einsum("byxjd,qjd->byxqj", key, query.to(dtype))


def _widened(
    scores: Tensor, rel_pos_bias: Tensor | None, query_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In the dtype to compute in: float32, float64 for float64 scores."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if rel_pos_bias is not None:
        rel_pos_bias = rel_pos_bias.to(dtype)
    if query_weight is not None:
        query_weight = query_weight.to(dtype)
    return scores.to(dtype), rel_pos_bias, query_weight


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
        impl: 'auto', or one form with no fall-back. 'reference': window by window. 'offsets': stock
            operators, any order of gradients, forward-mode ones. 'exact', 'depthwise', 'fft': by
            hand, sums over windows offset by offset, as depthwise convolutions, by Fourier
            transforms; the latter two raise where the scores of a map spread too far for them.
            'native': by compiled functions, on a CPU in float32, where the package was installed
            with a C++ compiler at hand. 'triton': on a GPU. 'auto' takes the fastest that is right
            for the scores, images by images; `explain_qna_attention` tells which. Under
            `torch.compile` it is 'offsets' for windows of up to 9 offsets where nothing native
            serves, which the compiler fuses.

    Returns:
        [B, Y, X, C] in value's dtype, Y = (H + 2*padding - kh) // stride + 1.

    Raises:
        ValueError: shapes that do not go together, unknown impl, or one that cannot compute this.
    """
    scores, rel_pos_bias, query_weight = _widened(scores, rel_pos_bias, query_weight)
    if torch.jit.is_scripting():
        if impl == "reference" or impl == "offsets":
            raise ValueError("impl='" + impl + "' is not for scripts; 'auto' is")
        window = [kernel_size[0], kernel_size[1]]
        return torch.ops.qna_timm.qna_attention(
            scores, value, rel_pos_bias, query_weight, window, stride, padding, impl
        )[0]
    else:  # TorchScript skips an else branch, not code after a return
        args = (scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
        if not torch.jit.is_tracing():  # sizes are tensors there
            check_problem(*args)
        choice = _choose_qna(impl, *args)
        if choice.impl == "reference":
            return qna_attention_reference(*args).to(value.dtype)
        if choice.impl == "offsets":
            return offsets_qna_attention(*args)
        return qna_operator(*args, choice.impl)


def offsets_qna_attention(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> Tensor:
    """`qna_attention` by stock operators alone, for graphs that must load without this package."""
    scores, rel_pos_bias, query_weight = _widened(scores, rel_pos_bias, query_weight)
    out = qna_offsets(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
    return out.to(value.dtype)


def _unsupported_by_triton(*args: Any) -> str | None:
    from qna_timm.ops.qna.triton import launch  # an optional package

    return launch.unsupported(*args)


def _choose_qna(impl: str, scores: Tensor, value: Tensor, *rest: Any) -> Choice:
    """The ladder of what is known without looking at values; 'auto' is what looks at them."""
    if impl not in QNA_FORMS:
        raise ValueError(f"impl must be one of {QNA_FORMS}, got {impl!r}")
    kernel_h, kernel_w = rest[2]
    few = kernel_h * kernel_w <= FUSED_OFFSETS
    if impl == "auto" and torch.compiler.is_compiling():
        if has_tangents() or (not _TELLS_EXPORTS and torch._C._are_functorch_transforms_active()):
            return Choice("offsets", {"auto": "compiled graphs have no tangents of operators"})
        if few and not _is_exporting() and native.unsupported(scores, value):
            return Choice("offsets", {"auto": "the compiler fuses so few offsets into one loop"})
    # no functions in here: PyTorch 2.6 cannot compile one with annotations
    unsupported = partial(_unsupported_by_triton, scores, value, *rest)
    against = partial(against_triton, "qna_attention", value, unsupported)
    return choose(impl, (("triton", against),), "auto")


def explain_qna_attention(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
) -> Choice:
    """Which form impl='auto' takes for an output, and why not others; computes it to see.

    Of a forward pass: gradients may come from another form.

    Arguments and errors as in `qna_attention`. Where images need several forms, the choice is the
    last of them on the ladder and the reasons tell how many images are concerned.
    """
    scores, rel_pos_bias, query_weight = _widened(scores, rel_pos_bias, query_weight)
    args = (scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
    check_problem(*args)
    choice = _choose_qna("auto", *args)
    if choice.impl != "auto":
        return choice
    problem = Problem(*args, "auto")
    why_not = dict(choice.why_not)
    with torch.no_grad(), problem:
        served = [(problem.forward(part)[0], part.stop - part.start) for part in problem.parts()]
    left = scores.shape[0]
    for name in ("native", "fft", "depthwise"):
        reason = problem.why_not(name)
        if reason is None:
            left -= sum(count for form, count in served if form == name)
            if left == 0:
                return Choice(name, why_not)
            reason = f"{left} of {scores.shape[0]} images are out of its range"
        why_not[name] = reason
    return Choice("exact", why_not)
