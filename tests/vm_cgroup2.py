"""The cgroup tests on a kernel with cgroup v2, in a virtual machine, in the layouts met in use. Run by hand; it takes some minutes.

It needs QEMU, a static busybox, and a kernel of Debian's, with its modules; it emulates, so any x86-64 machine will do::

    apt-get install --no-install-recommends qemu-system-x86 busybox-static cpio
    apt-get download linux-image-6.1.0-56-amd64 && dpkg-deb -x linux-image-*.deb kernel
    python tests/vm_cgroup2.py kernel

The machine sees this one's files, and keeps what it writes in its own memory.
"""

# ruff: noqa: T201 - what it prints is what the machine's console shows

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradsharding.running.cgroup import MemoryCgroup, usable_cpus

TREE = Path(__file__).parents[1]
TOP = Path("/sys/fs/cgroup")
MODULES = """virtio/virtio virtio/virtio_ring virtio/virtio_pci_legacy_dev virtio/virtio_pci_modern_dev virtio/virtio_pci
fscache/fscache netfs/netfs 9p/9pnet 9p/9pnet_virtio 9p/9p overlayfs/overlay"""
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
for again in 1 2 3 4; do for module in /modules/*; do insmod $module 2>/dev/null; done; done # in whatever order they need
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose host /host
mount -t tmpfs t /own; mkdir /own/upper /own/work
mount -t overlay -o lowerdir=/host,upperdir=/own/upper,workdir=/own/work o /new
mount -t proc p /new/proc; mount -t sysfs s /new/sys; mount -t devtmpfs d /new/dev
mkdir /new/dev/shm; mount -t tmpfs -o mode=1777 m /new/dev/shm; mount -t tmpfs -o mode=1777 t /new/tmp
mount -t cgroup2 -o nsdelegate c /new/sys/fs/cgroup
ip link set lo up; chmod 755 /new/root
exec switch_root /new /bin/sh -c {command}
"""
PYTEST = ["-m", "pytest", "-q", "-rs", "--color=no", "-p", "no:cacheprovider", "-k", "not any_path and not cpus_of", "tests/test_cgroup.py"]
PASSED = "every layout holds"


class Layout(NamedTuple):
    """How cgroups are laid out round a process: what is expected of ``MemoryCgroup`` there, and CPUs of four."""

    name: str
    group: str
    """Where the process is, below the top."""
    parent: str | None
    """Where its workers' cgroups are made; None if none can be."""
    moved: bool = False
    """Whether it moves into a leaf of its cgroup meanwhile."""
    alone: bool = True
    user: int = 0
    owned: Sequence[str] = ()
    """Cgroups that are given to the user."""
    limits: Sequence[tuple[str, str]] = ()
    """Files below the top, and what is written to them."""
    namespace: str = ""
    """A shell command run first in new namespaces, of cgroups and of mounts."""
    cpus: int = 4


SERVICE = "system.slice/fl.service"
USER = "user.slice/user-1000.slice"
MANAGER = f"{USER}/user@1000.service"
REMOUNT = f"umount {TOP} && mount -t cgroup2 {{}} c {TOP}"
LAYOUTS = [
    Layout("root in the root", "", "", alone=False),
    Layout("root in a session, beside others", "user.slice/user-0.slice/session-1.scope", "user.slice/user-0.slice", alone=False),
    Layout(
        "a session with a memory limit, beside others", "a.slice/b.scope", None, alone=False,
        limits=[("a.slice/b.scope/memory.max", "1G")],
    ),
    Layout(
        "a session with a limit of CPUs, alone", "a.slice/b.scope", "a.slice/b.scope", moved=True,
        limits=[("a.slice/b.scope/cpu.max", "150000")], cpus=2
    ),
    Layout("a slice with a limit of CPUs", "a.slice/b.scope", "a.slice", alone=False, limits=[("a.slice/cpu.max", "50000 100000")], cpus=1),
    Layout("a user's session", f"{USER}/session-1.scope", None, user=1000, alone=False),
    Layout(
        "a scope of the user's own manager", f"{MANAGER}/app.slice/run.scope", f"{MANAGER}/app.slice", user=1000, alone=False,
        owned=[MANAGER, f"{MANAGER}/app.slice", f"{MANAGER}/app.slice/run.scope"],
    ),
    Layout("a delegated service", SERVICE, SERVICE, moved=True, user=1000, owned=[SERVICE]),
    Layout("a delegated service of several processes", SERVICE, None, user=1000, owned=[SERVICE], alone=False),
    Layout(
        "a container that may write", "docker/1", "", moved=True, namespace=REMOUNT.format("-o rw"),
        limits=[("docker/1/memory.max", "512M"), ("docker/1/cpu.max", "250000")], cpus=3,
    ),
    Layout(
        "a container that may not", "docker/1", None, namespace=REMOUNT.format("-o ro"), limits=[("docker/1/cpu.max", "250000")], cpus=3
    ),
    Layout("a container of several processes", "docker/1", None, namespace=REMOUNT.format("-o rw"), alone=False),
]  # fmt: skip


def main() -> None:
    """Boot the machine, or run in it."""
    if sys.argv[1] == "--inside":
        inside()
    elif sys.argv[1] == "--probe":
        print(json.dumps(probe()))
    else:
        boot(Path(sys.argv[1]))


def boot(kernel: Path) -> None:
    """Run ``inside`` in a machine with ``kernel``, a directory with boot/ and lib/modules/."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "root")
        for name in ("bin", "modules", "proc", "sys", "dev", "host", "own", "new"):
            (root / name).mkdir(parents=True)
        for name in MODULES.split():
            (found,) = kernel.glob(f"lib/modules/*/kernel/**/{name}.ko")
            (root / "modules" / found.name).write_bytes(found.read_bytes())
        busybox = root / "bin/busybox"
        busybox.write_bytes(Path("/bin/busybox").read_bytes())
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        command = shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, __file__, "--inside"])
        whole = f"cd {TREE}; {command}; echo o > /proc/sysrq-trigger; while :; do :; done"
        (root / "init").write_text(INIT.format(command=shlex.quote(whole)))
        for program in (busybox, root / "init"):
            program.chmod(0o755)
        names = "".join(f"{path.relative_to(root)}\n" for path in root.rglob("*"))
        image = subprocess.run(["cpio", "-oH", "newc"], cwd=root, input=names.encode(), capture_output=True, check=True).stdout
        Path(scratch, "image").write_bytes(image)
        (linux,) = kernel.glob("boot/vmlinuz-*")
        machine = """qemu-system-x86_64 -accel tcg -cpu max -smp 4 -m 3G -nodefaults -nographic -no-reboot -serial stdio
            -device virtio-9p-pci,fsdev=h,mount_tag=host -fsdev local,id=h,path=/,security_model=none,readonly=on,multidevs=remap"""
        arguments = [
            "-kernel",
            str(linux),
            "-initrd",
            f"{scratch}/image",
            "-append",
            "console=ttyS0 quiet loglevel=2 panic=-1 mitigations=off",
        ]
        with subprocess.Popen([*machine.split(), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout
            passed = False
            for line in process.stdout:
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()
                passed |= PASSED.encode() in line
    sys.exit(not passed)


def inside() -> None:
    """Try every layout, then run the tests in one of each kind."""
    failed = 0
    for layout in LAYOUTS:
        found = laid_out(layout, lambda start: json.loads(start([__file__, "--probe"], capture=True)))
        hold = None if layout.parent is None else "cgroup v2"
        expected = {"hold": hold, "parent": layout.parent, "moved": layout.moved, "back": True, "cpus": layout.cpus}
        expected |= {"there": True, "status": -9, "killed": True, "gone": True} if hold else {}
        failed += expected != found
        print(f"{'ok' if expected == found else f'FAILED, expected {expected}'} - {layout.name}: {found}", flush=True)
    for layout in (LAYOUTS[0], LAYOUTS[7]):
        print(f"== tests/test_cgroup.py in: {layout.name}", flush=True)
        try:
            laid_out(layout, lambda start: start(PYTEST, capture=False))
        except subprocess.CalledProcessError:
            failed += 1
    print(f"{failed} failed" if failed else PASSED)


def laid_out(layout: Layout, run: Callable[[Callable[..., str]], Any]) -> Any:
    """Make the cgroups of a layout as systemd or a container's runtime would; give what ``run`` gives; remove them."""
    groups = [TOP.joinpath(*layout.group.split("/")[: depth + 1]) for depth in range(layout.group.count("/") + bool(layout.group))]
    switch(TOP, "-memory -cpu" if not groups else "+memory +cpu")
    for group in groups:
        group.mkdir()
        if group != groups[-1]:
            switch(group, "+memory +cpu")
    for name in layout.owned:
        for path in (TOP / name, *(TOP / name / file for file in ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads"))):
            os.chown(path, layout.user, layout.user)
    for file, value in layout.limits:
        (TOP / file).write_text(value)
    enters = f"echo $$ > {TOP / layout.group}/cgroup.procs && exec"

    def start(arguments: Sequence[str], *, capture: bool) -> str:
        command = ["sh", "-c", f'{enters} "$@"', "sh", *as_in(layout), sys.executable, *arguments]
        environment = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": f"/dev/shm/{layout.user}"}  # noqa: S108 - the machine's own
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE if capture else None, text=True, cwd=TREE)
        return done.stdout or ""

    with contextlib.ExitStack() as stack:
        if not layout.alone:
            other = stack.enter_context(subprocess.Popen(["sh", "-c", f"{enters} sleep 1d"]))
            stack.callback(other.kill)
            while "sleep" not in Path(f"/proc/{other.pid}/comm").read_text():
                pass
        found = run(start)
    for group in reversed(groups):
        group.rmdir()  # fails if a cgroup was left there
    return found


def as_in(layout: Layout) -> list[str]:
    """Give the start of a command that runs the rest in the namespaces and as the user of a layout."""
    spaces = ["unshare", "-mC", "sh", "-c", f'{layout.namespace} && exec "$@"', "sh"] if layout.namespace else []
    return [*spaces, *(["setpriv", f"--reuid={layout.user}", f"--regid={layout.user}", "--clear-groups"] if layout.user else [])]


def probe() -> dict[str, Any]:
    """Make a cgroup, have a process outgrow it, and remove it; tell what happened."""
    home = place(os.getpid())
    cgroup = MemoryCgroup.create(64 << 20)
    meanwhile = place(os.getpid())
    found: dict[str, Any] = {"hold": cgroup and cgroup.hold, "parent": None, "moved": meanwhile != home, "cpus": usable_cpus()}
    if cgroup:
        found["parent"] = str(cgroup.path.parent.relative_to(TOP)).strip(".")
        with subprocess.Popen([sys.executable, "-S", "-c", "input(); bytearray(96 << 20)"], stdin=subprocess.PIPE) as process:
            added = cgroup.add(process.pid)
            found["there"] = added and place(process.pid) == f"/{cgroup.path.relative_to(TOP)}"
            process.communicate(b"\n")
        found |= {"status": process.returncode, "killed": cgroup.kills() > 0}
        cgroup.close()
        found["gone"] = not cgroup.path.exists()
    return {**found, "back": home == place(os.getpid())}


def place(pid: int) -> str:
    """Give the cgroup of a process."""
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")


def switch(group: Path, controllers: str) -> None:
    """Switch controllers of a cgroup's children on or off."""
    (group / "cgroup.subtree_control").write_text(controllers)


if __name__ == "__main__":
    main()
