"""A Flower deployment on loopback: a SuperLink and its SuperNodes, each a process."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rigs.processes import check_allowed, free_port, listens, wait_until

_BIN = Path(sys.executable).parent
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # apps run with what is installed here
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Loopback:
    """A SuperLink with ``nodes`` SuperNodes or, with ``simulation``, one that simulates that many.

    Its files and all logs lie in ``directory``. Leaving the context ends every process that was started.
    ``server`` is added to the environment of the SuperLink and of the processes that it starts; no node has AWS credentials.
    """

    def __init__(self, directory: Path, *, nodes: int = 2, simulation: bool = False, server: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.nodes = nodes
        self.simulation = simulation
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        """By name (``superlink``, ``supernode-0``, …); each leads its own process group."""
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
        """Run the Flower app in ``app`` to its end, with ``config`` over its ``run-config``; give its log.

        Raise RuntimeError with the logs if it fails, TimeoutExpired after ``timeout`` seconds.
        """
        overrides = " ".join(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in config.items())
        command = [str(_BIN / "flwr"), "run", str(app), "loopback", "--stream", "--run-config", overrides]
        ended = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=timeout, check=False)
        if ended.returncode:
            raise RuntimeError(f"flwr run ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}\n{self.logs()}")
        return ended.stdout

    def logs(self) -> str:
        """Give what all processes have printed."""
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')}" for log in sorted(self.directory.glob("*.log")))

    def _start_all(self) -> None:
        port = free_port()
        address = f"127.0.0.1:{port}"
        config = f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "{address}"\ninsecure = true\n'
        (self.directory / "config.toml").write_text(config)
        simulation = ["--simulation"] if self.simulation else []
        self._start("superlink", ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), *simulation], self._server)
        log = self.directory / "superlink.log"
        wait_until(lambda: listens(port), f"the SuperLink on port {port}", log, self.processes["superlink"])
        for i in range(0 if self.simulation else self.nodes):
            own = f"partition-id={i} num-partitions={self.nodes}"
            command = ["flower-supernode", "--insecure", "--superlink", address, "--host", "127.0.0.1", "--port", str(free_port())]
            self._start(f"supernode-{i}", [*command, "--node-config", own])

    def _start(self, name: str, command: list[str], more: Mapping[str, str] | None = None) -> None:
        check_allowed(command[0])
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
