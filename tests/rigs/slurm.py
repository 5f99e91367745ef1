"""A real Slurm of one node, on loopback, for tests: its daemons run in the foreground of this process and end with it."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rigs.s3 import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")

START = 30.0
"""Seconds within which the node must be idle."""

CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=2
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:8
"""
"""Of Slurm (https://slurm.schedmd.com/slurm.conf.html): no accounting and no cgroups, so that it runs in a container; and 8 CPUs,
whatever the machine has."""


def slurm_missing() -> str | None:
    """Say what keeps Slurm from running here; None if nothing does."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install --no-install-recommends slurmctld slurmd slurm-client munge)"
    return None if os.getuid() == 0 else "Slurm's daemons want root"


@contextlib.contextmanager
def slurm() -> Iterator[Mapping[str, str]]:
    """Run a cluster of this machine; give the environment in which ``sbatch`` and its like find it. Jobs are cancelled at the end."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as stack:
        place = Path(name)
        place.chmod(0o755)
        for part in ("state", "spool", "munge"):
            (place / part).mkdir()
        environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(place / "slurm.conf")}
        _configure(place)
        stack.enter_context(_munge(place / "munge"))
        for daemon in ("slurmctld", "slurmd"):
            stack.enter_context(_running([daemon, "-D"], place / f"{daemon}.log", environment))
        stack.callback(_cancel_all, environment)
        _wait_until_idle(environment, place)
        yield environment


def finish(job: str, environment: Mapping[str, str], *, seconds: float = 120) -> str:
    """Wait until a job has ended; give its state and exit status, as ``scontrol`` writes them: ``COMPLETED 0:0``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        shown = subprocess.run(["scontrol", "show", "job", job], env=environment, capture_output=True, text=True, check=True).stdout
        fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        if fields["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            return f"{fields['JobState']} {fields['ExitCode']}"
        time.sleep(0.2)
    raise TimeoutError(f"job {job} has not ended after {seconds:g} s:\n{shown}")


def _configure(place: Path) -> None:
    host, memory = socket.gethostname().partition(".")[0], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    text = CONFIG.format(host=host, place=place, controller=free_port(), node=free_port(), memory=min(memory - 1024, 8192))
    (place / "slurm.conf").write_text(text)


@contextlib.contextmanager
def _munge(place: Path) -> Iterator[None]:
    """Run munged, by which the parts of Slurm know each other, as the user that its package makes."""
    (place / "key").write_bytes(secrets.token_bytes(1024))
    for path in (place / "key", place):
        shutil.chown(path, "munge", "munge")
    (place / "key").chmod(0o400)
    place.chmod(0o711)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    command = ["munged", "--foreground", "--force", *(f"--{option}={place / file}" for option, file in files.items())]
    with _running(command, place.parent / "munged.log", {**os.environ, "PATH": _path()}, user="munge"):
        deadline = time.monotonic() + START
        while not (place / "socket").exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"munged has not begun: {(place.parent / 'munged.log').read_text()}")
            time.sleep(0.05)
        yield


@contextlib.contextmanager
def _running(command: list[str], log: Path, environment: Mapping[str, str], user: str | None = None) -> Iterator[None]:
    """Run a daemon in the foreground of a process of ours, and end it."""
    with log.open("wb") as file:
        who = {"user": user, "group": user} if user else {}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, **who)  # type: ignore[call-overload]
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_idle(environment: Mapping[str, str], place: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        shown = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True, check=False)
        if shown.stdout.strip() == "idle":
            return
        time.sleep(0.1)
    logs = "\n".join((place / f"{daemon}.log").read_text()[-2000:] for daemon in ("slurmctld", "slurmd"))
    raise RuntimeError(f"Slurm's node is not idle after {START:g} s:\n{logs}")


def _cancel_all(environment: Mapping[str, str]) -> None:
    """Cancel what still runs, and wait until it is gone: its processes are not ours."""
    subprocess.run(["scancel", "--me"], env=environment, check=False, capture_output=True)
    for _ in range(100):
        if not subprocess.run(["squeue", "--noheader"], env=environment, check=False, capture_output=True).stdout.strip():
            return
        time.sleep(0.1)


def _path() -> str:
    """Where daemons are, which Debian keeps off an ordinary user's path."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
