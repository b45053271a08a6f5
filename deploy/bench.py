"""`heed bench`: the same simulated feedback for each objective, and what each makes of it, side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.table import Table

from deploy.door import NotDone
from feedback.raters import taste

if TYPE_CHECKING:
    from learner.config import LearnerConfig

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """Every objective on every taste, with every seed."""

    objectives: Sequence[str]
    tastes: Sequence[str]
    count: int
    """Judgements of a run."""
    noise: float
    seeds: Sequence[int]
    kind: str
    out: Path | None
    """A file to which each run adds its line."""

    def checked(self) -> Plan:
        """Itself. Raises NotDone for what no run could take."""
        from learner.config import LearnerConfig

        known = get_args(LearnerConfig.model_fields["objective"].annotation)
        unknown = set(self.objectives) - set(known)
        if unknown:
            raise NotDone(f"no objective is called {', '.join(sorted(unknown))}; known are {', '.join(known)}.")
        if self.kind not in ("thumb", "preference"):
            raise NotDone(f"--kind {self.kind}: must be thumb or preference.")
        try:
            for name in self.tastes:
                taste(name)
        except ValueError as error:
            raise NotDone(str(error)) from error
        return self


def run(plan: Plan, config: LearnerConfig, console: Console, as_json: bool) -> None:
    """Run after run; then the table on `console`, and with `as_json` a line for each on standard output."""
    rows = []
    for row in runs(plan.checked(), config, console):
        rows.append(row)
        if as_json:
            print(json.dumps(row), flush=True)
        if plan.out is not None:
            with plan.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    console.print(table(rows))


def runs(plan: Plan, config: LearnerConfig, console: Console) -> Iterator[Json]:
    """Each run in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for name, seed, objective in itertools.product(plan.tastes, plan.seeds, plan.objectives):
            with console.status(f"{objective} on {plan.count} judgements of {name}, seed {seed}"):
                yield processes.submit(_run, config, name, plan, seed, objective).result()


def _run(config: LearnerConfig, name: str, plan: Plan, seed: int, objective: str) -> Json:
    import torch

    from learner.trial import run_cell
    from serving.cores import cores

    torch.set_num_threads(config.learner_threads or min(torch.get_num_threads(), cores()))
    kind: Any = plan.kind
    return run_cell(name, plan.count, plan.noise, seed, objective=objective, kind=kind, config=config)


def table(rows: Sequence[Json]) -> Table:
    """A line a run: what people would think of it, how far it went for that, and what it cost."""
    shown = Table(
        "taste", "seed", "objective", "satisfied", "facts", "both", "KL", "gate", "seconds", "rollouts/s", "MB"
    )
    for row in rows:
        before, after = row["before"], row["after"]
        shown.add_row(
            row["taste"],
            str(row["seed"]),
            row["objective"],
            *(f"{number(before[name])} → {number(after[name])}" for name in ("satisfied", "facts", "both")),
            number(row["kl"]),
            "yes" if row["passed"] else "no",
            number(row["seconds"], 0),
            number(row["rollouts_per_s"], 0),
            number(row["memory_mb"], 0),
        )
    return shown


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
