"""kill -9 at any time: every offset that was answered is in the log, once, and a reader who watched missed nothing."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from feedback.sqlite_log import SqliteLog

ROOT = Path(__file__).resolve().parent.parent
TOPIC = "heed.feedback"

WRITER = """
import sys
from concurrent.futures import Future
from pathlib import Path
from feedback.sqlite_log import SqliteLog

log = SqliteLog(Path(sys.argv[1]), ["heed.feedback"])
run, number = sys.argv[2], 0
while True:  # eight at a time, so that transactions hold one event or many
    futures = []
    for _ in range(8):
        event = f"{run}-{number}"
        futures.append((log.submit("heed.feedback", event, event + "x" * (number * 37 % 3000)), event))
        number += 1
    for future, event in futures:
        sys.stdout.write(f"{future.result()} {event}\\n")
        sys.stdout.flush()
"""

READER = """
import random, sys, time
from pathlib import Path
from feedback.sqlite_log import SqliteLog

log, after = SqliteLog(Path(sys.argv[1]), []), 0
while not Path(sys.argv[2]).exists() or sum(log.end("heed.feedback").values()) > after:
    if random.random() < 0.1:  # who opens a killed writer's file first recovers it
        log.close()
        time.sleep(random.random() * 0.05)
        log = SqliteLog(Path(sys.argv[1]), [])
    for record in log.read("heed.feedback", {"heed.feedback": after}, 100):
        assert record.offset == after + 1, (record.offset, after)
        assert record.event.startswith(record.key), record
        after = record.offset
        print(record.offset, record.key)
    time.sleep(0.002)
log.close()
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.soak)])
def test_what_was_answered_survives_kill_9(tmp_path: Path, kills: int) -> None:
    rng = random.Random(20)
    folder, stop = tmp_path / "log", tmp_path / "stop"
    seen_file = tmp_path / "seen"
    with seen_file.open("w") as out:
        command = [sys.executable, "-W", "error", "-c", READER, str(folder), str(stop)]
        reader = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True)
    answered: dict[int, str] = {}
    try:
        for run in range(kills):
            answered |= _write_until_killed(folder, run, rng.uniform(0.0, 0.4))
        kept = _taken_up(folder)
        stop.touch()
        _, errors = reader.communicate(timeout=60)
    finally:
        reader.kill()
        reader.communicate()
    assert reader.returncode == 0, errors
    assert len(answered) > kills
    assert list(kept) == list(range(1, len(kept) + 1))
    assert len(set(kept.values())) == len(kept)
    assert answered.items() <= kept.items()
    seen = dict(line.split() for line in seen_file.read_text().splitlines())
    assert {int(offset): key for offset, key in seen.items()} == kept


def _taken_up(folder: Path) -> dict[int, str]:
    """What the log holds (offset → key) once a new writer took up where the last one was killed."""
    log = SqliteLog(folder, [TOPIC])
    log.append(TOPIC, "after", "after")
    kept = {record.offset: record.key for record in log.read(TOPIC, {}, 10**9)}
    log.close()
    return kept


def _write_until_killed(folder: Path, run: int, after_s: float) -> dict[int, str]:
    """What a writer answered (offset → key) before it was killed, `after_s` seconds after its first answer."""
    writer = python(WRITER, folder, run)
    assert writer.stdout is not None
    first = writer.stdout.readline()
    time.sleep(after_s)
    writer.kill()
    rest, errors = writer.communicate()
    assert first, errors
    whole = (first + rest).rpartition("\n")[0].splitlines()  # the last line may have been cut off
    return {int(offset): key for offset, key in map(str.split, whole)}
