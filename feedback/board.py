"""The board: what processes show each other for speed. Never the truth: without it Heed is slower, and loses nothing.

Two implementations: sqlite_board.py, files beside each other on one machine, and redis_board.py, for servers that share
traffic.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from feedback.config import FeedbackConfig
from feedback.conversations import Place, digests_before, new_place, places_after
from feedback.events import Message

Status = Literal[
    "accepted", "joined", "in_reward_model", "in_update", "in_version", "served", "dropped", "superseded", "retracted"
]
STATUSES: tuple[Status, ...] = (
    "accepted", "joined", "in_reward_model", "in_update", "in_version", "served", "dropped", "superseded", "retracted"
)  # fmt: skip
"""From the least far to the furthest: the way of a feedback, then the three ways to stop counting."""

RELEASE_HINT = "release"
"""Said when the release was changed; servers listen."""
WORK_HINT = "work"
"""Said when feedback came or an update was asked for; the learner listens."""


class Story(NamedTuple):
    """One step of a feedback's story: that it reached `status` at `at` (seconds since the epoch)."""

    status: Status
    at: float
    update: int | None = None
    version: int | None = None
    reason: str | None = None


def furthest(history: Iterable[Story]) -> Status:
    """The one-word status: the furthest step reached.

    No history is `accepted`: an id that proves itself was accepted, whatever the board has forgotten. What was dropped or
    superseded and joined after that, e.g. because its exchange came late, counts again.
    """
    steps = list(history)
    joined = max((step.at for step in steps if step.status == "joined"), default=0.0)
    reached = (step.status for step in steps if step.at >= joined or step.status not in ("dropped", "superseded"))
    return max(reached, key=STATUSES.index, default="accepted")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a feedback's giver was told: enough to tell them the same again, or that the body differs."""

    feedback_id: str
    kind: str
    body: str
    """Digest of the request's body."""
    at: float


class Board(Protocol):
    """Calls of milliseconds, none of which raises when the board is away: then nothing is known, and nothing kept.

    What both implementations do alike is written here.
    """

    async def continue_conversation(
        self, caller: str, messages: Sequence[Message], conversation: str | None = None
    ) -> Place:
        """Where the exchange that answers this prompt stands.

        `conversation` is the name the client gave, if any. Without one, the prompt up to its last assistant message is
        looked for among this caller's exchanges; not found: turn 0 of a new conversation.
        """
        digests = digests_before(caller, messages, conversation)
        found = await self.place(digests) if digests else None
        return found or new_place(conversation)

    async def remember_exchange(self, caller: str, messages: Sequence[Message], reply: str, place: Place) -> None:
        """Remember that `reply` answered `messages` at `place` (once for each choice), for continue_conversation."""
        await self.remember_places(places_after(caller, messages, reply, place))

    async def place(self, digests: Sequence[bytes]) -> Place | None:
        """What is remembered under the first of these digests that is known."""
        ...

    async def remember_places(self, places: Mapping[bytes, Place]) -> None:
        """Remember these (digest → place) in place of what was remembered under their digests."""
        ...

    async def put_exchange(self, reply_id: str, exchange: str) -> None:
        """Keep an exchange (JSON) for get_exchange, for as long as there is room."""
        ...

    async def get_exchange(self, reply_id: str) -> str | None:
        """The exchange as it was put; None where it is no longer, or was never, here."""
        ...

    async def versions(self, reply_ids: Sequence[str]) -> dict[str, int]:
        """Reply id → the version that spoke, of the exchanges that are still here."""
        ...

    async def remember_receipts(self, receipts: Sequence[Receipt]) -> None:
        """Remember feedback as accepted; the first receipt of an id stays."""
        ...

    async def receipt(self, feedback_id: str) -> Receipt | None:
        """The receipt of a feedback, None where it is no longer, or was never, here."""
        ...

    async def take(self, caller: str, per_minute: int) -> float:
        """Take one from a caller's bucket, which holds `per_minute` (at least 1) and is filled at that rate.

        0.0 when it was there; else nothing is taken, and this is how many seconds it takes until one is.
        """
        ...

    async def ask_update(self, at: float) -> None:
        """Ask the learner for an update now (POST /admin/update)."""
        await self.set_report("update asked", json.dumps(at))

    async def update_asked(self) -> float | None:
        """When an update was last asked for."""
        asked = await self.report("update asked")
        return None if asked is None else float(json.loads(asked))

    async def activated(self, version: int, at: float) -> None:
        """Note that a version is being served; the first time counts."""
        ...

    async def activations(self) -> dict[int, float]:
        """Version → when it was first served."""
        ...

    async def write_story(self, feedback_id: str, steps: Sequence[Story]) -> None:
        """Add steps to a feedback's story; a step of a status it already has replaces that one."""
        await self.write_stories({feedback_id: steps})

    async def write_stories(self, stories: Mapping[str, Sequence[Story]]) -> bool:
        """write_story for many feedbacks (id → steps); True once all are written, which may be repeated."""
        ...

    async def story(self, feedback_id: str) -> list[Story]:
        """All that is known of a feedback, by whichever process, in order of time."""
        steps, receipt, activations = await asyncio.gather(
            self.steps(feedback_id), self.receipt(feedback_id), self.activations()
        )
        if receipt is not None:
            steps.append(Story("accepted", receipt.at))
        return _in_order(_with_served(steps, activations))

    async def steps(self, feedback_id: str) -> list[Story]:
        """The steps that were written of a feedback, in any order."""
        ...

    async def set_report(self, name: str, report: str) -> None:
        """Show a report (JSON) in place of the one before; "policy" is the learner's part of GET /v1/policy."""
        ...

    async def report(self, name: str) -> str | None:
        """The latest report of this name, this process's own or else another's."""
        ...

    async def forgot(self) -> bool:
        """Whether what the learner told since it began this epoch may be gone, so that it has to tell all of it again.

        True before the first epoch; False where nobody can say, because the board is away.
        """
        ...

    async def begin_epoch(self) -> bool:
        """Note that from here on everything is told, until the board is emptied; True once that is noted."""
        ...

    async def hint(self, name: str) -> None:
        """Wake whoever waits for this hint (RELEASE_HINT, WORK_HINT). It may get lost: they look by themselves too."""
        ...

    async def wait_for_hint(self, name: str, at_most_s: float) -> bool:
        """Wait for a hint, those included that came since the last call; False when none came in `at_most_s`."""
        ...

    async def close(self) -> None:
        """Let go of files and connections."""
        ...


def open_board(config: FeedbackConfig, owner: Literal["server", "learner"]) -> Board:
    """The board of these settings, as one of the two processes sees it. Does not wait for it to be there."""
    if config.redis_url is not None:
        from feedback.redis_board import RedisBoard  # each is imported only when chosen

        return RedisBoard(config.redis_url, config.policy)
    from feedback.sqlite_board import SqliteBoard

    own, other = ("server", "learner") if owner == "server" else ("learner", "server")
    return SqliteBoard(config.data / "board" / f"{own}.db", config.data / "board" / f"{other}.db")


def _with_served(steps: list[Story], activations: Mapping[int, float]) -> list[Story]:
    """The steps, and `served` where the version it went into was: the server knows that before the learner does."""
    served = [
        Story("served", max(step.at, activations[step.version]), step.update, step.version)
        for step in steps
        if step.status == "in_version" and step.version is not None and step.version in activations
    ]
    return steps + served


def _in_order(steps: Iterable[Story]) -> list[Story]:
    """One step a status, the earliest, in order of time."""
    earliest: dict[str, Story] = {}
    for step in steps:
        if step.status not in earliest or step.at < earliest[step.status].at:
            earliest[step.status] = step
    return sorted(earliest.values(), key=lambda step: (step.at, STATUSES.index(step.status)))
