"""Files that replace their predecessors whole: written under a temporary name, synced, renamed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

# The names that `replacing` writes to.
TEMPORARY_PATTERN = ".*.tmp"
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; on success it replaces `path` in one step.

    The file is on disk (fsync) before it takes the name, so that a reader, or a machine that lost
    power, finds the old file or the new one, whole. On failure the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # safetensors makes files that only their owner may read.
        os.chmod(temporary, 0o666 & ~_UMASK)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut, where the system can sync folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and a string header to a safetensors file, atomically.

    Tensors are copied to the CPU first, since the format refuses tensors that share memory.
    """
    copies = {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()
    }
    with replacing(path) as temporary:
        save_file(copies, temporary, metadata={"format": "pt", **header})
