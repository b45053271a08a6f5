"""Replies that people were served, as experience beside fresh ones.

Three policies: *behaviour* is what served the reply, *prox* the policy as a batch begins, *new* the one in training. The ratio
that is clipped is new to prox; each token counts min(π_prox ÷ π_behaviour, 2) times (the decoupled objective of 2110.00641, as
AReaL, 2505.24298, has it). Values, KL and advantages are worked out anew, as if the reply were fresh.

A reply may serve only while it is nearly one of the policy's own: sampled with nothing cut off, by a version not long past, and
as likely now as then. What a person said of it corrects the reward model's score of it (doubly robust, 1103.4601), by the
prediction of a member that never saw it. Axes: T tokens of a reply.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from feedback.events import Exchange
from learner.judgement import Key, key_of
from learner.material import live
from learner.rollouts import Rollout
from learner.state import State

STALEST = 4
"""Versions that a reply's own may be behind the newest."""
LARGEST_WEIGHT = 2.0
"""Of one token."""
FAREST = 1.2
"""A reply whose tokens are, in geometric mean, so many times more or less likely now than when it was served is not used."""


@dataclass(frozen=True, slots=True)
class LiveReply:
    """One reply as it was served."""

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    ended: bool
    """False when it was cut at a limit."""
    logprobs: tuple[float, ...]
    """log p of each token under the distribution it was drawn from: the behaviour policy's."""
    behind: int
    """How many versions its own is behind the one that is served now."""
    full_support: bool
    """Whether every token could have been drawn; else its log-probs are of another distribution than the policy's."""


def served(state: State, most: int, current: int) -> list[LiveReply]:
    """The newest replies of this policy and base that people were served. `current`: the version that is served now."""
    rows = state.db.execute(
        f"SELECT event FROM exchanges e WHERE policy = :policy AND base = :base AND {live('e')}"
        " ORDER BY at DESC, reply_id DESC LIMIT :most",
        {**state.line, "most": most},
    )
    return [_live(Exchange.model_validate_json(event), current) for (event,) in rows]


def _live(exchange: Exchange, current: int) -> LiveReply:
    content, sampling = exchange.content, exchange.sampling
    return LiveReply(
        content.prompt_ids,
        content.reply_ids,
        exchange.finish_reason == "stop",
        content.logprobs,
        current - exchange.version,
        sampling.full_support and not sampling.stop,  # a reply that a stop text cut was not ended by the policy
    )


@dataclass(slots=True)
class Live:
    """The live replies of one update, each used once at most."""

    queue: Iterator[LiveReply]
    correction: Mapping[Key, float] = field(default_factory=dict)
    """What people said of a reply (1 a thumb up, 0 one down) less what was foretold, ÷ the share of replies that are rated."""
    used: list[int] = field(default_factory=list)
    """How many versions behind each reply was that served."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Replies that did not serve, by reason."""
    weights: list[float] = field(default_factory=list)
    """Mean weight of each used reply's tokens."""

    @classmethod
    def of(
        cls,
        replies: Sequence[LiveReply],
        surprise: Mapping[Key, float],
        room: int,
        max_len: int,
        eos_ids: Collection[int],
        seed: int,
    ) -> Live:
        """`surprise`: of each rated reply what was said less what was foretold; `room`: tokens that a fresh reply may have;
        `max_len`: and those of it and its prompt."""
        rejected: Counter[str] = Counter()
        usable = []
        for one in replies:
            why = _unusable(one, room, max_len, eos_ids)
            if why is None:
                usable.append(one)
            else:
                rejected[why] += 1
        rated = sum(key_of(one) in surprise for one in usable) / max(len(usable), 1)
        order = random.Random(seed).sample(usable, len(usable))
        return cls(iter(order), {key: gap / rated for key, gap in surprise.items() if rated}, rejected=rejected)

    def draw(self, count: int, prox: Callable[[Sequence[LiveReply]], Sequence[Sequence[float]]]) -> list[Rollout]:
        """At most `count` replies that are near the policy; `prox` gives the log-probs of their tokens under it, [T] each."""
        taken = list(itertools.islice(self.queue, count))
        drawn = []
        for one, now_T in zip(taken, prox(taken) if taken else [], strict=True):
            ratio_T = [now - then for now, then in zip(now_T, one.logprobs, strict=True)]
            if abs(fmean(ratio_T)) > math.log(FAREST):
                self.rejected["ratio"] += 1
                continue
            self.used.append(one.behind)
            self.weights.append(fmean(min(math.exp(ratio), LARGEST_WEIGHT) for ratio in ratio_T))
            drawn.append(Rollout(one.prompt_ids, one.reply_ids, one.ended, one.logprobs))
        return drawn

    def said(self, rollout: Rollout) -> float:
        """What to add to the score of a reply; 0 where nobody rated it."""
        return self.correction.get(key_of(rollout), 0.0)

    def report(self, replies: int) -> dict[str, object]:
        """Counts for the report of an update with so many `replies`, fresh and served. `effective`: how many of equal weight
        the used ones are worth (Kish)."""
        total, squares = sum(self.weights), sum(weight**2 for weight in self.weights)
        return {
            "used": len(self.used),
            "share": len(self.used) / replies,
            "effective": total**2 / squares if squares else 0.0,
            "staleness": fmean(self.used) if self.used else 0.0,
            "rejected": dict(self.rejected),
        }


def _unusable(one: LiveReply, room: int, max_len: int, eos_ids: Collection[int]) -> str | None:
    if not one.full_support or len(one.logprobs) != len(one.reply_ids):
        return "support"
    if not 0 <= one.behind <= STALEST:
        return "stale"
    if not 0 < len(one.reply_ids) <= room or len(one.prompt_ids) + len(one.reply_ids) > max_len:
        return "length"
    # cut by whoever asked or left, or made to go on: a fresh reply ends where the policy ends it, or at the limit
    whole = one.ended or len(one.reply_ids) == room
    return None if whole and not any(token in eos_ids for token in one.reply_ids[:-1]) else "cut"
