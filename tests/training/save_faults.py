"""Run by test_files_killed.py: saves in processes of their own, each with one fault.

    python save_faults.py FOLDER patched  # SIGKILL at the n-th call of Python: FOLDER/patched/n
    python save_faults.py FOLDER kill     # at the n-th CALL to the system: FOLDER/kill/CALL-n
    python save_faults.py FOLDER ENOSPC   # that error of the n-th CALL: FOLDER/ENOSPC/CALL-n
    python save_faults.py FOLDER full     # in a FOLDER that has room for less than two saves

Each of these folders gets two saves; a third meets the fault. Calls are tried one after the other
until a save needs no more of them. Prints one line of JSON per save that met a fault.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from faulty_calls import FaultyCalls, save_two, small_state

from qna_timm.training.storage.state_files import STATE_NAME, load_state, save_state

MOST = 16  # calls of one kind in a save, and more
# strace counts the calls of each process and strikes at this one: others are made up beforehand.
STRIKE = 100
# Names of a call on different machines, and a harmless one to count.
CALLS: dict[str, tuple[str, Callable[[int], object]]] = {
    "openat": ("openat", lambda file: os.close(os.open(os.devnull, os.O_RDONLY))),
    "write": ("write", lambda file: os.write(file, b"")),
    "fsync": ("fsync", os.fsync),
    "rename": ("?rename,?renameat,?renameat2", lambda file: os.rename("/none/a", "/none/b")),
    "link": ("?link,?linkat", lambda file: os.link("/none/a", "/none/b")),
    "unlink": ("?unlink,?unlinkat", lambda file: os.unlink("/none/a")),
}


def exit_code(act: Callable[[], None]) -> int:
    """Of a forked process that acts; 100 for an OSError, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 101
        try:
            act()
            code = 0
        except OSError:
            code = 100
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def met_fault(folder: Path, act: Callable[[], None]) -> bool:
    """Whether the save in this folder met its fault, which is printed."""
    code = exit_code(act)
    if code:
        print(json.dumps({"mode": folder.parent.name, "save": folder.name, "code": code}))
    return code != 0


def patched(folder: Path) -> None:
    """Kill the process itself before one of the calls that Python makes."""
    for number in range(1, 4 * MOST):
        target = folder / str(number)
        save_two(target)

        def act(number: int = number, target: Path = target) -> None:
            calls = FaultyCalls(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            calls.install(pytest.MonkeyPatch())
            save_state(target / STATE_NAME, small_state(3))

        if not met_fault(target, act):
            return


@contextmanager
def traced(fault: str) -> Iterator[None]:
    """While entered, processes forked here meet the fault at their STRIKE-th call of a kind."""
    names = ",".join(names for names, _ in CALLS.values())
    # Yama lets a process be traced by its child only if it says so.
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={names}"]
    command += ["-e", f"inject={names}:{fault}:when={STRIKE}", "-p", str(os.getpid())]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as strace:
        try:
            while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
                if strace.poll() is not None:
                    sys.exit("strace may not trace here")
                time.sleep(0.01)
            yield
        finally:
            strace.terminate()


def struck(folder: Path, fault: str) -> None:
    """Let strace put the fault at one of the calls that the system sees."""
    for name in CALLS:
        for number in range(1, MOST):
            shutil.copytree(folder.parent / "two", folder / f"{name}-{number}")
    with traced(fault):
        for name, (_, dummy) in CALLS.items():
            for number in range(1, MOST):
                target = folder / f"{name}-{number}"

                def act(
                    name: str = name,
                    dummy: Callable = dummy,
                    number: int = number,
                    target: Path = target,
                ) -> None:
                    file = os.open(os.devnull, os.O_WRONLY)
                    for _ in range(STRIKE - number - (name == "openat")):
                        with suppress(OSError):
                            dummy(file)
                    save_state(target / STATE_NAME, small_state(3))

                if not met_fault(target, act):
                    break


def full(folder: Path) -> None:
    """Save where there is no room for the new file beside the old one."""
    path = folder / STATE_NAME
    save_state(path, small_state(1, size=120_000))
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            save_state(path, small_state(2, size=150_000))
        assert load_state(path)["position"]["updates"] == 1
        assert os.listdir(folder) == [STATE_NAME]
    save_state(path, small_state(3, size=100_000))
    assert load_state(path)["position"]["updates"] == 3


def main() -> None:
    place = Path(sys.argv[1])
    if sys.argv[2] == "full":
        full(place)
        return
    save_two(place / "two")  # imports what a first save imports, too
    for mode in sys.argv[2:]:
        (place / mode).mkdir()
        if mode == "patched":
            patched(place / mode)
        else:
            struck(place / mode, "signal=KILL" if mode == "kill" else f"error={mode}")


if __name__ == "__main__":
    main()
