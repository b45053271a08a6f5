"""Plots as inline SVG: lines, histograms and a calibration plot, in the colours of the page around them (page.css).

Lengths are in units of the drawing, which grows and shrinks with the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 38, 12, 10, 24
BINS = 24


@dataclass(frozen=True, slots=True)
class Frame:
    """A rectangle of the plane, drawn `width` wide and `height` high."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float
    width: int = 340
    height: int = 170

    def x(self, value: float) -> float:
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (self.height - TOP - BOTTOM)

    def svg(self, label: str, marks: Iterable[str], x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
        """The drawing whole: a grid with its numbers, then the marks."""
        right, floor = self.width - RIGHT, self.height - BOTTOM
        grid = [f'<path class="grid" d="M{LEFT} {self.y(tick):.1f}H{right}"/>' for tick in y_ticks]
        grid += [
            f'<text x="{LEFT - 6}" y="{self.y(tick) + 3.5:.1f}" class="y">{number(tick)}</text>' for tick in y_ticks
        ]
        grid += [f'<text x="{self.x(tick):.1f}" y="{floor + 15}" class="x">{number(tick)}</text>' for tick in x_ticks]
        view = f'viewBox="0 0 {self.width} {self.height}"'
        return f'<svg {view} role="img" aria-label="{escape(label)}">{"".join([*grid, *marks])}</svg>'


def line(values: Sequence[float | None], label: str, *, bound: float | None = None, marked: int | None = None) -> str:
    """A value for each batch, from 1; None draws nothing.

    `bound` is a dashed line that it should not cross, `marked` the index of the batch that gets a dot.
    """
    points = [(place, value) for place, value in enumerate(values, 1) if value is not None and math.isfinite(value)]
    low, high = _roomy([value for _, value in points] + [0.0] + ([] if bound is None else [bound]))
    frame = Frame(1, max(len(values), 2), low, high)
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
    marks = [f'<path class="line" d="M{path}"/>'] if points else []
    if bound is not None:
        marks.append(f'<path class="bound" d="M{LEFT} {frame.y(bound):.1f}H{frame.width - RIGHT}"/>')
    marks += [
        f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4"/>'
        for x, y in points
        if marked is not None and x == marked + 1
    ]
    whole = [tick for tick in ticks(1, frame.high_x) if tick == int(tick)]
    return frame.svg(label, marks, whole, ticks(low, high, 4))


def histogram(groups: Mapping[str, Sequence[float]], label: str) -> str:
    """Shares of each group's values in bins of one width, drawn over each other; classes a, b, … in order."""
    every = [value for values in groups.values() for value in values]
    low, high = min(every), max(every)
    step = (high - low) / BINS or 1.0
    counts = [[0] * BINS for _ in groups]
    for bins, values in zip(counts, groups.values(), strict=True):
        for value in values:
            bins[min(int((value - low) / step), BINS - 1)] += 1
    shares = [[count / max(sum(bins), 1) for count in bins] for bins in counts]
    frame = Frame(low, low + BINS * step, 0.0, max(map(max, shares)) * 1.08, width=700, height=220)
    marks = [
        f'<rect class="{"ab"[group]}" x="{frame.x(low + place * step):.1f}" y="{frame.y(share):.1f}" '
        f'width="{frame.x(low + step) - frame.x(low) - 1:.1f}" height="{frame.y(0) - frame.y(share):.1f}"/>'
        for group, bins in enumerate(shares)
        for place, share in enumerate(bins)
        if share
    ]
    return frame.svg(label, marks, ticks(low, frame.high_x), ticks(0.0, frame.high_y, 4))


def calibration(points: Sequence[Sequence[float]], label: str) -> str:
    """Foretold against seen shares, a circle a bin with an area by its count; on the diagonal they are the same."""
    frame = Frame(0.0, 1.0, 0.0, 1.0, height=300)
    most = max((count for _, _, count in points), default=1)
    marks = [f'<path class="bound" d="M{frame.x(0)} {frame.y(0)}L{frame.x(1)} {frame.y(1)}"/>']
    marks += [
        f'<circle class="b" cx="{frame.x(foretold):.1f}" cy="{frame.y(seen):.1f}" r="{3 + 9 * math.sqrt(count / most):.1f}">'
        f"<title>{count} thumbs: {foretold:.0%} foretold, {seen:.0%} seen</title></circle>"
        for foretold, seen, count in points
    ]
    return frame.svg(label, marks, ticks(0.0, 1.0), ticks(0.0, 1.0))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers between two."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)
    return [
        round(place * step, 10) for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def number(value: float) -> str:
    """As short as it can be; with a true minus."""
    return f"{value:g}".replace("-", "−")


def _roomy(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest of them with some room around."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.5
    return (low - room if low < 0 else low), high + room
