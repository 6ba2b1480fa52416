"""Metrics against plain computations, and several processes against one."""

import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qna_timm.training import evaluation
from qna_timm.training.errors import UsageError
from qna_timm.training.evaluation import evaluate
from qna_timm.training.observers import ClassCounts, ImageCount, RealLabels
from qna_timm.training.reporting.progress import Progress, format_duration
from qna_timm.training.reporting.results import (
    averaged_scores,
    class_table,
    format_table,
    write_results,
)

CPU = torch.device("cpu")
SAMPLES, CLASSES = 23, 7  # neither a multiple of the batch nor of two processes


class Rows(DataLoader):
    """A loader of random logits and labels; the model is the identity."""

    def __init__(self, batch_size: int = 5, samples: int = SAMPLES, **kwargs: object) -> None:
        generator = torch.Generator().manual_seed(3)
        self.logits = torch.randn(samples, CLASSES, generator=generator)
        self.labels = torch.randint(CLASSES, (samples,), generator=generator)
        super().__init__(TensorDataset(self.logits, self.labels), batch_size, **kwargs)


def expected(loader: Rows) -> dict[str, float]:
    logits, labels = loader.logits.double().numpy(), loader.labels.numpy()
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    chosen = (shifted / shifted.sum(1, keepdims=True))[np.arange(len(labels)), labels]
    ranks = (-logits).argsort(1)
    return {
        "loss": float(-np.log(chosen).mean()),
        "top1": 100 * float((ranks[:, 0] == labels).mean()),
        "top5": 100 * float((ranks[:, :5] == labels[:, None]).any(1).mean()),
    }


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_metrics_do_not_depend_on_the_batch(batch_size: int) -> None:
    loader = Rows(batch_size)
    metrics = evaluate(nn.Identity(), loader, device=CPU)
    assert metrics == pytest.approx(expected(loader), rel=1e-6)


def test_fewer_than_five_classes_and_first_of_several_outputs() -> None:
    class TwoHeads(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :3], -x[:, :3]

    data = TensorDataset(torch.eye(CLASSES)[:3], torch.tensor([0, 1, 0]))
    metrics = evaluate(TwoHeads(), DataLoader(data, 2), device=CPU)
    assert metrics["top1"] == pytest.approx(200 / 3)
    assert metrics["top5"] == 100


def test_model_is_left_as_it_was() -> None:
    model = nn.BatchNorm1d(CLASSES)
    before = model.running_mean.clone()
    evaluate(model.train(), Rows(), device=CPU)
    assert model.training
    assert torch.equal(model.running_mean, before)
    evaluate(model.eval(), Rows(), device=CPU)
    assert not model.training


def test_valid_labels_choose_logits() -> None:
    loader = Rows()
    valid = torch.tensor([2, 4, 6])
    data = TensorDataset(loader.logits, loader.labels % 3)
    metrics = evaluate(nn.Identity(), DataLoader(data, 5), device=CPU, valid_labels=valid)
    best = loader.logits.numpy()[:, [2, 4, 6]].argmax(1)
    assert metrics["top1"] == pytest.approx(100 * (best == loader.labels.numpy() % 3).mean())


@pytest.mark.parametrize(("label", "message"), [(CLASSES, "label 7.*7 classes"), (-1, "without")])
def test_label_out_of_range(label: int, message: str) -> None:
    data = TensorDataset(torch.randn(4, CLASSES), torch.tensor([0, 1, label, 2]))
    with pytest.raises(UsageError, match=message):
        evaluate(nn.Identity(), DataLoader(data, 2), device=CPU)


class TestClassCounts:
    def counts(self) -> tuple[Rows, ClassCounts]:
        loader, counts = Rows(), ClassCounts(CLASSES, CPU, with_matrix=True)
        evaluate(nn.Identity(), loader, device=CPU, observers=[counts])
        return loader, counts

    def test_matrix(self) -> None:
        loader, counts = self.counts()
        matrix = np.zeros((CLASSES, CLASSES))
        for label, best in zip(loader.labels.numpy(), loader.logits.argmax(1).numpy(), strict=True):
            matrix[label, best] += 1
        assert np.array_equal(counts.matrix().numpy(), matrix)

    @pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
    def test_averages_agree_with_scikit_learn(self, average: str) -> None:
        sklearn_metrics = pytest.importorskip("sklearn.metrics")
        loader, counts = self.counts()
        scores = sklearn_metrics.precision_recall_fscore_support(
            loader.labels, loader.logits.argmax(1), average=average, zero_division=0
        )
        ours = averaged_scores(counts.totals(), average)
        names = [f"{average}_{name}" for name in ("precision", "recall", "f1_score")]
        assert [ours[name] for name in names] == pytest.approx([100 * s for s in scores[:3]])

    def test_table(self) -> None:
        loader, counts = self.counts()
        names = [f"class {i}" for i in range(CLASSES)]
        rows = class_table(counts.totals(), names)
        for row in rows:
            mine = loader.labels.numpy() == row["label"]
            assert row["images"] == mine.sum()
            assert row["class"] == f"class {row['label']}"
            best = loader.logits.argmax(1).numpy()[mine]
            share = 100 * (best == row["label"]).mean() if mine.any() else 0
            assert row["top1"] == pytest.approx(share, abs=0.01)
            predicted = loader.logits.argmax(1).numpy() == row["label"]
            right = (mine & predicted).sum()
            precision = 100 * right / max(predicted.sum(), 1)
            assert row["precision"] == pytest.approx(precision, abs=0.01)
            f1_score = 200 * right / (mine.sum() + predicted.sum())
            assert row["f1_score"] == pytest.approx(f1_score, abs=0.01)
        lines = format_table(rows).splitlines()
        assert len(lines) == len(rows) + 1
        assert "class 3" in lines[4]

    def test_table_has_what_occurs_or_was_predicted(self) -> None:
        counts = ClassCounts(4, CPU)
        counts.update(torch.eye(4)[[1, 1, 3]], torch.tensor([1, 1, 1]))
        rows = class_table(counts.totals(), None)
        assert [(row["label"], row["images"]) for row in rows] == [(1, 3), (3, 0)]

    @pytest.mark.parametrize("classes", [3, 6])
    def test_right_among_five(self, classes: int) -> None:
        """Or among all, where there are fewer."""
        counts = ClassCounts(classes, CPU)
        ranked = torch.arange(float(classes)).flip(0).expand(classes, -1)
        counts.update(ranked, torch.arange(classes))
        rows = class_table(counts.totals(), None)
        assert [row["top5"] for row in rows] == [100.0 if i < 5 else 0.0 for i in range(classes)]


def test_results_of_models_with_other_metrics(tmp_path: Path) -> None:
    """Those with branches have more."""
    rows = [{"model": "a", "top1": 1.5}, {"model": "b", "top1": 2.5, "agreement": 90.0}]
    write_results(tmp_path / "results.csv", rows, "csv")
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines == ["model,top1,agreement", "a,1.5,", "b,2.5,90.0"]


@pytest.fixture
def real_file(tmp_path: Path) -> Path:
    """Reassessed labels: none for the first image, two for the second, one for the others."""
    labels = [[], [0, 1], *([i % CLASSES] for i in range(2, SAMPLES))]
    path = tmp_path / "real.json"
    path.write_text(json.dumps(labels))
    return path


def image_names() -> list[str]:
    return [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(SAMPLES)]


def expected_real(loader: Rows) -> float:
    best = loader.logits.argmax(1).tolist()
    right = [best[1] in (0, 1), *(best[i] == i % CLASSES for i in range(2, SAMPLES))]
    return 100 * float(np.mean(right))


def test_real_labels(real_file: Path) -> None:
    loader, real = Rows(), RealLabels(image_names(), str(real_file))
    evaluate(nn.Identity(), loader, device=CPU, observers=[real])
    assert real.accuracy(CPU)["top1"] == pytest.approx(expected_real(loader))


def test_real_labels_of_other_data(real_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="labels for 23 images, the split 2"):
        RealLabels(image_names()[:2], str(real_file))
    with pytest.raises(UsageError, match=r"found 'x\.png'"):
        RealLabels(["x.png", *image_names()[1:]], str(real_file))
    (tmp_path / "bad.json").write_text("labels")
    with pytest.raises(UsageError, match="not a JSON list"):
        RealLabels(image_names(), str(tmp_path / "bad.json"))


def _evaluate_as_rank(rank: int, address: str, real_path: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = []
    for samples in (SAMPLES, 1):  # with one sample the second process has only padding
        loader = Rows(4, samples)
        loader = Rows(4, samples, sampler=OrderedDistributedSampler(loader.dataset))
        counts, images = ClassCounts(CLASSES, CPU, with_matrix=True), ImageCount()
        observers = [counts, images]
        if samples == SAMPLES:
            observers.append(real := RealLabels(image_names(), real_path))
        metrics = evaluate(nn.Identity(), loader, device=CPU, observers=observers)
        totals, matrix = counts.totals().tolist(), counts.matrix().tolist()
        results.append([metrics, totals, matrix, images.total(CPU)])
    results.append(real.accuracy(CPU))
    Path(out, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_what_one_gives(tmp_path: Path, real_file: Path) -> None:
    args = (str(tmp_path / "store"), str(real_file), str(tmp_path))
    mp.start_processes(_evaluate_as_rank, args, nprocs=2, start_method="fork")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for (metrics, totals, matrix, images), samples in zip(ranks[0], (SAMPLES, 1), strict=False):
        loader, counts = Rows(4, samples), ClassCounts(CLASSES, CPU, with_matrix=True)
        assert metrics == pytest.approx(expected(loader), rel=1e-6)
        evaluate(nn.Identity(), loader, device=CPU, observers=[counts])
        assert totals == counts.totals().tolist()
        assert matrix == counts.matrix().tolist()
        assert images == samples
    assert ranks[0][2]["top1"] == pytest.approx(expected_real(Rows()))


class TestProgress:
    def test_lines_when_piped(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        with Progress(10, "train 1/2", log_interval=4) as progress:
            for step in range(10):
                progress.update(8, loss=torch.tensor(step / 10), lr=1e-5)
        lines = caplog.messages
        assert [line.split("]")[0] for line in lines] == [
            "train 1/2 [1/10 10%",
            "train 1/2 [5/10 50%",
            "train 1/2 [9/10 90%",
            "train 1/2 [10/10 100%",
        ]
        assert "loss 0.4, lr 1.00e-05" in lines[1]
        assert lines[-1].endswith("eta 0:00")
        assert "img/s" in lines[0]

    def test_time_left_of_a_pass_that_is_gone_on_with(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The steps behind it have taken none of the time."""
        caplog.set_level(logging.INFO)
        now = [100.0]
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        progress = Progress(10, "train 1/2", log_interval=1, start_step=6)
        now[0] += 30
        progress.update(60)
        (line,) = caplog.messages
        assert line == "train 1/2 [7/10 70%] 2.0 img/s, eta 1:30"

    def test_what_an_evaluation_shows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Percent, and the images of all processes."""
        shown: list[tuple[int, dict[str, Tensor]]] = []
        bar = SimpleNamespace(update=lambda images, **values: shown.append((images, values)))
        metrics = evaluate(nn.Identity(), Rows(), device=CPU, progress=bar)
        assert [images for images, _ in shown] == [5, 5, 5, 5, 3]
        found = {name: value.item() for name, value in shown[-1][1].items()}
        assert found == pytest.approx({name: metrics[name] for name in ("loss", "top1")})

        def stop(batch: int) -> None:
            raise InterruptedError

        monkeypatch.setattr(evaluation, "process_place", lambda: (0, 2))
        with pytest.raises(InterruptedError):
            evaluate(nn.Identity(), Rows(), device=CPU, progress=bar, after_batch=stop)
        assert shown[-1][0] == 10

    def test_values_are_read_only_when_shown(self, caplog: pytest.LogCaptureFixture) -> None:
        class Counting:
            reads = 0

            def __float__(self) -> float:
                Counting.reads += 1
                return 1.0

        caplog.set_level(logging.INFO)
        progress = Progress(100, "x", log_interval=50)
        for _ in range(100):
            progress.update(1, loss=Counting())
        assert Counting.reads == 3

    def test_bar_on_a_terminal(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        with Progress(2, "train 1/2", log_interval=1) as progress:
            time.sleep(0.2)  # tqdm draws ten times a second at most
            progress.update(8, loss=0.25)
        shown = capsys.readouterr().err
        assert "train 1/2" in shown
        assert "loss 0.25" in shown

    def test_lines_on_a_terminal_without_width(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stderr.fileno", lambda: 2, raising=False)
        monkeypatch.setattr("os.get_terminal_size", lambda fd: os.terminal_size((0, 0)))
        with Progress(1, "train 1/2", log_interval=1) as progress:
            progress.update(8, loss=0.25)
        assert "train 1/2 [1/1 100%] loss 0.25" in caplog.text

    def test_disabled_says_nothing(
        self, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        progress = Progress(2, "x", log_interval=1, enabled=False)
        progress.update(1, loss=1.0)
        progress.close()
        assert not caplog.messages
        assert not capsys.readouterr().err

    def test_durations(self) -> None:
        assert [format_duration(s) for s in (0.4, 59.6, 3600, 36610)] == [
            "0:00",
            "1:00",
            "1:00:00",
            "10:10:10",
        ]
