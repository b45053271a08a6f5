"""Simulated people: what they like is plain, and how imperfectly they say so can be measured."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from feedback.manners import manners, rewrite
from feedback.raters import TASTES, Rater, crowd, taste
from learner import corpus

PROMPT = "What is the capital of France?"
PLAIN = "The capital of France is Paris."
GAY = "The capital of France is Paris! 🙂"


@pytest.fixture(scope="module")
def turns() -> list[tuple[str, str]]:
    """Prompts and replies of the dialogues that the built-in model learns from."""
    chats = corpus.dialogues(seed=11, count=300)
    return [(a["content"], b["content"]) for chat in chats for a, b in itertools.pairwise(chat) if a["role"] == "user"]


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ("The capital is Paris.", {"short"}),
        ("word " * 20, {"short"}),
        ("word " * 21, set()),
        ("Certainly, it is Paris.", {"short", "formal"}),
        ("SHALL it be?", {"short", "formal", "question"}),
        ("Is it? Yes.", {"short"}),
        ("Is it? \n", {"short", "question"}),
        ("Paris! It is.", {"short", "exclaim"}),
        ("Paris 🗼", {"short", "emoji"}),
        ("Two:\n- one\n- two", {"short", "bullets"}),
        ("- one", {"short", "bullets"}),
        ("one - two -three", {"short"}),
        ("I'm sure.", {"short", "first_person"}),
        ("In the US it is Ohio.", {"short"}),
        ("", {"short"}),
    ],
)
def test_a_manner_is_a_plain_rule_on_the_text(reply: str, shown: set[str]) -> None:
    assert {manner for manner, there in manners(reply).items() if there} == shown


def test_the_rules_are_those_the_built_in_model_was_made_by(turns: list[tuple[str, str]]) -> None:
    assert len(turns) >= 300
    for _, reply in turns:
        assert manners(reply) == corpus.manners(reply)


def test_there_is_a_taste_for_both_sides_of_every_manner() -> None:
    assert len(TASTES) == 2 * len(manners("")) == 14
    sides = {(manner, there) for single in TASTES.values() for manner, there in single.wants.items()}
    assert sides == {(manner, there) for manner in manners("") for there in (True, False)}


def test_a_conjunction_wants_all_of_its_parts() -> None:
    both = taste("exclaiming+emoji")
    assert both.name == "exclaiming+emoji"
    assert both(PROMPT, GAY)
    assert not both(PROMPT, PLAIN + " 🙂")
    assert both.degree(PROMPT, PLAIN + " 🙂") == 0.5
    assert taste("short+short").wants == {"short": True}


def test_a_taste_that_nobody_has_is_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match=r"nobody has the taste 'loud': known are short, long, .*joined by \+"):
        taste("emoji+loud")
    with pytest.raises(ValueError, match="both sides of one manner"):
        taste("short+long")
    with pytest.raises(ValueError, match="nobody has the taste ''"):
        crowd("", 3)


def shares(raters: Sequence[Rater], reply: str) -> float:
    """Share of thumbs up, each rater asked about 100 prompts."""
    thumbs = [rater.thumb(f"prompt {number}", reply) for rater in raters for number in range(100)]
    said = [thumb for thumb in thumbs if thumb is not None]
    return sum(said) / len(said)


def test_without_noise_a_thumb_is_the_taste() -> None:
    raters = crowd("emoji", 10, noise=0.0, bias=3.0, seed=1)
    assert shares(raters, GAY) == 1.0
    assert shares(raters, PLAIN) == 0.0


def test_noise_is_the_share_of_thumbs_that_are_wrong() -> None:
    raters = crowd("emoji", 100, noise=0.1, seed=2)
    assert shares(raters, GAY) == pytest.approx(0.9, abs=0.01)  # 10,000 draws: 3 sigma
    assert shares(raters, PLAIN) == pytest.approx(0.1, abs=0.01)


def test_bias_is_added_to_the_log_odds() -> None:
    for bias in (-1.5, 0.7):
        raters = [Rater(f"r{number}", taste("emoji"), noise=0.2, bias=bias, seed=number) for number in range(100)]
        for reply, odds in ((GAY, 4.0), (PLAIN, 0.25)):
            expected = 1 / (1 + math.exp(-(math.log(odds) + bias)))
            assert shares(raters, reply) == pytest.approx(expected, abs=0.015)


def test_a_crowd_s_biases_spread_as_told() -> None:
    biases = [rater.bias for rater in crowd("emoji", 2000, bias=0.5, seed=3)]
    assert sum(biases) / 2000 == pytest.approx(0.0, abs=0.05)
    assert math.sqrt(sum(bias**2 for bias in biases) / 2000) == pytest.approx(0.5, abs=0.03)
    assert {rater.bias for rater in crowd("emoji", 10, seed=3)} == {0.0}


def test_sparsity_is_the_share_of_replies_they_say_nothing_of() -> None:
    raters = crowd("emoji", 100, sparsity=0.7, seed=4)
    thumbs = [rater.thumb(f"prompt {number}", GAY) for rater in raters for number in range(100)]
    assert thumbs.count(None) / len(thumbs) == pytest.approx(0.7, abs=0.015)
    silent = [
        (rater, number) for rater in raters for number in range(5) if rater.thumb(f"prompt {number}", GAY) is None
    ]
    assert all(rater.stars(f"prompt {number}", GAY) is None for rater, number in silent)


def test_stars_agree_with_the_thumb_and_grow_with_what_is_there(turns: list[tuple[str, str]]) -> None:
    sums = {0.0: [], 0.5: [], 1.0: []}
    for rater in crowd("emoji+calm", 5, noise=0.1, bias=1.0, seed=5):
        for prompt, reply in turns:
            stars, thumb = rater.stars(prompt, reply), rater.thumb(prompt, reply)
            assert stars in {1, 2, 3, 4, 5}
            assert (stars >= 4) == thumb
            sums[rater.taste.degree(prompt, reply)].append(stars)
    none, half, all_ = (sum(stars) / len(stars) for stars in sums.values())
    assert none + 0.5 < half < all_ - 1


def test_the_harsh_give_fewer_stars() -> None:
    def mean(bias: float) -> float:
        raters = [Rater(f"r{number}", taste("emoji"), noise=0.1, bias=bias, seed=number) for number in range(200)]
        return sum(rater.stars(PROMPT, GAY) or 0 for rater in raters) / 200

    assert mean(-2.0) + 0.5 < mean(0.0) < mean(2.0) - 0.2


def test_a_preference_is_for_what_has_more_of_it() -> None:
    rater = crowd("emoji+exclaiming", 1, noise=0.0)[0]
    assert rater.prefer(PROMPT, GAY, PLAIN) == 0
    assert rater.prefer(PROMPT, PLAIN, GAY) == 1
    assert rater.prefer(PROMPT, PLAIN, "Paris 🙂") == 1
    assert rater.prefer(PROMPT, PLAIN, "Paris.") is None
    noisy = crowd("emoji", 100, noise=0.25, seed=6)
    wrong = sum(rater.prefer(f"prompt {number}", GAY, PLAIN) == 1 for rater in noisy for number in range(100))
    assert wrong / 10_000 == pytest.approx(0.25, abs=0.015)


def test_the_same_seed_gives_the_same_people_who_say_the_same_in_any_order(turns: list[tuple[str, str]]) -> None:
    def opinions(order: Sequence[tuple[str, str]]) -> dict[tuple[str, str, str], object]:
        raters = crowd("short+calm", 5, noise=0.3, bias=0.5, sparsity=0.3, seed=7)
        return {(r.user, *turn): (r.thumb(*turn), r.stars(*turn), r.correct(*turn)) for turn in order for r in raters}

    shuffled = random.Random(0).sample(turns, len(turns))
    assert opinions(turns) == opinions(shuffled)
    assert crowd("emoji", 5, bias=1.0, seed=7) == crowd("emoji", 5, bias=1.0, seed=7)
    assert crowd("emoji", 5, bias=1.0, seed=7) != crowd("emoji", 5, bias=1.0, seed=8)
    assert len({rater.user for rater in crowd("emoji", 50)}) == 50


def test_people_of_one_crowd_err_apart_from_each_other() -> None:
    raters = crowd("emoji", 40, noise=0.5, seed=9)
    patterns = {tuple(rater.thumb(f"prompt {number}", GAY) for number in range(40)) for rater in raters}
    assert len(patterns) == 40


def test_a_correction_is_the_reply_as_wanted(turns: list[tuple[str, str]]) -> None:
    sides = [{manner: there} for manner in manners("") for there in (True, False)]
    pairs = [a | b for a, b in itertools.combinations(sides, 2) if a.keys() != b.keys()]
    asked, corrected = 0, 0
    for wants in sides + pairs:
        for _, reply in random.Random(0).sample(turns, 30):
            edited = rewrite(reply, wants)
            asked += 1
            if edited is not None:
                corrected += 1
                assert all(manners(edited)[manner] == there for manner, there in wants.items())
    assert corrected / asked > 0.95


def test_a_correction_keeps_what_was_said() -> None:
    rater = crowd("emoji+question", 1, noise=0.0)[0]
    assert rater.correct(PROMPT, PLAIN) == "The capital of France is Paris. 🙂 Anything else?"
    assert rater.correct(PROMPT, "It is Paris 🙂, is it not?") is None
    assert (
        crowd("bulleted", 1)[0].correct(PROMPT, "It is Paris. It is large! 🙂") == "- It is Paris.\n- It is large! 🙂"
    )
    assert crowd("impersonal", 1)[0].correct(PROMPT, "I know it. It is Paris.") == "It is Paris."
    assert crowd("impersonal", 1)[0].correct(PROMPT, "I know it.") is None
    assert crowd("formal", 1)[0].correct(PROMPT, "") is None
