"""What every log promises, whatever keeps it: SQLite, Kafka, Kafka behind an outbox, and a cluster that is only played."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from feedback.events import EXCHANGES, FEEDBACK, RELEASES
from feedback.log import Log, LogUnavailable, Offsets, Record
from feedback.outbox import Outbox
from feedback.sqlite_log import SqliteLog
from tests.kafka_logs import kafka_log, played_log

Open = Callable[[Collection[str]], Log]
"""Opens the log of the test, as a writer of these topics."""


@pytest.fixture(params=["sqlite", "kafka", "outbox", "played"])
def open_log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    opened: list[Log] = []

    def kept(log: Log) -> Log:
        opened.append(log)
        return log

    if request.param == "sqlite":
        yield lambda writes: kept(SqliteLog(tmp_path / "log", writes))
    elif request.param == "played":
        cluster = request.getfixturevalue("mock_kafka")
        yield lambda writes: kept(played_log(cluster, writes))
    else:
        broker = request.getfixturevalue("kafka")
        boxed = request.param == "outbox"
        yield lambda writes: kept(
            Outbox(kafka_log(broker, writes), tmp_path / "outbox", writes, 10**8)
            if boxed and writes
            else kafka_log(broker, writes)
        )
    for log in opened:
        log.close()


@pytest.fixture
def log(open_log: Open) -> Log:
    return open_log([EXCHANGES, FEEDBACK])


def read_all(log: Log, topic: str, count: int, after: Offsets | None = None, at_most: int = 1000) -> list[Record]:
    """Read on until so many records have come; a read may give less than there is."""
    records: list[Record] = []
    reached = dict(after or {})
    for _ in range(1000):
        if len(records) >= count:
            break
        new = log.read(topic, reached, at_most)
        reached |= {record.partition: record.offset for record in new}
        records += new
    assert len(records) == count
    return records


def of_key(records: Collection[Record], key: str) -> list[str]:
    return [record.event for record in records if record.key == key]


def test_what_was_appended_is_read_in_the_order_of_its_key_and_from_any_offset(log: Log) -> None:
    offsets = [log.append(FEEDBACK, "key", f'{{"n":{number}}}') for number in range(5)]
    assert offsets == [1, 2, 3, 4, 5]
    records = read_all(log, FEEDBACK, 5)
    partition = records[0].partition
    assert [(record.topic, record.partition, record.offset, record.key, record.event) for record in records] == [
        (FEEDBACK, partition, number + 1, "key", f'{{"n":{number}}}') for number in range(5)
    ]
    assert [record.offset for record in read_all(log, FEEDBACK, 2, {partition: 3})] == [4, 5]
    assert 1 <= len(log.read(FEEDBACK, {}, 2)) <= 2
    assert [record.offset for record in log.read(FEEDBACK, {partition: 1}, 1)] == [2]  # back again
    assert log.read(FEEDBACK, {partition: 5}, 10) == []
    assert log.read(FEEDBACK, {}, 0) == []
    assert log.end(FEEDBACK)[partition] == 5
    assert sum(log.end(FEEDBACK).values()) == 5


def test_topics_are_apart(log: Log) -> None:
    assert log.append(EXCHANGES, "a", "{}") == 1
    assert log.append(FEEDBACK, "a", "{}") == 1
    assert sum(log.end(EXCHANGES).values()) == sum(log.end(FEEDBACK).values()) == 1
    assert not log.end(EXCHANGES).keys() & log.end(FEEDBACK).keys()


def test_any_text_comes_back_as_it_was(log: Log) -> None:
    text = '{"text":"żółć 🙂 \\u0000 \x00 \u2028 \'; DROP TABLE records"}'
    log.append(FEEDBACK, "schlüssel", text)
    [record] = read_all(log, FEEDBACK, 1)
    assert (record.key, record.event) == ("schlüssel", text)


def test_a_large_event_comes_back_whole(log: Log) -> None:
    text = "".join(random.Random(0).choices("abcdefghij", k=3_000_000))
    log.append(FEEDBACK, "key", text)
    assert read_all(log, FEEDBACK, 1)[0].event == text


def test_a_log_opened_again_goes_on_where_it_was(open_log: Open) -> None:
    for number in range(3):
        log = open_log([FEEDBACK])
        assert log.append(FEEDBACK, "key", str(number)) == number + 1
        log.close()
        log.close()
    reader = open_log([])
    assert of_key(read_all(reader, FEEDBACK, 3), "key") == ["0", "1", "2"]


def test_nothing_is_read_before_anything_was_written_and_something_after(open_log: Open) -> None:
    reader = open_log([])
    assert reader.read(FEEDBACK, {}, 10) == []
    assert not any(reader.end(FEEDBACK).values())
    log = open_log([FEEDBACK])
    log.append(FEEDBACK, "key", "{}")
    assert sum(log.end(FEEDBACK).values()) == 1
    assert len(read_all(log, FEEDBACK, 1)) == 1


def test_many_threads_keep_their_own_order(log: Log) -> None:
    def talk(name: str) -> None:
        futures = [log.submit(FEEDBACK, name, str(number)) for number in range(200)]
        offsets = [future.result(timeout=30) for future in futures]
        assert offsets == sorted(offsets)

    threads = [threading.Thread(target=talk, args=(f"talker-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = read_all(log, FEEDBACK, 1600, at_most=10_000)
    for number in range(8):
        assert of_key(records, f"talker-{number}") == [str(said) for said in range(200)]


def test_every_partition_s_offsets_grow_without_gaps(log: Log) -> None:
    for future in [log.submit(FEEDBACK, f"key-{number}", "{}") for number in range(300)]:
        future.result(30)
    offsets: dict[str, list[int]] = defaultdict(list)
    for record in read_all(log, FEEDBACK, 300, at_most=77):
        offsets[record.partition].append(record.offset)
    assert offsets == {partition: list(range(1, end + 1)) for partition, end in log.end(FEEDBACK).items()}


def test_an_event_is_kept_though_nobody_waits_for_it_any_more(log: Log) -> None:
    handed_in = log.submit(FEEDBACK, "key", "{}")

    async def give_up() -> None:
        asyncio.wrap_future(handed_in).cancel()

    asyncio.run(give_up())
    assert not handed_in.cancelled()
    log.append(FEEDBACK, "key", "{}")
    assert sum(log.end(FEEDBACK).values()) == 2


def test_text_that_is_no_utf8_fails_its_own_caller_alone(log: Log) -> None:
    good = log.submit(FEEDBACK, "key", "{}")
    with pytest.raises(UnicodeEncodeError):
        log.submit(FEEDBACK, "key", "\ud800")
    assert good.result(10) == 1
    assert log.append(FEEDBACK, "key", "{}") == 2


def test_a_topic_that_is_not_ours_to_write_is_refused(log: Log) -> None:
    with pytest.raises(ValueError, match=r"not opened to write 'heed\.releases'"):
        log.append(RELEASES, "default", "{}")


def test_a_closed_log_takes_nothing_and_keeps_what_it_had(open_log: Open) -> None:
    log = open_log([FEEDBACK])
    futures = [log.submit(FEEDBACK, "key", "{}") for _ in range(500)]
    log.close()
    assert [future.result(0) for future in futures] == list(range(1, 501))
    with pytest.raises(LogUnavailable, match="closed"):
        log.append(FEEDBACK, "key", "{}")


def test_reading_while_writing_never_misses_or_repeats(log: Log) -> None:
    seen: list[Record] = []
    written = threading.Event()

    def follow() -> None:
        reached: dict[str, int] = {}
        while not written.is_set() or sum(log.end(FEEDBACK).values()) > len(seen):
            new = log.read(FEEDBACK, reached, random.randint(1, 50))
            reached |= {record.partition: record.offset for record in new}
            seen.extend(new)

    follower = threading.Thread(target=follow)
    follower.start()
    futures = [log.submit(FEEDBACK, f"key-{n % 7}", str(n) + "x" * random.randint(1, 5000)) for n in range(2000)]
    for future in futures:
        future.result(30)
    written.set()
    follower.join()
    assert sorted(int(record.event.rstrip("x")) for record in seen) == list(range(2000))
    for number in range(7):
        said = [int(record.event.rstrip("x")) for record in seen if record.key == f"key-{number}"]
        assert said == sorted(said)


def test_nothing_waits_while_the_log_is_there(log: Log) -> None:
    log.append(FEEDBACK, "key", "{}")
    assert log.waiting() == 0
