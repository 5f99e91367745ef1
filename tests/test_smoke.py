"""``smoke`` and bills on real functions, in regions with prices and without: what is right stays so, and nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from gradsharding.advice.prices import load_prices
from gradsharding.aws.deploy.commands import standing
from gradsharding.aws.functions.executor import LambdaExecutor
from gradsharding.aws.s3.store import S3Store
from gradsharding.aws.smoke import WAYS, try_out
from gradsharding.cli import main as cli
from gradsharding.errors import GradShardingError, StoreRefused
from gradsharding.format.encode import encode
from gradsharding.planning.plan import Limits
from gradsharding.planning.task import Job, Task, TaskReport
from gradsharding.running.executors import InlineExecutor, Progress
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.updates import load
from gradsharding.testing import assert_same, reference_mean
from rigs.lambdas import LocalFunction, LocalLambda

RUNS_HERE = pytest.mark.usefixtures("emulator")
ADVICE = "no price for mx-central-1; fetch it with: gradsharding prices --refresh --region mx-central-1"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let updates be small, and prices those of the release."""
    monkeypatch.setattr("gradsharding.aws.smoke.ELEMENTS", 1 << 18)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("GRADSHARDING_PRICES", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def functions(ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], LocalLambda]]:
    """Give what starts a function in a region; the environment then leads there, and to a store on Ceph."""
    assert ceph_store.url.startswith("s3://")
    with LocalLambda(LocalFunction(), concurrency=4) as front:

        def begin(region: str) -> LocalLambda:
            for name, value in {**front.environment(), "AWS_DEFAULT_REGION": region}.items():
                monkeypatch.setenv(name, value)
            return front

        yield begin


def left(store: S3Store) -> list[str]:
    """Give all that lies in a store, with the uploads that were neither completed nor aborted."""
    uploads = store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
    return [*(key for key, _ in store.list("")), *(one["Key"] for one in uploads)]


@RUNS_HERE
@pytest.mark.parametrize("region", ["eu-central-1", "mx-central-1"])
def test_smoke(ceph_store: S3Store, functions: Callable[[str], LocalLambda], region: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Four slices at once and a tree are right to the last element, each with its time, memory and bill; nothing is left."""
    front = functions(region)
    try_out(ceph_store, LambdaExecutor(front.function.name))
    said, prices = capsys.readouterr().out, load_prices(region)

    assert [] == left(ceph_store)
    assert ["4 slices: 4 functions", "2 slices in a tree of fan-in 2: 6 functions"] == re.findall(r"(?m)^.*: \d functions", said)
    assert 2 == said.count("every element is right") == len(WAYS)
    assert 2 == len(re.findall(r"memory per function: [0-9.]+ MiB projected, .* observed", said))
    assert 2 == len(re.findall(r"invocations: \d+, \d of them cold starts; [0-9.]+ MiB of 512\.0 MiB used", said))
    bills = re.findall(r"(?m)^functions: ([0-9.]+) GiB-seconds, \$([0-9.]+)$", said)
    if region == "eu-central-1":
        assert all(pytest.approx(float(count) * float(prices.usd("lambda_second_x86_64")), rel=0.05) == float(usd) for count, usd in bills)
        assert (2, 2, 2) == (len(bills), said.count("in all: $"), said.count(f"\n{prices.origin}; "))
    else:
        assert ([], 2, 0) == (bills, said.count(f"\n{ADVICE}\n"), said.count("$"))


@RUNS_HERE
@pytest.mark.parametrize("region", ["eu-central-1", "il-central-1", "mx-central-1"])
def test_report(
    ceph_store: S3Store, functions: Callable[[str], LocalLambda], region: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``aggregate --report`` has the cost as far as its region's prices are known, else null and why; the average is there regardless."""
    functions(region)
    updates = {client: ({"w": np.arange(1000, dtype="f4") * i}, i) for i, client in enumerate(("a", "b", "c"), 1)}
    for client, (arrays, _) in updates.items():
        ceph_store.put(f"in/{client}.safetensors", encode(arrays)[1])
    given = [f"{client}={ceph_store.url}/in/{client}.safetensors:{weight}" for client, (_, weight) in updates.items()]
    mean, path = f"{ceph_store.url}/results/mean.safetensors", tmp_path / "report.json"
    command = ["aggregate", *given, "-o", mean, "--executor", "lambda:gradsharding", "--report", str(path)]
    assert 0 == cli.main(command)
    report, prices = json.loads(path.read_text()), load_prices(region)

    assert_same(reference_mean(updates), load("results/mean.safetensors", ceph_store))
    cost, missing = report["cost"], report["cost_missing"]
    if region == "mx-central-1":
        assert (None, ADVICE) == (cost, missing)
        monkeypatch.setenv("GRADSHARDING_PRICES", __file__)
        assert 0 == cli.main(command)
        broken = json.loads(path.read_text())
        assert broken["cost"] is None
        assert broken["cost_missing"].startswith(f"{__file__} cannot be read as prices")
        return
    told = next(task["invocation"] for task in report["stages"][0]["tasks"])
    observed = report["observed"]["stores"]["s3"]
    requests = observed["gets"] * prices.usd("s3_get") + observed["puts"] * prices.usd("s3_put")
    if region == "eu-central-1":
        seconds = Decimal(str(told["billed_seconds"])) / 2 * prices.lambda_second("x86_64") + prices.usd("lambda_request")
        assert (f"{requests + seconds:f}", None) == (cost["aggregation"]["observed"], missing)
        return
    nothing = {"projected": None, "observed": None}
    assert (nothing, nothing) == (cost["aggregation"], cost["round_trip"])
    known = sum(Decimal(item["usd"]) for item in cost["items"] if item["usd"] and not item["name"].startswith(("clients'", "storage")))
    assert requests == known
    assert missing.startswith("no price of lambda_second_x86_64, lambda_request, transfer_out_gigabyte for il-central-1; fetch it with: ")


@RUNS_HERE
def test_interrupted(ceph_store: S3Store, functions: Callable[[str], LocalLambda]) -> None:
    """Ctrl-C while functions run: what they write meanwhile is deleted, too, with the updates, the records and the upload."""
    front = functions("eu-central-1")
    program = "import sys; from gradsharding.cli import main as cli; from gradsharding.aws import smoke\n"
    program += "from gradsharding.stores.urls import open_store\n"
    program += "smoke.ELEMENTS = 1 << 20; smoke.smoke.callback = lambda name: smoke.try_out(open_store(sys.argv[1]), "
    program += "smoke.LambdaExecutor('gradsharding')); cli.cli.add_command(smoke.smoke); sys.exit(cli.main(['smoke']))"
    command = [sys.executable, "-c", program, ceph_store.url]
    for _ in range(3):  # Python ignores what is raised while it finalizes an object, an interrupt, too
        before = len(front.calls)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as running:
            end = time.monotonic() + 60
            while len(front.calls) == before and running.poll() is None and time.monotonic() < end:
                time.sleep(0.005)
            there = left(ceph_store)
            running.send_signal(signal.SIGINT)
            _, err = running.communicate(timeout=60)
        assert any("/updates/" in key for key in there), err
        assert [] == left(ceph_store)
        if "Exception ignored in" not in err:
            break
    assert (130, "\ngradsharding: interrupted\n") == (running.returncode, err)


class Wrong(InlineExecutor):
    """Takes all updates for equally heavy."""

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        """Run the tasks."""
        terms = tuple(term.model_copy(update={"weight": 1}) for term in job.terms)
        return super().run(tasks, job.model_copy(update={"terms": terms}), store, limits, progress)


class Sticky(MemoryStore):
    """Deletes no updates."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects."""
        super().delete(key for key in keys if "/updates/" not in key)


class Locked(MemoryStore):
    """Lets nobody delete updates."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects."""
        listed = [*keys]
        if any("/updates/" in key for key in listed):
            raise StoreRefused(f"deleting {len(listed)} objects: access denied")
        super().delete(listed)


def test_prices_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken file of prices takes nothing but the bill."""
    monkeypatch.setenv("GRADSHARDING_PRICES", __file__)
    try_out(MemoryStore(), InlineExecutor())
    said = capsys.readouterr().out

    assert (2, 2) == (said.count("every element is right"), said.count(f"\nno price: {__file__} cannot be read as prices"))


def test_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """An average that is not numpy's is an error with the first element, and nothing is left."""
    store = MemoryStore()
    with pytest.raises(GradShardingError, match=r"^4 slices: [\d,]+ of 262,144 elements differ from numpy's; the first is"):
        try_out(store, Wrong())
    assert [] == [*store.list("")]
    assert "every element is right" not in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "said"), [(Sticky, "rounds/smoke-[0-9a-f]{12}-0/updates/client-1"), (Locked, r"\(deleting .*denied\)")])
def test_what_cannot_be_deleted(kind: Callable[[], MemoryStore], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be deleted is named: by the error where all else went well, beside the error where it did not."""
    with pytest.raises(GradShardingError, match=rf"^the averages are right, but this could not be deleted: .*{said}"):
        try_out(kind(), InlineExecutor())
    assert 2 == capsys.readouterr().out.count("every element is right")
    with pytest.raises(GradShardingError, match="elements differ from numpy"):
        try_out(kind(), Wrong())
    assert re.search(rf"gradsharding: could not delete .*{said}", capsys.readouterr().err)


def test_what_an_unused_stack_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monthly cost of a stack is that of its own region, as far as its prices are known."""
    assert "it costs $0.20 a month for 2 alarms, and $0.023 for each GB-month in its buckets (list prices of us-east-1)" == standing(
        "us-east-1"
    )
    assert (
        "it costs $0.0245 for each GB-month in its buckets (list prices of eu-central-1; "
        "no price of alarm_month for eu-central-1; fetch it with: gradsharding prices --refresh --region eu-central-1)"
    ) == standing("eu-central-1")
    assert "what it costs is not known: no price for mars-1; fetch it with: " in standing("mars-1")
    monkeypatch.setenv("GRADSHARDING_PRICES", __file__)
    assert standing("us-east-1").startswith(f"what it costs is not known: {__file__} cannot be read as prices")
