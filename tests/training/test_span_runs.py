"""Models with learned windows in train.py: what a run writes, processes, flags, mistakes."""

import csv
from pathlib import Path
from types import ModuleType

import pytest
import span_model  # registers its model
import timm
import torch
from killing import to_the_end
from matplotlib.figure import Figure
from PIL import Image

from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.reporting import report, span_report
from qna_timm.training.span_task import span_layers
from qna_timm.training.storage.checkpoint import load_weights, read_weights

FILES = ("summary.csv", "spans.csv")


def digits(output: Path, *argv: str) -> list[str]:
    """A run of seconds; later flags go before these."""
    words = "--dataset sklearn/digits --model test_spans --img-size 32 -b 16 -j 0 --device cpu"
    words += " --opt adamw --lr 2e-2 --sched none --epochs 2 --max-steps 3"
    words += " --val-num-samples 64 --log-interval 1 --span-penalty 0.1"
    return [*words.split(), "--output", str(output), *argv]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.draws
def test_spans_are_written_everywhere(train: ModuleType, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train.main(digits(tmp_path, "--experiment", "a", "--log-tensorboard")) == 0
    folder = tmp_path / "a"
    rows = table(folder / "spans.csv")
    assert list(rows[0]) == ["epoch", "layer", "head", "span_px", "kernel"]
    assert [(row["epoch"], row["layer"], row["head"]) for row in rows] == [
        (epoch, layer, head) for epoch in "01" for layer in ("blocks.0", "blocks.1")
        for head in "01"
    ]  # fmt: skip

    # the last rows are the weights', and they have moved
    model = timm.create_model("test_spans", num_classes=10)
    load_weights(model, folder / "last.safetensors")
    for index, (name, layer) in enumerate(span_layers(model).items()):
        for head, pixels in enumerate(layer.pixels().tolist()):
            row = rows[4 + 2 * index + head]
            assert float(row["span_px"]) == pytest.approx(pixels, abs=1e-6) != 0.5
            assert int(row["kernel"]) == 2 * layer.running_radius() + 1 and row["layer"] == name

    log = (folder / "train.log").read_text()
    shown = " ".join(f"{float(row['span_px']):.2f}" for row in rows[6:])
    assert f"epoch 2/2: blocks.1: spans {shown} px, kernel {rows[-1]['kernel']}\n" in log
    assert "learned windows in 2 layers, span penalty 0.1\n" in log
    assert f"spans: {folder / 'spans.png'}\n" in log
    with Image.open(folder / "spans.png") as image:
        assert image.width > 500
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tracked = [event.value for event in events.Scalars("span_px/blocks.1/head_0")]
    assert tracked == pytest.approx([float(rows[2]["span_px"]), float(rows[6]["span_px"])])
    assert [event.value for event in events.Scalars("span_kernel/blocks.0")] == [7, 7]

    summary = table(folder / "summary.csv")[-1]
    assert not any("span" in name for name in summary if name != "train_loss_span")
    losses = float(summary["train_loss_class"]) + float(summary["train_loss_span"])
    assert float(summary["train_loss"]) == pytest.approx(losses, rel=1e-5)


def test_fixed_windows_have_no_spans(train: ModuleType, tmp_path: Path) -> None:
    """No price, no table; args.yaml of any run names the flag and can be given again."""
    flags = ["--model-kwargs", "adaptive=False", "--epochs", "1", "--experiment", "a"]
    argv = [word for word in digits(tmp_path, *flags) if word not in ("--span-penalty", "0.1")]
    assert train.main(argv) == 0
    folder = tmp_path / "a"
    assert not list(folder.glob("spans*"))
    assert not any("span" in name for name in table(folder / "summary.csv")[0])
    args = parse_train_args(["--config", str(folder / "args.yaml")])
    assert args.span_penalty is None


def test_higher_penalty_gives_smaller_spans(train: ModuleType, tmp_path: Path) -> None:
    spans = []
    for penalty in ("0.01", "10"):
        flags = ["--opt", "sgd", "--lr", "1e-3", "--span-penalty", penalty]
        train.main(digits(tmp_path, *flags, "--experiment", penalty))
        rows = table(tmp_path / penalty / "spans.csv")
        spans.append(sum(float(row["span_px"]) for row in rows if row["epoch"] == "1"))
    assert spans[1] < spans[0] - 0.1


def test_resumed_run_equals_the_straight_one(train: ModuleType, tmp_path: Path) -> None:
    argv = digits(tmp_path, "--model-ema", "--model-ema-decay", "0.9")
    train.main([*argv, "--experiment", "straight"])
    train.main([*argv, "--experiment", "stopped", "--stop-epoch", "1"])
    folder = tmp_path / "stopped"
    assert len(table(folder / "spans.csv")) == 4
    train.main(["--resume", str(folder), "--stop-epoch", "2"])
    for name in FILES:
        assert (folder / name).read_text() == (tmp_path / "straight" / name).read_text()
    # epochs that are trained again replace their rows
    train.main(["--resume", str(folder), "--start-epoch", "1", "--stop-epoch", "2"])
    assert [row["epoch"] for row in table(folder / "spans.csv")] == ["0"] * 4 + ["1"] * 4


def test_two_processes_train_like_one(train: ModuleType, tmp_path: Path) -> None:
    """Same global batch, no batch norm: equal up to the order of float32 sums."""
    shared = ["--no-aug", "--grad-accum-steps", "2", "--epochs", "1", "--opt", "sgd"]
    shared += ["--lr", "1e-2", "--span-penalty", "2"]
    train.main(digits(tmp_path, *shared, "-b", "16", "--experiment", "one"))
    argv = digits(tmp_path, *shared, "-b", "8", "--experiment", "two")
    to_the_end(train, argv, tmp_path / "log", processes=2)
    for name in FILES:
        one, two = (table(tmp_path / run / name) for run in ("one", "two"))
        assert len(one) == len(two) and list(one[0]) == list(two[0])
        for row, other in zip(one, two, strict=True):
            for column, value in row.items():
                if column == "layer":
                    assert other[column] == value
                else:
                    assert float(other[column]) == pytest.approx(float(value), rel=1e-5), column
    spans = [float(row["span_px"]) for row in table(tmp_path / "one" / "spans.csv")]
    assert all(pixels < 0.48 for pixels in spans), "nothing has moved"


FLAGS = {
    "mixed": "--mixup 0.2 --cutmix 1 --bce-loss --smoothing 0.1 --grad-accum-steps 2",
    "jsd": "--aug-splits 2 --loss jsd",
    "float16": "--amp --clip-grad 1 --channels-last",
    "bfloat16": "--amp --amp-dtype bfloat16 --model-ema",
    "weights": "--model-dtype bfloat16 --model-ema",
    "compile": "--torchcompile eager --model-ema --epochs 1",
    "views": "--tta 2 --lr 0.5 --span-penalty 20",
    "agc": "--clip-grad 0.01 --clip-mode agc --opt lamb",
    "lookahead": "--opt lookahead_sgd --lr 0.5 --span-penalty 20",
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_go_with_spans(train: ModuleType, tmp_path: Path, name: str) -> None:
    argv = digits(tmp_path, "--max-steps", "2", "--experiment", name, *FLAGS[name].split())
    assert train.main(argv) == 0
    weights, _ = read_weights(tmp_path / name)
    assert all(value.isfinite().all() for value in weights.values())
    kinds = ("last", "last_ema") if "ema" in FLAGS[name] else ("last",)
    for kind in kinds:
        weights, _ = read_weights(tmp_path / name / f"{kind}.safetensors")
        spans = [value for key, value in weights.items() if key.endswith(".span")]
        assert len(spans) == 2 and all(v.min() >= 0 and v.max() <= 1 for v in spans)


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--span-penalty -1", "--span-penalty: must be zero or more, found -1"),
        ("--model test_vit", "--span-penalty 0.1: test_vit learns no windows .*_adaptive models"),
        ("--model-kwargs adaptive=False", "--span-penalty 0.1: test_spans learns no windows"),
        ("--torchscript", "--torchscript: the learned windows of a scripted test_spans"),
    ],
)
def test_mistakes_are_one_line(train: ModuleType, tmp_path: Path, flags: str, pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern) as caught:
        train.main(digits(tmp_path / "out", *flags.split()))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_branches_are_not_combined(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_model.Spans, "set_branch_outputs", print, raising=False)
    with pytest.raises(UsageError, match="learned windows under Gramian heads have no common"):
        train.main(digits(tmp_path))


def test_authors_spelling(tmp_path: Path) -> None:
    base = ["--dataset", "sklearn/digits", "--model", "test_spans", "--device", "cpu"]
    for name in ("--span-penalty", "--span_penalty"):
        assert parse_train_args([*base, name, "0.01"]).span_penalty == 0.01
    recipe = tmp_path / "r.yaml"
    recipe.write_text("span_penalty: 0.01\n")
    assert parse_train_args([*base, "--config", str(recipe)]).span_penalty == 0.01


def rows_of(layers: int, heads: int, epochs: int = 3) -> list[dict]:
    spans = [
        {
            f"layers.{n}": {"span_px": [0.5 * epoch] * heads, "kernel": 2 * epoch + 5}
            for n in range(layers)
        }
        for epoch in range(epochs)
    ]
    return [report.summary_row(e, {"loss": 1.0}, {}, 0.1, spans[e]) for e in range(epochs)]


@pytest.mark.parametrize(("layers", "heads", "epochs"), [(1, 1, 1), (3, 4, 3), (9, 8, 2)])
def test_picture_has_a_panel_a_layer_and_a_line_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, heads: int, epochs: int
) -> None:
    figures: list[Figure] = []
    write = span_report.write_png

    def noted(figure: Figure, path: Path) -> None:
        figures.append(figure)
        write(figure, path)

    monkeypatch.setattr(span_report, "write_png", noted)
    span_report.draw_spans(rows_of(layers, heads, epochs), tmp_path / "spans.png", "title")
    panels = [axes for axes in figures[0].axes if axes.axison]
    kernels = {1: "5", 2: "5 → 7", 3: "5 → 9"}[epochs]
    titles = [f"layers.{n}, kernel {kernels}" for n in range(layers)]
    assert [axes.get_title() for axes in panels] == titles
    for axes in panels:
        assert len(axes.lines) == heads
        assert list(axes.lines[-1].get_xdata()) == list(range(1, epochs + 1))
        assert list(axes.lines[-1].get_ydata()) == [0.5 * epoch for epoch in range(epochs)]
    assert [path.name for path in tmp_path.iterdir()] == ["spans.png"]


def test_epochs_without_spans_are_passed_over(tmp_path: Path) -> None:
    """They have no rows in the table and no place in the picture."""
    plain = report.summary_row(0, {"loss": 1.0}, {}, 0.1)
    span_report.write_spans(tmp_path, [plain], "title")
    assert not list(tmp_path.iterdir())
    span_report.write_spans(tmp_path, [plain, *rows_of(2, 2)[1:]])
    assert [path.name for path in tmp_path.iterdir()] == ["spans.csv"], "no title, no picture"
    assert [row["epoch"] for row in table(tmp_path / "spans.csv")] == ["1"] * 4 + ["2"] * 4


def test_trackers_name_every_head() -> None:
    (row,) = rows_of(1, 2, 1)
    assert span_report.span_scalars(row["spans"]) == {
        "span_px/layers.0/head_0": 0.0,
        "span_px/layers.0/head_1": 0.0,
        "span_kernel/layers.0": 5,
    }
    assert torch.tensor(list(span_report.span_scalars({}).values())).numel() == 0
