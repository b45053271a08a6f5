"""Server and learner as processes that can be killed and started again at once, and what they leave in their folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import open_log
from learner.intake import Intake
from learner.metrics import LearnerMetrics
from learner.state import State
from serving.adapters import Base, describe_base
from serving.engine import load_model

ROOT = Path(__file__).resolve().parent.parent

# Imports everything once, then forks a child for each line it reads: a process of its own, without the seconds of
# importing. The children run what `heed serve` and `heed learn` run. Only the training itself is short, and its gate
# open, so that between two kills there is time for several versions. How each child ended goes into a file.
NURSERY = """
import json, logging, os, signal, sys, time
import torch
from feedback.config import load
from learner import loop, process as learning, trainer
from learner.config import LearnerConfig
from learner.gate import GateReport
from serving import process as serving

torch.set_num_threads(1)
flags = json.loads(sys.argv[1])
ends = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)

class Quick(trainer.Trainer):
    def learn(self, judgements, prompts, *, parent, seed, served, progress):
        for phase in ("reward", "rollouts", "ppo", "gate"):
            for step in range(10):
                progress(phase, step / 10)
                time.sleep(0.02)
        policy = self.model.adapter(trainer.POLICY)
        policy.reset(seed)
        with torch.no_grad():
            for up_Or in policy.up:
                up_Or.normal_(0, 0.02)
        return trainer.Candidate(policy.weights(), {}, GateReport(True, []))

def note_ends(*_):
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            os.write(ends, f"{ended[0]} {os.waitstatus_to_exitcode(ended[1])}\\n".encode())
    except ChildProcessError:
        pass

trainer.Trainer = Quick
signal.signal(signal.SIGCHLD, note_ends)
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s")
for line in sys.stdin:
    name, data = json.loads(line)
    config = load(LearnerConfig, environ={}, toml=None, flags=flags[name] | ({"data": data} if data else {}))
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        code = 1
        try:
            code = learning.learn(config) if name == "learner" else serving.serve(config.serving)
        finally:
            logging.shutdown()
            os._exit(code)
    print(pid, flush=True)
"""


class House:
    """Server and learner, each while it is started and not ended."""

    def __init__(self, ends: Path, second: dict[str, Any] | None = None, **settings: Any) -> None:
        """`ends`: a file, made here, of how processes ended. `second`: where a second server's settings differ."""
        self.url = f"http://127.0.0.1:{settings['port']}"
        """Where people find the server."""
        self.life = 0
        """Grows whenever a server is ended or started."""
        own = {"server": settings, "learner": settings} | ({"second": settings | second} if second else {})
        self._ends = ends
        ends.touch()
        self.nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY, json.dumps(own), str(ends)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids: dict[str, int] = {}

    def start(self, *names: str, data: Path | None = None) -> None:
        """`data`: another data folder than that of the settings."""
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        for name in names:
            self.life += name != "learner"
            self.nursery.stdin.write(json.dumps([name, str(data) if data else None]) + "\n")
            self.nursery.stdin.flush()
            self.pids[name] = int(self.nursery.stdout.readline())

    def end(self, number: signal.Signals, *names: str) -> dict[str, int]:
        """Send a signal, and wait; returns the exit codes (minus the signal, where that ended it)."""
        assert self.ended() == {}
        pids = {name: self.pids.pop(name) for name in names}
        self.life += names != ("learner",)
        for pid in pids.values():
            os.kill(pid, number)
        until(lambda: set(pids.values()) <= self._codes().keys(), f"{names} ended")
        return {name: self._codes()[pid] for name, pid in pids.items()}

    def ended(self) -> dict[str, int]:
        """Who ended by itself, and the exit code."""
        codes = self._codes()
        return {name: codes[pid] for name, pid in self.pids.items() if pid in codes}

    def close(self) -> None:
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.close()
        self.nursery.stdout.close()
        self.nursery.wait()

    def _codes(self) -> dict[int, int]:
        """How each process that has ended did so, by its pid."""
        return {int(pid): int(code) for pid, code in map(str.split, self._ends.read_text().splitlines())}


@dataclass
class Folder:
    """The data folder, its log and its base, looked at while nobody writes."""

    config: FeedbackConfig
    model: Path

    @property
    def data(self) -> Path:
        return self.config.data

    @cached_property
    def base(self) -> Base:
        model, chat = load_model(str(self.model), "cpu", "float32")
        return describe_base(model, chat, self.model)

    def state(self, path: str = "learner/state.db") -> State:
        return State(self.data / path, policy="default", base=self.base.fingerprint)

    def state_from_the_log(self) -> State:
        """A state made in one go, from the first event to the last, with nobody killed."""
        state = self.state("again.db")
        self.catch_up(state)
        return state

    def catch_up(self, state: State) -> None:
        """Take into a state what the log has and it has not."""
        with contextlib.closing(open_log(self.config, writes=())) as log:
            intake = Intake(log, state, LearnerMetrics(), join_wait_s=self.config.join_wait_s, clock=time.time)
            until(lambda: all(any(log.end(topic).values()) for topic in (EXCHANGES, FEEDBACK)), "the log is there")
            while intake.absorb():
                pass


def until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def quick_settings(folder: Folder, port: int) -> dict[str, Any]:
    """Settings of a small house, whose learner makes a version of every few judgements."""
    return {
        "data": str(folder.data),
        "model": str(folder.model),
        "port": port,
        "max_rows": 4,
        "threads": 1,
        "drain_delay_s": 0,
        "update_min_feedback": 8,
        "update_interval_s": 1,
        "learner_metrics_port": 0,
        "learner_threads": 1,
        "rollouts": 8,
        "minibatch": 8,
        "update_batches": 1,
        "rollout_tokens": 8,
        "gate_samples": 8,
    }
