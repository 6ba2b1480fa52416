"""Compiled functions: right for every shape and instruction set, within their memory, optional."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ladders import guard_memory, needs_native, same_for_any_threads, untouched
from test_ops import error
from torch import Tensor

from qna_timm.ops import (
    explain_qna_attention,
    native,
    qna_attention,
    qna_attn,
    qna_native,
    span_native,
)

ROOT = Path(__file__).parent.parent
# H, W, queries, heads, head_dim, kernel, stride, padding: vectors, bands and groups of heads that
# are full, begun and more than one
SIZES = {
    "bands": (33, 35, 2, 3, 8, (3, 3), 1, 1),
    "many-heads": (6, 17, 2, 20, 8, (3, 3), 2, 1),
    "wide-heads": (9, 20, 2, 2, 16, (7, 7), 1, 3),
    "odd-heads": (19, 18, 1, 2, 5, (5, 5), 1, 2),
    "widest-heads": (4, 5, 2, 1, 64, (3, 3), 1, 1),
    "four-queries": (7, 9, 4, 2, 8, (3, 5), 3, 1),
    "large-window": (40, 18, 2, 2, 8, (15, 15), 1, 7),
    "stride-over-window": (19, 23, 2, 2, 8, (2, 2), 3, 0),
    "all-padding": (1, 1, 3, 1, 8, (7, 7), 1, 3),
    "a-row": (1, 200, 2, 2, 8, (1, 3), 1, 0),
}


def problem(size: str, spread: float = 1.0) -> tuple[list[Tensor], tuple]:
    height, width, queries, heads, dim, kernel, stride, padding = SIZES[size]
    gen = torch.Generator().manual_seed(0)
    table = (kernel[0] * kernel[1], queries, heads)
    shapes = (2, height, width, queries, heads), (2, height, width, heads * dim), table, table
    tensors = [torch.randn(shape, generator=gen) for shape in shapes]
    tensors[0] *= spread
    return tensors, (kernel, stride, padding)


def run(tensors: list[Tensor], args: tuple, impl: str = "native") -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = qna_attention(*leaves, *args, impl)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize("size", SIZES)
def test_all_sizes(size: str, spread: float, capability: str) -> None:
    tensors, args = problem(size, spread)
    found = run(tensors, args)
    wanted = run([t.double() for t in tensors], args, "offsets")
    assert error(found[0], wanted[0]) < 1e-5
    for f, w in zip(found[1:], wanted[1:], strict=True):
        assert (f.double() - w).norm() <= 1e-4 * w.norm() + 1e-7


@pytest.mark.parametrize("size", ["bands", "four-queries", "stride-over-window"])
def test_threads_change_nothing(size: str) -> None:
    needs_native()
    tensors, args = problem(size)
    assert same_for_any_threads(lambda: run(tensors, args))


@pytest.mark.parametrize("size", SIZES)
def test_stays_within_its_memory(
    size: str, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    """Nothing is read that was not written before, and nothing written beyond the end."""
    tensors, args = problem(size)
    wanted = run(tensors, args)
    handed = guard_memory(monkeypatch)
    for one, other in zip(run(tensors, args), wanted, strict=True):
        assert torch.equal(one, other)
    assert len(handed) == 2 and untouched(handed)


def test_what_it_does_not_compute() -> None:
    needs_native()
    tensors, args = problem("bands")
    with pytest.raises(ValueError, match=r"impl='native' .*: it computes in float32, .* float64"):
        qna_attention(*[t.double() for t in tensors], *args, "native")
    wide = torch.randn(1, 4, 4, 130)
    scores = torch.randn(1, 4, 4, 1, 2)
    with pytest.raises(ValueError, match="a head has 65 channels, more than 64"):
        qna_attention(scores, wide, None, None, (3, 3), 1, 1, "native")
    choice = explain_qna_attention(scores, wide, None, None, (3, 3), 1, 1)
    assert (choice.impl, choice.why_not["native"]) == (
        "depthwise",
        "a head has 65 channels, more than 64",
    )


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    """The build warns and succeeds, and leaves nothing to load."""
    command = [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path / "lib")]
    missing = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(
        [*command, "-t", str(tmp_path / "objects")],
        cwd=ROOT,
        env=os.environ | missing,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not [*tmp_path.rglob("*.so")]
    assert all(name in done.stdout + done.stderr for name in ("qna_avx2", "span_avx2"))


def test_compiled_where_there_is_a_compiler() -> None:
    """Or everything here would be skipped for an error in the sources."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("no g++ here")
    assert (qna_native.LIBRARY.why_not, span_native.LIBRARY.why_not) == (None, None)


def test_the_best_of_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.endswith("avx512") else find(name)
    )
    assert native.load_library("qna", qna_native.VERSION, {}).kind == "avx2"


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1.0, 1e24, 1e30])
@pytest.mark.parametrize("kind", ["ramp", "tower", "bias"])
def test_gradients_of_any_size_over_wide_ranges(kind: str, scale: float) -> None:
    needs_native()
    gen = torch.Generator().manual_seed(0)
    scores, value = torch.randn(1, 6, 64, 1, 1, generator=gen), torch.randn(1, 6, 64, 4)
    bias, weight = torch.zeros(9, 1, 1), torch.randn(9, 1, 1, generator=gen)
    if kind == "ramp":
        scores -= torch.linspace(0, 50, 64).view(64, 1, 1)
    elif kind == "tower":
        scores[0, 3, 30] += 34
    else:
        bias[0] += 34  # which windows at two borders do without
    tensors, args = [scores, value, bias, weight], ((3, 3), 1, 1)
    direction = torch.randn(1, 6, 64, 4, generator=gen)

    def grads(tensors: list[Tensor], direction: Tensor, impl: str) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(qna_attention(*leaves, *args, impl), leaves, direction)

    found = grads(tensors, direction * scale, "native")
    wanted = grads([t.double() for t in tensors], direction.double(), "offsets")
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() / scale - w).norm() <= 1e-3 * w.norm()


def test_a_batch_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of many images at once and of a few at a time."""
    needs_native()
    tensors, args = problem("bands")
    wanted = run(tensors, args)
    monkeypatch.setattr(qna_attn, "NATIVE_NUMBERS", 1)
    for found, other in zip(run(tensors, args), wanted, strict=True):
        torch.testing.assert_close(found, other)


def test_one_number_that_is_none(capability: str) -> None:
    """It spoils the windows that see it, forward and backward, and no other."""
    tensors, args = problem("bands")
    tensors[0][0, 20, 20, 0, 0] = float("nan")
    out, by_scores, by_value, *_ = run(tensors, args)
    assert out[0, 19:22, 19:22, :8].isnan().all()
    assert by_scores[0, 20, 20, 0, 0].isnan() and by_value[0, 20, 20, :8].isnan().all()
    for found, reach in ((out, 1), (by_scores.flatten(3), 2), (by_value, 2)):
        found[0, 20 - reach : 21 + reach, 20 - reach : 21 + reach] = 0
        assert found.isfinite().all()


def test_shapes_are_checked_where_memory_is_read() -> None:
    """Also for callers of the registered operator, as scripts are."""
    scores, value = torch.zeros(1, 8, 8, 1, 2), torch.zeros(1, 8, 8, 4)
    operator = torch.ops.qna_timm.qna_attention
    for args in (
        (scores, value[:, :4], None, None, [3, 3], 1, 1),
        (scores, value, torch.zeros(4, 1, 2), None, [3, 3], 1, 1),
        (scores, value, None, torch.zeros(2, 1, 2), [3, 3], 1, 1),
        (scores, value, None, None, [9, 9], 2, 0),
        (scores, value[..., :0], None, None, [3, 3], 1, 1),
        (scores[:, :0], value[:, :0], None, None, [3, 3], 1, 2),
    ):
        with pytest.raises(ValueError, match=r"must|does not fit"):
            operator(*args, "auto")
    with pytest.raises(ValueError, match="all tensors must be on the CPU"):
        native.address(torch.zeros(1, device="meta"))


def test_why_a_library_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "takes a C++ compiler" in native.load_library("nothing", 1, {}).why_not
    needs_native()
    assert "another version" in native.load_library("qna", 0, {}).why_not
    assert (
        "does not load"
        in native.load_library("qna", qna_native.VERSION, {"qna_sideways": ([], None)}).why_not
    )
    monkeypatch.setattr(qna_native, "LIBRARY", native.load_library("nothing", 1, {}))
    tensors, args = problem("bands")
    assert explain_qna_attention(*tensors, *args).impl == "depthwise"
