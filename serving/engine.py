"""The engine: submit → schedule → step → stream.

`submit` puts a request into the line. Each step admits those for whom there is a row, and binds their version; reads a
piece of the prompts that are new; samples one more token for every other running reply (once all prompts are read, where
nobody listens token by token); and hands the tokens to their streams. Requests join and leave between any two steps,
whatever version they speak. Versions are probed and activated between two steps as well (serving/swap.py asks for it), so
that no reply ever mixes two.

With `start()` the steps run in a thread of the engine's own; without it, `generate()` and `result()` make them where
they are called. So the learner makes its rollouts (learner/rollouts.py), with an engine of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress

import torch
from torch import Tensor
from transformers import PreTrainedModel

from serving.backend import EngineStats, PromptTooLong
from serving.chat import Chat
from serving.commands import Commands
from serving.forward import Forward
from serving.lora import AdapterWeights, Slots, target_modules
from serving.model import ModelError, fingerprint, load_model, twin
from serving.native import Native, one_thread
from serving.prefix import PrefixCache
from serving.queueing import QueueFull
from serving.sampling import Sampling
from serving.scheduler import Scheduler
from serving.steps import Steps
from serving.stream import Event, Finished, Reason, Request, Stream, Token
from serving.versions import NoFreeSlot, ProbeFailed, UnknownVersion, VersionInUse, Versions

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
    "VersionInUse",
    "fingerprint",
    "load_model",
    "twin",
]

WARMED = 8
"""Beginnings of prompts that a version reads before it becomes the current one, at most."""

_log = logging.getLogger(__name__)


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
        packed: bool = False,
        native: bool = True,
        prefix_tokens: int = 0,
    ) -> None:
        """`rows` replies at once of up to `max_len` ids, prompt included; `slots` adapters of up to `rank` beside them.

        `targets`: modules that may carry an adapter, by default all linear layers but the head. `seed` makes the
        replies to requests without a seed repeatable. `native`: use the compiled step (serving/native.py) where there
        is one for this model and machine. `packed`: where there is none, lay the weights of all linear layers out for fast
        products, which on a CPU takes as much memory again. `prefix_tokens`: how many to remember of earlier prompts and replies.
        Raises ModelError for an architecture that cannot be served.
        """
        self.model, self.chat = model, chat
        self.rows, self.max_len, self.max_waiting = rows, max_len, max_waiting
        targets = target_modules(model) if targets is None else targets
        library = Native.library(model, targets) if native else None
        self._slots = Slots(model, targets, slots, rank, packed=packed and library is None)
        self._forward = Forward(model, self._slots, rows, max_len, library)
        with torch.inference_mode():
            self._forward.check()
        self._versions = Versions(slots)
        self._prefixes = PrefixCache(self._forward.kv, prefix_tokens)
        self._scheduler = Scheduler(self._forward.kv, self._prefixes, chat, self._versions, max_waiting, seed)
        self._batch = self._scheduler.batch
        self._steps = Steps(self._forward, self._scheduler)
        self._thread: threading.Thread | None = None
        self._stepping = threading.RLock()
        self._staging = threading.Lock()
        self._commands = Commands(self._stepping, self._scheduler.work)

    @property
    def vocab_size(self) -> int:
        """How many tokens the model tells apart; the tokenizer may know fewer or more."""
        head: Tensor = self.model.get_output_embeddings().weight
        return len(head)

    @property
    def way(self) -> str:
        """What computes the forwards, in words."""
        return self._forward.way

    @property
    def copied_bytes(self) -> int:
        """Memory of the weights that were laid out once more."""
        return self._slots.copied_bytes

    # Submit.

    def submit(
        self, request: Request, on_event: Callable[[Event], None] | None = None, *, tokens: bool = True
    ) -> Stream:
        """As Backend. `on_event` is called from the engine's thread."""
        return self._submit(request, on_event, tokens=tokens, bounded=True)

    def cancel(self, stream: Stream) -> None:
        """As Backend."""
        self._scheduler.cancel(stream)

    def generate(self, requests: Sequence[Request]) -> list[Finished]:
        """Whole replies in the order of the requests, of which there may be more than the line holds."""
        streams = [self._submit(request, None, tokens=False, bounded=False) for request in requests]
        with one_thread() if self._forward.native else nullcontext():
            return [stream.result() for stream in streams]

    def _submit(
        self, request: Request, on_event: Callable[[Event], None] | None, *, tokens: bool, bounded: bool
    ) -> Stream:
        length = len(request.prompt_ids)
        if not 0 < length < self.max_len:
            allowed = f"1 to {self.max_len - 1}, so that one more fits"
            raise PromptTooLong(f"the prompt has {length} tokens; allowed: {allowed}")
        if any(token >= self.vocab_size for token, _ in request.sampling.bias):
            raise ValueError(f"a bias names a token that is not among the model's {self.vocab_size}")
        stream = Stream(request, on_event, tokens, self._drive)
        self._scheduler.submit(stream, bounded=bounded)
        return stream

    # Step.

    def step(self) -> bool:
        """One step by hand, for an engine without a thread; False when nothing is left to do."""
        with self._stepping:
            self._commands.run()
            self._steps.take()
            return bool(len(self._batch) or self._scheduler.waiting)

    # Versions: stage → activate → retire.

    @property
    def current(self) -> int:
        """As Backend."""
        return self._versions.current

    def loaded(self) -> dict[int, int]:
        """As Backend."""
        with self._scheduler.lock:
            return self._versions.loaded()

    def stage(self, version: int, weights: AdapterWeights, timeout: float | None = 60.0) -> None:
        """As Backend."""
        with self._staging:
            with self._scheduler.lock:
                if self._versions.keep(version):
                    return
                slot = self._versions.reserve()
            try:
                self._slots.write(slot, weights)  # while steps go on: what no row has chosen adds nothing
                self._between_steps(lambda: self._probe(version, slot), timeout)
            except BaseException:
                self._slots.clear(slot)
                with self._scheduler.lock:
                    self._versions.release(slot)
                raise
            with self._scheduler.lock:
                self._versions.add(version, slot)

    def restage(self, version: int, weights: AdapterWeights, timeout: float | None = 60.0) -> None:
        """Put new weights in the place of a loaded version on which no reply runs; stage it if it is not loaded.

        Raises VersionInUse, ValueError for the base, and what `stage` raises; when the new weights fail, the version is gone.
        """
        if version == 0:
            raise ValueError("version v0 is the base, which has no adapter; give this one a number from 1")
        if version in self.loaded():
            with self._staging:
                self._between_steps(lambda: self._replace(version, weights), timeout)
        else:
            self.stage(version, weights, timeout)

    def activate(self, version: int, timeout: float | None = 60.0) -> None:
        """As Backend."""

        def flip() -> None:
            with self._scheduler.lock:
                self._versions.activate(version)

        self._between_steps(flip, timeout)

    def warm(self, version: int, timeout: float = 5.0) -> None:
        """As Backend."""
        hottest: list[tuple[int, ...]] = []
        uid, until = self._versions.uid_of(self.current), time.monotonic() + timeout
        with suppress(TimeoutError):  # a step that takes so long leaves no time to warm anything
            self._between_steps(lambda: hottest.extend(self._prefixes.hottest(uid, WARMED)), timeout)
        sampling = Sampling(temperature=0, max_tokens=1, seed=0)
        for ids in hottest:
            if time.monotonic() >= until:
                return
            request = Request(ids[: self.max_len - 1], sampling, version, deadline=until)
            self._submit(request, None, tokens=False, bounded=False).result()

    def retire(self, version: int) -> None:
        """As Backend."""
        with self._scheduler.lock:
            self._versions.retire(version)

    def _replace(self, version: int, weights: AdapterWeights) -> None:
        with self._scheduler.lock:
            slot = self._versions.unused_slot(version)
        try:
            self._slots.write(slot, weights)
            self._probe(version, slot)
            self._versions.changed(version)
        except BaseException:
            self._slots.clear(slot)
            with self._scheduler.lock:
                self._versions.remove(version)
            raise

    def _probe(self, version: int, slot: int) -> None:
        with torch.inference_mode():
            finite = self._forward.probe(slot, range(min(8, self.max_len, self.chat.vocab_size)))
        if not finite:
            raise ProbeFailed(f"a forward with version v{version} gives numbers that are not finite.")

    def _between_steps(self, command: Callable[[], None], timeout: float | None) -> None:
        self._commands.between_steps(command, self._thread, timeout)

    # The thread.

    def start(self) -> None:
        """Make the steps in a thread of the engine's own, until `close`."""
        threads, begun = torch.get_num_threads(), threading.Event()
        given = 1 if self._forward.native else threads, begun
        self._thread = threading.Thread(target=self._work, args=given, name="engine", daemon=True)
        self._thread.start()
        begun.wait()
        torch.set_num_threads(threads)  # what threads that come later begin with

    def close(self) -> None:
        """Stop; replies that have not ended are aborted. The model gets its own forwards back."""
        with self._scheduler.work:
            if self._scheduler.closed:
                return
            self._scheduler.closed = True
            self._scheduler.work.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end_all("abort", "the engine was closed")
        with self._stepping:  # a command may have come since
            self._slots.remove()
            self._forward.close()

    def stats(self) -> EngineStats:
        """As Backend."""
        return EngineStats(
            running=len(self._batch),
            waiting=self._scheduler.waiting,
            rows=self.rows,
            kv_used=sum(reply.used for reply in self._batch.replies.copy()),
            kv_capacity=self.rows * self.max_len,
            slots=self._versions.slots,
            free_slots=self._versions.free,
            steps=self._steps.taken,
            prompt_tokens=self._steps.prompt_tokens,
            prefix_tokens=self._batch.found,
            reply_tokens=self._steps.reply_tokens,
            ended=dict(self._steps.ended),
        )

    def _work(self, threads: int, begun: threading.Event) -> None:
        """Step while there is something to do, wait while there is not; torch works with so many threads."""
        torch.set_num_threads(threads)
        begun.set()
        scheduler = self._scheduler
        while True:
            with scheduler.work:
                while not (scheduler.closed or len(self._commands) or scheduler.waiting or len(self._batch)):
                    scheduler.work.wait()
                if scheduler.closed:
                    return
            try:
                self.step()
            except Exception as error:  # the one place that owns this thread: it must never die unseen
                _log.exception("a step failed; all replies are ended")
                self._end_all("error", f"the engine failed: {type(error).__name__}: {error}")

    def _end_all(self, reason: Reason, why: str) -> None:
        with self._stepping:
            self._commands.run()
            self._steps.end_all(reason, why)

    def _drive(self) -> bool:
        """A step for someone who waits for a result; False when the engine makes its steps itself, or is closed."""
        if self._thread is not None or self._scheduler.closed:
            return False
        self.step()
        return True
