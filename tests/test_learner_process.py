"""The learner as a process: one at a time, stopped by signals, behind the server, clear when it cannot start."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deploy.welcome import free_port
from feedback.events import EXCHANGES, FEEDBACK, Exchange, Feedback, Retraction
from feedback.sqlite_log import SqliteLog
from learner.metrics import LearnerMetrics, MetricsServer
from learner.report import feedback_counts
from learner.state import State
from learner.statefile import open_state
from serving.adapters import AdapterStore
from tests.told import BASE, exchange, feedback, retraction

ROOT = Path(__file__).resolve().parent.parent

# The real process with a trainer that trains for as long as it is let: nothing here needs a model.
PROGRAM = """
import json, logging, os, sys, threading, time, types

from feedback.config import load
from learner.config import LearnerConfig
from learner.process import learn

def endless(config):
    from tests.test_loop import ReadyMade

    class Endless(ReadyMade):
        def learn(self, *arguments, progress, **named):
            print("learning at niceness", os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), flush=True)
            while True:
                progress("reward", 0.5)
                time.sleep(10)  # whoever trains does not look up for a while

    return Endless()

trainer = types.ModuleType("learner.trainer")
trainer.Trainer = endless
sys.modules["learner.trainer"] = trainer

logging.basicConfig(level=logging.INFO)
config, arguments = load(LearnerConfig, environ={}, toml=None, flags=json.loads(sys.argv[1])), sys.argv[2:]
sys.exit(learn(config, until_idle="until_idle" in arguments, rebuild="rebuild" in arguments))
"""


class Process:
    """One learner in a process of its own; its lines as they come."""

    def __init__(self, data: Path, *arguments: str, port: int = 0, **settings: object) -> None:
        flags = {"data": str(data), "learner_metrics_port": port, "update_min_feedback": 1, **settings}
        command = [sys.executable, "-c", PROGRAM, json.dumps(flags), *arguments]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, text: str, seconds: float = 60) -> str:
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            for line in list(self.lines):
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"{text!r} was not said, but: {''.join(self.lines)}")

    def ends(self, seconds: float = 60) -> int:
        code = self.process.wait(seconds)
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts learners on this test's data folder, or on one of their own."""
    started: list[Process] = []

    def begin(*arguments: str, data: Path = tmp_path, **settings: Any) -> Process:
        started.append(Process(data, *arguments, **settings))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.ends()


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def give_a_thumb(data: Path) -> None:
    """What a server would have written."""
    tell(data, exchange("r"), feedback("f", "r"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_within_seconds_even_during_an_update(start: Start, tmp_path: Path, number: signal.Signals):
    give_a_thumb(tmp_path)
    port = free_port("127.0.0.1")
    learner = start(port=port)
    assert learner.wait_for("learning at niceness").strip() == "learning at niceness 4"
    assert get(port, "/health")[0] == 200
    assert "heed_learner_offset_lag" in get(port, "/metrics")[1]
    learner.process.send_signal(number)
    learner.wait_for("stopped", seconds=5)
    assert learner.ends() == 0
    assert "Traceback" not in "".join(learner.lines)


def test_a_second_learner_waits_says_for_whom_and_takes_over(start: Start):
    first = start()
    first.wait_for("learning for policy default")
    second = start()
    second.wait_for(f"the learner of this data folder is process {first.process.pid} on {socket.gethostname()}")
    first.process.kill()
    first.ends()
    second.wait_for("learning for policy default")
    second.process.terminate()
    assert second.ends() == 0


def test_a_learner_of_the_same_policy_elsewhere_waits_says_for_whom_and_takes_over(start: Start, tmp_path: Path):
    """Two data folders, one adapter store: the second learner takes the lease within 10 s of the first's death."""
    store = str(tmp_path / "store")
    first = start(data=tmp_path / "one", adapters=store)
    first.wait_for("learning for policy default")
    second = start(data=tmp_path / "two", adapters=store)
    other = start("until_idle", data=tmp_path / "three", adapters=store, policy="other")
    second.wait_for(f"the learner of policy default is process {first.process.pid} on {socket.gethostname()}")
    assert other.ends() == 0  # another policy has a lease of its own
    assert not any("learning for" in line for line in second.lines)
    began = time.monotonic()
    first.process.kill()
    first.ends()
    taken = tmp_path / "store" / "default" / "learner.lock"
    while f"{second.process.pid} on" not in taken.read_text():
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    second.wait_for("learning for policy default")
    second.process.terminate()
    assert second.ends() == 0


def test_a_store_that_is_away_is_waited_for(start: Start, tmp_path: Path):
    store = tmp_path / "store"
    store.write_text("a file where the folder should be")
    learner = start("until_idle", adapters=str(store))
    learner.wait_for("waiting, and trying again")
    store.unlink()
    assert learner.ends() == 0


def test_a_learner_that_waits_for_another_can_be_stopped(start: Start, tmp_path: Path):
    with (tmp_path / "learner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        learner = start("until_idle")
        learner.wait_for("the learner of this data folder is process (unknown)")
        learner.process.terminate()
        assert learner.ends() == 0


def test_until_idle_ends_by_itself(start: Start, tmp_path: Path):
    learner = start("until_idle")
    assert learner.ends() == 0
    assert (tmp_path / "learner" / "state.db").exists()


def test_a_taken_metrics_port_is_one_clear_line(start: Start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        learner = start(port=port)
        assert learner.ends() == 4
    [line] = learner.lines
    assert line.startswith(
        f"heed: HEED_LEARNER_METRICS_PORT={port}: cannot listen on 127.0.0.1:{port} (Address already"
    )


def test_a_corrupt_state_names_the_way_out_and_the_way_works(start: Start, tmp_path: Path):
    give_a_thumb(tmp_path)
    path = tmp_path / "learner" / "state.db"
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    broken = start("until_idle")
    assert broken.ends() == 1
    [line] = [line for line in broken.lines if line.startswith("heed:")]
    assert "file is not a database" in line
    assert "heed learn --rebuild" in line
    rebuilt = start("rebuild")
    rebuilt.wait_for("learning at niceness")
    rebuilt.process.terminate()
    assert rebuilt.ends() == 0
    state = State(path, policy="default", base=BASE)
    assert [judgement.feedback_id for judgement in state.judgements()] == ["f"]
    state.close()


def tell(data: Path, *events: Exchange | Feedback | Retraction | str) -> None:
    """What a server would have written; text is an event of the feedback topic as it stands."""
    with contextlib.closing(SqliteLog(data / "log", [EXCHANGES, FEEDBACK])) as log:
        for event in events:
            text = event if isinstance(event, str) else event.to_json()
            log.append(EXCHANGES if isinstance(event, Exchange) else FEEDBACK, "key", text)


def known(data: Path) -> tuple[str, dict[str, Any], list[str]]:
    """What a learner's state comes to: its digest, its counts, and what it learns from."""
    with contextlib.closing(State(data / "learner" / "state.db", policy="default", base=BASE)) as state:
        counts = feedback_counts(state)
        return state.digest(), counts, [judgement.feedback_id for judgement in state.judgements()]


def test_a_rebuild_makes_the_same_state_from_a_log_with_every_kind_of_event(start: Start, tmp_path: Path):
    """Every fate there is, some reached by detours that a rebuild does not take: late, given up, let go of, learned late."""
    settings = {"join_wait_s": 60, "state_keep_days": 10}
    AdapterStore(tmp_path / "adapters", "default").change("pause", "operator")  # nothing but reading happens
    now, day = time.time(), 86_400
    thumb = partial(feedback, kind="thumb")
    tell(
        tmp_path,
        exchange("r", at=now - 300),
        exchange("q", at=now - 300),
        exchange("theirs", policy="other", at=now - 300),
        exchange("ages ago", at=now - 20 * day),
        thumb("joined", "r", user="ann", at=now - 200),
        thumb("joined", "r", user="ann", at=now - 200),  # duplicate
        thumb("joined", "r", user="ann", value=0, at=now - 190),  # conflict
        feedback("preference", "r", "q", kind="preference", at=now - 200),
        feedback("comment", "r", kind="comment", at=now - 200),
        thumb("other policy", "theirs", at=now - 200),
        thumb("superseded", "q", value=1, user="bob", at=now - 200),
        thumb("by this", "q", value=0, user="bob", at=now - 180),
        thumb("retracted", "r", user="cy", at=now - 200),
        retraction("retracted", at=now - 100),
        retraction("retracted too early", at=now - 100),
        thumb("retracted too early", "r", user="di", at=now - 90),
        thumb("late", "in an outbox", at=now - 200),
        thumb("unknown", "nowhere", at=now - 200),
        thumb("retracted when given up", "nowhere", user="ed", at=now - 200),
        thumb("waiting", "to come", at=now + 3600),
        thumb("too old", "ages ago", at=now - 20 * day),
        thumb("malformed", "r", value=0.5, at=now - 200),
        "nonsense",
        '{"schema": 99, "type": "feedback"}',
    )
    assert start("until_idle", **settings).ends() == 0
    first, counts, _ = known(tmp_path)
    drops = {"conflict": 1, "malformed": 2, "newer_schema": 1, "no_exchange": 3, "too_old": 1}
    assert counts["dropped"] == drops
    tell(tmp_path, exchange("in an outbox", at=now - 250), retraction("retracted when given up", at=now))
    assert start("until_idle", **settings).ends() == 0
    lived, counts, judged = known(tmp_path)
    assert lived != first
    assert (counts["late"], counts["duplicates"]) == (1, 1)
    assert counts["dropped"] == {**drops, "no_exchange": 1}
    assert counts["by_status"] == {"dropped": 2, "joined": 6, "pending": 1, "retracted": 3, "superseded": 1}
    shutil.rmtree(tmp_path / "learner")
    assert start("until_idle", "rebuild", **settings).ends() == 0
    anew, counts_anew, judged_anew = known(tmp_path)
    assert anew == lived
    assert judged_anew == judged == ["joined", "late", "preference", "by this"]
    assert counts_anew == {**counts, "late": 0}


def test_a_data_folder_that_cannot_be_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    learner = Process(tmp_path / "file" / "data")
    assert learner.ends() == 6
    [line] = learner.lines
    assert line.startswith("heed: the data folder cannot be used")


def test_the_metrics_server_answers_two_questions():
    metrics = LearnerMetrics()
    metrics.updates.labels("released").inc()
    server = MetricsServer("127.0.0.1", 0, metrics, health=lambda: {"status": "ok"})
    try:
        assert get(server.port, "/health") == (200, '{"status": "ok"}')
        assert 'heed_updates_total{outcome="released"} 1.0' in get(server.port, "/metrics?name=x")[1]
        assert get(server.port, "/")[0] == 404
    finally:
        server.close()


@pytest.mark.parametrize("arguments", [("until_idle",), ("until_idle", "rebuild")])
def test_while_its_kafka_is_away_nothing_counts_as_idle_and_no_state_is_thrown_away(
    start: Start, tmp_path: Path, arguments: tuple[str, ...]
):
    state = tmp_path / "learner" / "state.db"
    open_state(state).close()
    before = state.stat().st_ino
    nobody = free_port("127.0.0.1")
    learner = start(*arguments, kafka_bootstrap=f"127.0.0.1:{nobody}")
    learner.wait_for("the log does not answer" if "rebuild" in arguments else "cannot read Kafka's topic")
    time.sleep(2)
    assert learner.process.poll() is None
    assert state.stat().st_ino == before
