"""The planner names a way that keeps to what is asked, says why, and says what stands against the others."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from datetime import date
from decimal import Decimal

import pytest

from gradsharding import Limits, ShardedTree
from gradsharding.advice.planner import Advice, Needs, Option, dollars_text, flower_server, recommend, time_text
from gradsharding.advice.prices import load_prices
from gradsharding.advice.timing import Speeds, unlucky
from gradsharding.arithmetic.rules import ExactMean
from gradsharding.errors import UserError
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Plan
from gradsharding.planning.platform import DEPLOYED_TIMEOUT, FIGURES, PAYLOAD, READING, RUNTIME
from gradsharding.planning.topologies import TOPOLOGIES
from modelled import MB, manifest

GB = 10**9


def by_name(advice: Advice) -> dict[str, Option]:
    """Give the options by topology."""
    return {option.name: option for option in advice.options}


def advise(nbytes: int, clients: int, **needs: object) -> Advice:
    """Ask for advice."""
    return recommend(manifest(nbytes, clients), Needs(**needs))  # type: ignore[arg-type]


def test_every_topology() -> None:
    """Each topology is planned at its best, and one is recommended in three sentences: what, why, and what limits it."""
    advice = advise(528_000_000, 20)
    take, why, limit = advice.sentences

    assert [*TOPOLOGIES] == [option.name for option in advice.options]
    assert advice.best is by_name(advice)["sharded"]
    assert f"Take sharded with {advice.best.shape}: about {time_text(advice.best.forecast.seconds.p50)} and $" in take
    assert "It is the cheapest, and the fastest." == why
    assert "Its speed is limited by CPU, which comes with memory." == limit


def test_exact() -> None:
    """Exact sums are planned in every topology: no function takes less memory, no round less time or money; float64 tensors are refused."""
    plain, exact = (by_name(recommend(manifest(528_000_000, 20), rule=rule)) for rule in ("mean", "exact-mean"))

    for name in TOPOLOGIES:
        assert ("mean", "exact-mean") == (str(plain[name].plan.rule), str(exact[name].plan.rule))
        assert plain[name].usd < exact[name].usd
    assert exact["flat"].memory > 4 * plain["flat"].memory
    wide = manifest(8, 2).model_copy(update={"layout": Layout.of({"w": ("F64", (1,))})})
    with pytest.raises(UserError, match="tensor 'w' is F64"):
        recommend(wide, rule=ExactMean())


def test_a_functions_memory_covers_its_projection() -> None:
    """What a function should have is at least what it projects, with Lambda's own runtime."""
    for option in advise(528_000_000, 20).options:
        assert option.memory >= option.plan.memory + RUNTIME


@pytest.mark.slow
def test_best_is_next_to_the_cheapest() -> None:
    """No option that fits is more than a tenth cheaper than the one to take, nor among those of its price faster."""
    advice = advise(5 * GB, 100)
    assert advice.best
    fit = [option for option in advice.options if option.problem is None]

    assert advice.best.usd <= Decimal("1.1") * min(option.usd for option in fit)
    assert all(option.forecast.seconds.p50 >= advice.best.forecast.seconds.p50 for option in fit if option.usd <= advice.best.usd)


@pytest.mark.parametrize("deadline", [30.0, 60.0, 120.0])
@pytest.mark.slow
def test_deadline(deadline: float) -> None:
    """Whoever is in a hurry gets more functions; what takes longer says so."""
    advice = advise(6 * GB, 50, deadline=deadline)
    assert advice.best

    assert advice.best.forecast.seconds.p95 <= deadline
    assert (by_name(advice)["flat"].problem or "").startswith(("memory", "time limit"))


@pytest.mark.slow
def test_impossible() -> None:
    """Where nothing fits, nothing is named, and each topology says what stands against it."""
    advice = advise(6 * GB, 50, deadline=0.5)

    assert advice.best is None
    assert "No topology fits these limits." == advice.sentences[0]
    assert all(option.problem for option in advice.options)
    assert "deadline: 95 of 100 rounds take up to" in (by_name(advice)["sharded"].problem or "")


def test_memory() -> None:
    """Functions that may have little get small slices; whole models do not fit, with the numbers."""
    advice = advise(2 * GB, 20, memory=512 * MB)
    found = by_name(advice)

    assert advice.best
    assert advice.best.memory <= 512 * MB
    assert (found["lambda-fl"].problem or "").startswith("memory: a function needs ")
    assert "may have 512.0 MiB" in (found["lambda-fl"].problem or "")


@pytest.mark.slow
def test_budget() -> None:
    """A budget that a round keeps to changes nothing; one that it does not is named with the sum."""
    free = advise(528_000_000, 20, on_aws=True)
    assert free.best
    enough = advise(528_000_000, 20, on_aws=True, budget="1")
    too_little = advise(528_000_000, 20, on_aws=True, budget="0.001")

    assert enough.best == free.best
    assert too_little.best is None
    assert all("; the budget is $0.001" in (option.problem or "") for option in too_little.options)


@pytest.mark.slow
def test_concurrency_binds() -> None:
    """Few functions at once make waves, and the advice says that they bind it."""
    advice = advise(5 * GB, 100, concurrency=10)
    assert advice.best

    assert advice.best.waves > len(advice.best.plan.fan_ins) or advice.best.plan.functions <= 10
    assert advise(GB, 300, concurrency=3).options[1].waves > 1


@pytest.mark.slow
def test_time_limit() -> None:
    """So many clients that a function could not read a slice of each in its time get a tree of slices."""
    advice = advise(10**12, 10_000)
    found = by_name(advice)
    assert advice.best

    assert "sharded-tree" == advice.best.name
    assert "Lambda stops it after 900 s" in (found["sharded"].problem or "")
    assert unlucky(advice.best.forecast.seconds.longest, Speeds()) <= DEPLOYED_TIMEOUT


def test_time_limit_is_that_of_the_deployed_function() -> None:
    """A plan counts on what ``deploy`` gives a function; a function that is given more may take more, up to what Lambda allows."""
    needs = [Needs(memory=8 * GB, timeout=seconds) for seconds in (DEPLOYED_TIMEOUT, 1_800)]
    usual, long = (recommend(manifest(GB, 72), each, topologies=["flat"]).options[0] for each in needs)

    assert (usual.problem or "").endswith("Lambda stops it after 900 s; raise it with --timeout, in deploy and in plan")
    assert long.problem is None
    with pytest.raises(UserError, match=r"a function cannot run for 1,801 s; Lambda offers 1,800 s at most"):
        advise(GB, 2, timeout=1_801)
    with pytest.raises(UserError, match=r"a function cannot have 10241\.0 MiB; Lambda offers 10240\.0 MiB at most"):
        advise(GB, 2, memory=10_241 << 20)


def of_f64(nbytes: int) -> Manifest:
    """Make up two updates of one tensor of F64, whose sums take no more memory than itself."""
    return manifest(8, 2).model_copy(update={"layout": Layout.of({"w": ("F64", (nbytes // 8,))})})


@pytest.mark.parametrize(
    ("limit", "allowed", "advice"),
    [
        ("memory", 10_240 << 20, lambda: recommend(manifest(20 * GB, 3), topologies=["flat"])),
        ("parts", 10_000, lambda: recommend(manifest(100 * GB, 3), topologies=["sharded"], shards=10_000)),
        ("object size", 50_000 << 30, lambda: recommend(of_f64(49 << 40), topologies=["sharded"], shards=9_999)),
        ("part size", 5 << 30, lambda: recommend(of_f64(6 << 30), topologies=["flat"])),
        ("payload", 6 << 20, lambda: recommend(manifest(MB, 60_000), topologies=["flat"])),
        ("time limit", 1_800, lambda: recommend(manifest(GB, 200), topologies=["flat"])),
        ("deadline", None, lambda: recommend(manifest(GB, 20), Needs(deadline=0.5), topologies=["sharded"])),
        ("budget", None, lambda: recommend(manifest(GB, 20), Needs(budget=Decimal("0.001")), topologies=["sharded"])),
    ],
)
def test_refused_by_a_limit(limit: str, allowed: int | None, advice: Callable[[], Advice]) -> None:
    """What does not fit names the limit that it does not keep to, and what the platform allows, if the limit is the platform's."""
    (option,) = advice().options

    assert option.bound
    assert (limit, False) == (option.bound.limit, option.bound.fits)
    assert option.problem == option.limited_by == f"{limit}: {option.bound.text}"
    assert allowed == (option.bound.figure and option.bound.figure.value)


@pytest.mark.parametrize(
    ("limit", "advice"),
    [
        ("concurrency", lambda: recommend(manifest(GB, 300), Needs(concurrency=3), topologies=["sharded"])),
        ("memory", lambda: recommend(manifest(5_000 << 20, 3), topologies=["flat"])),
        ("parts", lambda: recommend(manifest(100 * GB, 3), Needs(concurrency=10_000), topologies=["sharded"], shards=9_999)),
        ("payload", lambda: recommend(manifest(MB // 4, 40_500), Needs(timeout=1_800), topologies=["flat"])),
        ("get rate", lambda: recommend(manifest(GB, 20), topologies=["sharded"], shards=1_000)),
        (None, lambda: recommend(manifest(GB, 20), topologies=["sharded"])),
    ],
)
def test_bound_by_a_limit(limit: str | None, advice: Callable[[], Advice]) -> None:
    """What fits, and comes next to a limit, names it; what comes next to none names what its functions wait for."""
    said = advice()
    assert said.best

    assert limit == (said.best.bound and said.best.bound.limit)
    assert said.best.problem is None
    assert (said.best.bottleneck if limit is None else str(said.best.bound)) == said.best.limited_by
    assert (f"Its speed is limited by {said.best.bottleneck}." if limit is None else f"Watch the {said.best.bound}.") == said.sentences[-1]


def test_says_what_s3_is_asked() -> None:
    """A plan that would ask S3 for more than one prefix bears says so, with what each function keeps to, and takes the time it takes."""
    (paced,) = recommend(manifest(GB, 20), Needs(concurrency=1_000), topologies=["sharded"], shards=1_000).options
    requests = 1_000 * 20

    assert paced.rates.much
    rate = f"get rate: its functions would make {paced.rates.gets:,.0f} GETs a second, and one prefix of S3 serves 5,500; so each of "
    assert re.fullmatch(re.escape(rate) + r"1,000 functions is held to 4\.4, and \d+ at once would need no pacing", paced.limited_by)
    assert paced.forecast.seconds.p50 > (requests - 1_000) / (0.8 * 5_500)


def test_figures_have_sources() -> None:
    """Each limit of the platform says who says so, and when."""
    for figure in FIGURES.values():
        assert figure.source.startswith("https://")
        assert date(2025, 1, 1) < date.fromisoformat(figure.date)


@pytest.mark.slow
def test_payload() -> None:
    """An invocation that would name too many updates is not proposed."""
    advice = advise(100 * MB, 60_000)
    found = by_name(advice)
    assert advice.best

    assert (found["flat"].problem or "").startswith(("payload: the names of a function's updates take", "time limit"))
    assert max(kind.task.inputs for kind in advice.best.plan.kinds[0]) * 150 < PAYLOAD


def test_shards_may_be_fixed() -> None:
    """A number of shards that is asked for is kept."""
    found = by_name(recommend(manifest(528_000_000, 20), shards=7))

    assert (7, 7) == (len(found["sharded"].plan.slices), len(found["sharded-tree"].plan.slices))


@pytest.mark.parametrize(
    ("nbytes", "clients", "why"),
    [
        (MB // 4, 3, "It is the cheapest, and the fastest."),
        (100 * MB, 8, r"It costs \d% more than flat, the cheapest, and is \d\.\d times as fast."),
        (2 * GB, 50, r"It is the cheapest; sharded-tree is \d\.\d times as fast, but costs \d\.\d times as much."),
    ],
)
def test_why(nbytes: int, clients: int, why: str) -> None:
    """The reason compares the recommended option with the cheapest and the fastest, whichever they are."""
    advice = advise(nbytes, clients)
    assert advice.best

    assert re.fullmatch(why, advice.sentences[1])


def test_the_only_one_that_fits() -> None:
    """Where one topology fits, that is the reason to take it."""
    assert "No other topology fits." == recommend(manifest(GB, 20), topologies=["sharded"]).sentences[1]


@pytest.mark.parametrize(("prices", "texts"), [(["0.00181", "2"], ["$0.00181", "$2.00000"]), (["15634", "20"], ["$15,634.00", "$20.00"])])
def test_prices_that_are_compared_have_as_many_decimals(prices: list[str], texts: list[str]) -> None:
    """Prices below each other have as many decimals as the least of them needs for three digits that count."""
    assert texts == [dollars_text(Decimal(usd), map(Decimal, prices)) for usd in prices]


def test_servers() -> None:
    """An always-on machine's price is compared by the hour: from how many rounds on it is cheaper, if it can do so many."""
    advice = advise(528_000_000, 20)
    assert advice.best
    items = advice.best.forecast.cost.aggregation.items
    functions = sum(item.count * item.price for item in items if item.price and item.name in ("functions", "invocations"))

    for server in advice.servers:
        rounds = server.hour / functions
        assert pytest.approx(3600 / server.seconds) == server.rounds_per_hour
        assert (None if rounds > server.rounds_per_hour else rounds) == server.cheaper_from
    assert ("r7g.large", 22 * 528_000_000) == flower_server(manifest(528_000_000, 20), load_prices())
    assert flower_server(manifest(10**12, 20), load_prices()) is None


def calls(act: Callable[[], object]) -> int:
    """Count the functions that are called: work, however loaded the machine is."""
    events = Counter[str]()
    sys.setprofile(lambda _frame, event, _what: events.update([event]))
    try:
        act()
    finally:
        sys.setprofile(None)
    return events["call"]


def test_a_large_plan_costs_no_more_than_its_slices() -> None:
    """Planning 10,000 functions takes less than making their tasks: figures come from the few kinds that there are."""
    sealed, plans = manifest(10**11, 2_000), list[Plan]()

    def figures() -> None:
        plans.append(ShardedTree(shards=910, fan_in=200).plan(sealed, Limits(), reading=READING))
        assert plans[0].memory + plans[0].gets + plans[0].puts + plans[0].bytes_read + plans[0].bytes_written

    planning = calls(figures)
    making = calls(lambda: plans[0].tasks)
    assert 10_010 == plans[0].functions == len(plans[0].tasks)
    assert 10_010 < making
    assert planning < making / 2
