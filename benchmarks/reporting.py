"""What a benchmark's reader needs beside the figures, and files and tables to put them in.

Rows are dicts of one set of keys. A CSV file begins with lines "# key: value" that say where, when,
with which versions and by which command it was made.
"""

import argparse
import csv
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from arguments import parse_arguments
from measuring import Call, Result, Timing, paired_ratio, quartiles
from torch.profiler import ProfilerActivity, profile

from qna_timm.ops.compiled import compiled_attention

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "timm", "qna_timm", "triton", "natten")
# Environment variables that change times on a CPU or a GPU.
VARIABLES = r"OMP_|MKL_|KMP_|GOMP_|ONEDNN_|DNNL_|MALLOC_|LD_PRELOAD|TORCH|PYTORCH_|CUDA_|TRITON_"

Row = Mapping[str, Any]


def _processor() -> str:
    """The processor's name."""
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _memory() -> str:
    """The machine's memory."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return "unknown memory"
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"


def _commit() -> str:
    """The repository's commit, with + if files differ from it."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changes else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def provenance(args: argparse.Namespace) -> dict[str, str]:
    """Where, when, with what and how figures are made."""
    device = getattr(args, "device", "cpu")
    machine = f"{_processor()}, {os.cpu_count()} cores, {_memory()}"
    if device != "cpu":
        machine += f"; {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    versions = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    variables = [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if re.match(VARIABLES, name)
    ]
    return {
        "command": args.command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine,
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()) + " at the start",
        "threads": str(torch.get_num_threads()),
        "versions": f"Python {platform.python_version()}, " + ", ".join(versions),
        "compiled": compiled_attention() or "nothing",
        "commit": _commit(),
        "environment": " ".join(variables),
    }


def print_profile(title: str, call: Call, device: str) -> None:
    """Where a call spends its time: operators by their own time, after a call to warm up."""
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    call()
    with profile(activities=activities) as record:
        call()
    key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    print(f"\n{title}")
    print(record.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40))


def print_header(header: Mapping[str, str]) -> None:
    """On stdout, where the figures will follow."""
    for key, value in header.items():
        print(f"# {key}: {value}")
    print(flush=True)


def print_row(row: Row) -> None:
    """While a benchmark runs."""
    print("  ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)


def short(number: float) -> str:
    """Four digits, and no exponent for large numbers."""
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:.0f}"


def _quartile_columns(key: str, values: tuple[float, float, float]) -> dict[str, str]:
    low, median, high = values
    return {key: short(median), f"{key}_low": short(low), f"{key}_high": short(high)}


def result_columns(result: Result, base: Result) -> dict[str, str]:
    """Columns that say what is known of a candidate, empty where nothing is.

    ms, and ratio, its time over the baseline's in the same round: medians, with quartiles in
    ms_low, ms_high, ratio_low, ratio_high; rounds; peak_mib; memory_ratio, over the baseline's;
    skipped, the reason.
    """
    columns = dict.fromkeys(
        [f"{key}{end}" for key in ("ms", "ratio") for end in ("", "_low", "_high")], ""
    )
    wall = result.timing.wall if result.timing else ()
    if wall:
        columns.update(_quartile_columns("ms", quartiles(wall)))
        if base.timing:
            columns.update(_quartile_columns("ratio", paired_ratio(wall, base.timing.wall)))
    columns.update(rounds=str(len(wall)), peak_mib="", memory_ratio="")
    if result.peak_mib is not None:
        columns["peak_mib"] = short(result.peak_mib)
        if base.peak_mib:
            columns["memory_ratio"] = short(result.peak_mib / base.peak_mib)
    return {**columns, "skipped": result.skipped}


def quartile_text(values: Sequence[float], digits: int = 1) -> str:
    """Lower and upper quartile."""
    low, _, high = quartiles(values)
    return f"{low:.{digits}f}-{high:.{digits}f}"


def speedup_columns(result: Result, base: Timing | None) -> dict[str, Any]:
    """Columns of a candidate whose baseline is the slow one, empty where nothing is known.

    ms, median, with quartiles; cpu_ms, of the processor in all threads; speedup and cpu_speedup,
    a baseline's time over its own in the same round, median; peak_mib; skipped, the reason.
    """
    keys = ("ms", "quartiles", "cpu_ms", "speedup", "cpu_speedup")
    columns: dict[str, Any] = dict.fromkeys(keys, "")
    timing = result.timing
    if timing:
        columns["ms"] = round(quartiles(timing.wall)[1], 1)
        columns["quartiles"] = quartile_text(timing.wall)
        columns["cpu_ms"] = round(quartiles(timing.cpu)[1], 1)
    if timing and base:
        columns["speedup"] = round(paired_ratio(base.wall, timing.wall)[1], 2)
        columns["cpu_speedup"] = round(paired_ratio(base.cpu, timing.cpu)[1], 2)
    columns["peak_mib"] = "" if result.peak_mib is None else round(result.peak_mib, 1)
    columns["skipped"] = result.skipped
    return columns


def time_cell(row: Row, key: str = "ms", unit: str = " ms") -> str:
    """A figure, and the ratio with its spread, for a table."""
    if not row["ms"]:
        return "skipped"
    if not row["ratio"]:
        return f"{row[key]}{unit}"
    ratio, low, high = (float(row[f"ratio{end}"]) for end in ("", "_low", "_high"))
    return f"{row[key]}{unit}, {ratio:.2f}x ({low:.2f}-{high:.2f})"


def memory_cell(row: Row, unit: str = " MiB") -> str:
    """A peak and its ratio, for a table."""
    if not row["peak_mib"]:
        return "skipped" if row["skipped"] else ""
    ratio = f", {float(row['memory_ratio']):.2f}x" if row["memory_ratio"] else ""
    return f"{float(row['peak_mib']):.3g}{unit}{ratio}"


def write_csv(path: Path | None, rows: Sequence[Row], header: Mapping[str, str]) -> None:
    """Writes rows below the header; does nothing without a path or rows."""
    if path is None or not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Rows, all strings, and header of a file that `write_csv` wrote."""
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    header = dict(line[2:].split(": ", 1) for line in comments)
    return list(csv.DictReader(lines[len(comments) :])), header


def markdown_table(
    rows: Iterable[Row], down: str, across: str, cell: Callable[[Row], str]
) -> list[str]:
    """A table with a line for each value of one key and a column for each of another.

    Args:
        rows: At most one for each pair of values.
        down: Key whose values name the lines.
        across: Key whose values name the columns.
        cell: What stands in a row's place.
    """
    cells = {(str(row[down]), str(row[across])): cell(row) for row in rows}
    lines = list(dict.fromkeys(line for line, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    table = [[down, *columns], [":--", *("--:" for _ in columns)]]
    table += [[line, *(cells.get((line, column), "") for column in columns)] for line in lines]
    return ["| " + " | ".join(words) + " |" for words in table]


def print_skipped(rows: Iterable[Row], keys: Sequence[str]) -> None:
    """Below tables: who was skipped, named by the values of keys, and why."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["skipped"]:
            name = " ".join(str(row[key]) for key in keys if key in row)
            reasons.setdefault(row["skipped"], []).append(name)
    print()
    for reason, names in reasons.items():
        print(f"- skipped: {', '.join(names)}: {reason}")


def print_made_by(header: Mapping[str, str]) -> None:
    """One paragraph below tables: what README says about where they come from."""
    threads = f"{header['threads']} thread{'s' if header['threads'] != '1' else ''}"
    print(f"\n{header['machine']}, {threads}; {header['versions']};")
    print(f"commit {header['commit']}, {header['date']}: `{header['command']}`", flush=True)


def run_benchmark(
    parser: argparse.ArgumentParser,
    quick: Mapping[str, Any],
    measure: Callable[[argparse.Namespace], Iterable[Sequence[Row]]],
    argv: Sequence[str] | None,
    report: Callable[[Sequence[Row], Path | None], None] | None = None,
) -> None:
    """A script: measures, prints rows as they come and keeps them in the CSV file.

    Args:
        parser: See `parse_arguments`.
        quick: See `parse_arguments`.
        measure: Gives rows in parts.
        argv: See `parse_arguments`.
        report: Prints tables of all rows and draws figures of them beside the file, if any; with
            it comes --read.
    """
    args = parse_arguments(parser, quick, argv, readable=report is not None)
    rows: list[Row] = []
    if report and args.read:
        rows[:], header = read_csv(args.read)
    else:
        header = provenance(args)
        print_header(header)
        for part in measure(args):
            for row in part:
                print_row(row)
            rows += part
            write_csv(args.out, rows, header)  # so far, should it be interrupted
    if report:
        report(rows, args.out or args.read)
        print_made_by(header)
