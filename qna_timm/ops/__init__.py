"""Operators as pure functions of tensors. Read `reference.py` first: it is the specification."""

from qna_timm.ops.branches import gram_matrix, part_linear
from qna_timm.ops.gramian import (
    attend_by_keys,
    class_attention,
    gram_triangle,
    triangle_index,
)
from qna_timm.ops.qna.api import (
    explain_qna_attention,
    learned_query_scores,
    normalize_query,
    offsets_qna_attention,
    qna_attention,
    scores_of_keys,
)
from qna_timm.ops.reference import (
    class_attention_reference,
    gram_triangle_reference,
    qna_attention_reference,
    span_attention_reference,
)
from qna_timm.ops.resize import average_pool_to, resize_offset_table
from qna_timm.ops.span.api import explain_span_attention, span_attention
from qna_timm.ops.span.offsets import ring_index, ring_weights
from qna_timm.ops.window_attn import window_attention

__all__ = [
    "attend_by_keys",
    "average_pool_to",
    "class_attention",
    "class_attention_reference",
    "explain_qna_attention",
    "explain_span_attention",
    "gram_matrix",
    "gram_triangle",
    "gram_triangle_reference",
    "learned_query_scores",
    "normalize_query",
    "offsets_qna_attention",
    "part_linear",
    "qna_attention",
    "qna_attention_reference",
    "resize_offset_table",
    "ring_index",
    "ring_weights",
    "scores_of_keys",
    "span_attention",
    "span_attention_reference",
    "triangle_index",
    "window_attention",
]
