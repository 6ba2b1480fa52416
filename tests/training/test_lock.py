"""One run per folder, however the last one ended."""

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qna_timm.training.errors import UsageError
from qna_timm.training.storage import lock
from qna_timm.training.storage.files import replacing
from qna_timm.training.storage.lock import LOCK_NAME, RunLock

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def start_holder(folder: Path) -> tuple[int, int]:
    """A process that holds the lock, and its child: as a loader's worker, it has the file open."""
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            with RunLock(folder, ["train.py", "--model", "a b"]):
                child = os.fork()
                if child == 0:
                    os.write(write, f"{os.getpid()}\n".encode())
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(write)
    with open(read) as ready:
        child = int(ready.readline())
    return holder, child


def test_forked_child_does_not_give_the_lock_back(tmp_path: Path) -> None:
    with RunLock(tmp_path) as held:
        child = os.fork()
        if child == 0:
            held.__exit__(None, None, None)
            code = 2
            try:
                RunLock(tmp_path, patience=0).__enter__()
            except UsageError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (tmp_path / LOCK_NAME).is_file()


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def test_second_run_is_refused(tmp_path: Path) -> None:
    holder, child = start_holder(tmp_path)
    pattern = f"in use by process {holder} on .+ since 20.+: train.py --model 'a b'"
    with pytest.raises(UsageError, match=pattern), RunLock(tmp_path, patience=0.2):
        pass
    assert (tmp_path / LOCK_NAME).is_file()
    end(holder)
    os.waitpid(holder, 0)
    end(child)
    with RunLock(tmp_path):
        pass


def test_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    children = []
    for _ in range(15):  # scripts/stress.sh does it fifty times
        holder, child = start_holder(tmp_path)
        children.append(child)
        end(holder)
        os.waitpid(holder, 0)
        with RunLock(tmp_path, patience=0):  # though the child is alive
            os.kill(child, 0)
    for child in children:
        end(child)


def test_lock_waits_for_a_holder_that_ends(tmp_path: Path) -> None:
    holder, child = start_holder(tmp_path)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder} {child}"])
    with RunLock(tmp_path):
        pass
    killer.wait()
    os.waitpid(holder, 0)


def test_lock_of_a_file_that_was_just_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder ends between our opening the file and locking it."""
    try_lock, removed = lock._try_lock, []

    def late(file: int) -> bool:
        if not removed:
            removed.append(True)
            (tmp_path / LOCK_NAME).unlink()
        return try_lock(file)

    monkeypatch.setattr(lock, "_try_lock", late)
    with RunLock(tmp_path):
        assert (tmp_path / LOCK_NAME).is_file()


def test_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path):
            assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
        assert not list(tmp_path.iterdir())


def test_folder_of_a_killed_run_is_cleared(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "kept") as temporary:
        raise ZeroDivisionError
    temporary.touch()
    (tmp_path / "kept").touch()
    with RunLock(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME, "kept"]


def test_refused_run_touches_nothing(tmp_path: Path) -> None:
    holder, child = start_holder(tmp_path)
    (tmp_path / ".last.safetensors.1.tmp").touch()
    with pytest.raises(UsageError), RunLock(tmp_path, patience=0):
        pass
    assert (tmp_path / ".last.safetensors.1.tmp").is_file()
    end(holder)
    end(child)
    os.waitpid(holder, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_file_systems_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with RunLock(tmp_path):
        pass
    assert [r.getMessage() for r in caplog.records if "cannot be locked" in r.getMessage()]
    assert len(caplog.records) == 1


def test_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", None, raising=False)
    with RunLock(tmp_path):
        pass
    assert "cannot be locked" in caplog.text


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="cannot lock the run folder: No such file"),
        RunLock(tmp_path / "gone"),
    ):
        pass


def test_unreadable_signature(tmp_path: Path) -> None:
    holder, child = start_holder(tmp_path)
    (tmp_path / LOCK_NAME).write_text("not JSON")
    with pytest.raises(UsageError, match="in use by another run"), RunLock(tmp_path, patience=0):
        pass
    end(holder)
    end(child)
    os.waitpid(holder, 0)
