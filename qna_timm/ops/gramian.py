"""Gram matrices as feature vectors, and attention of one query per branch, folded.

"Gramian Attention Heads are Strong yet Efficient Vision Learners", ICCV 2023, arXiv:2310.16483.
Letters: B batch, N positions, D channels, G gram_dim, T = G(G+1)/2, M branches, h heads,
d head_dim, e = h*d channels of queries, keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops.branches import gram_matrix, part_linear
from qna_timm.ops.float32 import full_float32, is_plain_float32


def triangle_index(gram_dim: int, device: torch.device | str | None = None) -> Tensor:
    """Positions of the upper triangle in a flattened G x G matrix, row by row: int64 [T]."""
    rows, cols = torch.triu_indices(gram_dim, gram_dim, device=device).unbind(0)
    return rows * gram_dim + cols


def _gram_triangle(x: Tensor, index: Tensor, height: int) -> Tensor:
    branches, batch, positions, gram_dim = x.shape
    x = x.reshape(branches * batch, positions, gram_dim) * (1.0 / height)
    gram = gram_matrix(x).flatten(1)
    triangle = gram.gather(1, index.expand(branches * batch, -1)) * (1.0 / positions)
    triangle = F.normalize(triangle, dim=1)  # eps 1e-12
    return triangle.view(branches, batch, index.shape[0])


def gram_triangle(x: Tensor, index: Tensor, height: int) -> Tensor:
    """Upper triangle of every Gram matrix, as a vector of length 1.

        gram = F F^T / (height^2 N),   out = triu(gram) / max(|triu(gram)|, 1e-12)

    with the columns of F the positions of a map. The scales matter to the floor of the norm only.
    Products and sums are float32 (float64 for float64 input), also under autocast and where TF32
    is on (not so in compiled and scripted graphs): a sum over positions in fewer digits loses what
    sets two images apart.

    Args:
        x: Maps as tokens [M, B, N, G].
        index: [T] from `triangle_index`.
        height: Rows of the map.

    Returns:
        [M, B, T], row-major with the diagonal, float32 or float64.

    Raises:
        ValueError: The index has no values and the maps have.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if torch.jit.is_scripting():
        return _gram_triangle(x, index, height)
    else:  # TorchScript skips an else branch, not code after a return
        if index.is_meta and not x.is_meta:  # PyTorch would gather whatever is in memory
            raise ValueError(
                f"the triangle's index is on meta, the map on {x.device.type}: "
                "init_non_persistent_buffers() gives a head that was built there its index"
            )
        if is_plain_float32(x):
            return _gram_triangle(x, index, height)
        with full_float32(x.device):
            return _gram_triangle(x, index, height)


def _class_attention(
    query: Tensor,
    x: Tensor,
    token: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_heads: int,
) -> Tensor:
    branches, batch, attn_dim = query.shape
    dim = x.shape[2]
    head_dim = attn_dim // num_heads
    heads = branches * num_heads
    norm_weight = norm_weight.view(branches, 1, 1, dim)

    # M, B, e -> M*h, B, d
    query = query.view(branches, batch, num_heads, head_dim).transpose(1, 2)
    query = query.reshape(heads, batch, head_dim) * head_dim**-0.5
    # The key projection and the norm's weight as each query sees them. The norm's bias adds the
    # same to all of a query's scores, which softmax takes away.
    query = torch.bmm(query, key_weight.view(heads, head_dim, dim))
    query = query.view(branches, num_heads, batch, dim) * norm_weight
    own = (query * token[:, None]).sum(dim=3).view(heads, batch).t()
    query = query.view(heads, batch, dim).transpose(0, 1)
    scores = torch.cat([own[:, :, None], torch.bmm(query, x.transpose(1, 2))], dim=2)
    attn = scores.softmax(dim=2)  # B, M*h, 1+N

    mixed = torch.bmm(attn[:, :, 1:], x).transpose(0, 1)  # M*h, B, D
    own = attn[:, :, 0].t().reshape(branches, num_heads, batch, 1)
    mixed = mixed.reshape(branches, num_heads, batch, dim) + own * token[:, None]
    # Weights sum to 1: the norm's affine map comes after the mean.
    mixed = mixed * norm_weight + norm_bias.view(branches, 1, 1, dim)
    value_weight = value_weight.view(heads, head_dim, dim)
    out = part_linear(mixed.view(heads, batch, dim), value_weight, None)
    out = out.view(branches, num_heads, batch, head_dim).transpose(1, 2)
    return out.reshape(branches, batch, attn_dim)


def _attend_by_keys(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    query = query.unflatten(-1, (num_heads, -1))
    key, value = key.unflatten(-1, (num_heads, -1)), value.unflatten(-1, (num_heads, -1))
    scores = torch.einsum("mbhd,mbnhd->mbhn", query, key)
    attn = (scores * query.shape[-1] ** -0.5).softmax(dim=3)
    return torch.einsum("mbhn,mbnhd->mbhd", attn, value).flatten(2)


def attend_by_keys(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """`class_attention` to keys and values that are there already.

        out_j = sum_n softmax_n(query_j . key_jn / sqrt(d)) value_jn

    Args:
        query: [M, B, e], heads one after the other.
        key: [M, B, 1+N, e].
        value: [M, B, 1+N, e].
        num_heads: h, a divisor of e.

    Returns:
        [M, B, e] in query's dtype, computed in float32 (float64 for a float64 query).

    Raises:
        ValueError: num_heads does not divide e.
    """
    if query.shape[2] % num_heads != 0:
        raise ValueError(f"num_heads must divide {query.shape[2]} channels, got {num_heads}")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    returned, query, key, value = query.dtype, query.to(dtype), key.to(dtype), value.to(dtype)
    if torch.jit.is_scripting():
        return _attend_by_keys(query, key, value, num_heads).to(returned)
    else:  # TorchScript skips an else branch, not code after a return
        with full_float32(query.device):
            return _attend_by_keys(query, key, value, num_heads).to(returned)


def class_attention(
    query: Tensor,
    x: Tensor,
    token: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_heads: int,
) -> Tensor:
    """Attention of one query per branch over its own token and the positions of a shared map.

        u_0 = norm(token), u_n = norm(x_n),   norm(z) = z * norm_weight + norm_bias
        out_j = sum_n softmax_n(query_j . key_j(u_n) / sqrt(d)) value_j(u_n),   n = 0..N

    A single query needs no keys and values of all positions: its product with a key is that of
    key_weight^T query with u_n, and value_weight is linear, so it follows the sum. All branches
    read the same x, standardised once. Everything inside is float32 (float64 for float64 input),
    also under autocast.

    Args:
        query: [M, B, e], heads one after the other.
        x: Standardised positions [B, N, D]: layer norm without weight and bias.
        token: Standardised token of each branch [M, B, D].
        key_weight: [M*e, D].
        value_weight: [M*e, D].
        norm_weight: [M*D].
        norm_bias: [M*D].
        num_heads: h, a divisor of e.

    Returns:
        [M, B, e] in query's dtype.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    returned = query.dtype
    query, x, token = query.to(dtype), x.to(dtype), token.to(dtype)
    key_weight, value_weight = key_weight.to(dtype), value_weight.to(dtype)
    norm_weight, norm_bias = norm_weight.to(dtype), norm_bias.to(dtype)
    weights = (key_weight, value_weight, norm_weight, norm_bias)
    if torch.jit.is_scripting():
        out = _class_attention(
            query, x, token, weights[0], weights[1], weights[2], weights[3], num_heads
        )
        return out.to(returned)
    else:
        if is_plain_float32(x):
            return _class_attention(query, x, token, *weights, num_heads).to(returned)
        with full_float32(x.device):
            return _class_attention(query, x, token, *weights, num_heads).to(returned)
