"""Pythons that start at once: forks of a process that has imported what takes a script seconds.

    python tests/preloaded.py serve SOCKET
    python tests/preloaded.py run SOCKET [-u] SCRIPT | -m MODULE | -c CODE | - [ARGUMENTS]

The second runs what `python SCRIPT ...` would run in a process of its own, with the caller's
folder, environment, files 0 to 2 and namespaces, passes signals on to it, and ends as it ends; it
is killed when the caller is. A third of the tests' time went into imports before.
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

FOLDER = "QNA_TIMM_TEST_PROGRAMS"  # where `start` has put them
PRELOADED = (
    "torch",
    "torch.distributed.run",
    "torch.nn.parallel.distributed",
    "torchvision",
    "timm",
    "sklearn.datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
)
# Namespaces in the order to enter; a sandbox may lack some.
SPACES = [f"/proc/self/ns/{kind}" for kind in ("user", "net", "mnt")
          if os.path.exists(f"/proc/self/ns/{kind}")]  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_setns = ctypes.CDLL(None, use_errno=True).setns  # of Python itself from 3.12 on
_LENGTH = 8  # bytes of a number that is sent
_PATIENCE = 5.0  # seconds after which a server looks whether it is still wanted


def programs() -> Path:
    """Folder of the `python` and `torchrun` that tests start scripts with: the plain ones where
    nobody has started others."""
    if FOLDER not in os.environ:
        return Path(sys.executable).parent
    folder, until = Path(os.environ[FOLDER]), time.monotonic() + 120
    while not (folder / "socket").exists():
        assert time.monotonic() < until, "no preloaded Pythons after two minutes"
        time.sleep(0.1)
    return folder


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Put `python` and `torchrun` into a folder, and start what they ask."""
    me, place = str(Path(__file__).resolve()), str(folder / "socket")
    ask = shlex.join([sys.executable, "-IS", me, "run", place])
    for name, words in (("python", ""), ("torchrun", "-m torch.distributed.run ")):
        script = f'#!/bin/sh\nPYTHON_EXEC={folder}/python exec {ask} {words}"$@"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    command, environment = [sys.executable, me, "serve", place], {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.DEVNULL)


def run(path: str, words: Sequence[str]) -> NoReturn:
    """Have the server run a Python's command line, and end as it ends."""
    request = json.dumps([list(words), os.getcwd(), dict(os.environ)]).encode()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it is known whose they are
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(path)
        except OSError as error:
            _refuse(f"nobody serves {path}: {error.strerror}")
        spaces = [os.open(space, os.O_RDONLY) for space in SPACES]
        socket.send_fds(server, [len(request).to_bytes(_LENGTH, "big")], [0, 1, 2, *spaces])
        server.sendall(request)
        pid = int.from_bytes(_receive(server, _LENGTH), "big")
        # A handler runs between two steps of Python: a signal that comes when the next step is to
        # wait has to end that wait.
        woken, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while server not in select.select([server, woken], [], [])[0]:
            woken.recv(1)
        code = os.waitstatus_to_exitcode(int.from_bytes(_receive(server, _LENGTH), "big"))
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to take away
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: str) -> None:
    """Import, then run what is asked for, while the process that has started this one lives."""
    parent = os.getppid()
    for name in PRELOADED:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen(64)
        os.rename(f"{path}.new", path)  # it is there once it answers
        server.settimeout(_PATIENCE)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while os.getppid() == parent:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _keep(connection)
            connection.close()


def _keep(connection: socket.socket) -> NoReturn:
    """Start what one caller asks for and tell how it ended; kill it if the caller is gone."""
    size, files, _, _ = socket.recv_fds(connection, _LENGTH, 3 + len(SPACES))
    words, folder, environment = json.loads(
        _receive(connection, int.from_bytes(size, "big")).decode()
    )
    if (pid := os.fork()) == 0:
        connection.close()
        _become(words, folder, environment, files)
    for file in files:
        os.close(file)
    connection.sendall(pid.to_bytes(_LENGTH, "big"))
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(_LENGTH, "big"))
    os._exit(0)


def _become(
    words: list[str], folder: str, environment: dict[str, str], files: Sequence[int]
) -> NoReturn:
    for file, space in zip(files[3:], SPACES, strict=True):
        # A process may not enter the user namespace that it is in.
        if not os.path.samestat(os.fstat(file), os.stat(space)) and _setns(file, 0):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}", space)
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    threads = environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1
    sys.modules["torch"].set_num_threads(int(threads))
    sys.path[0] = folder
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    code = 0
    try:
        _run_main(words)
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # To take all apart that has been imported would take a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_main(words: list[str]) -> None:
    if words[0] == "-u":
        words = words[1:]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] in ("-c", "-"):
        sys.argv = [words[0], *words[2 if words[0] == "-c" else 1 :]]
        code = words[1] if words[0] == "-c" else sys.stdin.read()
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def _receive(connection: socket.socket, size: int) -> bytes:
    """That many bytes."""
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            sys.exit("the server of preloaded Pythons is gone")
        received += part
    return received


def _refuse(reason: str) -> NoReturn:
    print(f"preloaded.py: error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", where]:
            serve(where)
        case ["run", where, _, *_]:
            run(where, sys.argv[3:])
        case words:
            _refuse(f"expected serve SOCKET or run SOCKET SCRIPT ..., found '{' '.join(words)}'")
