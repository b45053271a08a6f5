"""KTO, DPO and SFT by numbers worked out by hand; what they take from feedback; and that they stay within the KL budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from learner.direct import EXAMPLES, Direct, Example, dpo_loss, kto_loss, loss_of, pairs, rows_of, sft_loss
from learner.judgement import Judgement, Sample
from learner.model import Batch
from learner.steps import POLICY
from tests import bases
from tests.test_update import PROMPTS, SMALL, LowIds, improver, score_of

ONES = torch.ones(2, dtype=torch.float64)


def sample(prompt: int, *reply: int) -> Sample:
    return Sample(f"r{prompt}-{reply}", (prompt,), reply, 0)


def judgement(kind: str, value: float, reply: Sample, other: Sample | None = None, user: str = "u") -> Judgement:
    return Judgement(f"f-{kind}-{reply.reply_id}", kind, user, value, reply, other, 0.0)


def ids(examples: Sequence[Example]) -> list[tuple[tuple[int, ...] | None, tuple[int, ...] | None]]:
    return [(one.liked and one.liked.reply_ids, one.disliked and one.disliked.reply_ids) for one in examples]


FEEDBACK = [
    judgement("thumb", 1, sample(1, 10)),
    judgement("thumb", 0, sample(1, 11)),
    judgement("rating", 4, sample(1, 12)),
    judgement("rating", 3, sample(2, 13)),
    judgement("preference", 1, sample(3, 14), sample(3, 15)),
]


def test_what_each_takes_from_the_feedback() -> None:
    opinions = [((10,), None), (None, (11,)), ((12,), None), (None, (13,)), ((14,), None), (None, (15,))]
    assert ids(EXAMPLES["kto"](FEEDBACK)) == opinions
    assert ids(EXAMPLES["sft"](FEEDBACK)) == [one for one in opinions if one[0]]
    assert ids(EXAMPLES["dpo"](FEEDBACK)) == [((14,), (15,)), ((10,), (11,)), ((12,), (11,))]


def test_one_rater_has_no_more_than_their_share() -> None:
    # a tenth of 40 judgements: 4 of the 20 that one rater gave
    few = [judgement("thumb", 1, sample(n, 10), user=f"u{n}") for n in range(20)]
    many = [judgement("thumb", 0, sample(n, 11), user="loud") for n in range(20)]
    assert [one.weight for one in pairs(few + many)] == pytest.approx([0.2] * 20)
    assert [one.weight for one in EXAMPLES["sft"](few + many)] == [1.0] * 20


def test_good_and_bad_opinions_weigh_alike_in_kto() -> None:
    found = EXAMPLES["kto"]([judgement("thumb", float(n == 0), sample(n, 10), user=f"u{n}") for n in range(10)])
    assert sum(one.weight for one in found if one.liked) == pytest.approx(
        sum(one.weight for one in found if one.disliked)
    )


def test_dpo_by_hand() -> None:
    liked_B = torch.tensor([math.log(2), 0.0], dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(liked_B, torch.tensor([0.0, 0.0], dtype=torch.float64), torch.tensor([3.0, 1.0]).double(), beta=1.0)
    # σ(ln 2) = 2/3: (3·ln 1.5 + ln 2) / 4, and its gradient −¾·⅓
    assert loss.item() == pytest.approx((3 * math.log(1.5) + math.log(2)) / 4)
    assert torch.autograd.grad(loss, liked_B)[0].tolist() == pytest.approx([-0.25, -0.125])


def test_kto_by_hand() -> None:
    ratio_B = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    pasted_B = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)  # z = 0.5
    loss = kto_loss(ratio_B, torch.tensor([True, False]), pasted_B, ONES, beta=2.0)
    sigma = 1 / (1 + math.exp(-1.0))
    assert loss.item() == pytest.approx(((1 - sigma) + sigma) / 2)
    slope = 2.0 * sigma * (1 - sigma) / 2
    assert torch.autograd.grad(loss, ratio_B, retain_graph=True)[0].tolist() == pytest.approx([-slope, slope])
    assert torch.autograd.grad(loss, pasted_B, allow_unused=True)[0] is None
    low = kto_loss(ratio_B, torch.tensor([True, True]), pasted_B - 5, ONES, beta=1.0)
    assert low.item() == pytest.approx(1 - sigma)  # a KL is never below 0
    none = kto_loss(ratio_B, torch.tensor([True, True]), pasted_B[:0], ONES, beta=1.0)
    assert none.item() == pytest.approx(1 - sigma)


def test_sft_by_hand() -> None:
    ratio_B = torch.tensor([-3.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = sft_loss(ratio_B, torch.tensor([4.0, 2.0]).double(), torch.tensor([1.0, 2.0]).double())
    assert loss.item() == pytest.approx(5 / 8)
    assert torch.autograd.grad(loss, ratio_B)[0].tolist() == pytest.approx([-1 / 8, -2 / 8])


def test_kto_pastes_each_reply_to_another_prompt() -> None:
    examples = EXAMPLES["kto"](FEEDBACK)[:3]
    assert [(row.prompt_ids, row.reply_ids) for row in rows_of("kto", examples, 100)[3:]] == [
        ((1,), (11,)), ((1,), (12,)), ((1,), (10,)),
    ]  # fmt: skip


def test_what_would_be_too_long_for_the_model_is_not_pasted() -> None:
    said = [(Sample("r", (1,) * prompt, (10,) * reply, 0)) for prompt, reply in ((7, 1), (1, 7), (4, 4))]
    examples = EXAMPLES["kto"]([judgement("thumb", 1, one) for one in said])
    rows = rows_of("kto", examples, 8)
    assert rows[:3] == said
    assert [(len(row.prompt_ids), len(row.reply_ids)) for row in rows[3:]] == [(1, 4), (4, 1)]
    assert rows_of("kto", examples[:1], 7) == said[:1]


def direct(name: str, n: int = 40, **changes: float) -> Direct:
    """On thumbs that say what LowIds likes."""
    plain = improver()
    rollouts = plain.collector.sampler.sample(PROMPTS * n, None, 3)
    scores = [float(running_T[-1]) for running_T in LowIds().running(rollouts)]
    said = [
        judgement("thumb", float(score > 0), Sample(f"r{n}", one.prompt_ids, one.reply_ids, 0), user=f"u{n % 9}")
        for n, (one, score) in enumerate(zip(rollouts, scores, strict=True))
    ]
    config = dataclasses.replace(SMALL, objective=name, **changes)
    return Direct(plain.model, LowIds(), plain.collector.sampler, config, 0, said)


@pytest.mark.parametrize("micro_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_4_the_gradient_is_the_losss_own_for_any_micro_batches(name: str, micro_tokens: int) -> None:
    found = direct(name, micro_tokens=micro_tokens)
    found.policy.load(bases.adapter(found.model.base, scaling=0.3))
    examples, given = found.examples[:7], []
    found.steps.step = lambda parts, **_: given.extend(map(sum, zip(*parts, strict=True)))  # type: ignore[method-assign]
    found.feedback_step(examples)
    batch = Batch.of(rows_of(name, examples, found.collector.sampler.engine.max_len))
    ratio_B = (found.model.logprobs(batch, POLICY) - found.model.logprobs(batch, None)).sum(1)
    expected = torch.autograd.grad(loss_of(name, ratio_B, examples), found.steps.parameters)
    largest = max(float(one.abs().max()) for one in expected)
    assert largest > 1e-4
    assert max(float((a - b).abs().max()) / largest for a, b in zip(expected, given, strict=True)) < 1e-3


def mean_said(found: Direct) -> float:
    """log π of a liked reply."""
    rows = [one.reply for one in found.examples if one.liked is not None]
    said_BT: Tensor = found.model.logprobs(Batch.of(rows), POLICY).detach()
    return float(said_BT.sum()) / len(rows)


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_what_was_liked_is_said_more_within_the_budget(name: str) -> None:
    found = direct(name, batches=16, kl_limit=4.0)
    before = mean_said(found)
    report = found.run(PROMPTS, lambda *_: None)
    first, last = (
        score_of(found.collector.sampler.sample(PROMPTS * 40, weights, 8)) for weights in (None, found.policy.weights())
    )
    assert last > first + 0.05
    if name == "sft":
        assert mean_said(found) > before
    rollouts = found.collector.sampler.sample(PROMPTS * 4, found.policy.weights(), 9)
    assert found.collector.look_at(rollouts).figures["kl"] < 5.0
    assert report.kept == len(report.batches) - 1


def test_the_kl_limit_ends_it_too() -> None:
    found = direct("kto", lr=5e-2, kl_limit=0.5)
    report = found.run(PROMPTS, lambda *_: None)
    assert "reached" in report.stopped
    assert (
        found.collector.look_at(found.collector.sampler.sample(PROMPTS * 4, found.policy.weights(), 9)).figures["kl"]
        < 1.0
    )


def test_a_learning_rate_of_0_changes_nothing() -> None:
    found = direct("dpo", lr=0.0)
    report = found.run(PROMPTS, lambda *_: None)
    assert [batch["kl"] for batch in report.batches] == [0.0] * len(report.batches)
    assert [batch["loss"] for batch in report.batches[:-1]] == pytest.approx([math.log(2)] * 4)
    assert report.stopped == "all 4 batches were used"


def test_batches_go_through_all_feedback_before_any_of_it_comes_again() -> None:
    found = direct("kto", n=4)
    drawn = [next(found.queue) for _ in range(2 * len(found.examples))]
    first, second = drawn[: len(found.examples)], drawn[len(found.examples) :]
    assert sorted(map(id, first)) == sorted(map(id, second)) == sorted(map(id, found.examples))
    assert first != second


def test_no_feedback_of_the_kind_moves_nothing() -> None:
    plain = improver()
    config = dataclasses.replace(SMALL, objective="dpo")
    found = Direct(plain.model, LowIds(), plain.collector.sampler, config, 0, FEEDBACK[:1])
    report = found.run(PROMPTS, lambda *_: None)
    assert [batch["kl"] for batch in report.batches] == [0.0, 0.0]
