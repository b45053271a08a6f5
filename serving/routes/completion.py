"""One chat completion: n replies of one version, from their admission to the log.

What the engine says is passed on as it comes, but the end of a reply only once its exchange is kept, which goes on when the
client is gone. So whoever has received a reply whole can rate it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from structlog.contextvars import bind_contextvars

from feedback.events import EXCHANGES, Exchange, ExchangeContent, FinishReason
from feedback.log import LogUnavailable
from serving.engine import Finished, PromptTooLong, QueueFull, Request, Stream, Token, UnknownVersion
from serving.errors import ContextTooLong, HeedError, ServerFailed, TooManyRequests, Unavailable, UnknownModel
from serving.metrics import role_of
from serving.routes.asked import Asked
from serving.routes.wiring import Speaker, Wiring

if TYPE_CHECKING:
    from serving.traces import ChatTrace

KEEP_WAIT_S = 30.0
"""After this long without an answer from the log, a reply is finished as not kept."""
_SWAPS_RACED = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one reply, after the log has answered."""

    finished: Finished
    kept: bool


Events = list[tuple[int, Token | Ended]]
"""Each with the number of its choice."""


def failure_of(finished: Finished) -> HeedError | None:
    """What to say instead of a reply, where there is none."""
    if finished.reason == "error":
        return ServerFailed(f"The reply could not be made: {finished.error or 'the engine failed'}. Try again.")
    if finished.reason == "abort" and not finished.reply_ids:
        return Unavailable(
            f"Nothing was said in time ({finished.error or 'the reply was aborted'}). Try again when fewer people ask.",
            code="timeout",
            retry_after=1,
        )
    return None


class Completion:
    """The replies to one request."""

    def __init__(self, wiring: Wiring, speaker: Speaker, asked: Asked) -> None:
        self.asked = asked
        self.version = 0
        """The version that speaks; known once `begun` has returned."""
        self._wiring = wiring
        self._speaker = speaker
        self._streams: list[Stream] = []
        self._context = copy_context()
        """What the log and traces know of the request; what the engine has said arrives without."""
        self._trace: ChatTrace | None = None
        self._heard = [asked.arrived] * asked.choices
        """When each choice last said something (time.monotonic())."""
        self._failed: set[int] = set()
        """Choices that ended by a fault of ours."""
        self._arrived: Events = []
        self._more = asyncio.Event()

    @property
    def model(self) -> str:
        """The concrete version that speaks, as a model name."""
        return f"{self._wiring.store.policy}@v{self.version}"

    @property
    def fingerprint(self) -> str:
        """Of the base model, tokenizer and chat template, as OpenAI's `system_fingerprint`."""
        return f"fp_{self._speaker.base.fingerprint[:12]}"

    def start(self, version: int | None) -> None:
        """Hand the replies to the engine: of this version, or all of the one that is current.

        Raises TooManyRequests, ContextTooLong, UnknownModel (the version was just retired); then nothing is on its way.
        """
        for _ in range(_SWAPS_RACED):
            try:
                # several replies name the current version, so that a swap between two admissions splits nothing
                several = version is None and self.asked.choices > 1
                self._streams = self._submit(self._speaker.engine.current if several else version)
                break
            except UnknownVersion as error:
                refused = UnknownModel(f"{error}.", param="model")
        else:
            raise refused
        if self._wiring.traces is not None:
            self._trace = self._context.run(self._wiring.traces.chat, self.asked)
        for choice, stream in enumerate(self._streams):
            stream.listen(partial(self._hear, choice, stream))

    def cancel(self) -> None:
        """The client is gone: free the rows. What was said so far is kept."""
        for stream in self._streams:
            self._speaker.engine.cancel(stream)

    async def begun(self) -> None:
        """Wait until something is said, when the version is known. Raises ServerFailed, and Unavailable if nothing ever is.

        So a stream that cannot even begin is refused with a status, not with an error inside a 200.
        """
        for ended in range(self.asked.choices):
            while len(self._arrived) == ended:
                self._more.clear()
                await self._more.wait()
            choice, event = self._arrived[ended]
            failure = failure_of(event.finished) if isinstance(event, Ended) else None
            if failure is None:
                break
            if ended == self.asked.choices - 1 or isinstance(failure, ServerFailed):
                self.cancel()
                raise failure
        bound = self._streams[choice].version
        self.version = 0 if bound is None else bound
        metrics, role = self._wiring.metrics, role_of(self.version, self._wiring.release())
        metrics.version_requests.labels(self._wiring.store.policy, role).inc()
        metrics.tokens.labels("prompt").inc(len(self.asked.prompt_ids))

    async def events(self) -> AsyncIterator[Events]:
        """What has arrived since, as often as something has, until every reply has ended."""
        left = self.asked.choices
        while left:
            await self._more.wait()
            self._more.clear()
            events, self._arrived = self._arrived, []
            left -= sum(isinstance(event, Ended) for _, event in events)
            yield events

    def _submit(self, version: int | None) -> list[Stream]:
        asked, engine = self.asked, self._speaker.engine
        deadline = time.monotonic() + self._wiring.config.request_timeout_s
        streams: list[Stream] = []
        try:
            for choice in range(asked.choices):
                request = Request(asked.prompt_ids, asked.sampling_of(choice), version, asked.caller, deadline)
                streams.append(engine.submit(request, tokens=asked.tokens))
        except (QueueFull, PromptTooLong, UnknownVersion) as error:
            for stream in streams:
                engine.cancel(stream)
            if isinstance(error, QueueFull):
                raise TooManyRequests(f"The server is busy: {error}.", retry_after=1) from error
            if isinstance(error, PromptTooLong):
                raise ContextTooLong(f"The messages do not fit: {error}.", param="messages") from error
            raise
        return streams

    def _hear(self, choice: int, stream: Stream) -> None:
        """Called in the loop whenever the engine has said more."""
        while (event := stream.take()) is not None:
            if choice in self._failed:
                continue
            try:
                if isinstance(event, Finished):
                    self._count(stream, event)
                    self._wiring.go_on(self._end(choice, event), self._context.copy())
                else:
                    self._time(choice)
                    self._pass_on(choice, event)
            except Exception as error:  # whoever waits must hear of it, once; the error itself rises
                self._failed.add(choice)
                self._speaker.engine.cancel(stream)
                self._pass_on_end(choice, self._broken(error))
                raise

    async def _end(self, choice: int, finished: Finished) -> None:
        """Pass on the end of a reply, once the log has answered."""
        try:
            self._pass_on_end(choice, Ended(finished, await self._keep(choice, finished)))
        except Exception as error:
            self._pass_on_end(choice, self._broken(error))
            raise

    def _pass_on_end(self, choice: int, event: Ended) -> None:
        if self._trace is not None:
            self._trace.ended(choice, event.finished, self._streams[choice])
        self._pass_on(choice, event)

    def _pass_on(self, choice: int, event: Token | Ended) -> None:
        self._arrived.append((choice, event))
        self._more.set()

    def _broken(self, error: Exception) -> Ended:
        why = type(error).__name__
        return Ended(Finished("error", self.version, self.asked.prompt_ids, (), (), (), "", why), kept=False)

    def _time(self, choice: int) -> None:
        """Note a token's time since the one before, or since the request came."""
        now, last, metrics = time.monotonic(), self._heard[choice], self._wiring.metrics
        first = last == self.asked.arrived
        (metrics.time_to_first_token if first else metrics.inter_token).observe(now - last)
        if first and self._trace is not None:
            self._trace.began(now - last)
        self._heard[choice] = now

    def _count(self, stream: Stream, finished: Finished) -> None:
        metrics = self._wiring.metrics
        metrics.tokens.labels("reply").inc(len(finished.reply_ids))
        metrics.replies.labels(finished.reason).inc()
        if stream.admitted_at is not None:
            metrics.queue.observe(stream.admitted_at - stream.submitted_at)

    async def _keep(self, choice: int, finished: Finished) -> bool:
        """Have the exchange durable in the log; True when it is. A reply never fails because the log does."""
        outcome = "not_stored"
        if self.asked.kept and finished.reply_ids and finished.reason != "error":
            event = self._exchange(choice, finished, finished.reason)
            bind_contextvars(version=f"{event.policy}@v{event.version}")
            outcome = "kept" if await self._append(event) else "dropped"
            if outcome == "kept":
                try:
                    await self._show(event)
                except Exception:  # the board is never the truth: no reply fails because it does
                    _log.exception("the board failed on %s", event.id)
            else:
                self._wiring.dropped.append(event.id)
        self._wiring.metrics.exchanges.labels(outcome).inc()
        return outcome == "kept"

    async def _append(self, event: Exchange) -> bool:
        try:
            await self._wiring.append(EXCHANGES, event.id, event.to_json(), KEEP_WAIT_S)
        except (LogUnavailable, TimeoutError):
            return False
        return True

    async def _show(self, event: Exchange) -> None:
        """Put a kept exchange where later requests find it."""
        await self._wiring.board.put_exchange(event.id, event.to_json())
        await self._wiring.board.remember_exchange(
            self.asked.caller, self.asked.messages, event.content.reply, self.asked.place
        )

    def _exchange(self, choice: int, finished: Finished, reason: FinishReason) -> Exchange:
        asked = self.asked
        return Exchange(
            at=time.time(),
            id=asked.reply_id(choice),
            policy=self._wiring.store.policy,
            version=finished.version,
            base=self._speaker.base.fingerprint,
            caller=self._wiring.ids.pseudonym(asked.caller),
            conversation=asked.place.conversation,
            turn=asked.place.turn,
            finish_reason=reason,
            sampling=asked.sampling_used(choice),
            ask=asked.ask,
            content=ExchangeContent(
                user=asked.user,
                messages=asked.messages,
                prompt_ids=finished.prompt_ids,
                reply=finished.text,
                reply_ids=finished.reply_ids,
                logprobs=finished.logprobs,
                raw_logprobs=finished.raw_logprobs,
                metadata=asked.metadata,
            ),
        )
