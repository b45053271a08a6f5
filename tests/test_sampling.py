"""Sampling: distributions by counting and by a second spelling, seeds, and rows that keep to themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serving.sampling import RowSampling, Sampling, _draw, sample, uniform


def draw(logits: Tensor, sampling: Sampling, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` draws from one distribution: shares [V], log-probs and raw log-probs of each draw."""
    rows = RowSampling([sampling] * count, list(range(count)))
    drawn = sample(logits.expand(count, -1), rows, [0] * count)
    shares = torch.bincount(torch.tensor(drawn.ids), minlength=logits.shape[-1]) / count
    return shares, torch.tensor(drawn.logprobs), torch.tensor(drawn.raw_logprobs)


def processed_by_definition(logits: list[float], s: Sampling) -> list[float]:
    """The distribution to draw from, token by token as the settings are defined."""
    scaled = [x / s.temperature for x in logits]
    total = math.log(sum(math.exp(x - max(scaled)) for x in scaled)) + max(scaled)
    probs = [math.exp(x - total) for x in scaled]
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept, before = set(), 0.0
    for rank, i in enumerate(order):
        top_k = s.top_k == 0 or rank < s.top_k
        if rank == 0 or (top_k and before < s.top_p and probs[i] >= s.min_p * probs[order[0]]):
            kept.add(i)
        before += probs[i]
    mass = sum(probs[i] for i in kept)
    return [probs[i] / mass if i in kept else 0.0 for i in range(len(probs))]


def test_plain_sampling_draws_what_the_model_says():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    shares, logprobs, raw = draw(logits, Sampling(), 40_000)
    assert shares.tolist() == pytest.approx(logits.softmax(-1).tolist(), abs=0.01)
    assert torch.equal(logprobs, raw)


def test_each_logprob_is_that_of_the_token_drawn():
    logits_BV = torch.randn(64, 50)
    drawn = sample(logits_BV, RowSampling([Sampling()] * 64, range(64)), [3] * 64)
    expected = logits_BV.log_softmax(-1)[torch.arange(64), torch.tensor(drawn.ids)]
    assert drawn.raw_logprobs == pytest.approx(expected.tolist(), abs=1e-6)


def test_temperature_sharpens_by_the_definition():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    shares, logprobs, raw = draw(logits, Sampling(temperature=0.5), 40_000)
    assert shares.tolist() == pytest.approx((logits / 0.5).softmax(-1).tolist(), abs=0.01)
    assert set(logprobs.tolist()) <= set((logits / 0.5).log_softmax(-1).tolist())
    assert set(raw.tolist()) == set(logits.log_softmax(-1).tolist())


def test_greedy_takes_the_likeliest_with_certainty():
    logits = torch.tensor([0.0, 3.0, 1.0])
    shares, logprobs, raw = draw(logits, Sampling(temperature=0), 20)
    assert shares.tolist() == [0, 1, 0]
    assert logprobs.tolist() == [0.0] * 20
    assert raw[0].item() == pytest.approx(logits.log_softmax(-1)[1].item())


def test_a_bias_is_added_before_temperature_and_leaves_raw_logprobs_alone():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    biased = (logits + torch.tensor([3.0, 0.0, 0.0, -100.0])) / 0.5
    shares, logprobs, raw = draw(logits, Sampling(temperature=0.5, bias=((0, 3.0), (3, -100.0))), 40_000)
    assert shares.tolist() == pytest.approx(biased.softmax(-1).tolist(), abs=0.01)
    assert sorted(set(logprobs.tolist())) == pytest.approx(sorted(biased.log_softmax(-1)[:3].tolist()), abs=1e-5)
    assert set(raw.tolist()) <= set(logits.log_softmax(-1).tolist())
    assert draw(logits, Sampling(temperature=0, bias=((3, 50.0),)), 4)[0].tolist() == [0, 0, 0, 1]


def test_a_bias_touches_no_other_row():
    logits_BV = torch.randn(3, 8)
    alone = sample(logits_BV, RowSampling([Sampling(temperature=0.7)] * 3, range(3)), [0] * 3)
    settings = [Sampling(temperature=0.7), Sampling(bias=((1, 9.0),)), Sampling(temperature=0.7)]
    beside = sample(logits_BV, RowSampling(settings, range(3)), [0] * 3)
    assert [alone.logprobs[i] for i in (0, 2)] == [beside.logprobs[i] for i in (0, 2)]


def test_greedy_rows_say_the_same_alone_and_beside_others():
    logits_BV = torch.randn(3, 50)
    alone = sample(logits_BV, RowSampling([Sampling(temperature=0)] * 3, range(3)), [0] * 3)
    settings = [Sampling(temperature=0), Sampling(temperature=0), Sampling()]
    beside = sample(logits_BV, RowSampling(settings, range(3)), [0] * 3)
    assert alone.ids[:2] == beside.ids[:2] == logits_BV[:2].argmax(-1).tolist()
    assert alone.logprobs[:2] == beside.logprobs[:2] == [0.0, 0.0]
    assert alone.raw_logprobs[:2] == pytest.approx(beside.raw_logprobs[:2], abs=1e-6)
    spoilt = sample(torch.full((1, 4), math.nan), RowSampling([Sampling(temperature=0)], [0]), [0])
    assert math.isnan(spoilt.raw_logprobs[0])


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-300])
def test_tiny_temperatures_stay_finite(temperature: float):
    shares, logprobs, _ = draw(torch.tensor([5.0, 3.0, 1.0]), Sampling(temperature=temperature), 10)
    assert shares.tolist() == [1, 0, 0]
    assert logprobs.tolist() == [0.0] * 10


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 7), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.93, 0.51, 0.07]),
    top_k=st.sampled_from([0, 1, 2, 5, 50]),
    min_p=st.sampled_from([0.0, 0.013, 0.31, 1.0]),
)
def test_cuts_agree_with_their_definition(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float
):
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    expected = processed_by_definition(logits, sampling)
    rows = RowSampling([sampling] * 300, range(300))
    drawn = sample(torch.tensor(logits).expand(300, -1), rows, [0] * 300)
    for token_id, logprob in zip(drawn.ids, drawn.logprobs, strict=True):
        assert expected[token_id] > 0
        assert logprob == pytest.approx(math.log(expected[token_id]), abs=2e-5)
    likely = {i for i, p in enumerate(expected) if p > 0.05}
    assert likely <= set(drawn.ids)


def test_rows_of_all_kinds_go_together():
    """Each row draws as it would alone, whatever the settings of the others."""
    kinds = [Sampling(), Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.8), Sampling(top_k=2, min_p=0.1)]
    logits_BV = torch.randn(4, 30)
    together = sample(logits_BV, RowSampling(kinds, range(4)), [5, 6, 7, 8])
    for i, kind in enumerate(kinds):
        alone = sample(logits_BV[i : i + 1], RowSampling([kind], [i]), [5 + i])
        assert alone.ids[0] == together.ids[i]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[i], abs=1e-6)


def test_a_seed_decides_the_draw_wherever_the_row_stands():
    logits = torch.randn(1000)
    noisy = logits + 1e-6 * torch.randn(1000)  # another batch size changes the last bits of a product
    first = sample(logits[None], RowSampling([Sampling()], [77]), [4])
    later = sample(torch.stack([torch.randn(1000), noisy]), RowSampling([Sampling()] * 2, [5, 77]), [0, 4])
    assert later.ids[1] == first.ids[0]


def test_seeds_and_steps_give_other_draws():
    logits_BV = torch.zeros(1, 10_000)
    ids = {
        (seed, step): sample(logits_BV, RowSampling([Sampling()], [seed]), [step]).ids[0]
        for seed in (0, 1, -1, 2**63, 2**64 - 2)
        for step in range(5)
    }
    assert len(set(ids.values())) >= 24


def test_uniform_is_uniform_and_below_one():
    u = uniform(torch.arange(100_000) - 50_000, torch.zeros(100_000, dtype=torch.int64))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.005)
    assert u.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.005)
    steps = uniform(torch.full((100_000,), 7), torch.arange(100_000))
    assert steps.unique().numel() == 100_000
    assert torch.corrcoef(torch.stack((steps[:-1], steps[1:])))[0, 1].abs() < 0.02


def test_the_smallest_number_takes_the_first_possible_token():
    for width in (4, 32, 33, 100):
        probs_BV = torch.zeros(1, width)
        probs_BV[0, width // 2] = 1.0
        for u in (0.0, 0.5, 1 - 2.0**-48):
            assert _draw(probs_BV, torch.tensor([u], dtype=torch.float64)).tolist() == [width // 2]


@pytest.mark.parametrize("width", [5, 64, 320, 1000])
def test_draws_are_those_of_the_cumulative_distribution(width: int):
    generator = torch.Generator().manual_seed(width)
    logits_BV = 4 * torch.randn(500, width, generator=generator)
    logits_BV[torch.rand(500, width, generator=generator) < 0.3] = -math.inf
    logits_BV[:, width // 3] = 0.0
    u_B = torch.rand(500, dtype=torch.float64, generator=generator)
    probs_BV = logits_BV.softmax(-1)
    cumulative_BV = probs_BV.double().cumsum(-1)
    expected = [int((c > u * c[-1]).nonzero()[0, 0]) for c, u in zip(cumulative_BV, u_B, strict=True)]
    ids_B = _draw(probs_BV, u_B)
    assert (probs_BV.gather(1, ids_B[:, None]) > 0).all()
    assert sum(i != j for i, j in zip(ids_B.tolist(), expected, strict=True)) <= 1  # a border, in the last bit


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((8,), -math.inf)
    logits[[2, 5]] = torch.tensor([0.0, 1.0])
    shares, _, _ = draw(logits, Sampling(), 2000)
    assert shares.nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_stay_in_their_row(bad: float):
    kinds = [Sampling(), Sampling(temperature=0.5, top_p=0.9), Sampling(top_k=3)]
    logits_BV = torch.randn(3, 20)
    clean = sample(logits_BV, RowSampling(kinds, range(3)), [0] * 3)
    logits_BV[1, 4] = bad
    spoilt = sample(logits_BV, RowSampling(kinds, range(3)), [0] * 3)
    assert not math.isfinite(spoilt.raw_logprobs[1])
    assert [spoilt.ids[i] for i in (0, 2)] == [clean.ids[i] for i in (0, 2)]
    assert [spoilt.logprobs[i] for i in (0, 2)] == [clean.logprobs[i] for i in (0, 2)]


def test_top_logprobs_are_the_likeliest_by_the_model():
    logits_BV = torch.randn(2, 40)
    rows = RowSampling([Sampling(temperature=0.2, top_logprobs=3), Sampling()], [0, 1])
    drawn = sample(logits_BV, rows, [0, 0])
    assert drawn.top is not None
    values, ids = logits_BV[0].log_softmax(-1).topk(3)
    assert [i for i, _ in drawn.top[0]] == ids.tolist()
    assert [p for _, p in drawn.top[0]] == pytest.approx(values.tolist(), abs=1e-6)
    assert sample(logits_BV, RowSampling([Sampling()] * 2, [0, 1]), [0, 0]).top is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("stop", ("ok", "")),
        ("top_logprobs", 21),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name: str, value: object):
    with pytest.raises(ValueError, match=rf"{name} is .*allowed"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_full_support_means_every_token_could_come():
    assert Sampling().full_support
    assert Sampling(temperature=0.7).full_support
    for cut in (Sampling(temperature=0), Sampling(top_p=0.9), Sampling(top_k=5), Sampling(min_p=0.1)):
        assert not cut.full_support
