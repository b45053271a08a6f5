"""A round of the learner on tiny real models: PPO moves the policy where the score says, within its budget, repeatably."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

from learner import checkpoint, gate, improve, update
from learner.config import LearnerConfig
from learner.exhibits import looked_at
from learner.figures import FIGURES, figures
from learner.improve import Improver, PolicyReport, shrunk
from learner.judgement import Judgement, Sample, Tokens, key_of
from learner.live import LiveReply
from learner.metrics import CHECKS, PHASES
from learner.model import LearnerModel
from learner.recipe import PPOConfig, learning_rate, ppo_config
from learner.rollouts import Prompt, Rollout, Sampler, shuffled
from learner.steps import POLICY
from learner.trainer import Trainer
from learner.update import Candidate, difference
from learner.winrate import win_rate
from learner.worth import best, idle
from serving.config import ServingConfig
from serving.engine import Engine
from serving.lora import AdapterWeights
from serving.model import ModelError, twin
from tests import bases

PROMPTS = [(number, number + 1, number + 2) for number in range(10, 60, 4)]
NICE = 84
SMALL = PPOConfig(
    rollouts=32,
    minibatch=16,
    epochs=2,
    batches=4,
    lr=1e-2,
    warmup_steps=1,
    step_limit=0.2,
    beta=0.05,
    chi_share=0.0,
    kl_price=0.0,
    patience=4,
)


class LowIds:
    """A score that likes replies of ids below 160: the share of them, spread out to about −2 … 2."""

    def running(self, samples: Sequence[Tokens], states_BS: Tensor | None = None) -> list[Tensor]:  # noqa: ARG002 as a Scorer
        sums = [
            torch.tensor([0.0, *(4.0 * (token < 160) - 2.0 for token in one.reply_ids)]).cumsum(0) for one in samples
        ]
        return [low_T / torch.arange(len(low_T)).clamp_min(1) for low_T in sums]


def improver(config: PPOConfig = SMALL, seed: int = 0) -> Improver:
    base = bases.llama()
    model = LearnerModel(twin(base), (POLICY,), rank=4, scaling=2.0, seed=0)
    engine = Engine(base, bases.chat(), rows=32, max_len=48, rank=4)
    return Improver(model, LowIds(), Sampler(engine, 10), config, seed)


def score_of(rollouts: Sequence[Rollout]) -> float:
    return sum(float(running_T[-1]) for running_T in LowIds().running(rollouts)) / len(rollouts)


def bytes_of(weights: AdapterWeights) -> bytes:
    return b"".join(tensor.numpy().tobytes() for pair in weights.tensors.values() for tensor in pair)


# PPO


def test_the_score_rises_within_the_budget() -> None:
    found = improver(dataclasses.replace(SMALL, rollouts=64, batches=12, kl_limit=4.0))
    before = found.collector.sampler.sample(PROMPTS * 40, None, 1)
    report = found.run(PROMPTS, lambda *_: None)
    after = found.collector.sampler.sample(PROMPTS * 8, found.policy.weights(), 1)
    assert score_of(after) > score_of(before) + 0.1
    assert all(batch["kl"] <= 4.0 * SMALL.overrun for batch in report.batches[:-1])
    assert report.batches[0]["kl"] == 0.0
    assert report.stopped


@pytest.mark.parametrize("kl_limit", [2.0, 0.05])
def test_the_same_seed_gives_the_same_bytes(kl_limit: float) -> None:
    runs = [improver(dataclasses.replace(SMALL, batches=3, kl_limit=kl_limit), seed=seed) for seed in (3, 3, 4)]
    reports = [run.run(PROMPTS, lambda *_: None) for run in runs]
    assert all((report.share < 1) == (kl_limit < 1) for report in reports)  # with the way back too
    first, second, other = (bytes_of(run.policy.weights()) for run in runs)
    assert first == second
    assert first != other


@pytest.mark.parametrize("micro_tokens", [1, 60, 10_000])
def test_4_the_gradient_does_not_depend_on_the_micro_batches(
    micro_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(tokens: int) -> list[Tensor]:
        found = improver(dataclasses.replace(SMALL, micro_tokens=tokens))
        found.policy.load(bases.adapter(found.model.base, scaling=0.3))
        given: list[Tensor] = []
        monkeypatch.setattr(found.steps, "step", lambda parts, **_: given.extend(map(sum, zip(*parts, strict=True))))
        experience = found.collector.look_at(found.collector.sampler.sample(PROMPTS, found.policy.weights(), 0))
        found.policy_step(experience, [7, 2, 9, 4, 0])
        return given

    expected = gradients(500)
    torch.testing.assert_close(gradients(micro_tokens), expected, rtol=1e-3, atol=1e-6)
    assert max(float(one.abs().max()) for one in expected) > 1e-3


def test_2_the_first_ratio_is_1_and_a_learning_rate_of_0_changes_nothing() -> None:
    found = improver(dataclasses.replace(SMALL, lr=0.0))
    experience = found.collector.look_at(found.collector.sampler.sample(PROMPTS, found.policy.weights(), 0))
    step = found.policy_step(experience, list(range(8)))
    assert abs(step.moved) < 1e-9
    assert step.clipped == 0.0
    assert found.learn_from(experience)["moved"] < 1e-9


def test_advantages_are_whitened_over_the_whole_batch() -> None:
    found = improver()
    experience = found.collector.look_at(found.collector.sampler.sample(PROMPTS, found.policy.weights(), 0))
    real = experience.advantages_BT[experience.batch.mask_BT]
    assert float(real.mean()) == pytest.approx(0, abs=1e-6)
    assert float(real.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_the_entropy_of_a_batch_is_that_of_the_policy() -> None:
    found = improver()
    experience = found.collector.look_at(found.collector.sampler.sample(PROMPTS * 4, found.policy.weights(), 0))
    _, entropy_BT = found.model.logprobs_and_entropy(experience.batch, POLICY)
    exact = entropy_BT[experience.batch.mask_BT].mean().item()
    assert experience.figures["entropy"] == pytest.approx(exact, rel=0.05)  # some 500 tokens, where chance moves it


def test_a_reply_cut_at_the_limit_is_penalised_and_no_end_is_forged() -> None:
    found = improver(dataclasses.replace(SMALL, missing_eos_penalty=100.0))
    rollouts = found.collector.sampler.sample(PROMPTS * 3, None, 0)
    cut = [not rollout.ended for rollout in rollouts]
    assert 0 < sum(cut) < len(cut)
    assert all(len(rollout.reply_ids) == 10 for rollout, one in zip(rollouts, cut, strict=True) if one)
    plain = improver(dataclasses.replace(SMALL, missing_eos_penalty=0.0)).collector.look_at(rollouts)
    gap = plain.figures["score"] - found.collector.look_at(rollouts).figures["score"]
    assert gap == pytest.approx(100 * sum(cut) / len(cut), rel=1e-4)


def test_a_phrase_said_twice_costs() -> None:
    found, prompt = improver(dataclasses.replace(SMALL, repetition_penalty=6.0)), PROMPTS[0]
    once, twice = (Rollout(prompt, ids, True, ()) for ids in ((*range(10, 20), 2), (*range(10, 15), *range(10, 15), 2)))
    plain = improver(dataclasses.replace(SMALL, repetition_penalty=0.0))
    for one, cost in ((once, 0.0), (twice, 6.0 * 2 / 8)):  # of the 8 phrases of four tokens two come again
        gap = plain.collector.look_at([one]).figures["score"] - found.collector.look_at([one]).figures["score"]
        assert gap == pytest.approx(cost, abs=1e-5)


def test_what_the_base_hardly_ever_says_costs_more_than_its_kl() -> None:
    config = dataclasses.replace(SMALL, beta=1.0, chi_share=0.5, chi_bound=8.0)
    found = improver(config)
    found.policy.load(bases.adapter(found.model.base, scaling=2.0))
    rollouts = found.collector.sampler.sample(PROMPTS, found.policy.weights(), 0)
    seen = found.collector.look_at(rollouts)
    plain = improver(dataclasses.replace(config, chi_share=0.0))
    plain.policy.load(found.policy.weights())
    k1_BT = seen.old_BT - found.model.logprobs(seen.batch, None).detach()
    expected_BT = -0.5 * (k1_BT.exp().clamp(max=8.0) - 1)
    assert float(k1_BT.max()) > math.log(8)
    gap_BT = seen.rewards_BT - plain.collector.look_at(rollouts).rewards_BT
    torch.testing.assert_close(gap_BT[seen.batch.mask_BT], expected_BT[seen.batch.mask_BT], rtol=1e-3, atol=1e-4)


class Asked:
    """A score that the prompt alone tells: a running score shows nothing of it, hidden states some."""

    def running(self, samples: Sequence[Tokens], states_BS: Tensor) -> list[Tensor]:
        assert len(samples) == len(states_BS)
        return [torch.tensor([0.0] * len(one.reply_ids) + [one.prompt_ids[0] / 20 - 1.5]) for one in samples]


def test_the_values_foretell_what_the_prompt_tells() -> None:
    values: list[Tensor] = []
    for micro_tokens in (10_000, 50):
        prices = {"beta": 0.0, "missing_eos_penalty": 0.0, "repetition_penalty": 0.0}
        found = improver(dataclasses.replace(SMALL, **prices, micro_tokens=micro_tokens))
        found.policy.load(bases.adapter(found.model.base, scaling=0.3))
        found.collector.reward = Asked()
        seen = found.collector.look_at(found.collector.sampler.sample(PROMPTS * 8, None, 0))
        assert seen.figures["explained_variance"] > 0.2
        values.append(seen.values_BT)
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3)


def test_a_minibatch_with_a_wild_ratio_is_skipped() -> None:
    found = improver(dataclasses.replace(SMALL, max_mean_ratio=10.0))
    experience = found.collector.look_at(found.collector.sampler.sample(PROMPTS, found.policy.weights(), 0))
    experience.old_BT -= 5.0  # a ratio of e⁵ everywhere
    before = bytes_of(found.policy.weights())
    found.policy_step(experience, list(range(8)))
    assert bytes_of(found.policy.weights()) == before


def test_a_big_step_ends_the_epochs() -> None:
    found = improver(dataclasses.replace(SMALL, lr=0.3, epochs=50, step_limit=0.02))
    experience = found.collector.look_at(found.collector.sampler.sample(PROMPTS * 3, found.policy.weights(), 0))
    done = found.learn_from(experience)
    assert done["epochs"] < 5
    assert done["moved"] > 0.02


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_update_that_overran_its_budget_goes_back_into_it(seed: int) -> None:
    told: list[float] = []
    found = improver(dataclasses.replace(SMALL, kl_limit=0.3, batches=16, patience=16), seed)
    report = found.run(PROMPTS, lambda _, fraction, *__: told.append(fraction))
    assert report.batches[-1]["kl"] > 0.3 * found.config.overrun
    assert "reached" in report.stopped
    assert report.batches[report.kept]["kl"] > 0.3
    rollouts = found.collector.sampler.sample(PROMPTS * 8, found.policy.weights(), 2)
    assert 0.2 < found.collector.mean_kl(rollouts) < 0.35
    assert sorted(told) == told
    assert told[-1] == 1.0


def test_an_update_goes_on_beyond_its_budget_up_to_the_overrun() -> None:
    found = improver(dataclasses.replace(SMALL, kl_limit=0.3, overrun=3.0, batches=16, patience=16))
    kl = [batch["kl"] for batch in found.run(PROMPTS, lambda *_: None).batches]
    assert any(0.3 < nats <= 0.9 for nats in kl[:-1])
    assert kl[-1] > 0.9


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
def test_the_way_back_ends_within_the_limit_however_the_kl_falls(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = improver(dataclasses.replace(SMALL, kl_limit=1.0))
    whole = bases.adapter(found.model.base)
    found.policy.load(whole)
    size = float(found.policy.up[0].detach().norm())

    def kl(_: Sequence[Rollout] = ()) -> float:
        return 3.0 * (float(found.policy.up[0].detach().norm()) / size) ** power

    monkeypatch.setattr(found.collector, "roll_out", lambda *_: [])
    monkeypatch.setattr(found.collector, "mean_kl", kl)
    report = PolicyReport([{"kl": 3.0}])
    found.go_back(iter(()), report)
    assert 0.6 < kl() <= 1.0
    assert kl() == pytest.approx(3.0 * report.share**power, rel=1e-4)


def test_the_policy_taken_is_the_one_worth_its_kl() -> None:
    def batches(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"score": score, "kl": kl} for score, kl in pairs]

    assert best(batches((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)), 0.2) == 2
    assert best(batches((0.0, 0.0), (1.0, 0.8), (1.04, 1.8), (1.02, 1.7)), 0.2) == 1
    assert best(batches((0.0, 0.0), (-0.5, 0.1)), 0.2) == 0


def test_an_update_ends_when_batches_bring_nothing_worth_their_kl() -> None:
    def idle_after(*pairs: tuple[float, float]) -> int:
        return idle([{"score": score, "kl": kl} for score, kl in pairs], 0.2)

    assert idle_after((0.5, 0.0), (0.0, 0.01), (0.1, 0.02), (0.1, 0.05)) == 0  # a lucky first batch; nothing moved yet
    assert idle_after((0.0, 0.0), (1.0, 0.8), (1.04, 1.8), (1.02, 1.7)) == 2
    assert idle_after((0.0, 0.0), (0.5, 0.2), (0.53, 0.2), (0.54, 0.2)) == 2  # a little more is chance
    assert idle_after((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)) == 0


def test_a_policy_that_is_not_worth_its_kl_is_given_up() -> None:
    found = improver(dataclasses.replace(SMALL, batches=16, kl_price=100.0, patience=2))
    report = found.run(PROMPTS, lambda *_: None)
    assert report.stopped == "2 batches brought no reward worth its KL"
    assert len(report.batches) < 10
    assert report.batches[-1]["kl"] > report.batches[report.kept]["kl"]


def test_the_policy_that_was_chosen_is_left_in_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = improver(), list[AdapterWeights]()
    sample = found.collector.sampler.sample

    def sampled(prompts: Sequence[Prompt], weights: AdapterWeights, *rest: Any, **named: Any) -> list[Rollout]:
        asked.append(weights)
        return sample(prompts, weights, *rest, **named)

    monkeypatch.setattr(found.collector.sampler, "sample", sampled)
    monkeypatch.setattr(found, "choose", lambda _: 1)
    report = found.run(PROMPTS, lambda *_: None)
    assert len(asked) == len(report.batches) == 5
    assert bytes_of(found.policy.weights()) == bytes_of(asked[1])
    assert len({bytes_of(weights) for weights in asked}) == 5


def test_prompts_come_in_rounds() -> None:
    found = shuffled(PROMPTS, 0)
    rounds = [[next(found) for _ in PROMPTS] for _ in range(2)]
    assert [sorted(one) for one in rounds] == [PROMPTS, PROMPTS]
    assert rounds[0] != rounds[1]


# The whole round


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("base")
    bases.llama().save_pretrained(folder)
    bases.byte_tokenizer().save_pretrained(folder)
    settings = {"rollouts": 32, "minibatch": 16, "update_batches": 4, "rollout_tokens": 12, "gate_samples": 48}
    found = Trainer(LearnerConfig(serving=ServingConfig(model=str(folder)), **settings))
    found.ppo = dataclasses.replace(
        found.ppo, lr=5e-3, kl_price=0.0, chi_share=0.0
    )  # a base of noise is not worth a nat
    return found


def asked(trainer: Trainer) -> list[tuple[int, ...]]:
    return [tuple(trainer.chat.encode([bases.message(f"say {number}")])) for number in range(12)]


def thumbs(trainer: Trainer, count: int = 80, always: float | None = None) -> list[Judgement]:
    """Thumbs up for replies that hold a certain token: every second one is made to."""
    prompts = asked(trainer)
    rollouts = trainer.sampler.sample([prompts[n % len(prompts)] for n in range(count)], None, 5)
    judgements = []
    for n, rollout in enumerate(rollouts):
        reply_ids = (NICE, *rollout.reply_ids[1:]) if n % 2 else rollout.reply_ids
        up = float(NICE in reply_ids) if always is None else always
        said = Sample(f"r{n}", rollout.prompt_ids, reply_ids, 0)
        judgements.append(Judgement(f"f{n}", "thumb", f"u{n // 2 % 8}", up, said, None, float(n)))
    return judgements


def learn(trainer: Trainer, judgements: Sequence[Judgement], parent: AdapterWeights | None = None) -> Candidate:
    return trainer.learn(judgements, asked(trainer), parent=parent, seed=1, progress=lambda *_: None)


def test_a_round_remembers_of_a_reply_what_the_bare_base_makes_of_it(trainer: Trainer) -> None:
    rollouts = trainer.sampler.sample(asked(trainer), None, 0)
    expected = trainer.states(rollouts)
    trainer.model.adapter(POLICY).load(bases.adapter(trainer.model.base, rank=4, scaling=0.3))
    trainer.remembered = {}
    try:
        assert trainer.mean_kl(rollouts) > 0.01  # fills it, with the policy moved
        assert trainer.remembered.keys() == {key_of(one) for one in rollouts}
        torch.testing.assert_close(trainer.states(rollouts), expected, rtol=1e-4, atol=1e-5)
    finally:
        trainer.remembered = None


def test_a_round_that_breaks_leaves_nothing_remembered(trainer: Trainer) -> None:
    def broken(phase: str, *_: Any) -> None:
        if phase == "rollouts":
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer.learn(thumbs(trainer), asked(trainer), parent=None, seed=1, progress=broken)
    assert trainer.remembered is None


def test_a_round_brings_a_candidate_a_report_and_a_verdict(trainer: Trainer) -> None:
    phases: list[str] = []
    candidate = trainer.learn(
        thumbs(trainer), asked(trainer), parent=None, seed=1, progress=lambda phase, *_: phases.append(phase)
    )
    assert [check.name for check in candidate.gate.checks][:4] == ["reward_model", "changed", "no_worse", "kl"]
    assert {*(check.name for check in candidate.gate.checks), "probes"} == set(CHECKS)
    assert candidate.gate.checks[0].verdict == "pass"
    assert candidate.gate.checks[1].verdict == "pass"
    assert set(candidate.report) >= {"reward", "policy", "kl", "score", "shape", "seconds"}
    assert set(candidate.report["seconds"]) == set(PHASES)
    assert set(figures(candidate.report)) == set(FIGURES)
    assert 0.1 < candidate.report["reward"]["top_rater_share"] < 0.2  # eight people, who said as much each
    json.dumps(candidate.report, allow_nan=False)
    assert list(dict.fromkeys(phases)) == ["reward", "rollouts", "ppo", "gate"]
    assert set(candidate.weights.tensors) == set(trainer.base.targets)


def test_of_the_replies_of_an_update_it_says_how_many_were_served(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "ppo", dataclasses.replace(trainer.ppo, live_share=0.25, batches=1))
    rollouts = trainer.sampler.sample(asked(trainer), None, 9)
    said = [LiveReply(one.prompt_ids, one.reply_ids, one.ended, one.logprobs, 2, True) for one in rollouts]
    candidate = trainer.learn(thumbs(trainer), asked(trainer), parent=None, seed=1, served=said)
    live, shown = candidate.report["live"], figures(candidate.report)
    assert len(candidate.report["policy"]["batches"]) == 2
    assert shown["heed_live_replies_ratio"] == live["used"] / 64 > 0
    assert shown["heed_live_staleness_versions"] == 2.0


def test_the_same_round_again_gives_the_same_bytes(trainer: Trainer) -> None:
    judgements = thumbs(trainer)
    first = learn(trainer, judgements)
    learn(trainer, thumbs(trainer, 60), parent=first.weights)  # whatever came between
    assert bytes_of(learn(trainer, judgements).weights) == bytes_of(first.weights)


@pytest.mark.parametrize("objective", ["a2c", "reinforce", "rloo", "kto", "dpo", "sft"])
def test_every_objective_goes_through_the_same_round_and_gate(
    objective: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "ppo", dataclasses.replace(trainer.ppo, objective=objective))
    candidate = learn(trainer, thumbs(trainer))
    checks = {check.name: check.verdict for check in candidate.gate.checks}
    assert (checks["reward_model"], checks["changed"], checks["kl"]) == ("pass", "pass", "pass")
    assert candidate.report["policy"]["batches"][-1]["kl"] > 0
    assert bytes_of(learn(trainer, thumbs(trainer)).weights) == bytes_of(candidate.weights)


def test_the_settings_reach_the_objective() -> None:
    settings = LearnerConfig(serving=ServingConfig(), objective="rloo", entropy=0.01, rollout_temperature=0.9)
    found = ppo_config(settings, 1_000_000)
    assert (found.objective, found.entropy, found.temperature) == ("rloo", 0.01, 0.9)
    plain = ppo_config(LearnerConfig(serving=ServingConfig()), 1_000_000)
    assert (plain.objective, plain.entropy, plain.temperature) == ("ppo", 0.0, 1.0)


def test_feedback_that_says_nothing_moves_nothing(trainer: Trainer) -> None:
    parent = learn(trainer, thumbs(trainer)).weights
    for judgements in ([], thumbs(trainer, 40, always=1.0), thumbs(trainer, 40, always=0.0), thumbs(trainer, 3)):
        candidate = learn(trainer, judgements, parent)
        assert not candidate.gate.passed
        assert candidate.gate.checks[0].verdict == "fail"
        assert {check.verdict for check in candidate.gate.checks[1:]} == {"skipped"}
        assert difference(candidate.weights, parent) == 0.0


def test_where_a_policy_starts(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = (bases.adapter(trainer.model.base, rank=4, scaling=scaling) for scaling in (0.02, 500.0))
    starts: list[AdapterWeights] = []
    run = Improver.run

    def noted(self: Improver, *given: Any) -> PolicyReport:
        starts.append(self.policy.weights())
        return run(self, *given)

    monkeypatch.setattr(Improver, "run", noted)
    assert learn(trainer, thumbs(trainer), near).report["policy"]["started_from"].startswith("50% of the way")
    assert difference(starts[0], shrunk(near, 0.5)) < 1e-6
    report = learn(trainer, thumbs(trainer), far).report
    assert report["policy"]["started_from"].startswith("reference, because 50% of the way")
    assert report["policy"]["batches"][0]["kl"] == 0.0


def test_training_that_moves_nothing_ships_nothing(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ppo", dataclasses.replace(trainer.ppo, lr=0.0, batches=1))
    for parent in (None, bases.adapter(trainer.model.base, rank=4, scaling=0.02)):
        candidate = learn(trainer, thumbs(trainer), parent)
        assert {check.name: check.verdict for check in candidate.gate.checks}["changed"] == "fail"


def test_what_is_worth_less_than_its_parent_does_not_ship(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = learn(trainer, thumbs(trainer)).weights
    monkeypatch.setattr(trainer, "ppo", dataclasses.replace(trainer.ppo, batches=1, lr=1e-6))
    monkeypatch.setattr(update, "START_SHARE", 0.0)
    monkeypatch.setattr(gate, "WORSE", 0.0)  # so few replies are hardly ever surely worse
    monkeypatch.setattr(improve, "best", lambda batches, _: len(batches) - 1)
    candidate = learn(trainer, thumbs(trainer), parent)
    checks = {check.name: check for check in candidate.gate.checks}
    assert checks["changed"].verdict == "pass"
    assert checks["no_worse"].verdict == "fail", checks["no_worse"].sentence
    assert checks["no_worse"].value == candidate.report["score"]["gain"] < 0


def test_a_shrunk_adapter_adds_a_share_of_what_it_added() -> None:
    whole = bases.adapter(bases.llama(), scaling=3.0)
    half = shrunk(whole, 0.5)
    for path, (down_rI, up_Or) in whole.tensors.items():
        torch.testing.assert_close(half.tensors[path][1] @ half.tensors[path][0], 0.5 * up_Or @ down_rI)
    assert bytes_of(shrunk(whole, 1.0)) == bytes_of(whole)


def test_prompts_without_room_for_a_reply_are_left_out(trainer: Trainer) -> None:
    long = tuple([65] * (trainer.max_len - 5))
    candidate = trainer.learn(thumbs(trainer), [long, *asked(trainer)], parent=None, seed=1, progress=lambda *_: None)
    assert candidate.gate.checks[0].verdict == "pass"
    only = trainer.learn(thumbs(trainer), [long], parent=None, seed=1, progress=lambda *_: None)
    assert not only.gate.passed


def test_only_prompts_too_long_are_named_as_such(trainer: Trainer) -> None:
    long = tuple([65] * (trainer.max_len - 5))
    [check, *_] = trainer.learn(thumbs(trainer), [long], parent=None, seed=1).gate.checks
    assert check.verdict == "fail"
    assert "None of 1 prompts leaves room for a reply of 12 tokens" in check.sentence


def test_a_base_that_changes_its_logits_after_the_head_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    scaled = GraniteConfig(
        vocab_size=320, logits_scaling=8.0, pad_token_id=0, bos_token_id=None, eos_token_id=2, **sizes
    )
    GraniteForCausalLM(scaled).save_pretrained(tmp_path)
    bases.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot learn on GraniteForCausalLM"):
        Trainer(LearnerConfig(serving=ServingConfig(model=str(tmp_path))))


def test_a_checkpoint_holds_everything(trainer: Trainer, tmp_path: Path) -> None:
    candidate = learn(trainer, thumbs(trainer))
    tensors, meta = trainer.state()
    checkpoint.save(tmp_path, 1, tensors, json.loads(json.dumps(meta)))
    kept = checkpoint.load(tmp_path)
    assert kept is not None
    again = Trainer(trainer.config)
    again.restore(kept.tensors, kept.meta)
    assert bytes_of(again.model.adapter(POLICY).weights()) == bytes_of(candidate.weights)
    said = [one.reply for one in thumbs(trainer, 20)]
    assert torch.equal(again.reward.score(said), trainer.reward.score(said))
    untold, unmet = Trainer(trainer.config).state()
    again.restore(untold, unmet)


def test_the_base_exists_once(trainer: Trainer) -> None:
    engine_weights = {tensor.data_ptr() for tensor in trainer.sampler.engine.model.parameters()}
    assert {tensor.data_ptr() for tensor in trainer.model.base.parameters()} == engine_weights


def test_larger_models_learn_at_lower_rates() -> None:
    assert learning_rate(1_000_000) == 2e-3
    assert learning_rate(200_000_000) == pytest.approx(2e-4)
    assert 3e-5 < learning_rate(7_000_000_000) < 4e-5


def test_an_update_has_its_exhibits(trainer: Trainer) -> None:
    first = learn(trainer, thumbs(trainer))
    candidate = learn(trainer, thumbs(trainer), first.weights)
    shown = candidate.exhibits
    assert sum(shown.base_scores) / len(shown.base_scores) == pytest.approx(candidate.report["score"]["base"], abs=1e-5)
    assert len(shown.candidate_scores) == trainer.config.gate_samples
    assert len(shown.pairs) == trainer.config.report_samples
    said = {trainer.chat.decode(one.reply.reply_ids).strip() for one in thumbs(trainer)}
    for pair in shown.pairs:
        assert pair.before.prompt_ids == pair.after.prompt_ids
        assert trainer.chat.decode(pair.after.prompt_ids).strip() == pair.prompt
        assert len(pair.alike) == 2
        assert {one.text for one in pair.alike} <= said
        assert {one.said for one in pair.alike} <= {"thumb up", "thumb down"}
        assert pair.after.kl > 0
        assert pair.before.kl > 0
    assert all(pair.before.kl == 0 for pair in first.exhibits.pairs)


def test_what_the_exhibits_show_of_a_reply_adds_up(trainer: Trainer) -> None:
    candidate = learn(trainer, thumbs(trainer))
    [rollout] = trainer.sampler.sample(asked(trainer)[:1], candidate.weights, 3)
    [reply] = looked_at([rollout], trainer.model, trainer.reward, trainer.chat, moved=True)
    [score] = trainer.reward.score([rollout]).tolist()
    assert reply.score == pytest.approx(score, abs=1e-4)
    assert reply.kl == pytest.approx(trainer.mean_kl([rollout]), rel=1e-3)


def test_whoever_wants_no_samples_gets_none(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "config", trainer.config.model_copy(update={"report_samples": 0}))
    assert learn(trainer, thumbs(trainer)).exhibits.pairs == ()


def test_a_second_judge_prefers_what_the_people_it_asked_like(trainer: Trainer) -> None:
    judgements = thumbs(trainer)
    learn(trainer, judgements)
    base = trainer.sampler.sample(asked(trainer) * 4, None, 9)
    nice = [dataclasses.replace(one, reply_ids=(NICE, *one.reply_ids[1:])) for one in base]
    ahead = win_rate(trainer.reward, judgements, base, (nice, base), 1.5, 0, lambda _: None)
    behind = win_rate(trainer.reward, judgements, base, (base, nice), 1.5, 0, lambda _: None)
    assert ahead["win_rate"] > 0.9
    assert behind["win_rate"] == pytest.approx(1 - ahead["win_rate"])
    even = win_rate(trainer.reward, judgements, base, (base[:24] + nice[24:], base), 1.5, 0, lambda _: None)
    assert even["win_rate"] == pytest.approx((0.5 + ahead["win_rate"]) / 2, abs=0.05)
    assert even["win_rate_lower"] == pytest.approx(even["win_rate"] - 1.96 * 0.2526 / math.sqrt(48), abs=0.02)


def test_the_share_of_clipped_tokens_is_told_batch_by_batch() -> None:
    batches: list[Mapping[str, float]] = []
    found = improver(dataclasses.replace(SMALL, batches=2))
    report = found.run(PROMPTS, lambda phase, fraction, batch=None: batches.append(batch) if batch else None)
    assert batches == report.batches
    assert all(0 <= batch["clipped"] <= 1 for batch in batches[:-1])
    assert any(batch["clipped"] > 0 for batch in batches[:-1])
    assert "clipped" not in batches[-1]
