"""One step of the engine after another: read a piece of the new prompts, sample a token for every other running reply.

Between two steps requests join and leave (serving/scheduler.py), and versions are probed and flipped.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from serving.forward import Forward
from serving.reply import Reply
from serving.sampling import RowSampling, sample
from serving.scheduler import Scheduler
from serving.stream import Event, Reason, Stream, wake

PROMPT_TOKENS_A_STEP = 512
"""Most prompt tokens read in one step while someone listens to running replies."""
PROMPT_S_A_STEP = 0.1
"""And as many as are read in this time: what an arrival may delay them by."""
PROMPT_TOKENS_AT_LEAST = 16
PROMPT_TOKENS_A_STEP_UNHEARD = 2048
"""The same while nobody listens token by token."""

_log = logging.getLogger(__name__)


class Steps:
    """Advances the replies of a scheduler's batch. Used by one thread at a time."""

    def __init__(self, forward: Forward, scheduler: Scheduler) -> None:
        self.taken = self.prompt_tokens = self.reply_tokens = 0
        self.ended: Counter[str] = Counter()
        """Replies by the reason they ended with."""
        self._forward, self._scheduler, self._batch = forward, scheduler, scheduler.batch
        self._sampling: RowSampling | None = None
        """Of the replies that decode; None once these have changed."""
        self._events: list[tuple[Stream, Event]] = []
        self._prompt_rate = math.inf
        """Prompt tokens a second, as last read."""
        self._last_failure = ""

    def take(self) -> None:
        """One step; its events are delivered."""
        with torch.inference_mode():
            for reply, why in self._scheduler.unwanted():
                self._end(reply, "abort", why)
            self._scheduler.admit()
            self._read_prompts()
            self._decode()
        self.taken += 1
        self._deliver()

    def end_all(self, reason: Reason, why: str) -> None:
        """End every reply, those in line too."""
        for reply in self._scheduler.everyone():
            self._end(reply, reason, why)
        self._deliver()

    def _read_prompts(self) -> None:
        """Read a piece of the new prompts; replies whose prompt is whole get their first token."""
        share = PROMPT_TOKENS_A_STEP_UNHEARD
        if self._heard():
            timely = max(PROMPT_TOKENS_AT_LEAST, PROMPT_S_A_STEP * self._prompt_rate)
            share = int(min(PROMPT_TOKENS_A_STEP, timely))
        read = self._batch.next_pieces(share, padded=not self._forward.native)
        if not read:
            return
        replies = [reply for reply, _ in read]
        with self._guarded([one for reply in replies for one in (reply, *reply.followers)]):
            pieces = [reply.prompt_ids[reply.prefilled : reply.prefilled + count] for reply, count in read]
            begun = time.perf_counter()
            logits_BV = self._logits(replies, pieces, [reply.prefilled for reply in replies])
            if (count := sum(map(len, pieces))) >= PROMPT_TOKENS_AT_LEAST and self._forward.native:
                self._prompt_rate = count / (time.perf_counter() - begun)
            for reply, piece in zip(replies, pieces, strict=True):
                reply.prefilled += len(piece)
                self.prompt_tokens += len(piece)
            chosen: list[int] = []
            first: list[Reply] = []
            for i, reply in enumerate(replies):  # rows change places here: what each of them holds is known by now
                if not reply.left_to_read:
                    started = self._batch.start_decoding(reply)
                    first += started
                    chosen += [i] * len(started)
            if first:
                self._sampling = None
                self._sample(first, logits_BV[chosen], _row_sampling(first, logits_BV.device))
                for reply in first:
                    if reply.row >= 0:  # else it has ended, and what it read was remembered unless that was not finite
                        self._batch.remember(reply)

    def _decode(self) -> None:
        """One more token for every reply whose prompt is read; while nobody listens, only once all prompts are."""
        replies = self._batch.replies[: self._batch.decoding]
        if not replies or (self._batch.reading and not self._heard()):
            return  # while nobody listens, all prompts come first: then every step is a full one
        with self._guarded(replies):
            logits_BV = self._logits(replies, [reply.ids[-1:] for reply in replies], [reply.used for reply in replies])
            if self._sampling is None:
                self._sampling = _row_sampling(replies, logits_BV.device)
            self._sample(replies, logits_BV, self._sampling)

    def _logits(self, replies: Sequence[Reply], ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Logits after the last of these ids of each reply, given that `starts` positions of its row are filled."""
        return self._forward.run(replies[0].row, ids, starts, [reply.slot for reply in replies])

    def _sample(self, replies: Sequence[Reply], logits_BV: Tensor, rows: RowSampling) -> None:
        """Draw a token for each reply, and end those that end with it."""
        drawn = sample(logits_BV, rows, [len(reply.ids) for reply in replies])
        self.reply_tokens += len(replies)
        ended: list[tuple[Reply, Reason]] = []
        for i, reply in enumerate(replies):
            if not math.isfinite(drawn.raw_logprobs[i]):
                ended.append((reply, "error"))
                continue
            top = drawn.top[i] if drawn.top is not None else ()
            reason = reply.take(drawn.ids[i], drawn.logprobs[i], drawn.raw_logprobs[i], top)
            if reply.stream.tokens:
                self._events.append((reply.stream, reply.token()))
            if reason is not None:
                ended.append((reply, reason))
        for reply, reason in ended:
            self._end(reply, reason, "the model's logits are not finite" if reason == "error" else None)

    def _end(self, reply: Reply, reason: Reason, error: str | None = None) -> None:
        """Free the reply's row and its hold on its version; the last event follows."""
        self._scheduler.end(reply, dirty=reason == "error")
        self._sampling = None
        self.ended[reason] += 1
        self._events.append((reply.stream, reply.finished(reason, error)))

    @contextmanager
    def _guarded(self, replies: Collection[Reply]) -> Iterator[None]:
        """Whatever the model or the device raises ends these replies, not the engine."""
        try:
            yield
        except Exception as error:
            repeated = str(error) == self._last_failure
            self._last_failure = str(error)
            _log.error("a forward of %d rows failed: %s", len(replies), error, exc_info=not repeated)
            for reply in [reply for reply in self._batch if reply in replies]:
                self._end(reply, "error", f"the model failed: {type(error).__name__}: {error}")

    def _heard(self) -> bool:
        """True when someone listens, token by token, to a reply that is being decoded."""
        return any(reply.stream.tokens for reply in self._batch.replies[: self._batch.decoding])

    def _deliver(self) -> None:
        """Give the step's events to their streams; a listener that fails ends its own reply."""
        events, self._events = self._events, []
        readers = []
        for stream, event in events:
            try:
                reader = stream.deliver(event)
            except Exception:  # a listener's own fault must not end the replies of others
                if not stream.cancelled:
                    _log.exception("a listener failed; its reply is cancelled")
                self._scheduler.cancel(stream)
            else:
                if reader is not None:
                    readers.append(reader)
        wake(readers)


def _row_sampling(replies: Sequence[Reply], device: torch.device) -> RowSampling:
    return RowSampling([reply.sampling for reply in replies], [reply.seed for reply in replies], device)
