"""Past chats as events of the log."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

from deploy.past import Past
from feedback.events import EXCHANGES, FEEDBACK, Exchange, ExchangeContent, Feedback, FeedbackContent, SamplingUsed
from feedback.log import Log
from serving.ids import Ids

IN_FLIGHT = 4000
"""Events handed to the log and not yet durable: many go to disk at once, and memory stays bounded."""

Encoded = tuple[list[int], list[int]]
"""Prompt ids and reply ids."""

TICK_S = 1e-6
"""Between two lines without a time, so that they keep their order wherever it is asked for."""


class Writing:
    """Hands what was read to the log, many events at a time."""

    def __init__(self, ids: Ids, log: Log, *, policy: str, base: str, now: float) -> None:
        """`base`: the fingerprint of the base model; `now`: when the first of what has no time was said, epoch seconds."""
        self.ids, self.log, self.policy, self.base, self.now = ids, log, policy, base, now
        self.caller = ids.pseudonym("import")
        self._flying: deque[Future[int]] = deque()

    def write(self, past: Past, content: bytes, repeat: int, encoded: list[Encoded]) -> None:
        """One line's exchanges, then what was said of them. Raises LogUnavailable."""
        # another policy learns from it for itself, so it has an exchange of its own there
        name = past.id if past.id is not None else f"{self.ids.digest(content)} {repeat}"
        parts = (self.policy, "id" if past.id is not None else "content", name)
        at = self.now if past.at is None else past.at
        self.now += TICK_S
        replies = [self.ids.imported_reply(*parts, str(place)) for place in range(len(past.replies))]
        for reply_id, reply, ids in zip(replies, past.replies, encoded, strict=True):
            self._hand_in(EXCHANGES, replies[0], self._exchange(past, at, reply_id, replies[0], reply, ids).to_json())
        if past.kind is not None:
            feedback = Feedback(
                at=at,
                id=self.ids.imported_feedback(*parts),
                caller=self.caller,
                kind=past.kind,
                reply_ids=tuple(replies),
                aspect=past.aspect,
                value=past.value,
                body=self.ids.digest(content),
                content=FeedbackContent(user=past.user),
            )
            self._hand_in(FEEDBACK, replies[0], feedback.to_json())

    def _exchange(self, past: Past, at: float, reply_id: str, first_id: str, reply: str, ids: Encoded) -> Exchange:
        prompt_ids, reply_ids = ids
        return Exchange(
            at=at,
            id=reply_id,
            policy=self.policy,
            version=0,
            base=self.base,
            caller=self.caller,
            conversation=past.conversation or first_id,
            turn=sum(message.role == "assistant" for message in past.prompt),
            finish_reason="stop",
            # nobody knows how it was sampled: temperature 0 has no full support, which is the safe thing to say
            sampling=SamplingUsed(
                temperature=0, top_p=1, top_k=0, min_p=0, max_tokens=len(reply_ids), seed=None, stop=()
            ),
            source="imported",
            content=ExchangeContent(
                user=past.user,
                messages=past.prompt,
                prompt_ids=tuple(prompt_ids),
                reply=reply,
                reply_ids=tuple(reply_ids),
                logprobs=(),
                raw_logprobs=(),
            ),
        )

    def _hand_in(self, topic: str, key: str, event: str) -> None:
        if len(self._flying) >= IN_FLIGHT:
            self._flying.popleft().result()
        self._flying.append(self.log.submit(topic, key, event))

    def finish(self) -> None:
        """Wait until all of it is durable. Raises LogUnavailable."""
        while self._flying:
            self._flying.popleft().result()
