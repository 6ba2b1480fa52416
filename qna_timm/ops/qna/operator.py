"""Learned-query attention in PyTorch's registry, with gradients for every way to ask for them.

Graphs (compiled, exported, traced, scripted) hold `torch.ops.qna_timm.qna_attention` itself; eager
calls go through an autograd function, which `torch.func` takes too. Gradients of gradients come
from the form of stock operators.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from qna_timm.ops.float32 import full_float32
from qna_timm.ops.library import calls_operator, register_gradient, register_operator
from qna_timm.ops.qna import forms
from qna_timm.ops.qna.offsets import qna_offsets

_ARGUMENTS = (
    "Tensor scores, Tensor value, Tensor? rel_pos_bias, Tensor? query_weight, "
    "int[] kernel_size, int stride, int padding, str impl"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    if args[-1] == "triton":
        return _triton().forward(*args[:-1])
    return forms.forward(*args), args[0].new_empty(0)


def _backward(
    grad: Tensor, stats: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if args[-1] != "triton":
        return forms.backward(grad, *args)
    grads = _triton().backward(grad, *args[:4], stats, *args[4:-1])
    scores, kernel_size = args[0], args[4]
    empty = scores.new_zeros(kernel_size[0] * kernel_size[1], *scores.shape[3:])
    return tuple(empty if x is None else x for x in grads)


def _triton() -> ModuleType:
    from qna_timm.ops.qna.triton import launch  # an optional package

    return launch


def _fake_forward(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: list[int],
    stride: int,
    padding: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rows, cols = (
        (side + 2 * padding - kernel) // stride + 1
        for side, kernel in zip(scores.shape[1:3], kernel_size, strict=True)
    )
    shape = (value.shape[0], rows, cols)
    stats = (2, *shape, *scores.shape[3:]) if impl == "triton" else (0,)
    return value.new_empty(*shape, value.shape[3]), scores.new_empty(stats)


def _fake_backward(
    grad: Tensor,
    stats: Any,
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Any,
    query_weight: Tensor | None,
    kernel_size: list[int],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = (kernel_size[0] * kernel_size[1], *scores.shape[3:])
    weight = table if query_weight is None else query_weight.shape
    shapes = scores.shape, table, weight
    of_scores, of_bias, of_weight = (scores.new_empty(shape) for shape in shapes)
    return of_scores, value.new_empty(value.shape), of_bias, of_weight


register_operator(f"qna_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
register_operator(
    f"qna_attention_backward(Tensor grad, Tensor? stats, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _window_flops(scores: torch.Size, value: torch.Size, kernel_size: list[int]) -> int:
    """Of one sum over a window, numerator and denominator, for every query."""
    return 2 * kernel_size[0] * kernel_size[1] * scores[3] * (value[3] + scores[4])


@register_flop_formula(torch.ops.qna_timm.qna_attention)
def _flops(scores: torch.Size, value: torch.Size, *rest: Any, out_shape: tuple, **_: Any) -> int:
    return _window_flops(scores, value, rest[2]) * out_shape[0][:3].numel()


@register_flop_formula(torch.ops.qna_timm.qna_attention_backward)
def _backward_flops(
    grad: torch.Size, stats: Any, scores: torch.Size, value: torch.Size, *rest: Any, **_: Any
) -> int:
    """Both sums anew, their transposes, and the gradients of their tables."""
    return 3 * _window_flops(scores, value, rest[2]) * grad[:3].numel()


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[4:]
    ctx.save_for_backward(output[1] if inputs[-1] == "triton" else None, *inputs[:4])


def _of_given(
    grads: tuple[Tensor, ...], rel_pos_bias: Tensor | None, query_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of scores, value and both tables, None for tables that were not given."""
    scores, value, bias, weight = grads
    bias = None if rel_pos_bias is None else bias
    return scores, value, bias, None if query_weight is None else weight


def _graph_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    grads = torch.ops.qna_timm.qna_attention_backward(grad, *kept, *ctx.settings)
    return *_of_given(grads, *kept[3:]), None, None, None, None


register_gradient("qna_attention", _graph_gradients, _setup_context)


def _with_list(args: tuple, place: int) -> tuple:
    """Both sides of the kernel as the operator has them, one list; functions take no lists."""
    return *args[:place], list(args[place : place + 2]), *args[place + 2 :]


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.qna_timm.qna_attention(*_with_list(args, 4))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return *_of_given(_Gradients.apply(grad, *kept, *ctx.settings), *kept[3:]), *[None] * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        attention = _stock_attention(*ctx.settings[:4])
        return _moved(attention, ctx.saved_tensors[-4:], tangents[:4]), None


class _Gradients(torch.autograd.Function):
    """Gradients as a function that has gradients itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.qna_timm.qna_attention_backward(*_with_list(args, 6))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.settings = inputs[6:]
        kept = inputs[0], *inputs[2:6]
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        with full_float32(kept[0].device):
            # not autograd.grad: of what torch.func.vjp has left, no graph leads back to inputs
            _, pull = torch.func.vjp(_stock_gradients(ctx.settings), *_full(kept, ctx.settings))
            grad_grad, *others = pull(tuple(grads))
        return grad_grad, None, *_of_given(tuple(others), *kept[3:]), *[None] * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        given = tangents[0], *tangents[2:6]
        inputs = _full(ctx.saved_tensors, ctx.settings)
        return _moved(_stock_gradients(ctx.settings), inputs, given)


def _stock_attention(
    kernel_h: int, kernel_w: int, stride: int, padding: int
) -> Callable[..., Tensor]:
    """The function of scores, value and both tables in stock operators."""

    def attention(scores: Tensor, value: Tensor, *tables: Tensor | None) -> Tensor:
        out = qna_offsets(scores, value, *tables, (kernel_h, kernel_w), stride, padding)
        return out.to(value.dtype)

    return attention


def _stock_gradients(settings: tuple) -> Callable[..., tuple[Tensor, ...]]:
    """Its gradients as a function of the output's gradient and of its inputs."""
    attention = _stock_attention(*settings[:4])

    def gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(attention, *inputs)[1](grad)

    return gradients


def _full(kept: tuple[Tensor | None, ...], settings: tuple) -> tuple[Tensor, ...]:
    """A gradient and inputs with neutral tables where none were given."""
    grad, scores, value, bias, weight = kept
    table = (settings[0] * settings[1], *scores.shape[3:])
    bias = scores.new_zeros(table) if bias is None else bias
    return grad, scores, value, bias, scores.new_ones(table) if weight is None else weight


def _moved(function: Callable[..., Any], inputs: tuple[Tensor | None, ...], tangents: tuple) -> Any:
    """Jacobian of a function times tangents, None of which are zero."""
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def of_moving(*moved: Tensor) -> Any:
        given = list(inputs)
        for i, x in zip(moving, moved, strict=True):
            given[i] = x
        return function(*given)

    primals, steps = (tuple(x[i] for i in moving) for x in (inputs, tangents))
    with full_float32(primals[0].device):
        return torch.func.jvp(of_moving, primals, steps)[1]


def qna_operator(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
    impl: str,
) -> Tensor:
    """The operator, in the way that suits the caller; arguments as in `forms.Problem`."""
    args = (scores, value, rel_pos_bias, query_weight, *kernel_size, stride, padding, impl)
    if calls_operator():
        return torch.ops.qna_timm.qna_attention(*_with_list(args, 4))[0]
    return _Attention.apply(*args)[0]
