"""How well and how fast Heed learns from 300 thumbs: the real `heed up`, over HTTP, taste by taste.

Each cell (taste, noise, seed) starts `heed up` on a fresh data folder. 24 raters give 300 thumbs, some of them wrong,
on replies to the first half of the built-in model's prompts; within two minutes of the last thumb, the version then
served answers the other half ten times each. A finished cell is a line of results/learn.jsonl and is not run again.

    python -m benchmarks.learn_live                                        every cell that is missing, then the table
    python -m benchmarks.learn_live --taste emoji --seed 0 --noise 0.1     one cell
    python -m benchmarks.learn_live --table                                the table alone
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy.client import Client, Reply
from deploy.local import answers as is_there
from feedback.raters import crowd, taste
from learner.trial import quality as shares
from serving.model import find_model

HERE = Path(__file__).resolve().parent
TASTES = ("emoji", "bulleted", "short+prose", "personal+casual")
"""Two single ones and two conjunctions, among those that 20–45% of the base's replies satisfy."""
PLAN = [(name, noise, seed) for noise, seed in ((0.1, 0), (0.25, 0), (0.1, 1), (0.1, 2)) for name in TASTES]

THUMBS, RATERS, FRESH, AT_ONCE = 300, 24, 10, 8
MIN_FEEDBACK = 100
LIMIT_S = 120.0
"""Seconds after the last thumb at which the version then served is judged, whatever the learner does."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured in one run."""

    taste: str
    noise: float
    seed: int

    @property
    def key(self) -> tuple[str, float, int]:
        return self.taste, self.noise, self.seed


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `heed up` is stopped on the way out
    done = {(row["taste"], row["noise"], row["seed"]): row for row in read(given.results)}
    of_base: dict[int, list[Reply]] = {}
    for cell in cells(given):
        if cell.key in done or given.table:
            continue
        print(f"{cell.taste}, {cell.noise:.0%} wrong, seed {cell.seed} ...", file=sys.stderr, flush=True)
        row = measure(cell, given, of_base)
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"    {line_of(row)}", file=sys.stderr, flush=True)
    print(table(read(given.results)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--taste", action="append", help="a taste of feedback/raters.py; may be repeated")
    parser.add_argument("--noise", action="append", type=float, help="share of thumbs that is wrong; may be repeated")
    parser.add_argument("--seed", action="append", type=int, help="may be repeated")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "learn.jsonl")
    parser.add_argument("--model", help="another base model, with its prompts.json (default: the built-in one)")
    parser.add_argument("--log", type=Path, help="where the lines of `heed up` go (default: nowhere)")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    return parser.parse_args()


def cells(given: argparse.Namespace) -> list[Cell]:
    """The whole plan, or the product of what was named."""
    if not (given.taste or given.noise or given.seed):
        return [Cell(*parts) for parts in PLAN]
    product = itertools.product(given.taste or TASTES, given.noise or [0.1], given.seed or [0])
    return [Cell(*parts) for parts in product]


def read(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def measure(cell: Cell, given: argparse.Namespace, of_base: dict[int, list[Reply]]) -> Json:
    """One run, from an empty data folder to a row of the table. `of_base`: the base's replies by seed, kept between runs."""
    started = time.monotonic()
    base = find_model(given.model)
    prompts = json.loads((base / "prompts.json").read_text("utf-8"))
    half = len(prompts) // 2
    with tempfile.TemporaryDirectory(prefix="heed-learn-") as data:
        with heed_up(Path(data), given.model, given.log) as url:
            row = asyncio.run(teach_and_judge(url, cell, prompts[:half], prompts[half:], of_base))
        adapters = Path(data) / "adapters" / "default"
        pairs = row.pop("ids")
        row["kl_mean"] = kl_mean(base, adapters / f"v{row['version']:06d}", pairs) if row["version"] else 0.0
    return {"taste": cell.taste, "noise": cell.noise, "seed": cell.seed, **row, "wall_s": time.monotonic() - started}


@contextmanager
def heed_up(data: Path, model: str | None, log: Path | None) -> Iterator[str]:
    """The whole loop on free ports, with default settings but one; stopped when done."""
    port, metrics = free_ports(2)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HEED_")} | {
        "HEED_DATA": str(data),
        "HEED_PORT": str(port),
        "HEED_LEARNER_METRICS_PORT": str(metrics),
        "HEED_UPDATE_MIN_FEEDBACK": str(MIN_FEEDBACK),
    }
    if model:
        environ["HEED_MODEL"] = model
    with (log or Path(os.devnull)).open("a") as lines:
        command = [sys.executable, "-m", "deploy.cli", "up"]
        running = subprocess.Popen(command, cwd=HERE.parent, env=environ, stdout=lines, stderr=lines)
        try:
            while not is_there("127.0.0.1", port, "/ready"):
                if running.poll() is not None:
                    raise SystemExit("`heed up` did not start; --log FILE keeps what it said")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(60)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


async def teach_and_judge(
    url: str, cell: Cell, seen: list[str], unseen: list[str], of_base: dict[int, list[Reply]]
) -> Json:
    """300 thumbs, a wait, and what the raters would think now, beside what they would have thought of the base."""
    async with Client(url) as client:
        began = time.time()
        last = await give_thumbs(client, cell, seen)
        version = await settled(client, last)
        waited = time.time() - last
        policy = await client.policy()
        after = await answers(client, unseen, f"default@v{version}", cell.seed)
        if cell.seed not in of_base:  # same seed, version and prompt: the same reply in every run
            of_base[cell.seed] = await answers(client, unseen, "default@v0", cell.seed)
        ids = [await ids_of(client, reply) for reply in after]
    return {
        "version": version,
        "updates": (policy.get("last_update") or {}).get("number"),
        "why": policy.get("why"),
        "before": quality(of_base[cell.seed], cell.taste),
        "after": quality(after, cell.taste),
        "freshness": policy.get("freshness"),
        "thumbs_s": last - began,
        "waited_s": waited,
        "ids": ids,
    }


async def give_thumbs(client: Client, cell: Cell, prompts: Sequence[str]) -> float:
    """All thumbs, some people at a time; returns when the last one was accepted, in epoch seconds."""
    people = crowd(cell.taste, RATERS, noise=cell.noise, seed=cell.seed)
    turns = iter(range(THUMBS))

    async def talk() -> None:
        for turn in turns:
            rater = people[turn % RATERS]
            [reply] = await client.ask(prompts[turn % len(prompts)], user=rater.user, temperature=1)
            up = rater.thumb(reply.prompt, reply.text)
            thumb = {"kind": "thumb", "reply_id": reply.id, "value": "up" if up else "down", "user": rater.user}
            await client.rate(thumb)

    await asyncio.gather(*(talk() for _ in range(AT_ONCE)))
    return time.time()


async def settled(client: Client, last: float) -> int:
    """The version served once the learner has nothing more to do, or two minutes after the last thumb."""
    while time.time() < last + LIMIT_S:
        policy = await client.policy()
        counts, update = policy.get("feedback") or {}, policy.get("last_update") or {}
        heard = sum((counts.get("by_status") or {}).values()) >= THUMBS
        if heard and counts.get("new", THUMBS) < MIN_FEEDBACK and update.get("finished"):
            break
        await asyncio.sleep(0.5)
    return number((await client.policy())["current"])


def number(version: str | None) -> int:
    return int((version or "v0").removeprefix("v"))


async def answers(client: Client, prompts: list[str], model: str, seed: int) -> list[Reply]:
    """Fresh replies of one version, at T=1, each with a seed of its own: one that prompts share would be one draw for all."""
    replies: list[Reply] = []
    asked = enumerate(prompts * FRESH, start=seed * FRESH * len(prompts))

    async def talk() -> None:
        for own, prompt in asked:
            replies.extend(await client.ask(prompt, model=model, temperature=1, seed=own, user="judge"))

    await asyncio.gather(*(talk() for _ in range(4 * AT_ONCE)))
    return replies


async def ids_of(client: Client, reply: Reply) -> tuple[list[int], list[int]]:
    """Prompt and reply ids of a reply, exactly as they were."""
    content = (await client.get(f"/v1/replies/{reply.id}"))["content"]
    return content["prompt_ids"], content["reply_ids"]


def quality(replies: Sequence[Reply], name: str) -> Json:
    """Shares satisfied, right in fact (where there is a fact), both, and well-formed; and mean reply tokens."""
    said = [(reply.prompt, reply.text) for reply in replies]
    return {**shares(said, taste(name)), "tokens": statistics.fmean(reply.tokens or 0 for reply in replies)}


@torch.inference_mode()
def kl_mean(base: Path, adapter: Path, pairs: Sequence[tuple[list[int], list[int]]], batch: int = 50) -> float:
    """KL(version ‖ base) over the full vocabulary, summed over a reply; the mean, in nats. By plain PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    total = 0.0
    for start in range(0, len(pairs), batch):
        ids_BT, mask_BT, reply_BT = padded(pairs[start : start + batch])
        new_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits.log_softmax(-1)
        with model.disable_adapter():
            old_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits.log_softmax(-1)
        kl_BT = (new_BTV.exp() * (new_BTV - old_BTV)).sum(-1)
        total += torch.where(reply_BT, kl_BT, 0.0).sum().item()
    return total / len(pairs)


def padded(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and attention mask, padded on the right, and where a reply's token is predicted: one place before it."""
    length = max(len(prompt) + len(reply) for prompt, reply in pairs)
    ids_BT = torch.zeros(len(pairs), length, dtype=torch.long)
    mask_BT, reply_BT = torch.zeros_like(ids_BT), torch.zeros(len(pairs), length, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(pairs):
        end = len(prompt) + len(reply)
        ids_BT[row, :end] = torch.tensor([*prompt, *reply])
        mask_BT[row, :end] = 1
        reply_BT[row, len(prompt) - 1 : end - 1] = True
    return ids_BT, mask_BT, reply_BT


def table(rows: Sequence[Json]) -> str:
    """All columns as Markdown: a line a cell, then the means that are asked for."""
    head = (
        "| taste | wrong | seed | satisfied: base → learned | facts right | well-formed | right and satisfied "
        "| reply tokens | KL to base | versions | freshness p50 / p95 | last thumb → judged | all |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    lines += [
        line_of(row)
        for row in sorted(rows, key=lambda row: ("+" in row["taste"], row["noise"], row["taste"], row["seed"]))
    ]
    return "\n".join([*lines, "", *means(rows)])


def line_of(row: Json) -> str:
    before, after, fresh = row["before"], row["after"], row["freshness"] or {}
    cells = [
        row["taste"],
        f"{row['noise']:.0%}",
        str(row["seed"]),
        f"{before['satisfied']:.2f} → **{after['satisfied']:.2f}**",
        *(f"{show(before[name])} → {show(after[name])}" for name in ("facts", "well_formed", "both")),
        f"{before['tokens']:.0f} → {after['tokens']:.0f}",
        f"{row['kl_mean']:.2f}",
        str(row["version"]),
        f"{seconds(fresh.get('p50'))} / {seconds(fresh.get('p95'))}",
        seconds(row["waited_s"]),
        seconds(row["wall_s"]),
    ]
    return "| " + " | ".join(cells) + " |"


def means(rows: Sequence[Json]) -> Iterator[str]:
    """Mean share satisfied of single tastes and conjunctions, by noise."""
    groups = sorted({("+" in row["taste"], row["noise"]) for row in rows})
    for conjunction, noise in groups:
        chosen = [row for row in rows if ("+" in row["taste"], row["noise"]) == (conjunction, noise)]
        after = statistics.fmean(row["after"]["satisfied"] for row in chosen)
        kind = "conjunctions" if conjunction else "single tastes"
        yield f"- {kind}, {noise:.0%} wrong: mean satisfied {after:.3f} over {len(chosen)} runs"


def show(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} s"


if __name__ == "__main__":
    main()
