"""The log in Kafka, through kafka-python: what its writer and its readers have in common."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from concurrent.futures import Future
from typing import Any

from feedback.config import FeedbackConfig, KafkaConfig
from feedback.kafka_reader import KafkaReader
from feedback.kafka_writer import KafkaWriter
from feedback.log import Line, Offset, Offsets, Record

PROTOCOL = (2, 4)
"""The oldest Kafka that Heed speaks to, and the protocol it speaks to newer ones (4.x still does): without one named,
each client's constructor would wait for a broker to ask, and leave open sockets behind where none answers."""

BOOTSTRAP_MS = 1500
"""A client's first call waits so long for a broker."""


class KafkaLog:
    """Heed's topics in a Kafka cluster; an offset is Kafka's plus one. The cluster may be away at any time.

    An event that Kafka has not acknowledged within `kafka_deadline_s` fails with LogUnavailable, and may be there all
    the same: whoever hands it in again must be ready for two of it, as the learner is.
    """

    def __init__(self, config: FeedbackConfig, writes: Collection[str], **client: Any) -> None:
        """`client`: more settings for kafka-python's clients, e.g. an api_version. Returns at once, Kafka or not."""
        logging.getLogger("kafka").setLevel(
            logging.CRITICAL
        )  # many lines a second while a broker is away; we say it once
        self._client = client_settings(config.kafka) | client
        self._writer = KafkaWriter(config, writes, self._client) if writes else None
        self._readers: dict[str, KafkaReader] = {}
        self._lock = threading.Lock()

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        if self._writer is None:
            raise ValueError(f"this log was not opened to write {topic!r}: name it in `writes`")
        return self._writer.submit(topic, key, event)

    def line(self) -> Line:
        if self._writer is None:
            raise ValueError("this log was not opened to write anything: name the topics in `writes`")
        return self._writer.line()

    def append(self, topic: str, key: str, event: str) -> Offset:
        return self.submit(topic, key, event).result()

    def read(self, topic: str, after: Offsets, max_events: int) -> list[Record]:
        return self._reader(topic).read(after, max_events)

    def end(self, topic: str) -> Offsets:
        return self._reader(topic).end()

    def away(self) -> bool:
        with self._lock:
            return any(reader.away for reader in self._readers.values())

    def waiting(self) -> int:
        return 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        with self._lock:
            for reader in self._readers.values():
                reader.close()

    def _reader(self, topic: str) -> KafkaReader:
        with self._lock:
            if topic not in self._readers:
                self._readers[topic] = KafkaReader(topic, self._client)
            return self._readers[topic]


def client_settings(config: KafkaConfig) -> dict[str, Any]:
    """What every client of kafka-python is told: where the brokers are, who we are, how long to wait."""
    deadline_ms = round(config.kafka_deadline_s * 1000)
    settings: dict[str, Any] = {
        "bootstrap_servers": list(config.kafka_bootstrap or ()),
        "client_id": "heed",
        "api_version": PROTOCOL,
        "bootstrap_timeout_ms": BOOTSTRAP_MS,
        "request_timeout_ms": deadline_ms,
        "reconnect_backoff_max_ms": 1000,
        "metadata_max_age_ms": 30_000,
        "security_protocol": config.kafka_security_protocol,
    }
    passed = {
        "sasl_mechanism": config.kafka_sasl_mechanism,
        "sasl_plain_username": config.kafka_sasl_username,
        "sasl_plain_password": config.kafka_sasl_password,
        "ssl_cafile": config.kafka_ssl_cafile,
        "ssl_certfile": config.kafka_ssl_certfile,
        "ssl_keyfile": config.kafka_ssl_keyfile,
        "ssl_password": config.kafka_ssl_password,
    }
    return settings | {name: str(value) for name, value in passed.items() if value is not None}
