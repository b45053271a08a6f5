"""Heed's learner beside TRL's: the same base, raters and feedback, each adapter judged by one and the same judge.

Each run is a process of its own, a peer's in a virtual environment of its own (made once, from PyPI), that reads one JSON
file and writes an adapter. Heed's engine then makes ten fresh replies at T=1 to each judged prompt (benchmarks/trials.py). A
finished run is a line of results/learn_peers.jsonl and is not run again, unless other work kept the processors busy
meanwhile ("quiet": false).

    python -m benchmarks.learn                                    every run that is missing, then the table
    python -m benchmarks.learn --only heed --only kto --anyway    some learners; runs that were not quiet count too
    python -m benchmarks.learn --tune                             the learning rates, on a cell and prompts that are not judged
    python -m benchmarks.learn --table                            the table alone
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.learn_heed import checked
from benchmarks.peers import make_venv
from benchmarks.servers import CACHE, ROOT, NotHere
from benchmarks.trials import JUDGED, Cell, Judge, groups
from learner import trial
from learner.config import LearnerConfig
from learner.update import Trainer
from serving.model import find_model

TASTES = ("emoji", "personal+casual")
"""One single taste, one conjunction."""
QUIET = 0.05
"""Share of the processors that others may take of a run whose times count."""
SAME = 1e-4
"""By so much may two learners differ on log p of one reply before either has learned."""

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
"""Of each learner; OpenMP as in `heed up`: threads that wait let others work."""

Json = dict[str, Any]


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
        Learner("heed", None, 1e-3, (5e-4, 1e-3, 2e-3), seeds=3),
        Learner("trl-ppo", "trl==1.12.0", 1e-3, (5e-4, 1e-3, 2e-3), seeds=3),
        Learner("rloo", "trl==1.16.*", 1e-3, (5e-4, 1e-3, 2e-3), seeds=1),
        Learner("kto", "trl==1.16.*", 1e-3, (5e-4, 1e-3, 2e-3), seeds=1),
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
    """All runs, those that tell most first: 300 thumbs, a tenth wrong, then the other noise and kind, then the other counts."""
    for kind, count, noise in (
        *(("thumb", 300, 0.1), ("thumb", 300, 0.25), ("preference", 300, 0.1)),
        *(("thumb", 150, 0.1), ("thumb", 100, 0.1), ("thumb", 1000, 0.1)),
    ):
        for seed in range(max(learner.seeds for learner in LEARNERS.values())):
            for learner in LEARNERS.values():
                if seed < learner.seeds and (count != 150 or learner.package is None):
                    yield from (Run(learner.name, Cell(name, kind, count, noise, seed), learner.lr) for name in TASTES)


def tuning() -> Iterator[Run]:
    for learner in LEARNERS.values():
        yield from (Run(learner.name, TUNING, lr, ("tuning",)) for lr in learner.tried)


def main() -> None:
    given = arguments()
    rows = read(given.results)
    done = {key(row) for row in rows if row["quiet"] or given.anyway}
    for one in () if given.table else tuning() if given.tune else plan():
        if one.key in done or (given.only and one.learner not in given.only):
            continue
        print(f"{one.learner}, {one.cell}, lr {one.lr:g} ...", file=sys.stderr, flush=True)
        try:
            row = measure(one)
        except NotHere as error:
            print(f"{one.learner} is left out: {error}", file=sys.stderr, flush=True)
            continue
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(table([row for row in newest(read(given.results)) if (row["judged"].keys() == {"tuning"}) == given.tune]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=LEARNERS, help="this learner; may be given again")
    parser.add_argument("--tune", action="store_true", help="try the learning rates instead")
    parser.add_argument("--anyway", action="store_true", help="do not run again what was not quiet")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/learn_peers.jsonl")
    return parser.parse_args()


def read(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def key(row: Json) -> tuple[object, ...]:
    """The key of the run that a row is of."""
    return Run(row["learner"], Cell(**row["cell"]), row["lr"], tuple(row["judged"])).key


def newest(rows: Sequence[Json]) -> list[Json]:
    """One row a run: the last one, a quiet one before others."""
    return list({key(row): row for row in sorted(rows, key=lambda row: row["quiet"])}.values())


@lru_cache(maxsize=1)
def judge() -> Judge:
    return Judge(Trainer(LearnerConfig()))


def measure(one: Run) -> Json:
    """One run, from feedback to a row of the table.

    Raises NotHere where the learner cannot be installed, RuntimeError where it fails or has another base than Heed.
    """
    learner = LEARNERS[one.learner]
    python, script = learner.python(), "learn_heed" if learner.package is None else "learn_trl"
    with tempfile.TemporaryDirectory(prefix="heed-learn-") as work:
        job = job_of(one, Path(work))
        (Path(work) / "job.json").write_text(json.dumps(job), "utf-8")
        others = Others()
        done = subprocess.run([python, "-m", f"benchmarks.{script}", str(Path(work) / "job.json")], cwd=ROOT,
                              env=os.environ | ENVIRONMENT, capture_output=True, text=True)  # fmt: skip
        share = others.share()
        if done.returncode:
            raise RuntimeError(f"{one.learner} failed: ...{(done.stdout + done.stderr)[-4000:]}")
        found = json.loads(Path(job["found"]).read_text("utf-8"))
        ours = checked(judge().trainer, job["check"])
        if abs(found["check"] - ours) > SAME:
            raise RuntimeError(f"{one.learner} has another base or template: log p {found['check']}, Heed {ours}")
        judged = {
            group: judge().judge(Path(job["adapter"]), one.cell.taste, group, one.cell.seed) for group in one.judged
        }
    return {
        "learner": one.learner, "cell": asdict(one.cell), "lr": one.lr, "judged": judged, **found,
        "feedback": digest(job["thumbs"]), "wall_s": others.wall_s, "others": share, "quiet": share < QUIET,
    }  # fmt: skip


def job_of(one: Run, work: Path) -> Json:
    """What the learner's process is told."""
    (work / "adapter").mkdir()
    prompts = {prompt: trial.encoded(judge().trainer, prompt) for prompt in groups()["taught"]}
    asked = next(iter(prompts))
    [said] = judge().trainer.sampler.sample([prompts[asked]], None, 0)
    return {
        "base": str(find_model(None)),
        "work": str(work / "work"),
        "adapter": str(work / "adapter"),
        "found": str(work / "found.json"),
        "method": LEARNERS[one.learner].method,
        "lr": one.lr,
        "seed": one.cell.seed,
        "kind": one.cell.kind,
        "prompts": [{"text": prompt, "ids": ids} for prompt, ids in prompts.items()],
        "check": {"prompt": asked, "prompt_ids": said.prompt_ids, **judge().said("reply", said)},
        **judge().feedback(one.cell),
    }


def digest(thumbs: Sequence[Json]) -> str:
    """What tells feedback apart: rows of one cell must have the same."""
    return hashlib.sha256(json.dumps(thumbs).encode()).hexdigest()[:12]


class Others:
    """Which share of the processors was not ours while our children ran, from its making to `share`."""

    def __init__(self) -> None:
        self.began, self.busy_s, self.own_s = time.perf_counter(), busy_s(), children_s()
        self.wall_s = 0.0

    def share(self) -> float:
        self.wall_s = time.perf_counter() - self.began
        others = (busy_s() - self.busy_s) - (children_s() - self.own_s)
        return others / self.wall_s / (os.cpu_count() or 1)


def busy_s() -> float:
    """Seconds that this machine's processors were not idle since it started, those taken by its host included."""
    user, nice, system, _idle, _waiting, *more = map(
        int, Path("/proc/stat").read_text("ascii").split("\n")[0].split()[1:]
    )
    return (user + nice + system + sum(more[:3])) / os.sysconf("SC_CLK_TCK")


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
    return "\n".join([*lines, "", *means(together)])


def means(together: Mapping[tuple[Any, ...], Sequence[Json]]) -> Iterator[str]:
    """Each learner's mean of satisfied × facts and of the KL, over the cells that all who are there have in common."""
    found: dict[str, dict[tuple[Any, ...], Json]] = {}
    for (*cell, learner, _), rows in together.items():
        of_first = [next(iter(row["judged"].values())) for row in rows]
        found.setdefault(learner, {})[tuple(cell)] = {
            figure: statistics.fmean(judged[figure] for judged in of_first) for figure in ("product", "kl")
        }
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


if __name__ == "__main__":
    main()
