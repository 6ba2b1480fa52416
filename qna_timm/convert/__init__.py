"""Released checkpoints to ours: pure functions of names and tensors, a file for each release."""

from qna_timm.convert.common import ConversionError
from qna_timm.convert.cswin import cswin_state_dict
from qna_timm.convert.gramian import gramian_state_dict
from qna_timm.convert.qna import qna_vit_state_dict, read_flax_checkpoint
from qna_timm.convert.span import span_state_dict

__all__ = [
    "ConversionError",
    "cswin_state_dict",
    "gramian_state_dict",
    "qna_vit_state_dict",
    "read_flax_checkpoint",
    "span_state_dict",
]
