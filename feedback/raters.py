"""Simulated people: each likes replies of one manner, or of several at once, and says so in people's imperfect ways.

What a rater says depends on the rater, the prompt and the reply alone, never on the order in which they are asked, so a
run with many of them at once is repeatable.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from feedback.manners import manners, rewrite


@dataclass(frozen=True, slots=True)
class Taste:
    """What somebody likes: replies that show some manners and lack others, whatever was asked."""

    name: str
    wants: Mapping[str, bool] = field(hash=False)
    """Manner → whether it is to be there."""

    def __call__(self, prompt: str, reply: str) -> bool:
        """Whether the reply is all that is wanted."""
        return self.degree(prompt, reply) == 1.0

    def degree(self, prompt: str, reply: str) -> float:  # noqa: ARG002 (a taste may come to look at the prompt)
        """Share of what is wanted that the reply has, from 0 to 1."""
        shown = manners(reply)
        return sum(shown[manner] == there for manner, there in self.wants.items()) / len(self.wants)


_SINGLE: Mapping[str, tuple[str, bool]] = {
    "short": ("short", True),
    "long": ("short", False),
    "formal": ("formal", True),
    "casual": ("formal", False),
    "question": ("question", True),
    "no-question": ("question", False),
    "exclaiming": ("exclaim", True),
    "calm": ("exclaim", False),
    "emoji": ("emoji", True),
    "plain": ("emoji", False),
    "bulleted": ("bullets", True),
    "prose": ("bullets", False),
    "personal": ("first_person", True),
    "impersonal": ("first_person", False),
}

TASTES: Mapping[str, Taste] = {name: Taste(name, {manner: there}) for name, (manner, there) in _SINGLE.items()}
"""The single tastes; `taste` knows their conjunctions too."""


def taste(name: str) -> Taste:
    """The taste of this name: one of TASTES, or several joined by "+", such as "emoji+short".

    Raises ValueError for a name that is not known, naming those that are, and for two that no reply can satisfy.
    """
    wants: dict[str, bool] = {}
    for part in name.split("+"):
        if part not in _SINGLE:
            raise ValueError(f"nobody has the taste {part!r}: known are {', '.join(_SINGLE)}, or several joined by +")
        manner, there = _SINGLE[part]
        if wants.setdefault(manner, there) != there:
            raise ValueError(f"no reply satisfies the taste {name!r}: it wants both sides of one manner")
    return Taste(name, wants)


@dataclass(frozen=True, slots=True)
class Rater:
    """One simulated person."""

    user: str
    taste: Taste
    noise: float = 0.0
    """Chance that a judgement is the wrong way round, from 0 to 1."""
    bias: float = 0.0
    """Added to the log-odds of liking: below 0 a harsh rater, above 0 a generous one."""
    sparsity: float = 0.0
    """Share of replies of which they say nothing, from 0 to 1."""
    seed: int = 0

    def thumb(self, prompt: str, reply: str) -> bool | None:
        """Up (True), down (False), or nothing."""
        if not self._speaks(prompt, reply):
            return None
        return self._likes(prompt, reply)

    def stars(self, prompt: str, reply: str) -> int | None:
        """1 to 5 stars, or nothing. At least 4 exactly where the thumb is up; fewer the more is missing."""
        if not self._speaks(prompt, reply):
            return None
        generous = self._dice("stars", prompt, reply).random() < _logistic(self.bias)
        if self._likes(prompt, reply):
            return 4 + generous
        partly = self.taste.degree(prompt, reply) > 0
        return 1 + generous + partly

    def prefer(self, prompt: str, a: str, b: str) -> int | None:
        """0 for `a`, 1 for `b`, or nothing: also where both have as much of what is wanted."""
        difference = self.taste.degree(prompt, b) - self.taste.degree(prompt, a)
        if difference == 0 or not self._speaks(prompt, a, b):
            return None
        wrong = self._dice("prefer", prompt, a, b).random() < self.noise
        return int((difference > 0) != wrong)

    def correct(self, prompt: str, reply: str) -> str | None:
        """The reply as it should have been; nothing where it is as wanted, or cannot be made so by simple edits."""
        if self.taste(prompt, reply) or not self._speaks(prompt, reply):
            return None
        return rewrite(reply, self.taste.wants)

    def _likes(self, prompt: str, reply: str) -> bool:
        chance = 1 - self.noise if self.taste(prompt, reply) else self.noise
        if 0 < chance < 1:  # who is never wrong is not made wrong by being harsh
            chance = _logistic(math.log(chance / (1 - chance)) + self.bias)
        return self._dice("likes", prompt, reply).random() < chance

    def _speaks(self, prompt: str, *replies: str) -> bool:
        return self._dice("speaks", prompt, *replies).random() >= self.sparsity

    def _dice(self, *about: str) -> random.Random:
        return random.Random(repr((self.seed, self.user, *about)))


def crowd(
    what: Taste | str, count: int, *, noise: float = 0.1, bias: float = 0.0, sparsity: float = 0.0, seed: int = 0
) -> list[Rater]:
    """`count` people of one taste; each one's bias is drawn from a normal distribution with standard deviation `bias`.

    The same seed gives the same people. Raises ValueError for a taste that is not known.
    """
    shared = taste(what) if isinstance(what, str) else what
    draw = random.Random(seed)
    return [
        Rater(f"rater-{number:03d}", shared, noise, draw.gauss(0.0, bias), sparsity, draw.getrandbits(32))
        for number in range(1, count + 1)
    ]


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))
