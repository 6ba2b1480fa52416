"""Operators as pure functions of tensors. Read `reference.py` first: it is the specification."""

from qna_timm.ops.api import learned_query_scores, normalize_query, qna_attention, window_attention
from qna_timm.ops.reference import qna_attention_reference
from qna_timm.ops.resize import resize_offset_table

__all__ = [
    "learned_query_scores",
    "normalize_query",
    "qna_attention",
    "qna_attention_reference",
    "resize_offset_table",
    "window_attention",
]
