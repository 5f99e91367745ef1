"""A real deployment on this machine: one SuperLink and its SuperNodes as processes, on loopback only."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

_BIN = Path(sys.executable).parent
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # apps run with what is installed here
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Loopback:
    """A running SuperLink with ``nodes`` SuperNodes, or, with ``simulation``, one that simulates as many.

    Its files, and each process's log, lie in ``directory``. Leaving the context ends every process that was started.
    ``server`` is added to the environment of the SuperLink, and of what it starts, alone: no node has AWS credentials.
    """

    def __init__(self, directory: Path, *, nodes: int = 2, simulation: bool = False, server: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.nodes = nodes
        self.simulation = simulation
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        """By name: ``superlink``, ``supernode-0``, …; each leads a process group of its own."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self._server = dict(server or {})
        self._env = {**inherited, **_QUIET, "FLWR_HOME": str(directory), "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"}

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._start_all()
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop_all()

    def run(self, app: Path, *, timeout: float = 600, **config: str | float) -> str:
        """Run the Flower app in ``app`` to its end, its ``run-config`` overridden; give its log.

        Raise RuntimeError with the logs if it fails, TimeoutExpired after ``timeout`` seconds.
        """
        overrides = " ".join(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in config.items())
        command = [str(_BIN / "flwr"), "run", str(app), "loopback", "--stream", "--run-config", overrides]
        ended = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=timeout, check=False)
        if ended.returncode:
            raise RuntimeError(f"flwr run ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}\n{self.logs()}")
        return ended.stdout

    def logs(self) -> str:
        """What all processes have written."""
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')}" for log in sorted(self.directory.glob("*.log")))

    def _start_all(self) -> None:
        port = _free_port()
        address = f"127.0.0.1:{port}"
        config = f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "{address}"\ninsecure = true\n'
        (self.directory / "config.toml").write_text(config)
        simulation = ["--simulation"] if self.simulation else []
        self._start("superlink", ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), *simulation], self._server)
        _wait_for(port, self.processes["superlink"], self)
        for i in range(0 if self.simulation else self.nodes):
            own = f"partition-id={i} num-partitions={self.nodes}"
            command = ["flower-supernode", "--insecure", "--superlink", address, "--host", "127.0.0.1", "--port", str(_free_port())]
            self._start(f"supernode-{i}", [*command, "--node-config", own])

    def _start(self, name: str, command: list[str], more: Mapping[str, str] | None = None) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(_BIN / command[0]), *command[1:]],
                env={**self._env, **(more or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _stop_all(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in reversed(self.processes.values()):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in self.processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes], loopback: Loopback) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the SuperLink did not answer on port {port}\n{loopback.logs()}")
