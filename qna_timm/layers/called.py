"""Layers whose weight is used in place of calling them."""

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def must_be_called(
    module: nn.Module, plain: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
) -> bool:
    """Whether a layer is more than its parameters.

    Pruning, quantization, adapters, sharding of a single layer and tools that measure put something
    in a layer's place, hooks on it, or a tensor of a kind of its own for its weight, and expect
    that it is called.

    Args:
        module: The layer, or what is in its place.
        plain: Classes whose parameters alone say what they compute.
    """
    is_plain = type(module) in plain and "forward" not in module.__dict__
    if not is_plain or any(getattr(module, name) for name in _HOOKS):
        return True
    # not by its name: what a symbolic trace gives for that has any attribute
    weight = module._parameters.get("weight", module.__dict__.get("weight"))
    return hasattr(weight, "__tensor_flatten__")  # a wrapper: quantized or sharded
