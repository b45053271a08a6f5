"""Objectives by numbers worked out by hand, to optima that are known, and beside each other where they must agree."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from learner import ppo
from learner.objectives import PPO, RLOO, Objective, Reinforce, a2c, entropy_loss, leave_one_out
from learner.steps import POLICY
from tests import bases
from tests.test_update import PROMPTS, SMALL, improver, score_of

NAMES = ("ppo", "a2c", "reinforce", "rloo")
OBJECTIVES: dict[str, Objective] = {
    "ppo": PPO(),
    "a2c": a2c(1.0, 0.95),
    "reinforce": Reinforce(),
    "rloo": RLOO(samples=2),
}
REWARD_V = torch.tensor([1.0, 0.2, -0.5, 0.4], dtype=torch.float64)
REFERENCE_V = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)


def by_hand(name: str) -> Objective:
    return OBJECTIVES[name]


# 10. One-token bandit: the optimum is ∝ π_ref·exp(r/β), exactly


@pytest.mark.parametrize("entropy", [0.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_10_a_one_token_bandit_ends_at_its_exact_optimum_under_every_objective(name: str, entropy: float) -> None:
    """Every group of replies to compare is there once, weighed by how likely it was: no sampling, no noise."""
    objective, beta = by_hand(name), 0.3
    said_B = torch.cartesian_prod(*[torch.arange(4)] * objective.samples).flatten()
    mask_B1 = torch.ones(len(said_B), 1, dtype=torch.bool)
    logits_V = REFERENCE_V.log().requires_grad_()
    for _ in range(1500):
        old_V = logits_V.detach().log_softmax(0)
        k1_B1 = ppo.k1(old_V[said_B, None], REFERENCE_V.log()[said_B, None], mask_B1)
        rewards_B1 = ppo.token_rewards(REWARD_V[said_B], k1_B1, mask_B1, beta)
        value = (old_V.exp() * (REWARD_V - beta * (old_V - REFERENCE_V.log()))).sum()
        group_B = old_V.exp()[said_B].view(-1, objective.samples).prod(1).repeat_interleave(objective.samples)
        advantages_B1 = objective.advantages(rewards_B1, value.expand(len(said_B), 1), mask_B1)
        weighed_B1 = len(said_B) / objective.samples * group_B[:, None] * advantages_B1
        for _ in range(objective.epochs):
            new_V = logits_V.log_softmax(0)
            loss = objective.loss(new_V[said_B, None], old_V[said_B, None], weighed_B1, mask_B1, len(said_B))
            entropy_11 = -(new_V.exp() * new_V).sum()[None, None]
            loss = loss + entropy * entropy_loss(entropy_11, torch.ones(1, 1, dtype=torch.bool), 1)
            (gradient_V,) = torch.autograd.grad(loss, logits_V)
            with torch.no_grad():
                logits_V -= gradient_V / (beta + entropy)
    expected_V = ((REWARD_V + beta * REFERENCE_V.log()) / (beta + entropy)).softmax(0)
    torch.testing.assert_close(logits_V.softmax(0).detach(), expected_V, rtol=0, atol=1e-6 if entropy else 1e-8)


# 12. A digit-completion toy must reach its known optimum


@pytest.mark.parametrize("name", NAMES)
def test_12_digit_completion_reaches_its_known_optimum(name: str) -> None:
    """After a digit the next two are wanted: 3 → 4 5. A table of logits, replies drawn from it, and the exact worth of both."""
    objective, beta, replies = by_hand(name), 0.25, 32
    generator = torch.Generator().manual_seed(0)
    first_DD = torch.zeros(10, 10, requires_grad=True)
    second_DDD = torch.zeros(10, 10, 10, requires_grad=True)
    optimiser = torch.optim.Adam([first_DD, second_DDD], lr=0.1)
    digit_B = torch.arange(10).repeat_interleave(replies)
    mask_B2 = torch.ones(len(digit_B), 2, dtype=torch.bool)

    def logprobs(said_B2: Tensor) -> Tensor:
        first_BD, second_BD = first_DD[digit_B], second_DDD[digit_B, said_B2[:, 0]]
        return torch.stack([first_BD.log_softmax(1), second_BD.log_softmax(1)], 1).gather(2, said_B2[..., None])[..., 0]

    def worth() -> float:
        """Mean of r − β·(log π − log π_ref) over the digits. Its greatest value is β·log E_ref[exp(r/β)]."""
        said_DDD = first_DD.log_softmax(1)[..., None] + second_DDD.log_softmax(2)
        digit_D = torch.arange(10)
        right_D = said_DDD[digit_D, (digit_D + 1) % 10, (digit_D + 2) % 10].exp()
        kl_D = (said_DDD.exp() * (said_DDD + math.log(100))).sum((1, 2))
        return (right_D - beta * kl_D).mean().item()

    best = beta * math.log((99 + math.exp(1 / beta)) / 100)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        with torch.no_grad():
            one_B = torch.multinomial(first_DD.softmax(1)[digit_B], 1, generator=generator)[:, 0]
            two_B = torch.multinomial(second_DDD.softmax(2)[digit_B, one_B], 1, generator=generator)[:, 0]
            said_B2 = torch.stack([one_B, two_B], 1)
            old_B2 = logprobs(said_B2)
            right_B = ((one_B == (digit_B + 1) % 10) & (two_B == (digit_B + 2) % 10)).float()
            rewards_B2 = ppo.token_rewards(right_B, old_B2 + math.log(10), mask_B2, beta)
            advantages_B2 = ppo.whiten(objective.advantages(rewards_B2, torch.zeros(mask_B2.shape), mask_B2), mask_B2)
        for _ in range(objective.epochs):
            loss = objective.loss(logprobs(said_B2), old_B2, advantages_B2, mask_B2, mask_B2.numel())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert worth() == pytest.approx(best, rel=0.05)


# 4. The same gradient for any micro-batch split, with every objective, an entropy bonus and another temperature


def gradients(name: str, *, micro_tokens: int = 500, **changes: float) -> list[Tensor]:
    """Of one step on five replies that an adapter made, which has moved since."""
    found = improver(dataclasses.replace(SMALL, objective=name, samples=2, micro_tokens=micro_tokens, **changes))
    found.policy.load(bases.adapter(found.model.base, scaling=0.3))
    prompts = [prompt for prompt in PROMPTS for _ in range(found.objective.samples)]
    experience = found.collector.look_at(
        found.collector.sampler.sample(prompts, found.policy.weights(), 0, found.config.temperature)
    )
    given: list[Tensor] = []
    found.steps.step = lambda parts, **_: given.extend(map(sum, zip(*parts, strict=True)))  # type: ignore[method-assign]
    found.policy_step(experience, [7, 2, 9, 4, 0])
    found.close()
    return given


def far(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of any entry, as a share of the largest entry."""
    largest = max(float(a.abs().max()) for a in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


@pytest.mark.parametrize("micro_tokens", [1, 60])
@pytest.mark.parametrize("name", ["a2c", "reinforce", "rloo"])
def test_4_the_gradient_does_not_depend_on_the_micro_batches(name: str, micro_tokens: int) -> None:
    settings = {"entropy": 0.1, "temperature": 0.8}
    assert far(gradients(name, **settings), gradients(name, micro_tokens=micro_tokens, **settings)) < 1e-4


def test_where_nothing_has_moved_yet_all_that_weigh_tokens_alike_agree() -> None:
    """At ρ = 1 the gradients of PPO and A2C with λ = 1 are those of REINFORCE; with λ = 0.95 they are not."""
    expected = gradients("reinforce")
    assert far(expected, gradients("ppo", lam=1.0)) < 1e-5
    assert far(expected, gradients("a2c", lam=1.0)) < 1e-5
    assert far(expected, gradients("ppo", lam=0.95)) > 1e-3
    assert far(gradients("a2c"), gradients("ppo")) < 1e-5


# 2. lr = 0 ⇒ log-ratio ≈ 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_2_a_learning_rate_of_0_leaves_every_ratio_at_1(name: str, temperature: float) -> None:
    found = improver(dataclasses.replace(SMALL, objective=name, lr=0.0, temperature=temperature))
    experience = found.collector.look_at(
        found.collector.roll_out(iter(PROMPTS * 9), found.policy.weights(), found.config.rollouts)
    )
    done = found.learn_from(experience)
    assert done["moved"] < 1e-9
    assert done["epochs"] == (2 if name == "ppo" else 1)


# Each piece by hand


@pytest.mark.parametrize("name", NAMES)
def test_3_garbage_in_masked_slots_changes_nothing(name: str) -> None:
    objective, mask_BT = by_hand(name), torch.tensor([[False, True, True], [True, False, False]])

    def everything(fill: float) -> tuple[Tensor, Tensor]:
        new_BT, old_BT, rewards_BT, values_BT = (
            torch.where(mask_BT, torch.tensor([[0.0, 0.3, -0.2], [0.5, 0.0, 0.0]]) * scale, fill)
            for scale in (1, 2, 3, 4)
        )
        new_BT.requires_grad_()
        advantages_BT = objective.advantages(rewards_BT, values_BT, mask_BT)
        loss = objective.loss(new_BT, old_BT, torch.where(mask_BT, advantages_BT, fill), mask_BT, 3)
        return loss.detach(), torch.autograd.grad(loss, new_BT)[0]

    for clean, dirty in zip(everything(0.0), everything(math.nan), strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def test_a_reply_is_compared_with_the_others_to_its_prompt() -> None:
    # of (1, 2, 6) the others have the means 4, 3.5 and 1.5
    found_B = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    assert found_B.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


def test_rloo_gives_each_token_what_its_whole_reply_is_worth() -> None:
    mask_BT = torch.tensor([[True, True], [True, False]])
    advantages_BT = RLOO(samples=2).advantages(torch.tensor([[1.0, 2.0], [7.0, 9.0]]), torch.zeros(2, 2), mask_BT)
    assert advantages_BT.tolist() == [[-4.0, -4.0], [4.0, 0.0]]


def test_reinforce_takes_the_values_off_what_was_to_come() -> None:
    mask_BT = torch.tensor([[True, True, False]])
    found_BT = Reinforce().advantages(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.5, 0.25, 9.0]]), mask_BT)
    assert found_BT.tolist() == [[2.5, 1.75, 0.0]]


def test_rloo_asks_each_prompt_as_often_as_it_compares() -> None:
    found = improver(dataclasses.replace(SMALL, objective="rloo", samples=4, rollouts=12))
    rollouts = found.collector.roll_out(iter(PROMPTS), None, found.config.rollouts)
    assert [rollout.prompt_ids for rollout in rollouts] == [prompt for prompt in PROMPTS[:3] for _ in range(4)]
    assert len({rollout.reply_ids for rollout in rollouts[:4]}) > 1


def test_entropy_is_that_of_the_distribution_a_token_was_drawn_from() -> None:
    found = improver()
    found.policy.load(bases.adapter(found.model.base, scaling=0.3))
    batch = found.collector.look_at(found.collector.sampler.sample(PROMPTS, None, 0)).batch
    said_BT, entropy_BT = found.model.logprobs_and_entropy(batch, POLICY, 0.7)
    hidden_BTH = found.model.hidden(batch, POLICY)
    expected_NV = (found.model.logits(hidden_BTH[batch.before_BT]) / 0.7).softmax(-1)
    entropy_N = torch.distributions.Categorical(expected_NV).entropy()
    torch.testing.assert_close(entropy_BT[batch.mask_BT], entropy_N, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said_BT, found.model.logprobs(batch, POLICY, 0.7), rtol=1e-4, atol=1e-5)
    assert entropy_N.std().item() > 0.01
    assert (said_BT - found.model.logprobs(batch, POLICY)).abs().max().item() > 0.1


def test_an_entropy_bonus_keeps_replies_various() -> None:
    nll = []
    for entropy in (0.0, 1.0):
        found = improver(dataclasses.replace(SMALL, entropy=entropy, beta=0.0, missing_eos_penalty=0.0))
        found.run(PROMPTS, lambda *_: None)
        rollouts = found.collector.sampler.sample(PROMPTS * 8, found.policy.weights(), 1)
        nll.append(-sum(sum(one.logprobs) for one in rollouts) / sum(len(one.logprobs) for one in rollouts))
    assert nll[1] > nll[0] + 0.05


def test_cooler_rollouts_are_likelier_ones_and_their_kl_is_between_cooled_policies() -> None:
    cool, plain = (improver(dataclasses.replace(SMALL, temperature=temperature)) for temperature in (0.5, 1.0))
    cool.policy.load(bases.adapter(cool.model.base, scaling=0.3))
    rollouts = cool.collector.roll_out(iter(PROMPTS * 9), cool.policy.weights(), cool.config.rollouts)
    others = plain.collector.roll_out(iter(PROMPTS * 9), cool.policy.weights(), plain.config.rollouts)
    assert sum(sum(one.logprobs) for one in rollouts) > sum(sum(one.logprobs) for one in others) + 10
    seen = cool.collector.look_at(rollouts)
    torch.testing.assert_close(seen.old_BT, cool.model.logprobs(seen.batch, POLICY, 0.5).detach())
    assert seen.figures["k1"] == pytest.approx(seen.figures["kl"], rel=0.5)


@pytest.mark.parametrize("name", ["a2c", "reinforce", "rloo"])
def test_the_score_rises_under_every_objective(name: str) -> None:
    found = improver(dataclasses.replace(SMALL, objective=name, rollouts=64, batches=12, kl_limit=4.0))
    report = found.run(PROMPTS, lambda *_: None)
    after = found.collector.sampler.sample(PROMPTS * 8, found.policy.weights(), 1)
    assert score_of(after) > score_of(found.collector.sampler.sample(PROMPTS * 40, None, 1)) + 0.1
    assert all(batch["kl"] <= 4.0 * SMALL.overrun for batch in report.batches[:-1])
