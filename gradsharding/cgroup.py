"""A memory cgroup stops a process that outgrows its allowance, as a function's sandbox does. Linux, v1 or v2."""

import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import NamedTuple, Self

_MOUNT = Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """The kernel's file names in one version of the interface."""

    limit: str
    swap: str
    events: str


_V1 = _Names("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")
_V2 = _Names("memory.max", "memory.swap.max", "memory.events")


class MemoryCgroup:
    """One cgroup below this process's own, with a limit in bytes; removed by ``close`` once its process is gone."""

    def __init__(self, path: Path, names: _Names) -> None:
        """Use ``create``, which finds out whether this machine lets us."""
        self.path = path
        self._names = names

    @classmethod
    def create(cls, limit: int) -> Self | None:
        """Make a cgroup limited to ``limit`` bytes, or give None where that is not permitted."""
        for parent, names in _candidates():
            path = parent / f"gradsharding-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            with contextlib.suppress(OSError):
                path.mkdir()
                with contextlib.suppress(OSError):
                    (path / names.limit).write_text(str(limit))
                    with contextlib.suppress(OSError):  # absent where swap is not accounted
                        (path / names.swap).write_text("0" if names is _V2 else str(limit))
                    return cls(path, names)
                path.rmdir()
        return None

    def add(self, pid: int) -> bool:
        """Move a process in; False if the kernel refuses."""
        try:
            (self.path / "cgroup.procs").write_text(str(pid))
        except OSError:
            return False
        return True

    def kills(self) -> int:
        """How often the kernel has killed here because the limit was reached."""
        with contextlib.suppress(OSError):
            for line in (self.path / self._names.events).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0

    def close(self) -> None:
        """Remove the cgroup; the kernel may need a moment after its last process ended."""
        for _ in range(50):
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.02)
            else:
                return


def _candidates() -> list[tuple[Path, _Names]]:
    """Where this process's own memory cgroup may be, by ``/proc/self/cgroup``."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if "memory" in controllers.split(","):
                found.append((_MOUNT / "memory" / own.lstrip("/"), _V1))
            elif not controllers:
                found.append((_MOUNT / own.lstrip("/"), _V2))
    return [(path, names) for path, names in found if path.is_dir()]
