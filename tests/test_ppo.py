"""The mathematics of PPO against numbers worked out by hand and a second spelling of each definition."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner import ppo

YES = torch.ones(1, 1, dtype=torch.bool)
NAN = float("nan")


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def batch(seed: int, replies: int = 5, tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards, values and a mask in which each reply has a prompt before and padding after it."""
    generator = torch.Generator().manual_seed(seed)
    rewards_BT, values_BT = torch.randn(2, replies, tokens, generator=generator, dtype=torch.float64)
    starts_B = torch.randint(0, 3, (replies, 1), generator=generator)
    ends_B = starts_B + torch.randint(1, 5, (replies, 1), generator=generator)
    positions_T = torch.arange(tokens)
    return rewards_BT, values_BT, (positions_T >= starts_B) & (positions_T < ends_B)


def gae_by_loops(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: A_t = Σ_l (γλ)^l δ_{t+l} over one reply's own tokens."""
    after = [*values[1:], 0.0]
    deltas = [reward + gamma * nxt - value for reward, nxt, value in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[start:])) for start in range(len(deltas))
    ]


# 1. GAE by hand and by a second, loop-written oracle


def test_1_gae_by_hand() -> None:
    mask_BT = torch.tensor([[True, True, False]])
    advantages_BT = ppo.gae(row(0, 1, 0), row(0, 0, 100), mask_BT, gamma=1.0, lam=0.95)
    assert advantages_BT[0, :2].tolist() == pytest.approx([0.95, 1.0], abs=1e-12)


def test_1_gae_with_values_by_hand() -> None:
    # δ = [1 + .5·4 − 2, 3 − 4] = [1, −1]; A = [1 + .5·.8·(−1), −1]
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    advantages_BT = ppo.gae(row(1, 3), row(2, 4), mask_BT, gamma=0.5, lam=0.8)
    assert advantages_BT[0].tolist() == pytest.approx([0.6, -1.0], abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_1_gae_is_its_definition(seed: int, gamma: float, lam: float) -> None:
    rewards_BT, values_BT, mask_BT = batch(seed)
    advantages_BT = ppo.gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    for reply, mask_T in enumerate(mask_BT):
        rewards, values = rewards_BT[reply, mask_T].tolist(), values_BT[reply, mask_T].tolist()
        assert advantages_BT[reply, mask_T].tolist() == pytest.approx(
            gae_by_loops(rewards, values, gamma, lam), abs=1e-9
        )
    assert not advantages_BT[~mask_BT].any()


# 3. NaN in masked slots: loss finite and unchanged, and so is its gradient


@pytest.mark.parametrize("garbage", [NAN, float("inf"), -float("inf")])
def test_3_garbage_in_masked_slots_changes_nothing(garbage: float) -> None:
    old_BT, new_BT, mask_BT = batch(3)

    def everything(fill: float) -> tuple[list[Tensor], Tensor]:
        dirty = [torch.where(mask_BT, values, fill) for values in (old_BT, new_BT, old_BT * 0.5)]
        old, new, reference = dirty[0], dirty[1].clone().requires_grad_(), dirty[2]
        scores_B = torch.arange(5, dtype=torch.float64)
        rewards = ppo.token_rewards(scores_B, ppo.k1(old, reference, mask_BT), mask_BT, 0.05)
        advantages = ppo.gae(rewards, old, mask_BT, gamma=1.0, lam=0.95)
        white = torch.where(mask_BT, ppo.whiten(advantages, mask_BT), fill)
        loss = ppo.policy_loss(new, old, white, mask_BT, clip=0.2)
        loss.backward()
        assert new.grad is not None
        kl = ppo.masked_mean(ppo.k3(old, reference, mask_BT), mask_BT)
        return [loss.detach(), kl, rewards, ppo.returns(rewards, mask_BT, 1.0)], new.grad

    for clean, dirty in zip(everything(0.0), everything(garbage), strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("garbage", [NAN, float("inf")])
def test_3_sums_and_means_pass_over_garbage(garbage: float) -> None:
    values_BT, mask_BT = torch.tensor([[1.0, garbage], [3.0, garbage]]), torch.tensor([[True, False], [True, False]])
    assert float(ppo.masked_sum(values_BT, mask_BT)) == 4.0
    assert float(ppo.masked_mean(values_BT, mask_BT)) == 2.0


# 4. The same gradient for any micro-batch split


@pytest.mark.parametrize("split", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_4_micro_batches_add_up_to_the_minibatch(split: list[int]) -> None:
    old_BT, new_BT, mask_BT = batch(4)
    advantages_BT = ppo.whiten(new_BT - 2 * old_BT, mask_BT)

    def gradient(sizes: list[int]) -> Tensor:
        new = (old_BT + 0.3 * new_BT).requires_grad_()
        parts = zip(*(t.split(sizes) for t in (new, old_BT, advantages_BT, mask_BT)), strict=True)
        for new_part, old, advantages, mask in parts:
            tokens = int(mask_BT.sum())
            loss = ppo.policy_loss(new_part, old, advantages, mask, clip=0.2, tokens=tokens)
            loss.backward(retain_graph=True)
        assert new.grad is not None
        return new.grad

    torch.testing.assert_close(gradient(split), gradient([5]), rtol=0, atol=1e-14)


# Each piece by hand


def test_whitened_advantages_have_mean_0_and_variance_1_over_real_tokens_only() -> None:
    mask_BT = torch.tensor([[True, True, False], [False, True, True]])
    values_BT = torch.tensor([[1.0, 2.0, 900.0], [-900.0, 3.0, 6.0]], dtype=torch.float64)
    white_BT = ppo.whiten(values_BT, mask_BT)
    # mean 3, variance (4 + 1 + 0 + 9)/4 = 3.5
    assert white_BT[mask_BT].tolist() == pytest.approx([x / math.sqrt(3.5) for x in (-2, -1, 0, 3)], abs=1e-7)
    assert not white_BT[~mask_BT].any()


def test_k1_and_k3_by_hand() -> None:
    new_BT, reference_BT = row(math.log(0.5), math.log(0.2)), row(math.log(0.25), math.log(0.4))
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    assert ppo.k1(new_BT, reference_BT, mask_BT)[0].tolist() == pytest.approx([math.log(2), -math.log(2)])
    # e^(−k1) − 1 + k1: ½ − 1 + ln 2 and 2 − 1 − ln 2
    assert ppo.k3(new_BT, reference_BT, mask_BT)[0].tolist() == pytest.approx([math.log(2) - 0.5, 1 - math.log(2)])


def test_k1_and_k3_are_both_unbiased_for_the_full_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    new_V, reference_V = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    p_V, new_V, reference_V = new_V.softmax(0), new_V.log_softmax(0), reference_V.log_softmax(0)
    mask_V = torch.ones(6, dtype=torch.bool)
    expected = ppo.full_kl(new_V[None], reference_V[None]).item()
    assert expected == pytest.approx((p_V * (new_V - reference_V)).sum().item())
    assert expected > 0.1
    for estimator in (ppo.k1, ppo.k3):
        assert (p_V * estimator(new_V, reference_V, mask_V)).sum().item() == pytest.approx(expected, abs=1e-12)


def test_full_kl_by_hand_and_its_direction() -> None:
    new, reference = torch.tensor([[0.75, 0.25]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    there, back = ppo.full_kl(new, reference).item(), ppo.full_kl(reference, new).item()
    assert there == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert back == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2))
    assert ppo.full_kl(new + 3, new).item() == pytest.approx(0, abs=1e-15)


def test_the_score_lands_on_the_last_token_and_the_kl_on_each() -> None:
    mask_BT = torch.tensor([[False, True, True, False], [True, True, True, True]])
    k1_BT = torch.tensor([[9.0, 1.0, 2.0, 9.0], [0.0, 0.0, 0.0, 4.0]])
    rewards_BT = ppo.token_rewards(torch.tensor([10.0, -1.0]), k1_BT, mask_BT, beta=0.5)
    assert rewards_BT.tolist() == [[0.0, -0.5, 9.0, 0.0], [0.0, 0.0, 0.0, -3.0]]


def test_the_loss_is_minus_the_mean_over_tokens_not_over_replies() -> None:
    mask_BT = torch.tensor([[True, False, False], [True, True, True]])
    zeros_BT = torch.zeros(2, 3)
    advantages_BT = torch.tensor([[1.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    assert ppo.policy_loss(zeros_BT, zeros_BT, advantages_BT, mask_BT, clip=0.2).item() == pytest.approx(-4.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 1.0, -1.0, -1.0),
        (2.0, 1.0, -1.2, 0.0),  # clipped above: no reason to go on
        (2.0, -1.0, 2.0, 2.0),  # worse and likelier: all of the gradient
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (4.0, -1.0, 3.0, 0.0),  # dual clip
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    new_BT = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    found = ppo.policy_loss(new_BT, torch.zeros(1, 1).double(), torch.full((1, 1), advantage).double(), YES, clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert new_BT.grad is not None
    assert new_BT.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_returns_are_what_was_still_to_come() -> None:
    mask_BT = torch.tensor([[False, True, True, True, False]])
    assert ppo.returns(row(NAN, 1, 2, 4, NAN), mask_BT, 0.5).tolist() == [
        [0, 1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4, 0]
    ]


def test_chi2_by_hand() -> None:
    k1_BT = row(0.0, math.log(3), -math.log(2), 9.0)
    assert ppo.chi2(k1_BT, bound=20.0).tolist()[0] == pytest.approx([0.0, 2.0, -0.5, 19.0])


def test_a_huge_log_ratio_stays_finite() -> None:
    assert ppo.ratio(row(500.0), row(0.0), YES).item() == pytest.approx(math.exp(20))


def test_explained_variance() -> None:
    mask_BT = torch.tensor([[True, True, True, True, False]])
    returns_BT = row(1, 2, 3, 4, NAN)
    assert ppo.explained_variance(row(1, 2, 3, 4, 7), returns_BT, mask_BT) == pytest.approx(1)
    assert ppo.explained_variance(row(9, 9, 9, 9, 7), returns_BT, mask_BT) == pytest.approx(0)
    # errors (0, 0, 0, 2): variance .75 of 1.25
    assert ppo.explained_variance(row(1, 2, 3, 2, 7), returns_BT, mask_BT) == pytest.approx(0.4)


def test_the_price_of_a_nat_follows_the_budget() -> None:
    control = ppo.KLController(beta=0.05, target=1.5, horizon=20)
    assert control.update(3.0) == pytest.approx(0.05 * 1.01)  # an error of 1, clipped at .2
    assert control.update(1.5) == pytest.approx(0.05 * 1.01)
    assert control.update(0.0) == pytest.approx(0.05 * 1.01 * 0.99)
    assert control.update(1.65) == pytest.approx(0.05 * 1.01 * 0.99 * 1.005)
    assert [control.update(100.0) for _ in range(1000)][-1] == 1.0
    assert control.target == 1.5


def test_ppo_imports_only_torch() -> None:
    tree = ast.parse(Path(ppo.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"torch", "__future__", "dataclasses"}


def test_the_clip_share_by_hand() -> None:
    ratio_BT = torch.tensor([[1.3, 1.1, 0.7], [0.85, 9.0, float("nan")]])
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    assert ppo.clip_share(ratio_BT, mask_BT, 0.2) == pytest.approx(2 / 4)
