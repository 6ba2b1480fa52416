#!/usr/bin/env python
"""What exact resume and watching for faults cost: a training step with and without, and a start.

    python benchmarks/bench_protection.py [--models qna_vit_tiny resnet18] [--batch-size 8] \\
        [--rounds 100] [--out benchmarks/results/NAME.csv]

Steps of one process, float32, the optimizer's included, of one and the same model, taken in turns
(ratios of wall time and of processor time are medians over neighbours, with the interval that holds
the median in 95 of 100 runs): `with` is the training loop as it is; `without` neither seeds the
generators for each batch, nor copies buffers, nor looks at losses and gradients, nor asks whether
to stop or to save. A machine's noise is larger than what is to be shown; so the same two loops also
step a stand-in that has the model's parameters and buffers and next to no network, and the
difference is told as a share of the whole model's step (`price`): protection looks at parameters,
gradients, buffers and the loss alone. Beside them the state file: seconds to write it, and their
share of the time between two at the default --checkpoint-interval. Then whole processes of train.py
on digits: seconds from their start to the end of the first update, for a new run and for one that
goes on inside an epoch.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import timm
import torch
from arguments import device_name, model_name, positive_number, whole_number
from measuring import Timing, median_interval, paired_ratio, quartiles, ratios, time_rounds
from reporting import Row, quartile_text, run_benchmark
from torch import Tensor, nn

import qna_timm  # noqa: F401  (registers its models)
from qna_timm.training.control import Decision
from qna_timm.training.flags.intervals import parse_interval
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.loop import Trainer
from qna_timm.training.precision import Precision
from qna_timm.training.processes.distributed import Processes
from qna_timm.training.resume import Position, collect_state
from qna_timm.training.storage.state_files import save_state
from qna_timm.training.task import TrainTask

Batch = tuple[Tensor, Tensor]

ROOT = Path(__file__).resolve().parent.parent
NO_RATIOS = dict.fromkeys(("ratio", "ratio_interval", "cpu_ratio", "cpu_ratio_interval"), "")
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


class ParametersAlone(nn.Module):
    """A model's parameters and buffers without its computation.

    Every class of every image has the sum of all parameters for its logit, so that each of them
    gets a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 1000]."""
        total = torch.stack([parameter.sum() for parameter in self.model.parameters()]).sum()
        return total.expand(len(images), 1000)


def make_trainers(module: nn.Module, device: torch.device) -> dict[str, Trainer]:
    """Two loops around one model and one AdamW: what differs is the loop alone."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    args = parse_train_args(["--dataset", "sklearn/digits"])
    task = TrainTask(module, nn.CrossEntropyLoss(), device=device, verbose=False)
    shared = {
        "args": args,
        "processes": Processes(device),
        "precision": Precision(args, device),
    }
    protected = Trainer(task, optimizer, None, **shared)
    bare = BareTrainer(task, optimizer, None, **shared)
    bare.control = bare.buffers = _Unwatched()
    return {"with": protected, "without": bare}


def time_steps(trainers: Mapping[str, Trainer], batch: Batch, rounds: int) -> dict[str, Timing]:
    """Milliseconds of steps of both loops, in turns."""
    epochs = count()
    return time_rounds(
        {
            name: lambda name=name, trainer=trainer: trainer.train_epoch(
                [batch], next(epochs), name
            )
            for name, trainer in trainers.items()
        },
        rounds,
        str(batch[0].device),
        turn_seconds=0,
    )


def step_rows(model: str, args: argparse.Namespace) -> list[Row]:
    """Time of a step of both loops, the price of protection, and of saving."""
    device = torch.device(args.device)
    size = timm.get_pretrained_cfg(model).input_size
    batch = (
        torch.randn(args.batch_size, *size, device=device),
        torch.randint(1000, (args.batch_size,), device=device),
    )
    torch.manual_seed(0)
    module = timm.create_model(model, num_classes=1000).to(device)
    trainers = make_trainers(module, device)
    steps = time_steps(trainers, batch, args.rounds)
    rows = [step_row(model, name, steps) for name in trainers]
    alone = time_steps(make_trainers(ParametersAlone(module), device), batch, args.rounds)
    return [*rows, price_row(model, alone, steps), save_row(model, trainers["with"])]


def step_row(model: str, name: str, timings: Mapping[str, Timing]) -> Row:
    """Time of a step, with its ratio to the other's where it is the protected one."""
    wall = timings[name].wall
    row = {"what": f"step of {model}, {name}", "ms": f"{quartiles(wall)[1]:.1f}"}
    row.update(quartiles=quartile_text(wall), **NO_RATIOS)
    if name == "with":
        other = timings["without"]
        for key, over, under in (("", wall, other.wall), ("cpu_", timings[name].cpu, other.cpu)):
            low, high = median_interval(ratios(over, under))
            row[f"{key}ratio"] = f"{paired_ratio(over, under)[1]:.4f}"
            row[f"{key}ratio_interval"] = f"{low:.4f}-{high:.4f}"
    return row


def price_row(model: str, alone: Mapping[str, Timing], steps: Mapping[str, Timing]) -> Row:
    """Milliseconds that protection adds to a step of the parameters alone, as a share of a step."""
    added = [a - b for a, b in zip(alone["with"].wall, alone["without"].wall, strict=True)]
    step = quartiles(steps["without"].wall)[1]
    low, high = (1 + bound / step for bound in median_interval(added))
    median = quartiles(added)[1]
    return {
        "what": f"price in a step of {model}",
        "ms": f"{median:.2f}",
        "quartiles": quartile_text(added, 2),
        **NO_RATIOS,
        "ratio": f"{1 + median / step:.4f}",
        "ratio_interval": f"{low:.4f}-{high:.4f}",
    }


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
        **NO_RATIOS,
        "ratio": f"{1 + median / 1e3 / interval:.4f}",
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
            **NO_RATIOS,
            "ratio": f"{ratio:.4f}" if name == "resumed" else "",
        }
        for name, seconds in times.items()
    ]


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", type=model_name, nargs="*", default=["qna_vit_tiny", "resnet18"]
    )
    parser.add_argument("--batch-size", type=positive_number, default=8)
    parser.add_argument("--rounds", type=positive_number, default=100)
    parser.add_argument("--starts", type=whole_number, default=3)
    parser.add_argument("--device", type=device_name, default="cpu")
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
