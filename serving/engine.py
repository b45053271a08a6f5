"""The engine: submit → schedule → step → stream.

`submit` puts a request into the waiting line. Each step admits those for whom there is a row (here a reply's version binds),
reads a piece of the prompts that are new, samples one more token for every other running reply, and hands the tokens to
their streams. Requests join and leave between any two steps, whatever version they speak. Probing and activating a version
also happen between two steps, so that no reply ever mixes two.

With `start()` the steps run in a thread of the engine's own; without it, `generate()` or `result()` make them where they are
called.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from serving.batch import Batch
from serving.chat import Chat
from serving.forward import Forward
from serving.kv import UnsupportedModel
from serving.lora import AdapterWeights, Slots, target_modules
from serving.model import ModelError, fingerprint, load_model, twin
from serving.queueing import FairQueue, QueueFull
from serving.reply import Reply
from serving.sampling import RowSampling, Sampling, sample
from serving.stream import Event, Finished, Reason, Request, Stream, Token, wake
from serving.versions import NoFreeSlot, UnknownVersion, VersionInUse, Versions

__all__ = [
    "AdapterWeights",
    "Engine",
    "EngineStats",
    "Event",
    "Finished",
    "ModelError",
    "NoFreeSlot",
    "ProbeFailed",
    "PromptTooLong",
    "QueueFull",
    "Request",
    "Sampling",
    "Stream",
    "Token",
    "UnknownVersion",
    "UnsupportedModel",
    "VersionInUse",
    "fingerprint",
    "load_model",
    "twin",
]

PROMPT_TOKENS_A_STEP = 512
"""Prompt tokens read in one step while someone listens to running replies: what an arrival may delay them by."""
PROMPT_TOKENS_A_STEP_UNHEARD = 2048
"""The same while nobody listens token by token."""

_log = logging.getLogger(__name__)


class PromptTooLong(ValueError):
    """The prompt leaves no room for a reply, or is empty."""


class ProbeFailed(RuntimeError):
    """A forward with the adapter did not give finite numbers."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at a moment, and totals since it was made."""

    running: int
    waiting: int
    rows: int
    kv_used: int
    """Positions that hold keys and values, of `kv_capacity`."""
    kv_capacity: int
    steps: int
    prompt_tokens: int
    reply_tokens: int
    ended: dict[str, int]
    """Replies by the reason they ended with."""


class Engine:
    """Replies by continuous batching over key/value rows, with several adapter versions side by side."""

    def __init__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        *,
        rows: int = 32,
        max_len: int,
        slots: int = 4,
        rank: int = 16,
        max_waiting: int = 256,
        targets: Collection[str] | None = None,
        seed: int | None = None,
    ) -> None:
        """`rows` replies at once of up to `max_len` ids, prompt included; `slots` adapters of up to `rank` beside the base.

        `targets`: modules that may carry an adapter, by default all linear layers but the head. `seed` makes the replies to
        requests without a seed repeatable. Raises UnsupportedModel.
        """
        self.model, self.chat = model, chat
        self.rows, self.max_len, self.max_waiting = rows, max_len, max_waiting
        self._slots = Slots(model, target_modules(model) if targets is None else targets, slots, rank)
        self._forward = Forward(model, self._slots, rows, max_len)
        self._versions = Versions(slots)
        self._batch = Batch(self._forward.kv)
        self._sampling: RowSampling | None = None
        """Of the replies that decode; None once these have changed."""
        self._seeds = random.Random(seed)
        self._events: list[tuple[Stream, Event]] = []
        self._some_cancelled = False
        self._earliest_deadline = math.inf
        self._steps = self._prompt_tokens = self._reply_tokens = 0
        self._ended: Counter[str] = Counter()
        # the lock guards what other threads touch as well: the line, the commands, the versions
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._waiting = FairQueue(max_waiting)
        self._commands: deque[Callable[[], None]] = deque()
        self._stepping = threading.RLock()
        self._staging = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    # Submit.

    def submit(
        self, request: Request, on_event: Callable[[Event], None] | None = None, *, tokens: bool = True
    ) -> Stream:
        """Put a request into the line. `on_event` gets each event in the engine's thread; with `tokens=False` only the last.

        Raises QueueFull, PromptTooLong, UnknownVersion.
        """
        return self._submit(request, on_event, tokens=tokens, bounded=True)

    def cancel(self, stream: Stream) -> None:
        """End a reply with what it has, before the next step; nothing happens if it has ended already."""
        with self._work:
            stream.cancelled = self._some_cancelled = True
            self._work.notify()

    def generate(self, requests: Sequence[Request]) -> list[Finished]:
        """Whole replies in the order of the requests, of which there may be more than the line holds."""
        streams = [self._submit(request, None, tokens=False, bounded=False) for request in requests]
        return [stream.result() for stream in streams]

    def _submit(
        self, request: Request, on_event: Callable[[Event], None] | None, *, tokens: bool, bounded: bool
    ) -> Stream:
        length = len(request.prompt_ids)
        if not 0 < length < self.max_len:
            raise PromptTooLong(
                f"the prompt has {length} tokens; allowed: 1 to {self.max_len - 1}, so that one more fits; shorten it"
            )
        stream = Stream(request, on_event, tokens, self._drive)
        with self._work:
            if self._closed:
                raise QueueFull("the engine is closed")
            if request.version is not None:
                self._versions.check(request.version)
            self._waiting.push(stream, bounded=bounded)
            if request.version is not None:
                self._versions.refer(request.version)
            if request.deadline is not None:
                self._earliest_deadline = min(self._earliest_deadline, request.deadline)
            self._work.notify()
        return stream

    # Schedule: who gets a row, and who must go.

    def step(self) -> bool:
        """One step by hand, for an engine without a thread; False when nothing is left to do."""
        with self._stepping, torch.inference_mode():
            self._run_commands()
            self._drop_unwanted()
            self._admit()
            self._read_prompts()
            self._decode()
            self._steps += 1
        self._deliver()
        return bool(len(self._batch) or len(self._waiting))

    def _drop_unwanted(self) -> None:
        """End what was cancelled or is too late, waiting or running."""
        now = time.monotonic()
        with self._lock:
            if not self._some_cancelled and now < self._earliest_deadline:
                return
            self._some_cancelled = False
            waiting = [stream for stream in self._waiting if _unwanted(stream, now)]
            self._waiting.remove(waiting)
            never_admitted = [self._bind(stream) for stream in waiting]
        for reply in never_admitted:
            self._conclude(reply, "abort", _unwanted(reply.stream, now))
        for reply in [reply for reply in self._batch if _unwanted(reply.stream, now)]:
            self._end(reply, "abort", _unwanted(reply.stream, now))
        with self._lock:
            left = [*self._waiting, *(reply.stream for reply in self._batch)]
            deadlines = (stream.request.deadline for stream in left)
            self._earliest_deadline = min((d for d in deadlines if d is not None), default=math.inf)

    def _admit(self) -> None:
        """Give free rows to those who wait, callers taking turns."""
        joined = []
        with self._lock:
            while len(self._waiting) and len(self._batch) + len(joined) < self.rows:
                joined.append(self._bind(self._waiting.pop()))
        for reply in sorted(joined, key=lambda reply: len(reply.prompt_ids)):  # like lengths together: less padding
            reply.stream.admitted_at = time.monotonic()
            self._batch.join(reply)

    def _bind(self, stream: Stream) -> Reply:
        """Fix the version that will speak, for good. Needs the lock."""
        version = stream.request.version
        if version is None:
            version = self._versions.current
            self._versions.refer(version)
        stream.version = version
        seed = stream.request.sampling.seed
        if seed is None:
            seed = self._seeds.getrandbits(64)
        return Reply(stream, version, self._versions.slot_of(version), seed, self.chat, self.max_len)

    def _end(self, reply: Reply, reason: Reason, error: str | None = None) -> None:
        """The reply leaves its row, whatever it came to."""
        self._batch.leave(reply, dirty=reason == "error")
        self._sampling = None
        self._conclude(reply, reason, error)

    def _conclude(self, reply: Reply, reason: Reason, error: str | None) -> None:
        with self._lock:
            self._versions.drop(reply.version)
        self._ended[reason] += 1
        self._events.append((reply.stream, reply.finished(reason, error)))

    # Step: read prompts, sample tokens.

    def _read_prompts(self) -> None:
        """Read a piece of the new prompts; those that are whole get their first token."""
        replies, width = self._next_pieces()
        if not replies:
            return
        pieces = [reply.prompt_ids[reply.prefilled : reply.prefilled + width] for reply in replies]
        logits_BV = self._run(replies, pieces, [reply.prefilled for reply in replies])
        if logits_BV is None:
            return
        chosen, first = [], []
        for i, (reply, piece) in enumerate(zip(replies, pieces, strict=True)):
            reply.prefilled += len(piece)
            self._prompt_tokens += len(piece)
            if not reply.left_to_read:
                started = self._batch.start_decoding(reply)
                first += started
                chosen += [i] * len(started)
        if first:
            self._sampling = None
            self._sample(first, logits_BV[chosen], _row_sampling(first, logits_BV))

    def _next_pieces(self) -> tuple[list[Reply], int]:
        """The replies whose prompts to read from now, and how many ids of each at most: padded, they fill one step's share."""
        share = PROMPT_TOKENS_A_STEP if self._heard() else PROMPT_TOKENS_A_STEP_UNHEARD
        chosen: list[Reply] = []
        width = 0
        for reply in self._batch.reading:
            wider = max(width, min(reply.left_to_read, share))
            if wider * (len(chosen) + 1) > share:
                break
            chosen.append(reply)
            width = wider
        return chosen, width

    def _decode(self) -> None:
        """One more token for every reply whose prompt is read."""
        replies = self._batch.replies[: self._batch.decoding]
        if self._batch.reading and not self._heard():
            return  # all prompts first: then every step is a full one
        logits_BV = self._run(replies, [reply.ids[-1:] for reply in replies], [reply.used for reply in replies])
        if logits_BV is not None:
            if self._sampling is None:
                self._sampling = _row_sampling(replies, logits_BV)
            self._sample(replies, logits_BV, self._sampling)

    def _heard(self) -> bool:
        """True when someone listens, token by token, to a reply that is being decoded."""
        return any(reply.stream.tokens for reply in self._batch.replies[: self._batch.decoding])

    def _run(self, replies: Sequence[Reply], ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor | None:
        """Logits after the last id of each reply, logits_BV; None when the forward failed, and the replies with it."""
        if not replies:
            return None
        try:
            return self._forward.run(replies[0].row, ids, starts, [reply.slot for reply in replies])
        except Exception as error:  # whatever the model or the device raises ends these replies, not the engine
            _log.exception("a forward of %d rows failed", len(replies))
            for reply in replies:
                for one in (*reply.followers, reply):
                    self._end(one, "error", f"the model failed: {type(error).__name__}: {error}")
            return None

    def _sample(self, replies: Sequence[Reply], logits_BV: Tensor, rows: RowSampling) -> None:
        """Draw a token for each reply and hand it on."""
        drawn = sample(logits_BV, rows, [len(reply.ids) for reply in replies])
        self._reply_tokens += len(replies)
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

    # Stream: hand the events over.

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
                self.cancel(stream)
            else:
                if reader is not None:
                    readers.append(reader)
        wake(readers)

    # Versions.

    @property
    def current(self) -> int:
        """The version of requests that name none."""
        return self._versions.current

    def loaded(self) -> dict[int, int]:
        """Version to the replies that run on it (or wait for it by name), 0 (the base) included."""
        with self._lock:
            return self._versions.loaded()

    def stage(self, version: int, weights: AdapterWeights, timeout: float | None = 60.0) -> None:
        """Copy an adapter into a free slot and probe it: from then on it may be activated or named.

        Nothing happens if the version is loaded already. Raises NoFreeSlot, ProbeFailed, ValueError for weights that do not
        fit, TimeoutError when no step ends in time.
        """
        with self._staging:
            if version in self.loaded():
                with self._lock:
                    self._versions.keep(version)
            else:
                self._stage(version, weights, timeout)

    def restage(self, version: int, weights: AdapterWeights, timeout: float | None = 60.0) -> None:
        """Put new weights in the place of a loaded version on which no reply runs; stage it if it is not loaded.

        Raises VersionInUse, and what `stage` raises; when the new weights fail the version is gone.
        """
        with self._staging:
            if version in self.loaded():
                self._between_steps(lambda: self._replace(version, weights), timeout)
            else:
                self._stage(version, weights, timeout)

    def activate(self, version: int, timeout: float | None = 60.0) -> None:
        """From now on admit requests that name no version to this one. Raises UnknownVersion, TimeoutError."""

        def flip() -> None:
            with self._lock:
                self._versions.activate(version)

        self._between_steps(flip, timeout)

    def retire(self, version: int) -> None:
        """Free the version's slot once its last reply has ended; new requests for it are refused.

        Nothing happens if it is not loaded. Raises ValueError for the base and the current version.
        """
        with self._lock:
            self._versions.retire(version)

    def _stage(self, version: int, weights: AdapterWeights, timeout: float | None) -> None:
        with self._lock:
            slot = self._versions.reserve()
        try:
            self._slots.write(slot, weights)  # while steps go on: no running row reads this slot
            self._between_steps(lambda: self._probe(version, slot), timeout)
        except BaseException:
            self._slots.clear(slot)
            with self._lock:
                self._versions.release(slot)
            raise
        with self._lock:
            self._versions.add(version, slot)

    def _replace(self, version: int, weights: AdapterWeights) -> None:
        with self._lock:
            slot = self._versions.unused_slot(version)
        try:
            self._slots.write(slot, weights)
            self._probe(version, slot)
        except BaseException:
            self._slots.clear(slot)
            with self._lock:
                self._versions.remove(version)
            raise

    def _probe(self, version: int, slot: int) -> None:
        with torch.inference_mode():
            finite = self._forward.probe(slot, range(min(8, self.max_len, self.chat.vocab_size)))
        if not finite:
            raise ProbeFailed(f"a forward with version v{version} gives numbers that are not finite; it is not served")

    # The thread, and what it does between steps for others.

    def start(self) -> None:
        """Make the steps in a thread of the engine's own, until `close`."""
        self._thread = threading.Thread(target=self._work_until_closed, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; replies that have not ended are aborted. The model gets its own forwards back."""
        with self._work:
            if self._closed:
                return
            self._closed = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end_all("abort", "the engine was closed")
        self._slots.remove()

    def stats(self) -> EngineStats:
        """Numbers for metrics; cheap, and of a moment between or within steps."""
        replies = self._batch.replies.copy()
        return EngineStats(
            running=len(self._batch),
            waiting=len(self._waiting),
            rows=self.rows,
            kv_used=sum(reply.used for reply in replies),
            kv_capacity=self.rows * self.max_len,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            reply_tokens=self._reply_tokens,
            ended=dict(self._ended),
        )

    def _work_until_closed(self) -> None:
        while True:
            with self._work:
                while not (self._closed or self._commands or len(self._waiting) or len(self._batch)):
                    self._work.wait()
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:  # the one place that owns the thread: it must never die unseen
                _log.exception("a step failed; all replies are ended")
                self._end_all("error", f"the engine failed: {type(error).__name__}: {error}")

    def _end_all(self, reason: Reason, why: str) -> None:
        with self._stepping:
            self._run_commands()
            with self._lock:
                waiting = list(self._waiting)
                self._waiting.remove(waiting)
                never_admitted = [self._bind(stream) for stream in waiting]
            for reply in never_admitted:
                self._conclude(reply, reason, why)
            for reply in list(self._batch):
                self._end(reply, reason, why)
        self._deliver()

    def _drive(self) -> bool:
        """A step for someone who waits for a result; False when the engine makes its steps itself."""
        if self._thread is not None or self._closed:
            return False
        self.step()
        return True

    def _between_steps(self, command: Callable[[], None], timeout: float | None) -> None:
        """Have a command run between two steps by whoever makes them, and wait for it. Its errors rise here."""
        done: Future[None] = Future()

        def run() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(command())
                except BaseException as error:
                    done.set_exception(error)

        with self._work:
            self._commands.append(run)
            self._work.notify()
        while self._thread is None and not done.done():
            if self._stepping.acquire(timeout=0.05):  # else whoever holds it runs the command
                try:
                    self._run_commands()
                finally:
                    self._stepping.release()
        try:
            done.result(timeout)
        except TimeoutError:
            done.cancel()
            raise

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()


def _unwanted(stream: Stream, now: float) -> str | None:
    """Why nobody wants the rest of this reply; None when somebody does."""
    if stream.cancelled:
        return "cancelled"
    deadline = stream.request.deadline
    return "the deadline passed" if deadline is not None and now >= deadline else None


def _row_sampling(replies: Sequence[Reply], logits_BV: Tensor) -> RowSampling:
    return RowSampling([reply.sampling for reply in replies], [reply.seed for reply in replies], logits_BV.device)
