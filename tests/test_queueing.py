"""The waiting line: bounded, callers in turn, each caller's own order kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.queueing import FairQueue, QueueFull
from serving.stream import Request, Stream


def a_stream(caller: str) -> Stream:
    return Stream(Request((1,), caller=caller), None, tokens=False, drive=lambda: False)


@given(callers=st.lists(st.sampled_from("abcd"), max_size=30))
def test_callers_take_turns_and_keep_their_order(callers: list[str]):
    line = FairQueue(most=30)
    streams = [a_stream(caller) for caller in callers]
    for stream in streams:
        line.push(stream)
    popped = [line.pop() for _ in streams]
    assert len(line) == 0
    for caller in "abcd":
        own = [stream for stream in streams if stream.request.caller == caller]
        assert [stream for stream in popped if stream.request.caller == caller] == own
    left = {caller: callers.count(caller) for caller in set(callers)}
    for i, stream in enumerate(popped):  # between two turns of a caller, everyone else who waits has had one
        caller = stream.request.caller
        left[caller] -= 1
        waiting = {name for name, count in left.items() if count and name != caller}
        if left[caller]:
            following = [later.request.caller for later in popped[i + 1 :]]
            assert waiting <= set(following[: following.index(caller)])


def test_the_line_is_bounded_unless_asked_otherwise():
    line = FairQueue(most=1)
    line.push(a_stream("a"))
    with pytest.raises(QueueFull, match="1 requests wait already; allowed: 1"):
        line.push(a_stream("b"))
    line.push(a_stream("b"), bounded=False)
    assert len(line) == 2


def test_who_leaves_the_line_is_forgotten():
    line = FairQueue(most=9)
    streams = [a_stream(caller) for caller in "aab"]
    for stream in streams:
        line.push(stream)
    line.remove([streams[0], streams[2]])
    assert (len(line), list(line)) == (1, [streams[1]])
    assert line.pop() is streams[1]
    with pytest.raises(IndexError):
        line.pop()
