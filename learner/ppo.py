"""The mathematics of PPO: tensors in, tensors out; no model, no files, only torch.

Axes stand at the end of the names: B replies, T token positions of a padded batch, V entries of the vocabulary,
N any list of tokens. `logprobs_BT[b, t]` is log p(token t | tokens before t), `values_BT[b, t]` the value of the state in
which token t is about to be said, and `mask_BT` is True where token t belongs to the reply (its end-of-sequence included).
Whatever stands in a masked slot, NaN included, changes neither a value nor a gradient.

References: PPO (1707.06347), GAE (1506.02438), dual clip (1912.09729), KL estimators k1 and k3 (joschu.net/blog/kl-approx),
adaptive KL and the per-token KL reward (1909.08593), χ² beside the KL (2407.13399), details of RLHF with PPO (Huang et al.,
"The N Implementation Details").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0


def masked_sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the real tokens, a scalar."""
    return torch.where(mask_BT, values_BT, 0.0).sum()


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the real tokens, a scalar: each token weighs the same, whichever reply it is in."""
    return masked_sum(values_BT, mask_BT) / mask_BT.sum()


def whiten(values_BT: Tensor, mask_BT: Tensor, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and (biased) variance 1 over the real tokens; masked slots become 0."""
    centred_BT = torch.where(mask_BT, values_BT - masked_mean(values_BT, mask_BT), 0.0)
    variance = masked_mean(centred_BT.square(), mask_BT)
    return centred_BT * torch.rsqrt(variance + eps)


def k1(new_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log π_new − log π_reference of each token: unbiased for KL(new ‖ reference) on samples of new; may be negative."""
    return torch.where(mask_BT, new_BT - reference_BT, 0.0)


def k3(new_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """e^(−k1) − 1 + k1 of each token: unbiased as k1 is, never negative, and of smaller variance."""
    difference_BT = k1(new_BT, reference_BT, mask_BT).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(-difference_BT) + difference_BT


def chi2(k1_BT: Tensor, bound: float) -> Tensor:
    """π_new ÷ π_reference − 1 of each token, at most `bound` − 1: without a bound, unbiased for χ²(new ‖ reference) on samples
    of new. Beside the KL it makes the price of a token grow with the ratio, not its logarithm alone (2407.13399). As a reward its
    gradient is that of ½χ², as in that paper: at the optimum of k1 + c·chi2 the score is β·(log ρ + c·ρ) + constant."""
    return k1_BT.exp().clamp(max=bound) - 1


def full_kl(new_NV: Tensor, reference_NV: Tensor) -> Tensor:
    """KL(new ‖ reference) of each token over the whole vocabulary, [N], from two sets of logits; nats."""
    new_NV = new_NV.log_softmax(-1)
    return (new_NV.exp() * (new_NV - reference_NV.log_softmax(-1))).sum(-1)


def last_token(mask_BT: Tensor) -> Tensor:
    """Position of each reply's last real token, [B]: its end-of-sequence, or the token at which it was cut."""
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, positions_T, -1).amax(1)


def token_rewards(scores_B: Tensor, divergence_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """−β·divergence on every token of the reply, such as k1 (1909.08593), and the reply's score on its last one."""
    rewards_BT = torch.where(mask_BT, -beta * divergence_BT, 0.0)
    return rewards_BT.index_put(
        (torch.arange(len(scores_B), device=scores_B.device), last_token(mask_BT)), scores_B, accumulate=True
    )


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates, [B, T].

    A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V_{t+1} − V_t; after the last real token V = A = 0 (1506.02438, eq. 16).
    """
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = next_advantage_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = torch.where(mask_BT[:, t], advantage_B, 0.0)
        next_advantage_B = torch.where(mask_BT[:, t], advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)
    return advantages_BT


def returns(rewards_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + γ·G_{t+1}: what was still to come from each real token on, [B, T]; 0 in masked slots."""
    return gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma=gamma, lam=1.0)


def ratio(new_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """ρ = π_new/π_prox of each token; 1 in masked slots. The log-ratio is bounded by ±20 so that nothing overflows."""
    return k1(new_BT, old_BT, mask_BT).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def staleness_weight(prox_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor, bound: float) -> Tensor:
    """min(π_prox ÷ π_behaviour, bound) of each token, [B, T]: what a token that another policy said counts (2505.24298)."""
    return ratio(prox_BT, behaviour_BT, mask_BT).clamp(max=bound)


def policy_loss(
    new_BT: Tensor,
    old_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float,
    dual_clip: float = 3.0,
    tokens: int | None = None,
) -> Tensor:
    """PPO's clipped surrogate, to be minimised: −Σ min(ρA, clip(ρ, 1±clip)·A) ÷ tokens.

    `tokens` is the count of the whole minibatch (default: of this batch), so that the losses of its micro-batches add up to
    the loss of the whole. For A < 0 the objective is bounded below by dual_clip·A (1912.09729).
    """
    ratio_BT = ratio(new_BT, old_BT, mask_BT)
    advantages_BT = torch.where(mask_BT, advantages_BT, 0.0)
    objective_BT = torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(1 - clip, 1 + clip) * advantages_BT)
    bounded_BT = torch.maximum(objective_BT, dual_clip * advantages_BT)
    objective_BT = torch.where(advantages_BT < 0, bounded_BT, objective_BT)
    return -masked_sum(objective_BT, mask_BT) / (int(mask_BT.sum()) if tokens is None else tokens)


def clip_share(ratio_BT: Tensor, mask_BT: Tensor, clip: float) -> float:
    """Share of the real tokens whose ratio lies outside 1 ± clip, where the surrogate is flat on one side."""
    return float(masked_mean(((ratio_BT - 1).abs() > clip).float(), mask_BT))


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 − Var(returns − values) ÷ Var(returns) over the real tokens: 1 is perfect, 0 no better than a constant."""
    returns_N, errors_N = returns_BT[mask_BT], (returns_BT - values_BT)[mask_BT]
    return float(1 - errors_N.var(correction=0) / returns_N.var(correction=0).clamp_min(1e-8))


@dataclass(slots=True)
class KLController:
    """β, the price of a nat, moved so that the KL to the reference stays near its target (1909.08593, section 2.2).

    The target is a budget: this raises the price when it is overdrawn; nothing here ever raises the target.
    """

    beta: float
    target: float
    """Nats a reply."""
    horizon: float = 20.0
    """Batches over which a full error would double β, if errors were not clipped."""
    error_clip: float = 0.2
    bounds: tuple[float, float] = (0.005, 1.0)

    def update(self, kl: float) -> float:
        """The next β, after a batch whose mean KL to the reference was `kl` nats a reply."""
        error = min(max(kl / self.target - 1, -self.error_clip), self.error_clip)
        low, high = self.bounds
        self.beta = min(max(self.beta * (1 + error / self.horizon), low), high)
        return self.beta
