"""How far the update that is running has come: for people who watch, and for the stories of its feedback."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class Phases:
    """The phases of one update, in the order in which the trainer names them; times in seconds since the epoch."""

    def __init__(self, number: int, clock: Callable[[], float]) -> None:
        self.number = number
        self.clock = clock
        self.phase = "preparing"
        self.fraction = 0.0
        self.entered: dict[str, float] = {self.phase: clock()}
        self.batches: list[Mapping[str, float]] = []
        """PPO's figures, batch by batch."""

    def enter(self, phase: str, fraction: float) -> bool:
        """The trainer is in this phase, this share of it done; true when it is for the first time.

        Phases may come back: PPO steps follow rollouts.
        """
        self.phase, self.fraction = phase, fraction
        first = phase not in self.entered
        self.entered.setdefault(phase, self.clock())
        return first

    def __str__(self) -> str:
        return f"training update {self.number} ({self.phase} {self.fraction:.0%})"

    def seconds(self) -> dict[str, float]:
        """How long ago each phase was first entered, until the next one was. Phases that take turns count as the later one."""
        entered = list(self.entered.items())  # at once: a table is drawn by another thread
        ends = [*(at for _, at in entered[1:]), self.clock()]
        return {phase: end - at for (phase, at), end in zip(entered, ends, strict=True)}

    def reached(self) -> dict[str, float]:
        """When the feedback was in the reward model, and when it had moved the policy: the start of what followed."""
        after_reward = [at for phase, at in self.entered.items() if phase not in ("preparing", "reward")]
        reached = {"in_reward_model": min(after_reward, default=self.clock())}
        if "ppo" in self.entered:
            reached["in_update"] = max(reached["in_reward_model"], self.entered.get("gate", self.clock()))
        return reached
