"""Compiled functions: right for every shape and instruction set, within their memory, optional."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import guard_memory, needs_native, same_for_any_threads, untouched
from test_ops import error
from torch import Tensor

from qna_timm.ops import (
    explain_qna_attention,
    native,
    qna_attention,
)
from qna_timm.ops.qna import forms
from qna_timm.ops.qna import native as qna_native
from qna_timm.ops.qna.windows import Windows
from qna_timm.ops.span import native as span_native

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
# the same, of windows so wide that sums by Fourier transforms are exact enough for random numbers
WIDE_SIZES = {
    "one-tile": (20, 18, 2, 3, 8, (15, 15), 1, 7),
    "tiles": (150, 40, 1, 2, 8, (9, 9), 1, 4),
    "tiles-of-both-sides": (137, 141, 1, 1, 4, (11, 11), 1, 5),
    "wide-heads-in-two-vectors": (18, 20, 2, 2, 24, (9, 9), 1, 4),
    "narrow-heads": (33, 21, 3, 7, 3, (11, 9), 1, 4),
    "single-channels": (24, 24, 1, 5, 1, (13, 13), 1, 6),
    "stride": (41, 39, 4, 2, 8, (15, 13), 2, 6),
    "no-padding": (40, 33, 2, 2, 6, (13, 13), 1, 0),
    "window-over-map": (9, 8, 2, 2, 16, (17, 17), 1, 8),
    "unseen-tokens": (42, 44, 2, 2, 8, (15, 15), 2, 0),
}
SIZES_AND_WAYS = [(size, qna_native.NEVER) for size in SIZES] + [
    (size, qna_native.ALWAYS) for size in [*SIZES, *WIDE_SIZES]
]


def problem(size: str, spread: float = 1.0) -> tuple[list[Tensor], tuple]:
    height, width, queries, heads, dim, kernel, stride, padding = (SIZES | WIDE_SIZES)[size]
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


@pytest.fixture
def computed_directly(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many heads of images the last calls did not compute by transforms, by function."""
    needs_native()
    counts = {}

    def counted(name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            counts[name.removeprefix("qna_")] = functions[name](*args)
            return counts[name.removeprefix("qna_")]

        return call

    functions = qna_native.LIBRARY.functions
    names = ("qna_forward", "qna_backward")
    library = replace(
        qna_native.LIBRARY, functions={**functions, **{name: counted(name) for name in names}}
    )
    monkeypatch.setattr(qna_native, "LIBRARY", library)
    return counts


@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize("size, way", SIZES_AND_WAYS)
def test_all_sizes(
    size: str, way: int, spread: float, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setattr(qna_native, "TRANSFORMS", way)
    tensors, args = problem(size, spread)
    found = run(tensors, args)
    # double precision is not for compiled functions
    wanted = run([t.double() for t in tensors], args, "offsets" if size in SIZES else "auto")
    assert error(found[0], wanted[0]) < 1e-5
    for f, w in zip(found[1:], wanted[1:], strict=True):
        assert (f.double() - w).norm() <= 1e-4 * w.norm() + 1e-7


@pytest.mark.parametrize("size", WIDE_SIZES)
def test_wide_windows_are_summed_by_transforms(
    size: str, monkeypatch: pytest.MonkeyPatch, computed_directly: dict[str, int]
) -> None:
    monkeypatch.setattr(qna_native, "TRANSFORMS", qna_native.ALWAYS)
    tensors, args = problem(size, 0.5)
    run(tensors, args)
    assert computed_directly == {"forward": 0, "backward": 0}


@pytest.mark.parametrize(
    "kernel, stride, heads_left", [(3, 1, (8, 8)), (5, 1, (8, 8)), (15, 1, (0, 0)), (15, 2, (0, 0))]
)
def test_transforms_where_they_are_faster(
    kernel: int, stride: int, heads_left: tuple[int, int], computed_directly: dict[str, int]
) -> None:
    """Here and there the two ways take very different time."""
    tensors = torch.randn(1, 56, 56, 2, 8), torch.randn(1, 56, 56, 64)
    tables = [torch.randn(kernel**2, 2, 8) * 0.2 for _ in range(2)]
    run([*tensors, *tables], ((kernel, kernel), stride, kernel // 2))
    assert computed_directly == dict(zip(("forward", "backward"), heads_left, strict=True))


@pytest.mark.parametrize("tables", ["no-bias", "no-weight", "one-row", "none"])
def test_tables_by_transforms(
    tables: str, monkeypatch: pytest.MonkeyPatch, computed_directly: dict[str, int]
) -> None:
    monkeypatch.setattr(qna_native, "TRANSFORMS", qna_native.ALWAYS)
    (scores, value, bias, weight), args = problem("one-tile", 0.5)
    bias = bias if tables in ("no-weight", "one-row") else None
    weight = {"no-bias": weight, "one-row": weight[:1]}.get(tables)
    given = [x for x in (scores, value, bias, weight) if x is not None]

    def results(kind: torch.dtype, impl: str) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in given]
        rest = iter(leaves[2:])
        own = [None if x is None else next(rest) for x in (bias, weight)]
        out = qna_attention(*leaves[:2], *own, *args, impl)
        direction = torch.linspace(-1, 1, out.numel(), dtype=kind).view_as(out)
        return [out.detach(), *torch.autograd.grad(out, leaves, direction)]

    found, wanted = results(torch.float32, "native"), results(torch.float64, "auto")
    assert error(found[0], wanted[0]) < 1e-5
    for f, w in zip(found[1:], wanted[1:], strict=True):
        assert (f.double() - w).norm() <= 1e-4 * w.norm()
    assert computed_directly == {"forward": 0, "backward": 0}


def test_queries_that_cancel_by_transforms(
    monkeypatch: pytest.MonkeyPatch, computed_directly: dict[str, int]
) -> None:
    """What is left of two sums is small beside errors of both: nothing wrong is kept."""
    monkeypatch.setattr(qna_native, "TRANSFORMS", qna_native.ALWAYS)
    gen = torch.Generator().manual_seed(0)
    left = []
    for rest in (1.0, 0.06, 1e-3, 1e-5):
        scores = torch.randn(1, 40, 40, 1, 1, generator=gen).expand(1, 40, 40, 2, 1).clone()
        scores[:, 20, 20] += 6.9
        scores[:, :, :, 1] += 0.01 * torch.randn(1, 40, 40, 1, generator=gen)
        weight = torch.tensor([1.0, rest - 1.0]).view(1, 2, 1)
        value = torch.ones(1, 40, 40, 4)
        value[:, 20, 20] = 0
        tensors, args = [scores, value, None, weight], ((15, 15), 1, 7)
        found = qna_attention(*tensors, *args, "native")
        wanted = qna_attention(*(t if t is None else t.double() for t in tensors), *args, "exact")
        left.append(computed_directly["forward"])
        assert left[-1] == 1 or error(found, wanted) < 1e-4
    assert left[0] == 0 and left[-1] == 1


@pytest.mark.parametrize("kind", ["spread", "tower", "smooth", "bias"])
@pytest.mark.parametrize("size", ["tiles", "window-over-map", "narrow-heads"])
def test_transforms_are_right_or_left_alone(
    size: str, kind: str, monkeypatch: pytest.MonkeyPatch, computed_directly: dict[str, int]
) -> None:
    """Over every range of scores, and head by head."""
    monkeypatch.setattr(qna_native, "TRANSFORMS", qna_native.ALWAYS)
    left = []
    for spread in (0.1, 1.0, 2.0, 4.0, 8.0, 300.0):
        (scores, value, bias, weight), args = problem(size, 0.5)
        if kind == "tower":
            scores[:, 5, 5] += 3 * spread
        elif kind == "bias":
            bias[0] += 3 * spread
        elif kind == "smooth":  # gradients of scores are next to nothing
            scores, value, bias, weight = scores * spread, value * 0.1 + 3, bias / 100, weight / 100
        else:
            scores *= spread
            scores[0, :, :, :, 0] /= 10  # one head less than others
        tensors = [scores, value, bias, weight]
        found = run(tensors, args)
        wanted = run([t.double() for t in tensors], args, "auto")
        left.append(computed_directly["forward"])
        assert error(found[0], wanted[0]) < 1e-5
        for f, w in zip(found[1:], wanted[1:], strict=True):
            assert (f.double() - w).norm() <= 1e-4 * w.norm() + 1e-6  # what a softmax leaves
    assert left[0] == 0 and left[-1] > 0
    if kind == "spread":
        heads = scores.shape[0] * scores.shape[4]
        assert any(0 < count < heads for count in left)


@pytest.mark.parametrize(
    "size, way",
    [
        *((size, qna_native.NEVER) for size in ("bands", "four-queries", "stride-over-window")),
        *((size, qna_native.ALWAYS) for size in ("bands", "tiles", "narrow-heads", "stride")),
    ],
)
def test_threads_change_nothing(size: str, way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    monkeypatch.setattr(qna_native, "TRANSFORMS", way)
    tensors, args = problem(size)
    tensors = [torch.cat([t] * 3) if t.shape[0] == 2 else t for t in tensors]  # images in parts
    assert same_for_any_threads(lambda: run(tensors, args))


@pytest.mark.parametrize("size, way", SIZES_AND_WAYS)
def test_stays_within_its_memory(
    size: str, way: int, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    """Nothing is read that was not written before, and nothing written beyond the end."""
    monkeypatch.setattr(qna_native, "TRANSFORMS", way)
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


@pytest.mark.parametrize("name", ["qna", "span"])
def test_libraries_are_what_they_are_called(name: str, capability: str) -> None:
    """Compilers that run side by side do not take each other's objects."""
    lanes = {"AVX512": 16, "AVX2": 8, "DEFAULT": 4}[capability]
    library = native.load_library(
        name,
        {"qna": qna_native, "span": span_native}[name].VERSION,
        {f"{name}_lanes": ([], ctypes.c_int64)},
    )
    assert library.functions[f"{name}_lanes"]() == lanes


def test_the_best_of_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.endswith("avx512") else find(name)
    )
    assert native.load_library("qna", qna_native.VERSION, {}).kind == "avx2"


@pytest.mark.parametrize("way", [qna_native.NEVER, qna_native.ALWAYS])
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1.0, 1e24, 1e30])
@pytest.mark.parametrize("kind", ["ramp", "tower", "bias"])
def test_gradients_of_any_size_over_wide_ranges(
    kind: str, scale: float, way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_native()
    monkeypatch.setattr(qna_native, "TRANSFORMS", way)
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
    """Many images at once and a few at a time; none."""
    needs_native()
    tensors, args = problem("one-tile")
    wanted = run(tensors, args)
    monkeypatch.setattr(forms, "NATIVE_NUMBERS", 1)
    for found, other in zip(run(tensors, args), wanted, strict=True):
        torch.testing.assert_close(found, other)
    nothing = [tensors[0][:0], tensors[1][:0], *tensors[2:]]
    assert all(not x.any() for x in run(nothing, args))
    grads = qna_native.native_backward(nothing[1], *nothing, Windows(*args))
    assert not grads[2].any() and not grads[3].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-16, 1e16, 1e30])
def test_values_and_gradients_of_any_size_by_transforms(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of numbers whose squares are none, or nothing, tell nothing of errors."""
    needs_native()
    monkeypatch.setattr(qna_native, "TRANSFORMS", qna_native.ALWAYS)
    tensors, args = problem("one-tile", 0.5)
    for sizes in ((1.0, scale), (scale, 1.0), (scale, 1 / scale)):
        leaves = [t.clone() for t in tensors]
        leaves[1] *= sizes[0]
        grads = []
        for impl, kind in (("native", torch.float32), ("auto", torch.float64)):
            own = [t.to(kind).requires_grad_() for t in leaves]
            out = qna_attention(*own, *args, impl)
            direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
            direction = (direction.float() * sizes[1]).to(kind)
            grads.append([out.detach(), *torch.autograd.grad(out, own, direction)])
        assert error(grads[0][0], grads[1][0]) < 1e-5
        for f, w in zip(grads[0][1:], grads[1][1:], strict=True):
            assert (f.double() / w.abs().max() - w / w.abs().max()).norm() <= 1e-4 * (
                w / w.abs().max()
            ).norm()


@pytest.mark.parametrize("way", [qna_native.NEVER, qna_native.ALWAYS])
def test_one_number_that_is_none(
    way: int, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    """It spoils the windows that see it, forward and backward, and no other."""
    monkeypatch.setattr(qna_native, "TRANSFORMS", way)
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
