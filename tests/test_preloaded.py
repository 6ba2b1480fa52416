"""Pythons of `preloaded` behave as plain ones do; where one process tests, these are plain ones."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from preloaded import programs


def python(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [programs() / "python", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **settings)


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([programs() / "python", "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "ends", "says"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('in words')", 1, "in words"),
        ("import nothing_of_the_kind", 1, "ModuleNotFoundError"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_ends_as_its_script_does(code: str, ends: int, says: str) -> None:
    done = python("-c", code)
    assert done.returncode == ends and says in done.stderr


def test_folder_environment_arguments_and_files(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['SAID'], sys.argv, sys.stdin.read())"
    settings = {"cwd": tmp_path, "env": {**os.environ, "SAID": "this"}}
    done = python("-c", code, "a", "b", input="given", **settings)
    assert done.stdout == f"{tmp_path} this ['-c', 'a', 'b'] given\n"
    (tmp_path / "script.py").write_text("import helper, sys; print(helper.NAME, sys.argv)")
    (tmp_path / "helper.py").write_text("NAME = __name__")
    done = python("-u", str(tmp_path / "script.py"), "c")
    assert done.stdout == f"helper ['{tmp_path}/script.py', 'c']\n"
    assert python("-", "d", input="import sys; print(sys.argv)").stdout == "['-', 'd']\n"
    done = python("-m", "platform", "--terse")
    assert done.returncode == 0 and done.stdout.strip()


def test_signals_are_passed_on() -> None:
    code = "import signal, time, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7));"
    for signum, ends in ((signal.SIGUSR1, 7), (signal.SIGTERM, -signal.SIGTERM)):
        # a signal just before a sleep does not end it, in any Python: short ones
        process = start(code + "print(0, flush=True)\nwhile True: time.sleep(0.01)")
        process.stdout.readline()
        process.send_signal(signum)
        assert process.wait(30) == ends


def test_killed_with_its_caller() -> None:
    process = start("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
