"""One learner round with tensors: fit the reward model, improve the policy, judge the candidate.

`Trainer.learn` is a function of its arguments alone: the same judgements, prompts, parent, seed and thread count give the same
candidate, byte for byte, so that a round cut short by a kill can simply be run again.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from learner import gate, probes
from learner.direct import EXAMPLES, Direct
from learner.exhibits import Exhibits, Reply, first_of_each, looked_at, pairs
from learner.gate import GateReport
from learner.improve import Improver, PolicyReport, Progress, shrunk
from learner.judgement import Judgement, Words
from learner.live import Live, LiveReply
from learner.prepare import NOBODYS, Unusable, prepare, replies
from learner.reward import RewardReport
from learner.rollouts import Prompt, Rollout, Shape, shuffled
from learner.steps import POLICY
from learner.winrate import win_rate
from serving.chat import ChatError
from serving.lora import AdapterWeights

if TYPE_CHECKING:
    from learner.trainer import Trainer

START_SHARE = 0.5
"""How far on the straight way from the reference to its parent a policy starts: what a weak reward model was fooled into wears
off, and what people want comes back in a few batches (interpolation towards the initialisation, 2406.16768)."""
RESTART_ABOVE = 0.75
"""Of the KL limit: where even that start is farther than this from the reference, the policy starts from the reference."""


@dataclass(slots=True)
class Candidate:
    """What a round brings: an adapter, what is known of it, and whether it may be served."""

    weights: AdapterWeights
    report: dict[str, Any]
    gate: GateReport
    exhibits: Exhibits = field(default_factory=Exhibits)
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Id of feedback that was not used → why (learner/prepare.py)."""


class Round:
    """One call of `Trainer.learn`, step by step."""

    def __init__(
        self,
        trainer: Trainer,
        judgements: Sequence[Judgement],
        prompts: Sequence[Prompt],
        parent: AdapterWeights | None,
        seed: int,
        served: Sequence[LiveReply],
        progress: Progress,
    ) -> None:
        self.served = served
        self.trainer, self.model, self.config = trainer, trainer.model, trainer.config
        self.parent = parent
        self.seed, self.progress = seed, progress
        self.report: dict[str, Any] = {"seconds": {"reward": 0.0, "rollouts": 0.0, "ppo": 0.0, "gate": 0.0}}
        self.exhibits = Exhibits()
        self.clock = time.perf_counter()
        self.judgements = self.prepare(judgements)
        prompts = list(dict.fromkeys([*prompts, *self.taken_over()]))
        self.asked = len(prompts)
        room = trainer.max_len - trainer.config.rollout_tokens
        self.prompts = [prompt for prompt in prompts if len(prompt) <= room]  # those that leave room for a whole reply

    def run(self) -> Candidate:
        """Reward model, then policy, then gate; what the reward model does not know moves nothing."""
        self.model.adapter(POLICY).reset(self.seed)
        if self.parent is not None:
            self.model.adapter(POLICY).load(self.parent)
        if not self.judgements or not self.asked:
            known = gate.no_feedback()
        elif not self.prompts:
            known = gate.no_room(self.asked, self.trainer.max_len, self.config.rollout_tokens)
        else:
            known = gate.knows(self.fit_reward())
        if known.verdict != "pass":
            names = ["changed", "no_worse", "kl", "length", "ended", "repetition", "variety"]
            return self.candidate([known, *gate.skipped([*names, *(["probes"] if self.trainer.probes else [])])])
        self.improve()
        return self.candidate([known, *self.checks()])

    def prepare(self, judgements: Sequence[Judgement]) -> list[Judgement]:
        """What there is to learn from once what says nothing, or says it twice, is left out."""
        prepared = prepare(judgements, self.encode, self.config.aspects)
        self.report["feedback"] = {
            "given": len(judgements),
            "of_other_bases": sum(
                any(reply.words for reply in replies(one)) for one in prepared.judgements if one.feedback_id != NOBODYS
            ),
            "dropped": prepared.dropped,
        }
        self.left_out = prepared.left_out
        return prepared.judgements

    def encode(self, words: Words) -> tuple[Prompt, tuple[int, ...]]:
        """Prompt and reply in this base's tokens. Raises Unusable where its template refuses them, or they do not fit."""
        chat, most = self.trainer.chat, self.trainer.max_len
        self.progress("preparing", 0.0)  # milliseconds a reply, and there may be thousands
        try:
            prompt_ids, reply_ids = chat.encode_answered(words.messages, words.text)
        except ChatError as error:
            raise Unusable(str(error)) from error
        if not words.ended and reply_ids and reply_ids[-1] in chat.eos_ids:
            reply_ids.pop()
        if not reply_ids or len(prompt_ids) + len(reply_ids) > most:
            raise Unusable(
                f"{len(prompt_ids)} + {len(reply_ids)} tokens; at least one of the reply, at most {most} in all"
            )
        return tuple(prompt_ids), tuple(reply_ids)

    def taken_over(self) -> list[Prompt]:
        """The prompts of what another base replied, which this one may never have been asked."""
        return [one.prompt_ids for judgement in self.judgements for one in replies(judgement) if one.words is not None]

    def fit_reward(self) -> RewardReport:
        """Learn what people like from all judgements, on the scale of the base's own replies."""
        self.progress("reward", 0.0)
        asked = list(itertools.islice(shuffled(self.prompts, self.seed), self.config.gate_samples))
        self.of_base = self.trainer.sampler.sample(asked, None, self.seed)
        report = self.trainer.reward.fit(
            self.judgements, self.of_base, self.seed, lambda fraction: self.progress("reward", fraction)
        )
        self.report["reward"] = report.to_json()
        self.spend("reward")
        return report

    def improve(self) -> PolicyReport:
        """Move the policy, from between the reference and its parent or, where that is still far, from the reference."""
        trainer, started_from = self.trainer, "reference"
        if self.parent is not None:
            policy, start = self.model.adapter(POLICY), shrunk(self.parent, START_SHARE)
            policy.load(start)
            prompts = [rollout.prompt_ids for rollout in self.of_base[: self.config.rollouts]]
            kl = trainer.mean_kl(trainer.sampler.sample(prompts, start, self.seed + 1))
            started_from = f"{START_SHARE:.0%} of the way from the reference to its parent"
            if kl > RESTART_ABOVE * self.config.kl_limit:
                policy.reset(self.seed)
                started_from = f"reference, because {started_from} it is {kl:.2f} nats a reply away already"
        self.start = self.model.adapter(POLICY).weights()
        with contextlib.closing(self.improver()) as improver:
            report = improver.run(self.prompts, self.progress)
            if improver.collector.live is not None:
                self.report["live"] = improver.collector.live.report(len(report.batches) * trainer.ppo.rollouts)
        rollouts_s = report.back_s + sum(batch["rollouts_s"] for batch in report.batches)
        self.report["policy"] = {
            "started_from": started_from,
            "stopped": report.stopped,
            "kept": report.kept,
            "share": report.share,
            "batches": report.batches,
        }
        self.spend("ppo")
        self.report["seconds"]["rollouts"] += rollouts_s
        self.report["seconds"]["ppo"] -= rollouts_s
        return report

    def improver(self) -> Improver:
        """What moves the policy: by fresh replies or by those that were judged."""
        trainer = self.trainer
        parts = (self.model, trainer.reward, trainer.sampler, trainer.ppo, self.seed)
        if trainer.ppo.objective in EXAMPLES:
            return Direct(*parts, self.judgements)
        if not self.served or not trainer.ppo.live_share:
            return Improver(*parts)
        live = Live.of(
            self.served,
            trainer.reward.surprises,
            self.config.rollout_tokens,
            trainer.max_len,
            trainer.chat.eos_ids,
            self.seed,
        )
        return Improver(*parts, live)

    def checks(self) -> list[gate.Check]:
        """What the gate asks of the candidate, on fresh replies to the prompts that the base was asked too."""
        self.progress("gate", 0.0)
        trainer, weights = self.trainer, self.model.adapter(POLICY).weights()
        candidate = trainer.sampler.sample([rollout.prompt_ids for rollout in self.of_base], weights, self.seed + 2)
        self.progress("gate", 0.5)
        kl = trainer.mean_kl(candidate)
        self.report["kl"] = {"reference": kl}
        score_B, base_B = trainer.reward.score(candidate), trainer.reward.score(self.of_base)
        self.report["score"] = {"candidate": float(score_B.mean()), "base": float(base_B.mean())}
        self.report["shape"] = {"candidate": asdict(Shape.of(candidate)), "base": asdict(Shape.of(self.of_base))}
        checks = [
            gate.changed(difference(weights, self.start)),
            self.beside_parent(candidate, kl),
            gate.within_budget(kl, self.config.kl_limit),
            *gate.keeps_form(candidate, self.of_base),
            *self.ask_probes(weights),
        ]
        after = pairs(self.before, self.look_at(candidate), self.judgements, trainer.reward, trainer.chat)
        self.exhibits = Exhibits(tuple(base_B.tolist()), tuple(score_B.tolist()), after)
        self.spend("gate")
        return checks

    def ask_probes(self, weights: AdapterWeights) -> list[gate.Check]:
        """The operator's own questions, where there are any."""
        trainer = self.trainer
        asked = (trainer.probes, trainer.probed, trainer.chat, trainer.sampler)
        return [probes.ask(*asked, weights, self.seed + 3)] if trainer.probes else []

    def look_at(self, rollouts: Sequence[Rollout], *, moved: bool = True) -> list[Reply]:
        """The replies that the report shows, of those that the policy as it is now made."""
        shown = first_of_each(rollouts, self.config.report_samples)
        return looked_at(shown, self.model, self.trainer.reward, self.trainer.chat, moved=moved)

    def beside_parent(self, candidate: Sequence[Rollout], kl: float) -> gate.Check:
        """Whether the candidate's replies, `kl` nats from the reference, are worth no less than its parent's."""
        trainer, parent_kl, parent = self.trainer, 0.0, self.of_base
        if self.parent is not None:
            policy = self.model.adapter(POLICY)
            weights = policy.weights()
            policy.load(self.parent)
            parent = trainer.sampler.sample([one.prompt_ids for one in self.of_base], self.parent, self.seed + 2)
            parent_kl = trainer.mean_kl(parent)
            self.before = self.look_at(parent)
            policy.load(weights)
        else:
            self.before = self.look_at(parent, moved=False)
        gain_B = trainer.reward.score(candidate) - trainer.reward.score(parent)
        gain = float(gain_B.mean()) - trainer.ppo.kl_price * (kl - parent_kl)
        self.report["score"] |= {"gain": gain} | win_rate(
            trainer.reward,
            self.judgements,
            self.of_base,
            (candidate, parent),
            self.report["reward"]["penalty"],
            self.seed,
            lambda fraction: self.progress("gate", 0.5 + fraction / 2),
        )
        return gate.no_worse(gain, float(gain_B.std()) / math.sqrt(len(gain_B)))

    def candidate(self, checks: Sequence[gate.Check]) -> Candidate:
        """The policy as it is now, with everything that is known of it."""
        weights, verdict = self.model.adapter(POLICY).weights(), GateReport.of(checks)
        return Candidate(weights, self.report, verdict, self.exhibits, self.left_out)

    def spend(self, phase: str) -> None:
        """Add the time since the last call to a phase."""
        now = time.perf_counter()
        self.report["seconds"][phase] += now - self.clock
        self.clock = now


def difference(weights: AdapterWeights, parent: AdapterWeights | None) -> float:
    """The largest difference that two adapters (None: the base) make in any entry of any layer's weights."""
    largest = 0.0
    for path, (down_rI, up_Or) in weights.tensors.items():
        change_OI = weights.scaling_of(path) * (up_Or @ down_rI)
        if parent is not None and path in parent.tensors:
            down_rI, up_Or = parent.tensors[path]
            change_OI = change_OI - parent.scaling_of(path) * (up_Or @ down_rI)
        largest = max(largest, float(change_OI.abs().max()))
    return largest
