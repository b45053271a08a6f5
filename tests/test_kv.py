"""Key/value rows: writes land where they should, views are views, and nothing is left behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig, MambaForCausalLM

from serving.kv import KeyValueRows, LayerShape, layer_shapes
from serving.model import ModelError
from tests import bases

SHAPES = [LayerShape(2, 4, 4, None), LayerShape(2, 4, 4, None), LayerShape(1, 8, 6, 16)]


def rows(length: int = 20, shapes: list[LayerShape] = SHAPES) -> KeyValueRows:
    return KeyValueRows(shapes, rows=5, length=length, dtype=torch.float32, device=torch.device("cpu"))


def write(kv: KeyValueRows, layer: int, first: int, place_BT: list[list[int]], read: int, value: float) -> Tensor:
    """Write keys of one value; returns the keys that attention would see."""
    places = torch.tensor(place_BT)
    kv.aim(first, places, read)
    shape = SHAPES[layer]
    keys = torch.full((places.shape[0], shape.heads, places.shape[1], shape.key_dim), value)
    values = torch.full((places.shape[0], shape.heads, places.shape[1], shape.value_dim), -value)
    seen, seen_values = kv.update(keys, values, layer)
    assert torch.equal(seen[..., 0], -seen_values[..., 0])
    return seen


def test_the_model_tells_what_it_keeps():
    assert layer_shapes(bases.llama()) == [LayerShape(2, 8, 8, None)] * 2
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    shapes = layer_shapes(Gemma3ForCausalLM(config).eval())
    assert [shape.window for shape in shapes] == [12, None, 12]


def test_a_model_with_another_kind_of_memory_is_refused():
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"mamba model keeps a .*allowed"):
        layer_shapes(MambaForCausalLM(config).eval())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_keys_land_at_their_row_and_position(layer: int):
    kv = rows()
    write(kv, layer, 1, [[0, 1, 2], [20, 0, 1]], 3, 5.0)  # the second row is one shorter, padded on the left
    seen = write(kv, layer, 1, [[3], [2]], 4, 7.0)
    assert seen[0, :, :, 0].tolist() == [[5, 5, 5, 7]] * SHAPES[layer].heads
    assert seen[1, :, :, 0].tolist() == [[5, 5, 7, 0]] * SHAPES[layer].heads
    for row in (0, 3, 4):
        assert kv.layers[layer].keys[row, :, :4].abs().sum() == 0


def test_what_attention_sees_is_a_view():
    kv = rows()
    seen = write(kv, 0, 2, [[0], [0]], 1, 1.0)
    assert seen.untyped_storage().data_ptr() == kv.layers[0].keys.untyped_storage().data_ptr()


def test_memory_is_zero_before_it_is_used_whatever_lay_there():
    kv = rows(length=200)
    for layer in kv.layers:
        layer.keys.fill_(math.nan)
        layer.values.fill_(math.nan)
    assert write(kv, 0, 0, [[0], [0]], 60, 1.0)[:, :, 1:].abs().sum() == 0
    assert write(kv, 0, 0, [[130], [130]], 200, 1.0).isfinite().all()


def test_rows_are_copied_swapped_and_wiped():
    kv = rows()
    for layer in range(3):
        for row in range(3):
            write(kv, layer, row, [[0, 1, 2]], 3, row + 1.0)
    kv.copy(0, 3, used=2)
    kv.swap(1, 2, used=3)
    kv.wipe(0, used=3)
    for layer in range(3):
        keys = kv.layers[layer].keys[:, 0, :3, 0]
        assert keys[:4].tolist() == [[0, 0, 0], [3, 3, 3], [2, 2, 2], [1, 1, 0]]


def test_padding_is_written_where_nobody_reads():
    kv = rows()
    seen = write(kv, 1, 0, [[20, 20, 0]], 20, 9.0)
    assert seen[0, :, :, 0].tolist() == [[9.0] + [0.0] * 19] * 2


def test_lengths_are_told_as_transformers_asks():
    kv = rows()
    kv.aim(0, torch.tensor([[0, 1]]), 2)
    assert kv.get_seq_length() == 2
    assert kv.get_max_length() == 20
    assert kv.get_mask_sizes(2, 0) == (2, 0)
