"""The gate: every check says yes and no where it should, with a number and a sentence."""

from __future__ import annotations

import dataclasses
import json

import pytest

from learner import gate
from learner.gate import GateReport
from learner.reward import RewardReport
from learner.rollouts import Rollout, Shape, repetition


def reward_report(auroc: float | None, error: float = 0.03) -> RewardReport:
    return RewardReport(
        judgements={"thumb": 200},
        raters=20,
        folds_by="rater",
        auroc=auroc,
        auroc_error=error,
        comparisons=9000,
        nll=0.5,
        chance_nll=0.6,
        calibration_error=0.05,
        length_correlation=0.0,
        penalty=1.5,
        agreement=0.9,
    )


def rollouts(lengths: list[int], ended: bool = True, logprob: float = -1.0, same: bool = False) -> list[Rollout]:
    return [
        Rollout((1, 2), tuple([5] * length if same else range(length)), ended, (logprob,) * length)
        for length in lengths
    ]


BASE = rollouts([10, 20, 30, 40] * 10)


def form(candidate: list[Rollout]) -> dict[str, str]:
    return {check.name: check.verdict for check in gate.keeps_form(candidate, BASE)}


def test_it_knows_when_the_lower_bound_is_above_chance() -> None:
    check = gate.knows(reward_report(0.6, error=0.03))  # .6 − 2.326·.03 = .530
    assert check.verdict == "pass"
    assert check.value == pytest.approx(0.6 - 2.326 * 0.03)
    assert "60%" in check.sentence


def test_a_lucky_auroc_is_not_enough() -> None:
    check = gate.knows(reward_report(0.6, error=0.06))
    assert check.verdict == "fail"
    assert "does not surely beat" in check.sentence


def test_feedback_that_all_says_the_same_is_named() -> None:
    check = gate.knows(reward_report(None))
    assert check.verdict == "fail"
    assert (
        check.sentence == "There is nothing to learn from: 200 judgements, all saying the same, or all of one prompt."
    )
    assert gate.no_feedback().verdict == "fail"


@pytest.mark.parametrize(("kl", "verdict"), [(0.0, "pass"), (2.19, "pass"), (2.21, "fail"), (float("nan"), "fail")])
def test_the_budget(kl: float, verdict: str) -> None:
    check = gate.within_budget(kl, limit=2.0)
    assert (check.verdict, check.bound) == (verdict, pytest.approx(2.2))


def test_no_silent_no_op() -> None:
    assert gate.changed(0.0).verdict == "fail"
    assert gate.changed(1e-9).verdict == "pass"
    assert gate.changed(float("nan")).verdict == "fail"


@pytest.mark.parametrize(("gain", "verdict"), [(0.3, "pass"), (-0.19, "pass"), (-0.2, "fail"), (float("nan"), "fail")])
def test_a_candidate_is_not_surely_worse_than_what_it_would_replace(gain: float, verdict: str) -> None:
    assert gate.no_worse(gain, 0.1).verdict == verdict


def test_replies_like_the_base_pass() -> None:
    assert set(form(BASE).values()) == {"pass"}
    assert set(form(rollouts([14] * 40)).values()) == {"pass"}


@pytest.mark.parametrize(
    ("candidate", "name"),
    [
        (rollouts([5] * 40), "length"),
        (rollouts([60] * 40), "length"),
        (rollouts([20] * 38 + [20] * 2, ended=False), "ended"),
        (rollouts([20] * 40, same=True), "repetition"),
        (rollouts([20] * 40, logprob=-0.1), "variety"),
    ],
)
def test_what_went_wrong_is_named(candidate: list[Rollout], name: str) -> None:
    found = form(candidate)
    assert [check for check, verdict in found.items() if verdict == "fail"] == [name]


def test_a_skipped_check_passes_nothing() -> None:
    passing = gate.changed(1.0)
    assert GateReport.of([passing]).passed
    assert not GateReport.of([passing, *gate.skipped(["kl"])]).passed
    assert not GateReport.of([passing, gate.changed(0.0)]).passed


def test_the_report_is_json() -> None:
    report = GateReport.of([gate.knows(reward_report(0.9)), *gate.keeps_form(BASE, BASE), *gate.skipped(["kl"])])
    told = json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
    assert told["checks"][0]["name"] == "reward_model"
    assert all(set(check) == {"name", "verdict", "value", "bound", "sentence"} for check in told["checks"])


def test_shape_by_hand() -> None:
    said = [Rollout((1,), (5, 6, 7, 8, 5, 6, 7, 8), True, (-1.0,) * 8), Rollout((1,), (5, 6), False, (-3.0,) * 2)]
    shape = Shape.of(said)
    assert (shape.tokens, shape.ended) == (5.0, 0.5)
    assert shape.repetition == pytest.approx(0.5 * 1 / 5)  # of five 4-grams one comes again; the other reply has none
    assert shape.nll == pytest.approx((8 + 6) / 10)
    assert repetition(()) == 0.0
