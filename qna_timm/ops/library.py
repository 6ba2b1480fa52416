"""How this package's operators enter PyTorch's registry, for graphs that hold them whole."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qna_timm.ops.float32 import full_float32

_library = torch.library.Library("qna_timm", "FRAGMENT")


# Our operators look at values, which recorded CUDA graphs cannot; older PyTorch has no such tag.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def in_full_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function without autocast and TF32, also in the operators that it calls."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> Any:
        with full_float32(first.device):
            return function(first, *args)

    return call


def register_operator(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverloadPacket:
    """Adds an operator of any device to `torch.ops.qna_timm`.

    Args:
        schema: Name, arguments and results as PyTorch writes them.
        function: What it computes; arguments come by position; gradients, autocast and TF32
            are off.
        fake: Shapes and dtypes of the results, of arguments without values.
    """
    _library.define(schema, tags=_TAGS)
    name = schema.partition("(")[0]
    _library.impl(name, in_full_float32(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qna_timm::{name}", fake, lib=_library)
    operator = getattr(torch.ops.qna_timm, name)
    rule = functools.partial(_vmap_in_turn, operator)
    torch.library.register_vmap(f"qna_timm::{name}", rule, lib=_library)
    return operator


def _vmap_in_turn(
    operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Any, Any]:
    """vmap: a call for each entry, results stacked, so that each has gradients of tables too."""
    if info.batch_size == 0:
        return _vmap_of_none(operator, in_dims, args)
    columns = [
        x.unbind(dim) if isinstance(dim, int) else [x] * info.batch_size
        for x, dim in zip(args, in_dims, strict=True)
    ]
    found = [operator(*row) for row in zip(*columns, strict=True)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


def _vmap_of_none(
    operator: Callable[..., Any], in_dims: tuple[int | None, ...], args: tuple
) -> tuple[Any, Any]:
    """Results of no call, in the shape that those of a call have."""
    row = [
        x.new_zeros(x.movedim(dim, 0).shape[1:]) if isinstance(dim, int) else x
        for x, dim in zip(args, in_dims, strict=True)
    ]
    found = operator(*row)
    if isinstance(found, Tensor):
        return found.new_empty(0, *found.shape), 0
    return tuple(x.new_empty(0, *x.shape) for x in found), (0,) * len(found)


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Gradients of a registered operator where it is a node of a graph, compiled or exported."""
    torch.library.register_autograd(
        f"qna_timm::{name}", backward, setup_context=setup_context, lib=_library
    )


def has_tangents() -> bool:
    """Whether forward-mode derivatives may be taken."""
    return forward_ad._current_level >= 0


def calls_operator() -> bool:
    """Whether to call a registered operator itself and not the autograd function around it.

    Recorded graphs hold operators (a function of Python's cannot be saved, and some compilers fail
    on one where gradients are off); and where no derivative is taken nobody needs more.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    # forward-mode and `torch.func` take derivatives though gradients are off
    is_transformed = torch._C._are_functorch_transforms_active() or has_tangents()
    return not (torch.is_grad_enabled() or is_transformed)
