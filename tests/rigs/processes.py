"""A program that a rig starts ends with the context that started it, however that is left."""

import atexit
import contextlib
import itertools
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

BLOCK = 250
"""Ports that one process may give to servers, in turn."""

refusal = ""
"""Why no program may be started now, or empty. Tests set it: only those marked ``rig`` or ``flower`` may start programs."""


def check_allowed(program: str) -> None:
    """Raise RuntimeError if no program may be started now. Called before each start."""
    if refusal:
        raise RuntimeError(f"{program} was not started: {refusal}")


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str],
    *,
    directory: Path | None = None,
    user: str | None = None,
    grace: float = 10.0,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program in the foreground; what it prints goes to ``log``.

    When the context is left, the program gets SIGTERM, and SIGKILL after ``grace`` seconds, or at once if that is 0.
    """
    check_allowed(str(command[0]))
    as_user = {"user": user, "group": user} if user else {}
    with log.open("wb") as file:
        process = subprocess.Popen(  # type: ignore[call-overload]
            [*command], env=environment, cwd=directory, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **as_user
        )
    try:
        yield process
    finally:
        if grace:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        process.kill()
        process.wait()


def wait_until(ready: Callable[[], bool], goal: str, log: Path, process: "subprocess.Popen[bytes] | None" = None) -> None:
    """Wait until ``ready()``; raise RuntimeError with the end of the log after a minute, or as soon as the process has ended."""
    end = time.monotonic() + 60
    while not ready():
        if time.monotonic() > end or (process and process.poll() is not None):
            raise RuntimeError(f"waited in vain for {goal}\n{log.read_text(errors='replace')[-2000:] if log.exists() else 'no log'}")
        time.sleep(0.05)


def listens(port: int) -> bool:
    """Tell whether a server takes connections on a port of loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def answers(url: str) -> bool:
    """Tell whether a server answers a GET with any status below 500."""
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - loopback
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


def free_port() -> int:
    """Give a port that no other process that calls this is given, below the ports that the kernel gives to clients.

    A server binds it seconds later, and several processes may start servers at once.
    """
    _, ports = _block()
    for port in itertools.islice(ports, BLOCK):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"none of the {BLOCK} ports of this process is free")


@cache
def _block() -> tuple[socket.socket, Iterator[int]]:
    """This process's ports, again and again, and the socket whose name reserves them: the kernel frees the name when the process ends."""
    owner = socket.socket(socket.AF_UNIX)
    for first in range(20_000, 32_000, BLOCK):
        with contextlib.suppress(OSError):
            owner.bind(f"\0gradsharding-ports-{first}")
            atexit.register(owner.close)
            return owner, itertools.cycle(range(first, first + BLOCK))
    raise RuntimeError(f"{12_000 // BLOCK} processes have all the ports from 20000 to 32000")
