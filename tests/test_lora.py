"""Adapter slots against plain PEFT, and against each other: nobody's adapter reaches a neighbour's row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from serving.lora import AdapterWeights, Slots, target_modules
from serving.products import siblings
from serving.sites import BASE
from tests import bases

IDS_BT = torch.randint(3, 320, (5, 7), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel, ids_BT: Tensor = IDS_BT) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids_BT).logits
    return result


def logits_of(model: PreTrainedModel, slots: Slots, chosen: list[int]) -> Tensor:
    with slots.chosen(chosen, width=7):
        return logits(model)


def with_slots(model: PreTrainedModel, *, packed: bool = True, **adapters: AdapterWeights) -> Slots:
    slots = Slots(model, target_modules(model), count=4, rank=8, packed=packed)
    for name, weights in adapters.items():
        slots.write(int(name[1:]), weights)
    return slots


@pytest.mark.parametrize("make", [bases.llama, bases.gpt2])
def test_targets_are_all_linear_layers_but_the_head(make: Callable[[], PreTrainedModel]):
    targets = target_modules(make())
    assert len(targets) == (14 if make is bases.llama else 8)
    assert not any("lm_head" in path for path in targets)


@pytest.mark.parametrize("make", [bases.llama, bases.gpt2])
@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_every_row_speaks_its_own_adapter_as_peft_would(make: Callable[[], PreTrainedModel], rank: int, packed: bool):
    model = make()
    one, two = bases.adapter(model, 1, rank), bases.adapter(model, 2, rank)
    expected = {BASE: logits(model)}
    expected |= {i: logits(bases.with_peft(copy.deepcopy(model), w)) for i, w in ((0, one), (3, two))}
    assert (expected[0] - expected[3]).abs().max() > 0.1
    slots = with_slots(model, packed=packed, _0=one, _3=two)
    for chosen in ([0, 0, 0, 0, 0], [3, 0, BASE, 0, 3], [0, 0, 3, 3, BASE], [BASE] * 5):
        got = logits_of(model, slots, chosen)
        for row, slot in enumerate(chosen):
            torch.testing.assert_close(got[row], expected[slot][row], atol=2e-5, rtol=1e-5)


def test_rows_on_the_base_cost_nothing(monkeypatch: pytest.MonkeyPatch):
    model = bases.llama()
    clean = logits(model)
    slots = with_slots(model, packed=False, _0=bases.adapter(model))
    monkeypatch.setattr("serving.sites.Site._of", lambda *_: pytest.fail("work for rows on the base"))
    got = logits_of(model, slots, [BASE] * 5)
    torch.testing.assert_close(
        got, clean, atol=1e-5, rtol=0
    )  # q, k and v lie side by side: other kernels may be chosen


def test_outside_the_engine_the_model_is_the_base():
    model = bases.llama()
    clean = logits(model)
    slots = with_slots(model, _0=bases.adapter(model))
    assert not torch.equal(logits_of(model, slots, [0] * 5), clean)
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("chosen", [[0, 1, 0, 1, BASE], [0, 0, 1, 1, BASE]])
def test_nan_that_an_adapter_makes_touches_no_other_row(chosen: list[int]):
    model = bases.llama()
    good = bases.adapter(model, 1)
    slots = with_slots(model, _0=good, _1=good)
    clean = logits_of(model, slots, chosen)
    huge = {path: (torch.full_like(a, 3e38), torch.full_like(b, -3e38)) for path, (a, b) in good.tensors.items()}
    slots.write(1, AdapterWeights(4, 1.0, huge))
    got = logits_of(model, slots, chosen)
    for row, slot in enumerate(chosen):
        assert got[row].isnan().all() if slot == 1 else torch.equal(got[row], clean[row])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float):
    model = bases.llama()
    path = target_modules(model)[0]
    slots = with_slots(model, _0=bases.adapter(model))
    clean = logits_of(model, slots, [0] * 5)
    bad = bases.adapter(model, 2)
    a, b = bad.tensors[path]
    with pytest.raises(ValueError, match=r"not finite"):
        slots.write(0, spoil(bad, path, torch.full_like(a, value), b))
    assert torch.equal(logits_of(model, slots, [0] * 5), clean)


def test_scaling_per_module_is_folded_in():
    model = bases.llama()
    first, *others = target_modules(model)
    weights = bases.adapter(model, 1, scaling=1.0)
    scales = dict.fromkeys(others, 2.0) | {first: 0.5}
    folded = {path: (a, b * scales[path]) for path, (a, b) in weights.tensors.items()}
    slots = with_slots(model, _0=AdapterWeights(4, scales, weights.tensors), _1=AdapterWeights(4, 1.0, folded))
    with slots.chosen([0, 1], width=7):
        first_row, second_row = logits(model, IDS_BT[:1].expand(2, -1))
    torch.testing.assert_close(first_row, second_row, atol=1e-5, rtol=1e-5)


def test_ranks_may_differ_and_modules_may_be_missing():
    model = bases.llama()
    chosen = target_modules(model)[:3]
    small, large = bases.adapter(model, 1, rank=2, targets=chosen), bases.adapter(model, 2, rank=8, targets=chosen)
    mixed = dict(small.tensors) | {chosen[0]: large.tensors[chosen[0]]}
    expected = copy.deepcopy(model)
    for path, (a, b) in mixed.items():
        expected.get_submodule(path).weight.data += 2.0 * b @ a
    slots = with_slots(model, _0=bases.adapter(model, 9, rank=8))
    slots.write(0, AdapterWeights(8, 2.0, mixed))  # nothing of the adapter before may stay
    torch.testing.assert_close(logits_of(model, slots, [0] * 5), logits(expected), atol=2e-5, rtol=1e-5)


def test_a_cleared_slot_is_the_base():
    model = bases.llama()
    slots = with_slots(model, _2=bases.adapter(model))
    slots.clear(2)
    assert torch.equal(logits_of(model, slots, [2] * 5), logits_of(model, slots, [BASE] * 5))


def spoil(weights: AdapterWeights, path: str, a: Tensor, b: Tensor) -> AdapterWeights:
    return AdapterWeights(weights.rank, weights.scaling, dict(weights.tensors) | {path: (a, b)})


def test_weights_that_do_not_fit_are_refused_and_change_nothing():
    model = bases.llama()
    good = bases.adapter(model, 1)
    path = target_modules(model)[-1]
    slots = with_slots(model, _0=good)
    before = logits_of(model, slots, [0] * 5)
    for bad, words in (
        (spoil(bases.adapter(model, 2), "lm_head", torch.zeros(4, 32), torch.zeros(320, 4)), "'lm_head'.*no slot"),
        (spoil(bases.adapter(model, 2), path, torch.zeros(4, 31), torch.zeros(32, 4)), "do not fit; expected"),
        (spoil(bases.adapter(model, 2), path, torch.zeros(4, 48), torch.zeros(32, 3)), "do not fit; expected"),
        (bases.adapter(model, 2, rank=9), "rank 9 .*at most 8"),
    ):
        with pytest.raises(ValueError, match=words):
            slots.write(0, bad)
        assert torch.equal(logits_of(model, slots, [0] * 5), before)


def test_targets_must_be_linear_layers():
    with pytest.raises(ValueError, match=r"model\.norm.*allowed"):
        Slots(bases.llama(), ["model.norm"])


def test_removal_gives_the_model_its_own_forwards_back():
    model = bases.llama()
    clean = logits(model)
    slots = with_slots(model, _0=bases.adapter(model))
    with pytest.raises(ValueError, match="already carries"):
        Slots(model, target_modules(model))
    slots.remove()
    assert torch.equal(logits(model), clean)
    Slots(model, target_modules(model)).remove()


def test_adapters_work_beside_a_bf16_base():
    model = bases.llama().to(torch.bfloat16)
    weights = bases.adapter(model)
    path = target_modules(model)[0]
    layer = model.get_submodule(path)
    x = torch.randn(3, 2, 32, dtype=torch.bfloat16)
    slots = with_slots(model, _0=weights)
    a, b = weights.tensors[path]
    for chosen in ([0, 0, 0], [0, BASE, 0]):
        base = layer(x)
        with slots.chosen(chosen, width=2):
            got = layer(x)
        assert got.dtype == torch.bfloat16
        exact = base.float() + 2.0 * x.float() @ a.T @ b.T
        for row, slot in enumerate(chosen):
            expected = exact[row] if slot == 0 else base[row].float()
            torch.testing.assert_close(got[row].float(), expected, atol=0.03, rtol=0.03)


def test_modules_that_read_the_same_tensor_share_a_product():
    model = bases.llama()
    groups = siblings(model, target_modules(model))
    of_layer = [[path.rpartition(".")[2] for path in group] for group in groups if ".0." in group[0]]
    assert of_layer == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert with_slots(model).copied_bytes == sum(
        module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear)
    )


def test_a_module_asked_out_of_turn_still_gets_its_own_part():
    model = bases.llama()
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 1, 2, 32)
    with with_slots(model).chosen([BASE], width=2):
        attention.q_proj(x)
        torch.testing.assert_close(attention.v_proj(other), other @ attention.v_proj.weight.T)
        torch.testing.assert_close(attention.k_proj(x), x @ attention.k_proj.weight.T)


class Flattening(nn.Module):
    """Some models pass [B·T, in] to their linear layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self.inner(x.flatten(0, 1))
        return flat.view(*x.shape[:2], -1)


def test_flattened_tokens_still_belong_to_their_rows():
    model = bases.llama()
    path = target_modules(model)[0]
    layer = model.get_submodule(path)
    slots = with_slots(model, _0=bases.adapter(model))
    x = torch.randn(3, 4, 32)
    with slots.chosen([0, BASE, 0], width=4):
        torch.testing.assert_close(Flattening(layer)(x), layer(x))
        with pytest.raises(RuntimeError):  # some tokens only: whose they are cannot be known
            layer(x.flatten(0, 1)[:5])
