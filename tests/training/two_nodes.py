"""Two "nodes" on one machine: network namespaces joined by a cable that can be pulled out.

`TwoNodes` works for root and, where user namespaces are allowed, for anyone. Both nodes see the
same files, but the second can be kept from writing to them: a run in which it tries fails.
"""

import contextlib
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "veth0"


class TwoNodes:
    """Two network namespaces, connected by a pair of virtual interfaces.

    Args:
        read_only: A folder that the second node sees but cannot write to.

    Raises:
        OSError: The system does not allow it.
    """

    def __init__(self, read_only: Path | None = None) -> None:
        folder = shlex.quote(str(read_only))
        mounts = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && "
        self._nodes: list[subprocess.Popen[str]] = []
        try:
            self._hold(["unshare", "--user", "--map-root-user", "--net"])
            # The second is the first one's child, so that a cable may lead from one to the other.
            second_node = [*self._inside(0), "unshare", "--net", "--mount"]
            self._hold(second_node, "" if read_only is None else mounts)
            second = self._nodes[1].pid
            cable = f"link add {CABLE} type veth peer name {CABLE} netns {second}"
            self._ip(0, cable)
            for node, address in enumerate(ADDRESSES):
                self._ip(node, "link set lo up")
                self._ip(node, f"address add {address}/24 dev {CABLE}")
            self.connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TwoNodes":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _hold(self, command: Sequence[str], prepare: str = "") -> None:
        """Start a process that keeps a node's namespaces alive, and wait until they are there."""
        holder = subprocess.Popen(
            [*command, "sh", "-c", f"{prepare}echo ready && exec cat >&2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._nodes.append(holder)
        if holder.stdout.readline() != "ready\n":
            raise OSError(holder.stderr.read().strip() or "namespaces: no answer")

    def _inside(self, node: int) -> list[str]:
        spaces = ["--user", "--net", *(["--mount"] if node else [])]
        target = ["--target", str(self._nodes[node].pid)]
        return ["nsenter", "--preserve-credentials", *spaces, *target, "--"]

    def _ip(self, node: int, words: str) -> None:
        done = subprocess.run(
            [*self._inside(node), "ip", *words.split()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"ip {words}: {done.stderr.strip()}")

    def connect(self) -> None:
        """Put the cable in."""
        for node in range(2):
            self._ip(node, f"link set {CABLE} up")

    def cut(self) -> None:
        """Pull the cable out: packets are lost without a word to either side."""
        for node in range(2):
            self._ip(node, f"link set {CABLE} down")

    def start(
        self, node: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Run a command on a node.

        Args:
            node: 0 or 1.
            command: Program and arguments.
            environment: All of its environment.
        """
        return subprocess.Popen(
            [*self._inside(node), *command],
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the namespaces."""
        for holder in reversed(self._nodes):
            with contextlib.suppress(OSError):
                holder.communicate("")
