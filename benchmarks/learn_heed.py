"""Heed as one of the learners that benchmarks/learn.py compares: one update on the job's feedback, in a process of its own.

python -m benchmarks.learn_heed job.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.meter import Json, Meter
from learner.config import LearnerConfig
from learner.judgement import Judgement, Sample
from learner.model import Batch
from learner.rollouts import Rollout
from learner.steps import POLICY
from learner.trainer import Trainer
from learner.update import Candidate
from serving.config import ServingConfig
from serving.peft_files import save_peft


def main() -> None:
    meter, job = Meter(), json.loads(Path(sys.argv[1]).read_text("utf-8"))
    with meter.phase("load"):
        trainer = Trainer(LearnerConfig(serving=ServingConfig(model=job["base"]), learning_rate=job["lr"]))
    check = checked(trainer, job["check"])
    prompts = [tuple(prompt["ids"]) for prompt in job["prompts"]]
    candidate = trainer.learn(judgements(job), prompts, parent=None, seed=job["seed"])
    if not candidate.gate.passed:  # then the base goes on serving
        trainer.model.adapter(POLICY).reset(0)
        candidate.weights = trainer.model.adapter(POLICY).weights()
    save_peft(Path(job["adapter"]), candidate.weights, job["base"])
    meter.seconds |= candidate.report["seconds"]
    meter.write(Path(job["found"]), {"check": check, **taken(candidate)})


def checked(trainer: Trainer, check: Json) -> float:
    """log p of the reply that all learners are asked about."""
    sample = Rollout(tuple(check["prompt_ids"]), tuple(check["reply_ids"]), True, ())
    return float(trainer.model.logprobs(Batch.of([sample]), None).detach().sum())


def judgements(job: Json) -> list[Judgement]:
    """The feedback as the learner's state would hand it out."""

    def sample(number: int, side: str, row: Json) -> Sample:
        return Sample(f"{number}{side}", tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"]), 0)

    if job["kind"] == "thumb":
        return [
            Judgement(
                str(number), "thumb", row["user"], float(row["label"]), sample(number, "reply", row), None, number
            )
            for number, row in enumerate(job["thumbs"])
        ]
    return [
        Judgement(
            *(str(number), "preference", row["user"], 1.0),
            *(sample(number, "chosen", row), sample(number, "rejected", row), float(number)),
        )
        for number, row in enumerate(job["pairs"])
    ]


def taken(candidate: Candidate) -> Json:
    """How many rollouts were trained on, in how many seconds of PPO; what the gate said."""
    seconds, policy = candidate.report["seconds"], candidate.report.get("policy", {"batches": []})
    trained = sum("steps_s" in batch for batch in policy["batches"])
    rollouts = trained * LearnerConfig().rollouts
    failed = [check.sentence for check in candidate.gate.checks if check.verdict == "fail"]
    return {"rollouts": rollouts, "ppo_s": seconds["rollouts"] + seconds["ppo"], "refused": failed}


if __name__ == "__main__":
    main()
