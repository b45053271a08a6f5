"""Which runs benchmarks/learn.py makes: who learns, on what, at which learning rate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers import make_venv
from benchmarks.servers import CACHE
from benchmarks.trials import JUDGED, Cell

TASTES = ("emoji", "personal+casual")
"""One single taste, one conjunction."""


@dataclass(frozen=True, slots=True)
class Learner:
    """Who learns: its package beside torch (None: Heed itself), its method, its learning rate and those that were tried."""

    name: str
    package: str | None
    lr: float
    tried: tuple[float, ...]
    seeds: int
    """Runs of each cell."""

    @property
    def method(self) -> str:
        return self.name.removeprefix("trl-")

    def python(self) -> str:
        """The interpreter that it runs in, made on demand. Raises NotHere."""
        if self.package is None:
            return sys.executable
        home = CACHE / "learners" / self.package.replace("==", "-").removesuffix(".*")
        if not (home / "whole").exists():
            make_venv(home / "venv", "torch~=2.13.0", self.package, "peft")
            (home / "whole").touch()
        return str(home / "venv/bin/python")


LEARNERS = {
    learner.name: learner
    for learner in (
        Learner("heed", None, 2e-3, (5e-4, 1e-3, 2e-3), seeds=3),
        Learner("trl-ppo", "trl==1.12.0", 2e-3, (5e-4, 1e-3, 2e-3), seeds=3),
        Learner("rloo", "trl==1.16.*", 2e-3, (5e-4, 1e-3, 2e-3), seeds=1),
        Learner("kto", "trl==1.16.*", 2e-3, (5e-4, 1e-3, 2e-3), seeds=1),
        Learner("dpo", "trl==1.16.*", 1e-3, (5e-4, 1e-3, 2e-3), seeds=1),
    )
}
TUNING = Cell("question", "thumb", 300, 0.1, 100)
"""What learning rates are chosen on."""


@dataclass(frozen=True, slots=True)
class Run:
    """One learner on one cell."""

    learner: str
    cell: Cell
    lr: float
    judged: tuple[str, ...] = JUDGED

    @property
    def key(self) -> tuple[object, ...]:
        return self.learner, self.cell, self.lr, self.judged


def plan() -> Iterator[Run]:
    """All runs, a seed at a time; 300 thumbs, a tenth wrong, then the other noise and kind, then the other counts."""
    cells = (
        *(("thumb", 300, 0.1), ("thumb", 300, 0.25), ("preference", 300, 0.1)),
        *(("thumb", 150, 0.1), ("thumb", 100, 0.1), ("thumb", 1000, 0.1)),
    )
    for seed in range(max(learner.seeds for learner in LEARNERS.values())):
        for kind, count, noise in cells:
            for learner in LEARNERS.values():
                if seed < learner.seeds and (count != 150 or learner.package is None):
                    yield from (Run(learner.name, Cell(name, kind, count, noise, seed), learner.lr) for name in TASTES)


def tuning() -> Iterator[Run]:
    for learner in LEARNERS.values():
        yield from (Run(learner.name, TUNING, lr, ("tuning",)) for lr in learner.tried)
