"""`heed simulate`: people with a hidden taste chat over HTTP and rate what they get; watch what they think change."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.client import Client, Refused, Reply
from feedback.raters import Rater, crowd

PROMPTS = Path(__file__).resolve().parent.parent / "serving" / "tiny" / "prompts.json"
KINDS = ("thumb", "rating", "preference", "correction")

REST_S = 10.0
"""Longer than a learner that has enough to learn from takes to begin."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """Who says what to whom, how often, and how they rate it."""

    url: str
    key: str | None = field(default=None, repr=False)
    """The API key, where the server wants one."""
    taste: str = "emoji"
    noise: float = 0.1
    bias: float = 0.0
    """Spread of the raters' harshness, in log-odds."""
    sparsity: float = 0.0
    """Share of replies of which they say nothing."""
    exchanges: int = 500
    raters: int = 24
    kinds: str = "thumb"
    prompts: Path | None = None
    at_once: int = 8
    wait_s: float = 120.0
    """How long to wait for a version newer than all seen, before what they think of it is asked."""
    seed: int = 0


@dataclass(slots=True)
class Opinion:
    """What the raters really think of a version's replies, whatever they said of them."""

    replies: int = 0
    liked: int = 0

    @property
    def share(self) -> float:
        return self.liked / self.replies if self.replies else 0.0


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    exchanges: int = 0
    feedback: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    opinions: dict[int, Opinion] = field(default_factory=lambda: defaultdict(Opinion))
    phase: str = "talking and rating"

    def count(self, rater: Rater, replies: Sequence[Reply]) -> None:
        self.exchanges += 1
        for reply in replies:
            opinion = self.opinions[reply.version]
            opinion.replies += 1
            opinion.liked += rater.taste(reply.prompt, reply.text)

    def summary(self, plan: Plan) -> Json:
        """For programs; `before` and `after` are the oldest and the newest version that spoke."""
        versions = [
            {"version": f"v{version}", "replies": opinion.replies, "liked": round(opinion.share, 4)}
            for version, opinion in sorted(self.opinions.items())
        ]
        return {
            "taste": plan.taste,
            "exchanges": self.exchanges,
            "feedback": dict(self.feedback),
            "before": versions[0] if versions else None,
            "after": versions[-1] if versions else None,
            "versions": versions,
        }


def run(plan: Plan, console: Console, as_json: bool) -> None:
    """Simulates, with a live table on `console`; prints the summary. Raises Refused where no server answers."""
    people, prompts, kinds = cast_of(plan), prompts_of(plan), kinds_of(plan)
    tally = Tally()
    with Live(console=console, refresh_per_second=4, get_renderable=lambda: picture(tally, plan)):
        asyncio.run(simulate(plan, people, prompts, kinds, tally))
    if not console.is_terminal:
        console.print()  # which the last picture lacks there
    if as_json:
        print(json.dumps(tally.summary(plan)))
    else:
        console.print(verdict(tally, plan))


def cast_of(plan: Plan) -> list[Rater]:
    """The raters. Raises Refused for a taste nobody has, naming those known."""
    try:
        people = {"noise": plan.noise, "bias": plan.bias, "sparsity": plan.sparsity}
        return crowd(plan.taste, plan.raters, **people, seed=plan.seed)
    except ValueError as error:
        raise Refused(str(error)) from error


def prompts_of(plan: Plan) -> list[str]:
    path = plan.prompts or PROMPTS
    try:
        prompts: list[str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused(f"{path} must be a JSON array of strings, each one what a person says.")
    return prompts


def kinds_of(plan: Plan) -> list[str]:
    kinds = [kind.strip() for kind in plan.kinds.split(",") if kind.strip()]
    if not kinds or set(kinds) - set(KINDS):
        raise Refused(f"--kinds {plan.kinds}: must be one or more of {', '.join(KINDS)}, separated by commas.")
    return kinds


async def simulate(
    plan: Plan, people: Sequence[Rater], prompts: Sequence[str], kinds: Sequence[str], tally: Tally
) -> None:
    """All exchanges, then a wait for a newer version, then the same people are asked what they think of that one."""
    async with Client(plan.url, key=plan.key) as client:
        await client.policy()  # fails at once where nobody answers
        turns = iter(schedule(plan, people, prompts, kinds, plan.exchanges))
        await in_parallel(plan.at_once, lambda: exchange_all(client, turns, tally))
        newest = max(tally.opinions, default=0)
        tally.phase = "waiting for a newer version"
        if plan.wait_s and await newer_version(client, newest, plan.wait_s):
            tally.phase = "asking what they think of it"
            turns = iter(schedule(plan, people, prompts, [""], min(100, plan.exchanges)))
            await in_parallel(plan.at_once, lambda: exchange_all(client, turns, tally))
        tally.phase = "done"


Turn = tuple[Rater, str, str]
"""Who, what they say, and how they rate the reply ("": not at all)."""


def schedule(
    plan: Plan, people: Sequence[Rater], prompts: Sequence[str], kinds: Sequence[str], count: int
) -> Iterator[Turn]:
    """Everyone in turn; the prompts shuffled, each once before any comes again; the kinds in turn."""
    order = random.Random(plan.seed)
    deck: list[str] = []
    for i in range(count):
        deck = deck or order.sample(list(prompts), len(prompts))
        yield people[i % len(people)], deck.pop(), kinds[i % len(kinds)]


async def in_parallel(count: int, work: Callable[[], Any]) -> None:
    """`count` workers; the first failure ends the others and rises."""
    workers = [asyncio.ensure_future(work()) for _ in range(count)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()


async def exchange_all(client: Client, turns: Iterator[Turn], tally: Tally) -> None:
    """Takes turns until there are none: asks, lets the rater judge, and sends what they say."""
    for rater, prompt, kind in turns:
        replies = await client.ask(prompt, user=rater.user, n=2 if kind == "preference" else 1)
        tally.count(rater, replies)
        if feedback := opinion_of(rater, kind, replies):
            await client.rate({**feedback, "user": rater.user})
            tally.feedback[kind] += 1


def opinion_of(rater: Rater, kind: str, replies: Sequence[Reply]) -> Json | None:
    """What a rater says of the replies, as the body of a feedback; None where they say nothing."""
    reply = replies[0]
    if kind == "thumb" and (thumb := rater.thumb(reply.prompt, reply.text)) is not None:
        return {"kind": "thumb", "reply_id": reply.id, "value": "up" if thumb else "down"}
    if kind == "rating" and (stars := rater.stars(reply.prompt, reply.text)) is not None:
        return {"kind": "rating", "reply_id": reply.id, "value": stars}
    if kind == "correction" and (text := rater.correct(reply.prompt, reply.text)) is not None:
        return {"kind": "correction", "reply_id": reply.id, "text": text}
    if kind == "preference" and (chosen := rater.prefer(reply.prompt, reply.text, replies[1].text)) is not None:
        return {"kind": "preference", "chosen": replies[chosen].id, "rejected": replies[1 - chosen].id}
    return None


async def newer_version(client: Client, than: int, wait_s: float) -> bool:
    """Waits until a version newer than `than` is served; False when that takes longer than `wait_s`, or when for
    `REST_S` the learner has not been at an update that could bring one."""
    started = at_work = time.monotonic()
    while time.monotonic() < min(started + wait_s, at_work + REST_S):
        policy = await client.policy()
        if int((policy["current"] or "v0").removeprefix("v")) > than:
            return True
        update = policy.get("last_update")
        if update and update.get("finished") is None:
            at_work = time.monotonic()
        await asyncio.sleep(0.5)
    return False


def picture(tally: Tally, plan: Plan) -> Group:
    """The live table: share of replies they like, version by version."""
    table = Table("version", "replies", "liked", "", title=f"{plan.raters} people who like: {plan.taste}")
    for version, opinion in sorted(tally.opinions.items()):
        table.add_row(
            f"v{version}" + (" (base)" if version == 0 else ""),
            str(opinion.replies),
            f"{opinion.share:.0%}",
            Bar(1.0, 0.0, opinion.share, width=30, color="green"),
        )
    said = ", ".join(f"{count} {kind}s" for kind, count in tally.feedback.items()) or "no feedback"
    return Group(table, Text(f"{tally.phase}: {tally.exchanges} exchanges, {said}", "dim"))


def verdict(tally: Tally, plan: Plan) -> str:
    """Before and after, in a sentence."""
    summary = tally.summary(plan)
    before, after = summary["before"], summary["after"]
    if before is None:
        return "Nobody said anything."
    if before is after or before == after:
        return (
            f"They like {before['liked']:.0%} of what {before['version']} says. No newer version spoke; "
            f"`why` in GET /v1/policy says what the learner waits for."
        )
    return (
        f"They liked {before['liked']:.0%} of what {before['version']} said, "
        f"and like {after['liked']:.0%} of what {after['version']} says."
    )
