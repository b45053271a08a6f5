"""Kafka as the log: topics as they should be, brokers that die, stall and refuse, and a producer that does not get on."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from feedback import kafka_writer
from feedback.events import EXCHANGES, FEEDBACK, RELEASES
from feedback.kafka_log import KafkaLog, client_settings
from feedback.kafka_topics import MAX_EVENT_BYTES
from feedback.log import EventTooLarge, LogUnavailable
from tests import mock_kafka as played
from tests.broker import Broker, broker, free_port, why_not
from tests.kafka_logs import PARTITIONS, kafka_config, kafka_log, played_log
from tests.mock_kafka import MockCluster
from tests.test_log import read_all

# kafka-python leaves a socket that was just being connected, as its client was closed, to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")

Opened = Callable[..., KafkaLog]


@pytest.fixture
def open_played(mock_kafka: MockCluster) -> Iterator[Opened]:
    """Logs over the played cluster, with a deadline of half a second."""
    opened: list[KafkaLog] = []

    def start(**settings: Any) -> KafkaLog:
        opened.append(played_log(mock_kafka, [EXCHANGES, FEEDBACK], **{"kafka_deadline_s": 0.5} | settings))
        return opened[-1]

    yield start
    for log in opened:
        log.close()
    gc.collect()  # here, where the mark above holds


@contextmanager
def took(at_least: float = 0.0, at_most: float = 60.0) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert at_least <= time.monotonic() - began <= at_most


def admin_of(one: Broker) -> closing[KafkaAdminClient]:
    return closing(KafkaAdminClient(bootstrap_servers=one.bootstrap))


def settings_of(one: Broker, topic: str) -> dict[str, str]:
    with admin_of(one) as admin:
        found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)], config_filter="all")
    return {name: setting["value"] for name, setting in found["topic"][topic].items()}


def partitions_of(one: Broker, topic: str) -> int:
    with admin_of(one) as admin:
        return len(admin.describe_topics([topic])[0]["partitions"])


# Topics


def test_missing_topics_are_made_to_keep_everything_and_of_releases_the_last(kafka: Broker) -> None:
    log = kafka_log(kafka, [EXCHANGES, FEEDBACK, RELEASES])
    log.append(RELEASES, "default", "{}")
    log.close()
    assert [partitions_of(kafka, topic) for topic in (EXCHANGES, FEEDBACK, RELEASES)] == [PARTITIONS, PARTITIONS, 1]
    for topic in (EXCHANGES, FEEDBACK):
        settings = settings_of(kafka, topic)
        assert (settings["retention.ms"], settings["retention.bytes"], settings["cleanup.policy"]) == (
            "-1",
            "-1",
            "delete",
        )
        assert settings["max.message.bytes"] == str(MAX_EVENT_BYTES)
    assert settings_of(kafka, RELEASES)["cleanup.policy"] == "compact"


def test_an_operator_s_retention_is_given_to_the_topics(kafka: Broker) -> None:
    log = kafka_log(kafka, [FEEDBACK], log_keep_days=2.5, log_keep_mb=900)
    log.append(FEEDBACK, "key", "{}")
    log.close()
    settings = settings_of(kafka, FEEDBACK)
    assert settings["retention.ms"] == str(216_000_000)
    assert settings["retention.bytes"] == str(900_000_000 // PARTITIONS)


def test_a_topic_that_exists_is_reported_where_it_differs_and_never_altered(
    kafka: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    made = {"num_partitions": 2, "replication_factor": 1, "configs": {"retention.ms": "3600000"}}
    with admin_of(kafka) as admin:
        admin.create_topics({FEEDBACK: made}, wait_for_metadata=True)
    before = settings_of(kafka, FEEDBACK)
    log = kafka_log(kafka, [FEEDBACK])
    log.append(FEEDBACK, "key", "{}")
    log.close()
    said = [record.getMessage() for record in caplog.records if record.name == "feedback.kafka_topics"]
    assert [line.partition("as they are: ")[2] for line in said] == [
        f"it has 2 partitions, not {PARTITIONS} (HEED_KAFKA_PARTITIONS)",
        f"max.message.bytes is {before['max.message.bytes']}, not {MAX_EVENT_BYTES}",
        "retention.ms is 3600000, not -1",
    ]
    assert settings_of(kafka, FEEDBACK) == before
    assert partitions_of(kafka, FEEDBACK) == 2


def test_a_topic_as_it_should_be_is_not_spoken_of(kafka: Broker, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        log = kafka_log(kafka, [FEEDBACK])
        log.append(FEEDBACK, "key", "{}")
        log.close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_servers_that_start_together_make_one_set_of_topics(kafka: Broker) -> None:
    logs = [kafka_log(kafka, [EXCHANGES, FEEDBACK]) for _ in range(4)]
    offsets = sorted(log.append(FEEDBACK, "key", "{}") for log in logs)
    for log in logs:
        log.close()
    assert offsets == [1, 2, 3, 4]


def test_an_event_that_the_topic_does_not_take_is_refused_alone(kafka: Broker) -> None:
    with admin_of(kafka) as admin:
        made = {"num_partitions": 1, "configs": {"max.message.bytes": "10000"}}
        admin.create_topics({FEEDBACK: made}, wait_for_metadata=True)
    log = kafka_log(kafka, [FEEDBACK])
    assert log.append(FEEDBACK, "key", "{}") == 1
    with pytest.raises(EventTooLarge, match=r"larger than Kafka's topic heed\.feedback takes \(10000\)"):
        log.append(FEEDBACK, "key", "x" * 10_000)
    assert log.append(FEEDBACK, "key", "{}") == 2
    log.close()


def test_what_another_hand_wrote_into_a_topic_is_read_without_harm(kafka: Broker) -> None:
    log = kafka_log(kafka, [FEEDBACK])
    log.append(FEEDBACK, "key", "{}")
    with closing(KafkaProducer(bootstrap_servers=kafka.bootstrap)) as other:
        for key, value in ((None, b"no key"), (b"\xff", b"\xfe"), (b"tombstone", None)):
            other.send(FEEDBACK, value, key, partition=0).get(10)
    records = read_all(log, FEEDBACK, 4)
    assert {(record.key, record.event) for record in records} == {
        ("key", "{}"), ("", "no key"), ("\ufffd", "\ufffd"), ("tombstone", "")
    }  # fmt: skip
    log.close()


def test_a_partition_that_retention_has_emptied_is_read_to_its_end(kafka: Broker) -> None:
    log = kafka_log(kafka, [FEEDBACK])
    kept = [log.append(FEEDBACK, f"key-{number}", "{}") for number in range(12)]
    assert len(kept) == 12
    partitions = [TopicPartition(FEEDBACK, number) for number in range(PARTITIONS)]
    emptied, shortened, _ = partitions
    with admin_of(kafka) as admin:
        admin.delete_records({emptied: -1, shortened: 1})
    ends = log.end(FEEDBACK)
    assert f"{FEEDBACK}/{emptied.partition}" not in ends
    reached: dict[str, int] = {}
    until(lambda: read_on(log, reached) == ends)
    log.close()


def read_on(log: KafkaLog, reached: dict[str, int]) -> dict[str, int]:
    reached |= {record.partition: record.offset for record in log.read(FEEDBACK, reached, 100)}
    return reached


# Brokers that die, stall, or are not there


def test_a_broker_that_is_killed_and_comes_back_has_lost_nothing(tmp_path: Path, session_broker: Broker) -> None:
    del session_broker  # asked for so that this test skips where no broker runs
    with broker(tmp_path / "broker") as one:
        log = kafka_log(one, [FEEDBACK], kafka_deadline_s=1.0)
        kept: list[str] = []
        done = threading.Event()

        def talk() -> None:
            number = 0
            while not done.is_set():
                try:
                    log.append(FEEDBACK, "key", str(number))
                    kept.append(str(number))
                except LogUnavailable:
                    time.sleep(0.1)
                number += 1

        talker = threading.Thread(target=talk)
        talker.start()
        for _ in range(2):
            time.sleep(1)
            one.kill()
            assert not any(log.end(FEEDBACK).values())
            assert log.read(FEEDBACK, {}, 10) == []
            one.start()
            before = len(kept)
            until(lambda before=before: len(kept) > before)  # type: ignore[misc]
        done.set()
        talker.join()
        until(lambda: any(log.end(FEEDBACK).values()))
        read = [record.event for record in read_all(log, FEEDBACK, sum(log.end(FEEDBACK).values()))]
        assert set(kept) <= set(read)
        numbers = [int(event) for event in dict.fromkeys(read)]
        assert numbers == sorted(numbers)
        log.close()


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it never became true"
        time.sleep(0.02)


def test_nothing_blocks_while_there_is_no_broker_at_all() -> None:
    with took(at_most=0.2):
        log = KafkaLog(kafka_config(f"127.0.0.1:{free_port()}", kafka_deadline_s=0.5), [FEEDBACK])
        waiting = [log.submit(FEEDBACK, "key", "{}") for _ in range(100)]
    with took(at_most=6):
        for future in waiting:
            assert isinstance(future.exception(), LogUnavailable)
    with took(at_most=3):
        assert log.read(FEEDBACK, {}, 10) == []
        assert log.end(FEEDBACK) == {}
        assert log.away()
    with took(at_most=0.05):  # it counts as away for a while
        assert log.end(FEEDBACK) == {}
    with took(at_most=6):
        log.close()


def test_nothing_blocks_while_a_broker_says_nothing(kafka: Broker) -> None:
    log = kafka_log(kafka, [FEEDBACK], kafka_deadline_s=0.5)
    log.append(FEEDBACK, "key", "{}")
    kafka.pause()
    try:
        with took(at_most=0.1):
            waiting = log.submit(FEEDBACK, "key", "{}")
        with took(at_most=2), pytest.raises(LogUnavailable, match=r"no acknowledgement within 0\.5 s"):
            waiting.result()
    finally:
        kafka.resume()
    until(lambda: appended(log))
    log.close()


def appended(log: KafkaLog, key: str = "key") -> bool:
    try:
        return log.append(FEEDBACK, key, "{}") > 0
    except LogUnavailable:
        return False


# A cluster that is made to fail


@pytest.mark.parametrize("error", [played.NOT_LEADER, played.STORAGE_ERROR])
def test_an_error_that_passes_is_not_heard_of(open_played: Opened, mock_kafka: MockCluster, error: int) -> None:
    log = open_played(kafka_deadline_s=5)
    assert log.append(FEEDBACK, "key", "{}") == 1
    mock_kafka.fail_next(played.PRODUCE, error, error)
    assert log.append(FEEDBACK, "key", "{}") == 2


@pytest.mark.parametrize("error", [played.NOT_AUTHORIZED, played.OUT_OF_ORDER, played.UNKNOWN_PRODUCER])
def test_a_producer_that_one_error_broke_is_replaced(open_played: Opened, mock_kafka: MockCluster, error: int) -> None:
    log = open_played()
    assert log.append(FEEDBACK, "key", "{}") == 1
    mock_kafka.fail_next(played.PRODUCE, error)
    with pytest.raises(LogUnavailable, match=r"\[Error \d+\]"):
        log.append(FEEDBACK, "key", "{}")
    assert [log.append(FEEDBACK, "key", "{}") for _ in range(3)] == [2, 3, 4]


def test_what_the_broker_calls_too_large_is_refused_as_such(open_played: Opened, mock_kafka: MockCluster) -> None:
    log = open_played()
    assert log.append(FEEDBACK, "key", "{}") == 1
    mock_kafka.fail_next(played.PRODUCE, played.TOO_LARGE)
    with pytest.raises(EventTooLarge):
        log.append(FEEDBACK, "key", "{}")
    until(lambda: appended(log))


def test_none_overtakes_one_that_failed(open_played: Opened, mock_kafka: MockCluster) -> None:
    log = open_played()
    log.append(FEEDBACK, "key", "first")
    mock_kafka.fail_next(played.PRODUCE, *[played.NOT_AUTHORIZED] * 3)
    futures = []
    for number in range(100):
        futures.append(log.submit(FEEDBACK, "key", str(number)))
        time.sleep(0.01)  # so that several requests are on their way
    kept = [number for number, future in enumerate(futures) if future.exception() is None]
    assert 0 < len(kept) < 100
    read = [int(record.event) for record in read_all(log, FEEDBACK, 1 + len(kept))[1:]]
    assert read == kept, "in the order in which they were handed in"


def test_a_partition_without_a_leader_fails_in_time_and_burns_nothing(
    open_played: Opened, mock_kafka: MockCluster
) -> None:
    log = open_played()
    log.append(FEEDBACK, "key", "{}")
    for partition in range(PARTITIONS):
        mock_kafka.move_leader(FEEDBACK, partition, -1)
    for _ in range(2):
        with took(at_most=3), pytest.raises(LogUnavailable, match="no acknowledgement"):
            log.append(FEEDBACK, "key", "{}")
    time.sleep(0.2)
    burnt = time.process_time()
    time.sleep(1)
    assert time.process_time() - burnt < 0.3
    for partition in range(PARTITIONS):
        mock_kafka.move_leader(FEEDBACK, partition, 2)
    until(lambda: appended(log))


def test_one_partition_without_a_leader_does_not_hold_up_the_others_at_first(
    open_played: Opened, mock_kafka: MockCluster
) -> None:
    log = open_played()
    keys = {read_key(log, f"key-{number}"): f"key-{number}" for number in range(20)}
    stuck, *others = keys
    mock_kafka.move_leader(FEEDBACK, int(stuck.rpartition("/")[2]), -1)
    began = time.monotonic()
    waiting = log.submit(FEEDBACK, keys[stuck], "{}")
    while time.monotonic() - began < 1.0:
        assert log.append(FEEDBACK, keys[others[0]], "{}") > 0
        time.sleep(0.05)
    assert not waiting.done()
    until(lambda: not appended(log, keys[others[0]]) or waiting.done(), 6)
    assert isinstance(waiting.exception(), LogUnavailable)


def read_key(log: KafkaLog, key: str) -> str:
    """The partition of a key."""
    before = log.end(FEEDBACK)
    log.append(FEEDBACK, key, "{}")
    [partition] = [part for part, end in log.end(FEEDBACK).items() if end > before[part]]
    return partition


def test_a_leader_that_moves_keeps_the_order(open_played: Opened, mock_kafka: MockCluster) -> None:
    log = open_played(kafka_deadline_s=5)
    futures = []
    for number in range(300):
        futures.append(log.submit(FEEDBACK, "key", str(number)))
        if number % 50 == 0:
            for partition in range(PARTITIONS):
                mock_kafka.move_leader(FEEDBACK, partition, 1 + number // 50 % 3)
        time.sleep(0.002)
    for future in futures:
        future.result(30)
    assert [int(record.event) for record in read_all(log, FEEDBACK, 300)] == list(range(300))


def test_a_cluster_too_slow_for_the_deadline_fails_and_recovers(open_played: Opened, mock_kafka: MockCluster) -> None:
    log = open_played()
    log.append(FEEDBACK, "key", "{}")
    mock_kafka.slow_down(2000)
    with took(at_least=0.4, at_most=3), pytest.raises(LogUnavailable, match="no acknowledgement"):
        log.append(FEEDBACK, "key", "{}")
    mock_kafka.slow_down(0)
    until(lambda: appended(log))


def test_a_producer_that_is_slow_to_make_is_not_given_up_at_once(
    open_played: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = kafka_writer.prepare_topics

    def slowly(*arguments: Any) -> dict[str, int]:
        time.sleep(0.7)  # more than the deadline
        return prepare(*arguments)

    monkeypatch.setattr(kafka_writer, "prepare_topics", slowly)
    log = open_played()
    assert [log.append(FEEDBACK, "key", "{}") for _ in range(3)] == [1, 2, 3]


def test_brokers_that_go_down_and_come_up_leave_no_threads_and_no_files(
    open_played: Opened, mock_kafka: MockCluster
) -> None:
    log = open_played(kafka_deadline_s=0.2)
    assert appended(log)

    def held() -> tuple[int, int]:
        gc.collect()  # kafka-python leaves sockets that were refused to the garbage collector
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    before = held()
    for _ in range(10):
        for number in (1, 2, 3):
            mock_kafka.down(number)
        with pytest.raises(LogUnavailable):
            log.append(FEEDBACK, "key", "{}")
        for number in (1, 2, 3):
            mock_kafka.up(number)
        until(lambda: appended(log))
    until(lambda: held()[0] <= before[0] + 2 and held()[1] <= before[1] + 12)


# Settings


def test_what_the_operator_says_of_sasl_and_ssl_reaches_every_client(tmp_path: Path) -> None:
    settings = client_settings(
        kafka_config(
            "one:9093,two:9093",
            kafka_security_protocol="SASL_SSL",
            kafka_sasl_mechanism="SCRAM-SHA-512",
            kafka_sasl_username="heed",
            kafka_sasl_password="s3cret",
            kafka_ssl_cafile=tmp_path / "ca.pem",
            kafka_ssl_certfile=tmp_path / "own.pem",
            kafka_ssl_keyfile=tmp_path / "own.key",
            kafka_ssl_password="k3y",
        ).kafka
    )
    assert (
        settings.items()
        >= {
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": "heed",
            "sasl_plain_password": "s3cret",
            "ssl_cafile": str(tmp_path / "ca.pem"),
            "ssl_certfile": str(tmp_path / "own.pem"),
            "ssl_keyfile": str(tmp_path / "own.key"),
            "ssl_password": "k3y",
        }.items()
    )
    assert settings["bootstrap_servers"] == ["one:9093", "two:9093"]


def test_a_broker_that_asks_for_a_password_is_given_it(tmp_path: Path) -> None:
    why = why_not()
    if why is not None:
        pytest.skip(why)
    with broker(tmp_path / "broker", users={"heed": "s3cret"}) as one:
        login = {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "PLAIN"}
        known = kafka_log(one, [FEEDBACK], **login, kafka_sasl_username="heed", kafka_sasl_password="s3cret")
        assert known.append(FEEDBACK, "key", "{}") == 1
        assert len(read_all(known, FEEDBACK, 1)) == 1
        known.close()
        stranger = kafka_log(one, [FEEDBACK], **login, kafka_sasl_username="heed", kafka_sasl_password="guessed")
        with pytest.raises(LogUnavailable, match=r"is the login right \(HEED_KAFKA_SASL_\*"):
            stranger.append(FEEDBACK, "key", "{}")
        assert stranger.read(FEEDBACK, {}, 10) == []
        stranger.close()
