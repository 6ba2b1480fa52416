"""Importing this package registers its models in timm's registry."""

from qna_timm import models
from qna_timm.version import __version__

__all__ = ["__version__", "models"]
