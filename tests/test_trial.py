"""Trials: feedback that is what it says, and `heed bench learn` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feedback.raters import crowd, taste
from learner.config import LearnerConfig
from learner.trainer import Trainer
from learner.trial import FRESH, Halves, feedback, memory_mb, quality, rollouts_per_s, run_cell
from serving.config import ServingConfig
from tests.commands import Heed

SMALL = {"rollouts": 16, "update_batches": 1, "gate_samples": 16, "rollout_tokens": 40}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(LearnerConfig(serving=ServingConfig(), **SMALL))


def test_half_of_what_people_say_is_kept_for_judging() -> None:
    halves = Halves.of(None)
    assert len(halves.seen) == len(halves.unseen) == 100
    assert not set(halves.seen) & set(halves.unseen)


def test_thumbs_say_what_their_raters_want(trainer: Trainer) -> None:
    people, prompts = crowd("emoji", 3, noise=0.0), ["Hello!", "Tell me a joke."]
    judgements = feedback(trainer, prompts, people, 50, 0, "thumb")
    said = [trainer.chat.decode(one.reply.reply_ids) for one in judgements]
    assert [one.value for one in judgements] == [float(taste("emoji")("", text)) for text in said]
    assert {one.value for one in judgements} == {0.0, 1.0}
    assert [one.user for one in judgements[:4]] == ["rater-001", "rater-002", "rater-003", "rater-001"]
    assert len({one.feedback_id for one in judgements}) == len(judgements) == 50
    assert judgements == feedback(trainer, prompts, people, 50, 0, "thumb")


def test_preferences_are_between_two_replies_to_one_prompt(trainer: Trainer) -> None:
    judgements = feedback(trainer, ["Hello!", "Tell me a joke."], crowd("emoji", 3, noise=0.0), 20, 0, "preference")
    assert len(judgements) == 20
    for one in judgements:
        assert one.other is not None
        assert one.other.prompt_ids == one.reply.prompt_ids
        assert taste("emoji")("", trainer.chat.decode(one.reply.reply_ids))
        assert not taste("emoji")("", trainer.chat.decode(one.other.reply_ids))


def test_people_who_prefer_nothing_are_not_waited_for(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.trial.MOST_TURNS", 3)
    silent = crowd("emoji", 3, sparsity=1.0)
    with pytest.raises(ValueError, match="of 6 pairs only 0 differ in what these people want"):
        feedback(trainer, ["Hello!", "Tell me a joke."], silent, 2, 0, "preference")


def test_quality_counts_what_it_says() -> None:
    found = quality([("What is 2 plus 2?", "Hi!"), ("What is 2 plus 2?", "2 plus 2 is 4.")], taste("exclaiming"))
    assert (found["satisfied"], found["facts"], found["both"]) == (0.5, 0.5, 0.0)


def test_only_rollouts_that_were_trained_on_count() -> None:
    batches = [{"steps_s": 1.0}, {"steps_s": 1.0}, {"kl": 2.0}]
    report = {"policy": {"batches": batches}, "seconds": {"rollouts": 3.0, "ppo": 5.0}}
    assert rollouts_per_s(report, 128) == 32.0
    assert rollouts_per_s({}, 128) is None


def test_the_peak_of_memory_is_above_what_is_held() -> None:
    held, peak = memory_mb("VmRSS"), memory_mb("VmHWM")
    if held is None or peak is None:
        pytest.skip("this system has no /proc")
    assert 50 < held <= peak


def test_a_run_is_judged_on_prompts_that_got_no_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.trial.FRESH", 1)
    config = LearnerConfig(serving=ServingConfig(), **SMALL)
    row = run_cell("emoji", 60, 0.1, 3, objective="rloo", config=config)
    assert (row["objective"], row["seed"], row["count"]) == ("rloo", 3, 60)
    assert row["kl"] >= 0
    assert 0.2 < row["before"]["satisfied"] < 0.6
    assert set(row["before"]) == set(row["after"])
    json.dumps(row, allow_nan=False)
    assert FRESH == 10


def test_heed_bench_learn_prints_a_line_and_a_table(heed: Heed, tmp_path: Path) -> None:
    settings = {f"HEED_{name.upper()}": str(value) for name, value in SMALL.items()}
    given = ("--objective", "sft", "--rater", "emoji", "--count", "40", "--json", "--out", tmp_path / "runs.jsonl")
    done = heed("bench", "learn", *given, **settings)
    assert done.code == 0, done.err
    row = json.loads(done.out)
    assert (row["objective"], row["taste"], row["count"], row["kind"]) == ("sft", "emoji", 40, "thumb")
    assert json.loads((tmp_path / "runs.jsonl").read_text("utf-8")) == row
    assert "satisfied" in done.err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--objective", "grpo"), "no objective is called grpo; known are ppo, a2c, reinforce, rloo, kto, dpo, sft."),
        (("--rater", "rude"), "nobody has the taste 'rude'"),
        (("--kind", "stars"), "--kind stars: must be thumb or preference."),
    ],
)
def test_what_no_run_could_take_is_refused(flags: tuple[str, str], why: str, heed: Heed) -> None:
    done = heed("bench", "learn", *flags)
    assert done.code == 1
    assert why in done.err
