"""The training task of models that learn their windows: a price on wide ones, and their bounds."""

from typing import Any

import torch
from torch import Tensor, nn

from qna_timm.layers.span_attn import AdaptiveSpan
from qna_timm.training.task import TrainTask

DEFAULT_PENALTY = 0.001
"""Weight of the spans where ``--span-penalty`` is not given: the released code's."""


def span_layers(model: nn.Module) -> dict[str, AdaptiveSpan]:
    """The learned windows of a model, by the names of the layers they belong to."""
    return {
        name.rpartition(".")[0] or name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptiveSpan)
    }


def has_spans(model: nn.Module) -> bool:
    """Whether a model learns its windows; those of fixed local attention have no spans."""
    return bool(span_layers(model))


class SpanTask(TrainTask):
    """Trains a model with learned windows.

        loss = class + span_penalty * sum over layers and heads of |span|

    Spans are fractions of their layer's ``max_span`` pixels; after every update, and before the
    first, they are brought back into [0, 1]. ("Adaptive Attention Span in Computer Vision",
    arXiv:2004.08708.)

    Args:
        model: Has `AdaptiveSpan` layers; not yet scripted, compiled or distributed.
        criterion: Loss of logits and targets.
        span_penalty: Weight of the sum of spans.
        **kwargs: timm's, such as ``device``.

    Raises:
        ValueError: No layer of the model learns its window.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        *,
        span_penalty: float = DEFAULT_PENALTY,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, criterion, **kwargs)
        self.span_penalty = span_penalty
        # Not the task's own submodules: they are the model's, however that is wrapped later.
        self.span_layers = span_layers(model)
        if not self.span_layers:
            raise ValueError(
                f"model: expected layers with learned windows, found none in {type(model).__name__}"
            )
        self.post_step()

    def loss_parts(self, output: Any, target: Tensor) -> dict[str, Tensor]:
        """``class``, the criterion; ``span``, the price of the windows in float32 at least."""
        penalties = torch.stack([layer.penalty() for layer in self.span_layers.values()])
        penalties = penalties.to(torch.promote_types(penalties.dtype, torch.float32))
        return {**super().loss_parts(output, target), "span": self.span_penalty * penalties.sum()}

    def post_step(self) -> None:
        """Bring every span back into [0, 1]."""
        for layer in self.span_layers.values():
            layer.clamp_()

    def spans(self) -> dict[str, dict[str, Any]]:
        """The model's windows as they are now, by layer.

        Returns:
            ``span_px``, each head's span in pixels, without the ramp; ``kernel``, the side of the
            window that all heads run in, ramp included.
        """
        return {
            name: {
                "span_px": [round(pixels, 6) for pixels in layer.pixels().tolist()],
                "kernel": 2 * layer.running_radius() + 1,
            }
            for name, layer in self.span_layers.items()
        }
