"""What is old, or too much, leaves the log's file and the learner's state; what is younger never does."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback import sqlite_log, sqlite_topic
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK, Exchange
from feedback.keeping import DAY_S, EVERYTHING, Keep
from feedback.log import LogUnavailable, open_log
from feedback.sqlite_log import SqliteLog
from learner.intake import Intake
from learner.metrics import LearnerMetrics
from learner.report import dropped, feedback_counts
from learner.state import State
from tests.told import BASE, NOW, POLICY, exchange, feedback, records, retraction

HOUR = Keep(age_s=3600)


def until(true: object, seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_log, "TIDY_S", 0.02)


def test_settings_of_zero_keep_everything():
    assert Keep.of(0, 0) == EVERYTHING
    assert Keep.of(2, 3) == Keep(2 * DAY_S, 3e6)


def offsets(log: SqliteLog, topic: str = FEEDBACK) -> list[int]:
    return [record.offset for record in log.read(topic, {}, 100_000)]


def test_what_is_discarded_is_gone_and_no_offset_is_used_again(tmp_path: Path):
    log = SqliteLog(tmp_path, [FEEDBACK, EXCHANGES])
    for number in range(1000):
        log.submit(FEEDBACK, "key", str(number))
    log.append(EXCHANGES, "key", "{}")
    log.discard(FEEDBACK, 700)
    assert offsets(log) == list(range(701, 1001))
    log.discard(FEEDBACK, 10**9)
    assert (offsets(log), offsets(log, EXCHANGES)) == ([], [1])
    assert log.end(FEEDBACK) == {FEEDBACK: 1000}
    log.close()
    log = SqliteLog(tmp_path, [FEEDBACK])
    assert log.end(FEEDBACK) == {FEEDBACK: 1000}
    assert log.append(FEEDBACK, "key", "{}") == 1001
    log.close()


def test_only_who_writes_a_topic_can_discard_from_it(tmp_path: Path):
    log = SqliteLog(tmp_path, [FEEDBACK])
    with pytest.raises(ValueError, match="not opened to write"):
        log.discard(EXCHANGES, 1)
    log.append(FEEDBACK, "key", "{}")
    log.close()
    with pytest.raises(LogUnavailable, match="closed"):
        log.discard(FEEDBACK, 1)


def test_many_threads_may_append_and_discard_at_once(tmp_path: Path):
    log = SqliteLog(tmp_path, [FEEDBACK])

    def talk() -> None:
        for _ in range(100):
            log.discard(FEEDBACK, log.append(FEEDBACK, "key", "{}") - 10)

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.end(FEEDBACK) == {FEEDBACK: 400}
    kept = offsets(log)
    assert kept == list(range(kept[0], 401))
    assert 10 <= len(kept) <= 14
    log.close()


def test_what_was_discarded_gives_its_room_back(tmp_path: Path):
    log = SqliteLog(tmp_path, [FEEDBACK])
    for _ in range(2000):
        log.submit(FEEDBACK, "key", "x" * 10_000)
    log.discard(FEEDBACK, 1900)
    log.close()
    assert (tmp_path / "heed.feedback.db").stat().st_size < 0.1 * 2000 * 10_000


def aged(folder: Path, ages_s: list[float], size: int = 10) -> None:
    """A log whose records were appended so long ago."""
    with closing(SqliteLog(folder, [FEEDBACK])) as log:
        for _ in ages_s:
            log.submit(FEEDBACK, "key", "x" * size)
    with closing(sqlite3.connect(folder / "heed.feedback.db")) as db:
        values = [(time.time() - age_s, offset) for offset, age_s in enumerate(ages_s, 1)]
        db.executemany("UPDATE records SET at = ? WHERE offset = ?", values)
        db.commit()


@pytest.mark.usefixtures("often")
def test_the_log_lets_go_of_what_is_old_and_of_nothing_younger(tmp_path: Path):
    # the clock was set back once: what lies behind a younger record waits until that is old
    aged(tmp_path, [*[7200.0] * 1000, 3000.0, 7200.0, 60.0])
    log = SqliteLog(tmp_path, [FEEDBACK], HOUR)
    until(lambda: len(offsets(log)) < 1003 and offsets(log)[0] == 1001)
    time.sleep(0.1)
    assert offsets(log) == [1001, 1002, 1003]
    assert log.append(FEEDBACK, "key", "{}") == 1004
    log.close()


@pytest.mark.usefixtures("often")
def test_the_newest_record_stays_however_old(tmp_path: Path):
    aged(tmp_path, [7200.0, 7200.0])
    log = SqliteLog(tmp_path, [FEEDBACK], HOUR)
    until(lambda: len(offsets(log)) == 1)
    time.sleep(0.1)
    assert offsets(log) == [2]
    log.close()


@pytest.mark.usefixtures("often")
def test_the_log_lets_go_of_the_oldest_of_what_is_too_much(tmp_path: Path):
    aged(tmp_path, [60.0] * 2000, size=2000)
    log = SqliteLog(tmp_path, [FEEDBACK], Keep(size=1e6))
    until(lambda: len(offsets(log)) < 500)
    time.sleep(0.1)
    kept = offsets(log)
    assert kept == list(range(kept[0], 2001))
    assert 350 < len(kept) < 500
    log.close()


def test_without_a_bound_the_log_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sqlite_topic.TopicFile, "tidy", lambda *_: pytest.fail("it tidies"))
    aged(tmp_path, [1e9] * 3)
    log = SqliteLog(tmp_path, [FEEDBACK])
    log.append(FEEDBACK, "key", "{}")
    assert offsets(log) == [1, 2, 3, 4]
    log.close()


@pytest.mark.usefixtures("often")
def test_the_settings_reach_the_log(tmp_path: Path):
    aged(tmp_path / "log", [2 * DAY_S, 2 * DAY_S, 0.0])
    log = open_log(FeedbackConfig(data=tmp_path, log_keep_days=1), writes=[FEEDBACK])
    until(lambda: len(log.read(FEEDBACK, {}, 10)) == 1)
    log.close()


@pytest.mark.usefixtures("often")
def test_appends_go_on_while_much_is_let_go_of(tmp_path: Path):
    aged(tmp_path, [7200.0] * 20_000, size=1000)
    log = SqliteLog(tmp_path, [FEEDBACK], HOUR)
    longest = 0.0
    while len(log.read(FEEDBACK, {}, 1001)) > 1000:
        began = time.monotonic()
        log.append(FEEDBACK, "key", "{}")
        longest = max(longest, time.monotonic() - began)
    assert longest < 1.0
    log.close()


@pytest.mark.usefixtures("often")
def test_a_disk_that_refuses_stops_the_tidying_and_not_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    discard, faults = sqlite_topic._discard, [sqlite3.OperationalError("disk I/O error")]

    def refused(db: sqlite3.Connection, through: int) -> int:
        if faults:
            raise faults.pop()
        return discard(db, through)

    monkeypatch.setattr(sqlite_topic, "_discard", refused)
    aged(tmp_path, [7200.0, 0.0])
    log = SqliteLog(tmp_path, [FEEDBACK], HOUR)
    until(lambda: offsets(log) == [2])
    assert log.append(FEEDBACK, "key", "{}") == 3
    assert "disk I/O error" in caplog.text
    log.close()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state.db", policy=POLICY, base=BASE, keep=HOUR)
    yield state
    state.close()


def ids(state: State, table: str, column: str) -> set[str]:
    return {found for (found,) in state.db.execute(f"SELECT {column} FROM {table}")}


def test_feedback_that_comes_too_old_is_dropped_and_told_so(state: State):
    state.absorb(records(exchange("r"), feedback("f", "r", at=NOW - 3601), feedback("g", "r", at=NOW - 3599)), NOW)
    assert ids(state, "feedback", "id") == {"g"}
    assert dropped(state) == {"too_old": 1}
    [line] = [line for line in state.untold() if line.feedback_id == "f"]
    assert (line.step.status, line.step.reason) == ("dropped", "too_old")
    state.mark_told(state.untold())
    assert ids(state, "stories", "feedback_id") == {"g"}


def test_what_grows_old_leaves_the_state_with_all_that_belongs_to_it(state: State):
    state.absorb(
        records(
            exchange("r", at=NOW - 10),
            exchange("unsaid", at=NOW - 10),
            exchange("q", at=NOW),
            feedback("f", "r"),
            feedback("f", "r"),
            feedback("gone", "r", user="bob"),
            retraction("gone"),
            feedback("lost", "nowhere"),
            feedback("young", "q", at=NOW + 100),
        ),
        NOW,
    )
    while state.keep(NOW + 3601, grace_s=0):
        pass
    assert ids(state, "feedback", "id") == {"young"}
    assert ids(state, "exchanges", "reply_id") == {"q"}  # kept feedback speaks of it
    assert ids(state, "about", "feedback_id") == ids(state, "stories", "feedback_id") == {"young"}
    assert ids(state, "repeats", "feedback_id") == ids(state, "retractions", "id") == set()
    assert dropped(state) == {"too_old": 4}
    assert feedback_counts(state)["duplicates"] == 0


def test_an_exchange_on_which_feedback_may_still_come_stays_for_a_while(state: State):
    state.absorb(records(exchange("r")), NOW)
    state.keep(NOW + 3650, grace_s=100)
    state.absorb(records(feedback("f", "r", at=NOW + 3599)), NOW + 3650)
    assert len(state.judgements()) == 1


def test_feedback_on_an_exchange_that_was_too_old_when_it_was_given_waits_in_vain_even_where_the_exchange_still_is(
    state: State,
):
    """Else it would count where the exchange happened to stay, and a state made anew would be another one."""
    state.absorb(records(exchange("r"), feedback("keeps it", "r", at=NOW + 3000)), NOW + 3000)
    state.keep(NOW + 3601, grace_s=0)
    state.absorb(records(feedback("f", "r", user="bob", at=NOW + 3601), first=3), NOW + 3601)
    assert ids(state, "exchanges", "reply_id") == {"r"}
    assert [judgement.feedback_id for judgement in state.judgements()] == ["keeps it"]
    state.give_up_waiting(NOW + 4000, NOW + 4000)
    assert dropped(state) == {"no_exchange": 1}


def test_what_old_feedback_had_superseded_counts_again_and_a_younger_body_takes_its_place(state: State):
    """As if the old had never been said: by a clock that is wrong it may stand behind the young."""
    events = (exchange("r", at=NOW), feedback("young", "r", at=NOW + 50), feedback("old", "r", value=0, at=NOW))
    state.absorb(records(*events, feedback("old", "r", kind="rating", value=5, user="bob", at=NOW + 60)), NOW + 60)
    assert [judgement.feedback_id for judgement in state.judgements()] == ["old"]
    state.keep(NOW + 3601, grace_s=0)
    assert [(one.feedback_id, one.kind) for one in state.judgements()] == [("young", "thumb"), ("old", "rating")]
    assert dropped(state) == {"too_old": 1}


def test_an_exchange_of_which_only_a_younger_body_speaks_stays_for_it(state: State):
    told = (exchange("r", at=NOW - 10), feedback("f", "nowhere", at=NOW), feedback("f", "r", at=NOW + 60))
    state.absorb(records(*told), NOW + 60)
    for now in (NOW + 3595, NOW + 3601):
        state.keep(now, grace_s=0)
    assert [judgement.feedback_id for judgement in state.judgements()] == ["f"]


def test_what_takes_the_place_of_old_feedback_and_waits_in_vain_is_given_up_at_once(tmp_path: Path, state: State):
    clock = [NOW]
    with closing(SqliteLog(tmp_path, [FEEDBACK, EXCHANGES])) as log:
        for event in (feedback("f", "nowhere", at=NOW), feedback("f", "elsewhere", at=NOW + 60)):
            log.append(FEEDBACK, "key", event.to_json())
        intake = Intake(log, state, LearnerMetrics(), join_wait_s=20, clock=lambda: clock[0])
        for clock[0] in (NOW + 60, NOW + 3601):
            assert not intake.absorb()
    assert ids(state, "feedback", "reply_id") == {"elsewhere"}
    assert dropped(state) == {"too_old": 1, "no_exchange": 1}


@pytest.mark.parametrize("tidied", [True, False])
@pytest.mark.parametrize(("given", "status"), [(NOW + 3600, "retracted"), (NOW + 3601, "joined")])
def test_a_retraction_names_what_is_given_while_it_is_kept_and_nothing_later_even_where_it_still_is(
    state: State, given: float, status: str, tidied: bool
):
    state.absorb(records(exchange("r", at=given), retraction("f", at=NOW - 1), retraction("f", at=NOW)), NOW)
    if tidied:
        state.keep(given + 20, grace_s=20)
    state.absorb(records(feedback("f", "r", at=given), first=3), given + 20)
    assert ids(state, "feedback", "status") == {status}


def test_the_state_keeps_the_newest_that_fit(tmp_path: Path):
    with closing(State(tmp_path / "state.db", policy=POLICY, base=BASE, keep=Keep(size=100_000))) as state:
        pairs = [(exchange(f"r{n}", at=NOW + n), feedback(f"f{n}", f"r{n}", at=NOW + n)) for n in range(300)]
        state.absorb(records(*(event for pair in pairs for event in pair)), NOW)
        while state.keep(NOW, grace_s=1e9, most=50):
            pass
        query = "SELECT sum(size) FROM (SELECT size FROM exchanges UNION ALL SELECT size FROM feedback)"
        assert 95_000 < state.db.execute(query).fetchone()[0] <= 100_000
        kept = [judgement.feedback_id for judgement in state.judgements()]
        assert kept == [f"f{n}" for n in range(300 - len(kept), 300)]
        assert dropped(state) == {"too_old": 300 - len(kept)}


def test_the_room_of_what_left_the_state_is_used_again(tmp_path: Path):
    with closing(State(tmp_path / "state.db", policy=POLICY, base=BASE, keep=Keep(age_s=50))) as state:
        sizes = []
        for n in range(20):
            said = [exchange(f"r{n}-{i}", prompt="x" * 1000, at=NOW + 100 * n) for i in range(100)]
            state.absorb(records(*said, first=1 + 100 * n), NOW + 100 * n)
            state.keep(NOW + 100 * n, grace_s=0)
            sizes.append(state.db.execute("PRAGMA page_count").fetchone()[0])
        assert sizes[-1] <= 1.1 * sizes[2]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3), st.integers(0, 19)), max_size=40),
    seed=st.integers(0, 1000),
)
def test_a_state_made_anew_is_the_one_that_let_go_as_time_went_by(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int, int]], seed: int
):
    """Events come up to 20 s late; feedback is kept for 100 s, exchanges for as long as feedback on them may come."""
    folder, chance, keep = tmp_path_factory.mktemp("keep"), random.Random(seed), Keep(age_s=100)
    told = []
    for number, (kind, reply, said, delay) in enumerate(steps):
        at = NOW + 7 * number - delay
        if kind < 2:
            told.append(exchange(f"r{number}", at=at))
        elif kind < 5:
            about = f"r{max(0, number - 6 * reply)}"
            told.append(feedback(f"f{number if said else number // 3}", about, value=said % 2, at=at))
        else:
            told.append(retraction(f"f{max(0, number - reply)}", at=at))
    log, end = records(*told), NOW + 7 * len(told) + chance.choice([0, 50, 150])
    lived = State(folder / "lived.db", policy=POLICY, base=BASE, keep=keep)
    for number, record in enumerate(log):
        lived.absorb([record], NOW + 7 * number)
        if chance.random() < 0.5:
            lived.keep(NOW + 7 * number, grace_s=20)
            lived.give_up_waiting(NOW + 7 * number - 20, NOW + 7 * number)
    anew = State(folder / "anew.db", policy=POLICY, base=BASE, keep=keep)
    exchanges = [record for record in log if record.topic == EXCHANGES]
    anew.absorb([*exchanges, *(record for record in log if record.topic == FEEDBACK)], end)
    for state in (lived, anew):
        while state.keep(end, grace_s=20, most=3):
            pass
        state.give_up_waiting(end - 20, end)
    assert lived.digest() == anew.digest()
    assert [one.feedback_id for one in lived.judgements()] == [one.feedback_id for one in anew.judgements()]
    young = {
        event.id
        for event in told
        if not isinstance(event, Exchange) and event.type == "feedback" and event.at >= end - 100
    }
    assert ids(anew, "feedback", "id") == young
    lived.close()
    anew.close()
