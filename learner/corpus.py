"""The dialogues that the built-in base model learns from, and the grammar that judges its replies.

A reply is composed, never listed: an opener or a lead-in, a core sentence that answers, further sentences if it is
long, a closing question, an emoji. Each manner (short, formal, closing question, ...) is drawn by its own coin before
anything else, and the parts are then drawn until the reply shows exactly that manner. So every manner varies within
every intent, independent of the prompt and of the others: the base knows what to say and is undecided how, as a real
base is.

The words live in `intents/*.toml`. A sentence there is neutral: a casual reply contracts it ("it is" becomes "it's"), a
formal one leaves it; an exclamation is a full stop replaced. The same tables read backwards are the grammar (`judge`).
"""

from __future__ import annotations

import itertools
import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from feedback.manners import manners
from learner.grammar import Row
from learner.intent import Intent
from learner.manner import MANNERS, RATES, lines

__all__ = ["MANNERS", "RATES", "Chat", "Judgement", "dialogues", "heldout_prompts", "intents", "judge", "manners"]

INTENTS = Path(__file__).with_name("intents")

Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the grammar says of one reply. `intent` is the prompt's, None if no intent asks that."""

    intent: str | None
    well_formed: bool
    fact_right: bool | None
    manners: dict[str, bool]


@lru_cache(maxsize=1)
def _manner() -> Mapping[str, Mapping[str, str]]:
    found: Mapping[str, Mapping[str, str]] = tomllib.loads((INTENTS / "manner.toml").read_text("utf-8"))
    return found


@lru_cache(maxsize=1)
def intents() -> Mapping[str, Intent]:
    """Every intent by its name, read from `intents/*.toml` at the first call."""
    found: dict[str, Intent] = {}
    for path in sorted(INTENTS.glob("*.toml")):
        if path.name != "manner.toml":
            for name, table in tomllib.loads(path.read_text("utf-8")).items():
                if name in found:
                    raise ValueError(f"{path}: intent {name} is defined twice")
                found[name] = Intent(name, table, _manner())
    return found


def dialogues(seed: int, count: int) -> Iterator[Chat]:
    """`count` conversations as chat messages, the same ones for the same seed, none with a held-out user message.

    Most have one exchange; some go on with a follow-up, some with further exchanges, some begin with a system message.
    """
    rng = random.Random(seed)
    known = list(intents().values())
    weights = list(itertools.accumulate(intent.weight for intent in known))
    system = lines(_manner()["wrap"]["system"])
    for _ in range(count):
        chat: Chat = [{"role": "system", "content": rng.choice(system)}] if rng.random() < 0.1 else []
        turns = 1 if rng.random() < 0.85 else rng.choice((2, 2, 2, 3, 4, 6))
        while turns > 0:
            intent = rng.choices(known, cum_weights=weights)[0]
            row = rng.choice(intent.rows)
            chat += _exchange(rng, intent, row, follow=False)
            turns -= 1
            if intent.follows and rng.random() < 0.2:
                other = rng.choice(intent.rows)
                chat += _exchange(rng, intent, other, follow=True)
                turns -= 1
        yield chat


def _exchange(rng: random.Random, intent: Intent, row: Row, *, follow: bool) -> Chat:
    prompt = intent.prompt(rng, row, follow=follow)
    while intent.held_out(prompt):
        row = rng.choice(intent.rows)
        prompt = intent.prompt(rng, row, follow=follow)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": intent.reply(rng, row)}]


def heldout_prompts(count: int = 200, seed: int = 0) -> list[str]:
    """User messages of every intent in turn that no training text holds, not even inside a longer message."""
    rng = random.Random(seed)
    chosen: dict[str, None] = {}
    order = list(intents().values())
    while len(chosen) < count:
        rng.shuffle(order)
        for intent in order[: count - len(chosen)]:
            draws = (intent.unseen_prompt(rng) for _ in range(2000))
            found = next((prompt for prompt in draws if prompt is not None and prompt not in chosen), None)
            if found is not None:
                chosen[found] = None
    prompts = list(chosen)
    rng.shuffle(prompts)
    return prompts


@lru_cache(maxsize=4096)
def _read(prompt: str) -> tuple[str, Row] | None:
    for intent in intents().values():
        if (slots := intent.unwrapped(prompt)) is not None:
            return intent.name, intent.truth(slots)
    return None


def judge(prompt: str, reply: str) -> Judgement:
    """Judge one reply to one user message (of a conversation: to its last).

    `well_formed`: the grammar of the message's intent accepts the reply (of any intent, where the message is unknown).
    `fact_right`: whether the reply tells what the message settles; None where there is nothing to be right about.
    """
    known = _read(prompt)
    if known is None:
        told = any(intent.parse(reply) is not None for intent in intents().values())
        return Judgement(None, told, None, manners(reply))
    name, truth = known
    slots = intents()[name].parse(reply)
    right = None
    if truth and slots is not None:
        right = all(slots[column] == value for column, value in truth.items() if column in slots)
    elif truth:
        right = all(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply) is not None for value in truth.values())
    return Judgement(name, slots is not None, right, manners(reply))
