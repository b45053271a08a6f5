"""What prompts have in common is read once: keys and values of earlier prompts and replies, by version.

Blocks of BLOCK positions lie in memory of their own. A block is found by (version, the block before it, its ids), so
that it stands for everything before it too, and two versions never share one. Finding copies the blocks into a row, and
a row's new blocks are copied here, so that nobody holds on to a block: the least recently used one gives way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from serving.kv import KeyValueRows

BLOCK = 16
"""Positions a block: whole blocks are shared only."""

Key = tuple[int, int, tuple[int, ...]]
"""Version's uid, serial number of the block before (0: none), the block's ids."""


@dataclass(slots=True)
class _Block:
    place: int
    serial: int
    """Never used again, so that what followed a block that gave way is found by nobody."""
    hits: int = 0


class PrefixCache:
    """Room for so many positions of prefixes. Used between two forwards, by whoever makes the steps."""

    def __init__(self, kv: KeyValueRows, positions: int) -> None:
        """`positions`: 0 for no cache."""
        self._kv = kv
        self._free = list(range(positions // BLOCK))[::-1]
        self._capacity = len(self._free)
        self._memory = kv.blocks(self._capacity, BLOCK)
        self._known: OrderedDict[Key, _Block] = OrderedDict()
        """The least recently used first; what follows a block is never used later than the block itself."""
        self._serial = 0

    def fill(self, row: int, uid: int, ids: Sequence[int]) -> int:
        """Copy the longest known beginning of a prompt into a row; how many positions that is, never all of them."""
        chain = self._chain(uid, ids[: len(ids) - 1])
        if chain:
            for key in chain:
                self._known[key].hits += 1
            self._use(chain)
            self._kv.put_blocks(row, self._memory, [self._known[key].place for key in chain])
        return len(chain) * BLOCK

    def keep(self, row: int, uid: int, ids: Sequence[int]) -> None:
        """Remember what a row holds for these ids, as far as it was not known."""
        chain = self._chain(uid, ids)
        self._use(chain)
        parent = self._known[chain[-1]].serial if chain else 0
        known, places = len(chain), []
        for number in range(known, min(len(ids) // BLOCK, self._capacity)):
            place = self._free.pop() if self._free else self._known.popitem(last=False)[1].place
            self._serial += 1
            key = uid, parent, tuple(ids[number * BLOCK : (number + 1) * BLOCK])
            self._known[key] = _Block(place, self._serial)
            parent = self._serial
            chain.append(key)
            places.append(place)
        if places:
            self._use(chain)
            self._kv.take_blocks(row, known * BLOCK, self._memory, places)

    def hottest(self, uid: int, count: int) -> list[tuple[int, ...]]:
        """The beginnings that prompts of a version shared most often, each as long as it was shared."""
        of_serial = {block.serial: (key, block) for key, block in self._known.items() if key[0] == uid}
        # a block that is always followed by the same one is no end
        inner = {key[1] for key, block in of_serial.values() if key[1] and block.hits == of_serial[key[1]][1].hits}
        ends = [(block.hits, serial) for serial, (_, block) in of_serial.items() if block.hits and serial not in inner]
        found = []
        for _, serial in sorted(ends, reverse=True)[:count]:
            ids: tuple[int, ...] = ()
            while serial:
                key = of_serial[serial][0]
                ids, serial = key[2] + ids, key[1]
            found.append(ids)
        return found

    def _chain(self, uid: int, ids: Sequence[int]) -> list[Key]:
        """The known blocks these ids begin with."""
        chain: list[Key] = []
        parent = 0
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            key = uid, parent, tuple(ids[start : start + BLOCK])
            block = self._known.get(key)
            if block is None:
                break
            chain.append(key)
            parent = block.serial
        return chain

    def _use(self, chain: Sequence[Key]) -> None:
        for key in reversed(chain):
            self._known.move_to_end(key)
