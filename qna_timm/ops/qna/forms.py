"""Learned-query attention as one operator: which form computes which images, forward and backward.

Letters: B batch, H W map, Y X output map, Q queries, h heads, C channels, K offsets.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qna_timm.ops.qna.depthwise import depthwise_sums
from qna_timm.ops.qna.exact import exact_backward, exact_forward
from qna_timm.ops.qna.fourier import FourierSums
from qna_timm.ops.qna.native import native_backward, native_forward, unsupported
from qna_timm.ops.qna.sums import Tables, WindowSums
from qna_timm.ops.qna.windows import Windows, check_problem

# Numbers (tokens x channels x queries) computed at a time: what a CPU's caches hold; enough to fill
# a GPU, where backward takes some 40 bytes for each, a sixteenth of the memory at most.
CPU_NUMBERS = 2**20
GPU_NUMBERS = 2**27
GPU_BYTES = 16 * 40
# The same for compiled functions, which see to caches themselves: some 50 MiB.
NATIVE_NUMBERS = 2**24
# Offsets of a window from which Fourier transforms take less time than convolutions: later in a
# forward pass alone where the processor has wide vectors.
FOURIER_OFFSETS = 169
FOURIER_OFFSETS_FORWARD = {"AVX512": 400}
# What the operator computes by hand.
FORMS = ("auto", "native", "depthwise", "fft", "exact")


class Problem:
    """A problem's forms, from the fastest to the one that always serves."""

    def __init__(
        self,
        scores: Tensor,
        value: Tensor,
        rel_pos_bias: Tensor | None,
        query_weight: Tensor | None,
        kernel_size: list[int],
        stride: int,
        padding: int,
        impl: str,
        backward: bool = False,
    ) -> None:
        """Arguments as in `qna_attention`, impl one of `FORMS`.

        Raises:
            ValueError: an unknown impl, shapes that do not go together, or 'native' where it cannot
                serve.
        """
        if impl not in FORMS:
            raise ValueError(f"impl must be one of {FORMS}, got {impl!r}")
        window = (tuple(kernel_size), stride, padding)
        check_problem(scores, value, rel_pos_bias, query_weight, *window)
        self.against_native = unsupported(scores, value)
        if impl == "native" and self.against_native is not None:
            raise ValueError(f"impl='native' cannot compute this: {self.against_native}")
        self.has_native = impl in ("auto", "native") and self.against_native is None
        self.scores, self.value, self.impl = scores, value, impl
        self.on_cpu, self.is_backward = value.device.type == "cpu", backward
        self.least_fourier = FOURIER_OFFSETS
        if self.on_cpu and not backward:
            kind = torch.backends.cpu.get_cpu_capability()
            self.least_fourier = FOURIER_OFFSETS_FORWARD.get(kind, FOURIER_OFFSETS)
        self.windows = Windows(*window)
        self.parameters = (rel_pos_bias, query_weight)
        self.size = tuple(scores.shape[1:3])
        self.out_size = self.windows.out_size(*self.size)
        self.table = (self.windows.num_offsets, *scores.shape[3:])
        self.forms: list[tuple[str, WindowSums]] = []
        if order := self._order():
            tables = Tables(*self.parameters, self.table, scores)
            settings = (self.size, self.windows, *scores.shape[3:], tables)
            self.forms = [(name, self._form(name)(*settings)) for name in order]

    def _form(self, name: str) -> type[WindowSums]:
        if name == "fft":
            return FourierSums
        pairs = self.table[1] * self.table[2]
        return depthwise_sums(self.windows, pairs, self.on_cpu, self.is_backward)

    def why_not(self, name: str) -> str | None:
        """Why a form is not the first that 'auto' tries."""
        if name == "native":
            return self.against_native
        if _is_recorded(self.scores):
            return "it looks at what came out, which a recorded CUDA graph cannot"
        if self.has_native:
            return "compiled functions are faster"
        if name == "depthwise":
            return None
        offsets = self.windows.num_offsets * self.out_size[0] * self.out_size[1]
        tokens = self.size[0] * self.size[1]
        if offsets < self.least_fourier * tokens:
            return f"{offsets / tokens:.3g} offsets a token are summed faster directly"
        return None

    def _order(self) -> list[str]:
        if self.impl == "auto":
            return [name for name in ("fft", "depthwise") if self.why_not(name) is None]
        return [] if self.impl in ("exact", "native") else [self.impl]

    @property
    def is_native(self) -> bool:
        """Whether compiled functions compute all images, at once."""
        return self.has_native and not self.forms

    def parts(self) -> Iterator[slice]:
        """Images to compute at a time."""
        batch, height, width, channels = self.value.shape
        tokens = max(height * width, self.windows.num_offsets)
        numbers = max(1, tokens * channels * self.scores.shape[3])
        step = max(1, self._most_numbers() // numbers)
        for start in range(0, batch, step):
            yield slice(start, min(start + step, batch))

    def _most_numbers(self) -> int:
        if self.is_native:
            return NATIVE_NUMBERS
        if self.on_cpu:
            return CPU_NUMBERS
        if not self.value.is_cuda:
            return GPU_NUMBERS
        memory = torch.cuda.get_device_properties(self.value.device).total_memory
        return min(GPU_NUMBERS, memory // GPU_BYTES)

    def split(self, images: slice) -> tuple[Tensor, Tensor]:
        """Scores and value of some images, of one dtype."""
        return self.scores[images], self.value[images].to(self.scores.dtype)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None:
        """See `Workspace.release`."""
        for _, form in self.forms:
            form.work.release()

    def raise_if_named(self) -> None:
        """What a form that cannot serve does: nothing where the next one may be tried.

        Raises:
            ValueError: it was asked for by name.
        """
        if self.impl != "auto":
            raise ValueError(
                f"impl='{self.impl}' is out of its range: scores or bias spread too far over a "
                "map, or each window has one token of all its weight; use impl='auto'"
            )

    def forward(self, images: slice) -> tuple[str, Tensor]:
        """The form that served and its output [n, Y, X, h, d]."""
        scores, value = self.split(images)
        for name, form in self.forms:
            if (out := form.forward(scores, value)) is not None:
                return name, out
            self.raise_if_named()
        if not self.has_native:
            return "exact", exact_forward(scores, value, *self.parameters, self.windows)
        out = native_forward(scores, value, *self.parameters, self.windows)
        return "native", out.unflatten(3, (scores.shape[4], -1))

    def backward(self, grad: Tensor, images: slice) -> tuple[Tensor, ...]:
        """Gradients of scores, value [n, H, W, h, d], bias and weight [K, Q, h]."""
        scores, value = self.split(images)
        grad = grad[images].to(scores.dtype)
        scale = _power_of_two(grad)
        grad = grad if scale == 1.0 else grad / scale
        grads = self._backward(grad, scores, value)
        return grads if scale == 1.0 else tuple(x * scale for x in grads)

    def _backward(self, grad: Tensor, scores: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        for _, form in self.forms:
            if (grads := form.backward(grad, scores, value)) is not None:
                return grads
            self.raise_if_named()
        if not self.has_native:
            return exact_backward(grad, scores, value, *self.parameters, self.windows)
        by_scores, by_value, *by_tables = native_backward(
            grad, scores, value, *self.parameters, self.windows
        )
        return by_scores, by_value.unflatten(3, (scores.shape[4], -1)), *by_tables


def _is_recorded(x: Tensor) -> bool:
    """Whether a CUDA graph is being made, in which nobody can look at numbers."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _power_of_two(grad: Tensor) -> float:
    """What gradients are divided by so that their squares are numbers: 1 for most."""
    if _is_recorded(grad):
        return 1.0
    top = max(map(abs, map(float, grad.aminmax()))) if grad.numel() else 0.0
    if top == 0.0 or not math.isfinite(top) or 1e-9 < top < 1e9:
        return 1.0
    return 2.0 ** min(max(math.frexp(top)[1], -100), 100)


def forward(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: list[int],
    stride: int,
    padding: int,
    impl: str,
) -> Tensor:
    """[B, Y, X, C] in value's dtype; arguments as in `Problem`."""
    problem = Problem(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding, impl)
    shape = (value.shape[0], *problem.out_size, value.shape[3])
    if problem.is_native:
        out = scores.new_empty(shape)
        for images in problem.parts():
            maps = scores[images], value[images]
            native_forward(*maps, *problem.parameters, problem.windows, out[images])
        return out.to(value.dtype)
    out = value.new_empty(shape)
    by_head = out.unflatten(3, (scores.shape[4], -1))
    with problem:
        for images in problem.parts():
            by_head[images] = problem.forward(images)[1]
    return out


def backward(
    grad: Tensor,
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: list[int],
    stride: int,
    padding: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scores, value, bias [K, Q, h], and weight in its shape."""
    problem = Problem(
        scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding, impl, True
    )
    parts = [*problem.parts()]
    if problem.is_native and len(parts) == 1:
        by_scores, by_value, by_bias, by_weight = problem.backward(grad, parts[0])
        if query_weight is not None:
            by_weight = by_weight.sum_to_size(query_weight.shape)
        return by_scores, by_value.flatten(3).to(value.dtype), by_bias, by_weight
    grad_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    grad_bias, grad_weight = scores.new_zeros(problem.table), scores.new_zeros(problem.table)
    by_head = grad_value.unflatten(3, (scores.shape[4], -1))
    with problem:
        for images in parts:
            grad_scores[images], by_head[images], bias, weight = problem.backward(grad, images)
            grad_bias += bias
            grad_weight += weight
    if query_weight is not None:
        grad_weight = grad_weight.sum_to_size(query_weight.shape)
    return grad_scores, grad_value, grad_bias, grad_weight
