"""Local self-attention in PyTorch's registry: the forms whose gradients are written by hand.

An operator is what compilers, exporters and counters see; the function around it is what autograd
and `torch.func` see. Gradients of gradients come from the form of stock operators.

Letters: B batch, H W map, C = h*d channels, h heads, k kernel_size, K = k*k offsets.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from qna_timm.ops.float32 import full_float32
from qna_timm.ops.library import calls_operator, register_gradient, register_operator
from qna_timm.ops.span import native, tiles
from qna_timm.ops.span.offsets import check_span, span_offsets

# What the operator computes.
FORMS = ("auto", "native", "tiles")


def _form(impl: str, qkv: Tensor, *rest: Any) -> ModuleType:
    """Compiled functions or tiles: graphs may run elsewhere than they were recorded.

    Raises:
        ValueError: 'native' was asked for where it cannot serve, impl is unknown, or shapes do not
            go together.
    """
    if impl not in FORMS:
        raise ValueError(f"impl must be one of {FORMS}, got {impl!r}")
    check_span(qkv, *rest[:5])  # traces come here unchecked
    against = native.unsupported(qkv)
    if impl == "native" and against is not None:
        raise ValueError(f"impl='native' cannot compute this: {against}")
    return tiles if impl == "tiles" or against is not None else native


def _forward(qkv: Tensor, *args: Any) -> Tensor:
    *rest, impl = args
    return _form(impl, qkv, *rest).forward(qkv, *rest)


def _backward(grad: Tensor, qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, impl = args
    form = _form(impl, qkv, *rest)
    wanted = [*qkv.shape[:3], qkv.shape[3] // 3]
    if list(grad.shape) != wanted:
        raise ValueError(f"grad must be {wanted}, got {list(grad.shape)}")
    return form.backward(grad, qkv, *rest)


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from qna_timm.ops.span.triton import launch  # an optional package

    return launch.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from qna_timm.ops.span.triton import launch

    return launch.backward(*args)


def _fake(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


def _fake_triton(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    batch, height, width, _ = qkv.shape
    return _fake(qkv), rel_pos_h.new_empty(2, batch, num_heads, height, width)


def _fake_backward(
    grad: Tensor,
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    channels, kernel_size = rel_pos_h.shape
    return (
        qkv.new_empty(qkv.shape),  # contiguous, whatever was read
        rel_pos_h.new_empty(channels, 2 * kernel_size),
        rel_pos_h.new_empty(num_heads, kernel_size**2),
    )


def _flops(qkv_shape: torch.Size, rel_pos_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Scores and weighted values of a window at every position, whatever tiles add to it."""
    return 4 * (qkv_shape.numel() // 3) * rel_pos_shape[1] ** 2


def _backward_flops(
    _: torch.Size, qkv_shape: torch.Size, rel_pos_shape: torch.Size, *__: Any, **___: Any
) -> int:
    """Scores anew, then four products as large: of P, queries, keys and values."""
    return 10 * (qkv_shape.numel() // 3) * rel_pos_shape[1] ** 2


def _setup_context(ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[5:]
    kept: tuple[Tensor, ...] = ()
    if isinstance(output, tuple):  # the kernels' output and statistics
        kept = output
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], *kept)


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under checkpointing a second look is an error
    inputs, kept = saved[:5], saved[5:]
    if torch.is_grad_enabled():  # somebody wants gradients of the gradient
        found = _grad_of_offsets(grad, inputs, *ctx.settings[:3])
        return *found, *[None] * (1 + len(ctx.settings))
    backward = _span_triton_backward if kept else _span_attention_backward
    grad_qkv, grad_rel, grad_mask = backward(grad, *inputs, *ctx.settings, *kept)
    by_row, by_col = grad_rel.chunk(2, dim=1)
    grad_mask = None if inputs[3] is None else grad_mask
    return grad_qkv, by_row, by_col, grad_mask, *[None] * (1 + len(ctx.settings))


def _grad_of_offsets(
    grad: Tensor,
    inputs: tuple[Tensor | None, ...],
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> list[Tensor | None]:
    """Gradients of qkv, both tables and the mask that have gradients themselves."""
    given = [x for x in inputs[:4] if x is not None]

    def offsets(
        qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        rest = (rel_pos_h, rel_pos_w, mask, inputs[4], num_heads, mask_padding, scale)
        return span_offsets(qkv.to(rel_pos_h.dtype), *rest).to(qkv.dtype)

    with full_float32(grad.device):
        # not autograd.grad: of what torch.func.vjp has left, no graph leads back to saved inputs
        _, gradients = torch.func.vjp(offsets, *given)
        return [*gradients(grad), None][:4]


_ARGUMENTS = (
    "Tensor qkv, Tensor rel_pos_h, Tensor rel_pos_w, Tensor? mask, Tensor? floor, "
    "int num_heads, bool mask_padding, float scale"
)
_GRADIENTS = "(Tensor, Tensor, Tensor)"
_span_attention = register_operator(
    f"span_attention({_ARGUMENTS}, str impl) -> Tensor", _forward, _fake
)
_span_attention_backward = register_operator(
    f"span_attention_backward(Tensor grad, {_ARGUMENTS}, str impl) -> {_GRADIENTS}",
    _backward,
    _fake_backward,
)
_span_triton = register_operator(
    f"span_triton({_ARGUMENTS}) -> (Tensor, Tensor)", _triton_forward, _fake_triton
)
_span_triton_backward = register_operator(
    f"span_triton_backward(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor stats) -> {_GRADIENTS}",
    _triton_backward,
    _fake_backward,
)
register_gradient("span_attention", _gradients, _setup_context)
register_gradient("span_triton", _gradients, _setup_context)
for _operator in (_span_attention, _span_triton):
    register_flop_formula(_operator)(_flops)
for _operator in (_span_attention_backward, _span_triton_backward):
    register_flop_formula(_operator)(_backward_flops)


class _SpanAttention(torch.autograd.Function):
    """Both operators as one function with a gradient, which `torch.func` takes too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _span_attention(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)


class _SpanTriton(torch.autograd.Function):
    """The same for the kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _span_triton(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)


def span_operator(*args: Any) -> Tensor:
    """The function on any device.

    Arguments as in `span_offsets`, tables in the dtype to compute in, then 'native', 'tiles' or,
    for the first of them that serves, 'auto'. Keeps qkv for backward and nothing else. Gradients
    of gradients come from `span_offsets`.
    """
    if calls_operator():
        return _span_attention(*args)
    return _SpanAttention.apply(*args)


def span_triton(*args: Any) -> Tensor:
    """The function in fused kernels; arguments as in `span_offsets`, all but qkv float32.

    Keeps qkv, the output and two statistics of every query and head for backward.
    """
    return (_span_triton(*args) if calls_operator() else _SpanTriton.apply(*args))[0]
