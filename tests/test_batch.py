"""The batch: rows stay packed, and every reply finds its own keys and values wherever its row has moved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.batch import Batch
from serving.kv import KeyValueRows, LayerShape
from serving.prefix import PrefixCache
from serving.reply import Reply
from serving.sampling import Sampling
from serving.stream import Request, Stream
from tests import bases

CHAT = bases.chat()
ROWS, LENGTH = 5, 24


def a_batch() -> Batch:
    shapes = [LayerShape(1, 2, 2, None), LayerShape(1, 2, 3, None)]
    kv = KeyValueRows(shapes, ROWS, LENGTH, torch.float32, torch.device("cpu"))
    return Batch(kv, PrefixCache(kv, 0))


def a_reply(prompt_ids: tuple[int, ...], version: int = 0) -> Reply:
    stream = Stream(Request(prompt_ids, Sampling(max_tokens=20)), None, tokens=False, drive=lambda: False)
    return Reply(stream, version, -1, version, 0, CHAT, LENGTH)


def write(batch: Batch, reply: Reply, ids: tuple[int, ...]) -> None:
    """Keys that tell whose prompt they belong to and where they stand."""
    start = reply.used
    places = torch.arange(start, start + len(ids))[None]
    batch._kv.aim(reply.row, places, start + len(ids))
    for layer in range(2):
        width = batch._kv.layers[layer].values.shape[-1]
        numbers = torch.tensor(ids, dtype=torch.float32)[None, None, :, None]
        batch._kv.update(numbers.expand(1, 1, -1, 2), -numbers.expand(1, 1, -1, width), layer)


def read(batch: Batch, row: int) -> list[float]:
    keys, values = batch._kv.layers[0].keys, batch._kv.layers[1].values
    assert torch.equal(keys[row, 0, :LENGTH, 0], -values[row, 0, :LENGTH, 0])
    numbers: list[float] = keys[row, 0, :LENGTH, 0].tolist()
    return numbers


def check(batch: Batch) -> None:
    assert [reply.row for reply in batch.replies] == list(range(len(batch.replies)))
    for reply in batch.replies:
        known = [*reply.prompt_ids[: reply.prefilled], *reply.ids[:-1]]
        assert len(known) == reply.used
        assert read(batch, reply.row) == known + [0] * (LENGTH - len(known))
    for row in range(len(batch.replies), ROWS):
        assert read(batch, row) == [0] * LENGTH
    assert all(follower.row < 0 for reply in batch.replies for follower in reply.followers)
    assert len(batch) == len(list(batch)) <= ROWS


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_reply_keeps_its_own_keys(data: st.DataObject):
    batch = a_batch()
    batch._kv.aim(0, torch.tensor([[0]]), LENGTH)  # blank memory
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["join", "join", "read", "decode", "decode", "leave"]))
        if action == "join" and len(batch) < ROWS:
            prompt = data.draw(st.sampled_from([(1, 2, 3), (1, 2, 3), (4, 5, 6, 7, 8, 9), (10,)]))
            batch.join(a_reply(prompt, version=data.draw(st.integers(0, 1))))
        elif action == "read":
            pieces = batch.next_pieces(data.draw(st.integers(1, 12)), padded=data.draw(st.booleans()))
            for reply, count in pieces:
                write(batch, reply, reply.prompt_ids[reply.prefilled :][:count])
                reply.prefilled += count
            for reply, _ in pieces:
                if not reply.left_to_read:
                    for one in batch.start_decoding(reply):
                        one.take(20 + len(one.ids), 0.0, 0.0, ())
        elif action == "decode":
            for reply in batch.replies[: batch.decoding]:
                if reply.used < LENGTH - 1:
                    write(batch, reply, tuple(reply.ids[-1:]))
                    reply.take(20 + len(reply.ids), 0.0, 0.0, ())
        elif action == "leave" and len(batch):
            batch.leave(data.draw(st.sampled_from(list(batch))), dirty=data.draw(st.booleans()))
        check(batch)
    for reply in list(batch):
        batch.leave(reply)
    check(batch)
    assert len(batch) == 0


def test_pieces_share_a_step_by_their_padded_size():
    batch = a_batch()
    for length in (3, 4, 9):
        batch.join(a_reply(tuple(range(length))))
    counts = {share: [count for _, count in batch.next_pieces(share, padded=True)] for share in (2, 12, 30)}
    assert counts == {2: [2], 12: [3, 4], 30: [3, 4, 9]}


def test_pieces_that_are_not_padded_fill_a_step():
    batch = a_batch()
    for length in (3, 4, 9):
        batch.join(a_reply(tuple(range(length))))
    counts = {share: [count for _, count in batch.next_pieces(share, padded=False)] for share in (2, 3, 9, 30)}
    assert counts == {2: [2], 3: [3], 9: [3, 4, 2], 30: [3, 4, 9]}


def test_a_long_prompt_leaves_half_of_each_step_to_those_behind_it():
    batch = a_batch()
    for length in (12, 3):
        batch.join(a_reply(tuple(range(length))))
    counts = {share: [count for _, count in batch.next_pieces(share, padded=False)] for share in (1, 2, 3)}
    assert counts == {1: [1], 2: [1, 1], 3: [3]}
    batch.leave(batch.replies[1])
    assert [count for _, count in batch.next_pieces(2, padded=False)] == [2], "nobody is behind it"


def test_a_dirty_row_is_wiped_to_its_end():
    batch = a_batch()
    reply = a_reply((1, 2, 3))
    batch.join(reply)
    batch._kv.aim(0, torch.tensor([[0]]), LENGTH)
    batch._kv.layers[0].keys[0, :, :LENGTH].fill_(torch.nan)
    batch.leave(reply, dirty=True)
    assert batch._kv.layers[0].keys[0, :, :LENGTH].tolist() == [[[0.0, 0.0]] * LENGTH]


@pytest.mark.parametrize("other", [{"version": 1}, {"prompt_ids": (1, 2, 4)}])
def test_only_the_same_prompt_and_version_is_read_together(other: dict[str, object]):
    batch = a_batch()
    batch.join(a_reply((1, 2, 3)))
    batch.join(a_reply((1, 2, 3)))
    batch.join(a_reply(**({"prompt_ids": (1, 2, 3)} | other)))  # type: ignore[arg-type]
    assert (len(batch.replies), len(batch)) == (2, 3)
