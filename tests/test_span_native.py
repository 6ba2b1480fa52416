"""Compiled span attention: right for every shape and instruction set, within its memory."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ladders import guard_memory, needs_native, same_for_any_threads, untouched, without_native
from test_span_ops import ORDER, problem, run

from qna_timm.ops import explain_span_attention, span_attention
from qna_timm.ops.compiled import compiled_attention
from qna_timm.ops.span import native as span_native

# As in test_span_ops: bands of rows and groups of channels that are full, begun and more than one.
SIZES = {
    "bands": (2, 40, 33, 32, 2, 5, False, "positive"),
    "bands-padding": (1, 70, 20, 48, 2, 7, True, "holes"),
    "wide-heads": (3, 8, 8, 64, 1, 11, False, "holes"),
    "odd-heads": (2, 9, 18, 15, 3, 3, False, "none"),
    "three-chunks": (1, 5, 40, 24, 1, 3, True, "none"),
    "many-heads": (2, 4, 5, 96, 12, 5, False, "positive"),
    "window-over-map": (2, 3, 2, 8, 2, 9, True, "positive"),
    "a-row": (1, 1, 200, 16, 2, 5, False, "none"),
    "a-column": (1, 100, 1, 16, 2, 5, True, "none"),
}


@pytest.mark.parametrize("size", SIZES)
def test_all_sizes(size: str, capability: str) -> None:
    arguments = problem(SIZES[size])
    found = run(arguments, "native", torch.float32)
    for one, other in zip(found, run(arguments, "tiles"), strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm() + 1e-5


@pytest.mark.parametrize("size", ["bands", "bands-padding"])
def test_threads_change_nothing(size: str) -> None:
    needs_native()
    arguments = problem(SIZES[size])
    assert same_for_any_threads(lambda: run(arguments, "native", torch.float32))


@pytest.mark.parametrize("size", SIZES)
def test_stays_within_its_memory(
    size: str, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    """Nothing is read that was not written before, and nothing written beyond the end."""
    arguments = problem(SIZES[size])
    wanted = run(arguments, "native", torch.float32)
    handed = guard_memory(monkeypatch)
    for one, other in zip(run(arguments, "native", torch.float32), wanted, strict=True):
        assert torch.equal(one, other)
    assert len(handed) == 2 and untouched(handed)


@pytest.mark.parametrize("place", [(20, 16), (20, 32), (20, 0)], ids=["middle", "right", "left"])
def test_one_number_that_is_none(place: tuple[int, int], capability: str) -> None:
    """It spoils the windows that see it, forward and backward, and no other row's or image's."""
    arguments = problem((2, 40, 33, 8, 2, 5, False, "positive"))
    row, col = place
    arguments["qkv"][0, row, col, 8] = float("nan")  # a key of the first head
    out, grad_qkv, *_ = run(arguments, "native", torch.float32)
    for found, reach in ((out, 2), (grad_qkv, 4)):
        rows = slice(row - reach, row + reach + 1)
        cols = slice(max(0, col - reach), col + reach + 1)
        assert found[0, row, col].isnan().any()
        found[0, rows, cols] = 0
        assert found.isfinite().all()


def test_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    arguments = problem(SIZES["odd-heads"], dtype=torch.float32)
    given = [arguments[name] for name in ("qkv", "rel_pos_h", "rel_pos_w", "num_heads")]
    choice = explain_span_attention(*given)
    assert choice.impl == "native" and choice.why_not == {"triton": "the map is on cpu"}
    assert compiled_attention() in ("avx512", "avx2", "baseline")
    found = run(arguments, "auto", torch.float32)
    without_native(monkeypatch)
    choice = explain_span_attention(*given)
    assert choice.impl == "tiles" and "switched it off" in choice.why_not["native"]
    for one, other in zip(run(arguments, "auto", torch.float32), found, strict=True):
        assert 0 < (one - other).norm() <= 1e-5 * other.norm()


def test_a_recorded_graph_runs_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(SIZES["odd-heads"], dtype=torch.float32)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    settings = {name: x for name, x in arguments.items() if name not in tensors}

    class Layer(torch.nn.Module):
        def forward(self, **tensors: torch.Tensor) -> torch.Tensor:
            return span_attention(**tensors, **settings)

    exported = torch.export.export(Layer(), (), tensors).module()
    wanted = exported(**tensors)
    without_native(monkeypatch)
    torch.testing.assert_close(exported(**tensors), wanted)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (torch.Tensor.double, "it computes in float32, qkv is float64"),
        (torch.Tensor.int, "it computes in float32, qkv is int32"),
        (torch.Tensor.to_mkldnn, "it takes dense maps, qkv is _mkldnn"),
    ],
    ids=["float64", "int32", "mkldnn"],
)
def test_what_it_does_not_compute(change: Callable, why: str) -> None:
    needs_native()
    arguments = problem(SIZES["odd-heads"], dtype=torch.float32)
    arguments["qkv"] = change(arguments["qkv"])
    with pytest.raises(ValueError, match=f"impl='native' cannot compute this: {why}"):
        span_attention(**arguments, impl="native")


def test_a_saved_trace(tmp_path: Path) -> None:
    arguments = problem(SIZES["odd-heads"], dtype=torch.float32)
    qkv = arguments.pop("qkv")
    traced = torch.jit.trace(lambda qkv: span_attention(qkv, **arguments), qkv)
    torch.jit.save(traced, str(tmp_path / "traced.pt"))
    found = torch.jit.load(str(tmp_path / "traced.pt"))(qkv)
    torch.testing.assert_close(found, span_attention(qkv, **arguments))


def test_memory_of_threads_that_have_something_to_do() -> None:
    needs_native()

    def floats(threads: int) -> int:
        sizes = (ctypes.c_int64 * 7)(1, 64, 20, 2, 8, 5, 0)  # two bands of two heads
        return span_native.LIBRARY.functions["span_floats"](sizes, 1, threads)

    assert floats(1) < floats(2) < floats(4) == floats(64)


def test_shapes_are_checked_where_memory_is_read() -> None:
    """Also for callers of the registered operators, as graphs are."""
    arguments = problem((1, 4, 4, 8, 2, 3, False, "positive"), dtype=torch.float32)
    operators = torch.ops.qna_timm
    for change in (
        {"qkv": torch.zeros(1, 4, 4, 21)},
        {"rel_pos_w": torch.zeros(8, 5)},
        {"mask": torch.ones(1, 9)},
        {"floor": torch.ones(8)},
        {"num_heads": 0},
    ):
        flat = [{**arguments, **change}[name] for name in ORDER]
        with pytest.raises(ValueError, match="must"):
            operators.span_attention(*flat, "auto")
    flat = [arguments[name] for name in ORDER]
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'offsets'"):
        operators.span_attention(*flat, "offsets")
    with pytest.raises(ValueError, match=r"grad must be \[1, 4, 4, 8\], got \[1, 4, 3, 8\]"):
        operators.span_attention_backward(torch.zeros(1, 4, 3, 8), *flat, "auto")
