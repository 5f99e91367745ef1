"""Every rule keeps its contract; text names it; adding one takes one file and its place in the registry."""

import difflib
import json
import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import gradsharding
from gradsharding import Limits, MemoryStore, Round, Sharded, aggregate
from gradsharding.advice.planner import recommend
from gradsharding.advice.timing import forecast_seconds
from gradsharding.arithmetic import rules
from gradsharding.arithmetic.fold import Fold
from gradsharding.arithmetic.integers import to_bits, to_float
from gradsharding.arithmetic.rules import MEAN, RULES, Cohort, ExactMean, Mean, Rule, as_rule, parse_rule
from gradsharding.arithmetic.rules.trimmed_mean import FEW, TrimmedMean, _sort
from gradsharding.cli.main import cli
from gradsharding.errors import PlanTooLarge, UserError
from gradsharding.format.dtypes import NUMPY, Run, is_float
from gradsharding.format.encode import Raw
from gradsharding.planning.manifest import Manifest
from gradsharding.running.processes import ProcessExecutor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.testing import RuleContract, peak, reference_mean
from gradsharding.testing.reference import Array, Updates, round_float
from modelled import manifest

MIB = 1 << 20


class TestMean(RuleContract):
    """The mean in float64."""

    rule: ClassVar[Rule] = MEAN

    def reference(self, updates: Updates) -> dict[str, Array]:
        """By plain numpy."""
        return reference_mean(updates)


class TestExactMean(RuleContract):
    """The exact mean: of normal values, float64 sums round to the same bits."""

    rule: ClassVar[Rule] = ExactMean()

    def reference(self, updates: Updates) -> dict[str, Array]:
        """By plain numpy."""
        return reference_mean(updates)


class TestTrimmedMean(RuleContract):
    """The trimmed mean: two of seven values are cut on each side."""

    rule: ClassVar[Rule] = TrimmedMean(0.3)

    def reference(self, updates: Updates) -> dict[str, Array]:
        """By plain numpy."""
        return trimmed(updates, 2)


class TestUnweightedMean(RuleContract):
    """A trimmed mean that cuts nothing."""

    rule: ClassVar[Rule] = TrimmedMean(0)

    def reference(self, updates: Updates) -> dict[str, Array]:
        """By plain numpy."""
        return trimmed(updates, 0)


def trimmed(updates: Updates, cut: int) -> dict[str, Array]:
    """Trim and average the plain way: each tensor whole, in float64 or in fractions."""
    arrays = [arrays for arrays, _ in updates.values()]
    return {name: trimmed_array([one[name] for one in arrays], cut) for name in arrays[0]}


def trimmed_array(arrays: list[Array | Raw], cut: int) -> Array:
    """Trim and average one tensor."""
    first = arrays[0]
    if isinstance(first, Raw):
        wide = [(np.frombuffer(a.data, "<u2").astype("<u4") << 16).view("<f4").astype("f8") for a in arrays if isinstance(a, Raw)]
        return round_float(summed(np.sort(wide, axis=0)[cut : len(arrays) - cut]), "BF16").astype("f4").reshape(first.shape)
    if first.dtype.kind == "f":
        kept = np.sort(np.array(arrays, "f8"), axis=0)[cut : len(arrays) - cut]
        return summed(kept).astype(first.dtype)
    columns = zip(*(np.asarray(a).reshape(-1).tolist() for a in arrays), strict=True)
    means = [round(Fraction(sum(sorted(column)[cut : len(column) - cut]), len(column) - 2 * cut)) for column in columns]
    return np.array(means, first.dtype).reshape(first.shape)


def summed(kept: Array) -> Array:
    """Add rows, one after another, and divide."""
    total = np.zeros(kept.shape[1:])
    for row in kept:
        total = total + row
    return np.asarray(total / len(kept))


def test_every_rule_has_a_contract() -> None:
    """No rule is in the registry under a name twice, without a contract, or without being offered beside the registry."""
    tested = {type(contract.rule) for contract in RuleContract.__subclasses__()}

    assert {*RULES} <= tested
    assert {kind.__name__ for kind in RULES} <= {*rules.__all__}
    assert len(RULES) == len({kind.name for kind in RULES})


@pytest.mark.parametrize(
    ("text", "rule"),
    [("mean", Mean()), ("exact-mean", ExactMean()), ("trimmed-mean:0.2", TrimmedMean(0.2)), ("trimmed-mean:0", TrimmedMean(0)),
     ("trimmed-mean:-0", TrimmedMean(0)), ("trimmed-mean:1e-1", TrimmedMean(0.1))],
)  # fmt: skip
def test_parse(text: str, rule: Rule) -> None:
    """Text is read as a rule, of which equal ones have one text; a rule is taken as it is."""
    assert rule == parse_rule(text) == as_rule(text) == as_rule(rule)
    assert str(rule) == str(parse_rule(text))
    assert hash(rule) == hash(parse_rule(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("median", "no rule is named 'median'; use mean, exact-mean or trimmed-mean:SHARE"),
        ("", "no rule is named ''; use mean"),
        ("trimmed-mean", "'trimmed-mean' gives 0 of 1 parameters; write trimmed-mean:SHARE"),
        ("trimmed-mean:0.1,0.2", "gives 2 of 1 parameters; write trimmed-mean:SHARE"),
        ("mean:0.1", "'mean:0.1' gives 1 of 0 parameters; write mean"),
        ("trimmed-mean:", "'' is not what trimmed-mean:SHARE takes"),
        ("trimmed-mean:much", "'much' is not what trimmed-mean:SHARE takes"),
        *((f"trimmed-mean:{share}", "use 0 or more, and less than 0.5") for share in ("0.5", "-0.1", "nan", "inf")),
    ],
)
def test_refused(text: str, says: str) -> None:
    """What is no rule is refused, in the library and in every command, with how rules are written."""
    with pytest.raises(UserError, match=says):
        aggregate(Round.create(MemoryStore(), "r"), rule=text)
    with pytest.raises(UserError, match=says):
        recommend(manifest(8 * MIB, 3), rule=text)
    run = CliRunner().invoke(cli, ["plan", "--size", "8MB", "--clients", "3", f"--rule={text}"])
    assert 2 == run.exit_code
    assert says in " ".join(run.output.split())


@pytest.mark.parametrize("rule", [None, 7, Mean])
def test_not_a_rule(rule: Any) -> None:
    """Neither text nor a rule is refused."""
    with pytest.raises(UserError, match="is not a rule but of type"):
        aggregate(Round.create(MemoryStore(), "r"), rule=rule)


@pytest.mark.parametrize("share", ["0.2", True, None])
def test_share_is_a_number(share: Any) -> None:
    """A share of another type is refused."""
    with pytest.raises(UserError, match="cannot cut a share of"):
        TrimmedMean(share)


def test_two_rules_in_a_command() -> None:
    """--exact beside another rule is refused; beside its own it is not."""
    two = CliRunner().invoke(cli, ["plan", "--size", "8MB", "--clients", "3", "--exact", "--rule", "mean"])
    one = CliRunner().invoke(cli, ["plan", "--size", "8MB", "--clients", "3", "--exact", "--rule", "exact-mean"])

    assert (2, 0) == (two.exit_code, one.exit_code)
    assert "--exact means --rule exact-mean, not mean: give one of them." in " ".join(two.output.split())


@given(
    dtype=st.sampled_from([*NUMPY]),
    clients=st.one_of(st.integers(1, FEW), st.integers(FEW + 1, 40)),
    share=st.sampled_from([0.0, 0.1, 0.2, 0.34, 0.49]),
    seed=st.integers(0, 1 << 32),
    kind=st.sampled_from(["any bits", "few values", "zeros"]),
)
def test_trimmed_of_any_bits(dtype: str, clients: int, share: float, seed: int, kind: str) -> None:
    """Of any bits, NaN, infinities, signed zeros and ties among them, every order of clients makes what Python's own numbers make."""
    draw, rule, length = np.random.default_rng(seed), TrimmedMean(share), 30
    name = np.dtype(NUMPY[dtype])
    bits = draw.integers(0, 256, (clients, length * name.itemsize), np.uint8)
    bits &= 1 if dtype == "BOOL" else 255
    rows = bits.view(name)
    if kind == "few values":
        rows = rows[draw.integers(0, clients, rows.shape), np.zeros(rows.shape, int)]
    if kind == "zeros":
        signs = draw.integers(0, 2, rows.shape).astype(f"<u{name.itemsize}")
        rows = (signs if dtype == "BOOL" else signs << (8 * name.itemsize - 1)).view(name)
    codes = rows.view(f"<u{name.itemsize}") if is_float(dtype) else rows
    expected = rule.recompute(dtype, codes.tolist(), [1] * clients)

    for order in (range(clients), draw.permutation(clients)):
        fold = Fold([Run(dtype, length)], Cohort(clients, clients), rule)
        for i in order:
            fold.add([rows[i].tobytes()], 1)
        found = np.frombuffer(fold.finalize(), codes.dtype)
        assert expected == found.tolist()
        if is_float(dtype):
            assert fold.finite is all(math.isfinite(to_float(dtype, int(bits))) for bits in [*codes.reshape(-1), *found])


@pytest.mark.parametrize("rows", range(1, FEW + 1))
def test_network(rows: int) -> None:
    """What sorts all columns of zeros and ones sorts everything (the zero-one principle); a NaN reaches the last row."""
    columns = np.arange(1 << rows)
    values = (columns >> np.arange(rows)[:, None] & 1).astype("f4")
    spoilt = np.where(np.eye(rows, dtype=bool), np.nan, np.arange(rows, dtype="f4")[:, None]).astype("f4")
    expected = np.sort(values, axis=0)
    _sort(values)
    _sort(spoilt)

    assert (expected == values).all()
    assert np.isnan(spoilt[-1]).all()


@given(bits=st.integers(0, (1 << 16) - 1), dtype=st.sampled_from(["F16", "BF16"]))
def test_bits_of_floats(bits: int, dtype: str) -> None:
    """Python's own reading of halves is numpy's, and it writes them back."""
    value = to_float(dtype, bits)
    wide = np.array([bits], "<u4") << 16
    seen = wide.astype("<u4").view("<f4")[0] if dtype == "BF16" else np.array([bits], "<u2").view("<f2")[0]

    np.testing.assert_equal(float(seen), value)
    assert math.isnan(value) or bits == to_bits(dtype, value)


@given(value=st.floats())
def test_floats_to_bits(value: float) -> None:
    """Python's own rounding to narrower floats is numpy's."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for dtype, name in (("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2")):
            numpys = np.array([value]).astype(name)
            assert math.isnan(value) or int(numpys.view(f"<u{numpys.itemsize}")[0]) == to_bits(dtype, value)


@pytest.mark.parametrize(("share", "clients", "cut"), [(0.2, 10, 2), (0.29, 100, 29), (0.1, 30, 3), (0.49, 3, 1), (0.2, 14, 2), (0, 5, 0)])
def test_cut(share: float, clients: int, cut: int) -> None:
    """The share is the decimal number that is written: 0.29 of 100 is 29, though the float 0.29 is a little less."""
    assert cut == TrimmedMean(share).cut(clients)
    assert 2 * cut < clients


def test_withstands_what_others_send() -> None:
    """Two clients of ten that send anything move no element out of the range of the honest ones; a mean follows them."""
    draw = np.random.default_rng(0)
    honest = {f"c{i}": draw.normal(size=1_000).astype("f4") for i in range(8)}
    liars = {"x": np.full(1_000, 1e30, "f4"), "y": np.full(1_000, -3e38, "f4")}
    round_ = Round.create(MemoryStore(), "r")
    for client, values in (honest | liars).items():
        round_.submit(client, {"w": values}, 1 if client in honest else 1_000_000)
    result = aggregate(round_, rule="trimmed-mean:0.2").arrays()["w"]

    assert (result <= np.max([*honest.values()], axis=0)).all()
    assert (result >= np.min([*honest.values()], axis=0)).all()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line aggregates by a rule, says that weights do not count, and verifies the result."""
    monkeypatch.chdir(tmp_path)
    for i, value in enumerate((1, 2, 3, 4, 1e9)):
        safetensors.numpy.save_file({"w": np.full(5_000, value, "f4")}, f"c{i}.safetensors")
    updates = [f"c{i}.safetensors:{1 + 1000 * i}" for i in range(5)]
    common = ["aggregate", *updates, "-o", "out.safetensors", "--executor", "inline", "--store", "work", "--report", "report.json"]
    said = CliRunner().invoke(cli, [*common, "--rule", "trimmed-mean:0.2"])
    assert 0 == said.exit_code, said.output
    (round_id,) = [path.name for path in Path("work/rounds").iterdir()]
    verified = CliRunner().invoke(cli, ["verify", "work", round_id])

    assert {3.0} == {*safetensors.numpy.load_file("out.safetensors")["w"].tolist()}
    assert "out.safetensors: trimmed-mean:0.2 of 5 clients" in said.output
    assert "do not count: each client counts the same" in said.output
    assert "trimmed-mean:0.2" == json.loads(Path("report.json").read_text())["rule"]
    assert 0 == verified.exit_code
    assert f"round {round_id}: trimmed-mean:0.2 of 5 clients" in " ".join(verified.output.split())


def test_too_few_to_cut() -> None:
    """A share of which nothing is cut is refused before anything is read, with the numbers."""
    round_ = Round.create(MemoryStore(), "r")
    for client in "abcd":
        round_.submit(client, {"w": np.ones(3, "f4")}, 1)
    says = r"trimmed-mean:0.2 would cut nothing from 4 clients, so it would not be robust; it needs at least 5; .* trimmed-mean:0 for"
    with pytest.raises(UserError, match=says):
        aggregate(round_, rule="trimmed-mean:0.2")
    with pytest.raises(UserError, match=says):
        recommend(manifest(8 * MIB, 4), rule="trimmed-mean:0.2")

    assert [1, 1, 1] == aggregate(round_, rule="trimmed-mean:0").arrays()["w"].tolist()


def sealed(store: DirectoryStore, clients: int, elements: int, dtype: str = "<f4") -> Round:
    """Give a round of random updates."""
    round_ = Round.create(store, f"r-{clients}-{dtype.strip('<')}")
    for i in range(clients):
        values = np.random.default_rng(i).integers(0, 99, elements).astype(dtype)
        round_.submit(f"c{i:03d}", {"w": values}, 1)
    round_.seal()
    return round_


@pytest.mark.parametrize(
    ("clients", "elements", "dtype"),
    [
        (12, MIB, "<f4"),
        (40, MIB // 4, "<f2"),
        (20, MIB // 8, "<u8"),
    ],
)
@pytest.mark.slow
def test_memory_of_trimmed_mean(tmp_path: Path, clients: int, elements: int, dtype: str) -> None:
    """Slices of all clients are held at once: the plan says so, cuts more of them where memory is short, and workers keep to it."""
    round_ = sealed(DirectoryStore(tmp_path), clients, elements, dtype)
    nbytes = elements * np.dtype(dtype).itemsize
    whole = Sharded(shards=1).plan(round_.seal(), Limits(), rule=TrimmedMean(0.2))
    base = Sharded(shards=elements).plan(round_.seal(), Limits(), rule=TrimmedMean(0.2)).memory
    limits = Limits(memory=base + clients * nbytes // 3)
    result = aggregate(round_, rule=TrimmedMean(0.2), limits=limits, executor=ProcessExecutor(1))

    assert clients * nbytes < whole.memory
    assert 3 <= len(result.plan.slices) < elements
    assert result.plan.memory <= limits.memory
    for task, report in zip(result.plan.tasks, result.reports, strict=True):
        assert peak(report) <= task.memory
    with pytest.raises(PlanTooLarge, match="use at least"):
        whole.check(limits)


def test_planned() -> None:
    """The planner leaves trees out, holds all clients' values in memory, and takes sorting to be slower than adding."""
    model: Manifest = manifest(100 * MIB, 50)
    plain, robust = (recommend(model, rule=rule) for rule in ("mean", "trimmed-mean:0.1"))
    one, other = (Sharded(shards=13).plan(model, Limits(memory=1 << 33), rule=rule) for rule in (MEAN, TrimmedMean(0.1)))

    assert {"flat", "sharded"} == {option.name for option in robust.options} < {option.name for option in plain.options}
    assert other.memory > one.memory + 40 * max(s.stop - s.start for s in other.slices)
    assert forecast_seconds(one, 2 << 30).p50 < forecast_seconds(other, 2 << 30).p50
    with pytest.raises(UserError, match=r"trimmed-mean:0.1 needs .* lambda-fl is a tree"):
        recommend(model, rule="trimmed-mean:0.1", topologies=["lambda-fl"])


MIDRANGE = Path(__file__).parents[1] / "docs/examples/midrange.py"
"""The rule of the guide to writing one."""

RUN = """
import sys
import numpy as np
from gradsharding import DirectoryStore, InlineExecutor, ProcessExecutor, Round, aggregate
import gradsharding
from gradsharding.advice.planner import recommend
from gradsharding.errors import GradShardingError

assert gradsharding.__file__.startswith(sys.argv[1]), gradsharding.__file__
for executor in (InlineExecutor(), ProcessExecutor(2)):
    round_ = Round.create(DirectoryStore(sys.argv[2]), type(executor).__name__)
    for i, values in enumerate(([1, 7], [2, 8], [30, 9])):
        round_.submit(f"c{i}", {"w": np.float32(values)}, i + 1)
    result = aggregate(round_, rule="midrange", executor=executor)
    print(result.record.rule, *result.arrays()["w"], result.plan.functions)
print(*[option.name for option in recommend(round_.seal(), rule="midrange").options])
bad = Round.create(DirectoryStore(sys.argv[2]), "bad")
bad.submit("c0", {"w": np.float32([1, np.nan])}, 1)
for round_, rows in ((bad, None), (Round.create(DirectoryStore(sys.argv[2]), "wide"), np.zeros(3))):
    if rows is not None:
        round_.submit("c0", {"w": rows}, 1)
    try:
        aggregate(round_, rule="midrange")
    except GradShardingError as error:
        print(type(error).__name__)
"""


def test_a_rule_is_one_file(tmp_path: Path) -> None:
    """One new file, its import and its entry in the registry add a rule: then all executors, the planner and text know it."""
    root = Path(gradsharding.__file__).parent
    shutil.copytree(root, tmp_path / "gradsharding", ignore=shutil.ignore_patterns("__pycache__", "testing"))
    rules = tmp_path / "gradsharding/arithmetic/rules"
    shutil.copy(MIDRANGE, rules)
    registry = rules / "__init__.py"
    before = registry.read_text()
    after = before.replace("\nRULES:", "\nfrom gradsharding.arithmetic.rules.midrange import Midrange\n\nRULES:", 1)
    after = after.replace("    ExactMean,\n", "    ExactMean,\n    Midrange,\n", 1)
    registry.write_text(after)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", RUN, str(tmp_path), str(tmp_path / "store")]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    changes = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-" and line[2:].strip()]
    assert ["+ from gradsharding.arithmetic.rules.midrange import Midrange", "+     Midrange,"] == changes
    assert (0, "") == (said.returncode, said.stderr)
    assert ["midrange 15.5 8.0 1", "midrange 15.5 8.0 1", "flat sharded", "NonFinite", "UserError"] == said.stdout.splitlines()
