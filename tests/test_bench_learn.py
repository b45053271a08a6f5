"""benchmarks/learn.py without its peers: prompts dealt without overlap, one judge, finished runs kept, the table."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import learn
from benchmarks.learn import key, newest
from benchmarks.learn_heed import checked, judgements
from benchmarks.learn_plan import LEARNERS, Run, plan, tuning
from benchmarks.learn_table import table
from benchmarks.servers import NotHere
from benchmarks.trials import JUDGED, SIZES, Cell, Judge, groups, pairs_of, phrasing, thumbs_of, with_product
from feedback.raters import crowd
from learner import corpus, trial
from learner.config import LearnerConfig
from learner.steps import POLICY
from learner.trainer import Trainer
from serving.peft_files import save_peft

Json = learn.Json


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Trainer(LearnerConfig(rollout_tokens=32)))


def of_intents(group: str) -> set[str | None]:
    return {corpus.judge(prompt, "").intent for prompt in groups()[group]}


def phrasings(group: str) -> set[tuple[str | None, int]]:
    return {(corpus.judge(prompt, "").intent, phrasing(prompt)) for prompt in groups()[group]}


def test_no_prompt_is_in_two_groups_and_each_has_enough_for_400_replies() -> None:
    assert {group: len(set(prompts)) for group, prompts in groups().items()} == SIZES
    assert not any(set(groups()[a]) & set(groups()[b]) for a, b in itertools.combinations(groups(), 2))
    assert min(SIZES[group] for group in JUDGED) * trial.FRESH >= 400


def test_untaught_intents_and_paraphrases_get_no_feedback() -> None:
    taught = phrasings("taught")
    assert not of_intents("untaught") & (of_intents("taught") | of_intents("fresh") | of_intents("paraphrased"))
    assert not phrasings("paraphrased") & (taught | phrasings("fresh") | phrasings("tuning"))


def test_a_phrasing_is_found_behind_a_greeting_too() -> None:
    intent = corpus.intents()["capital"]
    row = intent.rows[0]
    for number, ask in enumerate(intent.asks):
        said = ask.format(**row)
        assert phrasing(said) == number
        assert phrasing(intent.before[1] + said[0].lower() + said[1:] + intent.after[1]) == number


def test_a_pair_is_made_within_a_prompt_or_else_within_an_intent() -> None:
    a, b = [prompt for prompt in groups()["taught"] if corpus.judge(prompt, "").intent == "capital"][:2]
    other = next(prompt for prompt in groups()["taught"] if corpus.judge(prompt, "").intent != "capital")

    def thumb(prompt: str, reply: str, label: bool) -> Json:
        return {"prompt": prompt, "prompt_ids": [1], "user": "u", "reply": reply, "reply_ids": [2], "label": label}

    rows = [thumb(a, "good", True), thumb(b, "bad", False), thumb(other, "alone", True)]
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs_of(rows)] == [(a, "good", "bad")]
    same = [*rows, thumb(a, "worse", False)]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs_of(same)] == [("good", "worse")]
    assert [(one["reply"], one["label"]) for one in thumbs_of(pairs_of(rows))] == [("good", True), ("bad", False)]


def test_the_error_of_a_product_is_worked_out_to_first_order() -> None:
    prompts = ["What is 2 plus 3?", "Hello!", "Hello!", "Hello!"]
    found = with_product({"satisfied": 0.5, "facts": 0.8}, prompts)
    assert found["product"] == pytest.approx(0.4)
    assert found["error"] == pytest.approx((0.8**2 * 0.25 / 4 + 0.5**2 * 0.16 / 1) ** 0.5)


@pytest.mark.parametrize("kind", ["thumb", "preference"])
def test_heed_reads_from_a_job_the_very_judgements_that_were_given(judge: Judge, kind: trial.Kind) -> None:
    cell = Cell("emoji", kind, 20, 0.1, 3)
    people = crowd("emoji", trial.RATERS, noise=0.1, seed=3)
    given = trial.feedback(judge.trainer, groups()["taught"], people, 20, 3, kind)
    read = judgements(json.loads(json.dumps({"kind": kind, **judge.feedback(cell)})))

    def said(rows: list[trial.Judgement]) -> list[object]:
        return [(row.kind, row.user, row.value, row.reply.reply_ids, row.other and row.other.reply_ids) for row in rows]

    assert said(read) == said(given)
    assert len(read) == 20


def test_a_fresh_adapter_is_judged_to_be_the_base(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "FRESH", 1)
    judge.trainer.model.adapter(POLICY).reset(5)
    save_peft(tmp_path, judge.trainer.model.adapter(POLICY).weights(), "base")
    found = judge.judge(tmp_path, "emoji", "tuning", 0)
    assert found["kl"] == 0
    assert found["replies"] == SIZES["tuning"]
    asked = [trial.encoded(judge.trainer, prompt) for prompt in groups()["tuning"]]
    replies = judge.trainer.sampler.sample(asked, None, 0)
    assert found["tokens"] == sum(len(reply.reply_ids) for reply in replies) / len(replies)


def test_learners_are_asked_for_the_log_prob_of_the_whole_reply(judge: Judge) -> None:
    prompt, reply = trial.encoded(judge.trainer, "Hello!"), (20, 30, 1)
    said = judge.trainer.model.base(torch.tensor([[*prompt, *reply]])).logits[0].detach().log_softmax(-1)
    expected = sum(float(said[len(prompt) - 1 + place, one]) for place, one in enumerate(reply))
    assert checked(judge.trainer, {"prompt_ids": prompt, "reply_ids": reply}) == pytest.approx(expected, abs=1e-4)


def test_the_plan_has_three_seeds_of_heed_and_ppo_and_150_thumbs_for_heed_alone() -> None:
    runs = list(plan())
    assert Counter(run.learner for run in runs) == {"heed": 36, "trl-ppo": 30, "rloo": 10, "kto": 10, "dpo": 10}
    assert {run.learner for run in runs if run.cell.count == 150} == {"heed"}
    assert len({run.key for run in runs}) == len(runs)
    assert not {run.cell for run in tuning()} & {run.cell for run in runs}
    assert {len(learner.tried) for learner in LEARNERS.values()} == {3}


def row_of(run: Run, *, product: float = 0.8, quiet: bool = True) -> Json:
    judged = {
        group: {"satisfied": 0.9, "facts": 0.9, "product": product, "error": 0.02, "kl": 1.5} for group in run.judged
    }
    cell = {name: getattr(run.cell, name) for name in Cell.__slots__}
    return {
        "learner": run.learner, "cell": cell, "lr": run.lr, "judged": judged, "refused": [], "wall_s": 33.0,
        "quiet": quiet, "rollouts": 1024, "ppo_s": 20.48, "peak_mb": 700.0, "imports_mb": 400.0,
    }  # fmt: skip


def test_a_finished_run_is_not_run_again_but_one_that_was_not_quiet_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run for run in plan() if run.learner == "kto"]
    results, measured = tmp_path / "rows.jsonl", []
    rows = [row_of(run, quiet=number != 2) for number, run in enumerate(runs[:-1])]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def measure(run: Run) -> Json:
        measured.append(run)
        return row_of(run)

    monkeypatch.setattr(learn, "measure", measure)
    for more, expected in ((["--anyway"], [runs[-1]]), ([], [runs[2]]), ([], [])):
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["learn", "--only", "kto", "--results", str(results), *more])
        learn.main()
        assert measured == expected
    assert len(newest(learn.read(results))) == len(runs)
    assert {key(row) for row in learn.read(results)} == {run.key for run in runs}
    assert capsys.readouterr().out.count("| kto |") == 3 * len(runs)


def test_a_learner_that_cannot_be_installed_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(run: Run) -> Json:
        if run.learner == "kto":
            raise NotHere("no network")
        return row_of(run)

    results = tmp_path / "rows.jsonl"
    monkeypatch.setattr(learn, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["learn", "--only", "kto", "--only", "dpo", "--results", str(results)])
    learn.main()
    assert {row["learner"] for row in learn.read(results)} == {"dpo"}
    assert "kto is left out: no network" in capsys.readouterr().err


def test_the_table_has_means_over_seeds_and_no_times_of_runs_that_were_not_quiet() -> None:
    cells = [Cell("emoji", "thumb", 300, 0.1, seed) for seed in range(2)]
    heed = [row_of(Run("heed", cell, 1e-3), product=0.8 + cell.seed / 10) for cell in cells]
    loud = [row_of(Run("kto", cells[0], 1e-3), product=0.7, quiet=False)]
    head, _, ours, theirs, _, *means = table([*heed, *loud]).splitlines()
    assert head.count("|") == ours.count("|") == theirs.count("|")
    assert "| heed | 0.001 | 2 | 0.900 | 0.900 | **0.850** ± 0.014 | 1.50 |" in ours
    assert ours.endswith("| 33 | 50 | 300 |")
    assert theirs.endswith("| – | – | 300 |")
    assert means == [
        "- heed: mean satisfied × facts 0.800, KL 1.50, over 1 cells",
        "- kto: mean satisfied × facts 0.700, KL 1.50, over 1 cells",
    ]


def test_arguments_name_learners_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["learn", "--only", "heed", "--only", "dpo"])
    assert isinstance(learn.arguments(), argparse.Namespace)
    assert learn.arguments().only == ["heed", "dpo"]
