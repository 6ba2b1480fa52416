"""Learned windows in training: their penalty, their bounds, the task in the loop."""

import copy

import pytest
import torch
from span_model import Spans
from torch import Tensor, nn

from qna_timm.training import loop
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.optim import create_optimizer
from qna_timm.training.precision import Precision
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.run import build_task
from qna_timm.training.span_task import SpanTask, has_spans, span_layers

CPU = torch.device("cpu")


def model_of(seed: int = 0, **kwargs: object) -> Spans:
    torch.manual_seed(seed)
    return Spans(num_classes=5, **kwargs)


def trainer_for(model: nn.Module, *argv: str) -> loop.Trainer:
    base = "--dataset sklearn/digits --device cpu --smoothing 0"
    args = parse_train_args([*base.split(), *argv])
    processes = Processes(CPU)
    return loop.Trainer(
        build_task(args, model, processes),
        create_optimizer(args, model, 0.1 if args.lr is None else args.lr),
        None,
        args=args,
        processes=processes,
        precision=Precision(args, CPU),
    )


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def spans_of(model: nn.Module) -> Tensor:
    """All spans, layer after layer."""
    return torch.cat([layer.span.detach() for layer in span_layers(model).values()])


def set_spans(model: nn.Module, *values: float) -> None:
    with torch.no_grad():
        for layer in span_layers(model).values():
            layer.span.copy_(torch.tensor(values))


def test_layers_have_their_names() -> None:
    assert list(span_layers(model_of())) == ["blocks.0", "blocks.1"]
    assert not has_spans(model_of(adaptive=False)) and has_spans(model_of())
    with pytest.raises(ValueError, match="expected layers with learned windows, found none in Sp"):
        SpanTask(model_of(adaptive=False), nn.CrossEntropyLoss(), verbose=False)


def test_spans_are_told_in_pixels() -> None:
    model = model_of()
    set_spans(model, 0.5, 0.1)
    task = trainer_for(model).task
    told = {"span_px": [2.5, 0.5], "kernel": 11}
    assert task.spans() == {"blocks.0": told, "blocks.1": told}
    set_spans(model, 0.0, 0.0)
    assert task.spans()["blocks.0"] == {"span_px": [0.0, 0.0], "kernel": 5}, "the ramp alone"


def test_penalty_is_the_sum_of_fractions() -> None:
    model = model_of()
    set_spans(model, 0.25, 0.75)
    ((images, labels),) = batches(1)
    task = trainer_for(model, "--span_penalty", "0.01").task
    result = task(images, labels)
    assert result["parts"]["span"].item() == pytest.approx(0.01 * 2)
    assert result["parts"]["class"] == nn.functional.cross_entropy(result["output"], labels)
    assert result["loss"] == sum(result["parts"].values())
    (span,) = (layer.span for name, layer in span_layers(model).items() if name == "blocks.1")
    (priced,) = torch.autograd.grad(result["loss"], span)
    (free,) = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), span)
    torch.testing.assert_close(priced - free, torch.full((2,), 0.01), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("argv", "penalty"), [((), 0.001), (("--span-penalty", "0"), 0.0)])
def test_penalty_of_no_flag(argv: tuple[str, ...], penalty: float) -> None:
    """The released default, where spans are live; no price only if asked for."""
    assert trainer_for(model_of(), *argv).task.span_penalty == penalty
    parts = trainer_for(model_of(adaptive=False), *argv).task(*batches(1)[0])["parts"]
    assert list(parts) == ["class"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalty_is_taken_in_float32(dtype: torch.dtype) -> None:
    ((images, labels),) = batches(1)
    model = model_of()
    task = SpanTask(model, nn.CrossEntropyLoss(), span_penalty=0.01, verbose=False)
    with torch.autocast("cpu", dtype=dtype):
        assert task(images, labels)["parts"]["span"].item() == pytest.approx(0.004, rel=1e-6)
    model.to(dtype)
    part = task.loss_parts(torch.zeros(4, 5), labels)["span"]
    assert part.dtype == torch.float32 and part.item() == pytest.approx(0.004, rel=1e-2)


def test_accumulation_is_one_large_batch() -> None:
    """The penalty counts once per update, whatever batches it is accumulated over."""
    data, model, expected = batches(7), model_of(), model_of()
    flags = ["--opt", "momentum", "--weight-decay", "0", "--span-penalty", "0.5"]
    trainer = trainer_for(model, "--grad-accum-steps", "4", *flags)
    metrics = trainer.train_epoch(data, 0, "train")
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    priced = 0.0
    for group in (data[:4], data[4:]):
        images, labels = (torch.cat(tensors) for tensors in zip(*group, strict=True))
        optimizer.zero_grad()
        price = 0.5 * sum(layer.span.abs().sum() for layer in span_layers(expected).values())
        (nn.functional.cross_entropy(expected(images), labels) + price).backward()
        optimizer.step()
        for layer in span_layers(expected).values():
            layer.span.data.clamp_(0, 1)
        priced += price.item() * len(images) / 28
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert metrics["loss_span"] == pytest.approx(priced, rel=1e-5)
    assert metrics["loss"] == pytest.approx(metrics["loss_class"] + priced, rel=1e-5)


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_spans_start_in_their_bounds(value: float) -> None:
    """Weights may come from a network whose spans were never clamped."""
    model = model_of()
    set_spans(model, value, 0.5)
    trainer_for(model)
    assert spans_of(model).tolist() == [min(max(value, 0), 1), 0.5] * 2


OPTIMIZERS = (
    "sgd", "momentum", "adamw", "lamb", "adahessian", "lookahead_adamw", "madgradw", "lion",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")  # adahessian does
@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("start", [0.01, 0.99])
def test_bounds_hold_with_any_optimizer(opt: str, start: float) -> None:
    """A price that pushes down, or a negative one up, over the bound within a few updates."""
    model = model_of()
    set_spans(model, start, start)
    trainer = trainer_for(model, "--opt", opt, "--opt-eps", "1e-8", "--lr", "0.05")
    trainer.task.span_penalty = 20.0 if start < 0.5 else -20.0
    seen = []
    step = trainer.task.post_step
    trainer.task.post_step = lambda: (seen.append(spans_of(model)), step(), None)[-1]
    trainer.train_epoch(batches(8, 2), 0, "train")
    bound = 0.0 if start < 0.5 else 1.0
    assert any((spans < 0).any() or (spans > 1).any() for spans in seen), "nothing to clamp"
    assert (spans_of(model) == bound).all()


def test_average_is_of_clamped_spans() -> None:
    model = model_of()
    set_spans(model, 0.02, 0.5)
    flags = ["--opt", "sgd", "--lr", "0.1", "--span-penalty", "1", "--model-ema"]
    trainer = trainer_for(model, *flags, "--model-ema-decay", "0.5", "--weight-decay", "0")
    expected = spans_of(model)
    for index, batch in enumerate(batches(4)):
        trainer.train_epoch([batch], index, "train")
        decay = 0.5 if index else 0.0  # timm's average begins at the first updated weights
        expected = decay * expected + (1 - decay) * spans_of(model)
        averaged = spans_of(trainer.task.get_trainable_module(ema=True))
        torch.testing.assert_close(averaged, expected, rtol=0, atol=1e-6)
        assert (averaged >= 0).all()
    assert (spans_of(model) == 0).any()


def test_skipped_step_leaves_spans() -> None:
    """float16 gradients that overflow: no update, then a smaller scale, then updates again."""
    model = model_of()
    trainer = trainer_for(model, "--amp", "--span-penalty", "1", "--opt", "sgd", "--lr", "0.05")
    before = copy.deepcopy(model.state_dict())
    ((images, labels),) = batches(1)
    trainer.precision.scaler.scale(torch.zeros(()))  # its scale is there after a first use
    trainer.precision.scaler.update(2.0**40)
    trainer.train_epoch([(images, labels)], 0, "train")
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    trainer.precision.scaler.update(2.0**4)
    metrics = trainer.train_epoch([(images, labels)] * 12, 0, "train")
    assert (spans_of(model) == 0).all() and metrics["loss_span"] > 0
    assert all(value.isfinite().all() for value in model.state_dict().values())
