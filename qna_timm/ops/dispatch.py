"""Which form of an operator computes a problem, and why not another: the ladder, with reasons."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# For each operator GPU kinds, as `torch.cuda.get_device_name` has them, on which its kernels were
# seen to be right and faster, with the record under benchmarks/results/. Elsewhere 'auto' does
# without them.
MEASURED_GPUS: dict[str, dict[str, str]] = {"qna_attention": {}, "span_attention": {}}


@dataclass(frozen=True)
class Choice:
    """The form that computes a problem, and the reasons against those before it on the ladder."""

    impl: str
    why_not: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(
            [f"impl='{self.impl}'", *(f"  not '{n}': {why}" for n, why in self.why_not.items())]
        )


def choose(
    impl: str, ladder: tuple[tuple[str, Callable[[bool], str | None]], ...], last: str
) -> Choice:
    """Walks down a ladder to the first form with nothing against it.

    Args:
        impl: 'auto', or one form: that one or an error, never another.
        ladder: Forms and what may be said against them; called with whether the form was asked for.
        last: The form that always serves.

    Raises:
        ValueError: there is something against the form that was asked for.
    """
    why_not = {}
    for name, against in ladder:
        if impl not in ("auto", name):
            continue
        if (reason := against(impl == name)) is None:
            return Choice(name, why_not)
        if impl == name:
            raise ValueError(f"impl='{name}' cannot compute this: {reason}")
        why_not[name] = reason
    return Choice(last if impl == "auto" else impl, why_not)


def against_triton(
    operator: str, value: Tensor, unsupported: Callable[[], str | None], asked_for: bool
) -> str | None:
    """What is to be said against a Triton kernel for a map on its device.

    Args:
        operator: Of `MEASURED_GPUS`.
        value: A map.
        unsupported: Of the kernel's own; imports it.
        asked_for: By name, so that an unknown GPU is the caller's affair.
    """
    if not asked_for:
        if not value.is_cuda:
            return f"the map is on {value.device.type}"
        measured = MEASURED_GPUS[operator]
        if not measured:
            return "measured on no GPU yet"
        kind = torch.cuda.get_device_name(value.device)
        if kind not in measured:
            return f"not measured on {kind} yet"
    try:
        return unsupported()
    except ImportError:
        return "triton is not installed"
