"""What every Rule promises, stated as tests to inherit."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from gradsharding.arithmetic.accumulator import BLOCK, MergeableAccumulator
from gradsharding.arithmetic.fold import Fold, memory
from gradsharding.arithmetic.integers import CODES
from gradsharding.arithmetic.rules import Cohort, Rule, parse_rule
from gradsharding.errors import NonFinite, UserError
from gradsharding.format.dtypes import NUMPY, Run, is_float
from gradsharding.format.encode import Raw
from gradsharding.format.layout import Layout
from gradsharding.planning.plan import Plan
from gradsharding.planning.topologies import Flat, Sharded, ShardedTree
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.rounds.verify import verify
from gradsharding.running.executors import InlineExecutor
from gradsharding.running.processes import ProcessExecutor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import ObjectStore
from gradsharding.testing.executors import peak
from gradsharding.testing.reference import Array, Updates, assert_same, sample_updates

CLIENTS = 7


class RuleContract:
    """What every Rule promises. Supply ``rule``, and ``reference``, the same rule by plain numpy."""

    rule: ClassVar[Rule]

    def reference(self, updates: Updates) -> dict[str, Array]:
        """Compute the result of ``updates``; BF16, given as Raw, comes back as the equal float32."""
        raise NotImplementedError

    def updates(self, **options: Any) -> Updates:
        """Draw updates with a tensor of every dtype that the rule admits."""
        drawn = sample_updates(CLIENTS, **options)
        return {client: ({n: a for n, a in arrays.items() if self.admits(_dtype(a))}, w) for client, (arrays, w) in drawn.items()}

    def admits(self, dtype: str) -> bool:
        """Tell whether updates may have elements of a dtype."""
        try:
            self.rule.admit(Layout.of({"w": (dtype, (1,))}), CLIENTS)
        except UserError:
            return False
        return True

    def test_text(self) -> None:
        """Its text is read back as the same rule; so is a plan that has it, and the plan's digest tells it from others."""
        plan = Sharded().plan(_round(self.updates()).seal(), rule=self.rule)

        assert self.rule == parse_rule(str(self.rule))
        assert self.rule.name == str(self.rule).partition(":")[0]
        assert plan == Plan.model_validate_json(plan.model_dump_json())
        assert plan.tasks[0] == type(plan.tasks[0]).model_validate_json(plan.tasks[0].model_dump_json())
        assert len({str(self.rule), "mean"}) == len({plan.digest, plan.replace(rule=parse_rule("mean")).digest})

    @pytest.mark.parametrize("shards", [1, 3, 40])
    def test_result(self, shards: int) -> None:
        """The result of every dtype has the bits of the reference, whatever the slices; its record names the rule."""
        updates = self.updates(size=50)
        result = aggregate(_round(updates), topology=Sharded(shards=shards), rule=self.rule)

        assert_same(self.reference(updates), result.arrays())
        assert self.rule == result.record.rule
        assert str(self.rule) == result.report()["rule"]
        assert (result.record.digest is not None) is self.rule.vouches

    @pytest.mark.parametrize("executor", [InlineExecutor(), ProcessExecutor(2)], ids=["inline", "processes"])
    def test_executors(self, executor: Any, tmp_path: Path) -> None:
        """In this process and in others, the result has the same bits, and no task takes more memory than its plan says."""
        updates = self.updates(size=3 * BLOCK)
        round_ = _round(updates, DirectoryStore(tmp_path))
        result = aggregate(round_, topology=Sharded(shards=2), rule=self.rule, executor=executor)

        assert aggregate(_round(updates), rule=self.rule).digest() == result.digest()
        if isinstance(executor, ProcessExecutor):
            for task, report in zip(result.plan.tasks, result.reports, strict=True):
                assert peak(report) <= task.memory

    def test_bytes_may_be_cut_anywhere(self) -> None:
        """However the bytes of inputs are cut into chunks, the result has the same bits."""
        draw, runs = random.Random(0), [Run(dtype, BLOCK + 5) for dtype in CODES if self.admits(dtype)]
        inputs = [(_finite(runs, i), i + 1) for i in range(CLIENTS)]
        whole, pieces = (Fold(runs, _cohort(inputs), self.rule) for _ in "ab")
        for data, weight in inputs:
            edges = [0, *sorted(draw.sample(range(len(data)), 50)), len(data)]
            whole.add([data], weight)
            pieces.add((data[i:j] for i, j in pairwise(edges)), weight)

        assert bytes(whole.finalize()) == bytes(pieces.finalize())
        assert whole.finite is pieces.finite is True

    def test_vouches(self) -> None:
        """If it vouches for its bits, they do not depend on who has which id, and ``recompute`` finds the same; else it is refused."""
        updates = self.updates(size=20)
        round_ = _round(updates)
        result = aggregate(round_, rule=self.rule)
        if not self.rule.vouches:
            with pytest.raises(UserError, match=f"made by the rule {self.rule}, whose last bits depend on the path"):
                verify(round_)
            return
        renamed = {f"c{i}": update for i, update in enumerate(reversed([*updates.values()]))}

        assert aggregate(_round(renamed), rule=self.rule).digest() == result.digest()
        assert result.record.layout.elements == verify(round_, sample=1 << 20).elements

    def test_weighs(self) -> None:
        """Weights change the result if it weighs, and nothing else does."""
        updates = self.updates(size=20)
        others = {client: (arrays, 1 if client == "client-0" else 50) for client, (arrays, _) in updates.items()}
        digest, other = (aggregate(_round(given), rule=self.rule).digest() for given in (updates, others))

        assert self.rule.weighs is (digest != other)

    def test_merges(self) -> None:
        """If it merges, a tree comes to the same within rounding, and what passes in it is within its bound; else a tree is refused."""
        updates = self.updates(size=300)
        round_ = _round(updates)
        if not self.rule.merges:
            with pytest.raises(UserError, match=f"{self.rule} needs all values of an element at once, .* use sharded"):
                aggregate(round_, topology=ShardedTree(), rule=self.rule)
            assert aggregate(round_, topology=Flat(), rule=self.rule).plan.functions == 1
            return
        result = aggregate(round_, topology=ShardedTree(fan_in=3, shards=2), rule=self.rule)

        for name, expected in self.reference(updates).items():
            np.testing.assert_allclose(result.arrays()[name].astype("f8"), expected.astype("f8"), rtol=1e-2)
        for task, report in zip(result.plan.tasks, result.reports, strict=True):
            assert task.part or task.accepts_size(report.bytes_written)

    def test_sizes(self) -> None:
        """Memory is known before it runs: the result has a place, serialized bytes keep to their bound, and more elements take more."""
        inputs = [(_finite([Run(dtype, 1_000) for dtype in CODES if self.admits(dtype)], i), i + 1) for i in range(CLIENTS)]
        cohort = _cohort(inputs)
        for dtype in filter(self.admits, CODES):
            run = Run(dtype, 1_000)
            size = self.rule.size(run, cohort)
            accumulator = self.rule.begin(run, cohort, np.zeros(size.place, np.uint8), np.empty((3, BLOCK)))
            for i in range(CLIENTS):
                accumulator.add(0, np.frombuffer(_finite([run], i), NUMPY[dtype]), i + 1)

            assert run.nbytes <= size.place
            assert memory([run], cohort, self.rule) < memory([Run(dtype, 100_000)], cohort, self.rule)
            assert isinstance(accumulator, MergeableAccumulator) is self.rule.merges
            if isinstance(accumulator, MergeableAccumulator):
                serialized = sum(memoryview(buffer).nbytes for buffer in accumulator.serialize())
                assert 0 < serialized <= size.serialized
                assert size.varies or serialized == size.serialized

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nonfinite(self, bad: float) -> None:
        """NaN and infinity are refused with the client's name; let through, a NaN in one update is a NaN in the result, and no other is."""
        rows = {f"c{i}": np.array([i, bad if i == 3 else 1, 2 * i], "f4") for i in range(CLIENTS)}
        updates: Updates = {client: ({"w": row}, 1) for client, row in rows.items()}
        with pytest.raises(NonFinite, match=r"clients? c3 holds? NaN or infinity"):
            aggregate(_round(updates), rule=self.rule)
        passed = aggregate(_round(updates), rule=self.rule, nonfinite="propagate").arrays()["w"]

        assert np.isfinite(passed[[0, 2]]).all()
        assert np.isnan(bad) == np.isnan(passed[1])

    def test_effort(self) -> None:
        """Its effort is positive, and no less for more clients."""
        few, many = self.rule.effort(10), self.rule.effort(1_000)

        assert 0 < few.add <= many.add
        assert 0 <= few.finalize <= many.finalize


def _round(updates: Updates, store: ObjectStore | None = None) -> Round:
    round_ = Round.create(store or MemoryStore(), "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    return round_


def _cohort(inputs: list[tuple[bytes, int]]) -> Cohort:
    return Cohort(len(inputs), sum(weight for _, weight in inputs))


def _finite(runs: list[Run], seed: int) -> bytes:
    """Draw finite elements of all magnitudes that do not overflow when they are added."""
    draw, data = np.random.default_rng(seed), b""
    for dtype, length in runs:
        bits = draw.integers(0, 256, length * np.dtype(NUMPY[dtype]).itemsize, np.uint8)
        if dtype == "BOOL":
            bits &= 1
        elements = bits.view(NUMPY[dtype])
        if is_float(dtype):
            exponents = {"F64": 0x4000 << 48, "F32": 0x7F00 << 16, "F16": 0x7800, "BF16": 0x7F00}[dtype]
            words = elements.view(f"<u{elements.itemsize}")
            words[words & exponents == exponents] &= ~np.array(exponents & -exponents, words.dtype)
        data += elements.tobytes()
    return data


def _dtype(array: Array | Raw) -> str:
    return array.dtype if isinstance(array, Raw) else next(name for name, known in NUMPY.items() if np.dtype(known) == array.dtype)
