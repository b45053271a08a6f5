"""The learner's memory stays flat, however many updates it has made: the soak version makes 200 with the built-in model."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import Log, open_log
from feedback.raters import crowd
from learner import trial
from learner.config import LearnerConfig
from learner.judgement import Judgement
from learner.trainer import Trainer
from serving.config import ServingConfig
from tests.house import ROOT, until
from tests.test_memory import resident
from tests.told import exchange, feedback, retraction

UPDATES = 200
WARM = 20
"""After so many updates memory is what it will be; as many again tell what that is, and as many at the end are compared."""
BOUND = 0.03
STANDING, NEW = 40, 4
"""Judgements that stand at any time, and how many of them are replaced before each update: else there is more to remember."""
SETTINGS = {
    "ROLLOUTS": 8, "MINIBATCH": 4, "UPDATE_BATCHES": 1, "ROLLOUT_TOKENS": 24, "GATE_SAMPLES": 16, "REPORT_SAMPLES": 1,
    "UPDATE_MIN_FEEDBACK": NEW, "LEARNER_METRICS_PORT": 0, "LEARNER_THREADS": 1,
}  # fmt: skip
ENDED = re.compile(r"update \d+(?: ships nothing|: v\d+ is released)")


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds after an update."""

    memory: int
    """Bytes."""
    files: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> Held:
        files, threads = (len(list(Path(f"/proc/{pid}/{what}").iterdir())) for what in ("fd", "task"))
        return cls(resident(pid), files, threads)


class People:
    """They go on talking and judging, and take back what they said first."""

    def __init__(self, data: Path, count: int) -> None:
        """`count`: judgements to have ready, with the base's own replies."""
        config = FeedbackConfig(data=data)
        trainer = Trainer(
            LearnerConfig(serving=ServingConfig(feedback=config), rollout_tokens=SETTINGS["ROLLOUT_TOKENS"])
        )
        prompts = trial.Halves.of(None).seen[:20]
        self.base = trainer.base.fingerprint
        self.waiting = trial.feedback(trainer, prompts, crowd("bulleted", 12, noise=0.0), count, 0, "thumb")
        self.standing: list[Judgement] = []
        self.log: Log = open_log(config, writes=[EXCHANGES, FEEDBACK])

    def speak(self, count: int) -> None:
        """So many replies more, each with a thumb."""
        for one in self.waiting[:count]:
            ids = {"prompt_ids": one.reply.prompt_ids, "reply_ids": one.reply.reply_ids}
            spoken = exchange(one.reply.reply_id, base=self.base, at=time.time(), **ids)
            self.log.append(EXCHANGES, spoken.id, spoken.to_json())
            thumb = feedback(one.feedback_id, spoken.id, value=one.value, user=one.user, at=time.time())
            self.log.append(FEEDBACK, spoken.id, thumb.to_json())
        self.standing += self.waiting[:count]
        del self.waiting[:count]

    def take_back(self, count: int) -> None:
        """The oldest so many judgements that stand."""
        for one in self.standing[:count]:
            self.log.append(FEEDBACK, one.reply.reply_id, retraction(one.feedback_id, at=time.time()).to_json())
        del self.standing[:count]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("updates", [pytest.param(UPDATES, marks=pytest.mark.soak)])
def test_it_stays_flat_update_after_update(tmp_path: Path, updates: int) -> None:
    series = list(learn(tmp_path, updates))
    print("resident memory, MB:", " ".join(f"{held.memory / 1e6:.1f}" for held in series))
    print("files:", *(held.files for held in series), "threads:", *(held.threads for held in series))
    assert grown([held.memory for held in series]) <= BOUND
    assert grown([held.files for held in series]) <= 0
    assert grown([held.threads for held in series]) <= 0


def learn(folder: Path, updates: int) -> Iterator[Held]:
    """What `heed learn` holds after each of so many updates, before each of which people said something new."""
    people = People(folder / "data", STANDING + NEW * updates)
    people.speak(STANDING)
    told = {f"HEED_{name}": str(value) for name, value in SETTINGS.items()} | {"HEED_DATA": str(folder / "data")}
    lines = folder / "lines"
    with lines.open("wb") as file:
        command = [sys.executable, "-m", "deploy.cli", "learn"]
        learner = subprocess.Popen(command, cwd=ROOT, env=os.environ | told, stdout=file, stderr=subprocess.STDOUT)
    try:
        for number in range(1, updates + 1):
            until(lambda n=number: len(ENDED.findall(lines.read_text())) >= n, f"update {number} ended")
            yield Held.by(learner.pid)
            people.take_back(NEW)
            people.speak(NEW)
    finally:
        learner.send_signal(signal.SIGTERM)
        learner.wait(60)
        people.log.close()


def grown(series: Sequence[float]) -> float:
    """By which share the median of the last updates is above that of the first warm ones."""
    before, after = series[WARM : 2 * WARM], series[-WARM:]
    return statistics.median(after) / statistics.median(before) - 1


def test_a_leak_is_growth_and_noise_is_none() -> None:
    level = [400.0] * WARM + [500.0 + update % 3 for update in range(UPDATES - WARM)]
    assert abs(grown(level)) < BOUND / 10
    assert grown([size + update * 0.1 for update, size in enumerate(level)]) > BOUND
