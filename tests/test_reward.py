"""The reward model: each loss a true likelihood, features that add up, and evidence that is honest."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learner import gate
from learner.concordance import Compared, concordance
from learner.crossfit import CrossFit, RewardConfig, deal
from learner.evidence import chance_nll, top_share, weigh
from learner.features import Features
from learner.judgement import Judgement, Sample, Tokens
from learner.losses import CHANNELS, Links, preference_loss, ranking_loss, rating_loss, thumb_loss
from learner.reward import RewardModel, correlation

EOS, VOCABULARY = 2, 60
NICE = 7
"""The token that people in these tests like to read."""


def embeddings() -> Tensor:
    return torch.randn(VOCABULARY, 16, generator=torch.Generator().manual_seed(0))


def states(count: int, numbers: int = 4) -> Tensor:
    """Something that a base may make of so many replies."""
    return 3 + torch.randn(count, numbers, generator=torch.Generator().manual_seed(count))


def no_states(samples: Sequence[Tokens]) -> Tensor:
    return states(len(samples), 0)


def reply(rng: random.Random) -> tuple[int, ...]:
    """A random reply; a third of them hold the nice token."""
    ids = [rng.randrange(10, VOCABULARY) for _ in range(rng.randrange(3, 15))]
    if rng.random() < 0.35:
        ids[rng.randrange(len(ids))] = NICE
    return (*ids, EOS)


def sample(number: int, reply_ids: Sequence[int], prompt: int = 0) -> Sample:
    return Sample(f"r{number}", (prompt,), tuple(reply_ids), 0)


def judgement(
    number: int, kind: str, value: float, reply: Sample, user: str | None = None, other: Sample | None = None
) -> Judgement:
    return Judgement(f"f{number}", kind, user, value, reply, other, float(number))


def thumbs(count: int, seed: int = 0, noise: float = 0.1, raters: int = 20) -> list[Judgement]:
    """Thumbs up for the nice token, some of them slips."""
    rng = random.Random(seed)
    said = [reply(rng) for _ in range(count)]
    return [
        judgement(
            n,
            "thumb",
            float((NICE in ids) != (rng.random() < noise)),
            sample(n, ids, n % 40),
            f"u{rng.randrange(raters)}",
        )
        for n, ids in enumerate(said)
    ]


def random_thumbs(count: int, chance: float, seed: int) -> list[Judgement]:
    """Thumbs that say nothing of the replies."""
    rng = random.Random(seed + 1000)
    return [replace(one, value=float(rng.random() < chance)) for one in thumbs(count, seed)]


def reference(count: int = 150) -> list[Sample]:
    rng = random.Random(99)
    return [sample(n, reply(rng)) for n in range(count)]


def fitted(judgements: Sequence[Judgement], **settings: object) -> tuple[RewardModel, float, float]:
    """The model, the AUROC of its score on fresh replies, and the lower bound that it claims."""
    model = RewardModel(embeddings(), {EOS}, replace(RewardConfig(), **settings))  # type: ignore[arg-type]
    report = model.fit(judgements, reference(), seed=0)
    fresh = reference(400)[150:]
    score_B, nice_B = model.score(fresh), torch.tensor([NICE in one.reply_ids for one in fresh])
    auroc = float((score_B[nice_B][:, None] > score_B[~nice_B][None]).double().mean())
    return model, auroc, report.lower(gate.SURE)


# 5. float64 gradcheck of each reward loss; a rating of two levels is a thumb


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_5_gradients_of_the_losses() -> None:
    assert torch.autograd.gradcheck(lambda d: preference_loss(d, 0.1), doubles(-30, -1.5, 0.0, 0.7, 30))
    up_B = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: thumb_loss(z, up_B), doubles(-3, -0.2, 0.9, 20))
    mask_BK = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(
        lambda u: ranking_loss(u.reshape(2, 3), mask_BK, 0.1), doubles(-2, 0.1, 0.5, 3, -4, 1)
    )
    level_B, thresholds = torch.tensor([0, 1, 2, 3, 4]), doubles(-1.5, -0.4, 0.3, 2.0)
    assert torch.autograd.gradcheck(lambda u, t: rating_loss(u, level_B, t), (doubles(-2, 0.1, 0.5, 3, -4), thresholds))


def test_5_a_rating_of_two_levels_is_a_thumb() -> None:
    utility_B, up_B, threshold = doubles(-3, -0.2, 0.9, 2), torch.tensor([1, 0, 1, 0]), doubles(0.4)
    torch.testing.assert_close(
        rating_loss(utility_B, up_B, threshold), thumb_loss(utility_B - threshold, up_B.double()), rtol=0, atol=1e-14
    )


def test_5_the_levels_of_a_rating_share_all_of_the_probability() -> None:
    thresholds = torch.tensor([-1.0, 0.2, 0.3, 4.0], dtype=torch.float64)
    for utility in (-6.0, 0.25, 3.0):
        chances = [
            math.exp(-rating_loss(torch.tensor([utility]).double(), torch.tensor([level]), thresholds).item())
            for level in range(5)
        ]
        assert sum(chances) == pytest.approx(1, abs=1e-12)
    # P(1 star) = 1 − σ(u − θ₁), P(2) = σ(u − θ₁) − σ(u − θ₂), at u = 0
    first = rating_loss(torch.zeros(2).double(), torch.tensor([0, 1]), thresholds).exp().reciprocal()
    sigma = [1 / (1 + math.exp(-x)) for x in (1.0, -0.2)]
    assert first.tolist() == pytest.approx([1 - sigma[0], sigma[0] - sigma[1]])


def test_5_a_ranking_of_two_is_a_preference() -> None:
    utility_B2 = torch.tensor([[1.0, -0.5], [-3.0, 2.0]], dtype=torch.float64)
    for smoothing in (0.0, 0.05):
        torch.testing.assert_close(
            ranking_loss(utility_B2, torch.ones(2, 2, dtype=torch.bool), smoothing),
            preference_loss(utility_B2[:, 0] - utility_B2[:, 1], smoothing),
            rtol=0,
            atol=1e-14,
        )


def test_5_all_orders_of_a_ranking_share_the_probability() -> None:
    utilities = (0.3, -1.0, 2.0, 0.1)
    every = torch.tensor(list(itertools.permutations(utilities)), dtype=torch.float64)
    loss_B = ranking_loss(every, torch.ones(24, 4, dtype=torch.bool), 0.0)
    assert float((-3 * loss_B).exp().sum()) == pytest.approx(1, abs=1e-12)
    # P(a ≻ b ≻ c) = e^a ÷ (e^a + e^b + e^c) · e^b ÷ (e^b + e^c), all weights being 1, 2 and 3
    three = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).log()
    loss = ranking_loss(three, torch.ones(1, 3, dtype=torch.bool), 0.1).item()
    assert loss == pytest.approx(-(0.9 * math.log(1 / 6 * 2 / 5) + 0.1 * math.log(3 / 6 * 2 / 3)) / 2)


def test_3_nan_in_a_masked_slot_of_a_ranking_changes_nothing() -> None:
    mask_BK = torch.tensor([[True, True, False], [True, True, True]])
    results = []
    for slot in (0.0, math.nan, math.inf):
        utility_BK = torch.tensor([[1.0, -0.5, slot], [0.2, 0.4, -1.0]], dtype=torch.float64, requires_grad=True)
        loss_B = ranking_loss(utility_BK, mask_BK, 0.05)
        (gradient_BK,) = torch.autograd.grad(loss_B.sum(), utility_BK)
        assert bool(torch.isfinite(gradient_BK).all())
        assert float(gradient_BK[0, 2]) == 0
        results.append((loss_B.detach(), gradient_BK))
    for loss_B, gradient_BK in results[1:]:
        assert torch.equal(loss_B, results[0][0])
        assert torch.equal(gradient_BK, results[0][1])


def test_5_losses_by_hand() -> None:
    one = torch.tensor([math.log(3.0)], dtype=torch.float64)  # σ = ¾
    assert preference_loss(one, 0.0).item() == pytest.approx(-math.log(0.75))
    assert preference_loss(one, 0.1).item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))
    assert thumb_loss(one, torch.zeros(1).double()).item() == pytest.approx(-math.log(0.25))


# The links


def links() -> Links:
    found = Links(
        raters=3, channels=(*CHANNELS, "thumb:safe", "rating:safe", "correction", "signal:abandoned")
    ).double()
    with torch.no_grad():
        for number, parameter in enumerate(found.parameters()):
            parameter += 0.1 * (number + 1)
        found.bias.copy_(torch.tensor([9.0, 0.5, -0.4, 0.0]))
    return found


def test_the_links_follow_the_scale_of_the_utility_and_no_likelihood_changes() -> None:
    utility_B, rater_B = torch.tensor([-1.0, 0.3, 2.0]).double(), torch.tensor([1, 2, 0])
    up_B, stars_B = torch.tensor([1.0, 0.0, 1.0]).double(), torch.tensor([2.0, 5.0, 1.0])

    def losses(model: Links, utility_B: Tensor) -> Tensor:
        return torch.cat(
            [
                model.thumb(utility_B, up_B, rater_B),
                model.rating(utility_B, stars_B, rater_B),
                model.preference(utility_B, utility_B.flip(0)),
                model.ranking(utility_B[None], torch.ones(1, 3, dtype=torch.bool)),
                model.thumb(utility_B, up_B, rater_B, "thumb:safe"),
                model.rating(utility_B, stars_B, rater_B, "rating:safe"),
                model.preference(utility_B, utility_B.flip(0), "correction"),
                model.thumb(utility_B, up_B, rater_B, "signal:abandoned"),
            ]
        )

    before, after = links(), links()
    after.rescale(shift=0.7, scale=2.5)
    torch.testing.assert_close(losses(after, (utility_B - 0.7) / 2.5), losses(before, utility_B), rtol=0, atol=1e-12)
    assert after.slope("thumb").item() == pytest.approx(2.5 * before.slope("thumb").item())


def test_whoever_gave_no_name_has_no_bias() -> None:
    assert links().rater_bias(torch.tensor([0, 1, 2, 0])).tolist() == pytest.approx([0.0, 0.5, -0.4, 0.0], abs=1e-6)


def test_a_signal_may_speak_against_a_reply_and_no_other_kind_may() -> None:
    model = links()
    assert model.slope("signal:abandoned").item() < 0
    with torch.no_grad():
        for raw in model.raw_slopes.values():
            raw.fill_(-3.0)
    assert {channel for channel in model.raw_slopes if model.slope(channel).item() < 0} == {"signal:abandoned"}


def test_thresholds_increase_whatever_the_parameters() -> None:
    model = Links(raters=0)
    with torch.no_grad():
        model.raw_gaps.copy_(torch.tensor([-5.0, 0.0, 3.0]))
    assert bool((model.thresholds().diff() > 0).all())


# Features


def test_tables_say_what_the_weights_say() -> None:
    rng = random.Random(1)
    judged, others = [reply(rng) for _ in range(30)], [reply(rng) for _ in range(20)]
    features = Features(embeddings(), {EOS}, judged, states(30))
    weights_KF = torch.randn(3, features.of(judged, states(30)).shape[1], generator=torch.Generator().manual_seed(1))
    tables = features.tables(weights_KF)
    for replies in (judged, others, [(EOS,), (11, 11, 11, EOS), (11, 12)]):
        expected = weights_KF @ features.of(replies, states(len(replies))).T
        torch.testing.assert_close(tables.utilities(replies, states(len(replies))), expected, rtol=0, atol=1e-4)


def test_features_are_centred_and_of_length_1_in_the_mean() -> None:
    rng = random.Random(1)
    judged = [reply(rng) for _ in range(30)]
    for numbers in (0, 4):
        features_BF = Features(embeddings(), {EOS}, judged, states(30, numbers)).of(judged, states(30, numbers))
        assert float(features_BF.mean(0).abs().max()) < 1e-5
        assert float(features_BF.square().sum(1).mean()) == pytest.approx(1, abs=1e-4)


def test_a_half_said_reply_has_the_utility_of_what_was_said() -> None:
    rng = random.Random(1)
    judged = [reply(rng) for _ in range(30)]
    features = Features(embeddings(), {EOS}, judged, states(30))
    weights_KF = torch.randn(2, features.of(judged, states(30)).shape[1], generator=torch.Generator().manual_seed(1))
    tables = features.tables(weights_KF)
    ids, [state_S] = (11, 12, 11, 13, EOS), states(1)
    running_KT = tables.running(ids, state_S)
    assert running_KT.shape == (2, 6)
    torch.testing.assert_close(running_KT[:, -1], tables.utilities([ids], states(1))[:, 0], rtol=0, atol=1e-5)
    state_K = tables.state_KS @ state_S - tables.state_offset_K
    for said in range(1, 5):  # the same prefix as a whole reply, but for how it ends
        whole_K = tables.utilities([ids[:said]], states(1))[:, 0] - state_K
        whole_K += tables.end_K - tables.last_KV[:, ids[said - 1]]
        torch.testing.assert_close(running_KT[:, said], whole_K, rtol=0, atol=1e-5)


# Folds and weights


def test_folds_are_dealt_by_rater_and_hold_about_the_same() -> None:
    judgements = thumbs(200)
    fold_J, by = deal(judgements, 5, seed=0)
    assert by == "rater"
    folds_of = {
        user: {fold for one, fold in zip(judgements, fold_J, strict=True) if one.user == user}
        for user in {one.user for one in judgements}
    }
    assert all(len(folds) == 1 for folds in folds_of.values())
    sizes = [fold_J.count(fold) for fold in range(5)]
    assert max(sizes) - min(sizes) < 20


def test_folds_are_dealt_by_prompt_where_few_raters_are_known() -> None:
    judgements = [replace(one, user=one.user if n % 50 == 0 else None) for n, one in enumerate(thumbs(200))]
    fold_J, by = deal(judgements, 5, seed=0)
    assert by == "prompt"
    folds: dict[tuple[int, ...], set[int]] = {}
    for one, fold in zip(judgements, fold_J, strict=True):
        folds.setdefault(one.reply.prompt_ids, set()).add(fold)
    assert all(len(found) == 1 for found in folds.values())


def test_what_the_heaviest_rater_weighs_is_their_part_of_all_that_counts() -> None:
    assert top_share(["ann", "bob", "ann", None, ""], [1.0, 2.0, 2.0, 4.0, 1.0]) == pytest.approx(0.3)
    assert top_share([None, None], [1.0, 2.0]) == top_share([], []) == top_share(["ann"], [0.0]) == 0.0


def test_one_rater_weighs_at_most_their_share() -> None:
    judgements = [replace(one, user="loud" if n < 100 else f"u{n % 25}") for n, one in enumerate(thumbs(200))]
    weights = weigh(judgements, RewardConfig(rater_share=0.1))
    assert sum(weights[:100]) == pytest.approx(0.1 * 200)
    assert set(weights[100:]) == {1.0}


# What it learns


def test_it_learns_a_taste_from_noisy_thumbs() -> None:
    model, auroc, lower = fitted(thumbs(200))
    assert auroc > 0.95
    assert lower > 0.6
    score_B = model.score(reference())
    assert float(score_B.mean()) == pytest.approx(0, abs=1e-5)
    assert float(score_B.std()) == pytest.approx(1, abs=1e-5)


def test_by_the_states_it_learns_what_fits_the_prompt() -> None:
    """People like the nice token in answers to even prompts and dislike it in others: words alone cannot tell."""
    rng = random.Random(6)

    def fits(one: Tokens) -> bool:
        return (NICE in one.reply_ids) == (one.prompt_ids[0] % 2 == 0)

    def told(samples: Sequence[Tokens]) -> Tensor:
        noise_BS = torch.randn(len(samples), 20, generator=torch.Generator().manual_seed(len(samples)))
        return noise_BS.index_put(
            (torch.arange(len(samples)), torch.tensor(3)), torch.tensor([5.0 * fits(s) for s in samples])
        )

    judgements = [replace(one, value=float(fits(one.reply) != (rng.random() < 0.1))) for one in thumbs(200)]
    aurocs = []
    for known in (no_states, told):
        model = RewardModel(embeddings(), {EOS}, RewardConfig(), known)
        model.fit(judgements, reference(), seed=0)
        fresh = [sample(n, reply(rng), n % 40) for n in range(300)]
        score_B, fits_B = model.score(fresh), torch.tensor([fits(one) for one in fresh])
        aurocs.append(float((score_B[fits_B][:, None] > score_B[~fits_B][None]).double().mean()))
    assert aurocs[0] < 0.75
    assert aurocs[1] > 0.9


def test_it_learns_from_stars_and_preferences_as_well() -> None:
    rng = random.Random(3)
    said = [reply(rng) for _ in range(240)]
    stars = [
        judgement(
            n,
            "rating",
            min(max(round(3 + (2 if NICE in ids else -1) + rng.gauss(0, 1)), 1), 5),
            sample(n, ids),
            f"u{n % 12}",
        )
        for n, ids in enumerate(said[:120])
    ]
    pairs = []
    for n in range(120, 240, 2):
        better, worse = sorted(said[n : n + 2], key=lambda ids: NICE not in ids)
        if (NICE in better) != (NICE in worse):
            pairs.append(judgement(n, "preference", 1.0, sample(n, better), f"u{n % 12}", sample(n + 1, worse)))
    for judgements in (stars, pairs * 2, stars + pairs):
        _, auroc, _ = fitted(judgements)
        assert auroc > 0.9


def test_no_slope_grows_to_undo_the_penalty() -> None:
    """The penalty is on the weights alone: a slope that were free would grow, and the weights shrink, at no cost."""
    rng = random.Random(1)
    pairs = []
    for n in range(0, 160, 2):
        better, worse = sorted((reply(rng), reply(rng)), key=lambda ids: 11 not in ids)
        pairs.append(judgement(n, "preference", 1.0, sample(n, better), f"u{n % 12}", sample(n + 1, worse)))
    for judgements, channel in ((pairs, "preference"), ([*pairs, *thumbs(60)], "preference"), (thumbs(160), "thumb")):
        fit = CrossFit(embeddings(), {EOS}, judgements, no_states, RewardConfig(), 0, lambda _: None)
        assert fit.evidence.heaviest() == channel
        assert [float(member.links.slope(channel)) for member in fit.members] == pytest.approx([1.0] * 5)


def test_9_a_harsh_rater_is_not_a_bad_reply() -> None:
    rng = random.Random(4)
    bias = {f"u{n}": 2.5 if n % 2 else -2.5 for n in range(10)}
    judgements = []
    for n in range(600):
        ids, user = reply(rng), f"u{rng.randrange(10)}"
        logit = (2.0 if NICE in ids else -1.0) + bias[user]
        judgements.append(
            judgement(n, "thumb", float(rng.random() < 1 / (1 + math.exp(-logit))), sample(n, ids, n % 50), user)
        )
    fit = CrossFit(embeddings(), {EOS}, judgements, no_states, RewardConfig(), 0, lambda _: None)
    for fold, member in enumerate(fit.members):
        seen = [
            user
            for user in bias
            if any(one.user == user and f != fold for one, f in zip(judgements, fit.fold_J, strict=True))
        ]
        found = torch.tensor([float(member.links.bias[fit.raters[user]]) for user in seen])
        assert correlation(found, torch.tensor([bias[user] for user in seen])) > 0.95
        assert float(found.abs().mean()) > 1.0


def test_9_raters_who_choose_what_they_rate_do_not_mislead() -> None:
    """The generous ones mostly rate bad replies, the harsh ones good ones: the bare shares of thumbs up say the opposite."""
    rng = random.Random(5)
    judgements: list[Judgement] = []
    while len(judgements) < 500:
        ids, number = reply(rng), rng.randrange(10)
        generous, nice = number % 2 == 1, NICE in ids
        if rng.random() < (0.9 if generous != nice else 0.1):
            logit = (1.5 if nice else -1.5) + (2.5 if generous else -2.5)
            up = float(rng.random() < 1 / (1 + math.exp(-logit)))
            judgements.append(judgement(len(judgements), "thumb", up, sample(len(judgements), ids, 0), f"u{number}"))

    def share(nice: bool) -> float:
        values = [one.value for one in judgements if (NICE in one.reply.reply_ids) == nice]
        return sum(values) / len(values)

    assert share(True) < share(False)
    _, auroc, _ = fitted(judgements)
    assert auroc > 0.75  # biases are shrunk, so something of the selection stays


def test_9_silence_of_those_who_are_pleased_does_not_mislead() -> None:
    """Nine of ten who would say yes say nothing."""
    rng = random.Random(8)
    _, auroc, _ = fitted([one for one in thumbs(900) if one.value == 0 or rng.random() < 0.1])
    assert auroc > 0.9


def test_random_thumbs_teach_nothing() -> None:
    passed = sum(fitted(random_thumbs(150, chance, seed))[2] > 0.5 for chance in (0.3, 0.5) for seed in range(10))
    assert passed <= 1


def test_thumbs_that_all_say_the_same_teach_nothing() -> None:
    for value in (0.0, 1.0):
        model = RewardModel(embeddings(), {EOS}, RewardConfig())
        report = model.fit([replace(one, value=value) for one in thumbs(60)], reference(), seed=0)
        assert report.auroc is None
        assert report.lower(gate.SURE) == 0.0


def test_of_one_prompt_and_no_named_rater_nothing_is_surely_known() -> None:
    """All judgements fall into one fold: there is none that a member has not seen."""
    judgements = [replace(one, user=None, reply=replace(one.reply, prompt_ids=(1,))) for one in thumbs(60)]
    report = RewardModel(embeddings(), {EOS}, RewardConfig()).fit(judgements, reference(), seed=0)
    assert report.auroc is None


def test_a_handful_of_thumbs_is_never_sure() -> None:
    for count in (1, 2, 3, 6):
        judgements = [replace(one, value=float(n % 2), user=f"u{n}") for n, one in enumerate(thumbs(count, noise=0.0))]
        assert (
            RewardModel(embeddings(), {EOS}, RewardConfig()).fit(judgements, reference(), seed=0).lower(gate.SURE)
            <= 0.5
        )


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (fitted(thumbs(80))[0].score(reference()) for _ in range(2))
    assert torch.equal(first, second)


def test_pessimism_costs_what_the_members_disagree_about() -> None:
    fit = thumbs(80)
    plain, careful = (fitted(fit, pessimism=kappa)[0] for kappa in (0.0, 1.0))
    assert plain.tables is not None
    spread_B = plain.tables.utilities([one.reply_ids for one in reference()], no_states(reference())).std(0)
    gap_B = careful.score(reference()) - plain.score(reference())
    assert correlation(gap_B, spread_B) < -0.5


def test_a_restored_model_scores_the_same() -> None:
    model, _, _ = fitted(thumbs(80))
    again = RewardModel(embeddings(), {EOS}, RewardConfig())
    again.restore(*model.state())
    assert torch.equal(again.score(reference()), model.score(reference()))


def test_chance_knows_the_shares_alone() -> None:
    judgements = [judgement(n, "thumb", float(n == 0), sample(n, (11, EOS))) for n in range(4)]
    assert chance_nll(judgements) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    pair = judgement(9, "preference", 1.0, sample(1, (11, EOS)), None, sample(2, (12, EOS)))
    assert chance_nll([pair]) == pytest.approx(math.log(2))


# Concordance


def test_concordance_by_hand() -> None:
    # up: 3, 1; down: 2, 1, 0. Pairs won: 3 of 3; 1 beats 0, ties 1, loses to 2: 1.5 of 3
    score_J, up_J = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    found = concordance([Compared([0, 1, 2, 3, 4], score_J, up_J)], [range(5)])
    assert found is not None
    assert found.share == pytest.approx(4.5 / 6)
    assert found.comparisons == 6
    assert found.error == pytest.approx(math.sqrt(6 / (12 * 2 * 3)))  # few judgements: what chance alone allows


def test_preferences_are_comparisons_by_themselves() -> None:
    found = concordance([Compared(list(range(4)), torch.tensor([1.0, 2.0, -1.0, 0.5]), None)], [range(4)])
    assert found is not None
    assert found.share == 0.75
    assert found.error == pytest.approx(0.25)


def test_judgements_that_go_together_are_worth_less() -> None:
    generator = torch.Generator().manual_seed(0)
    up_J = torch.tensor([0.0, 1.0]).repeat_interleave(200)
    prompt_J = [(int(up), n % 10) for n, up in enumerate(up_J)]
    of_prompt = {
        prompt: 0.3 * prompt[0] + float(torch.randn((), generator=generator)) for prompt in sorted(set(prompt_J))
    }
    score_J = torch.tensor([of_prompt[prompt] for prompt in prompt_J]) + 0.1 * torch.randn(400, generator=generator)
    alone = concordance([Compared(list(range(400)), score_J, up_J)], [range(400)])
    together = concordance([Compared(list(range(400)), score_J, up_J)], [range(400), prompt_J])
    assert alone is not None
    assert together is not None
    assert together.share == alone.share
    assert together.error > 3 * alone.error


def test_nothing_to_compare() -> None:
    assert concordance([Compared([0, 1], torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))], [range(2)]) is None
    assert concordance([], [[]]) is None
