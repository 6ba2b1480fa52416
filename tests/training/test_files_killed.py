"""Kills and errors at every call of one save, made by the system itself; see save_faults.py."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_calls import small_state, updates_in

from qna_timm.training.storage.files import remove_leftovers
from qna_timm.training.storage.state_files import STATE_NAME, load_state, save_state, whole_state

SCRIPT = Path(__file__).parent / "save_faults.py"
# What can be seen of the states (previous, last) after a third save that was cut short: nothing of
# it, the new state in place, both in place.
STAGES = ([1, 2], [1, 3], [2, 3])


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """By mode and name of the save: its folder and exit code."""
    place = tmp_path_factory.mktemp("faults")
    modes = ["patched"]
    if shutil.which("strace"):
        modes += ["kill", "ENOSPC", "EIO"]
    command = [sys.executable, str(SCRIPT), str(place), *modes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode and "strace may not trace" not in done.stderr:
        pytest.fail(done.stderr)
    saves: dict[str, dict[str, tuple[Path, int]]] = {}
    for line in done.stdout.splitlines():
        met = json.loads(line)
        folder = place / met["mode"] / met["save"]
        saves.setdefault(met["mode"], {})[met["save"]] = (folder, met["code"])
    return saves


def saves_of(faults: dict, mode: str) -> dict[str, tuple[Path, int]]:
    if mode not in faults:
        pytest.skip("strace is missing or may not trace here")
    return faults[mode]


def check_goes_on(folder: Path) -> list[int]:
    """The states seen, after which a run must be able to go on and save again."""
    remove_leftovers(folder)
    updates = updates_in(folder)
    path = whole_state(folder / STATE_NAME)
    assert path.name == STATE_NAME and load_state(path)["position"]["updates"] == updates[1]
    assert len(list(folder.iterdir())) == 2
    save_state(folder / STATE_NAME, small_state(4))
    assert updates_in(folder) == [updates[1], 4]
    assert len(list(folder.iterdir())) == 2
    return updates


@pytest.mark.parametrize("mode", ["patched", "kill"])
def test_killed_at_every_call_of_a_save(faults: dict, mode: str) -> None:
    saves = saves_of(faults, mode)
    assert len(saves) > 12
    seen = []
    for folder, code in saves.values():
        assert code == -9
        seen.append(check_goes_on(folder))
        assert seen[-1] in STAGES
    assert all(stage in seen for stage in STAGES)


@pytest.mark.parametrize("mode", ["ENOSPC", "EIO"])
def test_error_at_every_call_of_a_save(faults: dict, mode: str) -> None:
    saves = saves_of(faults, mode)
    kinds = {name.split("-")[0] for name in saves}
    assert kinds == {"openat", "write", "fsync", "rename", "link", "unlink"}
    for name, (folder, code) in saves.items():
        assert code == 100, name
        assert not list(folder.glob(".*")), f"{name}: a temporary file is left"
        updates = check_goes_on(folder)
        assert updates in STAGES
        if name.split("-")[0] in ("write", "link"):
            assert updates == [1, 2]


def test_disk_without_room(tmp_path: Path) -> None:
    """A file system of a megabyte, of which the first state takes the half."""
    # In a name space of its own the mount ends with the process.
    script = (
        f'mount -t tmpfs -o size=1m none "{tmp_path}" || exit 77;'
        f' exec "{sys.executable}" "{SCRIPT}" "{tmp_path}" full'
    )
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    command = ["unshare", "-rm", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount is allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
