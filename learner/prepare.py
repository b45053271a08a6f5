"""From what people said to what the reward model learns from: in one shape, said once, and not taken back in the next breath.

What another base replied is encoded anew, so that ratings outlive the base.

Nothing is made up on the way but one thing: who copies one reply says nothing of the others, so that of each signal the judged
replies that did not get it stand against those that did.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from learner.judgement import DISLIKED, LIKED, Key, key_of

if TYPE_CHECKING:
    from learner.judgement import Judgement, Sample, Words

WHOLE_EDIT = 8
"""Tokens changed from which on a correction counts in full."""
NOBODYS = ""
"""Id of what nobody said: that a reply did not get a signal."""
REPLIES = 4096
"""Distinct replies that an update learns from, at most: a fit takes two minutes of a core for so many, and four times as long
for twice as many (benchmarks/LOG.md)."""

Claim = tuple[Hashable, int]
"""Something that can be said or denied of a reply or of two, and which of the two was done (1 or −1)."""

Encode = Callable[["Words"], Key]
"""Prompt and reply as token ids of the base that learns. Raises Unusable."""


class Unusable(ValueError):
    """The base that learns cannot take a reply: its template refuses the messages, or they are too long."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the reward model learns from, and what was left out."""

    judgements: list[Judgement]
    left_out: Mapping[str, str]
    """Id of the feedback → why. `empty`: it says nothing. `unusable`: a correction, or another base's reply, that the model
    cannot take. `same`: the replies that it compares are the same. `aspect`: of an aspect that weighs nothing.
    `duplicate`: the same person said it of the same reply before. `contradictory`: and the opposite too.
    `surplus`: newer judgements are of as many replies as a fit takes."""

    @property
    def dropped(self) -> dict[str, int]:
        """How many were left out for which reason."""
        return dict(Counter(self.left_out.values()))


def prepare(judgements: Sequence[Judgement], encode: Encode, aspects: Mapping[str, float] | None = None) -> Prepared:
    """Judgements, no two of one id, in the order given, every reply in tokens of the base that learns. `aspects`: how much what
    is said of an aspect counts, 1 where it is not named, nothing at 0."""
    shaped = {one.feedback_id: _shaped(one, encode, aspects or {}) for one in judgements}
    left_out = {feedback_id: one for feedback_id, one in shaped.items() if isinstance(one, str)}
    kept = [one for one in shaped.values() if not isinstance(one, str)]
    for reason, without in (("duplicate", _once), ("contradictory", _consistent), ("surplus", _newest)):
        left = without(kept)
        left_out |= dict.fromkeys({one.feedback_id for one in kept} - {one.feedback_id for one in left}, reason)
        kept = left
    signals = [one for one in kept if one.kind == "signal"]
    others = [one for one in kept if one.kind != "signal"]
    return Prepared([*others, *_contrasted(signals, others)], left_out)


def claims(judgement: Judgement) -> Iterator[Claim]:
    """What the judgement claims. Three stars claim nothing, nor does a signal."""
    kind, value = judgement.kind, judgement.value
    if kind in ("thumb", "rating"):
        good, bad = (value == 1, value == 0) if kind == "thumb" else (value >= LIKED, value <= DISLIKED)
        if good or bad:
            yield (judgement.aspect, key_of(judgement.reply)), 1 if good else -1
    elif kind != "signal":
        for better, worse in combinations(map(key_of, replies(judgement)), 2):
            if better != worse:
                yield frozenset((better, worse)), 1 if better < worse else -1


def replies(judgement: Judgement) -> Sequence[Sample]:
    """Every reply that the judgement is about, from best to worst where there is an order."""
    return judgement.ranked or [one for one in (judgement.reply, judgement.other) if one is not None]


def edit_distance(one: Sequence[int], other: Sequence[int], most: int = WHOLE_EDIT) -> int:
    """Tokens to put in, take out or replace so that one becomes the other (Levenshtein), or `most` where they are more.

    Only places at most `most` apart can be on such a way, so the time grows with the length and not its square.
    """
    if abs(len(one) - len(other)) >= most:
        return most
    row = {place: place for place in range(min(most, len(other)) + 1)}
    for number, token in enumerate(one, 1):
        left, row = row, {}
        for place in range(max(0, number - most), min(len(other), number + most) + 1):
            ways = [left.get(place, most) + 1, row.get(place - 1, most) + 1]
            if place and place - 1 in left:
                ways.append(left[place - 1] + (token != other[place - 1]))
            row[place] = number if place == 0 else min(ways)
    return min(row[len(other)], most)


def _shaped(judgement: Judgement, encode: Encode, aspects: Mapping[str, float]) -> Judgement | str:
    """The judgement as its loss takes it, or why it is left out."""
    weight = judgement.weight * aspects.get(judgement.aspect, 1.0)
    if not weight:
        return "aspect"
    if _is_empty(judgement):
        return "empty"
    try:
        judgement = _encoded(replace(judgement, weight=weight), encode)
    except Unusable:
        return "unusable"
    if judgement.kind == "signal":
        dwelt = judgement.signal == "dwell"
        return judgement if dwelt else replace(judgement, value=float(judgement.value > 0))
    order = replies(judgement)
    if len(order) > 1 and len(set(map(key_of, order))) == 1:
        return "same"
    return judgement


def _is_empty(judgement: Judgement) -> bool:
    if judgement.kind == "signal":
        return judgement.signal is None
    return judgement.kind == "correction" and not (judgement.correction and judgement.correction.text.strip())


def _encoded(judgement: Judgement, encode: Encode) -> Judgement:
    """Its replies in tokens of the base that learns, and a correction as one of them. Raises Unusable."""

    def ours(sample: Sample) -> Sample:
        if sample.words is None:
            return sample
        prompt_ids, reply_ids = encode(sample.words)
        return replace(sample, prompt_ids=prompt_ids, reply_ids=reply_ids)

    judgement = replace(
        judgement,
        reply=ours(judgement.reply),
        other=judgement.other and ours(judgement.other),
        ranked=tuple(map(ours, judgement.ranked)),
    )
    if judgement.kind != "correction" or judgement.correction is None:
        return judgement
    return _edited(judgement, encode(judgement.correction)[1])


def _edited(judgement: Judgement, reply_ids: Sequence[int]) -> Judgement:
    """A correction as a preference of what should have been said, the stronger the more was changed (2601.19055)."""
    was = judgement.reply
    changed = edit_distance(was.reply_ids, reply_ids)
    return replace(
        judgement,
        reply=replace(was, reply_ids=tuple(reply_ids)),
        other=was,
        weight=judgement.weight * min(changed, WHOLE_EDIT) / WHOLE_EDIT,
    )


def _once(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Of what a named person said several times, word for word, the first."""
    seen: dict[Hashable, Judgement] = {}
    for row, one in enumerate(judgements):
        said = (one.user, one.kind, one.aspect, one.signal, one.value, *map(key_of, replies(one)))
        seen.setdefault(said if one.user else row, one)
    return list(seen.values())


def _consistent(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Without what a named person both said and denied, of one reply and aspect or of the same two replies."""
    sides: defaultdict[Hashable, set[int]] = defaultdict(set)
    for one in judgements:
        for subject, side in claims(one):
            sides[one.user, subject].add(side)

    def denied(one: Judgement) -> bool:
        return one.user is not None and any(len(sides[one.user, subject]) > 1 for subject, _ in claims(one))

    return [one for one in judgements if not denied(one)]


def _newest(judgements: Sequence[Judgement]) -> list[Judgement]:
    """As many as are of no more than REPLIES replies, the newest first. Signals come last: they may be many, and say little."""
    known: set[Hashable] = set()
    kept: set[str] = set()
    for one in sorted(judgements, key=lambda one: (one.kind != "signal", one.at), reverse=True):
        more = {*map(key_of, replies(one))} - known
        if len(known) + len(more) <= REPLIES:
            known |= more
            kept.add(one.feedback_id)
    return [one for one in judgements if one.feedback_id in kept]


def _contrasted(signals: Sequence[Judgement], others: Sequence[Judgement]) -> list[Judgement]:
    """Signals, each name with as much weight on replies that did not get it as on those that did; a dwell is long or short."""
    served: dict[Hashable, tuple[Sample, float]] = {}
    for one in [*signals, *others]:
        for sample in replies(one)[one.kind == "correction" :]:  # the corrected text was served to nobody
            if sample.live:  # nor could anybody have sent a signal of what was said elsewhere
                served.setdefault(key_of(sample), (sample, one.at))
    found: list[Judgement] = []
    for name in dict.fromkeys(one.signal for one in signals):
        came = [one for one in signals if one.signal == name]
        if name == "dwell":
            middle = statistics.median(one.value for one in came)
            found += [replace(one, value=float(one.value > middle)) for one in came]
            continue
        got = {key_of(one.reply) for one in came}
        silent = [place for text, place in served.items() if text not in got]
        weight = came[0].weight * min(1.0, sum(one.value for one in came) / max(len(silent), 1))
        found += came
        found += [
            replace(came[0], feedback_id=NOBODYS, user=None, value=0.0, reply=sample, at=at, weight=weight)
            for sample, at in silent
        ]
    return found
