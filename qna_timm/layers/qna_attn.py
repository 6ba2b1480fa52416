"""Learned-query attention ("QnA") as a layer on channels-last maps.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
D input channels, K = k*k offsets of a window.
"""

from typing import Any, Final

import torch
from timm.layers import register_notrace_function, register_notrace_module, use_fused_attn
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from torch import Tensor, nn

from qna_timm.layers.called import must_be_called
from qna_timm.ops import (
    learned_query_scores,
    normalize_query,
    offsets_qna_attention,
    qna_attention,
    resize_offset_table,
    scores_of_keys,
)

QUERY_WEIGHT_KINDS = ("normal", "normal_elementwise", "ones", "posneg", "avg", "none")
POS_EMBED_KINDS = ("relative", "absolute", "none")

# sizes and dtypes decide inside; FX takes each as one node
register_notrace_function(learned_query_scores)
register_notrace_function(normalize_query)
register_notrace_function(qna_attention)
register_notrace_function(scores_of_keys)
register_notrace_function(offsets_qna_attention)


class LearnedQueryAttention(nn.Module):
    r"""Overlapping local attention with queries that are parameters, shared by all windows.

        query_qj       <- query_qj / (|query_qj| + 1e-6) / sqrt(d)
        score[t, q, j] = key_j(x_t) . query_qj
        attn[o]        = softmax_o(score[y+o, q, j] + bias[o, q, j]) * query_weight[o, q, j]
        out[y]         = proj(concat_j sum_q sum_o attn[o] value_j(x_{y+o}))

    with o over the offsets of a kernel_size x kernel_size window around stride*y; tokens off the
    map take no part in the softmax. The query weight comes after the softmax, is signed, and is
    not renormalised. ("Learned Queries for Efficient Local Attention", CVPR 2022, section 4.)

    Args:
        dim: Input channels D.
        num_heads: Heads h, a divisor of attn_dim.
        attn_dim: Channels C of keys and values, dim if None.
        dim_out: Output channels, attn_dim if None.
        kernel_size: Side of the window, in tokens.
        stride: Tokens between windows.
        padding: Tokens around the map; (kernel_size-1)//2 if None.
        num_queries: Queries Q, summed over in the output.
        pos_embed: Bias of an offset: 'relative', a learned table; 'absolute', the query's product
            with a learned vector of the offset; 'none'.
        query_weight: 'normal', a table [K, Q, h] drawn from N(0, 0.02^2); 'normal_elementwise',
            the same for all offsets [1, Q, h]; 'ones', a table of ones; 'posneg', +1 for the first
            half of the (query, head) pairs and -1 for the rest; 'avg', 1/Q; 'none', 1.
        normalize_query: Divide queries by their norm.
        normalize_stop_grad: Take that norm as a constant in backward.
        scale_rel_pos_bias: Divide the relative table by sqrt(d).
        qkv_bias: Biases on key, value and output projections.
        proj_drop: Dropout after the output projection.
        impl: See `qna_timm.ops.qna_attention`; 'auto' is 'offsets', PyTorch's own operators, after
            `timm.layers.set_fused_attn(False)`.

    Shape: [B, H, W, D] -> [B, Y, X, dim_out].

    Raises:
        ValueError: a size below 1, padding that is not below kernel_size, heads that do not divide
            attn_dim, an unknown pos_embed or query_weight.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_dim: int | None = None,
        dim_out: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        num_queries: int = 2,
        pos_embed: str = "relative",
        query_weight: str = "normal",
        normalize_query: bool = True,
        normalize_stop_grad: bool = False,
        scale_rel_pos_bias: bool = False,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        attn_dim = attn_dim or dim
        padding = (kernel_size - 1) // 2 if padding is None else padding
        for name, number in (
            ("num_heads", num_heads),
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("num_queries", num_queries),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not 0 <= padding < kernel_size:
            raise ValueError(f"padding must be in 0..{kernel_size - 1}, got {padding}")
        if attn_dim % num_heads:
            raise ValueError(f"num_heads must divide attn_dim={attn_dim}, got {num_heads}")
        if pos_embed not in POS_EMBED_KINDS:
            raise ValueError(f"pos_embed must be one of {POS_EMBED_KINDS}, got {pos_embed!r}")
        if query_weight not in QUERY_WEIGHT_KINDS:
            raise ValueError(
                f"query_weight must be one of {QUERY_WEIGHT_KINDS}, got {query_weight!r}"
            )
        self.num_heads = num_heads
        self.num_queries = num_queries
        self.head_dim = attn_dim // num_heads
        self.kernel_size = (kernel_size, kernel_size)
        self.stride = stride
        self.padding = padding
        self.query_weight_kind = query_weight
        self.normalize_query = normalize_query
        self.normalize_stop_grad = normalize_stop_grad
        self.bias_scale = self.head_dim**-0.5 if scale_rel_pos_bias else 1.0
        self.impl = impl
        self.fused_attn = impl != "offsets" and (impl != "auto" or use_fused_attn())

        self.query = nn.Parameter(torch.empty(num_queries, attn_dim, **dd))
        self.k = nn.Linear(dim, attn_dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, attn_dim, bias=qkv_bias, **dd)
        offsets = kernel_size**2
        self.rel_pos_bias: nn.Parameter | None = None
        self.pos_embed: nn.Parameter | None = None
        if pos_embed == "relative":
            shape = (offsets, num_queries, num_heads)
            self.rel_pos_bias = nn.Parameter(torch.empty(shape, **dd))
        elif pos_embed == "absolute":
            self.pos_embed = nn.Parameter(torch.empty(offsets, num_queries, attn_dim, **dd))
        self._build_query_weight(offsets, dd)
        self.proj = nn.Linear(attn_dim, dim_out or attn_dim, bias=qkv_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def _build_query_weight(self, offsets: int, dd: dict) -> None:
        kind = self.query_weight_kind
        rows = 1 if kind in ("normal_elementwise", "posneg", "avg") else offsets
        shape = (rows, self.num_queries, self.num_heads)
        self.query_weight: nn.Parameter | None
        if kind in ("normal", "normal_elementwise", "ones"):
            self.query_weight = nn.Parameter(torch.empty(shape, **dd))
        elif kind in ("posneg", "avg"):
            self.register_buffer("query_weight", torch.empty(shape, **dd), persistent=False)
        else:
            self.query_weight = None

    def reset_parameters(self) -> None:
        """LeCun-normal projections, truncated-normal queries, zero position tables."""
        for linear in (self.k, self.v, self.proj):
            lecun_normal_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        with torch.no_grad():
            trunc_normal_(self.query).mul_(self.head_dim**-0.5)
        for table in (self.rel_pos_bias, self.pos_embed):
            if table is not None:
                nn.init.zeros_(table)
        if self.query_weight_kind.startswith("normal"):
            nn.init.normal_(self.query_weight, std=0.02)
        elif self.query_weight_kind == "ones":
            nn.init.ones_(self.query_weight)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Values of the query weight where it is a constant."""
        if self.query_weight_kind == "avg":
            nn.init.constant_(self.query_weight, 1 / self.num_queries)
        elif self.query_weight_kind == "posneg":
            with torch.no_grad():
                flat = self.query_weight.view(-1)  # query-major pairs
                flat.fill_(1.0)
                flat[flat.numel() // 2 :] = -1.0

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the released recipe does not decay."""
        names = {"rel_pos_bias": self.rel_pos_bias, "pos_embed": self.pos_embed}
        if self.query_weight_kind.startswith("normal"):
            names["query_weight"] = self.query_weight
        return {name for name, parameter in names.items() if parameter is not None}

    def offset_bias(self, query: Tensor) -> Tensor | None:
        """Bias of each window offset [K, Q, h], for normalised queries [Q, h, d]."""
        if self.rel_pos_bias is not None:
            if self.bias_scale == 1.0:  # compilers fail to drop a product with 1 in checkpoints
                return self.rel_pos_bias
            return self.rel_pos_bias * self.bias_scale
        if self.pos_embed is not None:
            return (self.pos_embed.unflatten(2, (self.num_heads, -1)) * query).sum(dim=3)
        return None

    def scores(self, x: Tensor, query: Tensor) -> Tensor:
        """Of tokens [B, H, W, D] for normalised queries [Q, h, d]: [B, H, W, Q, h]."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - its compiler skips no half of a condition
            if must_be_called(self.k):
                return scores_of_keys(self.k(x), query)
        return learned_query_scores(x, self.k.weight, self.k.bias, query)

    def forward(self, x: Tensor) -> Tensor:
        query = normalize_query(
            self.query, self.num_heads, self.normalize_query, self.normalize_stop_grad
        )
        scores = self.scores(x, query)
        bias = self.offset_bias(query)
        x = self.attend(scores, self.v(x), bias, self.query_weight, self.kernel_size)
        return self.proj_drop(self.proj(x))

    def attend(
        self,
        scores: Tensor,
        value: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        kernel_size: tuple[int, int],
    ) -> Tensor:
        """See `qna_attention`."""
        if self.fused_attn:
            return qna_attention(
                scores, value, bias, weight, kernel_size, self.stride, self.padding, self.impl
            )
        return offsets_qna_attention(
            scores, value, bias, weight, kernel_size, self.stride, self.padding
        )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_queries={self.num_queries}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        )


@register_notrace_module
class LearnedQueryPool(LearnedQueryAttention):
    """Learned-query attention over a whole map: one window, one output position.

    The tables belong to a map of kernel_size x kernel_size; for a map of another size they are
    resized (`resize_offset_table`), so that every token takes part.

    Args:
        dim: Input channels D.
        num_heads: Heads h.
        kernel_size: Side of the maps that the tables are made for, in tokens.
        kwargs: More arguments of `LearnedQueryAttention`.

    Shape: [B, H, W, D] -> [B, 1, 1, dim_out].

    Raises:
        ValueError: see `LearnedQueryAttention`.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, kernel_size=kernel_size, padding=0, **kwargs)

    def set_kernel_size(self, kernel_size: tuple[int, int]) -> None:
        """Resize the tables for good, to maps of (height, width) tokens."""
        for name in ("rel_pos_bias", "pos_embed", "query_weight"):
            table = getattr(self, name)
            if table is None or table.shape[0] == 1:
                continue
            resized = resize_offset_table(table.detach(), self.kernel_size, kernel_size)
            setattr(self, name, nn.Parameter(resized, requires_grad=table.requires_grad))
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        query = normalize_query(
            self.query, self.num_heads, self.normalize_query, self.normalize_stop_grad
        )
        size = (x.shape[1], x.shape[2])
        bias = self.offset_bias(query)
        if bias is not None:
            bias = resize_offset_table(bias, self.kernel_size, size)
        weight = self.query_weight
        if weight is not None and weight.shape[0] > 1:
            weight = resize_offset_table(weight, self.kernel_size, size)
        scores = self.scores(x, query)
        x = self.attend(scores, self.v(x), bias, weight, size)
        return self.proj_drop(self.proj(x))
