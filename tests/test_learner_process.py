"""The learner as a process: one at a time, stopped by signals, behind the server, clear when it cannot start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.welcome import free_port
from feedback.events import EXCHANGES, FEEDBACK
from feedback.sqlite_log import SqliteLog
from learner.metrics import LearnerMetrics, MetricsServer
from learner.state import State
from tests.told import BASE, exchange, feedback

ROOT = Path(__file__).resolve().parent.parent

# The real process with a trainer that trains for as long as it is let: nothing here needs a model.
PROGRAM = """
import logging, os, pathlib, sys, threading, time, types

from feedback.config import FeedbackConfig
from learner.config import LearnerConfig
from learner.process import learn
from serving.config import ServingConfig

def endless(config):
    from tests.test_loop import ReadyMade

    class Endless(ReadyMade):
        def learn(self, *arguments, progress, **named):
            print("learning at niceness", os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), flush=True)
            while True:
                progress("reward", 0.5)
                time.sleep(10)  # whoever trains does not look up for a while

    return Endless()

update = types.ModuleType("learner.update")
update.Trainer = endless
sys.modules["learner.update"] = update

logging.basicConfig(level=logging.INFO)
data, port, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
config = LearnerConfig(
    serving=ServingConfig(feedback=FeedbackConfig(data=pathlib.Path(data))),
    update_min_feedback=1, learner_metrics_port=port,
)
sys.exit(learn(config, until_idle="until_idle" in arguments, rebuild="rebuild" in arguments))
"""


class Process:
    """One learner in a process of its own; its lines as they come."""

    def __init__(self, data: Path, *arguments: str, port: int = 0) -> None:
        command = [sys.executable, "-c", PROGRAM, str(data), str(port), *arguments]
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
    """Starts learners on this test's data folder."""
    started: list[Process] = []

    def begin(*arguments: str, port: int = 0) -> Process:
        started.append(Process(tmp_path, *arguments, port=port))
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
    with contextlib.closing(SqliteLog(data / "log", [EXCHANGES, FEEDBACK])) as log:
        log.append(EXCHANGES, "r", exchange("r").to_json())
        log.append(FEEDBACK, "r", feedback("f", "r").to_json())


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
