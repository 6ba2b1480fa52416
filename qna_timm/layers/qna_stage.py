"""Stages of QnA-ViT: what each is made of, checked, and the module."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import calculate_drop_path_rates, to_ntuple
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from qna_timm.layers.qna_block import Block, BlockArgs, qna_block, window_block


@dataclass(frozen=True)
class StageArgs:
    """What one stage is made of; `drop_path` holds a rate for each block in order of execution,
    the last one that of the strided block that leads out of the stage."""

    dim: int
    qna_depth: int
    window_depth: int
    qna_num_heads: int
    window_num_heads: int
    kernel_size: int
    window_size: tuple[int, int]
    normalize_query: bool
    drop_path: Sequence[float]


def _check_stages(num_stages: int, minimum: int, **numbers: Sequence[int]) -> None:
    """One number of at least the minimum for each stage, of each argument."""
    for name, values in numbers.items():
        if len(values) != num_stages or min(values) < minimum:
            raise ValueError(
                f"{name} must be a number of at least {minimum} for each of {num_stages} stages, "
                f"got {values}"
            )


def check_depths(qna_depths: Sequence[int], window_depths: Sequence[int]) -> None:
    """Refuse depths that do not go together.

    Raises:
        ValueError: another number of stages, or a negative depth.
    """
    found = f"got {qna_depths} and {window_depths}"
    if len(window_depths) != len(qna_depths):
        raise ValueError(f"qna_depths and window_depths must have one entry a stage, {found}")
    if min(*qna_depths, *window_depths) < 0:
        raise ValueError(f"qna_depths and window_depths must not be negative, {found}")


def drop_path_rates(
    max_rate: float, qna_depths: Sequence[int], window_depths: Sequence[int], downsample: bool
) -> list[list[float]]:
    """Rates of each stage's window blocks, QnA blocks and outgoing strided block, rising linearly
    in the order of execution; a strided block takes a step of the rise only with downsample."""
    last = len(qna_depths) - 1
    slots = [
        window + qna + (1 if downsample and i < last else 0)
        for i, (window, qna) in enumerate(zip(window_depths, qna_depths, strict=True))
    ]
    rates = calculate_drop_path_rates(max_rate, slots, stagewise=True)
    return rates if downsample else [[*stage, 0.0] for stage in rates]


def plan_stages(
    dims: Sequence[int],
    qna_depths: Sequence[int],
    window_depths: Sequence[int],
    qna_num_heads: Sequence[int],
    window_num_heads: Sequence[int],
    kernel_size: int | Sequence[int],
    window_sizes: Sequence[tuple[int, int]],
    normalize_query: bool | Sequence[bool],
    rates: Sequence[Sequence[float]],
) -> list[StageArgs]:
    """The stages' arguments from one value for all or one for each.

    Raises:
        ValueError: an argument with another number of values, or a value too small.
    """
    num_stages = len(dims)
    kernels = to_ntuple(num_stages)(kernel_size)
    _check_stages(num_stages, 1, kernel_size=kernels)
    _check_stages(  # 0 where a stage has no such blocks
        num_stages, 0, qna_num_heads=qna_num_heads, window_num_heads=window_num_heads
    )
    normalize = to_ntuple(num_stages)(normalize_query)
    if len(normalize) != num_stages:
        raise ValueError(
            f"normalize_query must be one value or {num_stages}, got {normalize_query}"
        )
    columns = (
        dims,
        qna_depths,
        window_depths,
        qna_num_heads,
        window_num_heads,
        kernels,
        window_sizes,
        normalize,
        rates,
    )
    return [StageArgs(*row) for row in zip(*columns, strict=True)]


class QnAStage(nn.Module):
    """[strided QnA block,] window-attention blocks, QnA blocks, at one resolution.

    Args:
        stage: What it is made of.
        before: The stage before, whose heads (twice), kernel and last rate the strided block has;
            None for the first stage, which has no strided block.
        args: What all blocks have in common.
    """

    def __init__(self, stage: StageArgs, before: StageArgs | None, args: BlockArgs) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if before is not None:
            self.downsample = qna_block(
                before.dim,
                2 * before.qna_num_heads,
                before.kernel_size,
                before.normalize_query,
                args,
                before.drop_path[-1],
                dim_out=stage.dim,
            )
        first = stage.window_depth
        blocks = [
            window_block(stage.dim, stage.window_num_heads, stage.window_size, args, rate)
            for rate in stage.drop_path[:first]
        ]
        blocks += [
            qna_block(
                stage.dim, stage.qna_num_heads, stage.kernel_size, stage.normalize_query, args, rate
            )
            for rate in stage.drop_path[first : first + stage.qna_depth]
        ]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            if isinstance(self.downsample, Block):
                x = checkpoint(self.downsample, x)
            return checkpoint_seq(self.blocks, x)
        return self.blocks(self.downsample(x))
