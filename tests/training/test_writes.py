"""Writes that fail cost what was to be written, not the run; and the saver knows what is there."""

import errno
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_calls import FaultyCalls, full_disk, refuse
from torch import nn

from qna_timm.training.reporting.logs import RunLog
from qna_timm.training.storage.checkpoint import read_metadata
from qna_timm.training.storage.saver import EMA, Saver
from qna_timm.training.storage.writes import Writes

_logger = logging.getLogger("qna_timm.tests")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOENT]
)
def test_failed_write_is_told_and_remembered(number: int, caplog: pytest.LogCaptureFixture) -> None:
    writes, missing = Writes(), []
    with caplog.at_level(logging.INFO):
        for fault in (refuse(number), refuse(number), lambda: None, lambda: None):
            with writes.trying("summary.csv"):
                fault()
            missing.append(writes.missing)
    assert missing == [{"summary.csv"}, {"summary.csv"}, set(), set()]
    assert writes.failed == ["summary.csv"]
    line = f"summary.csv: not written ({os.strerror(number)}): training goes on"
    messages = [record.getMessage() for record in caplog.records]
    assert [message.startswith(line) for message in messages] == [True, True, False]
    assert messages[2] == "summary.csv: written again"


def test_other_errors_are_not_hidden() -> None:
    writes = Writes()
    with pytest.raises(ValueError, match="defect"), writes.trying("x"):
        raise ValueError("defect")
    assert writes.failed == []


@pytest.fixture
def lost_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is there only while it is renamed to its name."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_log_survives_a_lost_folder(
    lost_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    writes = Writes()
    with RunLog() as log:
        log.to_file(lost_folder / "train.log", writes)
        _logger.info("one")
        lost_folder.rename(tmp_path / "elsewhere")
        _logger.info("two")
        _logger.info("three")
        (tmp_path / "elsewhere").rename(lost_folder)
        _logger.info("four")
    lines = (lost_folder / "train.log").read_text().splitlines()
    words = [line.split(" ", 2)[2] for line in lines]
    assert words[:2] == ["one", "two"] and words[3:] == ["three", "four"]
    assert words[2].startswith("warning: train.log: not written (No such file or directory)")
    assert writes.failed == ["train.log"]
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("not written") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_log_on_a_full_disk(capsys: pytest.CaptureFixture) -> None:
    writes = Writes()
    with RunLog() as log:
        log.to_file(Path("/dev/full"), writes)
        for _ in range(5):
            _logger.info("text")
    assert writes.failed == ["full"]
    said = capsys.readouterr().err
    assert said.count("text\n") == 5 and said.count("No space left") == 1


def model(epoch: int) -> nn.Module:
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, epoch)
    return linear


def check_account(saver: Saver) -> None:
    """What the saver says is what the folder holds."""
    for kind, best in saver.best.items():
        there = read_metadata(saver.folder / f"best{kind}.safetensors")
        assert (there["epoch"], there["metric"]) == (best["epoch"], best["metric"])
    kept = {entry["epoch"] for entry in saver.kept}
    found = {
        int(path.stem.split("-")[1])
        for path in saver.folder.glob("checkpoint-*.safetensors")
        if not path.stem.endswith(EMA)
    }
    assert kept == found
    json.dumps(saver.state_dict())


METRICS = [50.0, 40.0, 60.0, 30.0, 70.0]


def test_saver_after_an_error_at_every_call(tmp_path: Path) -> None:
    """Two epochs, a third whose save fails at the n-th call, two more."""
    for number in range(1, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        saver = Saver(folder, {"arch": "x"}, metric_name="top1", keep=2)
        failed = False
        for epoch, metric in enumerate(METRICS):
            calls = FaultyCalls(number if epoch == 2 else 0, full_disk)
            with pytest.MonkeyPatch.context() as patch:
                calls.install(patch)
                metrics = {"top1": metric, "top1_ema": metric + 1}
                try:
                    saver.save(epoch, model(epoch), model(epoch), metrics, update=10 * epoch)
                except OSError:
                    failed = True
            assert failed or epoch != 2 or len(calls.names) < number
            assert not list(folder.glob(".*"))
            check_account(saver)
        best = {"epoch": 4, "measured": True}
        assert saver.best == {"": {**best, "metric": 70.0}, EMA: {**best, "metric": 71.0}}
        assert read_metadata(folder / "last_ema.safetensors")["update"] == 40
        assert len(saver.kept) == 2 and saver.kept[0]["epoch"] == 4
        assert len(list(folder.glob("checkpoint-*"))) == 4
        if not failed:
            break
    assert number > 45


def test_saver_removes_nothing_before_the_new_is_there(tmp_path: Path) -> None:
    saver = Saver(tmp_path, {}, metric_name="top1", keep=1)
    saver.save(0, model(0), None, {"top1": 1.0})
    old = tmp_path / "checkpoint-0.safetensors"
    calls = FaultyCalls()
    with pytest.MonkeyPatch.context() as patch:
        calls.install(patch)
        unlink = Path.unlink

        def remove(path: Path, missing_ok: bool = False) -> None:
            if path == old:
                assert calls.names.count("replace") == 3  # last, best, checkpoint-1
                assert read_metadata(tmp_path / "checkpoint-1.safetensors")["epoch"] == 1
            unlink(path, missing_ok)

        patch.setattr(Path, "unlink", remove)
        saver.save(1, model(1), None, {"top1": 2.0})
    assert not old.exists()


def test_epoch_done_twice_is_kept_once(tmp_path: Path) -> None:
    """A run that went back to an earlier state."""
    saver = Saver(tmp_path, {}, metric_name="top1", keep=3)
    for epoch in (0, 1, 1, 2):
        saver.save(epoch, model(epoch), None, {"top1": float(epoch)})
    assert [entry["epoch"] for entry in saver.kept] == [2, 1, 0]
    saver.save(3, model(3), None, {"top1": math.nan})
    assert saver.best[""]["epoch"] == 2
