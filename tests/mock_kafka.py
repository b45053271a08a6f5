"""librdkafka's mock cluster: brokers in this process that can be made to fail as real ones only do by accident.

confluent-kafka brings the library and no way to the mock's levers, so they are pulled through ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

PRODUCE, METADATA = 0, 3
"""Kinds of requests, by Kafka's protocol."""
NOT_LEADER, TOO_LARGE, NOT_AUTHORIZED, OUT_OF_ORDER, STORAGE_ERROR, UNKNOWN_PRODUCER = 6, 10, 29, 45, 56, 59
"""Error codes, by Kafka's protocol."""
API_VERSION = (2, 3)
"""What clients must be told: the mock answers old requests only."""


class MockCluster:
    """Three brokers, and the levers to make them fail."""

    def __init__(self, library: ctypes.CDLL, handle: int) -> None:
        self._library = library
        self._handle = ctypes.c_void_p(handle)
        self.bootstrap = library.rd_kafka_mock_cluster_bootstraps(self._handle).decode()

    def topic(self, name: str, partitions: int) -> None:
        self._call("rd_kafka_mock_topic_create", name.encode(), partitions, 1)

    def fail_next(self, request: int, *errors: int) -> None:
        """The next requests of this kind are answered with these errors, one each."""
        self._library.rd_kafka_mock_push_request_errors(
            self._handle, ctypes.c_int16(request), ctypes.c_size_t(len(errors)), *map(ctypes.c_int, errors)
        )

    def move_leader(self, topic: str, partition: int, broker: int) -> None:
        """-1: the partition has no leader."""
        self._call(
            "rd_kafka_mock_partition_set_leader", topic.encode(), ctypes.c_int32(partition), ctypes.c_int32(broker)
        )

    def slow_down(self, milliseconds: int) -> None:
        """Every answer takes so long."""
        for broker in (1, 2, 3):
            self._call("rd_kafka_mock_broker_set_rtt", ctypes.c_int32(broker), milliseconds)

    def down(self, broker: int) -> None:
        self._call("rd_kafka_mock_broker_set_down", ctypes.c_int32(broker))

    def up(self, broker: int) -> None:
        self._call("rd_kafka_mock_broker_set_up", ctypes.c_int32(broker))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(self._handle, *arguments)
        assert code == 0, f"{name} says {code}"


@contextlib.contextmanager
def mock_cluster() -> Iterator[MockCluster]:
    library = _library()
    library.rd_kafka_conf_new.restype = ctypes.c_void_p
    library.rd_kafka_new.restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_new.restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    error = ctypes.create_string_buffer(512)
    conf = ctypes.c_void_p(library.rd_kafka_conf_new())
    library.rd_kafka_conf_set(conf, b"log_level", b"0", error, ctypes.c_size_t(len(error)))
    owner = ctypes.c_void_p(library.rd_kafka_new(0, conf, error, ctypes.c_size_t(len(error))))
    assert owner, error.value
    handle = library.rd_kafka_mock_cluster_new(owner, 3)
    try:
        yield MockCluster(library, handle)
    finally:
        library.rd_kafka_mock_cluster_destroy(ctypes.c_void_p(handle))
        library.rd_kafka_destroy(owner)


def _library() -> ctypes.CDLL:
    import confluent_kafka  # loads what the library needs  # noqa: F401

    [path] = [file for file in distribution("confluent-kafka").files or () if file.name.startswith("librdkafka-")]
    return ctypes.CDLL(str(Path(path.locate())))
