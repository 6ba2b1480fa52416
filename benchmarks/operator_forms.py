"""Learned-query attention as an operator, without projections: our forms, and the paper's formula.

All compute the same function of the same numbers (tests/test_benchmarks.py), each from inputs in
the layout it likes. Letters: B batch, H W map, Q queries, h heads, d head_dim, C = h*d channels.
"""

from collections.abc import Callable
from functools import partial, reduce

import torch
import torch.nn.functional as F
from problem import Problem
from torch import Tensor

from qna_timm.ops import qna_attention

MODES = ("forward", "step")
IMPLS = ("auto", "offsets", "depthwise", "fft", "triton", "reference")
LAYOUTS = ("nchw", "channels-last")
FORMS = (
    *IMPLS,
    *(f"{kind}-{layout}" for kind in ("eager", "compiled") for layout in LAYOUTS),
    "conv",
)


def make_tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores [B, H, W, Q, h], value [B, H, W, C], bias and weight [K, Q, h] in float32, and the
    gradient that comes from above [B, H, W, C]."""
    p = problem
    generator = torch.Generator(p.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=p.device)
    scores = p.score_std * draw(p.batch, p.size, p.size, p.queries, p.heads)
    value = draw(p.batch, p.size, p.size, p.channels).to(p.dtype)
    bias = p.bias_std * draw(p.window**2, p.queries, p.heads)
    weight = draw(p.window**2, p.queries, p.heads)
    return scores, value, bias, weight, draw(value.shape).to(p.dtype)


def paper_formula(
    scores: Tensor, value: Tensor, rel_pos_bias: Tensor, query_weight: Tensor
) -> Tensor:
    """Two depthwise convolutions over exponentials, their quotient summed over the queries.

        out = sum_q conv(e * value, exp(bias) * weight) / conv(e, exp(bias)),  e = exp(scores)

    Nothing is subtracted from the scores. ("Learned Queries for Efficient Local Attention",
    CVPR 2022, section 4.)

    Args:
        scores: [B, Q*h, H, W], contiguous or channels-last.
        value: [B, C, H, W], likewise.
        rel_pos_bias: [Q, h, 1, k, k].
        query_weight: [Q, h, 1, k, k].

    Returns:
        [B, C, H, W].
    """
    num_queries, num_heads, _, window, _ = rel_pos_bias.shape
    head_dim = value.shape[1] // num_heads
    attn = scores.exp()
    kernel = rel_pos_bias.exp()
    # B, Q, h, d, H, W -> B, Q*C, H, W
    weighted = attn.unflatten(1, (num_queries, num_heads, 1)) * value.unflatten(
        1, (1, num_heads, head_dim)
    )
    weighted = weighted.flatten(1, 3)
    num_kernel = (kernel * query_weight).expand(-1, -1, head_dim, -1, -1).flatten(0, 2)[:, None]
    den_kernel = kernel.flatten(0, 2)[:, None]
    num, den = (
        F.conv2d(x, weight.to(x.dtype), None, 1, window // 2, groups=x.shape[1])
        for x, weight in ((weighted, num_kernel), (attn, den_kernel))
    )
    num = num.unflatten(1, (num_queries, num_heads, head_dim))
    den = den.unflatten(1, (num_queries, num_heads, 1))
    # not Tensor.sum, which would give up the channels-last layout
    return reduce(torch.add, (num / den).unbind(1)).flatten(1, 2)


def _nchw(x: Tensor, layout: str) -> Tensor:
    """[B, H, W, ...] -> [B, channels, H, W] in a layout, a tensor of its own."""
    x = x.flatten(3).permute(0, 3, 1, 2)
    if layout == "nchw":
        return x.contiguous()
    return x.clone(memory_format=torch.channels_last)


def _ours(problem: Problem, impl: str, tensors: tuple[Tensor, ...]) -> tuple:
    """qna_attention: channels-last, scores in float32 as our layers compute them."""
    window = problem.window

    def form(scores: Tensor, value: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        kernel_size = (window, window)
        return qna_attention(scores, value, bias, weight, kernel_size, 1, window // 2, impl)

    return form, tensors[:4], tensors[4]


def _paper(problem: Problem, name: str, tensors: tuple[Tensor, ...]) -> tuple:
    """The formula, scores in value's type as the released code computes them."""
    kind, layout = name.split("-", 1)
    window, dtype = problem.window, problem.dtype
    scores, value, grad = (_nchw(tensors[i].to(dtype), layout) for i in (0, 1, 4))
    # K, Q, h -> Q, h, 1, k, k
    bias, weight = (
        t.permute(1, 2, 0).contiguous().unflatten(2, (1, window, window)) for t in tensors[2:4]
    )
    form = paper_formula
    if kind == "compiled":
        form = torch.compile(paper_formula, fullgraph=True, dynamic=False)
    return form, (scores, value, bias, weight), grad


def _conv(problem: Problem, tensors: tuple[Tensor, ...]) -> tuple:
    """One depthwise convolution of value: not attention, the yardstick of the paper's claim."""
    window, channels = problem.window, problem.channels
    value, grad = (_nchw(tensors[i], "channels-last") for i in (1, 4))
    weight = torch.randn(channels, 1, window, window, device=problem.device, dtype=problem.dtype)

    def form(x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(x, kernel, None, 1, window // 2, groups=channels)

    return form, (value, weight), grad


def make_form(problem: Problem, name: str) -> tuple[Callable[..., Tensor], tuple, Tensor]:
    """A form, its inputs and the gradient of its output, by name."""
    tensors = make_tensors(problem)
    if name in IMPLS:
        return _ours(problem, name, tensors)
    if name == "conv":
        return _conv(problem, tensors)
    return _paper(problem, name, tensors)


def make_call(problem: Problem, name: str, mode: str) -> Callable[[], object]:
    """The call to measure: a forward pass without gradients, or one with all gradients.

    Args:
        problem: Sizes.
        name: One of `FORMS`.
        mode: "forward" or "step".
    """
    form, inputs, grad = make_form(problem, name)
    if mode == "forward":
        call = torch.no_grad()(lambda: form(*inputs))
    else:
        for x in inputs:
            x.requires_grad_()

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(form(*inputs), inputs, grad)

    if name.startswith("compiled"):
        call()  # compiles now, not in the time that is measured
    return call
