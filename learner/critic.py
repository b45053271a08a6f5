"""The value of a state, by ridge regression on what the policy itself makes of it.

Fitted to each batch anew, in closed form, on the last hidden states of the very forward pass that recomputed the log-probs:
it costs no pass of its own, cannot lag behind the policy, and falls back to the mean where nothing can be foretold.
Every value is cross-fitted: no reply's own return has a say in it, but in the choice among a few penalties that all share; else
it would pull its own advantages towards 0. Measured with states of 192 numbers; the cost grows with their cube.

Axes: N tokens of all replies, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

FOLDS = 4
PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Ridge penalties to choose from, in units of a feature's variance."""


def crossfit_values(features_NF: Tensor, returns_N: Tensor, reply_N: Tensor) -> Tensor:
    """Values of states, [N], each by a fit to the returns of other replies.

    `reply_N` tells whose token each is. The penalty is the one whose values are nearest to the returns; where the mean of
    the other replies' returns is nearer still, that is the value.
    """
    features_NF = features_NF / features_NF.std(0, correction=0).clamp_min(1e-6)
    candidates = torch.zeros(len(PENALTIES) + 1, len(returns_N))
    for fold in range(FOLDS):
        out_N = reply_N % FOLDS == fold
        if not out_N.any() or out_N.all():
            continue
        mean = returns_N[~out_N].mean()
        middle_F = features_NF[~out_N].mean(0)
        known_MF, out_MF = features_NF[~out_N] - middle_F, features_NF[out_N] - middle_F
        gram_FF = known_MF.T @ known_MF / len(known_MF)
        target_F = known_MF.T @ (returns_N[~out_N] - mean) / len(known_MF)
        candidates[:, out_N] = mean
        for row, penalty in enumerate(PENALTIES):
            weights_F = torch.linalg.solve(gram_FF + penalty * torch.eye(len(gram_FF)), target_F)
            candidates[row, out_N] += out_MF @ weights_F
    return candidates[int((candidates - returns_N).square().mean(1).argmin())]
