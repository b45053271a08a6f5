"""The waiting line: bounded, and fair between callers."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator

from serving.stream import Stream


class QueueFull(RuntimeError):
    """As many requests wait as are allowed to; try again later."""


class FairQueue:
    """Callers take turns; the requests of one caller keep their order. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_caller: OrderedDict[str, deque[Stream]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, stream: Stream, *, bounded: bool = True) -> None:
        """Raises QueueFull; never when not `bounded`."""
        if bounded and self._count >= self._most:
            raise QueueFull(f"{self._count} requests wait already; allowed: {self._most}. Try again later")
        self._by_caller.setdefault(stream.request.caller, deque()).append(stream)
        self._count += 1

    def pop(self) -> Stream:
        """The next request of the caller whose turn it is. Raises IndexError when nobody waits."""
        if not self._by_caller:
            raise IndexError("nobody waits")
        caller, waiting = next(iter(self._by_caller.items()))
        stream = waiting.popleft()
        self._count -= 1
        if waiting:
            self._by_caller.move_to_end(caller)
        else:
            del self._by_caller[caller]
        return stream

    def remove(self, streams: Collection[Stream]) -> None:
        """Take these out of the line."""
        gone = set(streams)
        for caller, waiting in list(self._by_caller.items()):
            kept = deque(stream for stream in waiting if stream not in gone)
            self._count -= len(waiting) - len(kept)
            if kept:
                self._by_caller[caller] = kept
            else:
                del self._by_caller[caller]

    def __iter__(self) -> Iterator[Stream]:
        for waiting in self._by_caller.values():
            yield from waiting
