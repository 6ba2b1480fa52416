#!/usr/bin/env python
"""What exact resume and watching for faults cost: a training step with and without, and a start.

    python benchmarks/bench_protection.py [--models qna_vit_tiny resnet18] [--batch-size 8] \\
        [--rounds 20] [--out benchmarks/results/NAME.csv]

Steps of one process, float32, the optimizer's included, taken in turns (ratios of wall time and of
processor time are medians over neighbours): `with` is the training
loop as it is; `without` neither seeds the generators for each batch, nor copies buffers, nor looks
at losses and gradients, nor asks whether to stop or to save. Beside them the state file: seconds
to write it, and their share of the time between two at the default --checkpoint-interval. Then
whole processes of train.py on digits: seconds from their start to the end of the first update,
for a new run and for one that goes on inside an epoch.
"""

import argparse
import csv
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import qna_timm  # noqa: F401  (registers its models)
from qna_timm.training.control import Decision
from qna_timm.training.distributed import Processes
from qna_timm.training.intervals import parse_interval
from qna_timm.training.loop import Trainer
from qna_timm.training.precision import Precision
from qna_timm.training.recipe import parse_train_args
from qna_timm.training.resume import Position, collect_state
from qna_timm.training.state_files import save_state
from qna_timm.training.task import TrainTask

ROOT = Path(__file__).resolve().parent.parent


class _Unwatched:
    """Stands in for what protects a run, and does nothing."""

    def keep(self) -> None:
        """Copies no buffers."""

    def decide(self, bad: Tensor) -> Decision:
        """Asks nobody."""
        return Decision(bad=False, signum=0, save=False)

    def count_update(self) -> None:
        """Counts nothing."""


class BareTrainer(Trainer):
    """The loop without protection."""

    def _seed(self, epoch: int, number: int) -> None:
        pass

    def _is_bad(self, group: object) -> bool:
        return False


def make_trainer(model: str, bare: bool, device: torch.device) -> Trainer:
    """A trainer of a model with AdamW."""
    torch.manual_seed(0)
    module = timm.create_model(model, num_classes=1000).to(device)
    args = parse_train_args(["--dataset", "sklearn/digits"])
    task = TrainTask(module, nn.CrossEntropyLoss(), device=device, verbose=False)
    trainer = (BareTrainer if bare else Trainer)(
        task,
        torch.optim.AdamW(module.parameters(), lr=1e-4),
        None,
        args=args,
        processes=Processes(device),
        precision=Precision(args, device),
    )
    if bare:
        trainer.control = trainer.buffers = _Unwatched()
    return trainer


def step_rows(model: str, args: argparse.Namespace) -> list[dict]:
    """Seconds of a step of both kinds, and of saving."""
    device = torch.device(args.device)
    size = timm.get_pretrained_cfg(model).input_size
    batch = (
        torch.randn(args.batch_size, *size, device=device),
        torch.randint(1000, (args.batch_size,), device=device),
    )
    trainers = {"with": make_trainer(model, False, device)}
    trainers["without"] = make_trainer(model, True, device)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    cpu_times: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(args.rounds + 2):
        # the order changes: what runs second finds other things in the caches
        for name in sorted(trainers, reverse=bool(turn % 2)):
            start, cpu_start = time.perf_counter(), time.process_time()
            trainers[name].train_epoch([batch], turn, name)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
                cpu_times[name].append(time.process_time() - cpu_start)
    ratio, cpu_ratio = paired(times), paired(cpu_times)
    rows = []
    for name, seconds in times.items():
        low, median, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
        row = {"what": f"step of {model}, {name}", "ms": f"{median:.1f}"}
        row["quartiles"] = f"{low:.1f}-{high:.1f}"
        row["ratio"] = f"{ratio:.4f}" if name == "with" else ""
        row["cpu_ratio"] = f"{cpu_ratio:.4f}" if name == "with" else ""
        rows.append(row)
    return [*rows, save_row(model, trainers["with"])]


def paired(times: dict[str, list[float]]) -> float:
    """Median ratio of neighbours: what slows the machine down for a while falls out."""
    pairs = zip(times["with"], times["without"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def save_row(model: str, trainer: Trainer) -> dict:
    """Seconds of writing the state, and its share of the default interval."""
    interval = parse_interval(trainer.args.checkpoint_interval).seconds
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.state.safetensors"
        for _ in range(5):
            start = time.perf_counter()
            save_state(path, collect_state(trainer, Position(), {}))
            seconds.append(time.perf_counter() - start)
        size = path.stat().st_size / 1e6
    low, median, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    return {
        "what": f"state of {model}, {size:.0f} MB, every {interval:.0f} s",
        "ms": f"{median:.1f}",
        "quartiles": f"{low:.1f}-{high:.1f}",
        "ratio": f"{1 + median / 1e3 / interval:.4f}",
        "cpu_ratio": "",
    }


def seconds_to_first_update(argv: list[str], number: int) -> float:
    """From the start of a train.py to the line of its first update; the rest is killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        lines = []
        for line in process.stderr:
            lines.append(line)
            if re.match(rf"train \S+ \[{number}/", line):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise RuntimeError("".join(lines[-5:]))


def start_rows(rounds: int) -> list[dict]:
    """Seconds to the first update of new and of resumed runs, in turns."""
    words = "--dataset sklearn/digits --model test_vit --img-size 32 -b 16 -j 0 --device cpu"
    words += " --opt adamw --lr 1e-3 --epochs 3 --max-steps 80 --log-interval 1 --experiment a"
    words += " --resume auto --checkpoint-interval 4"
    times: dict[str, list[float]] = {"new": [], "resumed": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            argv = [*words.split(), "--output", folder]
            times["new"].append(seconds_to_first_update(argv, 1))
            seconds_to_first_update(argv, 10)  # state saved after updates 4 and 8
            times["resumed"].append(seconds_to_first_update(argv, 9))
    ratio = statistics.median(times["resumed"]) / statistics.median(times["new"])
    return [
        {
            "what": f"start of a {name} run to its first update",
            "ms": f"{1e3 * statistics.median(seconds):.0f}",
            "quartiles": f"{1e3 * min(seconds):.0f}-{1e3 * max(seconds):.0f}",
            "ratio": f"{ratio:.4f}" if name == "resumed" else "",
            "cpu_ratio": "",
        }
        for name, seconds in times.items()
    ]


def main() -> None:
    """Measure, print, and write a CSV file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["qna_vit_tiny", "resnet18"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    rows = []
    for model in args.models:
        rows += step_rows(model, args)
    if args.starts:
        rows += start_rows(args.starts)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
