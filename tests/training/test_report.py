"""The run folder: where it is, summary, curves, settings, log and trackers."""

import argparse
import csv
import json
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import as_yaml_dict, parse_train_args
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.reporting import curves, report
from qna_timm.training.reporting.logs import RunLog
from qna_timm.training.storage.lock import LOCK_NAME
from qna_timm.training.storage.state_files import PREVIOUS_NAME, STATE_NAME

ROWS = [
    report.summary_row(0, {"loss": 2.0}, {}, 0.1),
    report.summary_row(
        1, {"loss": 1.5}, {"loss": 1.0, "top1": 50.0, "top5": 90.0, "top1_ema": 40.0}, 0.05
    ),
    report.summary_row(2, {"loss": float("nan")}, {"loss": float("nan"), "top1": 10.0}, 0.01),
]


def settings(*argv: str) -> argparse.Namespace:
    return parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu", *argv])


def test_summary_has_timms_columns(tmp_path: Path) -> None:
    report.write_summary(tmp_path, ROWS)
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "eval_top1_ema", "lr"),
    ]
    assert rows[0]["eval_top1"] == "" and rows[0]["lr"] == "0.1"
    assert rows[1]["eval_top1_ema"] == "40.0" and rows[2]["train_loss"] == "nan"


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2]])
def test_curves_are_a_picture(tmp_path: Path, rows: list) -> None:
    path = tmp_path / "curves.png"
    curves.draw_curves(rows, path, "title")
    with Image.open(path) as image:
        assert image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    # the line of the learning rate, and with an evaluation that of validation
    assert (0x3C, 0x8D, 0x5A) in colours
    assert ((0x1F, 0x6F, 0xB4) in colours) == (len(rows) > 1 or rows[0]["epoch"] > 0)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.draws
def test_no_matplotlib_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not curves.can_draw()
    assert "curves needs matplotlib: pip install matplotlib (or pip install -e" in caplog.text


def test_settings_reload(tmp_path: Path) -> None:
    argv = ["--lr", "3e-4", "--mixup", "0.2", "--opt-betas", "0.9", "0.99", "--model-kwargs"]
    args = settings(*argv, "depth=2", "--stop-epoch", "3", "--experiment", "x")
    report.write_args(tmp_path, as_yaml_dict(args))
    again = parse_train_args(["--config", str(tmp_path / "args.yaml")])
    assert as_yaml_dict(again) == as_yaml_dict(args)
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["lr"] == 3e-4


def test_environment_names_code_and_versions(tmp_path: Path) -> None:
    processes = Processes(torch.device("cpu"))
    current = report.environment(processes, ["train.py", "--lr", "1"])
    report.write_environment(tmp_path, current)
    report.write_environment(tmp_path, {**current, "hostname": "other"})
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content["torch"] == torch.__version__ and content["command"][1:] == ["--lr", "1"]
    assert content["git_commit"] is None or len(content["git_commit"]) == 40
    assert [entry["hostname"] for entry in content["resumed"]] == ["other"]


def test_default_name_never_overwrites(tmp_path: Path) -> None:
    args = settings("--output", str(tmp_path), "--model", "test_vit")
    folders = set()
    for _ in range(3):
        folder, state = report.plan_run(args, (32, 48), False)
        assert state is None and not folder.exists() and folder.name.split("-")[3] == "48"
        folder.mkdir()
        folders.add(folder)
    assert len(folders) == 3


def test_existing_experiment_is_refused(tmp_path: Path) -> None:
    args = settings("--output", str(tmp_path), "--experiment", "mine")
    assert report.plan_run(args, (32, 32), False) == (tmp_path / "mine", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.csv").touch()
    with pytest.raises(UsageError, match="mine holds a run already; --resume auto"):
        report.plan_run(args, (32, 32), False)


def test_lock_of_a_killed_run_is_no_run(tmp_path: Path) -> None:
    args = settings("--output", str(tmp_path), "--experiment", "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / LOCK_NAME).touch()
    assert report.plan_run(args, (32, 32), False) == (tmp_path / "mine", None)


def test_run_with_only_the_state_before_goes_on(tmp_path: Path) -> None:
    args = settings("--output", str(tmp_path), "--experiment", "mine", "--resume", "auto")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / PREVIOUS_NAME).touch()
    assert report.plan_run(args, (32, 32), False) == (
        tmp_path / "mine",
        tmp_path / "mine" / STATE_NAME,
    )


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--output: cannot write"):
        report.make_folder(tmp_path / "file" / "run")


def test_trackers_write_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = report.Trackers(settings("--log-tensorboard"), tmp_path, {}, 0)
    for row in ROWS[:2]:
        trackers.log(row)
    trackers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.0, 1.5]
    assert [event.step for event in events.Scalars("eval/top1")] == [1]


def test_trackers_log_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: the service needs an account."""
    logged: list = []
    run = SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))
    started: dict = {}
    wandb = SimpleNamespace(init=lambda **kwargs: started.update(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = settings("--log-wandb", "--wandb-project", "p", "--wandb-tags", "a", "b")
    report.check_trackers(args)
    trackers = report.Trackers(args, tmp_path / "name", {"lr": 0.1}, 0)
    trackers.log(ROWS[1])
    trackers.close()
    assert started == {"project": "p", "name": "name", "config": {"lr": 0.1}, "tags": ["a", "b"]}
    assert logged == [ROWS[1], "finished"]
    report.Trackers(settings("--log-wandb", "--wandb-resume-id", "i"), tmp_path, {}, 0)
    assert started["id"] == "i" and started["resume"] == "must"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"experiment": "run"}, True),
        ({"experiment": "other"}, False),
        ({"output": "{output}"}, True),
        ({"output": "{output}", "experiment": "run"}, True),
        ({"output": "elsewhere"}, False),
    ],
)
def test_resumed_run_goes_on_in_its_folder(tmp_path: Path, given: dict, expected: bool) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    given = {key: value.format(output=tmp_path) for key, value in given.items()}
    assert not report.goes_on_in(folder, given), "not a run folder"
    (folder / "args.yaml").touch()
    assert report.goes_on_in(folder, given) is expected


def test_missing_trackers_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag, module in (("--log-tensorboard", "tensorboard"), ("--log-wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UsageError, match=f"{flag} needs {module}: pip install"):
            report.check_trackers(settings(flag))


def test_log_holds_lines_back_until_the_folder_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("qna_timm.test")
    with RunLog() as log:
        logger.info("early")
        logging.getLogger("elsewhere").info("noise")
        assert capsys.readouterr().err == ""
        log.to_file(tmp_path / "train.log")
        logger.warning("late")
    logger.warning("after")
    assert capsys.readouterr().err == "early\nwarning: late\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["early", "warning: late"]


def test_log_takes_warnings_of_libraries_as_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = warnings.showwarning
    with RunLog() as log:
        warnings.showwarning(UserWarning("two\nlines"), UserWarning, "/x/y.py", 7)
        assert capsys.readouterr().err == ""
        log.to_file(tmp_path / "train.log")
    assert capsys.readouterr().err == "warning: two lines (UserWarning, y.py:7)\n"
    assert warnings.showwarning is shown


def test_log_drops_lines_before_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError), RunLog():
        logging.getLogger("qna_timm.test").info("early")
        raise UsageError("wrong")
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError), RunLog():
        logging.getLogger("qna_timm.test").info("early")
        raise RuntimeError
    assert capsys.readouterr().err == "early\n"
