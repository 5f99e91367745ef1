"""``gradsharding aggregate``: what it makes, where, and what it says and leaves behind."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from rigs.command import (
    WEIGHTS,
    bits,
    everything,
    model,
    once_rounded,
    reference,
    slow,
    start,
    wait_for_slices,
)


def test_reference_rounds_bfloat16_to_nearest_even() -> None:
    """The reference itself: 1 + 2⁻⁸ lies between two bfloat16 values and goes to the even one; a hair more goes up."""
    rounded = once_rounded(np.array([1 + 2**-8, 1 + 2**-8 + 2**-40, -(1 + 3 * 2**-8)]), torch.bfloat16)

    assert [1.0, 1 + 2**-7, -(1 + 2**-6)] == rounded.tolist()


@pytest.mark.parametrize("executor", ["inline", slow("processes:2")])
@pytest.mark.parametrize("shards", [1, 3, 64])
def test_result_is_the_reference_bit_for_bit(
    updates: list[str], call: Callable[..., str], tmp_path: Path, shards: int, executor: str
) -> None:
    """Whatever the shards and the executor, torch loads the float64 mean, rounded once."""
    call("aggregate", *updates, "-o", "out", "--shards", str(shards), "--executor", executor)

    expected = reference([model(seed) for seed in range(3)], [*WEIGHTS.values()])
    assert bits(expected) == bits(safetensors.torch.load_file(tmp_path / "out"))


@pytest.mark.parametrize("topology", ["flat", "sharded", "lambda-fl", "lifl", "sharded-tree"])
@pytest.mark.slow
def test_topologies_give_the_same_bytes(updates: list[str], call: Callable[..., str], tmp_path: Path, topology: str) -> None:
    """Whatever the topology, the mean is the same; the report has its stages, and does what was projected."""
    call("aggregate", *updates, "-o", "expected.safetensors", "--executor", "inline")
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


def test_summary_names_the_result_and_what_it_took(updates: list[str], call: Callable[..., str]) -> None:
    """A run says what it made, how, and the memory projected and observed, one fact a line."""
    lines = call("aggregate", *updates, "-o", "out", "--shards", "2", "--executor", "processes:1").splitlines()

    assert "out: mean of 3 clients, 0.1 MiB" == lines[0]
    assert "  topology  sharded: 2 slices" == lines[1]
    assert re.fullmatch(r"  memory    [\d.]+ MiB projected for a function, [\d.]+ MiB observed.*", lines[2])
    assert re.fullmatch(r"  time      \d+\.\d\d s", lines[-1])


def test_nothing_else_is_left(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """Beside the output, a run leaves nothing, not even an empty directory."""
    before = everything(tmp_path)

    call("aggregate", *updates, "-o", "out")

    assert sorted([*before, tmp_path / "out"]) == everything(tmp_path)


def test_existing_output_is_replaced(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """An output that is there gives way to the new one."""
    (tmp_path / "out").write_text("old")

    call("aggregate", *updates, "-o", "out")

    assert set(model(0)) == set(safetensors.torch.load_file(tmp_path / "out"))


def test_existing_output_survives_a_failure(updates: list[str], refuse: Callable[..., str], tmp_path: Path) -> None:
    """A run that fails does not touch the output that was there."""
    (tmp_path / "out").write_text("old")

    refuse("aggregate", *updates, "-o", "out", "--memory", "1MiB")

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

    call("aggregate", *updates, "--executor", "inline", *(["-o", "out", option, "name"] if option == "--report" else [option, "name"]))

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
        call("aggregate", *updates, "-o", "out", "--report", "report", "--executor", "inline")
        call("aggregate", *updates, "-o", "new", "--report", "new report", "--executor", "inline")
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


def test_updates_by_url_and_by_id(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """A file:// URL and an id of its own name the same update: the id decides the order, not the result's form."""
    url = (tmp_path / "a b.safetensors").as_uri()
    (tmp_path / "ann.safetensors").rename(tmp_path / "a b.safetensors")

    call("aggregate", f"ann={url}:120", *updates[1:], "-o", (tmp_path / "o t").as_uri(), "--executor", "inline")

    expected = reference([model(seed) for seed in range(3)], [*WEIGHTS.values()])
    assert bits(expected) == bits(safetensors.torch.load_file(tmp_path / "o t"))


def test_report(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """A report is JSON: projected beside observed, the tasks, and the digest of the data, which shards do not change."""
    reports = {}
    for shards in (1, 5):
        name = f"r{shards}.json"
        call("aggregate", *updates, "-o", "out", "--shards", str(shards), "--report", name, "--executor", "processes:1")
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


def test_nonfinite_may_pass(call: Callable[..., str], tmp_path: Path) -> None:
    """With --nonfinite propagate, NaN and infinity end up where they were, and nowhere else."""
    safetensors.numpy.save_file({"w": np.array([1, np.nan, 3], np.float32)}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"w": np.array([3, 1, np.inf], np.float32)}, tmp_path / "b.safetensors")

    call("aggregate", "a.safetensors", "b.safetensors", "-o", "out", "--nonfinite", "propagate", "--executor", "inline")

    assert "[2.0, nan, inf]" == str(safetensors.numpy.load_file(tmp_path / "out")["w"].tolist())


def test_finished_round_is_not_run_again(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """With --store, the same command, its updates in whatever order, finds its result there."""
    call("aggregate", *updates, "-o", "out", "--store", "kept", "--executor", "inline")
    before = (tmp_path / "out").stat()

    said = call(
        "aggregate", *reversed(updates), "-o", "out", "--store", "kept", "--executor", "inline", "--memory", "1MiB", "--report", "r.json"
    )
    report = json.loads((tmp_path / "r.json").read_text())

    assert ["out: mean of 3 clients, 0.1 MiB", "  made  by an earlier call; nothing was left to do"] == said.splitlines()[:2]
    assert ("an earlier call", None, None) == (report["made_by"], report["topology"], report["projected"])
    assert before.st_mtime_ns == (tmp_path / "out").stat().st_mtime_ns


@pytest.mark.parametrize("loss", ["removed", "replaced"])
def test_lost_output_is_made_again(updates: list[str], call: Callable[..., str], tmp_path: Path, loss: str) -> None:
    """With --store, a result that was removed or replaced since is made again."""
    call("aggregate", *updates, "-o", "out", "--store", "kept", "--executor", "inline")
    made = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    if loss == "replaced":
        (tmp_path / "out").write_text("something else")

    call("aggregate", *updates, "-o", "out", "--store", "kept", "--executor", "inline")

    assert made == (tmp_path / "out").read_bytes()


def test_policy_and_inputs_make_another_round(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """Another policy, weight or content is another round, so that nothing of the old one enters the result."""
    call("aggregate", *updates, "-o", "out", "--store", "kept", "--executor", "inline")
    call("aggregate", *updates, "-o", "out", "--store", "kept", "--executor", "inline", "--nonfinite", "propagate")
    call("aggregate", *updates[:2], "cyd.safetensors:4", "-o", "out", "--store", "kept", "--executor", "inline")
    safetensors.torch.save_file(model(9), tmp_path / "cyd.safetensors")
    call("aggregate", *updates, "-o", "out", "--store", "kept", "--executor", "inline")

    assert 4 == len([*(tmp_path / "kept" / "rounds").iterdir()])
    expected = reference([model(seed) for seed in (0, 1, 9)], [*WEIGHTS.values()])
    assert bits(expected) == bits(safetensors.torch.load_file(tmp_path / "out"))


def test_failed_round_leaves_no_parts(refuse: Callable[..., str], tmp_path: Path) -> None:
    """With --store, a run that its updates doom leaves records there, but no parts beside the output."""
    safetensors.numpy.save_file({"w": np.array([1, np.nan], np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()

    refuse("aggregate", "a.safetensors", "-o", "out/mean", "--shards", "2", "--store", "kept")

    assert [] == everything(tmp_path / "out")
