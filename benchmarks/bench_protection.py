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
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import timm
import torch
from arguments import device, model, positive, whole
from measuring import Timing, paired_ratio, quartiles, time_rounds
from reporting import Row, quartile_text, run_benchmark
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
QUICK = {"models": ["test_vit"], "batch_size": 2, "rounds": 2, "starts": 1}


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


def step_rows(model: str, args: argparse.Namespace) -> list[Row]:
    """Seconds of a step of both kinds, and of saving."""
    device = torch.device(args.device)
    size = timm.get_pretrained_cfg(model).input_size
    batch = (
        torch.randn(args.batch_size, *size, device=device),
        torch.randint(1000, (args.batch_size,), device=device),
    )
    trainers = {"with": make_trainer(model, False, device)}
    trainers["without"] = make_trainer(model, True, device)
    epochs = count()
    timings = time_rounds(
        {
            name: lambda name=name, trainer=trainer: trainer.train_epoch(
                [batch], next(epochs), name
            )
            for name, trainer in trainers.items()
        },
        args.rounds,
        args.device,
        turn_seconds=0,
    )
    rows = [step_row(model, name, timings) for name in trainers]
    return [*rows, save_row(model, trainers["with"])]


def step_row(model: str, name: str, timings: dict[str, Timing]) -> Row:
    """Time of a step, with its ratio to the other's where it is the protected one."""
    wall = timings[name].wall
    row = {"what": f"step of {model}, {name}", "ms": f"{quartiles(wall)[1]:.1f}"}
    row.update(quartiles=quartile_text(wall), ratio="", cpu_ratio="")
    if name == "with":
        other = timings["without"]
        row["ratio"] = f"{paired_ratio(wall, other.wall)[1]:.4f}"
        row["cpu_ratio"] = f"{paired_ratio(timings[name].cpu, other.cpu)[1]:.4f}"
    return row


def save_row(model: str, trainer: Trainer) -> Row:
    """Milliseconds of writing the state, and its share of the default interval."""
    interval = parse_interval(trainer.args.checkpoint_interval).seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.state.safetensors"

        def save() -> None:
            save_state(path, collect_state(trainer, Position(), {}))

        wall = time_rounds({"save": save}, 5, turn_seconds=0)["save"].wall
        size = path.stat().st_size / 1e6
    median = statistics.median(wall)
    return {
        "what": f"state of {model}, {size:.0f} MB, every {interval:.0f} s",
        "ms": f"{median:.1f}",
        "quartiles": quartile_text(wall),
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


def start_rows(rounds: int) -> list[Row]:
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


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=model, nargs="*", default=["qna_vit_tiny", "resnet18"])
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--starts", type=whole, default=3)
    parser.add_argument("--device", type=device, default="cpu")
    return parser


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of each model's step, then of starts."""
    for name in args.models:
        yield step_rows(name, args)
    if args.starts:
        yield start_rows(args.starts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write a CSV file if asked to."""
    run_benchmark(make_parser(), QUICK, measure, argv)


if __name__ == "__main__":
    main()
