"""Processes that find each other, agree on flags, and notice that others are gone."""

import os
import subprocess
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from preloaded import programs

from qna_timm.training.errors import UsageError
from qna_timm.training.processes import distributed, launch
from qna_timm.training.processes.distributed import (
    Processes,
    join_processes,
    leave_processes,
    lost_connection,
    reduce_flags,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "SLURM_", "TORCHELASTIC", "PMI", "OMPI")


def plain_environment() -> dict[str, str]:
    """This process's environment without a launcher's words."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def slurm_task(rank: int, tasks: int = 2, **more: str) -> dict[str, str]:
    """What srun tells a task on a job's only machine, this one; the port is this test run's own."""
    words = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }
    return {**words, **more}


def start(script: str, environments: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[str]]:
    """Run a script in one process for each environment."""
    return [
        subprocess.Popen(
            [str(programs() / "python"), "-c", textwrap.dedent(script)],
            env={**plain_environment(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the test's surroundings nor what `join_processes` leaves behind."""
    for name in set(os.environ) - set(plain_environment()):
        monkeypatch.delenv(name)
    yield
    for name in set(os.environ) - set(plain_environment()):
        del os.environ[name]


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_processes("cpu") == Processes(CPU)
    # A command in a job's script sees the job's tasks, but is not one of them.
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert join_processes("cpu") == Processes(CPU) and not dist.is_initialized()


def test_slurm_tasks_connect_agree_and_notice_a_loss() -> None:
    """The second is killed: the first says so in one line, long before the time is out."""
    script = """
        import os, signal
        from datetime import timedelta
        import torch
        from qna_timm.training.processes.distributed import *
        from qna_timm.training.processes.distributed import lost_connection, reduce_flags
        mine = join_processes("cpu", timedelta(seconds=60))
        given = [mine.rank == 1, torch.tensor(mine.rank == 0), 15 * mine.rank, torch.tensor(0.0)]
        print(mine.rank, mine.world_size, os.environ["RANK"], reduce_flags(given, mine), flush=True)
        if mine.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            for _ in range(3):
                decide_on_primary(mine, lambda: None)
        except Exception as error:
            print(lost_connection(error))
        leave_processes()
    """
    first, second = start(script, [slurm_task(0), slurm_task(1)])
    output, errors = first.communicate(timeout=50)
    assert second.wait(timeout=10) == -9 and first.returncode == 0, errors
    assert second.communicate()[0] == "1 2 1 [1, 1, 15, 0]\n"
    flags, line = output.splitlines()
    assert flags == "0 2 0 [1, 1, 15, 0]"
    assert line.startswith("the connection to other processes is lost (") and "gloo" not in line


def test_hosts_agree_over_gloo_whatever_the_device() -> None:
    """A backend that does nothing stands in for NCCL: what it carries does not arrive."""
    script = """
        import torch
        import torch.distributed as dist
        from qna_timm.training.processes import distributed
        from qna_timm.training.processes.distributed import *
        from qna_timm.training.processes.distributed import gather_to_all, gather_to_primary
        from qna_timm.training.processes.distributed import reduce_flags
        dist.Backend.default_device_backend_map["cuda"] = "fake"
        distributed._choose_device = lambda *_: torch.device("cuda:0")
        mine = join_processes("cuda")
        told = [decide_on_primary(mine, lambda: "yes"), reduce_flags([mine.rank, 15], mine)]
        told += [gather_to_all(mine.rank, mine), gather_to_primary(mine.rank, mine)]
        dist.barrier()
        print(dist.get_backend(), told)
        leave_processes()
    """
    first, second = start(script, [slurm_task(0), slurm_task(1)])
    (output, errors), (other, _) = first.communicate(timeout=50), second.communicate(timeout=50)
    assert output == "cpu:gloo,cuda:fake ['yes', [1, 15], [0, 1], [0, 1]]\n", errors
    assert other == "cpu:gloo,cuda:fake ['yes', [1, 15], [0, 1], None]\n"


def test_missing_process_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm_task(0, MASTER_ADDR="127.0.0.1", MASTER_PORT="0").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(dist.DistStoreError) as raised:
        join_processes("cpu", timedelta(seconds=1))
    assert "connection to other processes is lost (Timed out" in lost_connection(raised.value)
    assert not dist.is_initialized()


def test_launcher_that_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="MASTER_ADDR expected"):
        join_processes("cpu")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match=r"the launcher's variables: .*'two'"):
        join_processes("cpu")


def test_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in slurm_task(0, MASTER_PORT=str(store.port)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"MASTER_PORT={store.port}: in use"):
        join_processes("cpu", timedelta(seconds=2))


@pytest.mark.parametrize("local_rank, by_slurm, index", [(2, False, 2), (0, True, 0), (None, 0, 1)])
def test_device_of_a_process(
    local_rank: int | None, by_slurm: bool, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = distributed._choose_device("cuda:1", local_rank, by_slurm)
    assert chosen == [device] == [torch.device("cuda", index)]


def test_device_that_slurm_shows_to_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert distributed._choose_device("cuda", 3, by_slurm=True) == torch.device("cuda:0")
    with pytest.raises(UsageError, match="process 3 of this machine has no device, 1 found"):
        distributed._choose_device("cuda", 3, by_slurm=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there() -> None:
    with pytest.raises(
        UsageError, match="--device cuda: PyTorch finds no cuda device here; cpu works"
    ):
        join_processes("cuda")
    with pytest.raises(UsageError, match="--device gpu: PyTorch finds no gpu device"):
        join_processes("gpu")


@pytest.mark.parametrize("device, backends", [("cpu", "gloo"), ("cuda:1", "cpu:gloo,cuda:nccl")])
def test_backends(device: str, backends: str) -> None:
    assert distributed._backends(torch.device(device)) == backends


def test_lost_processes_are_noticed_before_the_device_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reduced = []

    def maxima(flags: torch.Tensor, processes: Processes) -> list[int]:
        reduced.append((flags.device.type, flags.dtype, len(flags)))
        return flags.tolist() if flags.device == CPU else [7, 8]

    monkeypatch.setattr(distributed, "_maxima", maxima)
    bad, worse = torch.empty((), dtype=torch.bool, device="meta"), torch.empty((), device="meta")
    flags = reduce_flags([bad, 15, worse, False], Processes(torch.device("meta"), 0, 2))
    assert flags == [7, 15, 8, 0]
    assert reduced == [("cpu", torch.int32, 4), ("meta", torch.int32, 2)]


def test_flags_of_one_process() -> None:
    alone = Processes(CPU)
    assert reduce_flags([True, False, 15], alone) == [1, 0, 15]
    assert reduce_flags([torch.tensor(True), 15, torch.tensor(False)], alone) == [1, 15, 0]


NCCL_PLACE = "NCCL error in: /src/NCCLUtils.hpp:268, "
SET_UP = f"""{NCCL_PLACE}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.29
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"""
SOCKET = f"""{NCCL_PLACE}unhandled system error (run with NCCL_DEBUG=INFO for details)
ncclSystemError: System call (e.g. socket, malloc) or external library call failed.
Last error:
socketProgress: Connection closed by remote peer node7<41234>
Exception raised from create"""


@pytest.mark.parametrize(
    "error, line",
    [
        (
            RuntimeError(
                "[/src/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:5. This"
                " is typically caused by a remote worker crashing."
            ),
            "(Connection closed by peer [::1]:5)",
        ),
        (
            RuntimeError("Application timeout caused pair closure"),
            "(Application timeout caused pair closure)",
        ),
        (dist.DistBackendError("NCCL error: remote process exited\nmore"), "(NCCL error: remote"),
        (dist.DistBackendError(""), "DistBackendError"),
        (dist.DistBackendError(SOCKET), "details): socketProgress: Connection closed by remote"),
        (
            dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL("),
            "the connection to other processes is lost (Watchdog caught",
        ),
        (RuntimeError("Connection closed by a web server"), None),
        (ValueError("gloo/transport"), None),
    ],
)
def test_lost_connection(error: Exception, line: str | None) -> None:
    told = lost_connection(error)
    assert told is None if line is None else line in told and "\n" not in told


@pytest.mark.parametrize(
    "text, line",
    [
        (
            SET_UP,
            f"{NCCL_PLACE}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.29:"
            " Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
        ),
        (f"{NCCL_PLACE}internal error\nLast error:\n\nframe #0", f"{NCCL_PLACE}internal error"),
    ],
)
def test_error_of_nccl_that_is_no_loss(text: str, line: str) -> None:
    assert lost_connection(dist.DistBackendError(text)) == line


def test_lost_connection_behind_another_error() -> None:
    try:
        try:
            raise dist.DistNetworkError("peer gone")
        except RuntimeError as error:
            raise KeyError("answer") from error
    except KeyError as error:
        assert lost_connection(error) == "the connection to other processes is lost (peer gone)"


def test_leaving_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(distributed, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: release.wait(60))
    leave_processes()
    release.set()


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login", "gpu07"),
        ("a1,a[2-3]", "a1"),
        ("rack[2-3]gpu[01,04]", "rack2gpu01"),
        ("n[5]-ib,n6", "n5-ib"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_first_host(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol
    assert launch.first_host(nodes) == first


def test_scontrol_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames g[1-2]" ] && printf "x\\ny\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.first_host("g[1-2]") == "x"
    assert launch.first_host("g[1-3]") == "g1", "its failure is not ours"


def test_rendezvous() -> None:
    task = {"SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0"}
    ports = set()
    for job, step in (("41", "0"), ("42", "0"), ("41", "1"), ("40000041", "0")):
        environ = {**task, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        launch.set_rendezvous(environ)
        assert environ["MASTER_ADDR"] == "gpu3" and 10_000 <= int(environ["MASTER_PORT"]) < 30_000
        ports.add(environ["MASTER_PORT"])
    assert len(ports) == 3
    given = {**task, "MASTER_ADDR": "head", "MASTER_PORT": "5"}
    launch.set_rendezvous(given)
    assert given["MASTER_ADDR"] == "head" and given["MASTER_PORT"] == "5"
    with pytest.raises(UsageError, match="SLURM_JOB_NODELIST"):
        launch.set_rendezvous({"SLURM_JOB_ID": "41"})


def test_file_system_errors_of_the_first_process_are_told_to_all(tmp_path: Path) -> None:
    """In one line, where only the first looks: the others would wait for its answer."""
    path = tmp_path / ("long" * 100)
    with pytest.raises(UsageError, match="long: File name too long"):
        distributed.decide_on_primary(Processes(torch.device("cpu")), path.is_dir)


@pytest.mark.parametrize(
    ("own", "given", "set_to"),
    [("127.0.1.1", "", "eth7"), ("10.0.0.5", "", None), ("127.0.0.1", "ib0", "ib0")],
)
def test_interface_of_gloo(
    own: str, given: str, set_to: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found where the machine's name stands for nothing that others could reach."""
    monkeypatch.setattr(launch.socket, "gethostbyname", lambda name: own)
    monkeypatch.setattr(launch, "interface_to", lambda host: {"10.0.0.9": "eth7"}[host])
    environ = {"MASTER_ADDR": "10.0.0.9"}
    if given:
        environ["GLOO_SOCKET_IFNAME"] = given
    launch.set_interface(environ)
    assert environ.get("GLOO_SOCKET_IFNAME") == set_to


def test_no_interface_to_this_machine() -> None:
    assert launch.interface_to("127.0.0.1") is None
    assert launch.interface_to("no such machine") is None
