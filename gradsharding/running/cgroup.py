"""Control groups (Linux, v1 or v2) limit the memory of workers, and tell how many CPUs this process may use."""

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, Self

Hold = Literal["cgroup v1", "cgroup v2", "RLIMIT_DATA", "nothing"]
"""What stops a process that outgrows its memory.

cgroup v1, cgroup v2: at the limit the kernel kills it. It counts each page that the process was the first to touch, those of shared
memory and of files too; pages of files on a disk are given back before anything is killed, those of files on a tmpfs are not.
What it held before it was moved in is not counted.
RLIMIT_DATA: at the limit an allocation fails. The kernel counts the private writable memory that is mapped, whether it is used or not,
but neither shared memory, nor mapped files, nor what child processes take.
nothing: no limit is set.
"""

Version = Literal[1, 2]

PERIOD = 60
"""Seconds after which an empty cgroup, whose creator has ended, counts as left behind."""

_LOCK = threading.Lock()
"""Held while this process may move from one cgroup to another, so that the groups below its own do not change meanwhile."""

_PROCESSES, _CHILDREN = "cgroup.procs", "cgroup.subtree_control"

_LIMITS = ("memory.max", "memory.high", "cpu.max", "cpuset.cpus", "io.max")
"""Limits that a process beside the caller's cgroup would escape. Not pids.max: systemd sets it for everything; a worker is one process."""


class _Names(NamedTuple):
    """The kernel's file names in one version of the interface."""

    limit: str
    swap: str
    events: str
    peak: str


_NAMES: dict[Version, _Names] = {
    1: _Names("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control", "memory.max_usage_in_bytes"),
    2: _Names("memory.max", "memory.swap.max", "memory.events", "memory.peak"),
}


class MemoryCgroup:
    """A cgroup with a limit in bytes, below this process's own or beside it; ``close`` removes it once its processes have ended."""

    def __init__(self, path: Path, version: Version) -> None:
        """Use ``create``, which finds out whether this machine permits it."""
        self.path = path
        self._version: Version = version

    @classmethod
    def create(cls, limit: int) -> Self | None:
        """Create a cgroup limited to ``limit`` bytes; return None if that is not permitted.

        Under v2 this may switch the memory controller on for the root's children, or move this process into a leaf of its own cgroup
        if it is alone there; ``close`` moves it back.
        """
        with _LOCK:
            for version, parent in _parents():
                _sweep(parent)
                path = parent / f"gradsharding-{os.getpid()}-{uuid.uuid4().hex[:8]}"
                with contextlib.suppress(OSError):
                    path.mkdir()
                    if _limit(path, version, limit):
                        return cls(path, version)
                    path.rmdir()
                _step_back(parent)
        return None

    @property
    def hold(self) -> Hold:
        """The name of what limits the processes in this cgroup."""
        return "cgroup v1" if self._version == 1 else "cgroup v2"

    def add(self, pid: int) -> bool:
        """Move a process into the cgroup; return False if the kernel refuses."""
        try:
            _write(self.path / _PROCESSES, pid)
        except OSError:
            return False
        return True

    def kills(self) -> int:
        """Return how many processes the kernel has killed at the limit; v2 may count one process twice."""
        for line in _read(self.path / _NAMES[self._version].events).splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0

    def peak(self) -> int:
        """Return the peak memory of the cgroup in bytes; 0 if the kernel does not tell (v2 before Linux 5.19)."""
        return int(_read(self.path / _NAMES[self._version].peak) or 0)

    def close(self) -> None:
        """Remove the cgroup; the kernel may need a moment after the last process has ended."""
        for _ in range(50):
            try:
                self.path.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.02)
            else:
                break
        with _LOCK:
            _step_back(self.path.parent)


def usable_cpus() -> int:
    """Return the number of CPUs that this process can keep busy.

    It is the least of its affinity and of the quotas of its cgroup and of all above that can be seen, each rounded up; at least 1.
    """
    place = locate("cpu", _read(Path("/proc/self/cgroup")), _read(Path("/proc/self/mountinfo")))
    quotas = [_quota(directory, place.version) for directory in place.upwards()] if place else []
    return min([len(os.sched_getaffinity(0)), *(quota for quota in quotas if quota)])


def cpus_of(quota: str, period: str) -> int | None:
    """Return the CPUs that ``quota`` microseconds per ``period`` amount to, rounded up; None without a quota ("max", "-1")."""
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return None
    return -(-int(quota) // int(period))


class Place(NamedTuple):
    """The place of a process in the hierarchy of a controller: its own directory, and the topmost visible one."""

    version: Version
    own: Path
    top: Path

    def upwards(self) -> Iterator[Path]:
        """Iterate over the process's own directory and those above it, up to the top."""
        yield self.own
        for directory in self.own.parents:
            if not directory.is_relative_to(self.top):
                return
            yield directory


def locate(controller: str, cgroups: str, mounts: str) -> Place | None:
    """Find the directory of a process from the texts of ``/proc/PID/cgroup`` and ``/proc/PID/mountinfo``; None if none is visible.

    A container often sees its own cgroup as the mount's top: the mount's root, in that of the host, tells what to leave out.
    """
    # only "\n" ends a line and only " " a field: a path may contain other white space
    paths = {names: path for _, names, path in (line.split(":", 2) for line in cgroups.split("\n") if line)}
    ours = next((names for names in paths if controller in names.split(",")), "")
    found = list[tuple[int, Place]]()
    for line in mounts.split("\n") if ours in paths else ():
        before, _, after = line.partition(" - ")
        kind, options = after.split(" ")[0], after.split(" ")[-1]
        if kind != ("cgroup" if ours else "cgroup2") or (ours and controller not in options.split(",")):
            continue
        root, point = (PurePosixPath(_unescaped(field)) for field in before.split(" ")[3:5])
        own = PurePosixPath(paths[ours])
        if own.is_relative_to(root) and ".." not in own.parts:  # else the mount shows another part of the hierarchy
            found.append((len(root.parts), Place(1 if ours else 2, Path(point / own.relative_to(root)), Path(point))))
    return min(found, default=(0, None), key=lambda mount: mount[0])[1]  # of several mounts, one that shows the most above


def _quota(directory: Path, version: Version) -> int | None:
    if version == 1:
        return cpus_of(_read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us"))
    quota, _, period = _read(directory / "cpu.max").partition(" ")
    return cpus_of(quota, period)


def _parents() -> Iterator[tuple[Version, Path]]:
    """Iterate over the places where a cgroup with a memory limit may be created, the best first.

    v2 gives a cgroup a limit only if the one above has memory in its subtree_control, which one with processes of its own cannot have,
    but for the root. So it is the root, or the cgroup above our own, or our own once we have moved into a leaf.
    """
    place = locate("memory", _read(Path("/proc/self/cgroup")), _read(Path("/proc/self/mountinfo")))
    if not place:
        return
    if place.version == 1:
        yield 1, place.own
        return
    own, above = place.own, place.own.parent
    if _gives_memory(own) or _switch(own, "+memory"):
        yield 2, own
    # moving a process between cgroups needs write permission for the directory above both
    if own != place.top and _gives_memory(above) and os.access(above / _PROCESSES, os.W_OK, effective_ids=True) and _unlimited(own):
        yield 2, above
    if _moved_into_leaf(own):
        yield 2, own


def _limit(path: Path, version: Version, limit: int) -> bool:
    """Set the limit, and check that the kernel took it, in whole pages."""
    names = _NAMES[version]
    try:
        _write(path / names.limit, limit)
    except OSError:
        return False
    with contextlib.suppress(OSError):  # missing if swap is not accounted
        _write(path / names.swap, 0 if version == 2 else limit)
    with contextlib.suppress(OSError):  # v1 has none: it kills one process
        _write(path / "memory.oom.group", 1)
    taken = _read(path / names.limit)
    return taken.isdecimal() and limit - os.sysconf("SC_PAGE_SIZE") < int(taken) <= limit


def _gives_memory(directory: Path) -> bool:
    return "memory" in _read(directory / _CHILDREN).split()


def _switch(directory: Path, controller: str) -> bool:
    try:
        _write(directory / _CHILDREN, controller)
    except OSError:
        return False
    return True


def _unlimited(own: Path) -> bool:
    """Return whether a process beside this cgroup would escape none of its limits."""
    return all(_read(own / name).split(" ")[0] in {"", "max"} for name in _LIMITS)


def _leaf(own: Path) -> Path:
    return own / f"gradsharding-{os.getpid()}-caller"


def _alone(directory: Path) -> bool:
    return _read(directory / _PROCESSES).split() == [str(os.getpid())]


def _moved_into_leaf(own: Path) -> bool:
    """Move this process into a leaf, so that its cgroup may have children with limits, if nobody else is in the cgroup."""
    if "memory" not in _read(own / "cgroup.controllers").split() or not _alone(own):
        return False
    with contextlib.suppress(OSError):
        _leaf(own).mkdir()
        _write(_leaf(own) / _PROCESSES, os.getpid())
        if _switch(own, "+memory"):
            return True
    _step_back(own)
    return False


def _step_back(own: Path) -> None:
    """Move this process back from its leaf, if its cgroup has no other children left."""
    leaf = _leaf(own)
    if not leaf.is_dir() or [leaf] != [path for path in own.iterdir() if path.is_dir()]:
        return
    with contextlib.suppress(OSError):
        if _alone(leaf):
            _write(own / _CHILDREN, "-memory")
            _write(own / _PROCESSES, os.getpid())
        leaf.rmdir()


def _sweep(parent: Path) -> None:
    """Remove cgroups that killed callers have left; the kernel refuses to remove one with processes."""
    for path in parent.glob("gradsharding-*-*"):
        with contextlib.suppress(OSError):
            if not Path("/proc", path.name.split("-")[1]).exists() and time.time() - path.stat().st_mtime > PERIOD:
                path.rmdir()


def _read(path: Path) -> str:
    """Return the text of a kernel file without its last line end; "" if there is no such file, or it may not be read."""
    with contextlib.suppress(OSError):
        return os.fsdecode(path.read_bytes()).rstrip("\n")
    return ""


def _write(path: Path, value: object) -> None:
    """Write to a kernel file; never create one that the kernel does not have."""
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, str(value).encode())
    finally:
        os.close(file)


def _unescaped(field: str) -> str:
    """Undo the escapes of mountinfo: a backslash and three octal digits for a space and the like."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
