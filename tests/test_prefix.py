"""The prefix cache: what is found, what gives way, and that versions never share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.kv import KeyValueRows, LayerShape
from serving.prefix import BLOCK, PrefixCache

LENGTH = 6 * BLOCK


class Rows:
    """Rows whose keys tell which version and ids they were made from: each is a hash of all ids up to it."""

    def __init__(self, blocks: int) -> None:
        shapes = [LayerShape(2, 3, 3, None), LayerShape(1, 3, 5, None)]
        self.kv = KeyValueRows(shapes, 2, LENGTH, torch.float32, torch.device("cpu"))
        self.cache = PrefixCache(self.kv, blocks * BLOCK)

    def expected(self, uid: int, ids: Sequence[int]) -> list[float]:
        return [float(hash((uid, *ids[: i + 1])) % 1000) for i in range(len(ids))]

    def read(self, row: int, uid: int, ids: Sequence[int]) -> int:
        """Fill a row from the cache, check that, write the rest as a forward would, remember it; what was found."""
        found = self.cache.fill(row, uid, ids)
        expected = self.expected(uid, ids)
        for layer in self.kv.layers:
            for memory in (layer.keys, layer.values):
                for head in range(memory.shape[1]):
                    assert memory[row, head, :found, -1].tolist() == expected[:found]
        self.kv.reach(len(ids))
        for layer in self.kv.layers:
            for memory in (layer.keys, layer.values):
                memory[row, :, found : len(ids)] = torch.tensor(expected[found:])[:, None]
        self.cache.keep(row, uid, ids)
        self.kv.wipe(row, len(ids))
        return found


def ids(*parts: int, more: int = 0) -> tuple[int, ...]:
    """A block of each number, and a few ids more."""
    return tuple(part for part in parts for _ in range(BLOCK)) + (99,) * more


def test_whole_blocks_that_were_read_before_are_found():
    rows = Rows(blocks=8)
    assert rows.read(0, 1, ids(1, 2, more=3)) == 0
    assert rows.read(1, 1, ids(1, 2, 3)) == 2 * BLOCK
    assert rows.read(0, 1, ids(1, 7)) == BLOCK
    assert rows.read(0, 1, ids(2, 1)) == 0  # the same blocks, in another order, are others


def test_one_id_is_always_left_to_read():
    rows = Rows(blocks=8)
    rows.read(0, 1, ids(1, 2))
    assert rows.read(0, 1, ids(1, 2)) == BLOCK
    assert rows.read(0, 1, ids(1, 2, more=1)) == 2 * BLOCK


def test_versions_never_share():
    rows = Rows(blocks=8)
    rows.read(0, 1, ids(1, 2))
    assert rows.read(0, 2, ids(1, 2)) == 0
    assert rows.read(0, 1, ids(1, 2, more=1)) == 2 * BLOCK


def test_the_least_recently_used_gives_way():
    rows = Rows(blocks=4)
    rows.read(0, 1, ids(1, 2))
    rows.read(0, 1, ids(3, 4))
    assert rows.read(0, 1, ids(1, 2, more=1)) == 2 * BLOCK  # used again
    rows.read(0, 1, ids(5))  # takes the place of block 4, since what follows goes before what it follows
    assert rows.read(0, 1, ids(3, 4, more=1)) == BLOCK
    assert rows.read(0, 1, ids(1, 2, more=1)) >= BLOCK


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_prompt_longer_than_the_memory(blocks: int):
    rows = Rows(blocks)
    for _ in range(3):
        assert rows.read(0, 1, ids(1, 2, 3, 4)) in (0, blocks * BLOCK)
    assert len(rows.cache._known) == blocks


def test_a_beginning_that_many_go_on_from_is_hotter_than_what_follows():
    rows = Rows(blocks=12)
    for number in (3, 4, 5, 3):
        rows.read(0, 1, ids(6, number, more=1))
    assert rows.cache.hottest(1, 5) == [ids(6), ids(6, 3)]


def test_the_hottest_beginnings_are_those_shared_most():
    rows = Rows(blocks=12)
    for _ in range(4):
        rows.read(0, 1, ids(1, 2, more=1))
    for number in (3, 4, 5):
        rows.read(0, 1, ids(6, number))
    rows.read(0, 2, ids(8, 9))
    assert rows.cache.hottest(1, 5) == [ids(1, 2), ids(6)]
    assert rows.cache.hottest(1, 1) == [ids(1, 2)]
    assert rows.cache.hottest(2, 5) == []


@settings(max_examples=100, deadline=None)
@given(
    blocks=st.integers(0, 7),
    prompts=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 3)),
        max_size=30,
    ),
)
def test_whatever_was_read_before_what_is_found_is_right(blocks: int, prompts: list[tuple[int, list[int], int]]):
    rows = Rows(blocks)
    for uid, parts, more in prompts:
        rows.read(0, uid, ids(*parts, more=more))
        known = rows.cache._known
        places = [block.place for block in known.values()]
        assert len(set(places)) == len(places)
        assert len(places) + len(rows.cache._free) == blocks
        serials = {block.serial for block in known.values()}
        assert all(key[1] in serials | {0} for key in known)  # nothing is kept that can no longer be found
        rows.cache.hottest(uid, 3)
