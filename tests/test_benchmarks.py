"""Benchmarks run, measure what they say, and compare forms that compute the same."""

import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import attention_layers  # noqa: E402
import figures  # noqa: E402
import measuring  # noqa: E402
import operator_forms  # noqa: E402
import reporting  # noqa: E402
from problem import Problem  # noqa: E402

OPERATOR = Problem(batch=2, size=11, channels=12, heads=3, queries=2, window=5)
LAYER = Problem(batch=2, size=16, channels=16, peer_heads=2, window=5)


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """Scripts set the number of threads of their process, which here is ours."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_operator(name: str) -> list[Tensor]:
    """Output and gradients of scores, value, bias and weight, in our layout."""
    form, inputs, grad = operator_forms.make_form(OPERATOR, name)
    out = form(*(x.requires_grad_() for x in inputs))
    results = [out, *torch.autograd.grad(out, inputs, grad)]
    if name.startswith("eager"):
        maps, tables = results[:3], results[3:]
        out, scores, value = (x.permute(0, 2, 3, 1) for x in maps)
        results = [out, scores.unflatten(3, (2, 3)), value]
        results += [table.flatten(2).permute(2, 0, 1) for table in tables]
    return results


@pytest.mark.parametrize("name", ["offsets", "eager-nchw", "eager-channels-last"])
def test_operator_forms_compute_the_same(name: str) -> None:
    for ours, theirs in zip(run_operator("auto"), run_operator(name), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_formula_keeps_its_layout() -> None:
    """No copy from channels-last to contiguous maps is in its time."""
    form, inputs, _ = operator_forms.make_form(OPERATOR, "eager-channels-last")
    assert form(*inputs).is_contiguous(memory_format=torch.channels_last)


def masked_attention(layer: attention_layers.TokenAttention, x: Tensor, radius: int) -> Tensor:
    """Attention of every token to all that are near, over a whole matrix of scores."""
    batch, height, width, channels = x.shape
    qkv = layer.qkv(x).flatten(1, 2).unflatten(2, (3, layer.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # B, h, N, d
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    rows, cols = (torch.arange(height * width) // width, torch.arange(height * width) % width)
    near = (rows[:, None] - rows).abs().maximum((cols[:, None] - cols).abs()) <= radius
    out = scores.masked_fill(~near, float("-inf")).softmax(dim=3) @ value
    return layer.proj(out.transpose(1, 2).reshape(batch, height, width, channels))


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_layers_attend_to_their_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention in both orders of tokens, and unfolded windows away from the border."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex, shape = attention_layers.make_layer(LAYER, "flex")
    tiled, _ = attention_layers.make_layer(LAYER, "flex-tiled")
    unfold, _ = attention_layers.make_layer(LAYER, "unfold")
    with torch.no_grad():
        for name in ("qkv", "proj"):
            weight = getattr(flex, name).weight
            getattr(tiled, name).weight.copy_(weight)
            getattr(unfold, name).weight.copy_(weight[..., None, None])
        x = torch.randn(shape)
        expected = masked_attention(flex, x, 2)
        torch.testing.assert_close(flex(x), expected)
        torch.testing.assert_close(tiled(x), expected)
        inner = unfold(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, 2:-2, 2:-2]
        torch.testing.assert_close(inner, expected[:, 2:-2, 2:-2])


@pytest.mark.parametrize("name", ["qna", "span", "unfold", "halo"])
def test_layers_give_all_gradients(name: str) -> None:
    gradients = attention_layers.make_call(LAYER, name, "step")()
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients)


def allocate(mib: int, tensors: int) -> Callable[[], object]:
    return lambda: [torch.ones(mib, 2**18) for _ in range(tensors)]


def sleep(seconds: float) -> Callable[[], object]:
    return partial(time.sleep, seconds)


def leave() -> Callable[[], object]:
    return partial(os._exit, 3)


def refuse() -> Callable[[], object]:
    raise ValueError("no such form\nat all")


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(("mib", "tensors"), [(4, 1), (64, 1), (8, 6)])
def test_peak_memory_is_what_a_call_allocates(mib: int, tensors: int) -> None:
    result = measuring.measure_alone(partial(allocate, mib, tensors))
    assert result.peak_mib == pytest.approx(mib * tensors, abs=1.0)


@pytest.mark.parametrize(
    ("make", "skip_after", "reason"),
    [
        (leave, math.inf, "its process ended with exit code 3"),
        (partial(sleep, 30.0), 0.5, "takes more than 0.5 s"),
        (partial(allocate, 2**24, 1), math.inf, "GiB of memory that are free"),
    ],
)
def test_who_cannot_run_is_skipped_with_the_reason(
    make: Callable[[], Callable[[], object]], skip_after: float, reason: str
) -> None:
    result = measuring.measure_alone(make, skip_after=skip_after)
    assert result.timing is None and result.skipped.endswith(reason)


def test_others_are_measured_beside_who_cannot_run() -> None:
    makers = {"bad": refuse, "good": partial(allocate, 1, 1)}
    results = measuring.compare(makers, rounds=2)
    assert results["bad"] == measuring.Result(seconds=ANY, skipped="no such form")
    assert len(results["good"].timing.wall) == 2 and not results["good"].skipped


def test_memory_is_given_back_before_others_measure_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    alone = measuring.Result(skipped="no GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", partial(order.append, "empty"))
    monkeypatch.setattr(measuring, "measure_alone", lambda *_: order.append("alone") or alone)
    assert measuring.compare({"one": refuse}, 1, "cuda") == {"one": alone}
    assert order == ["empty", "alone"]


def test_a_step_waits_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for: list[str] = []
    monkeypatch.setattr(measuring, "synchronize", waited_for.append)
    bench_step = importlib.import_module("bench_step")
    bench_step.time_row("call", list, 1, torch.device("cuda:1"))
    assert set(waited_for) == {"cuda:1"}


def test_candidates_take_turns() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abc"}
    timings = measuring.time_rounds(calls, {"a": 3, "b": 3, "c": 1}, turn_seconds=0)
    assert "".join(order) == "abc" + "abc" + "ba" + "ab"  # warm-up, then three rounds
    assert [len(timing.wall) for timing in timings.values()] == [3, 3, 1]


def test_slow_candidates_take_part_in_fewer_rounds() -> None:
    makers = {"fast": partial(sleep, 0.0), "slow": partial(sleep, 0.2)}
    results = measuring.compare(makers, rounds=5, seconds=0.5)
    assert len(results["fast"].timing.wall) == 5
    assert len(results["slow"].timing.wall) == 3
    assert min(results["slow"].timing.wall) >= 200


def test_ratios_are_those_of_neighbours() -> None:
    """A machine ten times as slow in one round changes none of them."""
    low, median, high = measuring.paired_ratio([2.0, 20.0, 3.0, 2.0], [1.0, 10.0, 1.0])
    assert (low, median, high) == (2.0, 2.0, 2.5)


def test_the_interval_of_a_median() -> None:
    """Of 100 values the 40th and the 61st (the binomial's quantiles); of few the extremes."""
    values = [float(x) for x in range(100, 0, -1)]
    assert measuring.median_interval(values) == (40.0, 61.0)
    assert measuring.median_interval([2.0, 1.0, 3.0]) == (1.0, 3.0)


def test_ends_that_are_rounded_past_their_value_are_drawn(tmp_path: Path) -> None:
    bar = figures.Bar("here", "eager", 10.0, (10.004, 9.996))
    figures.draw_bars({"images per second": [bar]}, tmp_path / "bars.png")
    point = figures.Point("ours", 1.0, 10.0, (10.004, 9.996))
    figures.draw_panels({"time": [point]}, "window", tmp_path / "points.png")
    assert (tmp_path / "bars.png").is_file() and (tmp_path / "points.png").is_file()


def run_quick(script: str, out: Path, *words: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Rows and header of a script's file."""
    importlib.import_module(script).main(["--quick", "--out", str(out), *words])
    return reporting.read_csv(out)


def check_measured(rows: list[dict[str, str]]) -> None:
    """Each row has a time and a memory, or a reason."""
    for row in rows:
        assert row["skipped"] or (float(row["ms"]) > 0 and float(row["peak_mib"]) >= 0)


def test_bench_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    operator = ["auto", "offsets", "depthwise", "eager-nchw", "eager-channels-last", "conv"]
    layer = ["qna", "span", "unfold", "halo"]
    out = tmp_path / "ops.csv"
    names = [*operator, *layer, "triton", "natten"]
    rows, header = run_quick("bench_ops", out, "--device", "cpu", "--candidates", *names)
    assert {(row["what"], row["candidate"], row["mode"]) for row in rows} == {
        (what, name, mode)
        for what, these in (("operator", [*operator, "triton"]), ("layer", [*layer, "natten"]))
        for name in these
        for mode in ("forward", "step")
    }
    check_measured(rows)
    # the table's ratios are over ours
    assert all(row["ratio"] == "1" for row in rows if row["candidate"] in ("auto", "qna"))
    assert {row["candidate"] for row in rows if row["skipped"]} <= {"triton", "natten"}
    for key in ("command", "machine", "versions", "threads", "date", "commit"):
        assert header[key]
    assert f"torch {torch.__version__.split('+')[0]}" in header["versions"]
    for kind in ("operator", "layer"):
        assert (tmp_path / f"ops_{kind}.png").stat().st_size > 10_000
    tables = capsys.readouterr().out.partition("\noperator, forward, time")[2]
    assert "| eager-nchw |" in tables and "| unfold |" in tables
    importlib.import_module("bench_ops").main(["--read", str(out)])
    assert capsys.readouterr().out.partition("\noperator, forward, time")[2] == tables


def test_bench_models(tmp_path: Path) -> None:
    rows, _ = run_quick("bench_models", tmp_path / "models.csv", "--layouts", "channels-last")
    cases = {(row["model"], row["mode"]) for row in rows}
    models = ("test_convnext", "test_vit")
    assert cases == {(name, mode) for name in models for mode in ("inference", "step")}
    check_measured(rows)
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["ms"]), rel=1e-2)
    assert (tmp_path / "models.png").stat().st_size > 10_000


def test_bench_models_scaling(tmp_path: Path) -> None:
    words = ("--scaling", "--models", "qna_vit_tiny", "--modes", "inference")
    rows, _ = run_quick("bench_models", tmp_path / "scaling.csv", *words)
    assert [row["size"] for row in rows] == ["32", "64"]
    check_measured(rows)
    small, large = (float(row["peak_mib"]) for row in rows)
    assert float(rows[1]["memory_ratio"]) == pytest.approx(large / small / 4, rel=1e-2)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_bench_span(tmp_path: Path) -> None:
    forms = ("tiles", "offsets", "unfold", "halo")
    rows, _ = run_quick("bench_span", tmp_path / "span.csv", "--forms", *forms)
    cases = {(row["case"], row["form"], row["mode"]) for row in rows}
    assert cases == {("3", form, mode) for form in forms for mode in ("forward", "step")}
    check_measured(rows)


def test_bench_gramian(tmp_path: Path) -> None:
    rows, _ = run_quick("bench_gramian", tmp_path / "gramian.csv")
    cases = {(row["form"], row["mode"]) for row in rows}
    forms = ("batched", "branches", "reference")
    assert cases == {(form, mode) for form in forms for mode in ("forward", "step")}
    check_measured(rows)


def test_bench_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = run_quick("bench_step", tmp_path / "step.csv")
    assert len(rows) == 6 and all(float(row["ms"]) > 0 for row in rows)
    importlib.import_module("bench_step").main(["--paper"])
    assert "| 512 GPUs |" in capsys.readouterr().out


def test_bench_protection(tmp_path: Path) -> None:
    """Without the start of train.py, which takes its time."""
    rows, _ = run_quick("bench_protection", tmp_path / "protection.csv", "--starts", "0")
    assert [row["what"].split(",")[0] for row in rows] == [
        "step of test_vit",
        "step of test_vit",
        "price in a step of test_vit",
        "state of test_vit",
    ]
    assert all(float(row["ms"]) > 0 for row in rows if not row["what"].startswith("price"))


WRONG = (
    ("bench_ops", "--windows 4", "an odd number, found '4'"),
    ("bench_ops", "--windows -3", "a whole number from 1 on, found '-3'"),
    ("bench_ops", "--read nothing.csv", "cannot read 'nothing.csv': No such file"),
    ("bench_ops", f"--read {__file__}", "no benchmark's CSV file"),
    ("bench_ops", "--out /proc/x/y.csv", "cannot write '/proc/x/y.csv'"),
    ("bench_ops", "--device nowhere", "no device 'nowhere'"),
    ("bench_models", "--models qna_vit_tny", "did you mean 'qna_vit_tiny'"),
    ("bench_models", "--seconds 0", "a number of seconds above 0, found '0'"),
    ("bench_span", "--kernels 6", "an odd number, found '6'"),
    ("bench_gramian", "--batches 0", "a whole number from 1 on, found '0'"),
    ("bench_step", "--model qna_vit_tny", "did you mean 'qna_vit_tiny'"),
    ("bench_protection", "--starts -1", "a whole number from 0 on, found '-1'"),
)


@pytest.mark.parametrize(("script", "flags", "message"), WRONG)
def test_bad_flags_are_told_in_a_line(
    script: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script).main(flags.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
