"""Mistakes: one line that names the culprit and a remedy, and nothing written anywhere."""

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from gradsharding.cli.inputs import read_updates
from gradsharding.cli.main import main
from gradsharding.errors import UserError
from rigs.command import done, everything, gradsharding, signals_kept


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
    "no memory": Mistake(f"aggregate good.safetensors {OUT} --memory 0", ["--memory", "0 bytes of memory are too few; allow more"]),
    "plan of a half": Mistake("plan --size 2GB/2 --clients 2", ["--size", "'2GB/2'", "like 512MiB", "plan --help"]),
    "plan with a comma": Mistake("plan --size 14,5GB --clients 2", ["--size", "'14,5GB'", "like 512MiB"]),
    "plan of several": Mistake("plan --size 10\0GB\0x\0" + "20 --clients 2", ["--size", "'10 GB x 20'", "like 512MiB"]),
    "plan without memory": Mistake("plan --size 1GB --clients 2 --memory 0B", ["--memory", "0 bytes of memory are too few; allow more"]),
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
    "no processes": Mistake(f"aggregate good.safetensors {OUT} --executor processes:0", ["processes:0 names no", "such as processes:4"]),
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
    "unknown command": Mistake("agregate good.safetensors", ["'agregate'; did you mean 'aggregate'?", "gradsharding --help"]),
    "unlike any command": Mistake("xyzzy", ["No such command 'xyzzy'.", "gradsharding --help"]),
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


@pytest.mark.parametrize("name", ["missing file", "NaN"])
def test_mistake_is_told_in_one_line_by_the_real_command(workplace: Path, name: str) -> None:
    """The installed command passes status and line on."""
    before = everything(workplace)

    run = gradsharding(*MISTAKES[name].args.split(), cwd=workplace)

    assert (2, "", 1) == (run.returncode, run.stdout, run.stderr.count("\n"))
    assert [] == [text for text in MISTAKES[name].says if text not in run.stderr]
    assert before == everything(workplace)


def test_many_nonfinite_updates_are_counted(refuse: Callable[..., str], tmp_path: Path) -> None:
    """Of many clients with NaN, three are named and the others counted: the line stays a line."""
    for client in "abcde":
        safetensors.numpy.save_file({"w": np.array([np.nan], np.float32)}, tmp_path / f"{client}.safetensors")

    complaint = refuse("aggregate", *(f"{client}.safetensors" for client in "abcde"), "-o", "out")

    assert "a.safetensors at 'w'[0], b.safetensors at 'w'[0], c.safetensors at 'w'[0], and in 2 more" in complaint


def test_overflowing_sum_is_told_as_such(refuse: Callable[..., str], tmp_path: Path) -> None:
    """Finite float64 values whose sum is not are no NaN in a file, and are not told as one."""
    safetensors.numpy.save_file({"w": np.array([1.7e308], np.float64)}, tmp_path / "a.safetensors")

    complaint = refuse("aggregate", "a.safetensors:2", "-o", "out")

    assert "finite values overflow when summed, in a.safetensors at 'w'[0]; scale them down" in complaint


def test_overflow_beside_nan(refuse: Callable[..., str], tmp_path: Path) -> None:
    """Where one file holds NaN and another overflows, each is told as what it is, with its own remedy."""
    for name, values in {"a": [1.7e308, 0], "b": [0, np.nan]}.items():
        safetensors.numpy.save_file({"w": np.array(values, np.float64)}, tmp_path / f"{name}.safetensors")

    complaint = refuse("aggregate", "a.safetensors:2", "b.safetensors", "-o", "out", "--shards", "2")

    assert "NaN or infinity in b.safetensors at 'w'[1]; correct or leave out the update" in complaint
    assert "finite values overflow when summed, in a.safetensors at 'w'[0]; scale them down" in complaint


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
