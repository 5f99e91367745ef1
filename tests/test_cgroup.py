"""What the kernel holds processes to: memory and CPUs. ``tests/vm_cgroup2.py`` runs this file where cgroups are v2."""

import json
import math
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.running.cgroup import MemoryCgroup, Place, cpus_of, locate, usable_cpus

MIB = 1 << 20
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    """Give a cgroup of 64 MiB."""
    if not (made := MemoryCgroup.create(64 * MIB)):
        pytest.skip("this machine lets nobody make a memory cgroup here")
    yield made
    made.close()


def within(cgroup: MemoryCgroup, script: str) -> subprocess.Popen[str]:
    """Start a process in ``cgroup`` that runs ``script`` once it is there."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", f"input(); {script}; print('survived')"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert cgroup.add(process.pid)
    assert cgroup.path.name == Path(place_of(process.pid)).name
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    return process


def place_of(pid: int) -> str:
    """Give the path of a process's memory cgroup, as the kernel tells it."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return next((path for _, names, path in lines if "memory" in names.split(",")), lines[-1][2])


def test_what_fits_survives(cgroup: MemoryCgroup) -> None:
    """A process within its limit ends as it likes; the cgroup tells what it held at most, and that nothing was killed."""
    process = within(cgroup, "data = bytearray(32 << 20)")

    assert ("survived\n", 0) == (process.communicate()[0], process.returncode)
    assert 0 == cgroup.kills()
    assert not cgroup.peak() or 32 * MIB <= cgroup.peak() <= 64 * MIB  # Linux before 5.19 does not tell it under v2


@pytest.mark.parametrize(
    "script",
    ["data = bytearray(96 << 20)", "import mmap; data = mmap.mmap(-1, 96 << 20); data.write(bytes(48 << 20)); data.write(bytes(48 << 20))"],
)
def test_what_outgrows_it_is_killed(cgroup: MemoryCgroup, script: str) -> None:
    """A process that outgrows its limit is killed, whether its memory is its own or shared."""
    process = within(cgroup, script)

    assert ("", -signal.SIGKILL) == (process.communicate()[0], process.returncode)
    assert cgroup.kills() > 0


def test_pages_of_files_are_given_back(cgroup: MemoryCgroup, tmp_path: Path) -> None:
    """A process may read a file larger than its limit: the kernel drops the pages of the file."""
    (tmp_path / "file").write_bytes(bytes(96 * MIB))
    os.sync()
    process = within(cgroup, f"file = open({str(tmp_path / 'file')!r}, 'rb')\nwhile file.read(1 << 20): pass\nTrue")

    assert ("survived\n", 0) == (process.communicate()[0], process.returncode)


def test_limit_is_what_the_kernel_says(cgroup: MemoryCgroup) -> None:
    """The limit in force is the one asked for, to the page; no swap comes beside it."""
    full = str(64 * MIB)
    if cgroup.hold == "cgroup v1":
        assert full == said(cgroup, "memory.limit_in_bytes")
        assert said(cgroup, "memory.memsw.limit_in_bytes") in {full, None}  # None where swap is not accounted
    else:
        assert "cgroup v2" == cgroup.hold
        assert (full, "1") == (said(cgroup, "memory.max"), said(cgroup, "memory.oom.group"))
        assert said(cgroup, "memory.swap.max") in {"0", None}

    other = MemoryCgroup.create(64 * MIB + 1)
    assert other
    assert full in {said(other, "memory.max"), said(other, "memory.limit_in_bytes")}
    other.close()


def said(cgroup: MemoryCgroup, name: str) -> str | None:
    """Give what one of the kernel's files says; None where there is none."""
    path = cgroup.path / name
    return path.read_text().strip() if path.exists() else None


def test_nothing_stays(cgroup: MemoryCgroup) -> None:
    """A closed cgroup is gone, this process is where it was, and closing it again does no harm."""
    home = place_of(os.getpid())
    others = [MemoryCgroup.create(64 * MIB) for _ in range(2)]
    assert all(others)
    for one in others:
        assert one
        one.close()
        one.close()
        assert not one.path.exists()
    assert home == place_of(os.getpid())
    assert cgroup.path.exists()


def test_what_killed_callers_left_is_removed(cgroup: MemoryCgroup) -> None:
    """A cgroup whose maker was killed is removed by the next who makes one, unless it is new, or its maker lives."""
    script = "import os; from gradsharding.running.cgroup import *; "
    script += "print(MemoryCgroup.create(1 << 26).path, flush=True); os.kill(os.getpid(), 9)"
    left = [Path(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout.strip()) for _ in "ab"]
    assert [True, True] == [path.exists() for path in left]
    for path in (left[0], cgroup.path):
        os.utime(path, (0, 0))
    other = MemoryCgroup.create(64 * MIB)
    assert other
    other.close()

    assert [False, True, True] == [path.exists() for path in (*left, cgroup.path)]
    left[1].rmdir()


def test_no_cgroup_file_system() -> None:
    """Where no cgroups are mounted, none is made, no directory or file either, and CPUs are those of the affinity."""
    script = (
        "import os; from gradsharding.running.cgroup import MemoryCgroup, usable_cpus;"
        "print(MemoryCgroup.create(1 << 26), usable_cpus() == len(os.sched_getaffinity(0)), os.listdir('/sys/fs/cgroup'))"
    )
    command = in_namespaces("-m", "mount -t tmpfs none /sys/fs/cgroup", script)

    assert "None True []\n" == subprocess.run(command, capture_output=True, text=True, check=True).stdout


def in_namespaces(which: str, first: str, script: str, enter: Path | None = None) -> list[str]:
    """Give a command that runs a Python script in new namespaces, after a shell command there, in the cgroup ``enter``.

    Skip where that is not permitted.
    """
    if which and subprocess.run(["unshare", which, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody make namespaces and mounts here")
    enters = f"echo $$ > {enter}/cgroup.procs && " if enter else ""
    unshares = f"unshare {which} " if which else ""
    return ["sh", "-c", f'{enters}exec {unshares}sh -c \'{first} && exec "$0" -c "$1"\' "$0" "$1"', sys.executable, script]


# -- CPUs


@pytest.fixture
def groups() -> Iterator[tuple[Path, Path]]:
    """Give a cgroup for CPU quotas, and one in it."""
    mount = V1 if (V1 / "cgroup.procs").exists() else V2
    outer = mount / f"gradsharding-test-{uuid.uuid4().hex[:8]}"
    try:
        (outer / "inner").mkdir(parents=True)
        for path in (mount, outer) if mount is V2 else ():
            (path / "cgroup.subtree_control").write_text("+cpu")
    except OSError as error:
        pytest.skip(f"this machine lets nobody make a CPU cgroup here: {error}")
    yield outer, outer / "inner"
    for path in (outer / "inner", outer):
        for _ in range(50):
            with suppress(OSError):
                path.rmdir()
                break
            time.sleep(0.02)


ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize("view", ["host", "namespace", "bind"])
def test_quotas_count(groups: tuple[Path, Path], view: str) -> None:
    """A process may use as many CPUs as its own quota and those above it come to, also where a container shows it only its own cgroup."""
    (outer, inner), mount = groups, V1 if V1 in groups[0].parents else V2
    kind = "cgroup -o cpu" if mount is V1 else "cgroup2"
    first = {"namespace": f"umount -l {mount} && mount -t {kind} none {mount}", "bind": f"mount --bind {inner} {mount}", "host": "true"}[
        view
    ]
    script = "import sys; from gradsharding.running.cgroup import usable_cpus\nfor _ in sys.stdin: print(usable_cpus(), flush=True)"
    command = in_namespaces({"namespace": "-mC", "bind": "-m", "host": ""}[view], first, script, inner)
    told = list[int]()
    cases = [(None, None), (None, 0.5), (None, 1), (None, 1.01), (None, 99), (0.5, None), (0.5, 0.2)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        for above, own in cases:
            for path, cpus in ((inner, None), (outer, above), (inner, own)):  # v1 refuses more than what is above
                file, none = ("cpu.cfs_quota_us", "-1") if mount is V1 else ("cpu.max", "max")
                (path / file).write_text(str(int(cpus * 100_000)) if cpus else none)
            process.stdin.write("\n")
            process.stdin.flush()
            told.append(int(process.stdout.readline()))
        process.stdin.close()

    assert [ALL, 1, 1, min(2, ALL), min(99, ALL), ALL if view != "host" else 1, 1] == told  # what is above a container cannot be seen in it


def test_affinity_counts() -> None:
    """A process that is bound to one CPU may use one."""
    script = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    script += "from gradsharding.running.cgroup import *; print(usable_cpus())"

    assert "1" == subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert 1 <= usable_cpus() <= ALL


@given(st.integers(1, 10**12), st.integers(1, 10**6))
def test_cpus_of_a_quota(quota: int, period: int) -> None:
    """A quota comes to its share of the period, rounded up."""
    assert math.ceil(Fraction(quota, period)) == cpus_of(str(quota), str(period))


@pytest.mark.parametrize(("quota", "period"), [("max", "100000"), ("-1", "100000"), ("", ""), ("50000", ""), ("0", "100000"), ("1", "0")])
def test_no_quota(quota: str, period: str) -> None:
    """What is no quota counts for nothing."""
    assert cpus_of(quota, period) is None


# -- where a process is

SYSTEMD = "24 1 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"
OLD = """30 23 0:26 {root} /sys/fs/cgroup/memory ro,nosuid master:11 - cgroup cgroup rw,memory
31 23 0:27 {root} /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct"""


@pytest.mark.parametrize(
    ("controller", "cgroups", "mounts", "expected"),
    [
        ("memory", "0::/user.slice/s.scope", SYSTEMD, Place(2, Path("/sys/fs/cgroup/user.slice/s.scope"), Path("/sys/fs/cgroup"))),
        ("cpu", "0::/", SYSTEMD, Place(2, Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup"))),  # a container with a namespace
        ("memory", "0::/../other", SYSTEMD, None),  # moved out of its namespace
        ("memory", "0::/", SYSTEMD.replace(" / /", " /.. /"), None),  # a namespace without a mount of its own
        (
            "cpu",
            "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1",
            OLD.format(root="/docker/1"),
            Place(1, Path("/sys/fs/cgroup/cpu,cpuacct"), Path("/sys/fs/cgroup/cpu,cpuacct")),
        ),
        ("memory", "4:memory:/docker/1", OLD.format(root="/docker/2"), None),
        ("memory", "4:memory:/a", SYSTEMD, None),  # bound to v1, and not mounted
        ("memory", "5:cpu:/a", OLD.format(root="/"), None),
        ("memory", "", "", None),
        (
            "memory",
            "4:memory:/a/b",
            f"{OLD.format(root='/a')}\n32 23 0:26 / /all rw - cgroup none rw,memory",
            Place(1, Path("/all/a/b"), Path("/all")),
        ),
    ],
)
def test_where_a_process_is(controller: str, cgroups: str, mounts: str, expected: Place | None) -> None:
    """The directory of a process is found by what the kernel tells of its cgroups and its mounts, with or without namespaces."""
    assert expected == locate(controller, cgroups, mounts)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\n\0"), min_size=1, max_size=8).filter(
    lambda name: name not in {".", ".."}
)
PATHS = st.lists(NAMES, max_size=3)


def _escaped(path: str) -> str:
    return "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in path)


@given(PATHS, PATHS, PATHS, st.booleans(), st.lists(st.sampled_from(["tmpfs", "cpuset", "elsewhere"])))
def test_any_path_is_found(root: list[str], below: list[str], point: list[str], old: bool, others: list[str]) -> None:
    """Whatever cgroups and mount points are called and else is mounted, a process is at the mount point plus what is below its root."""
    kind = ("cgroup", "rw,memory") if old else ("cgroup2", "rw")
    at = f"/{'/'.join(point)}"
    decoys = {
        "tmpfs": f"1 1 0:1 / {_escaped(at)} rw - tmpfs tmpfs rw,memory",
        "cpuset": "1 1 0:1 / /sys/cpuset rw shared:1 master:2 - cgroup cgroup rw,cpuset",
        "elsewhere": f"1 1 0:1 {_escaped('/'.join(['', *root, 'not', *below]))} /else rw - {kind[0]} none {kind[1]}",
    }
    mount = f"1 1 0:1 {_escaped('/' + '/'.join(root))} {_escaped(at)} rw,relatime shared:4 - {kind[0]} none {kind[1]}"
    cgroups = f"3:cpuset:/x\n{'2:memory' if old else '0:'}:/{'/'.join([*root, *below])}\n"
    found = locate("memory", cgroups, "\n".join([*(decoys[other] for other in others), mount, ""]))

    assert Place(1 if old else 2, Path(at, *below), Path(at)) == found
    assert found
    assert [Path(at, *below[:depth]) for depth in range(len(below), -1, -1)] == list(found.upwards())


# -- what holds a process otherwise


def test_data_limit_counts_private_memory_alone() -> None:
    """RLIMIT_DATA fails what is mapped for a process alone, used or not; shared memory, mapped files and children pass it."""
    told = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    fits: dict[str, Any] = json.loads(told)

    assert {"private": False, "shared": True, "file": True, "child": True} == fits


def _beyond_the_data_limit() -> dict[str, bool]:
    """Say which mappings of 96 MiB the kernel lets a process make that may have 64 MiB more of data; run in a process of its own."""
    now = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + 64 * MIB, now + 64 * MIB))

    def fits(flags: int, file: int = -1) -> bool:
        with suppress(OSError), mmap.mmap(file, 96 * MIB, flags=flags):
            return True
        return False

    with tempfile.TemporaryFile() as file:
        file.truncate(96 * MIB)
        found = {"private": fits(mmap.MAP_PRIVATE), "shared": fits(mmap.MAP_SHARED), "file": fits(mmap.MAP_SHARED, file.fileno())}
    with mmap.mmap(-1, 48 * MIB, flags=mmap.MAP_PRIVATE):
        child = [sys.executable, "-S", "-c", "bytearray(48 << 20)"]
        return {**found, "child": not subprocess.run(child, check=False, capture_output=True).returncode}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_beyond_the_data_limit()))
