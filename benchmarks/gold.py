"""The gold-reward simulator: does what people really want ever suffer, while the learner climbs what it takes them to want?

Simulated people share a taste and give thumbs, a quarter of them wrong. Thirty updates in a row: each learns from all thumbs so
far, new ones on replies of the version that is served, and starts from that version; what the gate refuses leaves it in
its place. After each update the version then served answers held-out prompts, always the same ones with the same seeds:

    gold     satisfied × facts right of these replies, judged without noise
    proxy    their mean score by the reward model that the update fitted, on the scale of the base's replies to the same prompts

Gold must never be below where it began, with the base, and must be above it in the end. Any fall ends the command with 1;
it says how many standard errors deep each one is, as two independent samples would have them. The samples are not: with
the same prompts and seeds much of the chance is common to both, so a fall is deeper than that, and a small one is no excuse.

All seeds run side by side, a process with one thread each. A finished update is a line of results/gold.jsonl and is not made
again; beside it are a plot, gold.svg, and a folder with the thumbs and the versions that later updates start from.
Settings are the learner's own but for `BATCHES`, and no replies are kept for a report.

    python -m benchmarks.gold                              every update that is missing, then plot and verdict
    python -m benchmarks.gold --seed 0 --updates 6         one seed, in this process, so far and no further
    python -m benchmarks.gold --updates 0                  plot and verdict of what is there
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from benchmarks.gold_plot import by_seed, gap, plot
from benchmarks.servers import ROOT
from benchmarks.trials import groups, with_product
from feedback.raters import crowd, taste
from learner import trial
from learner.config import LearnerConfig
from learner.judgement import Judgement, Sample
from learner.rollouts import Rollout
from learner.trainer import Trainer
from serving.lora import AdapterWeights
from serving.peft_files import read_peft, read_peft_folder, save_peft

SEEDS, UPDATES = 3, 30
TASTE, NOISE = "personal+casual", 0.25
"""A conjunction, the harder kind: 27% of the base's replies satisfy it."""
THUMBS = 30
"""New ones before each update."""
BATCHES = 4
"""Of PPO in an update, instead of up to 16: it goes on from its parent, and so many bring it to the KL limit again."""
REPLIES = 7
"""To each of the 60 held-out prompts."""

SETTINGS: dict[str, Any] = {"update_batches": BATCHES, "report_samples": 0}

Json = dict[str, Any]


def main() -> None:
    given = arguments()
    seeds = given.seed or range(SEEDS)
    if given.updates and len(seeds) == 1:
        go_on(*seeds, given.results, given.updates)
    elif given.updates:
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(seeds), fresh, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(go_on, seeds, repeat(given.results), repeat(given.updates)))
    rows = read(given.results)
    given.results.with_suffix(".svg").write_text(plot(rows), "utf-8")
    print(table(rows))
    asked = len(seeds) * (given.updates or UPDATES)
    made = sum(row["seed"] in seeds and row["update"] > 0 for row in rows)
    print(f"\n{made} of {asked} updates made")
    sys.exit("\n".join(faults(rows)) or int(made < asked))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", action="append", type=int, help=f"may be repeated (default: 0 to {SEEDS - 1})")
    parser.add_argument(
        "--updates", type=int, default=UPDATES, help="at most so many of each seed (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gold.jsonl")
    return parser.parse_args()


def read(path: Path) -> list[Json]:
    """All rows, each seed's in order."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return sorted(map(json.loads, lines), key=lambda row: (row["seed"], row["update"]))


def go_on(seed: int, results: Path, updates: int) -> None:
    """Make the updates of a seed that are missing, up to so many."""
    done = [row for row in read(results) if row["seed"] == seed]
    if len(done) > updates:
        return
    line = Line(Trainer(LearnerConfig(**SETTINGS)), results.with_suffix("") / f"seed-{seed}", seed)
    while len(done) <= updates:
        done.append(line.step(done))
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")  # in one piece: other seeds write here too
        print(json.dumps(done[-1]), file=sys.stderr, flush=True)


class Line:
    """A seed's updates in a row. Each begins from what those before it left in a folder."""

    def __init__(self, trainer: Trainer, folder: Path, seed: int) -> None:
        self.trainer, self.folder, self.seed = trainer, folder, seed
        self.people = crowd(TASTE, trial.RATERS, noise=NOISE, seed=seed)
        self.asked = groups()["fresh"] * REPLIES
        self.said: dict[int, list[Rollout]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def step(self, done: Sequence[Json]) -> Json:
        """The row of the next update after those that these rows are of; row 0 is of the base alone."""
        number, started = len(done), time.perf_counter()
        served = max((row["update"] for row in done if row["released"]), default=0)
        made: Json = {"released": False}
        if number:
            self.hear(number, served)
            made = self.learn(number, served)
        if made["released"]:
            served = number
        else:
            made["kl"] = done[-1]["kl"] if done else 0.0
        proxy = self.proxy(served) if served else 0.0
        row = {"seed": self.seed, "update": number, "served": served, **self.gold(served), "proxy": proxy, **made}
        return row | {"wall_s": time.perf_counter() - started}

    def hear(self, number: int, served: int) -> None:
        """New thumbs before an update, on fresh replies of the version that is served; people and prompts take turns."""
        turns = range((number - 1) * THUMBS, number * THUMBS)
        prompts = [groups()["taught"][turn % len(groups()["taught"])] for turn in turns]
        seed = random.Random(f"thumbs {self.seed} {number}").getrandbits(32)
        asked = [trial.encoded(self.trainer, prompt) for prompt in prompts]
        replies = self.trainer.sampler.sample(asked, self.weights(served), seed)
        thumbs = []
        for turn, (prompt, text), reply in zip(
            turns, trial.texts(self.trainer, prompts, replies), replies, strict=True
        ):
            person = self.people[turn % len(self.people)]
            thumb = {"user": person.user, "up": person.thumb(prompt, text), "version": served}
            thumbs.append(thumb | {"prompt_ids": reply.prompt_ids, "reply_ids": reply.reply_ids})
        self.thumbs_of(number).write_text(json.dumps(thumbs), "utf-8")

    def learn(self, number: int, served: int) -> Json:
        """One update from all thumbs so far. What passes the gate is kept; of the rest the row says why not."""
        rows = [row for update in range(1, number + 1) for row in json.loads(self.thumbs_of(update).read_text("utf-8"))]
        judgements = [judgement(place, row) for place, row in enumerate(rows)]
        prompts = list(dict.fromkeys(one.reply.prompt_ids for one in judgements))
        seed = 1000 * self.seed + number
        candidate = self.trainer.learn(judgements, prompts, parent=self.weights(served), seed=seed)
        if candidate.gate.passed:
            self.version(number).mkdir(exist_ok=True)
            save_peft(self.version(number), candidate.weights, "heed-tiny")
        return {
            "thumbs": len(rows),
            "released": candidate.gate.passed,
            "refused": [check.name for check in candidate.gate.checks if check.verdict == "fail"],
            "auroc": candidate.report["reward"]["auroc"],
            "stopped": candidate.report.get("policy", {}).get("stopped"),
            "kl": candidate.report.get("kl", {}).get("reference"),
        }

    def gold(self, version: int) -> Json:
        """What people really think of a version's replies."""
        replies = trial.texts(self.trainer, self.asked, self.answers(version))
        found = with_product(trial.quality(replies, taste(TASTE)), self.asked)
        shares = {"satisfied": found["satisfied"], "facts": found["facts"], "replies": found["replies"]}
        return {"gold": found["product"], "error": found["error"], **shares}

    def proxy(self, version: int) -> float:
        """What the reward model, as it is now, makes of a version's replies: standard deviations above the base's."""
        base_B, score_B = (self.trainer.reward.score(self.answers(one)) for one in (0, version))
        return float((score_B.mean() - base_B.mean()) / base_B.std())

    def answers(self, version: int) -> list[Rollout]:
        """A version's replies to the held-out prompts. The seeds are the same for every version of every seed."""
        if version not in self.said:
            asked = [trial.encoded(self.trainer, prompt) for prompt in self.asked]
            self.said[version] = self.trainer.sampler.sample(asked, self.weights(version), 0)
        return self.said[version]

    def weights(self, version: int) -> AdapterWeights | None:
        """A version that an update made; None for 0, the base."""
        if version == 0:
            return None
        folder = self.version(version)
        return read_peft(folder.name, *read_peft_folder(folder.name, folder), self.trainer.base)

    def version(self, number: int) -> Path:
        return self.folder / f"v{number}"

    def thumbs_of(self, number: int) -> Path:
        return self.folder / f"thumbs-{number}.json"


def judgement(place: int, row: Json) -> Judgement:
    """A thumb as the learner's state would hand it out."""
    sample = Sample(f"r{place}", tuple(row["prompt_ids"]), tuple(row["reply_ids"]), row["version"])
    return Judgement(f"f{place}", "thumb", row["user"], float(row["up"]), sample, None, float(place))


def faults(rows: Sequence[Json]) -> Iterator[str]:
    """A sentence for each time that gold was below its start, by however little; and where a whole seed brought nothing."""
    for seed, (base, *updates) in by_seed(rows).items():
        for row in updates:
            fall = base["gold"] - row["gold"]
            if fall > 0:
                deep = fall / math.hypot(base["error"], row["error"])
                yield (
                    f"seed {seed}, update {row['update']}: gold is {row['gold']:.3f}, below its start of {base['gold']:.3f} "
                    f"by {deep:.1f} standard errors (of two independent samples)"
                )
        if len(updates) >= UPDATES and updates[-1]["gold"] <= base["gold"]:
            yield f"seed {seed}: {len(updates)} updates brought nothing"


def table(rows: Sequence[Json]) -> str:
    """A line a seed, as Markdown. Gold with one standard error; proxy and gap in standard deviations of the base's replies."""
    lines = [
        "| seed | updates | released | gold: start → last | lowest | highest | satisfied | facts | KL | proxy | gap | widest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, (base, *updates) in by_seed(rows).items():
        last, golds = [base, *updates][-1], [row["gold"] for row in updates or [base]]
        parts = [
            *(str(seed), str(len(updates)), str(sum(row["released"] for row in updates))),
            f"{base['gold']:.3f} ± {base['error']:.3f} → **{last['gold']:.3f}** ± {last['error']:.3f}",
            *(f"{one:.3f}" for one in (min(golds), max(golds), last["satisfied"], last["facts"])),
            *(f"{one:.2f}" for one in (last["kl"], last["proxy"], gap(base, last))),
            f"{max(gap(base, row) for row in updates or [base]):.2f}",
        ]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
