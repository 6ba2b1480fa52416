"""Files that survive: replaced whole or not at all, and damage to their content is noticed.

`replacing` writes under a temporary name and renames. `save_tensors` adds to a safetensors file
its own digest, the sha256 of all its bytes with the digest's 64 hexadecimal digits as zeros, so
that `check_digest` notices any bit that changed since.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qna_timm.training.errors import UsageError

STEP_KEY = "step"
"""Key of a file's header that says in words after which step it was saved."""

_TEMPORARY = ".{name}.{pid}.tmp"
# What a file system says that has no hard links, or no more for this file.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)

# The digest stands at a fixed place, first in the header. The note at the header's end mentions it
# again: no single flip can make a file look as if it had never had one.
_DIGEST = "sha256"
_OPENING = b'{"__metadata__":{"sha256":"'
_ZEROS = "0" * 64
_NOTE = "sha256 is of this whole file, its own 64 digits taken as zeros"
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_CHUNK = 1 << 20

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def replacing(
    path: Path, *, prove: Callable[[Path], None] | None = None, previous: Path | None = None
) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; on success it replaces `path` in one step.

    The file is on disk (fsync) before it takes the name, so that a reader, or a machine that lost
    power, finds the old file or the new one, whole. On failure the temporary file is removed.

    Args:
        path: The file to replace.
        prove: Called with the temporary file once it is on disk; raises if it is not good.
        previous: Name that the old file, if there is one, goes on under.

    Raises:
        OSError: It could not be written; `path` is what it was.
    """
    temporary, old = _temporary(path), None
    # A leftover of the same number may be a second name of a file that is still wanted.
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if prove is not None:
            prove(temporary)
        if previous is not None and path.exists():
            old = _temporary(previous)
            second_name(path, old)
        os.replace(temporary, path)
        # Only now: should `path` have been damaged, `previous` was the last good file until here.
        if old is not None:
            os.replace(old, previous)
    finally:
        for leftover in (temporary, old):
            if leftover is not None:
                leftover.unlink(missing_ok=True)
    sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(_TEMPORARY.format(name=path.name, pid=os.getpid()))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing.

    Only for who owns the folder: the temporary files of a living process are no leftovers.
    """
    for stale in folder.glob(_TEMPORARY.format(name="*", pid="*")):
        stale.unlink(missing_ok=True)


def second_name(path: Path, name: Path) -> None:
    """Let `name` (replaced if it is there) be the same file: a hard link, else a copy on disk.

    Files that are only ever replaced, never written to, stay what they are under either name.
    """
    # Copying onto a leftover link would write to whatever file it links to.
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(path, name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut, where the system can sync folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    *,
    previous: Path | None = None,
) -> None:
    """Write tensors, a string header and their digest to a safetensors file, atomically.

    The digest is taken of what is in memory; the file takes its name only after it was read back
    and found to agree. One tensor at a time is copied to the CPU.

    Args:
        path: Ends in ``.safetensors``.
        tensors: By name; they may share memory and have any strides.
        header: What the file says of itself.
        previous: Name that the old file, if there is one, goes on under.

    Raises:
        OSError: It could not be written; the old file is whole.
        TypeError: A tensor of a kind that the format does not have.
    """
    with replacing(path, prove=_prove, previous=previous) as temporary:
        _write_tensors(temporary, tensors, header)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    # Wide types first: every tensor starts at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    content: dict[str, Any] = {
        "__metadata__": {_DIGEST: _ZEROS, "format": "pt", **header, "digest": _NOTE}
    }
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: tensors of {tensor.dtype} cannot be saved")
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), _DTYPES[tensor.dtype]
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    opening = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(opening)
    with open(path, "xb") as file:
        file.write(opening)
        for name in names:
            flat = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
            data = flat.view(torch.uint8).numpy()
            digest.update(data)
            file.write(data)
        file.seek(8 + len(_OPENING))
        file.write(digest.hexdigest().encode())


def _prove(path: Path) -> None:
    """Read a file back that was just written."""
    damage = find_damage(path, digested=True)
    if damage is not None:
        raise OSError(errno.EIO, f"what was written reads back otherwise: {damage}", str(path))


def check_digest(path: Path, *, digested: bool = False) -> None:
    """See that a safetensors file is what was written, bit for bit.

    Args:
        path: The file; one of others, without a digest, passes.
        digested: Whether it must have a digest.

    Raises:
        UsageError: It is not; the line says what is wrong and, where the file still tells, after
            which step it was saved.
    """
    damage = find_damage(path, digested=digested)
    if damage is not None:
        raise UsageError(f"{path}: damaged ({damage})")


def find_damage(path: Path, *, digested: bool = False) -> str | None:
    """What is wrong with a file, as `check_digest` says it; None if nothing is."""
    try:
        with open(path, "rb") as file:
            return _damage_in(file, digested)
    except OSError as error:
        return error.strerror


def _damage_in(file: BinaryIO, digested: bool) -> str | None:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
        return f"cut short or no safetensors file: {size} bytes"
    text = file.read(length)
    try:
        content = json.loads(text)
        about = content.pop("__metadata__", {})
        step = f"; saved after {about[STEP_KEY]}" if STEP_KEY in about else ""
        end = max((entry["data_offsets"][1] for entry in content.values()), default=0)
        missing = 8 + length + end - size
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "its header is not readable"
    if missing:
        return f"{abs(missing)} bytes {'missing' if missing > 0 else 'too many'}{step}"
    if _DIGEST.encode() not in text:
        return f"it has no digest{step}" if digested else None
    if not text.startswith(_OPENING):
        return f"its digest is not readable{step}"
    place = slice(len(_OPENING), len(_OPENING) + len(_ZEROS))
    digest = hashlib.sha256(start + text[: place.start] + _ZEROS.encode() + text[place.stop :])
    chunk = memoryview(bytearray(_CHUNK))
    while count := file.readinto(chunk):
        digest.update(chunk[:count])
    if digest.hexdigest().encode() != text[place]:
        return f"its content does not match its digest{step}"
    return None
