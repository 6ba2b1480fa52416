"""The scripts on a GPU, emulated where there is none: the CPU's numbers, exact resume."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.utils.backend_registration as registration
from killing import ROOT, contents, differing, free_port, to_the_end
from preloaded import programs
from short_runs import summary
from test_processes import plain_environment, slurm_task

from qna_timm.training.storage.state_files import PREVIOUS_NAME, STATE_NAME

REAL = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not (REAL or hasattr(registration, "_setup_privateuseone_for_python_backend")),
    reason="there is no GPU, and this PyTorch has no devices written in Python",
)
emulated = pytest.mark.skipif(REAL, reason="there is a GPU")
DEVICE = "cuda" if REAL else "emulated"
TOLERANCE = 1e-2 if REAL else 1e-4  # a GPU multiplies in TF32
ACCELERATOR = Path(__file__).with_name("accelerator.py")
EVERYTHING = (
    "--model test_vit --mixup 0.8 --cutmix 1 --aa rand-m5 --reprob 0.5 --drop-path 0.1 --drop 0.1"
    " --model-ema --model-ema-decay 0.9 --grad-accum-steps 2 --clip-grad 1"
)
AMP = "--amp --amp-dtype bfloat16"
CASES = {
    "everything": f"{EVERYTHING} --no-prefetcher",
    "prepared there": "--model test_vit --channels-last --bce-loss --clip-grad 0.1 --clip-mode agc",
    "checkpointed": (
        "--model qna_vit_tiny --model-kwargs embed_dim=32 qna_num_heads=(4,4,8,8)"
        " window_num_heads=(4,4,8,8) --drop-path 0.2 --grad-checkpointing -b 8 --max-steps 2"
    ),
    "branches": "--model ga_backbone --model-kwargs backbone=test_vit --ga-lam 0.8",
    "spans": (
        "--device-modules span_model --model test_spans --span-penalty 1e-2 --opt sgd"
        " --momentum 0.9"
    ),
}


def flags(more: str, output: Path, device: str = DEVICE) -> list[str]:
    """The command line of a run of seconds; what comes later goes before."""
    words = (
        "--dataset sklearn/digits --img-size 32 -b 16 -j 0 --opt adamw --lr 1e-3 --epochs 2"
        " --warmup-epochs 1 --max-steps 3 --val-num-samples 48 --log-interval 100"
        f" --experiment run --device {device} {more}"
    )
    return [*words.split(), "--output", str(output)]


def start(
    script: str, argv: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A script where there is the device."""
    emulator = [] if REAL else [ACCELERATOR]
    return subprocess.Popen(
        [programs() / "python", *emulator, ROOT / script, *argv],
        env={
            **plain_environment(),
            "PYTHONPATH": f"{ROOT}:{ACCELERATOR.parent}",
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it printed until its end."""
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed[-3000:]
    return printed


def assert_same_rows(folder: Path, other: Path) -> None:
    """The same losses but for rounding; an accuracy would hang on logits that are nearly equal."""
    rows, others = summary(folder), summary(other)
    assert len(rows) == len(others) == 2
    for row, wanted in zip(rows, others, strict=True):
        for name in filter(lambda name: "loss" in name, wanted):
            assert math.isclose(float(row[name]), float(wanted[name]), rel_tol=TOLERANCE), name


@pytest.mark.parametrize(
    "case",
    # a run that is killed, below, has everything
    [
        *(pytest.param(x, marks=pytest.mark.thorough) for x in ("everything", "checkpointed")),
        *("prepared there", "branches", "spans"),
    ],
)
def test_same_as_on_the_cpu(train: ModuleType, tmp_path: Path, case: str) -> None:
    finish(start("train.py", flags(CASES[case], tmp_path / "there")))
    to_the_end(train, flags(CASES[case], tmp_path / "here", "cpu"), tmp_path / "log")
    assert_same_rows(tmp_path / "there" / "run", tmp_path / "here" / "run")


@emulated
def test_tensors_do_not_mix() -> None:
    """Or nothing above would be shown."""
    script = "import accelerator, torch; accelerator.install(); "
    script += "torch.ones(2, device='emulated') + torch.ones(2)"
    ended = subprocess.run(
        [programs() / "python", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ACCELERATOR.parent)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and "expected all tensors on emulated" in ended.stderr


def test_killed_and_resumed_and_validated(in_own_folder: None) -> None:
    """Batches made ready on the device, in bfloat16, with what is drawn there."""
    output, straight = Path("output"), Path("straight")
    saved = "--checkpoint-interval 1 --resume auto --epochs 1 --deterministic"
    argv = flags(f"{EVERYTHING} {AMP} {saved}", output)
    finish(start("train.py", argv))
    wanted = contents(output / "run")
    output.rename(straight)
    run = start("train.py", argv)
    while not (output / "run" / STATE_NAME).exists():
        assert run.poll() is None, finish(run)
        time.sleep(0.01)
    run.kill()
    finish(run, -signal.SIGKILL)
    assert "resumed output/run" in finish(start("train.py", argv))
    assert set(differing(wanted, contents(output / "run"))) <= {PREVIOUS_NAME}

    best = output / "run" / "best.safetensors"
    words = f"--checkpoint {best} --use-ema {AMP} --num-samples 48 -b 16 -j 0 --device {DEVICE}"
    printed = finish(start("validate.py", words.split())).split("--result\n")[1]
    found, _ = json.JSONDecoder().raw_decode(printed)
    top1s = [float(row["eval_top1_ema"]) for row in summary(output / "run")]
    assert found["top1"] == pytest.approx(max(top1s), abs=1e-3)


@pytest.mark.skipif(REAL and torch.cuda.device_count() < 2, reason="there is one GPU only")
def test_processes_of_slurm_with_a_device_each(train: ModuleType, tmp_path: Path) -> None:
    """Each task sees one: two have the gradients and the sums of one process, here on the CPU."""
    to_the_end(train, flags("--model test_vit", tmp_path / "one", "cpu"), tmp_path / "log")
    argv, port = flags("--model test_vit -b 8", tmp_path / "two"), str(free_port())
    ranks = [start("train.py", argv, slurm_task(rank, MASTER_PORT=port)) for rank in range(2)]
    for rank in ranks:
        finish(rank)
    assert_same_rows(tmp_path / "two" / "run", tmp_path / "one" / "run")


@emulated
def test_host_waits_once_an_update(tmp_path: Path) -> None:
    """Whatever is computed besides: the device would run out of work."""
    more = f"{EVERYTHING} --model sa_resnet_small_adaptive -b 4 --epochs 1 --val-num-samples 4"
    reads = []
    for updates in (1, 3):
        argv = flags(f"{more} --max-steps {updates}", tmp_path / str(updates))
        reads.append(int(finish(start("train.py", argv)).split("reads: ")[1]))
    assert reads[1] - reads[0] == 2


def test_update_that_is_not_finite(tmp_path: Path) -> None:
    """On a device gradients are read late; the report has what it has on the CPU."""
    argv = flags("--model test_vit --opt sgd --lr 1e38 --warmup-epochs 0", tmp_path)
    printed = finish(start("train.py", argv), 1)
    assert "epoch 1, update 2: loss is nan (samples " in printed
    assert "first bad tensor patch_embed.proj output" in printed
