"""Decoding steps that are recorded once and then replayed, as CUDA graphs.

On a GPU a step of few rows takes as long as it takes to start its operations, unless they are started all at once. A
recording is of fixed sizes and addresses: so many rows, so many positions seen, adapters or none. There is one for each
power of two, made before the engine is ready; a step takes the smallest that it fits in. The rows that it does not need
write where nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from serving.kv import KeyValueRows
from serving.lora import BASE

FEWEST_POSITIONS = 128

Step = Callable[[], Tensor]
Record = Callable[[Step], Step]
"""Runs a step whose tensors keep their addresses, and returns what repeats its operations on what they hold by then."""
Fixed = Callable[[Tensor, int, bool], Tensor]
"""Logits of rows 0 … B-1 from given_4B, the positions seen, and whether any row has an adapter.

given_4B: id, position, place in the row (`length` for nowhere) and adapter slot of each row's one token.
"""


class Graphs:
    """Recordings of one model's decoding step over key/value rows."""

    def __init__(self, step: Fixed, kv: KeyValueRows, record: Record, device: torch.device) -> None:
        self._step, self._kv, self._record = step, kv, record
        self._rows = _powers_of_two(1, kv.rows)
        self._reads = _powers_of_two(FEWEST_POSITIONS, kv.length)
        self._given_4R = torch.zeros(4, kv.rows, dtype=torch.int64, device=device)
        self._given_4R[2:] = torch.tensor([[kv.length], [BASE]], device=device)
        self._recorded: dict[tuple[int, int, bool], Step] = {}

    def record(self) -> None:
        """Make all recordings. Raises RuntimeError where the model's forward cannot be recorded, or memory is short."""
        self._kv.reach(self._kv.length)
        for rows, read, adapters in product(self._rows, self._reads, (False, True)):
            given_4B = self._given_4R[:, :rows]

            def step(given_4B: Tensor = given_4B, read: int = read, adapters: bool = adapters) -> Tensor:
                return self._step(given_4B, read, adapters)

            self._recorded[rows, read, adapters] = self._record(step)

    def __call__(self, ids: Sequence[int], starts: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Logits after one more id of rows 0 … B-1, of which so many positions are filled; valid until the next call."""
        rows = next(size for size in self._rows if size >= len(ids))
        read = next(size for size in self._reads if size > max(starts))
        spare = rows - len(ids)
        given = [
            [*ids, *[0] * spare],
            [*starts, *[0] * spare],
            [*starts, *[self._kv.length] * spare],
            [*slots, *[BASE] * spare],
        ]
        self._given_4R[:, :rows] = torch.tensor(given)
        return self._recorded[rows, read, max(slots) != BASE]()[: len(ids)]


def recorder(device: torch.device) -> Record | None:
    """What records steps on this device; None where nothing does."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()  # one memory for all of them: no two run at the same time

    def record(step: Step) -> Step:
        aside, now = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            step()  # what libraries set up at their first call cannot be recorded
        now.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # of this thread alone: others may copy adapters meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits_BV = step()

        def replay() -> Tensor:
            graph.replay()
            return logits_BV

        return replay

    return record


def _powers_of_two(first: int, last: int) -> list[int]:
    """first, twice that, … below `last`, and `last` itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]
