"""What train.py and validate.py stand on; `load_run` loads what they have trained."""

from qna_timm.training.trained import load_run

__all__ = ["load_run"]
