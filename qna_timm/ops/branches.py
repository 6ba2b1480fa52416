"""Products of many branches at once, with gradients as fast as those of a single one.

PyTorch knows how to give the gradient of a linear map's weight in the weight's own layout; for a
batch of matrices it gives the transpose, and copying that into place takes as long as the product
where tokens are few. The gradient of a Gram matrix takes it two products where one will do.

Letters: P parts (branches, or groups of branches), L tokens of a part.
"""

from typing import Any

import torch
from torch import Tensor

from qna_timm.ops.library import has_tangents


class _PartLinear(torch.autograd.Function):
    """x weight^T + bias of every part."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _part_linear(x, weight, bias)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if needs_x else None,
            torch.bmm(grad.transpose(1, 2), x) if needs_weight else None,
            grad.sum(dim=1) if needs_bias else None,
        )


class _Gram(torch.autograd.Function):
    """x^T x of every matrix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(1, 2), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.bmm(x, grad + grad.transpose(1, 2))


def _part_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _needs_plain_operators() -> bool:
    """Whether a trace is recorded or tangents are taken, which autograd functions do not serve."""
    return torch.jit.is_tracing() or has_tangents()


def part_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map of every part: y_p = x_p weight_p^T + bias_p.

    Under autocast it is computed in the autocast type, as PyTorch's linear map.

    Args:
        x: [P, L, in].
        weight: [P, out, in].
        bias: [P, out] or None.

    Returns:
        [P, L, out].
    """
    if torch.jit.is_scripting():
        return _part_linear(x, weight, bias)
    else:  # TorchScript skips an else branch, not code after a return
        device = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # here and not by autocast: the backward pass is outside of it
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return (
            _part_linear(x, weight, bias)
            if _needs_plain_operators()
            else _PartLinear.apply(x, weight, bias)
        )


def gram_matrix(x: Tensor) -> Tensor:
    """Gram matrix of the columns: [P, L, G] -> x_p^T x_p [P, G, G]."""
    if torch.jit.is_scripting():
        return torch.bmm(x.transpose(1, 2), x)
    else:
        return torch.bmm(x.transpose(1, 2), x) if _needs_plain_operators() else _Gram.apply(x)
