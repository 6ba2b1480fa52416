"""A process killed, the link between nodes cut: all end in time, and the run goes on exactly."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preloaded import programs
from safetensors.torch import load_file
from two_nodes import ADDRESSES, TwoNodes

ROOT = Path(__file__).resolve().parents[2]
STATE = "last.state.safetensors"
TIMEOUT = 6
FLAGS = (
    "--dataset sklearn/digits --model test_vit --img-size 32 -b 16 -j 0 --device cpu --opt adamw"
    " --lr 1e-3 --warmup-epochs 0 --epochs 2 --max-steps 5 --val-num-samples 32 --mixup 0.2"
    f" --checkpoint-interval 1 --dist-timeout {TIMEOUT}"
)


def command(output: Path, name: str, *flags: str) -> list[str]:
    """train.py and its arguments."""
    folder = ["--output", str(output), "--experiment", name]
    return [str(ROOT / "train.py"), *FLAGS.split(), *folder, *flags]


def environment(**more: str) -> dict[str, str]:
    """What every process gets."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def wait_for_state(folder: Path, processes: list[subprocess.Popen[str]]) -> Path:
    """The state file, once the run has saved for the first time."""
    state, ends = folder / STATE, time.monotonic() + 100
    while not state.is_file() and time.monotonic() < ends:
        assert all(process.poll() is None for process in processes), end_run(processes, 10)
        time.sleep(0.02)
    return state


def start_run(nodes: TwoNodes, output: Path, name: str) -> list[subprocess.Popen[str]]:
    """One process of a run on each node."""
    words = [str(programs() / "python"), *command(output, name, "--resume", "auto")]
    meeting = environment(MASTER_ADDR=ADDRESSES[0], MASTER_PORT="29400", WORLD_SIZE="2")
    return [nodes.start(rank, words, {**meeting, "RANK": str(rank)}) for rank in range(2)]


def end_run(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Exit code and messages of each process; the test fails where one takes longer."""
    ends = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=ends - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return [(code, errors) for code, (_, errors) in zip(codes, outputs, strict=True)]


def cut_and_resume(nodes: TwoNodes, output: Path, name: str) -> None:
    """Train on two nodes, cut the link after the first save, connect them again, go on to the end.

    Raises:
        AssertionError: A process did not end in time, or not as it should.
    """
    processes = start_run(nodes, output, name)
    state = wait_for_state(output / name, processes)
    nodes.cut()
    # Leaving may wait as long again for what is under way.
    for code, errors in end_run(processes, 2 * TIMEOUT + 10):
        assert code == 1 and "Traceback" not in errors, errors
        assert "the connection to other processes is lost" in errors
    left = state.read_bytes()
    nodes.connect()
    assert state.read_bytes() == left
    for code, errors in end_run(start_run(nodes, output, name), 100):
        assert code == 0, errors


def kill_one_process(output: Path, name: str) -> str:
    """Train with torchrun and two processes, and kill the second after the first save.

    Returns:
        Messages of torchrun and its processes.

    Raises:
        AssertionError: The run did not come back by itself, or not to its end.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    torchrun = subprocess.Popen(
        [*launcher, *command(output, name)],
        env=environment(PYTHON_EXEC=str(programs() / "python")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_state(output / name, [torchrun])
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    ((code, errors),) = end_run([torchrun], 150)
    assert code == 0, errors
    return errors


def differences(one: Path, other: Path) -> list[str]:
    """What differs in any bit between the results of two runs, by name."""
    first, second = (load_file(folder / STATE) for folder in (one, other))
    names = first.keys() ^ second.keys()
    names |= {name for name in first.keys() - names if not first[name].equal(second[name])}
    rows = [(folder / "summary.csv").read_text() for folder in (one, other)]
    return sorted(names) + (["summary.csv"] if rows[0] != rows[1] else [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the same run, never disturbed."""
    output = tmp_path_factory.mktemp("whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [str(programs() / "python"), *command(output, "run")],
            env=environment(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank)
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for code, errors in end_run(processes, 100):
        assert code == 0, errors
    return output / "run"


def test_killed_process(tmp_path: Path, whole: Path) -> None:
    """torchrun starts all again, without --resume, and nothing is lost but time."""
    errors = kill_one_process(tmp_path, "killed")
    assert "started again: goes on as with --resume auto" in errors
    assert re.search(r"resumed \S+ after 0 whole epochs and \d updates?", errors)
    assert differences(tmp_path / "killed", whole) == []


def test_link_is_cut(tmp_path: Path, whole: Path) -> None:
    """The second node cannot write to the run folder, and never wants to."""
    try:
        nodes = TwoNodes(read_only=tmp_path)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    with nodes:
        cut_and_resume(nodes, tmp_path, "cut")
    assert differences(tmp_path / "cut", whole) == []
