"""The training task: a model, its loss in named parts, and what happens after an update."""

import argparse
from collections.abc import Iterable
from typing import Any

from timm.data import FastCollateMixup, Mixup
from timm.loss import create_classification_loss
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from qna_timm.training.errors import UsageError
from qna_timm.training.observers import BranchCounts


class TrainTask(ClassificationTask):
    """timm's classification task with the seams that other model families need.

    Subclasses override `loss_parts` for losses of several branches or penalties, `post_step` for
    what must hold of the weights after each update, such as a clamp.
    """

    def loss_parts(self, output: Any, target: Tensor) -> dict[str, Tensor]:
        """The loss in named parts whose sum is minimised.

        Args:
            output: What the model returns in training mode, [B, classes] logits here.
            target: Labels [B], or soft targets [B, classes] after mixup.

        Returns:
            Scalars by name; with more than one, each is logged beside the sum.
        """
        return {"class": self.criterion(output, target)}

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Forward pass and loss.

        Args:
            input: Images [B, C, H, W].
            target: As in `loss_parts`.

        Returns:
            ``loss`` (scalar), ``parts`` (detached scalars by name) and ``output``.
        """
        output = self.trainable_module(input)
        parts = self.loss_parts(output, target)
        return {
            "loss": sum(parts.values()),
            "parts": {name: part.detach() for name, part in parts.items()},
            "output": output,
        }

    @property
    def num_classes(self) -> int:
        """Classes that the model tells apart."""
        return unwrap_model(self.get_trainable_module()).num_classes

    def branch_counts(self) -> BranchCounts | None:
        """Fresh counts for one evaluation of a model that returns its branches; None for others."""
        return None

    def spans(self) -> dict[str, dict[str, Any]]:
        """Learned windows by layer, as the summary's rows keep them; models mostly have none."""
        return {}

    def post_step(self) -> None:
        """Called after every update that changed the weights, before they are averaged."""

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Parameters whose gradients are clipped.

        Args:
            exclude_head: Leave the classifier out, as adaptive gradient clipping asks.
        """
        model = unwrap_model(self.get_trainable_module())
        if not exclude_head:
            return model.parameters()
        head = {id(p) for layer in classifier_layers(model) for p in layer.parameters()}
        return [p for p in model.parameters() if id(p) not in head]


def classifier_layers(model: nn.Module) -> list[nn.Module]:
    """The model's classifier layers: one, several for distilled models, none without classes."""
    classifier = model.get_classifier()
    layers = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def mixes_targets(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix turns labels into soft targets."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_loss(args: argparse.Namespace) -> nn.Module:
    """timm's loss for the run's flags.

    Raises:
        UsageError: Flags of the loss that do not go together.
    """
    loss_type = args.loss or ("jsd" if args.jsd_loss else "bce" if args.bce_loss else "ce")
    kwargs: dict[str, Any] = {
        "smoothing": args.smoothing,
        "soft_targets": mixes_targets(args),
        "bce_sum": args.bce_sum,
        "bce_target_thresh": args.bce_target_thresh,
        "pos_weight": args.bce_pos_weight,
        "jsd_splits": args.aug_splits,
        "poly_epsilon": args.poly_epsilon,
    }
    try:
        return create_classification_loss(loss_type, **kwargs)
    except ValueError as error:
        raise UsageError(f"--loss {loss_type}: {error}") from error


def create_mixup(args: argparse.Namespace, num_classes: int, in_loader: bool) -> Mixup | None:
    """timm's mixup and cutmix for the run's flags, or None without them.

    Args:
        args: Flags.
        num_classes: Length of the soft targets.
        in_loader: Whether samples are mixed while they are collated, or in the training loop.
    """
    if not mixes_targets(args):
        return None
    mixup_class = FastCollateMixup if in_loader else Mixup
    return mixup_class(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
