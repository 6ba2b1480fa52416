"""Scripts run as `python SCRIPT ...`, in processes that have imported what takes them seconds."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

PRELOADED = ["torch", "torchvision", "timm", "sklearn.datasets", "matplotlib.figure"]


def _become(words: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = list(words)
    sys.path[0] = str((folder / words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def run_script(
    words: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str], timeout: float
) -> int:
    """Exit code of a script.

    Args:
        words: Its path, seen from `folder`, and its arguments.
        folder: Where it runs.
        log: What it prints is put to the end of this file.
        environment: Variables beside this process's.
        timeout: Seconds after which it is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_become, args=(words, folder, log, dict(environment)))
    process.start()
    process.join(timeout)
    process.kill()
    process.join()
    return process.exitcode
