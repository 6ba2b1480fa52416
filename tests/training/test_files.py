"""Files replaced whole, whose damage is noticed, and the two generations of states."""

import errno
import json
import logging
import os
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faulty_calls import FaultyCalls, full_disk, refuse, save_two, small_state, updates_in
from safetensors import safe_open
from torch import nn

from qna_timm.training.errors import UsageError
from qna_timm.training.storage import files
from qna_timm.training.storage.checkpoint import (
    load_weights,
    read_metadata,
    read_weights,
    save_weights,
)
from qna_timm.training.storage.files import check_digest, find_damage, replacing, save_tensors
from qna_timm.training.storage.state_files import (
    PREVIOUS_NAME,
    STATE_NAME,
    find_state,
    load_state,
    read_state_header,
    save_state,
    whole_state,
)

FLIPS = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with two states and weights."""
    folder = tmp_path / "run"
    save_two(folder)
    about = {"arch": "test_vit", "epoch": 2, "update": 77}
    save_weights(folder / "last.safetensors", nn.Linear(20, 10), about)
    return folder


def damaged_versions(whole: bytes, step: int = 257) -> list[bytes]:
    """Cut at every `step` bytes or at the last, too long, and FLIPS with one bit flipped."""
    cut = [whole[:size] for size in (*range(0, len(whole), step), len(whole) - 1)]
    long = [whole + b"\0", whole + whole]
    draw = random.Random(0)
    flipped = []
    # Every bit of what is read first, and any of the rest.
    places = [*range(8 * 40), *(draw.randrange(8 * len(whole)) for _ in range(FLIPS - 8 * 40))]
    for place in places:
        version = bytearray(whole)
        version[place // 8] ^= 1 << place % 8
        flipped.append(bytes(version))
    return cut + long + flipped


def test_damaged_weights_are_noticed(folder: Path) -> None:
    path = folder / "last.safetensors"
    check_digest(path)
    versions = damaged_versions(path.read_bytes())
    for number, version in enumerate(versions):
        path.write_bytes(version)
        read = (read_weights, read_metadata)[number % 2]
        with pytest.raises(UsageError, match=r"last\.safetensors: damaged \(") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_damaged_state_gives_way_to_the_one_before(folder: Path) -> None:
    path = folder / STATE_NAME
    for version in damaged_versions(path.read_bytes()):
        path.write_bytes(version)
        assert whole_state(path).name == PREVIOUS_NAME


def test_fall_back_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / STATE_NAME
    whole = bytearray(path.read_bytes())
    whole[-9] ^= 16
    path.write_bytes(whole)
    with caplog.at_level(logging.WARNING):
        assert read_state_header(path)["position"] == {"epoch": 2, "updates": 1}
        used = whole_state(path)
    assert used.name == PREVIOUS_NAME and load_state(used)["position"]["updates"] == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: damaged (its content does not match its digest; saved after update 2 of epoch"
        f" 3): going on from {PREVIOUS_NAME}, the state before it"
    ]
    with pytest.raises(UsageError, match=r"--resume .*last\.state\.safetensors: damaged \("):
        load_state(path)


def test_missing_last_state(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / STATE_NAME).unlink()
    path = whole_state(find_state(str(folder)))
    assert path.name == PREVIOUS_NAME and load_state(path)["position"]["updates"] == 1
    assert "No such file" in caplog.text
    path.unlink()
    with pytest.raises(UsageError, match=f"no {STATE_NAME} in this folder"):
        find_state(str(folder))


def test_both_states_damaged(folder: Path) -> None:
    (folder / STATE_NAME).write_bytes(b"")
    (folder / PREVIOUS_NAME).write_bytes((folder / PREVIOUS_NAME).read_bytes()[:-7])
    pattern = (
        r"run/last\.state\.safetensors: damaged \(.*0 bytes\), and so is previous\.state"
        r"\.safetensors \(7 bytes missing; saved after update 1 of epoch 3\)"
    )
    for read in (whole_state, read_state_header):
        with pytest.raises(UsageError, match=pattern):
            read(folder / STATE_NAME)


def test_other_state_files_are_not_replaced(folder: Path) -> None:
    named = folder / "mine.state.safetensors"
    named.write_bytes((folder / STATE_NAME).read_bytes())
    assert whole_state(named) == named
    assert read_state_header(named)["model"] == {"weight": None, "bias": None}
    for path in (named, folder / PREVIOUS_NAME):
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UsageError, match=f"{path.name}: damaged"):
            whole_state(path)


def test_state_must_have_a_digest(folder: Path) -> None:
    path = folder / "foreign.state.safetensors"
    with safe_open(folder / STATE_NAME, framework="pt") as file:
        header = {key: value for key, value in file.metadata().items() if "digest" not in key}
    del header["sha256"]
    safetensors.torch.save_file(safetensors.torch.load_file(folder / STATE_NAME), path, header)
    with pytest.raises(UsageError, match=r"damaged \(it has no digest"):
        load_state(path)
    with pytest.raises(UsageError, match=r"not a state of this train\.py"):
        weights = folder / "last.safetensors"
        load_state(weights)


def test_files_of_others_pass(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    check_digest(path)
    assert read_weights(path)[1] == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (7).to_bytes(8, "little") + b'{"a":1}',
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (26).to_bytes(8, "little") + b'{"a":{"data_offsets":[0]}}',
        (21).to_bytes(8, "little") + b'{"__metadata__":"abc"',
    ],
)
def test_malformed_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"bad\.safetensors: damaged"):
        read_weights(path)


def content(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in the order of its elements."""
    return tensor.detach().resolve_conj().contiguous().view(-1).view(torch.uint8)


def test_tensors_of_all_kinds_come_back(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    tensors = {str(dtype): torch.arange(5).to(dtype) for dtype in files._DTYPES}
    tensors |= {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "strided": torch.arange(12.0).view(3, 4).t()[::2],
        "every_second": torch.arange(8.0)[::2],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "learned": nn.Parameter(torch.randn(2, 2)),
        "üñï \"name'": torch.ones(1),
    }
    tensors["shared"] = tensors["strided"]
    save_tensors(path, tensors, {"note": "ä\n{}"})
    check_digest(path, digested=True)
    back = safetensors.torch.load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(content(back[name]), content(tensor)), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["note"] == "ä\n{}"
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    entries = json.loads(path.read_bytes()[8 : 8 + header_size])
    for name, tensor in tensors.items():  # mapped files are read fast where tensors are aligned
        assert (8 + header_size + entries[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_tensors_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"x: tensors of torch\.complex128"):
        save_tensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex128)}, {})
    assert not list(tmp_path.iterdir())


def test_write_that_reads_back_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk lies: one byte is not what was written."""
    write = files._write_tensors

    def lie(path: Path, *content: object) -> None:
        write(path, *content)
        with open(path, "rb+") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\x7e")

    monkeypatch.setattr(files, "_write_tensors", lie)
    with pytest.raises(OSError, match="reads back otherwise: its content"):
        save_state(folder / STATE_NAME, small_state(3))
    assert updates_in(folder) == [1, 2] and not list(folder.glob(".*"))


def test_order_of_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content to disk, then proven, then named; and the names to disk."""
    calls = FaultyCalls()
    calls.install(monkeypatch)
    save_state(folder / STATE_NAME, small_state(3))
    order = [name for name in calls.names if name not in ("unlink", "open")]
    order = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert order == [
        "open xb", "write", "open rb+", "fsync", "open rb", "read", "link", "replace", "fsync",
    ]  # fmt: skip
    assert calls.names.count("replace") == 2 and calls.names[-2:] == ["open", "fsync"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_error_at_every_call(tmp_path: Path, error: int) -> None:
    for number in range(1, 100):
        folder = tmp_path / str(number)
        save_two(folder)
        calls = FaultyCalls(number, refuse(error))
        with pytest.MonkeyPatch.context() as patch:
            calls.install(patch)
            try:
                save_state(folder / STATE_NAME, small_state(3))
            except OSError:
                assert len(calls.names) >= number
            else:
                assert len(calls.names) < number
                break
        assert not list(folder.glob(".*")), calls.names
        assert updates_in(folder) in ([1, 2], [1, 3], [2, 3])
        save_state(folder / STATE_NAME, small_state(4))
        assert updates_in(folder)[1] == 4
    assert number > 12


def test_damaged_last_state_never_costs_the_previous(tmp_path: Path) -> None:
    """A run went on from the state before; whenever its next save is cut short, one is whole."""
    for number in range(1, 100):
        folder = tmp_path / str(number)
        save_two(folder)
        (folder / STATE_NAME).write_bytes(b"damaged")
        calls = FaultyCalls(number, full_disk)
        with pytest.MonkeyPatch.context() as patch:
            calls.install(patch)
            try:
                save_state(folder / STATE_NAME, small_state(3))
            except OSError:
                pass
            else:
                break
        state = load_state(whole_state(folder / STATE_NAME))
        assert state["position"]["updates"] in (1, 3)
    assert number > 12


@pytest.mark.parametrize("error", [errno.EPERM, errno.EXDEV], ids=errno.errorcode.get)
def test_file_systems_without_links(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(os, "link", lambda *names: refuse(error)())
    save_state(folder / STATE_NAME, small_state(3))
    assert updates_in(folder) == [2, 3]
    assert not list(folder.glob(".*"))


def test_leftover_link_is_not_written_to(folder: Path) -> None:
    """A killed run of the same process number may have left a second name of a good file."""
    with replacing(folder / "best.safetensors") as temporary:
        temporary.write_bytes(b"best")
    for name in ("best.safetensors", STATE_NAME, PREVIOUS_NAME):
        os.link(folder / STATE_NAME, folder / f".{name}.{os.getpid()}.tmp")
    with replacing(folder / "best.safetensors") as temporary:
        temporary.write_bytes(b"new")
    save_state(folder / STATE_NAME, small_state(3))
    assert updates_in(folder) == [2, 3]


def test_files_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        save_tensors(tmp_path / "x", {}, {})
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_weights_say_their_step(folder: Path) -> None:
    path = folder / "last.safetensors"
    assert read_metadata(path) == {"arch": "test_vit", "epoch": 2, "update": 77}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UsageError, match=re.escape("(4 bytes missing; saved after epoch 3, upd")):
        load_weights(nn.Linear(20, 10), path)
    assert find_damage(path.with_name("none")) == "No such file or directory"
