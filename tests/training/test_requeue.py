"""Runs put back into SLURM's queue, and runs that find themselves started again."""

import logging
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from qna_timm.training.processes import requeue
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.processes.requeue import requeue_job, restarted, resume_if_restarted

FIRST = Processes(torch.device("cpu"))


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    caplog.set_level(logging.INFO)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that writes down its arguments; what its file `answer` says, it does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n. {tmp_path}/answer\n')
    program.chmod(0o755)
    (tmp_path / "answer").write_text("exit 0\n")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return tmp_path


def asked(folder: Path) -> list[str]:
    path = folder / "asked"
    return path.read_text().splitlines() if path.is_file() else []


def test_job_is_queued_again(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert requeue_job(FIRST) == 0
    assert asked(scontrol) == ["requeue 41"]
    assert [record.message for record in caplog.records] == ["job 41 is queued again"]


def test_only_the_first_process_asks(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert requeue_job(Processes(torch.device("cpu"), rank=1, world_size=2)) == 0
    assert not asked(scontrol)


def test_outside_slurm_there_is_no_job(scontrol: Path) -> None:
    assert requeue_job(FIRST) == 0 and not asked(scontrol)


def test_one_task_of_an_array(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task of an array has the number of the whole array."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue_job(FIRST) == 0
    assert asked(scontrol) == ["requeue 41_3"]


@pytest.mark.parametrize(
    "answer, told",
    [
        ("echo 'Job is not requeueable' >&2; exit 1", "Job is not requeueable"),
        ("exit 3", "exit code 3"),
        ("exec sleep 20", "no answer in 0.2 s"),
        (None, "scontrol"),
    ],
)
def test_refusal_is_one_warning(
    answer: str | None,
    told: str,
    scontrol: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if answer is None:
        monkeypatch.setenv("PATH", str(scontrol))  # where no scontrol is
    else:
        (scontrol / "answer").write_text(answer)
    monkeypatch.setattr(requeue, "SCONTROL_SECONDS", 0.2 if "sleep" in str(answer) else 10)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert requeue_job(FIRST) == 143
    (record,) = caplog.records
    assert record.levelname == "WARNING" and told in record.message and "\n" not in record.message


def test_restarted() -> None:
    assert not restarted({}) and not restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert restarted({"TORCHELASTIC_RESTART_COUNT": "2", "SLURM_RESTART_COUNT": "0"})
    assert restarted({"SLURM_RESTART_COUNT": "1"})


def flags(tmp_path: Path, **given: object) -> Namespace:
    values = {
        "output": str(tmp_path),
        "experiment": "a",
        "resume": "",
        "start_epoch": None,
        "no_resume_opt": False,
    }
    return Namespace(**{**values, **given})


def test_first_start_is_left_alone(tmp_path: Path) -> None:
    args = flags(tmp_path, start_epoch=3)
    resume_if_restarted(args, FIRST)
    assert args == flags(tmp_path, start_epoch=3)


@pytest.mark.parametrize(
    "saved, given, expected",
    [
        (True, {}, {"resume": "auto"}),
        (False, {}, {"resume": "auto"}),
        (False, {"start_epoch": 3}, {"resume": "auto", "start_epoch": 3}),
        (True, {"start_epoch": 3}, {"resume": "auto"}),
        (True, {"resume": "other", "no_resume_opt": True}, {"resume": "auto"}),
        (False, {"resume": "other", "no_resume_opt": True}, None),
        (True, {"experiment": ""}, None),
    ],
)
def test_started_again(
    saved: bool,
    given: dict,
    expected: dict | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if saved:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "last.state.safetensors").touch()
    args = flags(tmp_path, **given)
    resume_if_restarted(args, FIRST)
    assert args == flags(tmp_path, **(given if expected is None else expected))
    if given.get("experiment") == "":
        assert "without --experiment" in caplog.text
