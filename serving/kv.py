"""Keys and values of the running rows: fixed memory, [layers, rows, heads, length, dim].

The running rows lie together from row 0, so that a forward sees its part as a slice, never a copy. Memory beyond a
row's own length is zero: a freed row is wiped, since a NaN left behind would poison the next reply even where it is
masked (0 · NaN is NaN).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from serving.model import ModelError

_ZEROED_AT_ONCE = 64
"""Positions wiped at a time as replies grow beyond what any row used so far: untouched memory stays uncommitted."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps for each position."""

    heads: int
    key_dim: int
    value_dim: int
    window: int | None
    """Positions a token sees, itself included; None for all."""


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Ask the model, by a forward of two tokens, what its cache holds. Raises ModelError."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    name = model.config.model_type
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, **given_cache(model, cache))
    except Exception as error:  # foreign code, of which only one thing matters: it does not run
        raise ModelError(f"a {name} model cannot be served: {type(error).__name__}: {error}") from error
    shapes = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            kind = type(layer).__name__
            raise ModelError(f"a {name} model keeps a {kind}; allowed: models of full or sliding-window attention only")
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        shapes.append(LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], window))
    return shapes


def given_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """A cache as the model's forward names it: `cache` since transformers 5.24, `past_key_values` before."""
    new = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if new else "past_key_values": cache}


class KeyValueRows(Cache):
    """A transformers Cache over fixed rows. `aim` says which rows and positions the next forward writes and reads."""

    def __init__(
        self, shapes: list[LayerShape], rows: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Room for `rows` replies of `length` positions each, prompt included; and for one more, to try things in."""
        self.rows, self.length = rows, length
        self._zeroed = 0
        wanted = [(s.heads, d) for s in shapes for d in (s.key_dim, s.value_dim)]
        self._blocks: list[Tensor] = []
        places: dict[int, Tensor] = {}
        for kind in dict.fromkeys(wanted):  # nearly always one kind, so that a row moves by one copy
            members = [i for i, w in enumerate(wanted) if w == kind]
            heads, dim = kind
            # one position more than a row can hold: padding is written there and never read
            block = torch.empty((len(members), rows + 1, heads, length + 1, dim), dtype=dtype, device=device)
            self._blocks.append(block)
            places.update(zip(members, block, strict=True))
        self._layers = [_RowsLayer(places[2 * i], places[2 * i + 1]) for i in range(len(shapes))]
        super().__init__(layers=[*self._layers])

    def aim(self, first: int, place_BT: Tensor, read: int) -> None:
        """Point the next forward at rows first … first+B-1.

        place_BT: the position at which each token's key and value go; `length` for padding. `read`: attention sees the
        positions 0 … read-1.
        """
        self.reach(read)
        count = place_BT.shape[0]
        row_B11 = torch.arange(first, first + count, device=place_BT.device)[:, None, None]
        flat: dict[int, Tensor] = {}
        for layer in self._layers:
            heads = layer.keys.shape[1]
            if heads not in flat:
                head_H1 = torch.arange(heads, device=place_BT.device)[:, None]
                flat_BHT = (row_B11 * heads + head_H1) * (self.length + 1) + place_BT[:, None]
                flat[heads] = flat_BHT.flatten()
            layer.aim(slice(first, first + count), flat[heads], read)

    def memory(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where a layer's keys and values lie, each [rows + 1, heads, length + 1, dim]."""
        return self._layers[layer].keys, self._layers[layer].values

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, heads, T, dim] of a layer where `aim` points; what attention sees there."""
        return self._layers[layer].update(keys, values)

    def copy(self, source: int, target: int, used: int) -> None:
        """Copy the first `used` positions of a row over a free row."""
        self.reach(used)
        for block in self._blocks:
            block[:, target, :, :used] = block[:, source, :, :used]

    def swap(self, one: int, other: int, used: int) -> None:
        """Exchange the first `used` positions of two rows."""
        self.reach(used)
        for block in self._blocks:
            held = block[:, one, :, :used].clone()
            block[:, one, :, :used] = block[:, other, :, :used]
            block[:, other, :, :used] = held

    def wipe(self, row: int, used: int) -> None:
        """Zero the first `used` positions of a row."""
        for block in self._blocks:
            block[:, row, :, :used].zero_()

    def blocks(self, count: int, size: int) -> list[Tensor]:
        """Memory for `count` blocks of `size` positions: for each kind of layer, [layers · 2, count, heads, size, dim]."""
        return [
            block.new_empty((block.shape[0], count, block.shape[2], size, block.shape[4])) for block in self._blocks
        ]

    def put_blocks(self, row: int, memory: Sequence[Tensor], places: Sequence[int]) -> None:
        """Copy blocks, one after another, into a row from its beginning."""
        self.reach(len(places) * memory[0].shape[3])
        for block, held in zip(self._blocks, memory, strict=True):
            found = held[:, places].transpose(1, 2)  # [layers · 2, heads, blocks, size, dim]
            block[:, row, :, : len(places) * held.shape[3]] = found.flatten(2, 3)

    def take_blocks(self, row: int, start: int, memory: Sequence[Tensor], places: Sequence[int]) -> None:
        """Copy what a row holds from position `start` on into these blocks."""
        for block, held in zip(self._blocks, memory, strict=True):
            size = held.shape[3]
            piece = block[:, row, :, start : start + len(places) * size]
            held[:, places] = piece.unflatten(2, (len(places), size)).transpose(1, 2)

    def reach(self, read: int) -> None:
        """Positions 0 … read-1 may be written or read from now on: what was never used before is zeroed first."""
        if read > self._zeroed:
            upper = min(self.length, -(-read // _ZEROED_AT_ONCE) * _ZEROED_AT_ONCE)
            for block in self._blocks:
                block[:, :, :, self._zeroed : upper].zero_()
            self._zeroed = upper


class _RowsLayer(CacheLayerMixin):
    """One layer's keys and values; `update` writes the new ones in place and returns views of the rows in question."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [rows, heads, length + 1, dim]."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.is_initialized = True
        self._read = 0

    def aim(self, rows: slice, flat_N: Tensor, read: int) -> None:
        """flat_N: where the new keys and values go, as indices into [rows · heads · (length + 1), dim]."""
        self._seen = self.keys[rows, :, :read], self.values[rows, :, :read]
        self._flat_N, self._read = flat_N, read

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [B, heads, T, dim]."""
        for memory, new in ((self.keys, key_states), (self.values, value_states)):
            dim = memory.shape[-1]
            memory.view(-1, dim).index_copy_(0, self._flat_N, new.reshape(-1, dim))
        return self._seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the memory is there from the start."""

    def get_seq_length(self) -> int:
        return self._read

    def get_max_length(self) -> int:
        return self.keys.shape[-2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 (the engine gives a whole mask)
        return self._read, 0
