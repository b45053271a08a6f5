"""The plot of benchmarks/gold.py: gold and proxy by update, a column a seed, and below them the gap between the two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from learner.drawing import LEFT, RIGHT, Frame, ticks

Json = Mapping[str, Any]

WIDTH, HEIGHT, HEAD = 340, 170, 62
"""Of one frame, and the height of what is written above them."""
# Colours as in learner/page.css, by day and by night.
STYLE = """
svg { font: 11px system-ui, sans-serif; fill: #656c68; --gold: #0b6e56; --proxy: #c96f0a; --bad: #a3352a; --line: #dcdad2; }
.sheet { fill: #fff; } .x { text-anchor: middle; } .y { text-anchor: end; } .grid { stroke: var(--line); }
.gold, .proxy, .gap, .bound { fill: none; stroke-width: 2; stroke-linejoin: round; }
.gold { stroke: var(--gold); } .proxy { stroke: var(--proxy); } .gap { stroke: currentColor; color: #656c68; }
.bound { stroke: var(--bad); stroke-width: 1; stroke-dasharray: 4 4; } .dot { fill: var(--gold); } .head { font-size: 13px; }
@media (prefers-color-scheme: dark) {
  svg { fill: #9aa39e; --gold: #4fc3a1; --proxy: #f0a236; --bad: #f0897c; --line: #323936; } .sheet { fill: #1c211f; }
}
"""
NOTES = (
    "By update, in standard deviations of the base’s replies. Green: gold, with a dot where a version was released.",
    "Orange: proxy. Below: the proxy less gold. Dashed: where the base is; gold must not be below.",
)


def by_seed(rows: Sequence[Json]) -> dict[int, list[Json]]:
    """Each seed's rows, in order; the first is the base's."""
    return {seed: [row for row in rows if row["seed"] == seed] for seed in sorted({row["seed"] for row in rows})}


def gain(base: Json, row: Json) -> float:
    """Gold above its start, in standard deviations of the base's replies, of which a share `gold` is good: as the proxy is."""
    return float((row["gold"] - base["gold"]) / max(math.sqrt(base["gold"] * (1 - base["gold"])), 1e-3))


def gap(base: Json, row: Json) -> float:
    """By how much the proxy rose more than gold did."""
    return float(row["proxy"] - gain(base, row))


def plot(rows: Sequence[Json]) -> str:
    """The drawing whole, as SVG. `rows`: each seed's in order, the base's first."""
    seeds = by_seed(rows)
    climbed = [value for of in seeds.values() for row in of for value in (row["proxy"], gain(of[0], row))]
    gaps = [gap(of[0], row) for of in seeds.values() for row in of]
    last = max((row["update"] for row in rows), default=0)
    above, below = _frame(last, climbed), _frame(last, gaps)  # the same for all seeds, so that they can be compared
    drawn = [f'<text x="{LEFT}" y="{18 + 15 * line}">{note}</text>' for line, note in enumerate(NOTES)]
    for column, (seed, of) in enumerate(seeds.items()):
        golds = [gain(of[0], row) for row in of]
        marks = [_path(above, [row["proxy"] for row in of], "proxy"), _path(above, golds, "gold")]
        marks += [_dot(above, place, golds[place]) for place, row in enumerate(of) if row["released"]]
        drawn += [
            f'<text class="head" x="{column * WIDTH + LEFT}" y="{HEAD - 4}">seed {seed}</text>',
            _placed(above, marks, f"gold and proxy, seed {seed}", column, 0),
            _placed(below, [_path(below, [gap(of[0], row) for row in of], "gap")], f"gap, seed {seed}", column, 1),
        ]
    width, height = max(len(seeds), 2) * WIDTH, HEAD + 2 * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="gold and proxy">'
        f'<style>{STYLE}</style><rect class="sheet" width="{width}" height="{height}"/>{"".join(drawn)}</svg>\n'
    )


def _frame(last: int, values: Sequence[float]) -> Frame:
    values = [0.0, 1.0, *values]
    return Frame(0, max(last, 1), min(values) - 0.1, max(values) + 0.1, WIDTH, HEIGHT)


def _path(frame: Frame, values: Sequence[float], name: str) -> str:
    points = "L".join(f"{frame.x(place):.1f} {frame.y(value):.1f}" for place, value in enumerate(values))
    return f'<path class="{name}" d="M{points}"/>'


def _dot(frame: Frame, place: int, value: float) -> str:
    return f'<circle class="dot" cx="{frame.x(place):.1f}" cy="{frame.y(value):.1f}" r="3"/>'


def _placed(frame: Frame, marks: Sequence[str], label: str, column: int, line: int) -> str:
    """A drawing within the drawing."""
    bound = f'<path class="bound" d="M{LEFT} {frame.y(0):.1f}H{frame.width - RIGHT}"/>'
    whole = [tick for tick in ticks(0, frame.high_x) if tick == int(tick)]
    svg = frame.svg(label, [bound, *marks], whole, ticks(frame.low_y, frame.high_y, 4))
    place = f'x="{column * WIDTH}" y="{HEAD + line * HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return svg.replace("<svg ", f"<svg {place} ", 1)
