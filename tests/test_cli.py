"""The command line: what it does, what it says, and what it leaves behind, run as the real command wherever that matters."""

import ast
import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from gradsharding.cli.inputs import read_updates
from gradsharding.cli.main import COMMANDS, main
from gradsharding.cli.terminal import ENDING
from gradsharding.errors import UserError
from gradsharding.planning.topologies import TOPOLOGIES
from gradsharding.rounds.round import Round
from gradsharding.stores.directory import DirectoryStore

COMMAND = str(Path(sys.executable).parent / "gradsharding")
ROOT = Path(__file__).parents[1]
WEIGHTS = {"ann": 120, "bob": 80, "cyd": 3}

slow = partial(pytest.param, marks=pytest.mark.slow)


def gradsharding(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command and wait for it."""
    return subprocess.run([COMMAND, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=120)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Undo what a command within this process has done to its signals."""
    before = {name: signal.getsignal(signal.Signals[name]) for name in ENDING}
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """The command within this process, for what does not need another one; gives what it said, having ended well."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> str:
        status = main(args)
        said, complaint = capsys.readouterr()
        assert (0, "") == (status, complaint)
        return str(said)

    with signals_kept():
        yield call


def done(run: subprocess.CompletedProcess[str]) -> str:
    """Give what a run that ended well said, having said nothing else."""
    assert (0, "") == (run.returncode, run.stderr)
    return run.stdout


def flowing(text: str) -> str:
    """Give text as one line with single spaces, however it was wrapped."""
    return " ".join(text.split())


def everything(directory: Path) -> list[Path]:
    """All that lies below a directory, hidden files included."""
    return sorted(directory.rglob("*"))


def model(seed: int) -> dict[str, torch.Tensor]:
    """A small state dict with every kind of tensor that training leaves behind."""
    g = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=g),
        "head.weight": torch.randn(17, 5, generator=g, dtype=torch.float64),
        "half": torch.randn(31, generator=g).half(),
        "brain": torch.randn(37, generator=g).bfloat16(),
        "temperature": torch.randn((), generator=g),
        "none": torch.empty(0, 4),
        "num_batches_tracked": torch.tensor(1000 + 7 * seed),
    }


@pytest.fixture
def updates(tmp_path: Path) -> list[str]:
    """Three clients' files in the working directory, as arguments."""
    for seed, client in enumerate(WEIGHTS):
        safetensors.torch.save_file(model(seed), tmp_path / f"{client}.safetensors")
    return [f"{client}.safetensors:{weight}" for client, weight in WEIGHTS.items()]


@pytest.fixture
def narrow(updates: list[str], tmp_path: Path) -> list[str]:
    """The same files, without float64."""
    for seed, client in enumerate(WEIGHTS):
        state = {name: tensor for name, tensor in model(seed).items() if tensor.dtype != torch.float64}
        safetensors.torch.save_file(state, tmp_path / f"{client}.safetensors")
    return updates


def reference(states: Sequence[dict[str, torch.Tensor]], weights: Sequence[int]) -> dict[str, torch.Tensor]:
    """The weighted mean by the book: float64, clients in order, one rounding; integers exactly, halves to even."""
    mean = {}
    for name, like in states[0].items():
        if not like.is_floating_point():
            exact = Fraction(sum(w * int(state[name]) for state, w in zip(states, weights, strict=True)), sum(weights))
            mean[name] = torch.tensor(round(exact), dtype=like.dtype)
            continue
        total = np.zeros(tuple(like.shape))
        for state, weight in zip(states, weights, strict=True):
            total += weight * state[name].double().numpy()
        mean[name] = once_rounded(total / sum(weights), like.dtype)
    return mean


def once_rounded(values: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """Round float64 once; bfloat16, which torch reaches by way of float32, by a look into the list of all its values."""
    if dtype != torch.bfloat16:
        return torch.from_numpy(np.asarray(values, {torch.float64: "f8", torch.float32: "f4", torch.float16: "f2"}[dtype]))
    known = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).double().numpy()
    below = np.searchsorted(known, np.abs(values), "right") - 1
    middle = (known[below] + known[below + 1]) / 2
    up = (np.abs(values) > middle) | ((np.abs(values) == middle) & (below % 2 == 1))
    return torch.from_numpy(np.copysign(known[below + up], values)).bfloat16()


def bits(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """A state dict as values that compare bit for bit."""
    return {n: (t.dtype, list(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for n, t in state.items()}


def test_reference_rounds_bfloat16_to_nearest_even() -> None:
    """The reference itself: 1 + 2⁻⁸ lies between two bfloat16 values and goes to the even one; a hair more goes up."""
    rounded = once_rounded(np.array([1 + 2**-8, 1 + 2**-8 + 2**-40, -(1 + 3 * 2**-8)]), torch.bfloat16)

    assert [1.0, 1 + 2**-7, -(1 + 2**-6)] == rounded.tolist()


@pytest.mark.parametrize("executor", ["inline", slow("processes:2")])
@pytest.mark.parametrize("shards", [1, 2, 3, 7, 64])
def test_result_is_the_reference_bit_for_bit(updates: list[str], tmp_path: Path, shards: int, executor: str) -> None:
    """Whatever the shards and the executor, torch loads the float64 mean, rounded once."""
    done(gradsharding("aggregate", *updates, "-o", "out", "--shards", str(shards), "--executor", executor, cwd=tmp_path))

    expected = reference([model(seed) for seed in range(3)], [*WEIGHTS.values()])
    assert bits(expected) == bits(safetensors.torch.load_file(tmp_path / "out"))


def test_flat_equals_sharded(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """All topologies make the same file."""
    for topology in TOPOLOGIES:
        call("aggregate", *updates, "-o", topology, "--topology", topology, "--executor", "threads:2")

    assert 1 == len({(tmp_path / topology).read_bytes() for topology in TOPOLOGIES})


def test_summary_names_the_result_and_what_it_took(updates: list[str], call: Callable[..., str]) -> None:
    """A run says what it made, how, and the memory projected and observed, one fact a line."""
    lines = call("aggregate", *updates, "-o", "out", "--shards", "2", "--executor", "processes:1").splitlines()

    assert "out: mean of 3 clients, 0.1 MiB" == lines[0]
    assert "  topology  sharded: 2 slices" == lines[1]
    assert re.fullmatch(r"  memory    [\d.]+ MiB projected for a function, [\d.]+ MiB observed.*", lines[2])
    assert re.fullmatch(r"  time      \d+\.\d\d s", lines[-1])


def test_nothing_else_is_left(updates: list[str], tmp_path: Path) -> None:
    """Beside the output, a run leaves nothing, not even an empty directory."""
    before = everything(tmp_path)

    done(gradsharding("aggregate", *updates, "-o", "out", cwd=tmp_path))

    assert sorted([*before, tmp_path / "out"]) == everything(tmp_path)


def test_existing_output_is_replaced(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """An output that is there gives way to the new one."""
    (tmp_path / "out").write_text("old")

    call("aggregate", *updates, "-o", "out")

    assert set(model(0)) == set(safetensors.torch.load_file(tmp_path / "out"))


def test_existing_output_survives_a_failure(updates: list[str], tmp_path: Path) -> None:
    """A run that fails does not touch the output that was there."""
    (tmp_path / "out").write_text("old")

    assert 2 == gradsharding("aggregate", *updates, "-o", "out", "--memory", "1MiB", cwd=tmp_path).returncode

    assert "old" == (tmp_path / "out").read_text()


@pytest.mark.parametrize("option", ["--output", "--report"])
@pytest.mark.parametrize("link", ["one", "absolute", "two", "dangling"])
def test_link_is_followed(updates: list[str], call: Callable[..., str], tmp_path: Path, link: str, option: str) -> None:
    """What is written through links lands in the file that they lead to, which may not be there yet; the links stay."""
    (tmp_path / "there").mkdir()
    target, name = tmp_path / "there" / "file", tmp_path / "name"
    if link != "dangling":
        target.write_text("old")
    if link == "two":
        (tmp_path / "there" / "second").symlink_to("file")
    name.symlink_to({"absolute": target, "two": Path("there/second")}.get(link, Path("there/file")))
    leads = name.readlink()

    call("aggregate", *updates, *(["-o", "out", option, "name"] if option == "--report" else [option, "name"]))

    assert (leads, False) == (name.readlink(), target.is_symlink())
    written = json.loads(target.read_text())["clients"] if option == "--report" else len(safetensors.torch.load_file(target))
    assert {"--report": 3, "--output": len(model(0))}[option] == written
    assert [] == [path.name for path in tmp_path.rglob(".gradsharding*")]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400, 0o755])
def test_mode_and_owner_stay(updates: list[str], call: Callable[..., str], tmp_path: Path, mode: int) -> None:
    """What replaces a file has its mode, and, as far as this user may, its owner; a new file has the mode of the umask."""
    owner = 65_534 if os.getuid() == 0 else os.getuid()
    for name in ("out", "report"):
        (tmp_path / name).write_text("old")
        os.chown(tmp_path / name, owner, -1)
        (tmp_path / name).chmod(mode)
    before = os.umask(0o027)
    try:
        call("aggregate", *updates, "-o", "out", "--report", "report")
        call("aggregate", *updates, "-o", "new", "--report", "new report")
    finally:
        os.umask(before)

    assert [(mode, owner)] * 2 == [((tmp_path / n).stat().st_mode & 0o7777, (tmp_path / n).stat().st_uid) for n in ("out", "report")]
    assert [0o640] * 2 == [(tmp_path / name).stat().st_mode & 0o7777 for name in ("new", "new report")]


def test_draft_of_a_private_file_is_private(large: Path, tmp_path: Path) -> None:
    """While it is made, what will replace a private file is as private as that."""
    (tmp_path / "out").touch(0o600)
    with start(large, str(tmp_path / "out"), "--shards", "1000", "--executor", "inline") as run:
        wait_for_slices(run, tmp_path, 5)
        modes = {path.stat().st_mode & 0o077 for path in tmp_path.glob(".gradsharding/uploads/*/data")}
        run.terminate()
        run.communicate(timeout=60)

    assert {0} == modes


def test_name_of_a_dash(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """A file may be named "-", if its path says that a file is meant."""
    call("aggregate", *updates, "-o", "./-")

    assert set(model(0)) == set(safetensors.torch.load_file(tmp_path / "-"))


def test_updates_by_url_and_by_id(updates: list[str], tmp_path: Path) -> None:
    """A file:// URL and an id of its own name the same update: the id decides the order, not the result's form."""
    url = (tmp_path / "a b.safetensors").as_uri()
    (tmp_path / "ann.safetensors").rename(tmp_path / "a b.safetensors")

    done(gradsharding("aggregate", f"ann={url}:120", *updates[1:], "-o", (tmp_path / "o t").as_uri(), cwd=tmp_path))

    expected = reference([model(seed) for seed in range(3)], [*WEIGHTS.values()])
    assert bits(expected) == bits(safetensors.torch.load_file(tmp_path / "o t"))


def test_report(updates: list[str], tmp_path: Path) -> None:
    """A report is JSON: projected beside observed, the tasks, and the digest of the data, which shards do not change."""
    reports = {}
    for shards in (1, 5):
        name = f"r{shards}.json"
        done(gradsharding("aggregate", *updates, "-o", "out", "--shards", str(shards), "--report", name, cwd=tmp_path))
        reports[shards] = json.loads((tmp_path / name).read_text())

    report, data = reports[5], (tmp_path / "out").read_bytes()
    projected, observed = report["projected"], report["observed"]
    figures = {"gets", "puts", "bytes_read", "bytes_written", "peak_memory", "stores", "caller"}
    of_round = {"made_by", "topology", "rule", "clients", "bytes", "stages", "cost", "cost_missing", "digest"}
    assert of_round | {"concurrency", "taken", "projected", "observed"} == set(report)
    assert (None, None) == (report["concurrency"], report["taken"])
    assert (None, "no Lambda invocation was reported: nothing to bill") == (report["cost"], report["cost_missing"])
    assert (figures, figures | {"deletes", "seconds", "wall_seconds", "unmeasured", "held_by", "lost_attempts"}) == (
        set(projected),
        set(observed),
    )
    assert ("sharded", 3, 5) == (report["topology"], report["clients"], len(report["stages"][0]["tasks"]))
    # gets: 3 headers, 15 slices, is there a result or a plan, the digest; puts: 4 records, begin, header, 5 slices, end
    assert (
        [projected[name] for name in ("gets", "puts")]
        == [observed[name] for name in ("gets", "puts")]
        == [3 + 15 + 2 + 1, 4 + 1 + 1 + 5 + 1]
    )
    for kind, size in (("bytes_read", 4 * report["bytes"]), ("bytes_written", len(data))):
        assert size < observed[kind] <= projected[kind]
    assert 15 == sum(task["gets"] for task in report["stages"][0]["tasks"])
    assert 3 * report["bytes"] == sum(task["bytes_read"] for task in report["stages"][0]["tasks"])
    assert 0 < observed["peak_memory"] <= projected["peak_memory"]
    assert 0 < observed["seconds"]
    assert 0 < observed["wall_seconds"]
    assert hashlib.sha256(data[-report["bytes"] :]).hexdigest() == report["digest"] == reports[1]["digest"]


def test_nonfinite_may_pass(tmp_path: Path) -> None:
    """With --nonfinite propagate, NaN and infinity end up where they were, and nowhere else."""
    safetensors.numpy.save_file({"w": np.array([1, np.nan, 3], np.float32)}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"w": np.array([3, 1, np.inf], np.float32)}, tmp_path / "b.safetensors")

    done(gradsharding("aggregate", "a.safetensors", "b.safetensors", "-o", "out", "--nonfinite", "propagate", cwd=tmp_path))

    assert "[2.0, nan, inf]" == str(safetensors.numpy.load_file(tmp_path / "out")["w"].tolist())


# --- stopped and resumed


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two updates of 8 MiB: enough for a run of 1,000 slices to be caught in the middle."""
    directory = tmp_path_factory.mktemp("large")
    for seed, client in enumerate("ab"):
        values = np.random.default_rng(seed).standard_normal(2 << 20, dtype=np.float32)
        safetensors.numpy.save_file({"w": values}, directory / f"{client}.safetensors")
    return directory


LARGE = ["a.safetensors:2", "b.safetensors"]


def start(large: Path, *output_and_options: str) -> "subprocess.Popen[str]":
    """Start a run in a process group of its own, as a shell does."""
    command = [COMMAND, "aggregate", *LARGE, "-o", *output_and_options]
    return subprocess.Popen(command, cwd=large, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_slices(run: "subprocess.Popen[Any]", directory: Path, count: int) -> None:
    """Wait until a run has written ``count`` slices; part 1 is the header."""
    for _ in range(60_000):
        assert run.poll() is None, "the run ended before it could be stopped"
        if len([part for part in directory.glob(".gradsharding/uploads/*/parts/*") if not part.suffix]) > count:
            return
        time.sleep(0.001)
    raise AssertionError("no parts were written")


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
    assert f"1000 slices, {now} of them now" in said
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


@pytest.mark.parametrize("executor", ["inline", slow("processes:2"), "threads:2"])
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGQUIT", 131)])
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


def test_nohup(large: Path, tmp_path: Path) -> None:
    """A signal that is ignored when a run starts, as under nohup, does not end it."""
    command = ["nohup", COMMAND, "aggregate", *LARGE, "-o", str(tmp_path / "out"), "--shards", "200", "--executor", "inline"]
    with subprocess.Popen(command, cwd=large, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        wait_for_slices(run, tmp_path, 2)
        run.send_signal(signal.SIGHUP)
        run.communicate(timeout=60)

    assert (0, [tmp_path / "out"]) == (run.returncode, everything(tmp_path))


CLOSED = ["2>&-", ">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&1 | head -0", "| true"]


@pytest.mark.parametrize("executor", ["inline", slow("processes:1")])
@pytest.mark.parametrize("streams", CLOSED)
def test_nobody_listens(updates: list[str], tmp_path: Path, streams: str, executor: str) -> None:
    """With streams that are closed, or whose reader leaves, a run does its work, and nothing it says gets into a file."""
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    line = f"{COMMAND} aggregate {' '.join(updates)} -o out --executor {executor} {streams}; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)

    assert (0, "") == (run.returncode, run.stderr)
    assert set(model(0)) == set(safetensors.torch.load_file(tmp_path / "out"))
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "out"}


def test_full_disk_for_what_is_said(tmp_path: Path) -> None:
    """What cannot be written to standard output is a mistake, told in one line; a reader who leaves is none."""
    with Path("/dev/full").open("w") as full:
        run = subprocess.run([COMMAND, "--version"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)

    assert (2, 1) == (run.returncode, run.stderr.count("\n"))
    assert "No space left on device; check the path" in run.stderr


def test_nobody_listens_to_a_mistake(tmp_path: Path) -> None:
    """A mistake that nobody can be told of still ends with its status."""
    for streams in ("2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        line = f"{COMMAND} aggregate nowhere.safetensors -o out {streams}"
        assert 2 == subprocess.run(["bash", "-c", line], cwd=tmp_path, check=False, timeout=60).returncode

    line = f"{COMMAND} plan --size 1GB --clients 2 | head -0; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (0, "", "") == (run.returncode, run.stdout, run.stderr)


def test_output_that_cannot_be_told(updates: list[str], tmp_path: Path) -> None:
    """A name of control characters, or of bytes that are no text, is written, and told in a line that cannot be mistaken."""
    name = b"o\x1b[31m\nforged: done\xff"
    run = subprocess.run(
        [COMMAND, "aggregate", *updates, "-o", name, "--executor", "inline"], cwd=tmp_path, capture_output=True, check=False, timeout=60
    )

    assert (0, b"", 2) == (run.returncode, run.stderr, run.stdout.count(b"\n"))
    assert run.stdout.startswith(b"o [31m forged: done : mean of 3 clients")
    assert (tmp_path / os.fsdecode(name)).exists()


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


def test_finished_round_is_not_run_again(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """With --store, the same command, its updates in whatever order, finds its result there."""
    call("aggregate", *updates, "-o", "out", "--store", "kept")
    before = (tmp_path / "out").stat()

    said = call("aggregate", *reversed(updates), "-o", "out", "--store", "kept", "--memory", "1MiB", "--report", "r.json")
    report = json.loads((tmp_path / "r.json").read_text())

    assert ["out: mean of 3 clients, 0.1 MiB", "  made  by an earlier call; nothing was left to do"] == said.splitlines()[:2]
    assert ("an earlier call", None, None) == (report["made_by"], report["topology"], report["projected"])
    assert before.st_mtime_ns == (tmp_path / "out").stat().st_mtime_ns


@pytest.mark.parametrize("loss", ["removed", "replaced"])
def test_lost_output_is_made_again(updates: list[str], call: Callable[..., str], tmp_path: Path, loss: str) -> None:
    """With --store, a result that was removed or replaced since is made again."""
    call("aggregate", *updates, "-o", "out", "--store", "kept")
    made = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    if loss == "replaced":
        (tmp_path / "out").write_text("something else")

    call("aggregate", *updates, "-o", "out", "--store", "kept")

    assert made == (tmp_path / "out").read_bytes()


def test_policy_and_inputs_make_another_round(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """Another policy, weight or content is another round, so that nothing of the old one enters the result."""
    call("aggregate", *updates, "-o", "out", "--store", "kept")
    call("aggregate", *updates, "-o", "out", "--store", "kept", "--nonfinite", "propagate")
    call("aggregate", *updates[:2], "cyd.safetensors:4", "-o", "out", "--store", "kept")
    safetensors.torch.save_file(model(9), tmp_path / "cyd.safetensors")
    call("aggregate", *updates, "-o", "out", "--store", "kept")

    assert 4 == len([*(tmp_path / "kept" / "rounds").iterdir()])
    expected = reference([model(seed) for seed in (0, 1, 9)], [*WEIGHTS.values()])
    assert bits(expected) == bits(safetensors.torch.load_file(tmp_path / "out"))


@pytest.mark.slow
def test_exact_is_verified(narrow: list[str], tmp_path: Path) -> None:
    """With --exact every topology makes one file; the command says how to verify it, which tells what was checked, or is wrong."""
    made = set()
    for i, topology in enumerate(("sharded", "lambda-fl", "lifl")):
        said = done(gradsharding("aggregate", *narrow, "-o", "out", "--exact", "--store", f"kept{i}", "--topology", topology, cwd=tmp_path))
        made.add((tmp_path / "out").read_bytes())
    verify = re.findall(r"  check it  gradsharding (verify kept2 r-[0-9a-f]{32})\n", said)[0].split()
    found = done(gradsharding(*verify, "--sample", "1000", cwd=tmp_path))

    assert 1 == len(made)
    (data,) = made
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert f"  SHA-256   {digest}\n" in said
    assert f"round {verify[2]}: exact-mean of 3 clients, 0.1 MiB SHA-256 {digest}, as published recomputed " in flowing(found)
    assert ", from the sealed updates: the same bits" in flowing(found)

    safetensors.torch.save_file(model(9), tmp_path / "cyd.safetensors")
    changed = gradsharding(*verify, "--sample", "1000", cwd=tmp_path)
    assert (1, "") == (changed.returncode, changed.stdout)
    assert "client cyd: 'cyd.safetensors' is at version" in changed.stderr


def test_exact_is_another_round(narrow: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """With --store, --exact is another round than without, and says so when it cannot be verified."""
    call("aggregate", *narrow, "-o", "out", "--store", "kept")
    call("aggregate", *narrow, "-o", "exact", "--store", "kept", "--exact")
    exact, plain = sorted(
        (json.loads(path.read_text())["rule"], path.parent.name) for path in (tmp_path / "kept/rounds").glob("*/result.json")
    )

    assert ("mean", "exact-mean") == (plain[0], exact[0])
    refused = gradsharding("verify", "kept", plain[1], cwd=tmp_path)
    assert 2 == refused.returncode
    assert "was made by the rule mean, whose last bits depend on the path, so that they cannot be verified" in refused.stderr
    unknown = gradsharding("verify", "kept", "r-1", cwd=tmp_path)
    assert 2 == unknown.returncode
    assert f"round r-1 has no result in {(tmp_path / 'kept').as_uri()}" in unknown.stderr


def test_exact_plan(narrow: list[str], call: Callable[..., str]) -> None:
    """``plan --exact`` plans exact sums, and says that figures of trees are bounds."""
    plain, exact = (json.loads(call("plan", "--size", "528MB", "--clients", "20", "--json", *flag)) for flag in ((), ("--exact",)))

    assert ("mean", "exact-mean") == (plain["rule"], exact["rule"])
    for one, other in zip(plain["topologies"], exact["topologies"], strict=True):
        assert one["bytes_written"] <= other["bytes_written"]
        assert float(one["usd"]["aggregation"]) < float(other["usd"]["aggregation"])
    assert "With exact-mean, the figures of trees are upper bounds" in call("plan", *narrow, "--exact")


def test_exact_float64_is_refused(updates: list[str], tmp_path: Path) -> None:
    """A float64 tensor is refused by its name, with what to do, and nothing is left behind."""
    before = everything(tmp_path)
    run = gradsharding("aggregate", *updates, "-o", "out", "--exact", cwd=tmp_path)

    assert (2, "") == (run.returncode, run.stdout)
    assert "tensor 'head.weight' is F64, and exact sums are of F32, F16 and BF16: convert it to F32, or use another rule" in run.stderr
    assert before == everything(tmp_path)


def test_failed_round_leaves_no_parts(tmp_path: Path) -> None:
    """With --store, a run that its updates doom leaves records there, but no parts beside the output."""
    safetensors.numpy.save_file({"w": np.array([1, np.nan], np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()

    run = gradsharding("aggregate", "a.safetensors", "-o", "out/mean", "--shards", "2", "--store", "kept", cwd=tmp_path)

    assert (2, []) == (run.returncode, everything(tmp_path / "out"))


# --- mistakes


def safetensors_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Bytes of an object with this header, well-formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, *, dtype: str = "F32", shape: Sequence[int] = (2,)) -> dict[str, object]:
    """A header's entry for one tensor."""
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [start, stop]}


FILES = {
    "good.safetensors": safetensors_file({"w": entry(0, 8)}, struct.pack("<2f", 1, 2)),
    "twin.safetensors": safetensors_file({"w": entry(0, 8)}, struct.pack("<2f", 3, 4)),
    "folder/good.safetensors": safetensors_file({"w": entry(0, 8)}, bytes(8)),
    "back\\slash": safetensors_file({"w": entry(0, 8)}, bytes(8)),
    "two words.safetensors": safetensors_file({"w": entry(0, 8)}, bytes(8)),
    "either.safetensors": safetensors_file({"w": entry(0, 8)}, bytes(8)),
    "either.safetensors:2": safetensors_file({"w": entry(0, 8)}, bytes(8)),
    "empty.safetensors": b"",
    "short.safetensors": safetensors_file({"w": entry(0, 8)}, bytes(5)),
    "lying.safetensors": safetensors_file({"w": entry(0, 12)}, bytes(12)),
    "overlap.safetensors": safetensors_file({"v": entry(0, 8), "w": entry(4, 12)}, bytes(12)),
    "gap.safetensors": safetensors_file({"v": entry(0, 8), "w": entry(12, 20)}, bytes(20)),
    "boast.safetensors": safetensors_file({"w": entry(0, 8)}, bytes(8), length=200_000_000),
    "prose.safetensors": safetensors_file(b"Dear sir or madam"),
    "digits.safetensors": safetensors_file(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)),
    "surrogate.safetensors": safetensors_file({"\ud800": entry(0, 8)}, bytes(8)),
    "float8.safetensors": safetensors_file({"w": entry(0, 2, dtype="F8_E4M3")}, bytes(2)),
    "complex.safetensors": safetensors_file({"w": entry(0, 16, dtype="C64")}, bytes(16)),
    "colour.safetensors": safetensors_file({"w": entry(0, 2, dtype="\033[31m\nred")}, bytes(2)),
    "shape.safetensors": safetensors_file({"w": entry(0, 12, shape=(3,))}, bytes(12)),
    "dtype.safetensors": safetensors_file({"w": entry(0, 4, dtype="F16")}, bytes(4)),
    "other.safetensors": safetensors_file({"bias": entry(0, 8)}, bytes(8)),
    "nan.safetensors": safetensors_file({"v": entry(0, 8), "w": entry(8, 16, shape=(1, 2))}, struct.pack("<4f", 0, 0, 0, float("nan"))),
    "inf.safetensors": safetensors_file({"v": entry(0, 8), "w": entry(8, 16, shape=(1, 2))}, struct.pack("<4f", 0, float("-inf"), 0, 0)),
}


class Mistake(NamedTuple):
    """Arguments, and what the one line must hold: the culprit, and what to do."""

    args: str
    says: Sequence[str]


OUT = "-o out/mean"
WEIGHT_TEXTS = {
    "0": "0",
    "-1": "-1.0",
    "nan": "nan",
    "inf": "inf",
    "1e30": "1e+30",
    "9" * 400: "inf",
    "many": "'many'",
    "": "''",
    "1_000": "'1_000'",
    "٣": "'٣'",
}
MISTAKES = {
    "missing file": Mistake(f"aggregate nowhere.safetensors:3 {OUT}", ["nowhere.safetensors", "no file", "PATH"]),
    "directory": Mistake(f"aggregate folder {OUT}", ["folder is a directory", "name a safetensors file"]),
    "empty file": Mistake(f"aggregate empty.safetensors {OUT}", ["empty.safetensors", "has 0 bytes", "upload it again"]),
    "truncated": Mistake(f"aggregate short.safetensors {OUT}", ["short.safetensors", "8 bytes", "holds 5", "upload it again"]),
    "lying offsets": Mistake(f"aggregate lying.safetensors {OUT}", ["lying.safetensors", "'w'", "needs 8", "hold 12", "save the update"]),
    "overlap": Mistake(f"aggregate overlap.safetensors {OUT}", ["overlap.safetensors", "'w'", "byte 4", "save the update"]),
    "gap": Mistake(f"aggregate gap.safetensors {OUT}", ["gap.safetensors", "'w'", "byte 12", "leave a gap", "save the update"]),
    "header of 200 MB": Mistake(f"aggregate boast.safetensors {OUT}", ["boast.safetensors", "200000000", "upload it again"]),
    "header not JSON": Mistake(f"aggregate prose.safetensors {OUT}", ["prose.safetensors", "not a JSON object", "is this a safetensors"]),
    "header with a huge number": Mistake(f"aggregate digits.safetensors {OUT}", ["digits.safetensors", "'w'", "malformed header"]),
    "half a surrogate pair": Mistake(f"aggregate surrogate.safetensors {OUT}", ["surrogate.safetensors", "is this a safetensors object?"]),
    "dtype F8_E4M3": Mistake(f"aggregate float8.safetensors {OUT}", ["float8.safetensors", "'w'", "F8_E4M3", "supported are F64, F32"]),
    "dtype C64": Mistake(f"aggregate complex.safetensors {OUT}", ["complex.safetensors", "'w'", "C64", "supported are F64, F32"]),
    "dtype that paints": Mistake(f"aggregate colour.safetensors {OUT}", ["colour.safetensors", r"\x1b[31m\nred", "supported are F64"]),
    "other shape": Mistake(f"aggregate good.safetensors shape.safetensors {OUT}", ["'w'", "[2]", "[3]", "good", "shape", "same tensors"]),
    "other dtype": Mistake(f"aggregate good.safetensors dtype.safetensors {OUT}", ["'w'", "F32", "F16", "good", "dtype", "same tensors"]),
    "other tensor": Mistake(f"aggregate good.safetensors other.safetensors {OUT}", ["'bias'", "good", "other", "same tensors"]),
    **{
        f"weight {weight[:9]}": Mistake(f"aggregate good.safetensors:{weight} {OUT}", [f"good has weight {says};", "use a positive number"])
        for weight, says in WEIGHT_TEXTS.items()
    },
    "weights too far apart": Mistake(f"aggregate good.safetensors:0.1 twin.safetensors:1e15 {OUT}", ["0.1", "1e+15", "use whole numbers"]),
    "same file name": Mistake(f"aggregate good.safetensors folder/good.safetensors {OUT}", ["'good'", "folder/good", "ID=PATH"]),
    "same id": Mistake(f"aggregate x=good.safetensors x=twin.safetensors {OUT}", ["'x'", "twin.safetensors", "ID=PATH"]),
    "path in an id": Mistake(f"aggregate ../x=good.safetensors {OUT}", ["'../x'", "ID=PATH"]),
    "no id": Mistake(f"aggregate =good.safetensors {OUT}", ["=good.safetensors", "ID=PATH"]),
    "file name that is no id": Mistake(f"aggregate two\0words.safetensors {OUT}", ["'two words'", "ID=PATH"]),
    "two readings": Mistake(f"aggregate either.safetensors:2 {OUT}", ["'either.safetensors:2'", "several ways", "rename one"]),
    "no updates": Mistake(f"aggregate {OUT}", ["Missing argument", "PATH", "aggregate --help"]),
    "no output": Mistake("aggregate good.safetensors", ["Missing option", "--output", "aggregate --help"]),
    "no directory for the output": Mistake("aggregate good.safetensors -o nowhere/mean", ["no directory nowhere", "make it first"]),
    "output is a directory": Mistake("aggregate good.safetensors -o out", ["out is a directory", "name a regular file"]),
    "output is a stream": Mistake("aggregate good.safetensors -o -", ["- is not a place", "name a file"]),
    "report is a stream": Mistake(f"aggregate good.safetensors {OUT} --report -", ["- is not a place", "name a file"]),
    "output is this process's": Mistake("aggregate good.safetensors -o /dev/stdout", ["/dev/stdout cannot be", "another place"]),
    "output is a pipe": Mistake("aggregate good.safetensors -o pipe", ["pipe is a directory or special file", "name a regular file"]),
    "output is a circle": Mistake("aggregate good.safetensors -o circle", ["circle is a link that leads to itself", "name a file"]),
    "output is a link to an update": Mistake("aggregate good.safetensors -o link", ["link is one of this command's", "another place"]),
    "output with a backslash": Mistake("aggregate good.safetensors -o out/a\\b", ["out/a\\b", "may not contain a backslash", "rename it"]),
    "update with a backslash": Mistake(f"aggregate x=back\\slash {OUT}", ["back\\slash", "may not contain a backslash", "rename it"]),
    "output that is ours": Mistake("aggregate good.safetensors -o out/.gradsharding", ["nor be .gradsharding", "rename it"]),
    "output is a device": Mistake("aggregate good.safetensors -o /dev/null", ["/dev/null", "name a regular file"]),
    "output cannot be written": Mistake("aggregate good.safetensors -o /proc/mean", ["/proc/mean cannot be", "choose another"]),
    "output is an update": Mistake("aggregate good.safetensors -o good.safetensors", ["good.safetensors", "another place"]),
    "no directory for the report": Mistake(f"aggregate good.safetensors {OUT} --report nowhere/r.json", ["nowhere", "make it first"]),
    "report is a directory": Mistake(f"aggregate good.safetensors {OUT} --report folder", ["folder is a directory", "name a regular file"]),
    "report is the output": Mistake(f"aggregate good.safetensors {OUT} --report out/../out/mean", ["out/mean", "another place"]),
    "too little memory": Mistake(f"aggregate good.safetensors {OUT} --memory 1MiB", ["sharded/", "1.0 MiB allowed", "allow more memory"]),
    "memory in words": Mistake(f"aggregate good.safetensors {OUT} --memory plenty", ["--memory", "'plenty'", "512MiB"]),
    "negative memory": Mistake(f"aggregate good.safetensors {OUT} --memory=-5", ["--memory", "'-5'", "512MiB"]),
    "unknown unit": Mistake(f"aggregate good.safetensors {OUT} --memory 5pounds", ["--memory", "'5pounds'", "512MiB"]),
    "memory in two numbers": Mistake(f"aggregate good.safetensors {OUT} --memory 1,5GiB", ["--memory", "'1,5GiB'", "like 512MiB"]),
    "memory and words": Mistake(f"aggregate good.safetensors {OUT} --memory 512MiB\0each", ["'512MiB each'", "nothing else, like 512MiB"]),
    "no memory": Mistake(f"aggregate good.safetensors {OUT} --memory 0", ["--memory", "0 bytes of memory are not enough"]),
    "plan of a half": Mistake("plan --size 2GB/2 --clients 2", ["--size", "'2GB/2'", "like 512MiB", "plan --help"]),
    "plan with a comma": Mistake("plan --size 14,5GB --clients 2", ["--size", "'14,5GB'", "like 512MiB"]),
    "plan of several": Mistake("plan --size 10\0GB\0x\0" + "20 --clients 2", ["--size", "'10 GB x 20'", "like 512MiB"]),
    "plan without memory": Mistake("plan --size 1GB --clients 2 --memory 0B", ["--memory", "0 bytes of memory are not enough"]),
    "endless memory": Mistake(f"aggregate good.safetensors {OUT} --memory {'9' * 400}GB", ["--memory", "512MiB"]),
    "more shards than elements": Mistake(f"aggregate good.safetensors {OUT} --shards 3", ["3 shards", "2 elements", "use 1 to 2"]),
    **{
        f"{shards} shards": Mistake(f"aggregate good.safetensors {OUT} --shards={shards}", ["--shards", shards, "aggregate --help"])
        for shards in ("0", "-1", "abc")
    },
    "shards of a flat plan": Mistake(f"aggregate good.safetensors {OUT} --topology flat --shards 2", ["flat takes no shards"]),
    "NaN": Mistake(
        f"aggregate g=nan.safetensors {OUT} --shards 2 --executor processes:2", ["nan.safetensors", "'w'[0, 1]", "--nonfinite propagate"]
    ),
    "infinity": Mistake(f"aggregate inf.safetensors:7 {OUT}", ["inf.safetensors", "'v'[1]", "--nonfinite propagate"]),
    "both": Mistake(f"aggregate inf.safetensors nan.safetensors {OUT}", ["inf.safetensors at 'v'[1], nan.safetensors at 'w'[0, 1]"]),
    "unknown policy": Mistake(f"aggregate good.safetensors {OUT} --nonfinite ignore", ["'ignore'", "'raise', 'propagate'", "--help"]),
    "unknown executor": Mistake(f"aggregate good.safetensors {OUT} --executor cloud", ["'cloud'", "use inline, processes:N"]),
    "no processes": Mistake(f"aggregate good.safetensors {OUT} --executor processes:0", ["'processes:0'", "use inline, processes:N"]),
    "unknown topology": Mistake(f"aggregate good.safetensors {OUT} --topology ring", ["'ring'", "'lambda-fl'", "aggregate --help"]),
    "fan-in of slices": Mistake(f"aggregate good.safetensors {OUT} --fan-in 2", ["sharded takes no fan-in; lambda-fl, lifl and"]),
    "memory shared by slices": Mistake(f"aggregate good.safetensors {OUT} --shared-memory", ["sharded takes no shared-memory; lifl does"]),
    "fan-in of nothing": Mistake(f"aggregate good.safetensors {OUT} --topology lifl --fan-in 0", ["--fan-in", "aggregate --help"]),
    "plan from nowhere": Mistake("plan --from nowhere", ["nowhere", "no file or directory"]),
    "plan from one": Mistake("plan --from good.safetensors", ["is one update: give --clients, too", "plan --help"]),
    "plan in no time": Mistake("plan --size 1GB --clients 2 --deadline 0s", ["'0s' is not a time", "60s, 5m or 1h", "plan --help"]),
    "plan soon": Mistake("plan --size 1GB --clients 2 --deadline soon", ["'soon' is not a time", "plan --help"]),
    "plan for free": Mistake("plan --size 1GB --clients 2 --budget free", ["'free' is not a sum", "US dollars", "plan --help"]),
    "prices of nowhere": Mistake("prices --region mars-1", ["no price for mars-1", "prices --refresh --region mars-1"]),
    "budget elsewhere": Mistake("plan --size 1GB --clients 2 --region mars-1 --budget 1", ["a budget cannot", "no price for mars-1"]),
    "unknown store": Mistake(f"aggregate good.safetensors {OUT} --store ftp://host/x", ["ftp://host/x", "use file:///directory"]),
    "store in memory": Mistake(f"aggregate good.safetensors {OUT} --store memory://x", ["memory://x", "use a file:// store"]),
    "store is a file": Mistake(f"aggregate good.safetensors {OUT} --store twin.safetensors", ["twin.safetensors", "check the path"]),
    "unknown option": Mistake(f"aggregate good.safetensors {OUT} --fast", ["--fast", "aggregate --help"]),
    "unknown command": Mistake("agregate good.safetensors", ["agregate", "gradsharding --help"]),
    "no command": Mistake("", ["Missing command", "gradsharding --help"]),
    "plan of nothing": Mistake("plan", ["--size and --clients", "plan --help"]),
    "plan without clients": Mistake("plan --size 1GB", ["--clients", "plan --help"]),
    "plan of no bytes": Mistake("plan --size 3 --clients 2", ["at least 4 bytes", "plan --help"]),
    "plan of an odd size": Mistake("plan --size big --clients 2", ["--size", "'big'", "512MiB"]),
    "plan of no clients": Mistake("plan --size 1GB --clients 0", ["--clients", "plan --help"]),
    "plan of both": Mistake("plan good.safetensors --clients 2", ["--size and --clients", "plan --help"]),
    "plan of too many shards": Mistake("plan --size 8 --clients 2 --shards 3", ["3 shards", "2 elements", "use 1 to 2"]),
    "plan of a missing file": Mistake("plan nowhere.safetensors", ["nowhere.safetensors", "no file", "PATH"]),
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with good and bad files, and an empty directory for the output."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to("good.safetensors")
    monkeypatch.chdir(tmp_path)
    with signals_kept():
        yield tmp_path


@pytest.mark.parametrize("mistake", [pytest.param(mistake, id=name) for name, mistake in MISTAKES.items()])
def test_mistake_is_told_in_one_line(workplace: Path, capsys: pytest.CaptureFixture[str], mistake: Mistake) -> None:
    """A mistake ends with status 2 and one line that names the culprit and a remedy; nothing is written anywhere."""
    before = everything(workplace)

    status = main([arg.replace("\0", " ") for arg in mistake.args.split(" ") if arg])

    said, complaint = capsys.readouterr()
    assert (2, "") == (status, said)
    assert ("gradsharding: ", "\n", 1) == (complaint[:14], complaint[-1], complaint.count("\n"))
    assert [] == [text for text in mistake.says if text not in complaint]
    assert complaint[:-1].isprintable()
    assert before == everything(workplace)


@pytest.mark.parametrize("name", ["missing file", "NaN", "no command", "store is a file", "output cannot be written"])
def test_mistake_is_told_in_one_line_by_the_real_command(workplace: Path, name: str) -> None:
    """The installed command passes status and line on."""
    before = everything(workplace)

    run = gradsharding(*MISTAKES[name].args.split(), cwd=workplace)

    assert (2, "", 1) == (run.returncode, run.stdout, run.stderr.count("\n"))
    assert [] == [text for text in MISTAKES[name].says if text not in run.stderr]
    assert before == everything(workplace)


def test_many_nonfinite_updates_are_counted(tmp_path: Path) -> None:
    """Of many clients with NaN, three are named and the others counted: the line stays a line."""
    for client in "abcde":
        safetensors.numpy.save_file({"w": np.array([np.nan], np.float32)}, tmp_path / f"{client}.safetensors")

    run = gradsharding("aggregate", *(f"{client}.safetensors" for client in "abcde"), "-o", "out", cwd=tmp_path)

    assert (2, 1) == (run.returncode, run.stderr.count("\n"))
    assert "a.safetensors at 'w'[0], b.safetensors at 'w'[0], c.safetensors at 'w'[0], and in 2 more" in run.stderr


def test_overflowing_sum_is_told_as_such(tmp_path: Path) -> None:
    """Finite float64 values whose sum is not are no NaN in a file, and are not told as one."""
    safetensors.numpy.save_file({"w": np.array([1.7e308], np.float64)}, tmp_path / "a.safetensors")

    run = gradsharding("aggregate", "a.safetensors:2", "-o", "out", cwd=tmp_path)

    assert (2, 1) == (run.returncode, run.stderr.count("\n"))
    assert "finite values overflow when summed, in a.safetensors at 'w'[0]; scale them down" in run.stderr


def test_overflow_beside_nan(tmp_path: Path) -> None:
    """Where one file holds NaN and another overflows, each is told as what it is, with its own remedy."""
    for name, values in {"a": [1.7e308, 0], "b": [0, np.nan]}.items():
        safetensors.numpy.save_file({"w": np.array(values, np.float64)}, tmp_path / f"{name}.safetensors")

    run = gradsharding("aggregate", "a.safetensors:2", "b.safetensors", "-o", "out", "--shards", "2", cwd=tmp_path)

    assert (2, 1) == (run.returncode, run.stderr.count("\n"))
    assert "NaN or infinity in b.safetensors at 'w'[1]; correct or leave out the update" in run.stderr
    assert "finite values overflow when summed, in a.safetensors at 'w'[0]; scale them down" in run.stderr


def test_other_failures_end_with_1(updates: list[str], tmp_path: Path) -> None:
    """What is nobody's mistake ends with status 1 and one line; GRADSHARDING_DEBUG=1 shows the traceback as well."""
    command = ["aggregate", *updates, "-o", "out", "--store", "kept"]
    done(gradsharding(*command, cwd=tmp_path))
    next(tmp_path.glob("kept/rounds/*/round.json")).write_text("scribble")

    plain = gradsharding(*command, cwd=tmp_path)
    debug = gradsharding(*command, cwd=tmp_path, GRADSHARDING_DEBUG="1")

    assert (1, 1, 0) == (plain.returncode, plain.stderr.count("\n"), plain.stderr.count("Traceback"))
    assert (1, True) == (debug.returncode, "Traceback" in debug.stderr)
    assert plain.stderr == debug.stderr.splitlines(keepends=True)[-1]


# --- how an update is written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a", "a.safetensors", 1)),
        ("a.safetensors:120", ("a", "a.safetensors", 120)),
        ("a.safetensors:0.5", ("a", "a.safetensors", 0.5)),
        ("x=a.safetensors", ("x", "a.safetensors", 1)),
        ("x=a.safetensors:120", ("x", "a.safetensors", 120)),
        ("x=run=1/at 12:30", ("x", "run=1/at 12:30", 1)),
        ("x=run=1/at 12:30:7", ("x", "run=1/at 12:30", 7)),
        ("run=1/b.safetensors", ("b", "run=1/b.safetensors", 1)),
        ("run=1/b.safetensors:7", ("b", "run=1/b.safetensors", 7)),
    ],
)
def test_reading_whose_file_exists_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, str, float]
) -> None:
    """``[id=]path[:weight]`` is read so that its file exists, even if a path holds ":" and "="."""
    monkeypatch.chdir(tmp_path)
    Path("run=1").mkdir()
    for name in ("a.safetensors", "run=1/at 12:30", "run=1/b.safetensors"):
        safetensors.numpy.save_file({"w": np.array([1], np.float32)}, name)

    (update,) = read_updates([text])

    assert expected == (update.client, update.place.text, update.weight)


def test_whole_weights_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest weight, 2⁵³, is read to the unit; one more is refused."""
    monkeypatch.chdir(tmp_path)
    safetensors.numpy.save_file({"w": np.array([1], np.float32)}, "a.safetensors")

    assert 2**53 == read_updates([f"a.safetensors:{2**53}"])[0].weight
    with pytest.raises(UserError, match="9007199254740993"):
        read_updates([f"a.safetensors:{2**53 + 1}"])


# --- plan, help, progress, commands of others


def test_plan_shows_topologies_side_by_side(call: Callable[..., str]) -> None:
    """A plan is a table, a row for each topology; what does not fit is marked, with the reason below, and one is recommended."""
    said = call("plan", "--size", "528MB", "--clients", "20", "--shards", "4", "--memory", "1GiB")
    rows = [line[2:].split() for line in said.splitlines()[2:9]]

    assert ["topology", "shards", "fan-in", "functions", "memory", "time", "cost"] == rows[0]
    assert ["flat", "sharded", "lambda-fl", "lifl", "sharded-tree"] == [row[0] for row in rows[2:]]
    assert ["4", "-", "4", "640", "MiB"] == rows[3][1:6]
    assert ["x ", "* ", "x ", "x "] == [line[:2] for line in said.splitlines()[4:8]]
    text = flowing(said)
    assert "flat, lambda-fl and lifl do not fit: memory: a function needs 1200.0 MiB, and may have 1024.0 MiB." in text
    assert "Take sharded with 4 shards: about " in text
    assert "The clients' downloads of the new model cost another $0.885 a round, whatever the topology." in text
    assert "Lambda is cheaper than an always-on m7g.large ($0.0816 an hour, 90.2 s a round) at every rate that this" in text
    assert "Flower's own server would hold 10.8 GiB in memory: r7g.large" in text
    assert "Times are modelled medians, prices are list prices of us-east-1" in text


def test_plan_in_detail(call: Callable[..., str]) -> None:
    """--detail shows all figures of the JSON, and AWS's limits with their sources."""
    plan = ("plan", "--size", "528MB", "--clients", "20", "--shards", "4", "--memory", "1GiB")
    brief, detail, figures = call(*plan), call(*plan, "--detail"), json.loads(call(*plan, "--json"))

    assert [] == [line for line in brief.splitlines() if line not in detail]
    assert "AWS's limit for the memory of a function: 10240.0 MiB (" in detail
    assert "https://docs.aws.amazon.com/lambda/" in detail
    assert "https:" not in brief
    table = [line[2:] for line in detail.partition("Requests and bytes")[2].splitlines()]
    for row in figures["topologies"]:
        requests = next(line.split() for line in table if line.startswith(f"{row['topology']} "))
        assert [f"{row[name]:,}" for name in ("waves", "gets", "puts")] == requests[1:4]


def test_plan_as_json(call: Callable[..., str]) -> None:
    """Three clients of 32 MiB: a task reads 8 MiB a time, and the caller asks besides; all figures are plain numbers."""
    said = json.loads(call("plan", "--size", "32MiB", "--clients", "3", "--shards", "4", "--json"))
    found = {row["topology"]: row for row in said["topologies"]}

    assert (32 << 20, 3, 10240 << 20) == (said["size"], said["clients"], said["needs"]["memory"])
    assert ["flat", "sharded", "lambda-fl", "lifl", "sharded-tree"] == [*found]
    keys = ("shards", "fan_in", "functions", "waves", "gets", "puts", "fits", "problem")
    # 3 headers, is there a result or a plan, the result's version, the parts that are joined; puts are in test_requests
    assert [1, None, 1, 1, 12 + 6 + 2, 16, True, None] == [found["flat"][k] for k in keys]
    assert [4, None, 4, 1, 12 + 6 + 2, 18, True, None] == [found["sharded"][k] for k in keys]
    assert 96 << 20 < found["flat"]["bytes_read"] < 103 << 20
    assert found["sharded"]["memory"] < found["flat"]["memory"] < found["flat"]["function_memory"]
    assert said["recommended"] in found
    for row in found.values():
        assert 0 < row["seconds"]["p50"] < row["seconds"]["p95"]
        assert 0 < float(row["usd"]["aggregation"]) < float(row["usd"]["round_trip"])
    assert all(server["rounds_an_hour"] > 0 for server in said["servers"])


@pytest.mark.slow
def test_plan_keeps_to_what_is_asked(call: Callable[..., str]) -> None:
    """A deadline, a budget, an architecture and a concurrency change what is advised; JSON says what was asked."""

    def plan(*options: str) -> Any:
        return json.loads(call("plan", "--size", "5GB", "--clients", "50", "--json", *options))

    free, hurried = plan("--concurrency", "1000"), plan("--deadline", "30s", "--arch", "x86_64", "--concurrency", "2000")
    named = {row["topology"]: row for row in hurried["topologies"]}
    assert named[hurried["recommended"]]["seconds"]["p95"] <= 30
    assert (30, "x86_64", 2000) == tuple(hurried["needs"][k] for k in ("deadline", "architecture", "concurrency"))
    assert "time limit" in named["flat"]["problem"]
    assert ("time limit", 1_800, "seconds") == (named["flat"]["limit"], *(named["flat"]["figure"][k] for k in ("value", "unit")))
    assert ("get rate", 5_500) == (free["topologies"][1]["limit"], free["topologies"][1]["figure"]["value"])
    assert free["topologies"][1]["requests_a_second"]["paced"]
    assert not free["topologies"][0]["requests_a_second"]["paced"]
    assert (900, 1_200) == (free["needs"]["timeout"], plan("--timeout", "1200")["needs"]["timeout"])
    assert plan("--budget", "0.001")["recommended"] is None
    assert plan("--clients-on-aws", "--budget", "5", "--concurrency", "1000")["recommended"] == free["recommended"]
    assert plan("--deadline", "5m")["needs"]["deadline"] == 300


def test_plan_of_express(call: Callable[..., str]) -> None:
    """A plan with S3 Express has its prices, and says that it is no store yet; one with the standard class says nothing of it."""
    plan = ("plan", "--size", "528MB", "--clients", "20")
    said, usual = call(*plan, "--storage", "express"), call(*plan)

    assert "S3 Express is priced, but not supported as a store yet: directory buckets list objects unsorted" in flowing(said)
    assert "Express" not in usual
    assert not json.loads(call(*plan, "--storage", "express", "--json"))["storage_supported"]


@pytest.mark.slow
def test_plan_elsewhere(call: Callable[..., str]) -> None:
    """In another region its prices count; one without any is planned for all the same, and one line says how to get what is missing."""
    plan = ("plan", "--size", "528MB", "--clients", "20")
    home, there, part, nowhere = (
        json.loads(call(*plan, "--region", region, "--json")) for region in ("us-east-1", "eu-central-1", "il-central-1", "mars-1")
    )
    advice = "no price for mars-1; fetch it with: gradsharding prices --refresh --region mars-1"
    priceless = {"aggregation": None, "round_trip": None}

    assert ([], None) == ([row for row in there["topologies"] if None in row["usd"].values()], there["prices_missing"])
    assert there["prices"].startswith("list prices of eu-central-1, ")
    for row, other in zip(home["topologies"], there["topologies"], strict=True):  # only S3 is dearer there, by 8%
        assert 1 < float(other["usd"]["aggregation"]) / float(row["usd"]["aggregation"]) < 1.08
    for without, said in ((part, part["prices_missing"]), (nowhere, advice)):
        assert home["recommended"] == without["recommended"]
        assert [row | {"usd": priceless} for row in home["topologies"]] == without["topologies"]
        assert ([], said) == (without["servers"], without["prices_missing"])
    assert "no price of lambda_second_arm64, lambda_request, transfer_out_gigabyte for il-central-1; fetch it" in part["prices_missing"]
    shown = call(*plan, "--region", "mars-1")
    assert f"N{advice[1:]}. The topologies are compared at the list prices of us-east-1." in flowing(shown)
    assert "$" not in shown
    assert (5, "Times are modelled medians. This has never run on real AWS.") == (shown.count("no price"), shown.splitlines()[-1])


def test_plan_of_express_without_its_prices(call: Callable[..., str]) -> None:
    """Where no price of S3 Express is known, a plan with it says so, and where to write it."""
    said = flowing(call("plan", "--size", "528MB", "--clients", "20", "--storage", "express", "--region", "eu-central-1"))

    assert "S3 Express is not supported as a store yet" in said
    assert "No price of express_get, express_put, " in said
    assert " for eu-central-1; it is not in the list that is fetched: write it into " in said


def test_plan_of_updates(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """A plan of files is one of their tensors and clients; --from reads one of them, or a directory."""
    planned = json.loads(call("plan", *updates, "--json"))
    directory = tmp_path / "some"
    directory.mkdir()
    for update in updates:
        name = update.rpartition(":")[0].rpartition("=")[2] or update
        (directory / Path(name).name).write_bytes((tmp_path / name).read_bytes())
    found = json.loads(call("plan", "--from", "some", "--json"))
    one = json.loads(call("plan", "--from", f"some/{next(directory.iterdir()).name}", "--clients", str(len(updates)), "--json"))

    assert [row["bytes_read"] for row in planned["topologies"]] == [row["bytes_read"] for row in found["topologies"]]
    assert (planned["size"], len(updates)) == (found["size"], found["clients"])
    assert found == one


@pytest.mark.parametrize("topology", ["flat", "sharded", "lambda-fl", "lifl", "sharded-tree"])
def test_topologies_give_the_same_bytes(updates: list[str], call: Callable[..., str], tmp_path: Path, topology: str) -> None:
    """Whatever the topology, the mean is the same; the report has its stages, and does what was projected."""
    call("aggregate", *updates, "-o", "expected.safetensors")
    more = {"lifl": ["--shared-memory"], "sharded-tree": ["--shards", "2", "--fan-in", "1"]}.get(topology, [])
    said = call("aggregate", *updates, "-o", "out.safetensors", "--topology", topology, *more, "--report", "r.json")
    report = json.loads((tmp_path / "r.json").read_text())

    assert (tmp_path / "expected.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert topology in said
    assert {"flat": 1, "sharded": 1, "lambda-fl": 2, "lifl": 3, "sharded-tree": 2}[topology] == len(report["stages"])
    for figure in ("gets", "puts"):
        assert report["projected"][figure] == report["observed"][figure]
    for figure in ("bytes_read", "bytes_written"):
        assert report["projected"][figure] >= report["observed"][figure] > 0


OURS = {name: listed for rows in COMMANDS.values() for name, listed in rows.items()}
LIGHT = {name: listed for name, listed in OURS.items() if name != "demo"}
"""All commands but the one that imports Flower and torch."""


@pytest.mark.parametrize("name", LIGHT)
def test_every_command_has_help(call: Callable[..., str], name: str) -> None:
    """A command's help begins with its purpose, as ``gradsharding --help`` lists it; it has examples, and fits 80 columns."""
    usage, purpose = call(name, "--help").split("\n\n", 2)[:2]
    said = call(name, "--help")

    assert usage.startswith(f"Usage: gradsharding {name} ")
    assert f"  {LIGHT[name].purpose}" == purpose
    assert "  Examples:\n    gradsharding " in said
    assert [] == [line for line in said.splitlines() if len(line) > 80]


def test_purposes_are_those_of_the_commands() -> None:
    """The purpose of each listed command is the first line of its docstring, which is read here without importing it."""
    for listed in OURS.values():
        module, _, attribute = listed.target.partition(":")
        file = next(path for root in (ROOT, ROOT / "strategies") if (path := root / f"{module.replace('.', '/')}.py").exists())
        docstrings = {
            node.name: ast.get_docstring(node) or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
        }

        assert listed.purpose == docstrings[attribute].splitlines()[0]


def test_help_lists_every_command_on_one_line(call: Callable[..., str]) -> None:
    """``--help`` gives each command one line, with its purpose, within 80 columns."""
    lines = call("--help").splitlines()

    for name, listed in OURS.items():
        assert 1 == sum(line.split() == [name, *listed.purpose.split()] for line in lines)
    assert [] == [line for line in lines if len(line) > 80]


def test_help_imports_no_command(tmp_path: Path) -> None:
    """``--help`` imports none of the commands, and nothing that they need."""
    script = "import sys; from gradsharding.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    heavy = {"rich", "boto3", "flwr", "torch", "gradsharding.cli.plan", "gradsharding.cli.aggregate", "gradsharding.aws"}

    assert set() == heavy & {*run.stderr.split()}


def test_version(tmp_path: Path) -> None:
    """--version tells it."""
    assert done(gradsharding("--version", cwd=tmp_path)).startswith("gradsharding, version ")


def test_progress_is_shown_to_a_terminal_only(large: Path, tmp_path: Path) -> None:
    """The bar goes to standard error if that is a terminal; the summary on standard output stays two lines."""
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

    assert (0, 2) == (run.returncode, said.count("\n"))
    assert b"slices" in seen
    assert b"/500" in seen


def contribute(site: Path, command: str, module: str, source: str) -> None:
    """Install a package that contributes one command, as pip would: a module and its metadata."""
    info = site / f"{module}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\nSummary: Says hello.\n")
    (info / "entry_points.txt").write_text(f"[gradsharding.commands]\n{command} = {module}:main\n")
    (site / f"{module}.py").write_text(source)


HELLO = """
import click, pathlib
pathlib.Path("imported").touch()
@click.command()
@click.option("--name", default="world")
def main(name: str) -> None:
    "Greet."
    click.echo(f"hello {name}")
"""


def test_other_packages_contribute_commands(tmp_path: Path) -> None:
    """A command of another package is listed without being imported, and runs with its own options and help."""
    contribute(tmp_path / "site", "hello", "hello_package", HELLO)
    path = f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"

    assert "hello  Says hello. (hello_package)\n" in done(gradsharding("--help", cwd=tmp_path, PYTHONPATH=path))
    assert not (tmp_path / "imported").exists()
    assert "hello you\n" == done(gradsharding("hello", "--name", "you", cwd=tmp_path, PYTHONPATH=path))
    assert "Greet." in done(gradsharding("hello", "--help", cwd=tmp_path, PYTHONPATH=path))


def test_contributed_command_without_its_packages(tmp_path: Path) -> None:
    """A command whose packages are missing says which extra to install."""
    contribute(tmp_path, "show", "gradsharding_shows", "import package_that_nobody_has")

    run = gradsharding("show", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")

    assert (2, "", 1) == (run.returncode, run.stdout, run.stderr.count("\n"))
    assert "package_that_nobody_has" in run.stderr
    assert "install gradsharding_shows" in run.stderr
