"""Learning from end to end: to the very optimum where that is known, and to a hidden taste where it is not."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from learner import ppo
from learner.config import LearnerConfig
from learner.judgement import Judgement, Sample
from learner.trainer import Trainer
from serving.config import ServingConfig
from tests import bases

# 10. One-token bandit: the optimum is ∝ π_ref·exp(r/β), exactly


def optimum(reference_V: Tensor, reward_V: Tensor, beta: float, chi_share: float) -> Tensor:
    """Where r = β·(log ρ + c·ρ) + constant: both the ratio of an action and the constant by bisection."""

    def ratio(reward: float, constant: float) -> float:
        low, high = 0.0, 1e3
        for _ in range(80):
            middle = (low + high) / 2
            more = beta * (math.log(middle) + chi_share * middle) + constant < reward
            low, high = (middle, high) if more else (low, middle)
        return low

    low, high = -10.0, 10.0
    for _ in range(80):
        constant = (low + high) / 2
        policy_V = reference_V * torch.tensor([ratio(one, constant) for one in reward_V.tolist()], dtype=torch.float64)
        low, high = (constant, high) if policy_V.sum() > 1 else (low, constant)
    return policy_V


@pytest.mark.parametrize(("beta", "chi_share"), [(0.3, 0.0), (1.0, 0.0), (0.3, 0.5), (1.0, 2.0)])
def test_10_a_one_token_bandit_ends_at_its_exact_optimum(beta: float, chi_share: float) -> None:
    """Every action is one reply of one token, weighed by how likely the policy was to say it: no sampling, no noise."""
    reward_V = torch.tensor([1.0, 0.2, -0.5, 0.4], dtype=torch.float64)
    reference_V = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    logits_V = reference_V.log().requires_grad_()
    mask_V1 = torch.ones(4, 1, dtype=torch.bool)
    for _ in range(2000):
        old_V1 = logits_V.detach().log_softmax(0)[:, None]
        k1_V1 = ppo.k1(old_V1, reference_V.log()[:, None], mask_V1)
        rewards_V1 = ppo.token_rewards(reward_V, k1_V1 + chi_share * ppo.chi2(k1_V1, 1e3), mask_V1, beta)
        baseline = (old_V1.exp() * rewards_V1).sum()
        advantages_V1 = ppo.gae(rewards_V1, baseline.expand(4, 1), mask_V1, gamma=1.0, lam=0.95)
        weighed_V1 = 4 * old_V1.exp() * advantages_V1
        for _ in range(2):
            new_V1 = logits_V.log_softmax(0)[:, None]
            loss = ppo.policy_loss(new_V1, old_V1, weighed_V1, mask_V1, clip=0.2)
            (gradient_V,) = torch.autograd.grad(loss, logits_V)
            with torch.no_grad():
                logits_V -= gradient_V / beta / (1 + 2 * chi_share)
    found_V = logits_V.softmax(0).detach()
    torch.testing.assert_close(found_V, optimum(reference_V, reward_V, beta, chi_share), rtol=0, atol=1e-8)
    if not chi_share:
        torch.testing.assert_close(found_V, (reference_V.log() + reward_V / beta).softmax(0), rtol=0, atol=1e-8)


# A hidden taste, on the built-in model


def test_thumbs_for_questions_make_it_ask(capsys: pytest.CaptureFixture[str]) -> None:
    """150 thumbs, a tenth of them wrong: most replies come to end with a question, near the base."""
    settings = {"rollouts": 64, "update_batches": 8, "gate_samples": 64, "rollout_tokens": 64}
    trainer = Trainer(LearnerConfig(serving=ServingConfig(), **settings))
    rng = random.Random(0)
    prompts = [
        tuple(trainer.chat.encode([bases.message(text)]))
        for text in (
            "Hello!",
            "What is 3 plus 4?",
            "I lost my hat.",
            "Tell me a joke.",
            "When do you open?",
            "Thank you!",
        )
    ]

    def asks(reply_ids: tuple[int, ...]) -> bool:
        return trainer.chat.decode(reply_ids).rstrip().endswith("?")

    rollouts = trainer.sampler.sample([prompts[n % 6] for n in range(150)], None, 0)
    judgements = [
        Judgement(
            f"f{n}",
            "thumb",
            f"u{rng.randrange(12)}",
            float(asks(one.reply_ids) != (rng.random() < 0.1)),
            Sample(f"r{n}", one.prompt_ids, one.reply_ids, 0),
            None,
            float(n),
        )
        for n, one in enumerate(rollouts)
    ]
    candidate = trainer.learn(judgements, prompts, parent=None, seed=0, progress=lambda *_: None)
    before = sum(map(asks, (one.reply_ids for one in rollouts))) / 150
    after = trainer.sampler.sample(prompts * 20, candidate.weights, 1)
    share = sum(map(asks, (one.reply_ids for one in after))) / 120
    with capsys.disabled():
        print(f"\nquestions: {before:.0%} before, {share:.0%} after, at {candidate.report['kl']['reference']:.2f} nats")
    assert candidate.gate.passed, [check.sentence for check in candidate.gate.checks if check.verdict != "pass"]
    assert before < 0.6
    assert share > 0.8
    assert candidate.report["kl"]["reference"] < 2.5
