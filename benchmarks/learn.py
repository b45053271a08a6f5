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
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.learn_heed import checked
from benchmarks.learn_plan import LEARNERS, Run, plan, tuning
from benchmarks.learn_table import table
from benchmarks.servers import ROOT, NotHere
from benchmarks.trials import Cell, Judge, groups
from learner import trial
from learner.config import LearnerConfig
from learner.trainer import Trainer
from serving.model import find_model

QUIET = 0.05
"""Share of the processors that others may take of a run whose times count."""
SAME = 1e-4
"""By so much may two learners differ on log p of one reply before either has learned."""

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
"""Of each learner; OpenMP as in `heed up`: threads that wait let others work."""

Json = dict[str, Any]


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


if __name__ == "__main__":
    main()
