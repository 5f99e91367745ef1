"""Draw committed results as bars beside Flower's: ``python benchmarks/pictures.py``. A picture is a function of its results file alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
WIDTH, LEFT, RIGHT, BAR, GAP = 860, 300, 130, 24, 10
COLOURS = {True: "#4263eb", False: "#adb5bd"}
"""Of a bar that is ours, and of another's."""

FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"


class Bar(NamedTuple):
    """One bar: its name, its length, and the text at its end."""

    name: str
    value: float
    text: str
    ours: bool


class Panel(NamedTuple):
    """Bars that share one scale."""

    title: str
    bars: tuple[Bar, ...]


def svg(title: str, panels: Sequence[Panel]) -> str:
    """Draw panels, one below the other."""
    lines, y = list[str](), 20
    for panel in panels:
        lines.append(f'<text x="16" y="{y + 16}" font-weight="600">{panel.title}</text>')
        y += 34
        longest = max(bar.value for bar in panel.bars)
        for bar in panel.bars:
            length = max(2.0, (WIDTH - LEFT - RIGHT) * bar.value / longest)
            lines.append(f'<text x="{LEFT - 10}" y="{y + 17}" text-anchor="end">{bar.name}</text>')
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3" fill="{COLOURS[bar.ours]}"/>')
            lines.append(f'<text x="{LEFT + length + 8:.1f}" y="{y + 17}">{bar.text}</text>')
            y += BAR + GAP
        y += 16
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="{FONT}" font-size="14" '
        f'fill="#212529" role="img" aria-label="{title}">\n<rect width="{WIDTH}" height="{y}" fill="#fff"/>'
    )
    return "\n".join([head, *lines, "</svg>\n"])


def embedded(found: dict[str, Any]) -> str:
    """Draw time and memory of aggregation alone."""
    names = {"flower": "Flower's FedAvg", "numpy": "one numpy loop", "exact": "gradsharding, exact", "ours": "gradsharding"}
    rivals = found["rivals"]

    def seconds(name: str) -> Bar:
        median = rivals[name]["seconds"]["median"]
        return Bar(names[name], median, f"{median:.2f} s", name in ("ours", "exact"))

    def memory(name: str) -> Bar:
        peak = rivals[name]["memory"]["own"]["median"]
        return Bar(names[name], peak, f"{peak / 2**20:,.0f} MiB", name in ("ours", "exact"))

    return svg(
        f"Time and memory of aggregating {found['setup']['title']}",
        (
            Panel("Aggregation alone: time, median", tuple(map(seconds, names))),
            Panel("Aggregation alone: peak memory of all processes", tuple(map(memory, names))),
        ),
    )


def flower_round(found: dict[str, Any]) -> str:
    """Draw time and memory of a whole round."""

    def panel(title: str, key: str, scale: float, unit: str) -> Panel:
        rows = (("plain", "Flower's FedAvg", False), ("direct", "gradsharding, direct mode", True))
        values = ((found["figures"][mode][key] / scale, name, ours) for mode, name, ours in rows)
        return Panel(title, tuple(Bar(name, value, f"{value:,.1f} {unit}", ours) for value, name, ours in values))

    return svg(
        f"Time and memory of a whole round of a model of {found['model_bytes'] / 1e6:.0f} MB",
        (
            panel("A whole round: time, median", "round_seconds", 1, "s"),
            panel("A whole round: peak memory of the ServerApp", "server_app_peak_while_training", 1e6, "MB"),
            panel("A whole round: bytes over loopback", "loopback_bytes_per_round", 1e6, "MB"),
        ),
    )


def topologies(found: dict[str, Any]) -> str:
    """Draw time and memory of each topology."""
    rows = found["topologies"].items()
    times = tuple(
        Bar(name, figures["seconds"]["median"], f"{figures['seconds']['median']:.2f} s", name == "sharded") for name, figures in rows
    )
    peaks = tuple(
        Bar(name, figures["peak_memory"], f"{figures['peak_memory'] / 2**20:,.0f} MiB", name == "sharded") for name, figures in rows
    )
    panels = (Panel("Each topology: time, median", times), Panel("Each topology: peak memory of one function", peaks))
    return svg("Time and memory of each topology", panels)


PICTURES = {"embedded": embedded, "flower_round": flower_round, "topologies": topologies}


def drawn(name: str) -> str:
    """Draw one committed result."""
    return PICTURES[name](json.loads((RESULTS / f"{name}.json").read_text()))


if __name__ == "__main__":
    for name in PICTURES:
        (RESULTS / f"{name}.svg").write_text(drawn(name))
