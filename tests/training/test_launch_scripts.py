"""scripts/multinode.sh and scripts/slurm/train.sbatch: what they start, and what they refuse."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from preloaded import programs

ROOT = Path(__file__).resolve().parents[2]
MULTINODE = ROOT / "scripts" / "multinode.sh"
SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "SLURM_", "TORCHELASTIC", "QNA_TIMM_")
# Writes down its arguments, one call a line, and ends with the next of the codes in `codes`.
PYTHON = """#!/bin/bash
echo "$*" >> {folder}/calls
read -r code 2>/dev/null < {folder}/codes || code=0
sed -i 1d {folder}/codes 2>/dev/null
exit "$code"
"""
# Runs a step's command as its only task.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do echo "$1" >> {folder}/srun; shift; done
SLURM_PROCID=0 exec "$@"
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def bash(
    script: Path, *argv: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *argv],
        env=environment(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a Python that only writes down what it should run."""
    write_program(tmp_path / "venv" / "bin" / "python", PYTHON.format(folder=tmp_path))
    write_program(tmp_path / "bin" / "srun", SRUN.format(folder=tmp_path))
    return tmp_path


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.parametrize(
    "argv, told",
    [
        ("", "--nodes is needed"),
        ("--nodes 1", "no name for the run"),
        ("--nodes", "--nodes needs a value"),
        ("--nodes two run", "--nodes two: not a whole number from 1"),
        ("--nodes 0 run", "--nodes 0: not a whole number from 1"),
        ("--nodes 2 run", "--endpoint is needed with --nodes 2"),
        ("--nodes 2 --endpoint a:b run", "--endpoint a:b: not HOST or HOST:PORT"),
        ("--epochs 3 run", "unknown option '--epochs'"),
    ],
)
def test_multinode_mistakes_are_one_line(argv: str, told: str, folder: Path) -> None:
    done = bash(MULTINODE, *argv.split(), PYTHON=str(folder / "venv/bin/python"))
    assert done.returncode == 2 and told in done.stderr
    assert done.stderr.startswith("multinode.sh: error: ") and done.stderr.count("\n") == 1
    assert not calls(folder)


def test_multinode_starts_torchrun(folder: Path) -> None:
    options = "--nodes 2 --nproc 8 --endpoint gpu01 --join-timeout 60"
    argv = [*options.split(), "run-1", "--data-dir", "my data"]
    done = bash(MULTINODE, *argv, PYTHON=str(folder / "venv/bin/python"))
    assert done.returncode == 0, done.stderr
    (call,) = calls(folder)
    assert call == (
        "-m torch.distributed.run --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d"
        " --rdzv-id run-1 --rdzv-endpoint gpu01:29400 --rdzv-conf join_timeout=60 --max-restarts 3"
        f" {ROOT}/train.py --resume auto --experiment run-1 --data-dir my data"
    )


def test_two_machines_on_one(tmp_path: Path) -> None:
    """The same command twice, from the caller's folder, trains one run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    argv = f"--nodes 2 --nproc 1 --endpoint {endpoint} --max-restarts 0 --join-timeout 60 pair"
    flags = "--dataset sklearn/digits --model test_vit --img-size 32 -b 16 -j 0 --device cpu"
    flags += " --epochs 1 --max-steps 1 --val-num-samples 32 --warmup-epochs 0 --output out"
    machines = [
        subprocess.Popen(
            ["bash", str(MULTINODE), *argv.split(), *flags.split()],
            env=environment(PYTHON=str(programs() / "python"), PYTHONPATH=str(ROOT)),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        outputs = [machine.communicate(timeout=100) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert (tmp_path / "out" / "pair" / "last.state.safetensors").is_file()
    assert sum("16 images per process x 2 process(es)" in errors for _, errors in outputs) == 1


def sbatch(folder: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as SLURM's batch step would, with one machine and one task."""
    values = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "QNA_TIMM_VENV": str(folder / "venv"),
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_SUBMIT_DIR": str(ROOT / "scripts"),
        "SLURM_TMPDIR": str(folder / "disk"),
    }
    return bash(SBATCH, *argv, cwd=folder, **{**values, **variables})


def test_sbatch_starts_a_step(folder: Path) -> None:
    done = sbatch(folder, "run-1", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    assert calls(folder) == [f"{ROOT}/train.py --resume auto --experiment run-1 --epochs 3"]
    assert "--cpus-per-task=4" in (folder / "srun").read_text().split()


def test_sbatch_tells_its_usage(folder: Path) -> None:
    done = sbatch(folder, "--help", SLURM_JOB_ID="")
    assert done.returncode == 0 and done.stdout.startswith("usage: sbatch ")
    assert "QNA_TIMM_RESTARTS=N" in done.stdout and not calls(folder)


@pytest.mark.parametrize(
    "argv, variables, told",
    [
        (["run"], {"SLURM_JOB_ID": ""}, "to be submitted with sbatch"),
        ([], {}, "no name for the run"),
        (["--epochs", "3"], {}, "'--epochs': the run's name comes before"),
        (["run"], {"SLURM_SUBMIT_DIR": "/usr"}, "no train.py in /usr or above"),
        (["run"], {"QNA_TIMM_VENV": "no/venv"}, "no virtual environment in no/venv"),
        (["run"], {"QNA_TIMM_COPY": "no/data"}, "QNA_TIMM_COPY=no/data: no such"),
        (["run"], {"QNA_TIMM_RESTARTS": "x"}, "QNA_TIMM_RESTARTS=x: not a whole number"),
    ],
)
def test_sbatch_mistakes_are_one_line(
    argv: list[str], variables: dict[str, str], told: str, folder: Path
) -> None:
    done = sbatch(folder, *argv, **variables)
    assert done.returncode == 2 and told in done.stderr
    assert done.stderr.startswith("train.sbatch: error: ") and done.stderr.count("\n") == 1
    assert not calls(folder)


@pytest.mark.parametrize(
    "codes, starts, code",
    [
        ([137, 134, 0], 3, 0),  # killed, aborted, done
        ([137] * 9, 4, 137),  # given up after three restarts
        ([1], 1, 1),  # train.py said why
        ([143], 1, 143),  # stopped by SIGTERM, saved
    ],
)
def test_sbatch_starts_again_after_a_killed_task(
    codes: list[int], starts: int, code: int, folder: Path
) -> None:
    (folder / "codes").write_text("".join(f"{number}\n" for number in codes))
    done = sbatch(folder, "run")
    assert done.returncode == code and len(calls(folder)) == starts
    assert done.stderr.count("starting again") == starts - 1


def test_sbatch_trains_on_a_copy(folder: Path) -> None:
    """The copy is there while the run is, and gone after it."""
    (folder / "data" / "train").mkdir(parents=True)
    (folder / "data" / "train" / "a.txt").write_text("a")
    subprocess.run(
        ["tar", "-cf", str(folder / "data.tar"), "-C", str(folder / "data"), "."], check=True
    )
    python = folder / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/bash\ncat "${{@: -1}}/train/a.txt" >> {folder}/calls\n')
    for source in ("data", "data.tar"):
        done = sbatch(folder, "run", QNA_TIMM_COPY=str(folder / source))
        assert done.returncode == 0, done.stderr
    assert calls(folder) == ["aa"]
    assert list((folder / "disk").iterdir()) == []


def test_sbatch_asks_slurm_for_what_it_needs() -> None:
    lines = SBATCH.read_text().splitlines()
    for option in ("--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}" in lines
