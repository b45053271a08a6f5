"""The embedded log: durable before it answers, one writer, readers that never write, and a disk that may fill up."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback import sqlite_topic
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK, RELEASES
from feedback.log import LogUnavailable, open_log
from feedback.sqlite_log import SqliteLog

ROOT = Path(__file__).resolve().parent.parent

WRITE_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from feedback.sqlite_log import SqliteLog
log = SqliteLog(Path(sys.argv[1]), ["heed.feedback"])
for number in range(5):
    print(log.append("heed.feedback", "key", str(number)), flush=True)
time.sleep(300)
"""


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteLog]:
    opened = SqliteLog(tmp_path / "log", [EXCHANGES, FEEDBACK])
    yield opened
    opened.close()


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has written five events to heed.feedback, and lives."""
    process = python(WRITE_UNTIL_KILLED, tmp_path / "log")
    assert process.stdout is not None
    assert [int(process.stdout.readline()) for _ in range(5)] == [1, 2, 3, 4, 5]
    yield process
    process.kill()
    process.communicate()


def test_a_log_survives_its_process_ending_normally(tmp_path: Path) -> None:
    for _ in range(3):
        log = SqliteLog(tmp_path / "log", [FEEDBACK])
        log.append(FEEDBACK, "key", "{}")
        log.close()
        log.close()
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["heed.feedback.db", "heed.feedback.lock"]
    reader = SqliteLog(tmp_path / "log", [])
    assert reader.end(FEEDBACK) == {FEEDBACK: 3}
    reader.close()


def test_open_log_lies_in_the_data_folder(tmp_path: Path) -> None:
    log = open_log(FeedbackConfig(data=tmp_path / "some" / "data"), writes=[RELEASES])
    log.append(RELEASES, "default", "{}")
    log.close()
    assert (tmp_path / "some" / "data" / "log" / "heed.releases.db").is_file()


def test_what_waits_is_written_in_one_transaction(log: SqliteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    first_is_in, go_on = threading.Event(), threading.Event()
    write = sqlite_topic.TopicFile.write

    def slow_write(file: sqlite_topic.TopicFile, entries: list[sqlite_topic.Entry]) -> list[int]:
        batches.append(len(entries))
        first_is_in.set()
        go_on.wait(10)
        return write(file, entries)

    monkeypatch.setattr(sqlite_topic.TopicFile, "write", slow_write)
    futures = [log.submit(FEEDBACK, "key", "0")]
    assert first_is_in.wait(10)
    futures += [log.submit(FEEDBACK, "key", str(number)) for number in range(1, 100)]
    go_on.set()
    assert [future.result(10) for future in futures] == list(range(1, 101))
    assert batches == [1, 99]


def test_every_transaction_is_synced(log: SqliteLog) -> None:
    assert log._writer is not None
    for file in log._writer._files.values():
        assert file._open().execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert file._open().execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.usefixtures("log")
def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable, match=rf"being written by another process \(pid {os.getpid()}\).*HEED_DATA"):
        SqliteLog(tmp_path / "log", [RELEASES, FEEDBACK])
    SqliteLog(tmp_path / "log", [RELEASES]).close()  # the refused one let go of the topic it could have had


def test_a_writer_in_another_process_is_refused_until_it_dies(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    with pytest.raises(LogUnavailable, match=rf"pid {writer.pid}"):
        SqliteLog(tmp_path / "log", [FEEDBACK])
    writer.kill()
    writer.wait()
    log = SqliteLog(tmp_path / "log", [FEEDBACK])
    assert log.append(FEEDBACK, "key", "{}") == 6
    log.close()


def test_nothing_is_read_before_anything_was_written_and_something_after(tmp_path: Path) -> None:
    reader = SqliteLog(tmp_path / "log", [])
    assert reader.read(FEEDBACK, {}, 10) == []
    assert reader.end(FEEDBACK) == {}
    assert not (tmp_path / "log").exists()
    log = SqliteLog(tmp_path / "log", [FEEDBACK])
    assert reader.read(FEEDBACK, {}, 10) == []
    log.append(FEEDBACK, "key", "{}")
    assert reader.end(FEEDBACK) == {FEEDBACK: 1}
    log.close()
    assert reader.end(FEEDBACK) == {FEEDBACK: 1}
    reader.close()


@pytest.mark.usefixtures("writer")
def test_a_reader_sees_another_process_s_events_at_once_and_writes_nothing(tmp_path: Path) -> None:
    file, wal = tmp_path / "log" / "heed.feedback.db", tmp_path / "log" / "heed.feedback.db-wal"
    before = file.read_bytes(), wal.read_bytes()
    reader = SqliteLog(tmp_path / "log", [])
    assert [record.event for record in reader.read(FEEDBACK, {}, 10)] == ["0", "1", "2", "3", "4"]
    reader.close()
    assert (file.read_bytes(), wal.read_bytes()) == before


@pytest.mark.parametrize("lost", [[], ["-shm"]])
def test_a_killed_writer_s_events_are_read_before_it_comes_back(
    tmp_path: Path, writer: subprocess.Popen[str], lost: list[str]
) -> None:
    writer.kill()
    writer.wait()
    for suffix in lost:
        (tmp_path / "log" / f"heed.feedback.db{suffix}").unlink()
    wal = tmp_path / "log" / "heed.feedback.db-wal"
    before = wal.read_bytes()
    reader = SqliteLog(tmp_path / "log", [])
    assert [record.offset for record in reader.read(FEEDBACK, {}, 10)] == [1, 2, 3, 4, 5]
    reader.close()  # a last one who could write would copy the WAL into the file now, and delete it
    assert wal.read_bytes() == before
    again = SqliteLog(tmp_path / "log", [FEEDBACK])
    assert again.append(FEEDBACK, "key", "5") == 6
    assert reader.end(FEEDBACK) == {FEEDBACK: 6}
    reader.close()
    again.close()


def test_a_reader_who_may_not_write_waits_for_the_writer_to_come_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    # without its -shm a WAL file opens for nobody who may not make one: "unable to open database file"
    code = """
import os, sys
from pathlib import Path
from feedback.sqlite_log import SqliteLog
reader = SqliteLog(Path(sys.argv[1]), [])
if os.geteuid() == 0:  # whom no folder's mode keeps from writing
    os.setgid(65534); os.setuid(65534)
for line in sys.stdin:
    print(sum(reader.end("heed.feedback").values()), flush=True)
"""
    folder = tmp_path_factory.mktemp("shared")
    for place in (folder, *folder.parents[:2]):
        place.chmod(0o755)
    log = SqliteLog(folder / "log", [FEEDBACK])
    log.append(FEEDBACK, "key", "{}")
    log.close()
    reader = python(code, folder / "log", stdin=subprocess.PIPE)
    assert reader.stdin is not None
    assert reader.stdout is not None

    def end() -> int:
        print(file=reader.stdin, flush=True)
        return int(reader.stdout.readline())

    (folder / "log").chmod(0o555)
    assert end() == 0
    assert end() == 0
    (folder / "log").chmod(0o755)
    log = SqliteLog(folder / "log", [FEEDBACK])
    assert end() == 1
    log.close()
    _, errors = reader.communicate()
    assert errors.count("trying again") == 1


def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    (tmp_path / "heed.feedback.db").write_bytes(b"not a database at all" * 1000)
    reader = SqliteLog(tmp_path, [])
    with pytest.raises(LogUnavailable, match=r"cannot read the log .*heed\.feedback\.db: file is not a database"):
        reader.read(FEEDBACK, {}, 1)
    with pytest.raises(LogUnavailable, match="file is not a database"):
        reader.end(FEEDBACK)
    reader.close()
    with pytest.raises(LogUnavailable, match="cannot open the log"):
        SqliteLog(tmp_path, [FEEDBACK])


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where the folder should be")
    with pytest.raises(LogUnavailable, match="cannot open the log"):
        SqliteLog(tmp_path / "log", [FEEDBACK])


def test_a_half_made_file_of_a_killed_process_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "heed.feedback.db.new").write_bytes(b"SQLite format 3\x00 and then the power went")
    log = SqliteLog(tmp_path, [FEEDBACK])
    assert log.append(FEEDBACK, "key", "{}") == 1
    log.close()


def test_a_full_disk_fails_its_batch_and_the_writer_lives_on(tmp_path: Path) -> None:
    code = """
import resource, sys
from concurrent.futures import wait
from pathlib import Path
from feedback.log import LogUnavailable
from feedback.sqlite_log import SqliteLog

log = SqliteLog(Path(sys.argv[1]), ["heed.feedback"])
kept = [log.append("heed.feedback", "small", "{}") for _ in range(3)]
largest = (Path(sys.argv[1]) / "heed.feedback.db-wal").stat().st_size + 20_000
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))  # from here on the disk is as good as full
futures = [log.submit("heed.feedback", "large", "x" * 50_000) for _ in range(20)]
wait(futures)
for future in futures:
    error = future.exception()
    assert isinstance(error, LogUnavailable), error
print(error)
assert log.end("heed.feedback") == {"heed.feedback": 3}
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
kept += [log.append("heed.feedback", "after", "x" * 50_000) for _ in range(3)]
assert kept == [1, 2, 3, 4, 5, 6], kept
assert [record.key for record in log.read("heed.feedback", {}, 100)] == ["small"] * 3 + ["after"] * 3
log.close()
"""
    process = python(code, tmp_path / "log")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "the event was not kept" in out
    db = sqlite3.connect(tmp_path / "log" / "heed.feedback.db")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("SELECT count(*) FROM records").fetchone() == (6,)
    db.close()


def test_whatever_goes_wrong_within_a_batch_fails_that_batch_alone(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = sqlite_topic._insert

    def refuse(db: sqlite3.Connection, entries: list[sqlite_topic.Entry]) -> list[int]:
        if any(entry.key == "cursed" for entry in entries):
            raise MemoryError("no room to think")
        return insert(db, entries)

    monkeypatch.setattr(sqlite_topic, "_insert", refuse)
    assert log.append(FEEDBACK, "key", "{}") == 1
    with pytest.raises(LogUnavailable, match="no room to think; the event was not kept"):
        log.append(FEEDBACK, "cursed", "{}")
    assert log.append(FEEDBACK, "key", "{}") == 2
    assert [record.key for record in log.read(FEEDBACK, {}, 10)] == ["key", "key"]


def test_another_who_holds_the_file_makes_it_wait_then_fail_then_live_on(
    log: SqliteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feedback.sqlite_file.BUSY_TIMEOUT_S", 0.05)
    log.append(FEEDBACK, "key", "{}")
    log.close()
    log = SqliteLog(tmp_path / "log", [FEEDBACK])
    intruder = sqlite3.connect(tmp_path / "log" / "heed.feedback.db", isolation_level=None)
    intruder.execute("BEGIN IMMEDIATE")
    with pytest.raises(LogUnavailable, match="database is locked"):
        log.append(FEEDBACK, "key", "{}")
    intruder.execute("ROLLBACK")
    intruder.close()
    assert log.append(FEEDBACK, "key", "{}") == 2
    log.close()
