"""Settings of the learner: frozen, each with its unit and bounds, built once at the door."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from feedback.config import Settings
from serving.config import ServingConfig

FEW = 20
"""New judgements that are enough in the cases of `LearnerConfig.few`, where the minimum is not lower still."""


class LearnerConfig(Settings):
    """What a learner is told at its start."""

    serving: ServingConfig = Field(default_factory=ServingConfig)

    update_min_feedback: int = Field(
        50, ge=1, le=1_000_000, description="new judgements (joined thumbs, ratings, preferences) that start an update"
    )
    update_interval_s: float = Field(
        300.0,
        ge=1,
        le=31_536_000,
        description="seconds after the last update (before any: after the first judgement) from which on 20 new judgements are "
        "enough, or the minimum if that is less",
    )
    learner_metrics_port: int = Field(
        9464, ge=0, le=65535, description="TCP port of the learner's /metrics and /health; 0: none"
    )
    nice: int = Field(
        4, ge=0, le=5, description="niceness of the learner: replies go first, and learning never starves"
    )
    learner_threads: int = Field(
        0, ge=0, le=1024, description="compute threads of the learner; 0: one for each core that it may use"
    )
    state_keep_days: float = Field(
        0,
        ge=0,
        le=36_500,
        description="days that feedback, and the exchanges it speaks of, stay in the learner's state and are learned from; "
        "0: for ever",
    )
    state_keep_mb: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="megabytes of exchanges and feedback that stay in the learner's state, the newest; 0: all",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of the learner's random numbers")
    aspect_weights: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="how much thumbs and ratings on an aspect count beside others, from 0 (not at all) to 100: "
        "`helpful=1,safe=2`; 1 for an aspect that is not named",
    )
    learning_rate: float | None = Field(
        None, gt=0, le=0.1, description="learning rate of the policy's adapter; none: by the model's size"
    )
    kl_target: float = Field(
        1.8, gt=0, le=100, description="KL to the reference that the KL coefficient steers to, nats a reply"
    )
    kl_limit: float = Field(
        2.3,
        gt=0,
        le=100,
        description="KL to the reference that an update may end at, nats a reply; the gate says no from a tenth above it",
    )
    objective: Literal["ppo", "a2c", "reinforce", "rloo", "kto", "dpo", "sft"] = Field(
        "ppo",
        description="what the policy learns by: the score of fresh replies (ppo, a2c, reinforce, rloo), or the judged replies "
        "themselves (kto, dpo, sft), where the reward model has a say in the gate alone",
    )
    entropy: float = Field(
        0.0, ge=0, le=1, description="what a nat of entropy a token is worth in the policy's loss (entropy coefficient)"
    )
    rollout_temperature: float = Field(
        1.0,
        ge=0.1,
        le=2,
        description="temperature of the rollouts and of the policy that they teach; the gate judges at 1",
    )
    rollouts: int = Field(128, ge=2, le=65_536, description="fresh replies of one PPO batch")
    minibatch: int = Field(16, ge=1, le=65_536, description="replies of one optimiser step")
    live_share: float = Field(
        0.0,
        ge=0,
        le=0.25,
        description="share of a batch that may be replies which people were served, at most 4 versions ago; 0: fresh ones alone",
    )
    ppo_epochs: int = Field(1, ge=1, le=16, description="passes of PPO over a batch; other objectives make one")
    update_batches: int = Field(16, ge=1, le=10_000, description="most PPO batches of one update")
    rollout_tokens: int = Field(128, ge=1, le=65_536, description="most tokens of a fresh reply")
    gate_samples: int = Field(256, ge=2, le=65_536, description="fresh replies that the gate judges a candidate by")
    probes: Path | None = Field(
        None,
        description="TOML file of prompts with what a candidate must say and must not, read when the learner starts: `[name]`, "
        "below it `prompt` and `must` or `must_not`; none: no probes",
    )
    report_samples: int = Field(
        8,
        ge=0,
        le=100,
        description="prompts, with the replies before and after, that an update's report shows: people's own words; 0: none",
    )
    tensorboard: Path | None = Field(
        None,
        description="folder of TensorBoard event files, a run an update (`pip install 'heed[tensorboard]'`); none: not written",
    )

    @field_validator("aspect_weights")
    @classmethod
    def _weights(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if all(_WEIGHT.fullmatch(one) and float(one.partition("=")[2]) <= 100 for one in value or ()):
            return value
        raise ValueError("must be aspect=weight, or several of them separated by commas, with weights from 0 to 100")

    @property
    def aspects(self) -> Mapping[str, float]:
        """The weight of each aspect that is named."""
        parts = (one.partition("=") for one in self.aspect_weights or ())
        return {aspect: float(weight) for aspect, _, weight in parts}

    @property
    def weightless(self) -> list[str]:
        """The aspects that count for nothing."""
        return [aspect for aspect, weight in self.aspects.items() if weight == 0]

    @property
    def folder(self) -> Path:
        """Where the learner keeps its state and checkpoints."""
        return self.serving.feedback.data / "learner"

    @property
    def few(self) -> int:
        """New judgements that start an update once the interval has passed, or after one whose reward model knew too little."""
        return min(FEW, self.update_min_feedback)


_WEIGHT = re.compile(r"[a-z][a-z0-9_-]{0,39}=[0-9]+(\.[0-9]+)?")
