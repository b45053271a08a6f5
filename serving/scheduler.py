"""Who waits, who runs, and in which version: the waiting line, the batch of running replies, and the version table.

The lock guards what other threads touch as well (the line and the table); the batch belongs to whoever makes the steps.
"""

from __future__ import annotations

import math
import random
import threading
import time

from serving.batch import Batch
from serving.chat import Chat
from serving.kv import KeyValueRows
from serving.prefix import PrefixCache
from serving.queueing import FairQueue, QueueFull
from serving.reply import Reply
from serving.stream import Stream
from serving.versions import Versions


class Scheduler:
    """Binds each request to a version and a row, and frees both when its reply ends."""

    def __init__(
        self,
        kv: KeyValueRows,
        prefixes: PrefixCache,
        chat: Chat,
        versions: Versions,
        max_waiting: int,
        seed: int | None,
    ) -> None:
        """`max_waiting`: requests in line before QueueFull. `seed`: of the seeds for requests without one."""
        self.batch = Batch(kv, prefixes)
        self.versions = versions
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        """Notified when there is something to do."""
        self.closed = False
        self._chat, self._rows, self._max_len = chat, kv.rows, kv.length
        self._line = FairQueue(max_waiting)
        self._seeds = random.Random(seed)
        self._some_cancelled = False
        self._earliest_deadline = math.inf

    @property
    def waiting(self) -> int:
        return len(self._line)

    def submit(self, stream: Stream, *, bounded: bool) -> None:
        """Put a request into the line. A version asked for by name is held from now on.

        Raises UnknownVersion, and QueueFull unless not `bounded`.
        """
        request = stream.request
        with self.work:
            if self.closed:
                raise QueueFull("the engine is closed")
            if request.version is not None:
                self.versions.check(request.version)
            self._line.push(stream, bounded=bounded)
            if request.version is not None:
                self.versions.refer(request.version)
            if request.deadline is not None:
                self._earliest_deadline = min(self._earliest_deadline, request.deadline)
            self.work.notify()

    def cancel(self, stream: Stream) -> None:
        with self.work:
            stream.cancelled = self._some_cancelled = True
            self.work.notify()

    def admit(self) -> None:
        """Give free rows to those who wait, callers taking turns; here a version binds."""
        joined: list[Reply] = []
        with self.lock:
            while len(self._line) and len(self.batch) + len(joined) < self._rows:
                joined.append(self._bind(self._line.pop()))
        # versions together, so that tokens of one slot are multiplied together; then like lengths: less padding
        for reply in sorted(joined, key=lambda reply: (reply.slot, len(reply.prompt_ids))):
            reply.stream.admitted_at = time.monotonic()
            self.batch.join(reply)

    def unwanted(self) -> list[tuple[Reply, str]]:
        """The replies that were cancelled or are too late, each with the reason; those in line have left it."""
        now = time.monotonic()
        with self.lock:
            if not self._some_cancelled and now < self._earliest_deadline:
                return []
            self._some_cancelled = False
            waiting = self._leave_the_line([stream for stream in self._line if _why_unwanted(stream, now)])
            found = [(reply, _why_unwanted(reply.stream, now)) for reply in (*waiting, *self.batch)]
            left = [*self._line, *(reply.stream for reply, why in found if why is None)]
            deadlines = [stream.request.deadline for stream in left if stream.request.deadline is not None]
            self._earliest_deadline = min(deadlines, default=math.inf)
        return [(reply, why) for reply, why in found if why is not None]

    def everyone(self) -> list[Reply]:
        """All replies; those in line have left it."""
        with self.lock:
            return [*self._leave_the_line(list(self._line)), *self.batch]

    def end(self, reply: Reply, *, dirty: bool) -> None:
        """The reply leaves its row, if it has one, and its version. `dirty`: its row may hold anything anywhere."""
        if reply.admitted:
            self.batch.leave(reply, dirty=dirty)
        with self.lock:
            self.versions.drop(reply.version)

    def _bind(self, stream: Stream) -> Reply:
        """Fix the version that will speak, for good. Needs the lock."""
        version = stream.request.version
        if version is None:
            version = self.versions.current
            self.versions.refer(version)
        stream.version = version
        seed = stream.request.sampling.seed
        if seed is None:
            seed = self._seeds.getrandbits(64)
        slot, uid = self.versions.slot_of(version), self.versions.uid_of(version)
        return Reply(stream, version, slot, uid, seed, self._chat, self._max_len)

    def _leave_the_line(self, streams: list[Stream]) -> list[Reply]:
        self._line.remove(streams)
        return [self._bind(stream) for stream in streams]


def _why_unwanted(stream: Stream, now: float) -> str | None:
    """Why nobody wants the rest of this reply; None when somebody does."""
    if stream.cancelled:
        return "cancelled"
    deadline = stream.request.deadline
    return "the deadline passed" if deadline is not None and now >= deadline else None
