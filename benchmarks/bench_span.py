#!/usr/bin/env python
"""Local self-attention with learned spans, against unfolded keys and timm's halo attention.

    python benchmarks/bench_span.py [--kernels 5 7 11] [--models] [--profile] [--device cuda] \\
        [--out benchmarks/results/NAME.csv]

One layer, 64 channels, 4 heads, on maps of 50 x 32 x 32, float32, forward and forward + backward:

    native     SpanAttention by compiled functions, on a CPU
    tiles      SpanAttention in PyTorch's operators
    offsets    the same, offset by offset through autograd
    unfold     tests/span_reference.py: the released formulation, [B, C, H, W, k, k] keys
    triton     SpanAttention's Triton kernels, on a GPU
    halo       timm's HaloAttn, blocks of 8 x 8 that see the window around each of their positions

--models adds sa_resnet_medium_adaptive and sa_resnet_medium_local, as 'auto' computes them, in
tiles, and with unfolded keys. One process, rounds interleaved: medians of wall time with quartiles,
and of processor time. Peak memory is what a process of its own needs for a training step beyond
what it had before. --profile prints where a step spends its time.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from arguments import device_name, odd_number, positive_number
from measuring import compare
from reporting import Row, print_profile, run_benchmark, speedup_columns
from timm.layers.halo_attn import HaloAttn
from torch import nn

import qna_timm  # noqa: F401  registers the models
from qna_timm.layers import SpanAttention
from qna_timm.ops.span.native import unsupported

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from span_reference import UnfoldedAttention

BATCH, CHANNELS, HEADS, SIZE = 50, 64, 4, 32
LAYERS = ("native", "tiles", "offsets", "unfold", "halo", "triton")
NETWORKS = ("auto", "tiles", "unfold")
MODELS = ("sa_resnet_medium_adaptive", "sa_resnet_medium_local")
QUICK = {"kernels": [3], "batch": 1, "rounds": 1}


def make_layer(form: str, kernel_size: int) -> nn.Module:
    """A layer by form."""
    torch.manual_seed(0)
    if form == "halo":
        radius = kernel_size // 2
        return HaloAttn(CHANNELS, num_heads=HEADS, block_size=8, halo_size=radius)
    impl = "auto" if form == "unfold" else form
    layer = SpanAttention(CHANNELS, CHANNELS, HEADS, kernel_size, impl=impl)
    return UnfoldedAttention(layer) if form == "unfold" else layer


def make_model(name: str, form: str) -> nn.Module:
    """A network by name, its attention as form says."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for parent in list(model.modules()):
        for child, layer in parent.named_children():
            if isinstance(layer, SpanAttention) and form == "unfold":
                setattr(parent, child, UnfoldedAttention(layer))
            elif isinstance(layer, SpanAttention):
                layer.impl = form
    return model


def make_call(case: str, form: str, mode: str, args: argparse.Namespace) -> Callable[[], None]:
    """The call to measure of a case, a kernel size or a model's name."""
    if case.isdigit():
        module, shape = make_layer(form, int(case)), (args.batch, CHANNELS, SIZE, SIZE)
    else:
        module, shape = make_model(case, form), (args.batch, 3, SIZE, SIZE)
    module = module.to(args.device).train()
    x = torch.randn(shape, device=args.device, requires_grad=case.isdigit())

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def step() -> None:
        module(x).square().mean().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return step if mode == "step" else forward


def rows_of(case: str, forms: Sequence[str], args: argparse.Namespace) -> list[Row]:
    """A row for every form and mode; ratios are to the unfolded form."""
    rows = []
    for mode in ("forward", "step"):
        makers = {form: partial(make_call, case, form, mode, args) for form in forms}
        results = compare(makers, args.rounds, args.device)
        base = results["unfold"].timing if "unfold" in results else None
        for form, result in results.items():
            row = {"case": case, "form": form, "mode": mode}
            row.update(speedup_columns(result, base))
            rows.append(row)
    return rows


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=odd_number, nargs="*", default=[5, 7, 11])
    parser.add_argument("--forms", nargs="+", choices=LAYERS, help="all that suit the device")
    parser.add_argument("--batch", type=positive_number, default=BATCH, help="maps, or images")
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--rounds", type=positive_number, default=5)
    parser.add_argument("--models", action="store_true", help="training steps of whole networks")
    parser.add_argument("--profile", action="store_true", help="print operators of steps")
    return parser


def _serves(form: str, device: str) -> bool:
    if form == "native":
        return unsupported(torch.empty(0, device=device)) is None
    return form != "triton" or device != "cpu"


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of each kernel size, then of whole networks."""
    forms = args.forms or [form for form in LAYERS if _serves(form, args.device)]
    cases = {str(kernel_size): forms for kernel_size in args.kernels}
    if args.models:
        cases.update({model: NETWORKS for model in MODELS})
    for case, names in cases.items():
        yield rows_of(case, names, args)
        if args.profile:
            title = f"{f'kernel {case}' if case.isdigit() else case}, step"
            print_profile(title, make_call(case, names[0], "step", args), args.device)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write a CSV file if asked to."""
    run_benchmark(make_parser(), QUICK, measure, argv)


if __name__ == "__main__":
    main()
