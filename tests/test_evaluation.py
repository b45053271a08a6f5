"""What an update's report says of each kind: by hand where that can be done, on judgements the fit never saw."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from learner.concordance import concordance
from learner.crossfit import CrossFit, RewardConfig, Tried
from learner.evaluation import by_channel, calibration_error, compared, rater_agreement
from learner.evidence import Evidence
from learner.judgement import Judgement
from learner.losses import CHANNELS, Links
from tests.test_prepare import BAD, GOOD, OTHER, said
from tests.test_reward import EOS, embeddings, no_states, random_thumbs, thumbs

ROWS = {(one.prompt_ids, one.reply_ids): row for row, one in enumerate((GOOD, BAD, OTHER))}
UTILITY_N = torch.tensor([1.0, -1.0, 0.0])


def tried(*judgements: Judgement) -> Tried:
    evidence = Evidence.of(judgements, ROWS, {}, RewardConfig())
    links = Links(0, 0.0, tuple(dict.fromkeys([*CHANNELS, *evidence.channels])))
    return Tried(list(range(len(judgements))), evidence, links.requires_grad_(False), UTILITY_N)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_figures_of_thumbs_by_hand() -> None:
    part = tried(said("thumb", 1.0), said("thumb", 0.0, BAD), said("thumb", 1.0, BAD), said("thumb", 0.0, OTHER))
    found = by_channel([part])["thumb"]
    chances = [sigmoid(1), 1 - sigmoid(-1), sigmoid(-1), 0.5]
    assert found["count"] == 4
    assert found["nll"] == pytest.approx(-sum(map(math.log, chances)) / 4)
    assert found["auroc"] == pytest.approx(2.5 / 4)  # up at 1 and −1, down at −1 and 0: right, right, tied, wrong
    gaps = [abs(sigmoid(1) - 1), abs(2 * sigmoid(-1) - 1), 0.5]
    assert found["ece"] == pytest.approx(sum(gaps) / 4)


def test_the_figures_of_preferences_corrections_and_rankings_by_hand() -> None:
    part = tried(
        said("preference", other=BAD),
        said("preference", reply=BAD, other=OTHER),
        said("correction", other=OTHER),
        said("ranking", other=BAD, ranked=(GOOD, BAD, OTHER)),
    )
    found = by_channel([part])
    assert set(found) == {"preference", "correction", "ranking"}
    assert found["preference"]["accuracy"] == 0.5
    assert found["preference"]["nll"] == pytest.approx(-(math.log(sigmoid(2)) + math.log(sigmoid(-1))) / 2)
    assert found["correction"]["ece"] == pytest.approx(1 - sigmoid(1))
    assert found["ranking"]["tau"] == pytest.approx(1 / 3)  # two pairs right, one wrong


def test_the_order_of_stars_is_compared_by_kendalls_tau() -> None:
    found = by_channel([tried(said("rating", 5), said("rating", 1, BAD), said("rating", 4, OTHER))])["rating"]
    assert found["tau"] == 1.0


def test_what_is_no_opinion_of_the_whole_is_no_evidence_for_the_gate() -> None:
    whole = (said("thumb"), said("thumb", 0.0, BAD), said("preference", other=BAD))
    other = (
        said("correction", other=BAD),
        said("signal", signal="copied"),
        said("signal", 0.0, BAD, signal="copied"),
        said("thumb", aspect="safe"),
        said("thumb", 0.0, BAD, aspect="safe"),
    )
    assert [one.index_J for one in compared([tried(*whole, *other)])] == [[0, 1], [2]]


def test_a_ranking_of_two_is_evidence_as_a_preference_is() -> None:
    [pair] = compared([tried(said("preference", other=BAD))])
    [ranking] = compared([tried(said("ranking", other=BAD, ranked=(GOOD, BAD)))])
    assert ranking.index_J == [0, 0]
    assert pair.index_J == [0]
    assert concordance([ranking], [[0]]) == concordance([pair], [[0]])


def test_calibration_is_the_gap_between_foretold_and_seen_in_each_tenth() -> None:
    chance_J, came_J = torch.tensor([0.22, 0.28, 0.95, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert calibration_error(chance_J, came_J) == pytest.approx((0.5 + 0.05) / 4)


def test_raters_agree_as_often_as_two_of_them_say_the_same_of_the_same() -> None:
    ann, bob, cat = (said("thumb", value, user=user) for value, user in ((1.0, "ann"), (1.0, "bob"), (0.0, "cat")))
    assert rater_agreement([ann, bob, cat]) == pytest.approx(1 / 3)
    assert rater_agreement([ann, said("rating", 5, user="bob"), said("thumb", 0.0, BAD, user="cat")]) == 1.0
    turned = said("preference", reply=BAD, other=GOOD, user="bob")
    assert rater_agreement([said("preference", other=BAD), turned]) == 0.0
    assert rater_agreement([ann, said("thumb", 0.0, aspect="safe", user="bob")]) is None


def test_what_came_later_is_foretold_by_what_came_before() -> None:
    """The taste turns at four fifths of the time: what was learned before is wrong of all that follows."""
    judgements = thumbs(200, noise=0.0)
    turned = [replace(one, value=1 - one.value) if one.at >= 160 else one for one in judgements]
    found = []
    for said_ in (judgements, turned):
        fit = CrossFit(embeddings(), {EOS}, said_[::-1], no_states, RewardConfig(penalties=(1.5,)), 0, lambda _: None)
        [later] = fit.later()
        assert {said_[::-1][row].at for row in later.index_J} == set(range(160, 200))
        found.append(by_channel([later])["thumb"]["auroc"])
    assert found[0] > 0.9
    assert found[1] < 0.1


def test_of_random_thumbs_nothing_is_foretold() -> None:
    fit = CrossFit(
        embeddings(), {EOS}, random_thumbs(300, 0.5, 1), no_states, RewardConfig(penalties=(4.0,)), 0, lambda _: None
    )
    found = by_channel(fit.unseen())["thumb"]
    assert found["auroc"] == pytest.approx(0.5, abs=0.1)
    assert found["nll"] >= math.log(2) - 0.02
