"""Where a NaN comes from: the same forward and backward pass again, looked at tensor by tensor."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from qna_timm.training.generators import generators_kept
from qna_timm.training.nonfinite import NOT_FOUND

NOT_SEEN_AGAIN = f"{NOT_FOUND}: all were finite when computed again"


class _Found(Exception):
    """The first bad tensor has been met; its text says which."""


def diagnose(
    task: TrainingTask, compute: Callable[[], Mapping[str, Any]], device: torch.device
) -> str:
    """The first tensor of a micro-batch's forward and backward pass that is not finite.

    Looked at are, in this order, the model's input, input and output of each of its modules as they
    run (of a scripted model none), the parts of the loss and the loss; then the gradients of its
    parameters in the order of the backward pass. The model runs as it is written, without
    compilation, and this process by itself: batch norm takes the statistics of its own images.

    Nothing is changed: weights, gradients, buffers, random numbers and the task stay as they are.

    Args:
        task: What trains. ``task.trainable_module`` is the bare model meanwhile.
        compute: Seeds the generators as for the micro-batch in question, and returns what ``task``
            does of it: ``loss`` and, if there are any, ``parts``.
        device: Where the run computes.

    Returns:
        For example ``blocks.0.attn output, nan at [3, 0, 5] of [8, 49, 64]``; where it is the
        fault of a weight, that too; why nothing was found where nothing was.
    """
    model = unwrap_model(task.get_trainable_module())
    with ExitStack() as stack:
        stack.enter_context(generators_kept(device))
        stack.enter_context(_bare(task, model))
        stack.enter_context(_kept(model))
        try:
            return _search(model, compute)
        except Exception as error:
            # To look for the fault takes memory and runs foreign code: the run's own message must
            # come through whatever happens here.
            reason = " ".join(str(error).split())[:200]
            return f"{NOT_FOUND}: {type(error).__name__}: {reason}".rstrip(": ")


def _search(model: nn.Module, compute: Callable[[], Mapping[str, Any]]) -> str:
    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                break  # takes no hooks
            before, after = _checks(name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        result = compute()
    except _Found as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
    for name, part in {**result.get("parts", {}), "loss": result["loss"]}.items():
        if place := _bad_place(part.detach()):
            return f"{name if name == 'loss' else f'loss_{name}'}, {place}"
    return _search_gradients(model, result["loss"])


def _search_gradients(model: nn.Module, loss: Tensor) -> str:
    """The first parameter in the order of the backward pass whose gradient is not finite."""
    found: list[str] = []

    def check(name: str, parameter: nn.Parameter) -> None:
        if not found and (place := _bad_place(parameter.grad)):
            found.append(f"gradient of {name}, {place}")
        parameter.grad = None  # a second set of gradients may not fit beside the first

    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: check(name, p))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else NOT_SEEN_AGAIN


def _checks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that look at a module's input and output; the input may be a function's result."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in _tensors((args, kwargs)):
            if place := _bad_place(tensor):
                raise _Found(f"{name} input, {place}".lstrip())

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for tensor in _tensors(output):
            if place := _bad_place(tensor):
                raise _Found(f"{name or 'model'} output, {place}{_bad_weight(module)}")

    return before, after


def _bad_weight(module: nn.Module) -> str:
    """Names a parameter or buffer of the module itself that is not finite, or nothing."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    for name, tensor in own:
        if place := _bad_place(tensor.detach()):
            return f" (its {name} is {place})"
    return ""


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors inside nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _bad_place(tensor: Tensor | None) -> str:
    """``nan at [3, 0, 5] of [8, 49, 64]`` for the first number that is not finite, else empty."""
    if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return ""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    bad = ~tensor.isfinite()
    if not bad.any():
        return ""
    # Of the flat tensor: argmax gives the first of equals in row-major order.
    first = int(bad.reshape(-1).to(torch.uint8).argmax())
    index, rest = [], first
    for size in reversed(tensor.shape):
        rest, place = divmod(rest, size)
        index.insert(0, place)
    value = tensor[tuple(index)].item()
    return f"{value} at {index} of {list(tensor.shape)}" if index else f"{value}"


@contextmanager
def _bare(task: TrainingTask, model: nn.Module) -> Iterator[None]:
    """The task with the bare model in it, which waits for no other process.

    Not even for what synchronised batch norm asks of the others; that its class is changed for the
    purpose reaches timm's subclasses too.
    """
    wrapped, synchronised = task.trainable_module, nn.SyncBatchNorm.forward
    task.trainable_module, nn.SyncBatchNorm.forward = model, _BatchNorm.forward
    try:
        yield
    finally:
        task.trainable_module, nn.SyncBatchNorm.forward = wrapped, synchronised


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Puts gradients and buffers back."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
