"""Learned-query attention as a PyTorch operator: ways to call, differentiate and record it."""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from ladders import SWITCHED_OFF, without_native
from test_ops import SIZES, TABLES, error, gradients, make_inputs, to
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from qna_timm.layers import LearnedQueryAttention
from qna_timm.ops import explain_qna_attention, qna_attention
from qna_timm.ops.dispatch import MEASURED_GPUS

OPERATOR = torch.ops.qna_timm.qna_attention.default


def single(size: str = "odd-map", grad: bool = False, **kwargs) -> tuple[list[Tensor], tuple]:
    tensors, args = make_inputs(size, **kwargs)
    tensors = to(tensors, torch.float32)
    if grad:
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
    return tensors, args


@pytest.mark.parametrize("impl", ["auto", "exact"])
@pytest.mark.parametrize("size", ["odd-map", "stride-2"])
def test_opcheck(size: str, impl: str) -> None:
    """PyTorch's own checks of an operator: schema, fake results, autograd registration."""
    tensors, (kernel, stride, padding) = single(size, grad=True)
    torch.library.opcheck(OPERATOR, (*tensors, list(kernel), stride, padding, impl))


@pytest.mark.parametrize(
    ("impl", "tables"),
    [
        *(("auto", tables) for tables in TABLES),
        ("exact", "both"),
        *(pytest.param("exact", tables, marks=pytest.mark.thorough) for tables in TABLES[1:]),
    ],
)
def test_gradcheck(impl: str, tables: str) -> None:
    """Hand-written gradients, and gradients of gradients, against differences in float64."""
    tensors, args = make_inputs("small-map", tables, batch=1)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def attention(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return qna_attention(*[None if t is None else next(given) for t in tensors], *args, impl)

    assert torch.autograd.gradcheck(attention, leaves)
    assert torch.autograd.gradgradcheck(attention, leaves)


def simplified(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
    """All that the default compiler does to graphs, without the code that it makes of them."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx  # a second to import

    return compile_fx(
        graph, inputs, inner_compile=lambda graph, *_, **__: make_boxed_func(graph.forward)
    )


@pytest.mark.parametrize(
    "backend", [simplified, pytest.param("inductor", marks=pytest.mark.thorough)]
)
def test_compiled_with_recomputed_activations(backend: str | Callable) -> None:
    """What a compiler simplifies in a part that is computed again, it may lose."""
    layer, before = LearnedQueryAttention(8, 2, kernel_size=3), torch.nn.Linear(8, 8)
    x = torch.randn(2, 5, 6, 8)

    def step(x: Tensor) -> Tensor:
        return checkpoint(layer, before(x), use_reentrant=False).square().sum()

    parameters = [*layer.parameters(), *before.parameters()]
    wanted = torch.autograd.grad(step(x), parameters)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = torch.autograd.grad(compiled(x), parameters)
    for grad, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-5)


def test_compiled_and_exported_graphs_hold_the_operator() -> None:
    tensors, args = single("stride-2")
    wanted = gradients(tensors, args, "auto")
    compiled = torch.compile(
        lambda *t: qna_attention(*t, *args), fullgraph=True, backend="aot_eager"
    )
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = compiled(*leaves)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out.double() * direction).sum().backward()
    for leaf, grad in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, grad)

    layer = LearnedQueryAttention(8, 2, kernel_size=3)
    x = torch.randn(2, 5, 6, 8)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    assert any(node.target is OPERATOR for node in program.graph.nodes)
    larger = torch.randn(5, 5, 6, 8)
    torch.testing.assert_close(program.module()(larger), layer(larger))


def test_script_holds_the_operator() -> None:
    """With gradients; a layer for exporters holds stock operators alone."""
    from timm.layers import set_fused_attn

    x = torch.randn(2, 5, 6, 8)
    layer = LearnedQueryAttention(8, 2, kernel_size=3)
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x), layer(x))
    assert "qna_timm::qna_attention" in str(scripted.inlined_graph)
    found = torch.autograd.grad(scripted(x).square().sum(), list(scripted.parameters()))
    wanted = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, wanted)

    set_fused_attn(False)
    try:
        plain = LearnedQueryAttention(8, 2, kernel_size=3)
    finally:
        set_fused_attn(True)
    plain.load_state_dict(layer.state_dict())
    scripted = torch.jit.script(plain)
    torch.testing.assert_close(scripted(x), layer(x))
    exported = torch.export.export(plain, (x,))
    for graph in (str(scripted.inlined_graph), str(exported.graph)):
        assert "qna_timm::" not in graph and "qna_timm.qna" not in graph


def test_scripts_have_no_reference() -> None:
    scripted = torch.jit.script(LearnedQueryAttention(8, 2, impl="reference"))
    with pytest.raises(torch.jit.Error, match="impl='reference' is not for scripts"):
        scripted(torch.randn(2, 5, 6, 8))


def test_functional_gradients() -> None:
    """torch.func: gradient, gradients of every sample, and of a gradient."""
    tensors, args = single()

    def loss(scores: Tensor, value: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return qna_attention(scores, value, bias, weight, *args).square().sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*tensors)
    torch.testing.assert_close(found, wanted)

    def of_sample(bias: Tensor, scores: Tensor, value: Tensor) -> Tensor:
        return loss(scores[None], value[None], bias, tensors[3])

    per_sample = torch.func.vmap(torch.func.grad(of_sample), (None, 0, 0))(
        tensors[2], tensors[0], tensors[1]
    )
    torch.testing.assert_close(per_sample.sum(0), wanted[2], rtol=1e-4, atol=1e-4)

    def slope(value: Tensor) -> Tensor:
        return torch.func.grad(loss, argnums=1)(tensors[0], value, *tensors[2:]).sum()

    second = torch.func.grad(slope)(tensors[1])
    leaf = tensors[1].clone().requires_grad_()
    (first,) = torch.autograd.grad(
        qna_attention(tensors[0], leaf, *tensors[2:], *args, "offsets").square().sum(),
        leaf,
        create_graph=True,
    )
    torch.testing.assert_close(second, torch.autograd.grad(first.sum(), leaf)[0])


def test_gradient_checkpointing() -> None:
    tensors, args = single()
    wanted = gradients(tensors, args, "auto")
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = checkpoint(lambda *t: qna_attention(*t, *args), *leaves, use_reentrant=False)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out.double() * direction).sum().backward()
    for leaf, grad in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.usefixtures("ladder")
def test_half_precision_gradients() -> None:
    """bfloat16 values: gradients no worse than from rounding what goes in and what comes out."""
    tensors, args = make_inputs("odd-map")
    wanted = gradients(tensors, args, "reference")
    value = tensors[1].to(torch.bfloat16)
    found = gradients([tensors[0].float(), value, *to(tensors[2:], torch.float32)], args, "auto")
    # the direction is float64 and a gradient of a bfloat16 output is rounded on its way
    rounded = gradients([tensors[0], value.double(), *tensors[2:]], args, "reference")
    assert found[1].dtype == torch.bfloat16
    for f, r, w in zip(found, rounded, wanted, strict=True):
        low = r.to(torch.bfloat16).double()
        assert (f.double() - w).norm() <= 2 * (low - w).norm() + 2e-3 * w.norm()


def test_keeps_its_arguments_and_nothing_else() -> None:
    kept = []
    tensors, args = single("odd-map", grad=True)

    def keep(x: Tensor) -> Tensor:
        kept.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        qna_attention(*tensors, *args)
    assert set(kept) == {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("impl", ["auto", "depthwise"])
def test_operations_are_counted(impl: str) -> None:
    """Two sums a window: 2 K Q (C + h) operations for each output position."""
    tensors, args = single("stride-2", grad=True)
    _, _, queries, heads, dim, kernel, _, _ = SIZES["stride-2"]
    with FlopCounterMode(display=False) as counter:
        out = qna_attention(*tensors, *args, impl)
    forward = 2 * kernel**2 * queries * heads * (dim + 1) * out.shape[:3].numel()
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_one_image_beyond_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone goes the exact way; all are right, and the explanation says so."""
    without_native(monkeypatch)
    gen = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 40, 40, 2, 8, generator=gen)
    value = torch.randn(3, 40, 40, 512, generator=gen)  # so many that images are taken singly
    scores[1] *= 1e3
    args = (None, None, (3, 3), 1, 1)
    found = qna_attention(scores, value, *args)
    wanted = qna_attention(scores.double(), value.double(), *args, "offsets")
    assert error(found, wanted) < 1e-5
    choice = explain_qna_attention(scores, value, *args)
    assert choice.impl == "exact"
    assert choice.why_not["depthwise"] == "1 of 3 images are out of its range"
    assert "summed faster directly" in choice.why_not["fft"]
    assert choice.why_not["native"] == SWITCHED_OFF


@pytest.mark.parametrize("kernel, impl", [(3, "depthwise"), (7, "depthwise"), (33, "fft")])
def test_choice_by_window(kernel: int, impl: str, ladder: str) -> None:
    impl = "native" if ladder == "native" else impl
    scores, value = torch.randn(1, 32, 32, 2, 2) * 0.3, torch.randn(1, 32, 32, 8)
    choice = explain_qna_attention(scores, value, None, None, (kernel, kernel), 1, kernel // 2)
    assert choice.impl == impl
    assert choice.why_not["triton"] == "the map is on cpu"
    assert str(choice).startswith(f"impl='{impl}'\n  not 'triton': the map is on cpu")


def test_forms_asked_for_by_name_never_fall_back() -> None:
    tensors, args = single(spread=1e3)
    for impl in ("depthwise", "fft"):
        with pytest.raises(ValueError, match=f"impl='{impl}' is out of its range"):
            qna_attention(*tensors, *args, impl)
    with pytest.raises(ValueError, match=r"impl='triton' cannot compute this: \w"):
        qna_attention(*[t.double() for t in tensors], *args, "triton")


def test_kernels_are_chosen_on_measured_gpus_only() -> None:
    """Each with the record of the run, which names it."""
    from pathlib import Path

    for measured in MEASURED_GPUS.values():
        for kind, record in measured.items():
            assert kind in (Path(__file__).parent.parent / record).read_text()


@pytest.mark.usefixtures("ladder")
def test_empty_batch_and_repeated_sizes() -> None:
    """Buffers outlive calls: other sizes, strides and dtypes in between leave no trace."""
    out = qna_attention(torch.zeros(0, 4, 4, 1, 2), torch.zeros(0, 4, 4, 6), None, None, (3, 3))
    assert out.shape == (0, 2, 2, 6)
    first = {}
    for turn in range(2):
        for size in ("odd-map", "stride-2", "whole-map", "even-kernel", "odd-map"):
            for dtype in (torch.float32, torch.float64):
                tensors, args = make_inputs(size, spread=0.1)
                found = gradients(to(tensors, dtype), args, "auto")
                for one, other in zip(found, first.setdefault((size, dtype), found), strict=True):
                    assert torch.equal(one, other), (turn, size)


@pytest.mark.usefixtures("ladder")
def test_threads_do_not_share_buffers() -> None:
    problems = [make_inputs(size, spread=0.1) for size in ("odd-map", "stride-2") * 2]
    wanted = [gradients(*problem, "auto") for problem in problems]
    found: list = [None] * len(problems)

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = gradients(*problems[i], "auto")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_forward_mode() -> None:
    """Jacobian-vector products and Hessians, also where gradients are off."""
    tensors, args = make_inputs("small-map")

    def attention(scores: Tensor, value: Tensor, bias: Tensor, impl: str = "auto") -> Tensor:
        return qna_attention(scores, value, bias, tensors[3], *args, impl)

    given, tangents = tuple(tensors[:3]), tuple(torch.cos(t) for t in tensors[:3])
    stock = partial(attention, impl="offsets")
    wanted = torch.func.jvp(stock, given, tangents)[1]
    torch.testing.assert_close(torch.func.jvp(attention, given, tangents)[1], wanted)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(attention, given, tangents)[1], wanted)
        torch.testing.assert_close(
            torch.func.jacfwd(attention)(*given), torch.func.jacrev(stock)(*given)
        )

    def loss(value: Tensor, impl: str) -> Tensor:
        return attention(given[0], value, given[2], impl).square().sum()

    hessians = [
        torch.func.hessian(partial(loss, impl=impl))(given[1]) for impl in ("auto", "offsets")
    ]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("kernel", [pytest.param(3, marks=pytest.mark.thorough), 5])
def test_compiled_transforms(kernel: int) -> None:
    """Tangents and gradients inside and around compiled functions, also of one compiled before."""
    gen = torch.Generator().manual_seed(0)
    scores, tangent = torch.randn(2, 2, 5, 6, 2, 2, generator=gen)
    value = torch.randn(2, 5, 6, 8, generator=gen)

    def loss(scores: Tensor) -> Tensor:
        out = qna_attention(scores, value, None, None, (kernel, kernel), 1, kernel // 2)
        return out.square().sum()

    def slope(scores: Tensor, loss: Callable[[Tensor], Tensor] = loss) -> Tensor:
        return torch.func.jvp(loss, (scores,), (tangent,))[1]

    compiled = partial(torch.compile, backend="aot_eager")
    wanted = slope(scores)
    assert wanted.abs() > 0.1
    torch.testing.assert_close(compiled(slope)(scores), wanted)
    plain = compiled(loss)
    torch.testing.assert_close(plain(scores), loss(scores))
    torch.testing.assert_close(slope(scores, plain), wanted)
    gradient = torch.func.grad(loss)
    torch.testing.assert_close(compiled(gradient)(scores), gradient(scores))


@pytest.mark.usefixtures("ladder")
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e24, 1e30])
def test_gradients_of_any_size(scale: float) -> None:
    """They are linear in what comes in, whatever squares of float32 numbers hold."""
    tensors, args = single(spread=0.5)
    direction = torch.randn(2, 5, 7, 12)

    def grads(direction: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(qna_attention(*leaves, *args), leaves, direction)

    for found, wanted in zip(grads(direction * scale), grads(direction), strict=True):
        assert (found.double() / scale - wanted).norm() <= 1e-4 * wanted.norm()


def test_backward_is_an_operator_too() -> None:
    tensors, (kernel, stride, padding) = single()
    grad = torch.randn(2, 5, 7, 12)
    backward = torch.ops.qna_timm.qna_attention_backward.default
    torch.library.opcheck(backward, (grad, None, *tensors, list(kernel), stride, padding, "auto"))


def test_vmap_of_nothing() -> None:
    tensors, args = single()
    none = torch.zeros(0, *tensors[0].shape)
    out = torch.func.vmap(lambda s: qna_attention(s, *tensors[1:], *args))(none)
    assert out.shape == (0, 2, 5, 7, 12)


def test_half_precision_scores_are_explained_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    scores, value = torch.randn(1, 32, 32, 2, 2).bfloat16() * 0.3, torch.randn(1, 32, 32, 8)
    assert explain_qna_attention(scores, value, None, None, (33, 33), 1, 16).impl == "fft"
