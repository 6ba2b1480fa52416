"""What a launcher tells the processes that it starts, turned into what connects them."""

import contextlib
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, MutableMapping

from qna_timm.training.errors import UsageError

# Below the range from which systems hand out ports on their own.
FIRST_PORT, NUM_PORTS = 10_000, 20_000
# Linux' request for the address of a network interface.
SIOCGIFADDR = 0x8915


def launched_by_slurm(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of a step's tasks, without torchrun between.

    A command in a job's script, or in a shell that salloc gives, finds the number of the job's
    tasks in its environment too, but is not one of them.
    """
    return "WORLD_SIZE" not in environ and "SLURM_STEP_NUM_TASKS" in environ


def set_rendezvous(environ: MutableMapping[str, str]) -> None:
    """Set ``MASTER_ADDR`` and ``MASTER_PORT``, where they are not, to the same on every task.

    The address is that of the first machine of the step, where SLURM puts rank 0; the port follows
    from the numbers of job and step, so that two jobs on one machine hardly meet.

    Raises:
        UsageError: SLURM does not say which machines the step has.
    """
    if "MASTER_ADDR" not in environ:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise UsageError("MASTER_ADDR: not set, and neither is SLURM_JOB_NODELIST")
        environ["MASTER_ADDR"] = first_host(nodes)
    if "MASTER_PORT" not in environ:
        job, step = (environ.get(f"SLURM_{name}_ID", "0") for name in ("JOB", "STEP"))
        environ["MASTER_PORT"] = str(FIRST_PORT + (int(job) + 101 * int(step)) % NUM_PORTS)


def first_host(nodes: str) -> str:
    """First machine of a list in SLURM's notation: ``gpu[07-09,12],login`` gives ``gpu07``.

    Raises:
        UsageError: The notation cannot be read.
    """
    if "[" in nodes and shutil.which("scontrol"):
        asked = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0 and asked.stdout.split():
            return asked.stdout.split()[0]
    # One range may follow another, as in rack[1-2]gpu[01-04]; the first of each makes the first.
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    if first is None:
        raise UsageError(f"SLURM_JOB_NODELIST={nodes}: no list of machines such as gpu[01-04]")
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first[0])


def set_interface(environ: MutableMapping[str, str]) -> None:
    """Set ``GLOO_SOCKET_IFNAME``, where it is not, if gloo would tell others a wrong address.

    It takes the address that a machine's name has, which is its own 127.* where the name is in
    /etc/hosts alone, as Debian's installer leaves it. Then it is told the interface by which
    ``MASTER_ADDR`` is reached.
    """
    if "GLOO_SOCKET_IFNAME" in environ or "MASTER_ADDR" not in environ:
        return
    with contextlib.suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
    name = interface_to(environ["MASTER_ADDR"])
    if name is not None:
        environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(host: str) -> str | None:
    """The network interface by which another machine is reached; None for this one, or unknown."""
    try:
        import fcntl  # not everywhere
    except ImportError:
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, FIRST_PORT))  # which sends nothing
        own = probe.getsockname()[0]
        if own.startswith("127."):
            return None
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None
