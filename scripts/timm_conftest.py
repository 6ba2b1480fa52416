"""The conftest.py of timm's own per-model tests when they run on this package's models.

The test bodies are timm's, untouched. Only the lists that parametrise them are ours: timm's
filters by module name would leave foreign modules out of several tests.
"""

import gc
import os

import timm

import qna_timm  # noqa: F401 - registers the models

# Graphs are traced a tenth faster where little garbage is looked for among what is imported.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

NAMES = os.environ.get("QNA_TIMM_CONTRACT_MODELS", "").split()


def _list_models(filter: str | list[str] = "", *args: object, **kwargs: object) -> list[str]:
    """Our names for "all models" and "models of these modules", nothing for other families."""
    if filter or kwargs.get("pretrained"):
        return []
    return list(NAMES)


timm.list_models = _list_models
timm.list_pretrained = lambda *args, **kwargs: []
