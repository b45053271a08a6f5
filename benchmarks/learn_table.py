"""The rows of benchmarks/learn.py as a table in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.learn_plan import LEARNERS
from benchmarks.trials import JUDGED

Json = dict[str, Any]


def table(rows: Sequence[Json]) -> str:
    """A line a learner and cell, means over its seeds, as Markdown; times and rates of quiet runs alone."""
    lines = [
        "| taste | feedback | learner | lr | seeds | satisfied | facts | satisfied × facts | KL | paraphrased | untaught "
        "| s | rollouts/s | MB above imports |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    together: dict[tuple[object, ...], list[Json]] = {}
    for row in rows:
        cell = row["cell"]
        where = (cell["taste"], cell["kind"], cell["count"], cell["noise"], row["learner"], row["lr"])
        together.setdefault(where, []).append(row)
    lines += [line_of(together[where]) for where in sorted(together, key=place)]
    return "\n".join([*lines, "", *means(rows)])


def means(rows: Sequence[Json]) -> Iterator[str]:
    """Each learner's mean of satisfied × facts and of the KL, over the cells (and seeds) that all who are there share."""
    found: dict[str, dict[tuple[Any, ...], Json]] = {}
    for row in rows:
        found.setdefault(row["learner"], {})[tuple(row["cell"].values())] = next(iter(row["judged"].values()))
    common = set.intersection(*map(set, found.values())) if found else set()
    for learner in sorted(found, key=list(LEARNERS).index) if common else ():
        product, kl = (
            statistics.fmean(found[learner][cell][figure] for cell in common) for figure in ("product", "kl")
        )
        yield f"- {learner}: mean satisfied × facts {product:.3f}, KL {kl:.2f}, over {len(common)} cells"


def place(where: tuple[Any, ...]) -> tuple[object, ...]:
    name, kind, count, noise, learner, lr = where
    return "+" in name, name, kind != "thumb", noise, count, list(LEARNERS).index(learner), lr


def line_of(rows: Sequence[Json]) -> str:
    first, quiet = rows[0], [row for row in rows if row["quiet"]]
    cell, main_group = first["cell"], next(iter(first["judged"]))

    def mean(group: str, figure: str) -> float:
        return statistics.fmean(row["judged"][group][figure] for row in rows)

    def elsewhere(group: str) -> str:
        if group not in first["judged"]:
            return "–"
        return " / ".join(f"{mean(group, figure):.2f}" for figure in ("satisfied", "facts", "kl"))

    error = statistics.fmean(row["judged"][main_group]["error"] ** 2 for row in rows) ** 0.5 / len(rows) ** 0.5
    rates = [row["rollouts"] / row["ppo_s"] for row in quiet if row["ppo_s"]]
    refused = sum(bool(row["refused"]) for row in rows)
    kinds = {"thumb": "thumbs", "preference": "preferences"}
    parts = [
        cell["taste"],
        f"{cell['count']} {kinds[cell['kind']]}, {cell['noise']:.0%} wrong",
        first["learner"] + (f" ({refused} refused)" if refused else ""),
        f"{first['lr']:g}",
        str(len(rows)),
        *(f"{mean(main_group, figure):.3f}" for figure in ("satisfied", "facts")),
        f"**{mean(main_group, 'product'):.3f}** ± {error:.3f}",
        f"{mean(main_group, 'kl'):.2f}",
        *(elsewhere(group) for group in JUDGED[1:]),
        f"{statistics.fmean(row['wall_s'] for row in quiet):.0f}" if quiet else "–",
        f"{statistics.fmean(rates):.0f}" if rates else "–",
        f"{statistics.fmean(row['peak_mb'] - row['imports_mb'] for row in rows):.0f}",
    ]
    return "| " + " | ".join(parts) + " |"
