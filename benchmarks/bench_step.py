#!/usr/bin/env python
"""What one training step consists of: computing, summing gradients over processes, saving.

    python benchmarks/bench_step.py [--model qna_vit_tiny] [--batch-size 8] [--device cpu] \\
        [--out benchmarks/results/NAME.csv]

Prints medians with quartiles: forward, backward and update of one process in float32; writing and
reading a state file with weights, their average and the optimizer; between two processes of this
machine (gloo) one all-reduce of as many bytes as the gradients have, one of three flags, and the
step that contains both. With --paper nothing is measured: what docs/scaling.md expects of many
GPUs is computed.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from arguments import device_name, model_name, positive_number
from measuring import Call, fresh_processes, time_rounds
from reporting import Row, quartile_text, run_benchmark
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qna_timm  # noqa: F401  (registers its models)
from qna_timm.training.storage.state_files import load_state, save_state

MB, GB, MS, US = 1e6, 1e9, 1e-3, 1e-6
QUICK = {"model": "test_vit", "batch_size": 2, "rounds": 1}

# What --paper assumes. Parameters and seconds of a step on one H100; see docs/scaling.md.
WORKLOADS = {
    "qna_vit_tiny, 128 images": (15.72e6, 128 / 1000),
    "qna_vit_tiny, 16 images": (15.72e6, 16 / 1000),
    "qna_vit_base, 128 images": (55.67e6, 128 / 400),
}
# Bytes per second that one machine sends, 80 % of the link's.
LINKS = {"8 x 400 Gb/s": 320 * GB, "100 Gb/s": 10 * GB, "25 Gb/s": 2.5 * GB, "10 Gb/s": 1 * GB}
GPUS_PER_MACHINE, INNER_BANDWIDTH, INNER_LATENCY, LATENCY = 8, 300 * GB, 3 * US, 10 * US
BUCKET_BYTES = 25e6


def time_row(what: str, call: Call, rounds: int, device: torch.device, digits: int = 0) -> Row:
    """Median and quartiles of a call, in milliseconds."""
    wall = time_rounds({what: call}, rounds, str(device), turn_seconds=0)[what].wall
    median = f"{statistics.median(wall):.{digits}f}"
    return {"what": what, "ms": median, "quartiles": quartile_text(wall, digits)}


class Step:
    """Forward, backward and update of a model on one fixed batch."""

    def __init__(self, args: argparse.Namespace, distributed: bool = False) -> None:
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        model = timm.create_model(args.model, num_classes=1000).to(self.device)
        size = model.default_cfg["input_size"][-1]
        self.net = DistributedDataParallel(model) if distributed else model
        self.model: nn.Module = model
        self.optimizer = torch.optim.AdamW(model.parameters())
        self.ema = ModelEmaV3(model)
        self.input = torch.randn(args.batch_size, 3, size, size, device=self.device)
        self.target = torch.randint(1000, (args.batch_size,), device=self.device)

    def compute(self) -> None:
        """One step without the average."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(self.input), self.target).backward()
        self.optimizer.step()

    def state(self) -> dict[str, object]:
        """What a resume needs, or nearly."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }


def communicate(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Of two processes: the all-reduce of all gradients alone, and the step that contains it."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    step = Step(args, distributed=True)
    gradients = torch.zeros(sum(p.numel() for p in step.model.parameters()))
    flags = torch.zeros(3, dtype=torch.int32)
    name, images = "gloo, 2 processes:", args.batch_size
    calls = (
        (
            f"{name} all-reduce of {gradients.nbytes / MB:.1f} MB",
            partial(dist.all_reduce, gradients),
        ),
        (f"{name} all-reduce of 3 flags", partial(dist.all_reduce, flags)),
        (f"{name} step of {images} images each", step.compute),
    )
    rows = [
        time_row(what, call, args.rounds, step.device, 2 if "flags" in what else 0)
        for what, call in calls
    ]
    dist.destroy_process_group()
    if rank == 0:
        torch.save(rows, Path(folder) / "rows")


def ring_seconds(members: int, size: float, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce: ``2 (P - 1) / P size / bandwidth + 2 (P - 1) latency``."""
    rounds = 2 * (members - 1)
    return rounds / members * size / bandwidth + rounds * latency


def efficiency(gpus: int, parameters: float, step: float, bandwidth: float) -> tuple[float, float]:
    """Seconds to sum all gradients, and the share of its time that a GPU computes.

    The sum is a ring within each machine and one between machines. Buckets travel during the
    backward pass, two thirds of the step; the last one cannot.
    """
    size, machines = 4 * parameters, max(1, gpus // GPUS_PER_MACHINE)
    inner = ring_seconds(min(gpus, GPUS_PER_MACHINE), size, INNER_BANDWIDTH, INNER_LATENCY)
    total = inner + ring_seconds(machines, size, bandwidth, LATENCY)
    exposed = max(total - 2 / 3 * step, total / math.ceil(size / BUCKET_BYTES))
    return total, step / (step + exposed)


def print_paper() -> None:
    """The table of docs/scaling.md, in Markdown."""
    counts = (8, 64, 512)
    print("| step | link between machines |" + "".join(f" {count} GPUs |" for count in counts))
    print("|:--|:--|" + "--:|" * len(counts))
    for name, (parameters, step) in WORKLOADS.items():
        for link, bandwidth in LINKS.items():
            cells = []
            for count in counts:
                total, share = efficiency(count, parameters, step, bandwidth)
                cells.append(f" {100 * share:.1f} % ({total / MS:.1f} ms) |")
            print(f"| {name} | {link} |" + "".join(cells))


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=model_name, default="qna_vit_tiny")
    parser.add_argument("--batch-size", type=positive_number, default=8)
    parser.add_argument("--rounds", type=positive_number, default=7)
    parser.add_argument(
        "--device", type=device_name, default="cpu", help="of the step of one process and the files"
    )
    parser.add_argument("--paper", action="store_true", help="compute, measure nothing")
    return parser


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of one process, then of two."""
    if args.paper:
        print_paper()
        return
    step = Step(args)
    parameters = sum(p.numel() for p in step.model.parameters())
    print(f"{args.model}: {parameters / 1e6:.2f} M parameters, {4 * parameters / MB:.1f} MB summed")
    what = f"one process: step of {args.batch_size} images"
    yield [time_row(what, step.compute, args.rounds, step.device)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.state.safetensors"
        save_state(path, step.state())
        what = f"state file of {path.stat().st_size / MB:.1f} MB:"
        for verb, call in (
            ("write", lambda: save_state(path, step.state())),
            ("read", lambda: load_state(path)),
        ):
            yield [time_row(f"{what} {verb}", call, args.rounds, step.device)]
        args.device = "cpu"
        method = fresh_processes().get_start_method()
        mp.start_processes(communicate, (args, folder), nprocs=2, start_method=method)
        yield torch.load(Path(folder) / "rows")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure or compute, print, and write a CSV file if asked to."""
    parser = make_parser()
    parser.set_defaults(threads=1)  # of each process
    run_benchmark(parser, QUICK, measure, argv)


if __name__ == "__main__":
    main()
