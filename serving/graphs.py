"""Decoding steps that are recorded once and then replayed, as CUDA graphs.

On a GPU a step of few rows takes as long as it takes to start its operations, unless they are started all at once. A
recording is of fixed sizes and addresses: so many rows, so many positions seen, adapters or none. There is one for each
power of two, made before the engine is ready; a step takes the smallest that it fits in. The rows that it does not need
write where nobody reads.

Written without a GPU at hand: what is recorded is compared with what it stands for, and where that fails nothing is replayed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor

from serving.kv import KeyValueRows
from serving.sites import BASE

FEWEST_POSITIONS = 128

Work = Callable[[], object]
Record = Callable[[Work], Work]
"""Does some work on tensors that keep their addresses, and returns what does it again on what they hold by then."""
Fixed = Callable[[Tensor, int, bool], Tensor]
"""Logits of rows 0 … B-1 from given_4B, the positions seen, and whether any row has an adapter.

given_4B: id, position, place in the row (`length` for nowhere) and adapter slot of each row's one token.
"""

_log = logging.getLogger(__name__)


class Graphs:
    """Recordings of one model's decoding step over key/value rows."""

    def __init__(self, step: Fixed, kv: KeyValueRows, record: Record, device: torch.device) -> None:
        self._step, self._kv, self._record, self._device = step, kv, record, device
        self._rows = _powers_of_two(1, kv.rows)
        self._reads = _powers_of_two(FEWEST_POSITIONS, kv.length)
        self._given = {rows: self._put(rows, [], [], []) for rows in self._rows}
        self._logits_RV = torch.empty(0)
        self._replay: dict[tuple[int, int, bool], Work] = {}

    def record(self) -> None:
        """Make all recordings, and compare each with what it stands for.

        Raises RuntimeError where the model's forward cannot be recorded, a recording says something else, or memory is short.
        """
        begun = time.perf_counter()
        self._kv.reach(self._kv.length)
        # the largest first: those that follow find room in its memory
        for rows, read, adapters in product(self._rows[::-1], self._reads[::-1], (True, False)):
            given_4B = self._given[rows]
            expected_BV = self._step(given_4B, read, adapters)
            if not len(self._logits_RV):
                self._logits_RV = torch.empty_like(expected_BV)

            def work(given_4B: Tensor = given_4B, read: int = read, adapters: bool = adapters) -> None:
                self._logits_RV[: given_4B.shape[1]] = self._step(given_4B, read, adapters)

            replay = self._replay[rows, read, adapters] = self._record(work)
            self._logits_RV.fill_(torch.nan)
            replay()
            difference = (self._logits_RV[:rows].float() - expected_BV.float()).abs().max().item()
            if not difference <= 0.01 * (1 + expected_BV.abs().max().item()):
                raise RuntimeError(f"the recording of {rows} rows and {read} positions is {difference:.2g} off")
        _log.info("%d decoding steps were recorded in %.1f s.", len(self._replay), time.perf_counter() - begun)

    def __call__(self, ids: Sequence[int], starts: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Logits after one more id of rows 0 … B-1, of which so many positions are filled; valid until the next call."""
        rows = next(size for size in self._rows if size >= len(ids))
        read = next(size for size in self._reads if size > max(starts))
        self._given[rows].copy_(self._put(rows, ids, starts, slots, pinned=True), non_blocking=True)
        self._replay[rows, read, max(slots) != BASE]()
        return self._logits_RV[: len(ids)]

    def _put(
        self, rows: int, ids: Sequence[int], starts: Sequence[int], slots: Sequence[int], *, pinned: bool = False
    ) -> Tensor:
        """given_4B; the rows that are to spare write nowhere. `pinned`: in memory that a GPU can fetch from by itself."""
        spare = rows - len(ids)
        given = [
            [*ids, *[0] * spare],
            [*starts, *[0] * spare],
            [*starts, *[self._kv.length] * spare],
            [*slots, *[BASE] * spare],
        ]
        if pinned:
            return torch.tensor(given, pin_memory=self._device.type == "cuda")
        return torch.tensor(given, device=self._device)


def recorder(device: torch.device) -> Record | None:
    """What records work on this device; None where nothing does."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()  # one memory for all of them: no two run at the same time
    aside = torch.cuda.Stream(device)  # one stream too: libraries set memory aside for each

    def record(work: Work) -> Work:
        now = torch.cuda.current_stream(device)
        aside.wait_stream(now)
        with torch.cuda.stream(aside), _waiting_refused():
            work()  # what libraries set up at their first call cannot be recorded
        now.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # of this thread alone: other engines may be at work. The outer stream is put back whatever happens within
        with (
            torch.cuda.stream(now),
            torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay

    return record


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Within, what waits for the GPU raises RuntimeError: it could not be recorded, and a try would leave a mess."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _powers_of_two(first: int, last: int) -> list[int]:
    """first, twice that, … below `last`, and `last` itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]
