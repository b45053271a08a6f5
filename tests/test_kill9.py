"""kill -9 of server, learner or both at any moment: every 202 counts once, and no torn version is ever served.

Real processes over one data folder; a crowd chats and rates over HTTP, through every outage, and notes each 202.
`KILL_SEED` repeats a run as far as its choices go.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.welcome import free_port
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK, RELEASES, Release
from feedback.log import open_log
from learner.report import feedback_counts
from learner.state import State
from serving.adapters import AdapterStore, Base, describe_base
from serving.engine import load_model

ROOT = Path(__file__).resolve().parent.parent

# Imports everything once, then forks a child for each line it reads: a process of its own, without the seconds of
# importing. The children run what `heed serve` and `heed learn` run. Only the training itself is short, and its gate
# open, so that between two kills there is time for several versions.
NURSERY = """
import json, logging, os, signal, sys, time
import torch
from feedback.config import load
from learner import loop, process as learning, update
from learner.config import LearnerConfig
from learner.gate import GateReport
from serving import process as serving

torch.set_num_threads(1)
config = load(LearnerConfig, environ={}, toml=None, flags=json.loads(sys.argv[1]))

class Quick(update.Trainer):
    def learn(self, judgements, prompts, *, parent, seed, progress):
        for phase in ("reward", "rollouts", "ppo", "gate"):
            for step in range(10):
                progress(phase, step / 10)
                time.sleep(0.02)
        policy = self.model.adapter(update.POLICY)
        policy.reset(seed)
        with torch.no_grad():
            for up_Or in policy.up:
                up_Or.normal_(0, 0.02)
        return update.Candidate(policy.weights(), {}, GateReport(True, []))

update.Trainer = Quick
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s")
for name in sys.stdin:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        code = 1
        try:
            code = serving.serve(config.serving) if name.strip() == "server" else learning.learn(config)
        finally:
            logging.shutdown()
            os._exit(code)
    print(pid, flush=True)
"""


class House:
    """Server and learner as processes that can be killed and started again at once."""

    def __init__(self, **settings: Any) -> None:
        self.url = f"http://127.0.0.1:{settings['port']}"
        self.nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY, json.dumps(settings)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids: dict[str, int] = {}

    def start(self, *names: str) -> None:
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        for name in names:
            self.nursery.stdin.write(f"{name}\n")
            self.nursery.stdin.flush()
            self.pids[name] = int(self.nursery.stdout.readline())

    def end(self, number: signal.Signals, *names: str) -> None:
        pids = [self.pids.pop(name) for name in names]
        for pid in pids:
            os.kill(pid, number)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), f"{names} ended")

    def close(self) -> None:
        self.end(signal.SIGKILL, *self.pids)
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.close()
        self.nursery.stdout.close()
        self.nursery.wait()


@dataclass
class Crowd:
    """People who chat and rate, each one reply after the other, and ask again until they are answered."""

    url: str
    size: int = 4
    leaving: threading.Event = field(default_factory=threading.Event)
    promised: dict[str, tuple[str, float]] = field(default_factory=dict)
    """The receipts' ids, with what was said: kind and value."""
    versions: set[str] = field(default_factory=set)
    oddities: list[str] = field(default_factory=list)
    outages: int = 0

    def __post_init__(self) -> None:
        self.people = [threading.Thread(target=self.person, args=(number,)) for number in range(self.size)]
        for person in self.people:
            person.start()

    def leave(self) -> None:
        self.leaving.set()
        for person in self.people:
            person.join()

    def person(self, number: int) -> None:
        chance = random.Random(number)
        said = 0
        with httpx.Client(base_url=self.url, timeout=30) as http:
            while not self.leaving.is_set():
                said += 1
                message = {"role": "user", "content": f"{number} says {said}"}
                chat = {"model": "default", "messages": [message], "max_tokens": 6, "user": f"user-{number}"}
                reply = self.insist(http, "/v1/chat/completions", chat)
                self.versions.add(reply["heed"]["version"])
                rating = {"kind": "rating", "value": chance.randint(1, 5)}
                thumb = {"kind": "thumb", "value": chance.choice(["up", "down"])}
                opinion = chance.choice([rating, thumb])
                named = {"reply_id": reply["id"], "user": f"user-{number}", "id": f"{number}-{said}"}
                receipt = self.insist(http, "/v1/feedback", {**opinion, **named})
                value = {"up": 1.0, "down": 0.0}.get(opinion["value"], opinion["value"])
                self.promised[receipt["id"]] = (opinion["kind"], float(value))

    def insist(self, http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask until there is an answer."""
        while True:
            try:
                answer = http.post(path, json=body)
            except httpx.TransportError:
                self.outages += 1
                time.sleep(0.05)
                continue
            if answer.status_code in (200, 202):
                parsed: dict[str, Any] = answer.json()
                return parsed
            if answer.status_code != 503:
                self.oddities.append(f"{path}: {answer.status_code} {answer.text[:300]}")
            time.sleep(0.05)

    def until_everyone_was_heard(self) -> None:
        """Until the learner has joined the last that was promised, as its own story tells."""
        with httpx.Client(base_url=self.url, timeout=30) as http:
            for receipt in list(self.promised)[-2 * self.size :]:
                until(
                    lambda receipt=receipt: http.get(f"/v1/feedback/{receipt}").json()["status"] != "accepted",  # type: ignore[misc]
                    f"feedback {receipt} was absorbed",
                )


@dataclass
class Folder:
    """The data folder and its base, looked at while nobody writes."""

    data: Path
    model: Path

    @cached_property
    def base(self) -> Base:
        model, chat = load_model(str(self.model), "cpu", "float32")
        return describe_base(model, chat, self.model)

    def state(self) -> State:
        return State(self.data / "learner" / "state.db", policy="default", base=self.base.fingerprint)

    def state_from_the_log(self) -> State:
        """A state made in one go, from the first event to the last, with nobody killed."""
        state = State(self.data / "again.db", policy="default", base=self.base.fingerprint)
        with contextlib.closing(open_log(FeedbackConfig(data=self.data), writes=())) as log:
            for topic in (EXCHANGES, FEEDBACK):
                state.absorb(log.read(topic, {}, 10**9), time.time())
        return state


def until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, f"not within {seconds} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Folder:
    return Folder(tmp_path / "data", model_folder)


@pytest.fixture
def house(folder: Folder) -> Iterator[House]:
    house = House(
        data=str(folder.data),
        model=str(folder.model),
        port=free_port("127.0.0.1"),
        max_rows=4,
        threads=1,
        drain_delay_s=0,
        update_min_feedback=8,
        update_interval_s=1,
        learner_metrics_port=0,
        learner_threads=1,
        rollouts=8,
        minibatch=8,
        update_batches=1,
        rollout_tokens=8,
        gate_samples=8,
    )
    yield house
    house.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.soak)])
def test_every_202_counts_once_and_no_torn_version_is_served(house: House, folder: Folder, kills: int):
    seed = int(os.environ.get("KILL_SEED", random.randrange(10_000)))
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)
    both = ("server", "learner")
    house.start(*both)
    crowd = Crowd(house.url)
    try:
        until(lambda: len(crowd.promised) > 10, "the crowd is talking")
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 4.0))
            doomed = chance.choice([both, ("server",), ("learner",)])
            house.end(signal.SIGKILL, *doomed)
            house.start(*doomed)
        before = len(crowd.promised)
        until(lambda: len(crowd.promised) > before + 10, "the crowd is talking again")
        until(lambda: len(crowd.versions) > 1, "a version that the learner made speaks")
    finally:
        crowd.leave()
    crowd.until_everyone_was_heard()
    house.end(signal.SIGTERM, *both)

    assert crowd.oddities == []
    with contextlib.closing(folder.state()) as state, contextlib.closing(folder.state_from_the_log()) as again:
        counts_each_once(crowd, state)
        assert state.digest() == again.digest()
    serves_whole_versions(crowd, folder)


def counts_each_once(crowd: Crowd, state: State) -> None:
    """What was promised is in the state as it was said; what is not promised was asked for and never answered."""
    rows = state.db.execute("SELECT id, kind, value, status FROM feedback")
    kept = {feedback_id: (kind, value, status) for feedback_id, kind, value, status in rows}
    assert {receipt: kept.get(receipt) for receipt in crowd.promised} == {
        receipt: (*said, "joined") for receipt, said in crowd.promised.items()
    }
    assert len(kept) == len(crowd.promised)
    assert {judgement.feedback_id for judgement in state.judgements()} == set(crowd.promised)
    assert feedback_counts(state)["dropped"] == {}


def serves_whole_versions(crowd: Crowd, folder: Folder) -> None:
    """Versions were made and served between the kills; each that anyone heard was released once, and all are whole."""
    with contextlib.closing(open_log(FeedbackConfig(data=folder.data), writes=())) as log:
        mirrored = [Release.model_validate_json(record.event) for record in log.read(RELEASES, {}, 10_000)]
    changes = [change for release in mirrored for change in release.changes]
    assert [change.generation for change in changes] == list(range(1, len(changes) + 1))
    released = [change.current for change in changes]
    assert released == sorted(set(released))
    heard = {int(version.removeprefix("v")) for version in crowd.versions}
    assert len(heard) > 1
    assert heard - {0} <= set(released)
    store = AdapterStore(folder.data / "adapters", "default")
    for version in store.versions():
        store.verify(version, folder.base)
    numbers = [store.manifest(version).update["number"] for version in store.versions()]
    assert numbers == sorted(set(numbers))
