"""The benchmarks run, and what they report has the shape that readers of ``benchmarks/results`` rely on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from measure import Range, in_fresh_process
from rigs.s3 import ceph_missing

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def embedded_figures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report of a quick run of ``embedded.py``."""
    directory = tmp_path_factory.mktemp("embedded")
    command = [sys.executable, str(BENCHMARKS / "embedded.py"), "--quick", "--repetitions", "2", "--dir", str(directory)]
    subprocess.run([*command, "--output", str(directory / "embedded.json")], check=True, capture_output=True)
    found = json.loads((directory / "embedded.json").read_text())

    assert [directory / "embedded.json"] == list(directory.iterdir())  # it has cleaned up
    return found


def test_report_names_its_question_its_machine_and_its_rivals(embedded_figures: Any) -> None:
    """A report says what was asked, on which machine, and of whom."""
    facts = {"cpu", "cores", "memory_bytes", "kernel", "python", "versions", "load_average_before", "date", "commit", "command"}

    assert {"question", "setup", "machine", "rivals", "targets", "verified"} == set(embedded_figures)
    assert facts == set(embedded_figures["machine"])
    assert {"gradsharding", "numpy", "flwr"} == set(embedded_figures["machine"]["versions"])
    assert ["ours", "exact", "flower", "numpy", "read"] == list(embedded_figures["rivals"])


def test_report_gives_every_repetition_of_every_rival(embedded_figures: Any) -> None:
    """Seconds and bytes of memory come as a median with all the values it was taken from."""
    for rival in embedded_figures["rivals"].values():
        for found in (rival["seconds"], rival["memory"]["own"], rival["memory"]["high_water_marks"]):
            assert 2 == len(found["all"])
            assert 0 < found["least"] <= found["median"] <= found["most"]


def test_phases_sum_to_the_time_they_explain(embedded_figures: Any) -> None:
    """No part of our own or of Flower's time is left unexplained, in any repetition."""
    for name in ("ours", "exact", "flower"):
        rival = embedded_figures["rivals"][name]
        sums = [sum(values) for values in zip(*(phase["all"] for phase in rival["phases"].values()), strict=True)]

        assert pytest.approx(rival["seconds"]["all"]) == sums


def test_targets_are_ratios_of_the_medians(embedded_figures: Any) -> None:
    """What a target compares can be recomputed from the report."""
    ours, flower, targets = embedded_figures["rivals"]["ours"], embedded_figures["rivals"]["flower"], embedded_figures["targets"]

    assert ours["seconds"]["median"] / flower["seconds"]["median"] == targets["time"]["found"]
    assert ours["memory"]["own"]["median"] / flower["memory"]["own"]["median"] == targets["memory"]["found"]
    assert (0.4, 0.125) == (targets["time"]["at_most"], targets["memory"]["at_most"])


def test_the_three_results_agree(embedded_figures: Any) -> None:
    """Ours and numpy's have the same bits; Flower's differ, within the rounding errors of float32."""
    verified = embedded_figures["verified"]

    assert verified["ours_equals_numpy_bit_for_bit"]
    assert 0 < verified["flower_differs_by"] <= verified["flower_may_differ_by"]


def test_range_tells_median_least_and_most() -> None:
    """A range keeps the values in their order."""
    assert Range(2.0, 1.0, 9.0, (9.0, 1.0, 2.0)) == Range.of([9.0, 1.0, 2.0])


@pytest.mark.slow
def test_memory_of_a_child_process_counts(tmp_path: Path) -> None:
    """A rival's memory is that of all its processes, until it hands its figures over."""
    script = tmp_path / "rival.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "hold = 'import time; held = bytes(64 << 20).replace(bytes(1), b\"x\"); print(flush=True); time.sleep(60)'\n"
        "with subprocess.Popen([sys.executable, '-c', hold], stdout=subprocess.PIPE) as child:\n"
        "    child.stdout.readline()\n"
        "    time.sleep(0.5)\n"
        "    child.kill()\n"
        "print('{\"seconds\": 1.5}', flush=True)\n"
        "later = b'x' * (512 << 20)\n"
    )

    found = in_fresh_process([str(script)])

    assert 1.5 == found["seconds"]
    assert 64 << 20 < found["memory"]["own"] < 256 << 20
    assert 2 == found["memory"]["processes"]


def test_failure_of_a_rival_ends_the_benchmark(tmp_path: Path) -> None:
    """A rival that fails is not passed over."""
    script = tmp_path / "rival.py"
    script.write_text("raise SystemExit(3)")

    with pytest.raises(SystemExit, match="ended with status 3"):
        in_fresh_process([str(script)])


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py") if "argparse" in path.read_text()))
def test_script_starts_from_a_checkout(tmp_path: Path, script: str) -> None:
    """Each script starts where only the packages are installed, from any directory, and says what it measures."""
    installed = os.pathsep.join(str(BENCHMARKS.parent / place) for place in (".", "strategies"))
    command = [sys.executable, str(BENCHMARKS / script), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": installed}, capture_output=True, text=True, check=False)

    assert (0, "") == (ended.returncode, ended.stderr)
    assert "--" in ended.stdout


@pytest.mark.flower
def test_flower_round_compares_real_federations(tmp_path: Path) -> None:
    """A quick run of ``flower_round.py`` ends with equal results, and in direct mode only kilobytes pass the SuperLink."""
    command = [sys.executable, str(BENCHMARKS / "flower_round.py"), "--quick", "--rounds", "1", "--dir", str(tmp_path)]
    subprocess.run([*command, "--output", str(tmp_path / "round.json")], check=True, capture_output=True)
    found = json.loads((tmp_path / "round.json").read_text())

    assert [tmp_path / "round.json"] == list(tmp_path.iterdir())  # it has cleaned up
    assert ["plain", "direct", "direct, small model"] == list(found["figures"])
    assert found["figures"]["plain"]["messages_bytes_per_round"] > 4 * found["model_bytes"]  # two clients, both ways
    assert found["figures"]["direct"]["messages_bytes_per_round"] < 10_000


@pytest.mark.slow
@pytest.mark.rig
def test_s3_worker_compares_rivals_on_the_same_updates(tmp_path: Path) -> None:
    """A quick run of ``s3_worker.py`` has each rival read all bytes on each route; what its targets compare can be recomputed."""
    if why := ceph_missing():
        pytest.skip(why)
    command = [sys.executable, str(BENCHMARKS / "s3_worker.py"), "--quick", "--repetitions", "1"]
    subprocess.run([*command, "--output", str(tmp_path / "s3.json")], check=True, capture_output=True)
    found = json.loads((tmp_path / "s3.json").read_text())

    assert 7 == len(found["routes"])
    for route in found["routes"].values():
        rates = {name: rival["read_rate"]["median"] for name, rival in route["rivals"].items()}
        assert ["ours", "raw", "serial", "obstore"] == list(rates)
        assert rates["ours"] / rates["raw"] == route["ours_of_raw"]
        assert all(rate > 0 for rate in rates.values())
        assert route["rivals"]["ours"]["grown"]["most"] < 2 * found["setup"]["bytes"] + (56 << 20)
    slow, fast = (found["routes"][f"{latency} ms, 90 MB/s a connection"]["rivals"]["serial"]["seconds"] for latency in (100, 0))
    assert fast["median"] < slow["median"]


def ran(tmp_path: Path, script: str, *arguments: str) -> Any:
    """Run a benchmark, small; give its report."""
    output = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / script), "--output", str(output), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 == ended.returncode, ended.stderr
    return json.loads(output.read_text())


def test_kernel_speed(tmp_path: Path) -> None:
    """Each arithmetic and dtype has a rate at each size, beside reading and copying; what the targets compare can be recomputed."""
    found = ran(tmp_path, "kernel_speed.py", "--sizes", "65536", "262144", "--repetitions", "2", "--seconds", "0.01")
    rates, targets = found["rates"], found["targets"]

    assert ["65536", "262144"] == [*rates]
    for rate in rates.values():
        assert ["read", "copy", *(f"{a}, {d}" for d in ("F32", "F16", "BF16") for a in ("float64", "exact"))] == [*rate]
        assert all(2 == len(one["all"]) and 0 < one["least"] <= one["most"] for one in rate.values())
    assert min(rate["exact, F32"]["median"] for rate in rates.values()) / 1e9 == targets["exact, GB/s"]["found"]
    assert (0.6, 2.0) == (targets["exact, GB/s"]["at_least"], targets["float64 of exact"]["at_least"])


@pytest.mark.slow
def test_same_bits(tmp_path: Path) -> None:
    """Exact sums have one digest on all paths, whatever the data; where updates cancel, float64 has several."""
    data = ran(tmp_path, "same_bits.py", "--combinations", "20")["data"]

    assert [1, 1, 1] == [found["exact"]["digests"] for found in data.values()]
    assert 0 == data["gradients"]["float64"]["elements_not_correctly_rounded"]
    assert data["a pair that cancels, 2**40 times as large"]["float64"]["digests"] > 10


@pytest.mark.slow
def test_shard_sweep(tmp_path: Path) -> None:
    """More shards take less memory of a function each, and more requests."""
    found = ran(tmp_path, "shard_sweep.py", "--size", "8MB", "--clients", "3", "--shards", "1", "4", "--repetitions", "1")["shards"]

    # beside the slices: is there a result, a plan, an output; begin, header, end, two records
    assert ([3 + 3, 12 + 3], [1 + 5, 4 + 5]) == ([one["gets"] for one in found.values()], [one["puts"] for one in found.values()])
    assert found["4"]["projected_memory"] < found["1"]["projected_memory"]
    assert all(one["peak_memory"] <= one["projected_memory"] for one in found.values())


@pytest.mark.slow
def test_memory_wall(tmp_path: Path) -> None:
    """What a plan lets through runs; what is sharded runs at sizes where whole models are stopped; the paper's loop is stopped first."""
    small = ("--memory", "128MiB", "--clients", "2", "--step", "8MiB", "--most", "96MiB")
    only = ("--only", "flat", "flat, paper's loop", "sharded, 8 shards")
    found = ran(tmp_path, "memory_wall.py", *small, *only)["topologies"]

    assert all(one["planned"] <= one["ran"] for one in found.values())
    assert found["flat, paper's loop"]["ran"] < found["flat"]["ran"] < found["sharded, 8 shards"]["ran"] == 96 << 20


@pytest.mark.slow
def test_crossover(tmp_path: Path) -> None:
    """The three claims come out beside the paper's own figures; the layouts and accountings differ as they should."""
    config = json.loads((BENCHMARKS / "configs" / "crossover.json").read_text())
    small = tmp_path / "small.json"
    small.write_text(json.dumps({**config, "sizes_mb": [10, 100, 1000], "clients": [20], "coarse": 2, "figure_mb": [43, 512]}))
    found = ran(tmp_path, "crossover.py", "--config", str(small))
    crossing = {row["accounting"]: row["paper: lambda-fl"] for row in found["crossings"]}

    assert 3 == len(found["claims"])
    assert "cross at 110 MiB against λ-FL" in found["claims"][0]["paper"]
    assert float(crossing["aggregation"]) < float(crossing["round trip"])
    assert 100 < float(crossing["round trip"]) < 125
    assert (tmp_path / "found.svg").stat().st_size > 1000


@pytest.mark.slow
def test_scale(tmp_path: Path) -> None:
    """Each size and number of clients gets a plan, or says what stands against every topology."""
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"concurrency": 100, "bytes": [10**8, 10**12], "clients": [10, 1000]}))
    found = ran(tmp_path, "scale.py", "--config", str(small))

    assert 4 == len(found["rounds"])
    assert all(row["topology"] or len(row["against"]) == 5 for row in found["rounds"])
    assert [10, 1000, 10, 1000] == [row["clients"] for row in found["rounds"]]


def test_every_benchmark_is_in_the_table() -> None:
    """Each committed result has its question in the table, and each script its result."""
    table = (BENCHMARKS / "README.md").read_text()
    results = {path.name for path in (BENCHMARKS / "results").glob("*.json")}

    assert all(f"(results/{name})" in table for name in results)
    assert {f"{name.removesuffix('.json')}.py" for name in results} <= {path.name for path in BENCHMARKS.glob("*.py")}
