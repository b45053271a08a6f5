"""The outbox: nothing is lost, doubled out of order or overtaken while the log goes away and comes back."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import EventTooLarge, LogUnavailable, Offset, Offsets, Record
from feedback.outbox import WAITS, Outbox
from feedback.sqlite_log import SqliteLog

ROOT = Path(__file__).resolve().parent.parent
LARGE = 5000


class FarLine(NamedTuple):
    log: FarLog
    epoch: int

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        return self.log.submit(topic, key, event, self.epoch)


class FarLog:
    """A real log on the other side of a line: while `away`, nobody hears whether it kept what was handed in."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.log = SqliteLog(folder, [EXCHANGES, FEEDBACK])
        self.away = threading.Event()
        self.chance = random.Random(seed)
        self.handed_in = 0
        self.still = True
        self.epoch = 0
        self.timers: list[threading.Timer] = []

    def line(self) -> FarLine:
        return FarLine(self, self.epoch)

    def submit(self, topic: str, key: str, event: str, epoch: int | None = None) -> Future[Offset]:
        self.handed_in += 1
        if len(event) > LARGE:
            raise EventTooLarge(f"{len(event)} characters are too many")
        if not self.away.is_set() and epoch in (None, self.epoch):
            self.still = True
            return self.log.submit(topic, key, event)
        lost: Future[Offset] = Future()
        self.epoch += 1
        self.still = self.still and self.away.is_set() and self.chance.random() < 0.7
        if self.still:  # it was kept, and the answer got lost; none is kept behind one that was not
            self.log.submit(topic, key, event)
        self.timers.append(threading.Timer(self.chance.random() * 0.01, lost.set_exception, [LogUnavailable("away")]))
        self.timers[-1].start()
        return lost

    def append(self, topic: str, key: str, event: str) -> Offset:
        return self.submit(topic, key, event).result()

    def read(self, topic: str, after: Offsets, max_events: int) -> list[Record]:
        return self.log.read(topic, after, max_events)

    def end(self, topic: str) -> Offsets:
        return self.log.end(topic)

    def waiting(self) -> int:
        return 0

    def close(self) -> None:
        for timer in self.timers:
            timer.join()
        self.log.close()

    def said(self, topic: str = FEEDBACK) -> list[str]:
        """Every event, at its first place."""
        return list(dict.fromkeys(record.event for record in self.log.read(topic, {}, 100_000)))


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarLog]:
    log = FarLog(tmp_path / "log")
    yield log
    log.close()


@pytest.fixture
def box(tmp_path: Path, far: FarLog) -> Iterator[Outbox]:
    opened = Outbox(far, tmp_path / "outbox", [EXCHANGES, FEEDBACK], 10**6)
    yield opened
    far.away.clear()
    opened.close()


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it never became true"
        time.sleep(0.005)


def test_while_the_log_is_there_nothing_goes_through_the_outbox(box: Outbox, far: FarLog) -> None:
    assert [box.append(FEEDBACK, "key", str(number)) for number in range(3)] == [1, 2, 3]
    assert box.waiting() == 0
    assert far.handed_in == 3
    assert [record.event for record in box.read(FEEDBACK, {}, 10)] == ["0", "1", "2"]
    assert box.end(FEEDBACK) == {FEEDBACK: 3}


def test_what_the_log_does_not_take_is_answered_and_follows_in_order(box: Outbox, far: FarLog) -> None:
    box.append(FEEDBACK, "key", "before")
    far.away.set()
    for number in range(30):
        assert box.append(FEEDBACK, "key", str(number)) == WAITS
    assert box.waiting() == 30
    far.away.clear()
    until(lambda: box.waiting() == 0)
    assert far.said() == ["before", *map(str, range(30))]
    assert box.append(FEEDBACK, "key", "after") > 30


def test_those_on_their_way_when_one_fails_wait_behind_it(box: Outbox, far: FarLog) -> None:
    far.away.set()
    waiting = [box.submit(FEEDBACK, "key", str(number)) for number in range(200)]
    far.away.clear()  # the last may reach the log while the first are being put aside
    waiting += [box.submit(FEEDBACK, "key", str(number)) for number in range(200, 400)]
    for future in waiting:
        future.result(10)
    until(lambda: box.waiting() == 0)
    assert far.said() == [str(number) for number in range(400)]


def test_topics_wait_apart(box: Outbox, far: FarLog) -> None:
    far.away.set()
    box.append(EXCHANGES, "key", "exchange")
    far.away.clear()
    box.append(FEEDBACK, "key", "feedback")
    until(lambda: box.waiting() == 0)
    assert (far.said(EXCHANGES), far.said(FEEDBACK)) == (["exchange"], ["feedback"])


def test_what_waited_when_the_process_ended_follows_in_the_next(tmp_path: Path, far: FarLog) -> None:
    far.away.set()
    code = """
import sys, time
from pathlib import Path
from feedback.outbox import Outbox
from tests.test_outbox import FarLog
far = FarLog(Path(sys.argv[1]) / "none")
far.away.set()
box = Outbox(far, Path(sys.argv[1]) / "outbox", ["heed.feedback"], 10**6)
for number in range(50):
    box.append("heed.feedback", "key", str(number))
print(box.waiting(), flush=True)
time.sleep(300)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "50\n"
        with pytest.raises(LogUnavailable, match="written by another process"):
            Outbox(FarLog(tmp_path / "other"), tmp_path / "outbox", [FEEDBACK], 10**6)
        process.kill()
    box = Outbox(far, tmp_path / "outbox", [FEEDBACK], 10**6)
    assert box.waiting() == 50
    box.append(FEEDBACK, "key", "50")
    far.away.clear()
    until(lambda: box.waiting() == 0)
    box.close()
    assert far.said() == [str(number) for number in range(51)]


def test_a_full_outbox_refuses_and_says_why_and_has_room_again_once_it_is_drained(tmp_path: Path, far: FarLog) -> None:
    far.away.set()
    box = Outbox(far, tmp_path / "outbox", [FEEDBACK], 10_000)
    told = [box.submit(FEEDBACK, "key", str(number) + "x" * 996).exception(10) for number in range(20)]
    kept = told.count(None)
    assert 8 <= kept <= 10
    assert all(isinstance(error, LogUnavailable) for error in told[kept:])
    assert "the outbox is full (0.01 MB, HEED_OUTBOX_MB)" in str(told[-1])
    assert box.waiting() == kept
    far.away.clear()
    until(lambda: box.waiting() == 0)
    assert box.append(FEEDBACK, "key", "{}") > 0
    assert len(far.said()) == kept + 1
    box.close()


def test_what_the_log_will_never_take_is_refused_or_set_aside_and_holds_up_nobody(
    tmp_path: Path, box: Outbox, far: FarLog, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EventTooLarge):
        box.append(FEEDBACK, "key", "x" * (LARGE + 1))
    far.away.set()
    box.append(FEEDBACK, "key", "first")
    assert box.append(FEEDBACK, "key", "y" * (LARGE + 1)) == WAITS  # nobody can say yet
    box.append(FEEDBACK, "key", "last")
    far.away.clear()
    until(lambda: box.waiting() == 1)
    assert far.said() == ["first", "last"]
    assert "set aside" in caplog.text
    aside = SqliteLog(tmp_path / "outbox", [])
    assert [len(record.event) for record in aside.read(f"{FEEDBACK}.refused", {}, 10)] == [LARGE + 1]
    aside.close()


def test_one_that_the_log_will_not_take_is_set_aside_once_however_long_the_log_is_away(
    box: Outbox, far: FarLog
) -> None:
    far.away.set()
    box.append(FEEDBACK, "key", "first")
    box.append(FEEDBACK, "key", "y" * (LARGE + 1))
    tried = far.handed_in
    until(lambda: far.handed_in > tried + 6)  # the drain has come again and again
    assert box.waiting() == 2
    far.away.clear()
    until(lambda: box.waiting() == 1)
    assert far.said() == ["first"]


def test_one_that_the_log_refuses_only_when_it_has_it_does_not_hold_up_those_behind_it(
    tmp_path: Path, far: FarLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox(far, tmp_path / "outbox", [FEEDBACK], 10**6)
    far.away.set()
    for text in ("0", "large", "2", "3"):
        box.append(FEEDBACK, "key", text)
    submit = FarLog.submit

    def broker(log: FarLog, topic: str, key: str, event: str, epoch: int | None = None) -> Future[Offset]:
        """As Kafka: what is too large fails late, and with it what is behind it on the same line."""
        if event == "large":
            log.epoch += 1
            refused: Future[Offset] = Future()
            refused.set_exception(EventTooLarge("too large"))
            return refused
        return submit(log, topic, key, event, epoch)

    monkeypatch.setattr(FarLog, "submit", broker)
    far.away.clear()
    until(lambda: box.waiting() == 1)  # it is set aside, and counted
    assert far.said() == ["0", "2", "3"]
    box.close()
    monkeypatch.undo()
    again = FarLog(tmp_path / "log")  # the topic takes larger ones now
    box = Outbox(again, tmp_path / "outbox", [FEEDBACK], 10**6)
    until(lambda: box.waiting() == 0)
    assert again.said() == ["0", "2", "3", "large"]
    box.close()


def test_a_log_that_is_away_while_the_process_ends_costs_nothing(tmp_path: Path, far: FarLog) -> None:
    box = Outbox(far, tmp_path / "outbox", [FEEDBACK], 10**6)
    far.away.set()
    waiting = [box.submit(FEEDBACK, "key", str(number)) for number in range(20)]
    box.close()
    assert [future.result(0) for future in waiting] == [WAITS] * 20
    with pytest.raises(LogUnavailable, match="closed"):
        box.append(FEEDBACK, "key", "{}")
    far = FarLog(tmp_path / "log")
    box = Outbox(far, tmp_path / "outbox", [FEEDBACK], 10**6)
    until(lambda: box.waiting() == 0)
    assert far.said() == [str(number) for number in range(20)]
    box.close()


def test_a_full_disk_is_said_and_passes(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from feedback.log import LogUnavailable
from feedback.outbox import Outbox
from tests.test_outbox import FarLog, until

far = FarLog(Path(sys.argv[1]) / "log")
box = Outbox(far, Path(sys.argv[1]) / "outbox", ["heed.feedback"], 10**8)
far.away.set()
box.append("heed.feedback", "key", "0")
largest = (Path(sys.argv[1]) / "outbox" / "heed.feedback.db-wal").stat().st_size + 20_000
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))  # from here on the disk is as good as full
refused = 0
for number in range(20):
    try:
        box.append("heed.feedback", "key", "large " + "x" * 50_000)
    except LogUnavailable as error:
        refused, said = refused + 1, error
assert refused == 20, refused
print(said, box.waiting())
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
box.append("heed.feedback", "key", "1")
far.away.clear()
until(lambda: box.waiting() == 0)
assert far.said() == ["0", "1"], far.said()
box.close()
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("the event was not kept 1\n")


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["say", "say many", "go", "come", "wait", "again"]), min_size=5, max_size=40),
    seed=st.integers(0, 10_000),
)
def test_whatever_happens_everything_arrives_at_its_first_place_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("outbox")
    far = FarLog(folder / "log", seed)
    box = Outbox(far, folder / "outbox", [FEEDBACK], 10**7)
    futures: list[Future[Offset]] = []
    for step in steps:
        if step.startswith("say"):
            many = 50 if step == "say many" else 1
            futures += [box.submit(FEEDBACK, "key", str(len(futures) + more)) for more in range(many)]
        elif step == "go":
            far.away.set()
        elif step == "come":
            far.away.clear()
        elif step == "wait":
            time.sleep(0.01)
        else:
            box.close()
            far = FarLog(folder / "log", seed + 1)
            box = Outbox(far, folder / "outbox", [FEEDBACK], 10**7)
    for future in futures:
        future.result(20)
    far.away.clear()
    until(lambda: box.waiting() == 0)
    assert far.said() == [str(number) for number in range(len(futures))]
    box.close()
