"""Losses and gradients that are not finite: noticed before the update, told, undone.

`all_finite` is asked before every update; `BufferKeeper` takes back what the forward pass has
changed; `NonFinite` carries what each process has found, see `diagnosis` for how.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

NOT_FOUND = "not found"
"""Begins `Fault.first_bad` where there was nothing to be found."""

_MOST_SAMPLES_SHOWN = 2


def all_finite(parameters: Iterable[nn.Parameter], losses: Iterable[Tensor] = ()) -> Tensor:
    """Whether all gradients and losses are finite.

    On an accelerator nothing waits for the answer: gradients are read once, by the multi-tensor
    kernels of PyTorch. On the CPU a finite sum proves its addends finite, and is the fastest to
    get; only where it is not are they looked at one by one.

    Args:
        parameters: Their gradients count, dense or sparse; those without one are passed over.
        losses: Tensors of any shape.

    Returns:
        Boolean scalar on the device of the gradients, else of the losses.
    """
    gradients = [_values(p.grad) for p in parameters if p.grad is not None]
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in chain(gradients, (loss.detach() for loss in losses)):
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    answers = [_group_is_finite(tensors) for tensors in groups.values()]
    if not answers:
        return torch.tensor(True)
    return torch.stack([answer.to(answers[0].device) for answer in answers]).all()


def _values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient; a sparse one's are not summed where an index is there twice."""
    if gradient.layout == torch.strided:
        return gradient
    return gradient._values() if gradient.is_sparse else gradient.values()


def _group_is_finite(tensors: Sequence[Tensor]) -> Tensor:
    """`all_finite` of non-empty tensors of one device and type."""
    if tensors[0].device.type == "cpu":
        sums = torch.stack([tensor.sum() for tensor in tensors])
        # A sum may overflow, in float16 easily, although its addends do not.
        if sums.isfinite().all():
            return torch.tensor(True)
        return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    # The largest magnitude: NaN if there is one, infinite if there is an infinity, else finite.
    return torch.stack(torch._foreach_norm(list(tensors), float("inf"))).isfinite().all()


class BufferKeeper:
    """Copies of a model's buffers that training changes, to take an update's forward pass back.

    Kept are those that hold floating-point numbers, such as batch norm's running statistics, and
    counters; models without them cost nothing.

    Args:
        model: The model itself, not what is wrapped around it.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for buffer in model.buffers():
            if buffer.is_floating_point() or (buffer.ndim == 0 and buffer.dtype != torch.bool):
                kinds.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        # PyTorch copies a list in one kernel only where all is of one kind.
        self._kinds = [
            (buffers, [torch.empty_like(buffer) for buffer in buffers])
            for buffers in kinds.values()
        ]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers as they are now."""
        for buffers, copies in self._kinds:
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back to what they were at the last `keep`."""
        for buffers, copies in self._kinds:
            torch._foreach_copy_(buffers, copies)


def bad_loss(losses: Mapping[str, Tensor]) -> str | None:
    """The first loss that is not finite, ``loss is nan``, or None; looks at the device.

    Args:
        losses: Scalars by name; parts tell more than their sum, so that is looked at last.
    """
    for name, value in sorted(losses.items(), key=lambda item: item[0] == "loss"):
        if not bool(value.isfinite()):
            return f"{name} is {float(value)}"
    return None


@dataclass(frozen=True)
class Fault:
    """What one process has found in a micro-batch.

    Attributes:
        what: ``loss is nan``, ``loss_span is inf`` or ``gradients are not finite``.
        rank: Of the process.
        micro_batch: Number in the process's epoch, from 0.
        samples: Index and file (empty where there is none) of each image, in the batch's order.
        first_bad: The first bad tensor, from `diagnosis.diagnose`; empty where not looked for.
    """

    what: str
    rank: int = 0
    micro_batch: int = 0
    samples: Sequence[tuple[int, str]] = field(default_factory=tuple)
    first_bad: str = ""


def _tells_most(fault: Fault) -> tuple[bool, bool]:
    place = fault.first_bad
    return fault.what.startswith("loss"), bool(place) and not place.startswith(NOT_FOUND)


class NonFinite(Exception):
    """An update was not made, since a loss or gradient of it is not finite.

    Its text is one line, with epoch and update counted from 1 as the log does.

    Attributes:
        epoch: From 0.
        update: Of the epoch, from 0: so many are behind us.
        faults: Of the processes that have found something; at least one.
        world_size: Number of processes.
    """

    def __init__(
        self, epoch: int, update: int, faults: Sequence[Fault], world_size: int = 1
    ) -> None:
        self.epoch = epoch
        self.update = update
        self.faults = list(faults)
        self.world_size = world_size
        super().__init__(self._text())

    def _text(self) -> str:
        # Gradients are summed over the processes: all have the NaN, one knows where it comes from.
        first = max(self.faults, key=_tells_most)
        what = first.what
        if self.world_size > 1:
            what += f" on rank {first.rank}"
        if names := [f"{index} {path}".rstrip() for index, path in first.samples]:
            shown = ", ".join(names[:_MOST_SAMPLES_SHOWN])
            what += f" (samples {shown}{', ...' if names[_MOST_SAMPLES_SHOWN:] else ''})"
        if first.first_bad:
            what += f": first bad tensor {first.first_bad}"
        text = f"epoch {self.epoch + 1}, update {self.update + 1}: {what}"
        return f"{' '.join(text.split())}; weights are those before the update"

    def as_json(self) -> str:
        """A record of everything, one line of JSON; epoch and update counted from 0."""
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "update": self.update,
            "faults": [asdict(fault) for fault in self.faults],
        }
        return json.dumps(record)
