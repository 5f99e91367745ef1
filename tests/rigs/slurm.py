"""A Slurm cluster of one node, on loopback. Its daemons run in the foreground and end with the context."""

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

from rigs.processes import free_port, running, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")

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
"""Slurm's configuration (https://slurm.schedmd.com/slurm.conf.html): without accounting and cgroups, so that it runs in a container; with
8 CPUs, whatever the machine has."""


def slurm_missing() -> str | None:
    """Say what keeps Slurm from running here; None if nothing does."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install --no-install-recommends slurmctld slurmd slurm-client munge)"
    return None if os.getuid() == 0 else "Slurm's daemons want root"


@contextlib.contextmanager
def slurm() -> Iterator[Mapping[str, str]]:
    """Start a cluster; give the environment in which Slurm's commands find it. At the end its jobs are cancelled."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as stack:
        place = Path(name)
        place.chmod(0o755)
        for part in ("state", "spool", "munge"):
            (place / part).mkdir()
        environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(place / "slurm.conf")}
        _configure(place)
        stack.enter_context(_munge(place / "munge"))
        for daemon in ("slurmctld", "slurmd"):
            process = stack.enter_context(running([daemon, "-D"], place / f"{daemon}.log", environment))
        stack.callback(_cancel_all, environment)
        wait_until(lambda: _is_idle(environment), "an idle node of Slurm", place / "slurmd.log", process)
        yield environment


def finish(job: str, environment: Mapping[str, str], *, seconds: float = 120) -> str:
    """Wait until a job has ended; give its state and exit status as ``scontrol`` prints them, such as ``COMPLETED 0:0``."""
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
    """Run munged, which authenticates Slurm's daemons to each other, as the user that its package creates."""
    (place / "key").write_bytes(secrets.token_bytes(1024))
    for path in (place / "key", place):
        shutil.chown(path, "munge", "munge")
    (place / "key").chmod(0o400)
    place.chmod(0o711)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    command = ["munged", "--foreground", "--force", *(f"--{option}={place / file}" for option, file in files.items())]
    log = place.parent / "munged.log"
    with running(command, log, {**os.environ, "PATH": _path()}, user="munge") as process:
        wait_until((place / "socket").exists, "munged's socket", log, process)
        yield


def _is_idle(environment: Mapping[str, str]) -> bool:
    shown = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True, check=False)
    return shown.stdout.strip() == "idle"


def _cancel_all(environment: Mapping[str, str]) -> None:
    """Cancel all jobs, and wait until they are gone: their processes are not our children."""
    subprocess.run(["scancel", "--me"], env=environment, check=False, capture_output=True)
    for _ in range(100):
        if not subprocess.run(["squeue", "--noheader"], env=environment, check=False, capture_output=True).stdout.strip():
            return
        time.sleep(0.1)


def _path() -> str:
    """Give the PATH with the directories of daemons, which Debian leaves out for ordinary users."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
