"""How feedback gets into the log: proven, once, and durable before anyone is told so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import Depends

from feedback.board import WORK_HINT, Receipt, Story
from feedback.events import FEEDBACK, KINDS, Feedback, FeedbackContent, Retraction
from feedback.log import EventTooLarge, LogUnavailable
from serving.errors import Conflict, HeedError, NotStored, TooLarge, Unavailable, UnknownReply, Unprocessable
from serving.metrics import role_of
from serving.routes.wiring import Client, Parts, Wiring
from serving.schemas import Comment, Correction, Preference, Ranking, Rating, Said, Signal, Thumb

LOG_WAIT_S = 30.0
"""After this long without an answer from the log, feedback is refused as unavailable."""
RETRY_AFTER_S = 2.0
GATHER_S = 0.02
"""Before the board is told: what comes meanwhile is told with it, and costs a tenth."""
HINT_EVERY_S = 0.05
"""The learner looks by itself four times a second; it need not be woken for each thumb of a crowd."""
MOST_SHOWN = 200
"""Feedback told to the board at a time."""

_OUTCOMES: Mapping[type[HeedError], str] = {
    NotStored: "not_stored",
    UnknownReply: "unknown_reply",
    Conflict: "conflict",
    Unavailable: "unavailable",
    TooLarge: "malformed",
    Unprocessable: "malformed",
}


class Intake:
    """Takes feedback for one server."""

    def __init__(self, parts: Wiring) -> None:
        self._parts = parts

    async def accept(self, said: Said, client: Client, header_key: str | None, once: str | None = None) -> str:
        """Keep what was said, and return the receipt's id.

        `once`: a proxy's name of the request, the same on each try: what it sends again counts once, also where the client
        gave no key.
        Raises UnknownReply, NotStored, Conflict (the id was used with another body), Unavailable (nothing was kept),
        Unprocessable (header and body name different keys).
        """
        try:
            repeated, feedback_id = await self._accept(said, client, _key(said.id, header_key), once)
        except HeedError as error:
            self._parts.metrics.feedback.labels(said.kind, _OUTCOMES[type(error)]).inc()
            raise
        self._parts.metrics.feedback.labels(said.kind, "repeated" if repeated else "accepted").inc()
        return feedback_id

    async def retract(self, feedback_id: str, client: Client) -> None:
        """Note in the log that this feedback stops counting. Raises UnknownFeedback, Unavailable."""
        self._parts.ids.verify_feedback(feedback_id, client.key)
        await self.shown(feedback_id)
        board, now = self._parts.board, time.time()
        if any(step.status == "retracted" for step in await board.story(feedback_id)):
            return
        event = Retraction(at=now, id=feedback_id, caller=self._parts.ids.pseudonym(client.caller(None)))
        await self._append(feedback_id, event.to_json())
        await board.write_story(feedback_id, [Story("retracted", now)])
        receipt = await board.receipt(feedback_id)
        kind = receipt.kind if receipt and receipt.kind in KINDS else "unknown"  # a newer server's may be none of ours
        self._parts.metrics.feedback.labels(kind, "retracted").inc()

    async def _accept(self, said: Said, client: Client, key: str | None, once: str | None) -> tuple[bool, str]:
        """Whether it had been accepted before, and the receipt's id."""
        ids, accepting = self._parts.ids, self._parts.accepting
        for reply_id in named(said):
            ids.verify_reply(reply_id, client.key)
            if reply_id in self._parts.dropped:
                raise NotStored(
                    f"The reply {reply_id} was not kept: the log could not take it, as its answer said (kept: false). "
                    "Nothing can be learned from it; rate another reply."
                )
        caller = client.caller(said.user)
        digest = ids.digest(said.model_dump_json(exclude={"id"}).encode())
        if key is None and once:
            key = f"{once} {digest}"  # with other words it is another: whoever sends this header with all it says loses nothing
        feedback_id = ids.new_feedback(caller, key, client.key)
        event = _event(said, feedback_id, ids.pseudonym(caller), digest)
        if key is None:  # a receipt that nobody could have had before: no look-up, and nobody to wait for
            await self._append(event.reply_ids[0], event.to_json())
            self._show_soon(said, event)
            return False, feedback_id
        if feedback_id not in accepting:
            taking = asyncio.get_running_loop().create_task(self._take(said, event, key))
            accepting[feedback_id] = digest, taking
            taking.add_done_callback(lambda _: accepting.pop(feedback_id))
        elif accepting[feedback_id][0] != digest:
            raise _conflict(key)
        else:
            await asyncio.shield(accepting[feedback_id][1])
            return True, feedback_id
        return await asyncio.shield(taking), feedback_id

    async def _take(self, said: Said, event: Feedback, key: str | None) -> bool:
        """Append, unless the board knows it as accepted; True when it does. Raises Conflict, Unavailable."""
        board = self._parts.board
        receipt = await board.receipt(event.id)
        if receipt is not None:
            if receipt.body != event.body:
                raise _conflict(key)
            return True
        await self._append(event.reply_ids[0], event.to_json())
        await board.remember_receipts([_receipt(event)])  # at once: the next post under this id may come now
        self._show_soon(said, event)
        return False

    def _show_soon(self, said: Said, event: Feedback) -> None:
        """Have the board told what the log has kept, together with what comes meanwhile."""
        unshown = self._parts.unshown
        unshown.append((said, event))
        if len(unshown) == 1:
            self._parts.showing = self._parts.go_on(self._show())

    async def shown(self, feedback_id: str) -> None:
        """Wait until the board knows of feedback that this server has just accepted."""
        showing = self._parts.showing
        if showing is not None and any(event.id == feedback_id for _, event in self._parts.unshown):
            await asyncio.shield(showing)

    async def _show(self) -> None:
        """Tell the board what the log has kept, count what people think, and tell the learner that there is work."""
        unshown = self._parts.unshown
        try:
            await asyncio.sleep(GATHER_S)
            while some := unshown[:MOST_SHOWN]:
                await self._parts.board.remember_receipts([_receipt(event) for _, event in some])
                await self._count_values([said for said, _ in some if isinstance(said, Thumb | Rating)])
                del unshown[: len(some)]
        except BaseException:
            unshown.clear()  # who comes next finds it empty, and begins anew
            raise
        now = time.monotonic()
        if now - self._parts.hinted > HINT_EVERY_S:
            self._parts.hinted = now
            await self._parts.board.hint(WORK_HINT)

    async def _append(self, key: str, event: str) -> None:
        try:
            await self._parts.append(FEEDBACK, key, event, LOG_WAIT_S)
        except EventTooLarge as error:
            raise TooLarge(f"The feedback cannot be kept: {error}.") from error
        except LogUnavailable as error:
            raise Unavailable(
                f"The feedback was not kept: {error}. Send it again with the same id.",
                code="log_unavailable",
                retry_after=RETRY_AFTER_S,
            ) from error
        except TimeoutError:
            raise Unavailable(
                "The log does not answer: nobody knows whether the feedback was kept. Send it again with the same id.",
                code="log_unavailable",
                retry_after=RETRY_AFTER_S,
            ) from None

    async def _count_values(self, opinions: Sequence[Thumb | Rating]) -> None:
        """Count them for the role of the version that spoke, while the board still knows which."""
        versions = await self._parts.board.versions([said.reply_id for said in opinions]) if opinions else {}
        if not versions:
            return
        release, policy = self._parts.release(), self._parts.store.policy
        for said in opinions:
            if said.reply_id in versions:
                role = role_of(versions[said.reply_id], release)
                self._parts.metrics.feedback_value.labels(policy, said.kind, str(said.value), role).inc()


async def _intake(parts: Parts) -> Intake:
    return Intake(parts)


FeedbackLog = Annotated[Intake, Depends(_intake)]


def named(said: Said) -> tuple[str, ...]:
    """The replies a feedback is about, from best to worst where there is an order."""
    if isinstance(said, Preference):
        return said.chosen, said.rejected
    return tuple(said.reply_ids) if isinstance(said, Ranking) else (said.reply_id,)


def _event(said: Said, feedback_id: str, caller: str, digest: str) -> Feedback:
    return Feedback(
        at=time.time(),
        id=feedback_id,
        caller=caller,
        kind=said.kind,
        reply_ids=named(said),
        aspect=said.aspect if isinstance(said, Thumb | Rating) else "overall",
        value=_value(said),
        signal=said.name if isinstance(said, Signal) else None,
        body=digest,
        content=FeedbackContent(
            user=said.user,
            text=said.text if isinstance(said, Correction | Comment) else None,
            metadata=said.metadata or {},
        ),
    )


def _receipt(event: Feedback) -> Receipt:
    return Receipt(event.id, event.kind, event.body, event.at)


def _value(said: Said) -> float | None:
    if isinstance(said, Thumb):
        return 1.0 if said.value == "up" else 0.0
    if isinstance(said, Rating):
        return float(said.value)
    return said.value if isinstance(said, Signal) else None


def _key(body: str | None, header: str | None) -> str | None:
    """The idempotency key, wherever it stands. Raises Unprocessable where two differ, or the header is too long."""
    if header is None:
        return body
    if body is not None and body != header:
        raise Unprocessable(
            "id differs from the header Idempotency-Key; send one of them, or the same twice.", param="id"
        )
    if not 1 <= len(header) <= 256:
        raise Unprocessable(
            f"The header Idempotency-Key has {len(header)} characters, and may have 1 to 256.", param="id"
        )
    return header


def _conflict(key: str | None) -> Conflict:
    return Conflict(
        f"Feedback with the id {key!r} was accepted before, with another body. Send it under an id of its own; "
        "to take the first one back, DELETE it by its receipt's id.",
        param="id",
    )
