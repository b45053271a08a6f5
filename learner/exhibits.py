"""What an update's report shows of replies: texts token by token, and rated replies that are like them. People's own words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner.judgement import Key, key_of
from learner.model import Batch
from learner.prepare import replies
from learner.steps import POLICY

if TYPE_CHECKING:
    from learner.judgement import Judgement, Sample
    from learner.model import LearnerModel
    from learner.reward import RewardModel
    from learner.rollouts import Rollout
    from serving.chat import Chat

ALIKE = 2
"""Rated replies shown beside a candidate's."""
END = "■"
"""Stands for the end of a reply, which has no text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, or several that are one character together."""

    text: str
    kl: float
    """KL to the base of what could have stood here, nats."""
    worth: float
    """By how much it moved the reward model's score of the reply so far."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply as it is shown."""

    prompt_ids: tuple[int, ...]
    pieces: tuple[Piece, ...]
    score: float
    state_S: Tensor = field(repr=False, compare=False)
    """What the bare base makes of it: see LearnerModel.states."""

    @property
    def kl(self) -> float:
        """Nats of the whole reply."""
        return sum(piece.kl for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Alike:
    """A rated reply that is like one of the candidate's."""

    prompt: str
    text: str
    said: str
    """What people said of it, in words."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The replies to one prompt by the version served now and by the candidate."""

    prompt: str
    before: Reply
    after: Reply
    alike: tuple[Alike, ...]


@dataclass(frozen=True, slots=True)
class Exhibits:
    """Beside an update's figures, what only its page shows."""

    base_scores: tuple[float, ...] = ()
    candidate_scores: tuple[float, ...] = ()
    pairs: tuple[Pair, ...] = ()


def first_of_each(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """The first replies to `count` different prompts: a fair draw, where the prompts are shuffled."""
    first: dict[tuple[int, ...], Rollout] = {}
    for rollout in rollouts:
        first.setdefault(rollout.prompt_ids, rollout)
    return list(first.values())[:count]


def looked_at(
    rollouts: Sequence[Rollout], model: LearnerModel, reward: RewardModel, chat: Chat, *, moved: bool
) -> list[Reply]:
    """Replies of the policy as it is now; `moved` False: of the bare base, whose KL to itself is 0."""
    looked = []
    for rollout in rollouts:
        batch = Batch.of([rollout])
        found = model.compare(batch, POLICY)
        kl_T = found.kl_BT[batch.mask_BT] if moved else torch.zeros(len(rollout.reply_ids))
        [running_T] = reward.running([rollout], found.states_BS)
        pieces = pieces_of(rollout.reply_ids, kl_T.tolist(), running_T.diff().tolist(), chat)
        looked.append(Reply(rollout.prompt_ids, pieces, float(running_T[-1]), found.states_BS[0]))
    return looked


def pieces_of(ids: Sequence[int], kls: Sequence[float], worths: Sequence[float], chat: Chat) -> tuple[Piece, ...]:
    """The text of a reply in its tokens; what has no text of its own is the end, or goes with what comes after it."""
    pieces: list[Piece] = []
    writer, kl, worth = chat.detokenizer(), 0.0, 0.0
    for token, token_kl, token_worth in zip(ids, kls, worths, strict=True):
        kl, worth = kl + token_kl, worth + token_worth
        text = END if token in chat.eos_ids else writer.push(token)
        if text:
            pieces.append(Piece(text, kl, worth))
            kl = worth = 0.0
    rest = writer.finish()
    return (*pieces, Piece(rest, kl, worth)) if rest else tuple(pieces)


def most_alike(
    shown: Sequence[Reply], rated: Sequence[Sample], states_NS: Tensor, count: int = ALIKE
) -> list[list[int]]:
    """For each reply the rated ones (by row of `states_NS`) whose states point most nearly the same way, nearest first."""
    centre_S, spread_S = states_NS.mean(0), states_NS.std(0, correction=0).clamp_min(1e-6)
    rated_NS = torch.nn.functional.normalize((states_NS - centre_S) / spread_S, dim=1)
    own_BS = torch.stack([(reply.state_S - centre_S) / spread_S for reply in shown])
    return (own_BS @ rated_NS.T).topk(min(count, len(rated)), dim=1).indices.tolist()


def said_of(judgements: Sequence[Judgement]) -> Mapping[Key, str]:
    """Prompt and reply → what people said of it, in words: "2 thumbs up, 1 thumb down"."""
    counts: defaultdict[Key, Counter[str]] = defaultdict(Counter)
    for judgement in judgements:
        for sample, word in zip(replies(judgement), _words(judgement), strict=True):
            counts[key_of(sample)][word] += 1
    return {
        reply: ", ".join(f"{word} × {count}" if count > 1 else word for word, count in said.most_common())
        for reply, said in counts.items()
    }


def _words(judgement: Judgement) -> tuple[str, ...]:
    """What was said of each of the judgement's replies."""
    of = "" if judgement.aspect == "overall" else f" for {judgement.aspect}"
    match judgement.kind:
        case "thumb":
            return (f"thumb {'up' if judgement.value else 'down'}{of}",)
        case "rating":
            return (f"{judgement.value:.0f} of 5 stars{of}",)
        case "signal":
            return (f"{judgement.signal}" if judgement.value else f"no {judgement.signal}",)
        case "correction":
            return "written as a correction", "corrected"
        case "ranking":
            return tuple(f"place {place} of {len(judgement.ranked)}" for place, _ in enumerate(judgement.ranked, 1))
        case _:
            return "preferred", "the other one preferred"


def pairs(
    before: Sequence[Reply],
    after: Sequence[Reply],
    judgements: Sequence[Judgement],
    reward: RewardModel,
    chat: Chat,
) -> tuple[Pair, ...]:
    """The replies side by side, each of the candidate's with what people said of the rated ones most like it."""
    if not after:
        return ()
    said, (rated, states_NS) = said_of(judgements), reward.rated
    return tuple(
        Pair(
            chat.decode(new.prompt_ids).strip(),
            old,
            new,
            tuple(
                Alike(
                    chat.decode(rated[row].prompt_ids).strip(),
                    chat.decode(rated[row].reply_ids).strip(),
                    said[key_of(rated[row])],
                )
                for row in rows
            ),
        )
        for old, new, rows in zip(before, after, most_alike(after, rated, states_NS), strict=True)
    )
