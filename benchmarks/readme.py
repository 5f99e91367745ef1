"""The figures of the documents, written from the committed result files and from nothing else: ``python benchmarks/readme.py``."""

import json
from pathlib import Path
from typing import Any

from measure import shown

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "explanation" / "benchmarks.md"
RESULTS = "../../benchmarks/results"
"""The folder of results, relative to PAGE."""

LAYOUT, ENGINE = "model, paper's layout", "model, this engine"
ALIKE = 0.05
"""The relative difference within which two peaks count as equal."""

NEARLY = 0.85
"""The share of a rate from which it counts as nearly reached."""

BEGIN, END = "<!-- from benchmarks/results: python benchmarks/readme.py -->\n", "<!-- end -->\n"


def beside_flower() -> str:
    """Give the README's one table: time and memory beside Flower's."""
    alone, whole = _results("embedded"), _results("flower_round")
    own, flower = (alone["rivals"][name] for name in ("ours", "flower"))
    plain, direct = (whole["figures"][name] for name in ("plain", "direct"))
    peak = "server_app_peak_while_training"

    def row(title: str, theirs: float, ours: float, form: str, unit: str) -> str:
        return f"| {title} | {theirs:{form}} {unit} | {ours:{form}} {unit} | {ours / theirs:.3f} |\n"

    theirs, ours = (rival["memory"]["own"]["median"] / 2**20 for rival in (flower, own))
    return (
        "| | Flower's FedAvg | gradsharding | ratio |\n|---|---|---|---|\n"
        + row("aggregation alone: time", flower["seconds"]["median"], own["seconds"]["median"], ".2f", "s")
        + row("aggregation alone: peak memory", theirs, ours, ",.0f", "MiB")
        + row("a whole round: time", plain["round_seconds"], direct["round_seconds"], ".1f", "s")
        + row("a whole round: peak memory of the server", plain[peak] / 2**20, direct[peak] / 2**20, ",.0f", "MiB")
        + f"\nAggregation: {alone['setup']['title']}, files in the page cache. "
        f"Round: a model of {whole['model_bytes'] / 1e6:.0f} MB, two nodes on one machine, direct mode.\n"
    )


def section() -> str:
    """Give the page's tables as Markdown."""
    return "\n".join(
        (
            embedded(_results("embedded")),
            flower_round(_results("flower_round")),
            same_bits(_results("same_bits")),
            kernel_speed(_results("kernel_speed")),
            s3_worker(_results("s3_worker")),
            topologies(_results("topologies")),
            request_counts(_results("request_counts")),
            memory_wall(_results("memory_wall")),
            crossover(_results("crossover"), _results("calibration")),
            scale(_results("scale")),
        )
    )


def embedded(found: dict[str, Any]) -> str:
    """Tabulate the embedded default beside Flower's own aggregation."""
    rivals, flower = found["rivals"], found["rivals"]["flower"]

    def row(name: str, title: str) -> str:
        seconds, memory = rivals[name]["seconds"], rivals[name]["memory"]["own"]["median"]
        span = f"{seconds['median']:.2f} s ({seconds['least']:.2f} to {seconds['most']:.2f})"
        ratios = seconds["median"] / flower["seconds"]["median"], memory / flower["memory"]["own"]["median"]
        return f"| {title} | {span} | {ratios[0]:.2f} | {memory / 2**20:,.0f} MiB | {ratios[1]:.3f} |\n"

    alone, unlike = found["targets"]["time_beside_aggregate_train_alone"], found["verified"]["elements_where_exact_differs"]
    phases = sorted(((phase["median"], name) for name, phase in rivals["ours"]["phases"].items()), reverse=True)
    loop = rivals["numpy"]["seconds"]["median"] / rivals["ours"]["seconds"]["median"]
    lean = rivals["numpy"]["memory"]["own"]["median"] / rivals["ours"]["memory"]["own"]["median"]
    taken = {name: phase["median"] for name, phase in rivals["ours"]["phases"].items()}
    setup = found["setup"]
    saved = (setup["workers"] - 1) * sum(taken[name] for name in ("read", "fold", "write"))  # beside one process that does it all
    ours = "; ".join(f"{name} {seconds:.2f} s" for seconds, name in phases)
    return (
        f"## Aggregation alone\n\n![Bars: time and memory beside Flower's]({RESULTS}/embedded.svg)\n\n"
        f"The input is {found['setup']['title']}, on a local disk, in the page cache. {_origin(found)}\n\n"
        "| | time, median (range) | of Flower's | peak memory, all processes | of Flower's |\n|---|---|---|---|---|\n"
        + row("ours", f"gradsharding, {setup['workers']} processes")
        + row("exact", "the same, exact")
        + row("flower", "Flower: read files, then `FedAvg.aggregate_train`")
        + row("numpy", "one numpy loop, the same arithmetic")
        + row("read", "reading the files, one process")
        + f"\nOur time by phase (medians): {ours}.\n"
        f"The exact mean differs from ours in {unlike:,} of {found['setup']['elements']:,} elements; its time includes its digest.\n"
        f"With all replies already in Flower's memory, our time is {alone:.2f} of that of `aggregate_train` alone.\n"
        f"A single numpy loop that does the arithmetic and nothing else takes {loop:.2f} of our time and {lean:.2f} of our memory.\n"
        + (pays(setup, taken["worker start"] / saved) if saved else "")
    )


def pays(setup: dict[str, Any], of_the_model: float) -> str:
    """Say from which size of a model workers are worth their start, as a share of this model."""
    size = 4e-6 * setup["elements"] * of_the_model
    return (
        f"By these phases, to start {setup['workers']} workers takes as long as they save on {setup['clients']} updates of "
        f"{size:,.0f} MB; below that size, use one process.\n"
    )


def flower_round(found: dict[str, Any]) -> str:
    """Tabulate a whole round with real Flower processes."""
    plain, direct, small = (found["figures"][name] for name in ("plain", "direct", "direct, small model"))

    def row(title: str, key: str, scale: float, unit: str) -> str:
        return f"| {title} | {plain[key] / scale:,.1f} {unit} | {direct[key] / scale:,.1f} {unit} | {direct[key] / plain[key]:.3f} |\n"

    peak = "server_app_peak_while_training"
    return (
        f"## A whole round\n\n![Bars: time, memory and traffic of a round]({RESULTS}/flower_round.svg)\n\n"
        f"The model is {found['model_bytes'] / 1e6:.0f} MB. A SuperLink and 2 SuperNodes run on one machine, over loopback; the store "
        f"is a directory on its disk. {_origin(found)}\n\n"
        "| | plain FedAvg | direct mode | ratio |\n|---|---|---|---|\n"
        + row("round time, median", "round_seconds", 1, "s")
        + row("messages through the SuperLink", "messages_bytes_per_round", 1e6, "MB")
        + row("bytes over loopback", "loopback_bytes_per_round", 1e6, "MB")
        + row("peak memory of the ServerApp", peak, 1e6, "MB")
        + f"\nWith a model of {found['small_model_bytes'] / 1e6:.0f} MB the ServerApp peaks at {small[peak] / 1e6:.1f} MB in direct mode:\n"
        f"{growth(direct[peak], small[peak], found['model_bytes'])}.\n"
        "A directory in the page cache is faster than S3, and a federation has more than two nodes.\n"
    )


def growth(large: float, small: float, model: float) -> str:
    """Say whether a server's peak grows with the model: by how many bytes for each of the large model's."""
    if large - small <= ALIKE * small:
        return f"it does not grow with the model (within {ALIKE:.0%})"
    return f"it grows by {(large - small) / model:.2f} bytes for each byte of the model"


def same_bits(found: dict[str, Any]) -> str:
    """Tabulate the digests that many paths to one mean have."""
    paths = found["setup"]["combinations"]

    def row(kind: str, result: dict[str, Any]) -> str:
        float64 = result["float64"]
        share = float64["elements_not_correctly_rounded"] / float64["elements"]
        return f"| {power(kind)} | {result['exact']['digests']} | {float64['digests']:,} | {share:.2%} |\n"

    return (
        f"## The same bits\n\nThe mean of {found['setup']['clients']} updates is computed along {paths:,} paths, which differ in order, "
        f"topology, slices, reads, executor and chunk size. {_origin(found)}\n\n"
        "| updates | digests, exact | digests, float64 | float32 elements that float64 does not round correctly |\n"
        "|---|---|---|---|\n" + "".join(row(kind, result) for kind, result in found["data"].items()) + f"\n{advice(found['data'])}\n"
    )


def advice(data: dict[str, dict[str, Any]]) -> str:
    """Say on which data the two kinds of sums depend on the path."""

    def kinds(arithmetic: str, *, same: bool) -> str:
        return "; ".join(power(kind) for kind, found in data.items() if (found[arithmetic]["digests"] == 1) == same)

    same, other, exact = kinds("float64", same=True), kinds("float64", same=False), kinds("exact", same=False)
    clauses = [
        f"Sums in float64 gave the same bits on every path for {same}" if same else "",
        f"{'but not' if same else 'Sums in float64 did not give the same bits'} for {other}" if other else "",
    ]
    return f"{', '.join(filter(None, clauses))}. Exact sums {f'did not for {exact}' if exact else 'did for all'}."


def power(text: str) -> str:
    """Write powers as text that Markdown does not take for bold: ``2^25``."""
    return text.replace("**", "^")


def kernel_speed(found: dict[str, Any]) -> str:
    """Tabulate how fast one core folds."""
    columns = ("read", "copy", "float64, F32", "exact, F32", "float64, BF16", "exact, BF16", "float64, F16", "exact, F16")

    def row(size: str, rates: dict[str, Any]) -> str:
        cells = (f"{rates[name]['median'] / 1e9:.1f}" for name in columns)
        return f"| {int(size) >> 10:,} KiB | {' | '.join(cells)} |\n"

    ends = {name: result["median"] for name, result in found["ends"].items()}
    return (
        f"## One core\n\nThe table shows GB/s of input that one core adds to its sums, beside reading and copying memory. "
        f"{_origin(found)}\n\n"
        f"| input | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n"
        + "".join(row(size, rates) for size, rates in found["rates"].items())
        + f"\nEach slice is rounded once: at {ends['exact, mean'] / 1e9:.1f} GB/s of float32 from exact sums, at "
        f"{ends['float64, mean'] / 1e9:.1f} from float64.\n"
        f"Partial sums take {ends['exact, bytes written an element']:.1f} bytes an element if exact, "
        f"{ends['float64, bytes written an element']:.0f} in float64. "
        f"Exact ones are serialized at {ends['exact, write'] / 1e9:.1f} GB/s of float32.\n"
    )


def s3_worker(found: dict[str, Any]) -> str:
    """Tabulate one function on S3 beside its client's own requests, and a serial loop."""

    def row(name: str, route: dict[str, Any]) -> str:
        rates = [f"{route['rivals'][rival]['read_rate']['median'] / 1e6:.0f}" for rival in ("ours", "raw", "serial", "obstore")]
        return f"| {' | '.join((name, *rates))} | {route['ours_of_raw']:.2f} | {route['ours_of_serial']:.2f} |\n"

    setup, routes = found["setup"], found["routes"]
    ours, serial = (max(route["rivals"][name]["grown_slices"] for route in routes.values()) for name in ("ours", "serial"))
    return (
        f"## A function on S3\n\nThe setup is {setup['title']}, on one machine; latency and rates are injected.\n{_origin(found)}\n\n"
        "| MB/s read, median | gradsharding | the same requests, bytes dropped | serial loop | obstore "
        "| ours ÷ requests | ours ÷ loop |\n|---|---|---|---|---|---|---|\n"
        + "".join(row(name, route) for name, route in routes.items())
        + f"\nWe read {setup['chunk'] >> 20} MiB a request, {setup['parallel']} at once, and fold in float64. The serial loop is "
        "`get_object().read()`\nand `np.add` in float32. Memory beside the idle client, in slices: "
        f"ours {ours:.1f}, of which the float64 sums are 2; the loop's {serial:.1f}.\n"
        f"{reached(routes)}\n"
    )


def reached(routes: dict[str, Any]) -> str:
    """Say on which routes we read nearly as fast as the requests alone, and where a serial loop keeps up."""
    below = [f"{name} ({result['ours_of_raw']:.2f})" for name, result in routes.items() if result["ours_of_raw"] < NEARLY]
    slower = [f"{name} ({result['ours_of_serial']:.2f})" for name, result in routes.items() if result["ours_of_serial"] < 1]
    most = max(routes, key=lambda name: float(routes[name]["ours_of_serial"]))
    raw = f"We reach {NEARLY} of the requests' rate on every route" + (f" but {'; '.join(below)}" if below else "")
    serial = f"The loop is faster on {'; '.join(slower)}" if slower else "The loop is slower on every route"
    return f"{raw}. {serial}; we gain most at {most}: {routes[most]['ours_of_serial']:.2f} times the loop's speed."


def topologies(found: dict[str, Any]) -> str:
    """Tabulate what each topology takes on this machine."""

    def row(name: str, result: dict[str, Any]) -> str:
        tree = "+".join(map(str, result["widths"]))
        cells = (
            name,
            f"{result['functions']} ({tree} × {result['shards']})",
            f"{result['seconds']['median']:.2f} s",
            f"{result['of_the_fastest']:.2f}",
            shown(result["cpu_seconds"] and result["cpu_seconds"]["median"], 1, ".2f", "s"),
            f"{shown(result['peak_memory'], 2**20, ',.0f', 'MiB')} of {result['projected_memory'] / 2**20:,.0f} MiB",
            str(result["gets"]),
            str(result["puts"]),
            f"{result['bytes_read'] / 1e6:,.0f} MB",
        )
        return f"| {' | '.join(cells)} |\n"

    setup = found["setup"]
    return (
        f"## Topologies\n\n![Bars: time and memory of each topology]({RESULTS}/topologies.svg)\n\n"
        f"The input is {setup['clients']} updates of {setup['bytes'] / 1e6:.0f} MB in a directory; {setup['at_once']} worker processes "
        f"run the tasks, {setup['repetitions']} times in turn.\nAll results are the same bytes. {_origin(found)}\n\n"
        "| | functions | time, median | of the fastest | CPU | peak of projected memory | GETs | PUTs | read |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        + "".join(row(name, result) for name, result in found["topologies"].items())
        + f"\nFastest: {fastest(found['topologies'])}. The store counted GETs, PUTs and bytes, over the whole call.\n"
        + f"At most {setup['at_once']} functions run at once, so these times do not show the gain of many.\n"
    )


def fastest(found: dict[str, Any]) -> str:
    """Name the fastest topology, and what sharding takes beside it."""
    first = min(found, key=lambda name: float(found[name]["of_the_fastest"]))
    return first if first == "sharded" else f"{first}; sharded takes {found['sharded']['of_the_fastest']:.2f} times as long"


def request_counts(found: dict[str, Any]) -> str:
    """Tabulate requests as a server, a report and a plan count them."""

    def row(name: str, result: dict[str, Any]) -> str:
        cells = (f"{result[which]['gets']} + {result[which]['puts']}" for which in ("server", "observed", "projected"))
        return f"| {name} | {' | '.join(cells)} |\n"

    def summary(name: str, result: dict[str, Any]) -> str:
        most = {kind: result["planned_of_reported"][kind]["most"] for kind in ("gets", "puts")}
        return (
            f"On {name}, {result['reported_as_seen']} of {result['rounds']} random rounds were reported as the server saw them, and "
            f"{result['planned_at_least_reported']} stayed within their plan, which counted at most {most['gets']:.2f} times the GETs and "
            f"{most['puts']:.2f} times the PUTs where sizes do not vary."
        )

    servers = found["servers"]
    return (
        "## Requests\n\nEach cell is GET and HEAD + PUT, COPY, POST and LIST of a whole command: in Ceph's own log, in the report, "
        "in the plan.\n"
        f"{_origin(found)}\n\n| round | at the server | reported | planned |\n|---|---|---|---|\n"
        + "".join(row(name, result) for name, result in servers["ceph"]["fixed"].items())
        + "\n"
        + "\n".join(summary(name.capitalize(), result) for name, result in servers.items())
        + "\n"
    )


def memory_wall(found: dict[str, Any]) -> str:
    """Tabulate the largest models that were aggregated in functions of a given memory."""
    setup, most = found["setup"], found["setup"]["most"]

    def row(name: str, result: dict[str, Any]) -> str:
        ran, planned = (f"{result[key] / 2**20:,.0f} MiB" + " or more" * (result[key] >= most) for key in ("ran", "planned"))
        return f"| {name} | {ran} | {planned} |\n"

    return (
        f"## The memory wall\n\nThe table shows the largest model that ran in functions of {setup['memory'] / 2**20:.0f} MiB, with "
        f"{setup['clients']} updates; the largest tried was {most / 2**20:,.0f} MiB.\n{_origin(found)}\n\n"
        "| | ran | the plan allows |\n|---|---|---|\n" + "".join(row(name, result) for name, result in found["topologies"].items())
    )


def crossover(found: dict[str, Any], calibrated: dict[str, Any]) -> str:
    """List which of the paper's claims hold, with the figure of the crossings."""
    claims = found["claims"]
    lines = "".join(
        f"{i}. *{c['claim']}*: {c['verdict']}. Paper: {c['paper']}. Model, its layout: {c[LAYOUT]}. Model, this engine: {c[ENGINE]}.\n"
        for i, c in enumerate(claims, 1)
    )
    return (
        "## Where sharding wins\n\nThese figures are modelled, not run. They use list prices, and a time model that predicts the "
        f"{len(calibrated['points'])} wall times published with\n[arXiv:2604.22072](https://arxiv.org/abs/2604.22072) within "
        f"{calibrated['largest_residual']:.1%}, with one bandwidth for each of their campaigns (within "
        f"{calibrated['largest_residual_by_default']:.0%} with one for all).\n{_origin(found)} The paper's three claims:\n\n"
        + lines
        + f"\n![US dollars for 1,000 rounds by model size, in both accountings]({RESULTS}/crossover.svg)\n"
    )


def scale(found: dict[str, Any]) -> str:
    """Show the largest rounds, as modelled."""
    rounds = found["rounds"]
    largest = max((r for r in rounds if r["topology"]), key=lambda r: (r["bytes"] * r["clients"], r["bytes"]))
    plans = "; ".join(f"{name} in {seconds:.2f} s" for name, seconds in found["planning_seconds"].items() if "made" not in name)
    clients, nbytes = max(r["clients"] for r in rounds), max(r["bytes"] for r in rounds)
    return (
        f"## How far it goes\n\nThese figures are modelled, not run, for up to {clients:,} clients and {nbytes / 1e12:g} TB, with "
        f"{found['config']['concurrency']:,} functions at once. {_origin(found)}\n"
        f"Largest: {largest['clients']:,} clients of {largest['bytes'] / 1e9:,g} GB, {largest['topology']}, "
        f"{largest['functions']:,} functions, {largest['p50'] / 3600:,.1f} hours, "
        f"${float(largest['usd_aggregation']):,.0f} for the aggregation.\n"
        f"The planner: {plans}. \n\n![Time, functions and price by model size and number of clients]({RESULTS}/scale.svg)\n"
    )


def _origin(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return (
        f"It ran on {machine['cores']} cores ({machine['cpu']}) on {machine['date'][:10]}, at commit `{machine['commit']}`: "
        f"`{machine['command']}`."
    )


def _results(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return loaded


def fill(document: Path, text: str) -> None:
    """Replace the generated part of a document."""
    before, _, rest = document.read_text().partition(BEGIN)
    document.write_text(before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    fill(README, beside_flower())
    fill(PAGE, section())
