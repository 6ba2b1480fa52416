"""The link between two nodes is cut: both end in time, one only wrote, the run goes on exactly."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from two_nodes import ADDRESSES, TwoNodes

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 6
FLAGS = (
    "--dataset sklearn/digits --model test_vit --img-size 32 -b 16 -j 0 --device cpu --opt adamw"
    " --lr 1e-3 --warmup-epochs 0 --epochs 2 --max-steps 5 --val-num-samples 32 --mixup 0.2"
    f" --checkpoint-interval 1 --dist-timeout {TIMEOUT} --resume auto"
)


def start_run(nodes: TwoNodes, output: Path, name: str) -> list[subprocess.Popen[str]]:
    """One process of a run on each node."""
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS.split()]
    command += ["--output", str(output), "--experiment", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29400", "WORLD_SIZE": "2"}
    return [
        nodes.start(rank, command, {**environment, "RANK": str(rank), "LOCAL_RANK": "0"})
        for rank in range(2)
    ]


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
    state = output / name / "last.state.safetensors"
    processes = start_run(nodes, output, name)
    waited = time.monotonic() + 60
    while not state.is_file() and time.monotonic() < waited:
        assert all(process.poll() is None for process in processes), end_run(processes, 10)
        time.sleep(0.02)
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


def test_link_is_cut(tmp_path: Path) -> None:
    """The second node cannot write to the run folder, and never wants to."""
    try:
        nodes = TwoNodes(read_only=tmp_path)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    with nodes:
        cut_and_resume(nodes, tmp_path, "cut")
        for code, errors in end_run(start_run(nodes, tmp_path, "whole"), 100):
            assert code == 0, errors
    files = [tmp_path / name / "last.state.safetensors" for name in ("cut", "whole")]
    cut, whole = (load_file(file) for file in files)
    assert cut.keys() == whole.keys()
    assert [name for name in cut if not cut[name].equal(whole[name])] == []
    cut_rows, whole_rows = (file.with_name("summary.csv").read_text() for file in files)
    assert cut_rows == whole_rows
