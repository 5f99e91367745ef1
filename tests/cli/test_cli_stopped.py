"""Commands that are killed, interrupted, or that nobody listens to."""

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.numpy
import safetensors.torch

from gradsharding.rounds.round import Round
from gradsharding.stores.directory import DirectoryStore
from rigs.command import COMMAND, LARGE, done, everything, gradsharding, model, slow, start, wait_for_slices


@pytest.mark.parametrize("executor", ["inline", slow("processes:2")])
def test_killed_run_is_resumed(large: Path, tmp_path: Path, executor: str) -> None:
    """After kill -9 there is no output; the same command does the rest, and makes what an uninterrupted run makes."""
    out, report, whole = tmp_path / "out" / "mean", tmp_path / "r.json", tmp_path / "whole"
    out.parent.mkdir()
    command = [str(out), "--shards", "1000", "--executor", executor, "--store", str(tmp_path / "store"), "--report", str(report)]
    with start(large, *command) as run:
        wait_for_slices(run, out.parent, 20)
        run.kill()
    assert (-signal.SIGKILL, False) == (run.returncode, out.exists())

    said = done(gradsharding("aggregate", *LARGE, "-o", *command, cwd=large))
    done(gradsharding("aggregate", *LARGE, "-o", str(whole), "--report", str(tmp_path / "whole.json"), cwd=large))

    resumed = json.loads(report.read_text())
    now = len(resumed["stages"][0]["tasks"])
    assert 0 < now <= 980
    assert f"1,000 slices, {now} of them now" in said
    assert json.loads((tmp_path / "whole.json").read_text())["digest"] == resumed["digest"]
    assert whole.read_bytes() == out.read_bytes()
    assert [out] == everything(out.parent)


def in_shared_memory(store: Path) -> list[Path]:
    """Say where in shared memory the partial sums of a store's rounds under way are: other processes have theirs there, too."""
    begun = [(path.parent.name, json.loads(path.read_text())["upload"]) for path in store.glob("rounds/*/plan.json")]
    places = [Round(DirectoryStore(store), name).partials(upload, shared_memory=True) for name, upload in begun]
    return [Path(place.removeprefix("shm://")) for place in places]


@pytest.mark.parametrize(
    "topology", [slow("sharded-tree --shards 400 --fan-in 1"), slow("lifl --fan-in 1"), "lifl --fan-in 1 --shared-memory"]
)
@pytest.mark.slow
def test_killed_tree_is_resumed(large: Path, tmp_path: Path, topology: str) -> None:
    """The same for trees: partial sums that were written count, and none are left behind, in the store or in shared memory."""
    out, whole, store = tmp_path / "out" / "mean", tmp_path / "whole", tmp_path / "store"
    out.parent.mkdir()
    command = [str(out), "--topology", *topology.split(), "--executor", "processes:1", "--store", str(store)]
    with start(large, *command) as run:
        for _ in range(60_000):
            assert run.poll() is None, "the run ended before it could be stopped"
            shared = in_shared_memory(store)
            if [*store.glob("rounds/*/partials/*/*"), *(path for place in shared for path in place.glob("lifl.*"))]:
                break
            time.sleep(0.001)
        run.kill()
    assert (-signal.SIGKILL, False) == (run.returncode, out.exists())
    assert [topology.endswith("--shared-memory")] == [place.exists() for place in shared]

    said = done(gradsharding("aggregate", *LARGE, "-o", *command, cwd=large))
    done(gradsharding("aggregate", *LARGE, "-o", str(whole), cwd=large))

    assert " of them now" in said
    assert whole.read_bytes() == out.read_bytes()
    assert [False] == [place.exists() for place in shared]
    assert [] == [path for path in store.glob("rounds/*/partials/**/*") if path.is_file()]


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGQUIT": 131}


@pytest.mark.parametrize(
    ("executor", "name", "status"),
    [
        *(("inline", name, SIGNALS[name]) for name in ("SIGINT", "SIGHUP")),
        *(slow("inline", name, SIGNALS[name]) for name in ("SIGTERM", "SIGQUIT")),
        *(slow("processes:2", name, status) for name, status in SIGNALS.items()),
        slow("threads:2", "SIGINT", SIGNALS["SIGINT"]),
        ("threads:2", "SIGTERM", SIGNALS["SIGTERM"]),
    ],
)
def test_interrupted_run_leaves_nothing(large: Path, tmp_path: Path, executor: str, name: str, status: int) -> None:
    """Ctrl-C, which reaches the whole process group, SIGTERM, a closed terminal and SIGQUIT end a run at once, without a trace."""
    with start(large, str(tmp_path / "out"), "--shards", "1000", "--executor", executor) as run:
        wait_for_slices(run, tmp_path, 20)
        for _ in range(2 if name == "SIGHUP" else 1):  # which the shell sends, and the kernel
            os.killpg(run.pid, signal.Signals[name])
        said, complaint = run.communicate(timeout=60)

    assert (status, "") == (run.returncode, said)
    assert "Traceback" not in complaint
    assert [] == everything(tmp_path)


def test_terminal_that_lacks_a_character(updates: list[str], tmp_path: Path) -> None:
    """A name that the terminal's encoding lacks is printed with a question mark: the run has done its work, and does not fail."""
    command = ["aggregate", *updates, "-o", "\u65e5\u672c", "--executor", "inline"]
    said = done(gradsharding(*command, cwd=tmp_path, PYTHONIOENCODING="latin-1"))

    assert said.startswith("??: mean of 3 clients")
    assert (tmp_path / "\u65e5\u672c").exists()


def test_interrupted_slice_is_not_tried_again(large: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of one long slice gives it up, rather than to take its worker for one that died."""
    many = [f"c{i}=a.safetensors" for i in range(300)]
    command = [COMMAND, "aggregate", *many, "-o", str(tmp_path / "out"), "--topology", "flat"]
    with subprocess.Popen(command, cwd=large, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as run:
        wait_for_slices(run, tmp_path, 0)
        time.sleep(0.5)  # its worker starts, and reads
        os.killpg(run.pid, signal.SIGINT)
        said, complaint = run.communicate(timeout=60)

    assert (130, "", "gradsharding: interrupted") == (run.returncode, said, complaint.strip())
    assert [] == everything(tmp_path)


@pytest.mark.slow
def test_nohup(large: Path, tmp_path: Path) -> None:
    """A signal that is ignored when a run starts, as under nohup, does not end it."""
    command = ["nohup", COMMAND, "aggregate", *LARGE, "-o", str(tmp_path / "out"), "--shards", "200", "--executor", "inline"]
    with subprocess.Popen(command, cwd=large, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        wait_for_slices(run, tmp_path, 2)
        run.send_signal(signal.SIGHUP)
        run.communicate(timeout=60)

    assert (0, [tmp_path / "out"]) == (run.returncode, everything(tmp_path))


CLOSED = ["2>&-", ">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&1 | head -0", "| true"]


@pytest.mark.parametrize(
    ("streams", "executor"),
    [
        *((streams, "inline") for streams in CLOSED[4:6]),
        *(slow(streams, "inline") for streams in CLOSED[:4] + CLOSED[6:]),
        *(slow(streams, "processes:1") for streams in CLOSED[3:6]),
    ],
)
def test_nobody_listens(updates: list[str], tmp_path: Path, streams: str, executor: str) -> None:
    """With streams that are closed, or whose reader leaves, a run does its work, and nothing it says gets into a file."""
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    line = f"{COMMAND} aggregate {' '.join(updates)} -o out --executor {executor} {streams}; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)

    assert (0, "") == (run.returncode, run.stderr)
    assert set(model(0)) == set(safetensors.torch.load_file(tmp_path / "out"))
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "out"}


@pytest.mark.slow
def test_nobody_listens_to_a_mistake(tmp_path: Path) -> None:
    """A mistake that nobody can be told of still ends with its status."""
    for streams in ("2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        line = f"{COMMAND} aggregate nowhere.safetensors -o out {streams}"
        assert 2 == subprocess.run(["bash", "-c", line], cwd=tmp_path, check=False, timeout=60).returncode

    line = f"{COMMAND} plan --size 1GB --clients 2 | head -0; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (0, "", "") == (run.returncode, run.stdout, run.stderr)


def test_full_disk_for_what_is_said(tmp_path: Path) -> None:
    """What cannot be written to standard output is a mistake, told in one line; a reader who leaves is none."""
    with Path("/dev/full").open("w") as full:
        run = subprocess.run([COMMAND, "--version"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)

    assert (2, 1) == (run.returncode, run.stderr.count("\n"))
    assert "No space left on device; check the path" in run.stderr


def test_output_that_cannot_be_told(updates: list[str], tmp_path: Path) -> None:
    """A name of control characters, or of bytes that are no text, is written, and told in a line that cannot be mistaken."""
    name = b"o\x1b[31m\nforged: done\xff"
    run = subprocess.run(
        [COMMAND, "aggregate", *updates, "-o", name, "--executor", "inline"], cwd=tmp_path, capture_output=True, check=False, timeout=60
    )

    assert (0, b"") == (run.returncode, run.stderr)
    assert run.stdout.startswith(b"o [31m forged: done : mean of 3 clients")
    assert (tmp_path / os.fsdecode(name)).exists()


def test_progress_is_shown_to_a_terminal_only(large: Path, tmp_path: Path) -> None:
    """The bar goes to standard error if that is a terminal; standard output has the summary only."""
    ours, theirs = pty.openpty()
    args = ["aggregate", "a.safetensors", "b.safetensors", "-o", str(tmp_path / "out"), "--shards", "500"]
    with subprocess.Popen(
        [COMMAND, *args], cwd=large, stdout=subprocess.PIPE, stderr=theirs, text=True, env={**os.environ, "TERM": "xterm"}
    ) as run:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 4096):
                seen += piece
        except OSError:  # how Linux says that the other side has closed
            os.close(ours)
        assert run.stdout
        said = run.stdout.read()

    assert (0, 1, True) == (run.returncode, said.count("slices"), said.isascii())
    assert b"slices" in seen
    assert b"/500" in seen
