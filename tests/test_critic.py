"""The values: what can be foretold is, nothing leaks from a reply into its own values, and noise becomes the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.critic import FOLDS, crossfit_values


def states(replies: int, tokens: int = 6, width: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(replies * tokens, width), torch.arange(replies).repeat_interleave(tokens)


def test_a_linear_return_is_found() -> None:
    features_NF, reply_N = states(60)
    returns_N = features_NF @ torch.arange(8.0) + 5
    values_N = crossfit_values(features_NF, returns_N, reply_N)
    assert float((values_N - returns_N).var() / returns_N.var()) < 0.01


def test_noise_becomes_the_mean_of_other_replies() -> None:
    """Features enough to tell each reply from all others: a fit that saw a reply's own return would foretell it."""
    reply_N = torch.arange(40).repeat_interleave(6)
    returns_N = torch.randn(40, generator=torch.Generator().manual_seed(1))[reply_N]
    values_N = crossfit_values(torch.eye(40)[reply_N], returns_N, reply_N)
    for fold in range(FOLDS):
        own_N = reply_N % FOLDS == fold
        torch.testing.assert_close(
            values_N[own_N], returns_N[~own_N].mean().expand(int(own_N.sum())), atol=0.05, rtol=0
        )


def test_a_reply_has_no_say_in_its_own_values() -> None:
    features_NF, reply_N = states(40)
    returns_N = features_NF[:, 0]
    own_N = reply_N % FOLDS == 3  # so little of a change moves no penalty, and those of one fold see none of it
    changed_N = torch.where(own_N, returns_N + 0.01, returns_N)
    values_N, after_N = (crossfit_values(features_NF, one_N, reply_N) for one_N in (returns_N, changed_N))
    assert torch.equal(values_N[own_N], after_N[own_N])
    assert not torch.equal(values_N[~own_N], after_N[~own_N])


def test_one_reply_alone_is_worth_nothing_known() -> None:
    features_NF, reply_N = states(1)
    assert not crossfit_values(features_NF, torch.ones(6), reply_N).any()
