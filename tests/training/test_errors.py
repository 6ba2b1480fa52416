"""Errors that users cause: closest names, and how a command ends with them."""

import os
import subprocess
import sys

import pytest

from qna_timm.training.errors import UsageError, closest, closest_path, run_cli


def test_closest():
    assert closest("resnet5", ["resnet50", "vit"]) == "; did you mean 'resnet50'?"
    assert closest("xyz", ["resnet50"]) == ""
    assert closest("abcd", ["abce", "abcf"], n=1).count("'") == 2
    assert " or " in closest("abcd", ["abce", "abcf"])
    assert closest("Adamw", ["adamw"]) == "; did you mean 'adamw'?"


def test_closest_path_compares_names_not_folders(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "output").mkdir()
    found = f"; did you mean '{tmp_path}/photos'?"
    assert closest_path(tmp_path / "fotos") == closest_path(tmp_path / "photo" / "train") == found
    assert closest_path(tmp_path / "unlike") == ""
    monkeypatch.chdir(tmp_path)
    assert closest_path("fotos") == "; did you mean 'photos'?"


@pytest.mark.parametrize("rank, printed", [(None, True), ("0", True), ("1", False)])
def test_usage_errors_end_every_rank_with_2(monkeypatch, capsys, rank, printed):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    monkeypatch.setattr("qna_timm.training.errors.ignore_signals", lambda: None)
    monkeypatch.setattr("qna_timm.training.errors._end", sys.exit)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)

    def main():
        raise UsageError("--lr: two\nlines")

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("train.py: error: --lr: two lines\n" if printed else "")
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: 143)
    assert stop.value.code == 143
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)


ENDING = """
import atexit, sys, threading, time
from qna_timm.training.errors import run_cli

class Last:
    def __del__(self):
        print("taken apart")

def main():
    threading.Thread(target=lambda: time.sleep(0.2) or print("thread")).start()
    return 143

kept, _ = Last(), atexit.register(print, "at exit")
run_cli(main)
"""


@pytest.mark.parametrize("rank, last", [("", ["taken apart"]), ("1", [])])
def test_one_of_several_processes_ends_before_objects_do(rank: str, last: list[str]) -> None:
    """Else gloo's threads, which hold tensors, may abort it; all else is done as ever."""
    command = [sys.executable, "-c", ENDING]
    settings = {"capture_output": True, "text": True, "timeout": 100, "check": False}
    done = subprocess.run(command, env={**os.environ, "RANK": rank}, **settings)
    assert done.returncode == 143 and done.stderr == ""
    assert done.stdout.split("\n") == ["thread", "at exit", *last, ""]
