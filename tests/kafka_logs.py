"""Logs over a broker, real or played, as the tests want them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from feedback.config import FeedbackConfig, KafkaConfig
from feedback.kafka_log import KafkaLog
from tests.broker import Broker
from tests.mock_kafka import API_VERSION, MockCluster

PARTITIONS = 3


def kafka_config(bootstrap: str, data: Path = Path("unused"), **settings: Any) -> FeedbackConfig:
    own = {name: settings.pop(name) for name in list(settings) if not name.startswith("kafka_")}
    kafka = {"kafka_partitions": PARTITIONS, "kafka_deadline_s": 5.0, **settings}
    return FeedbackConfig(data=data, kafka=KafkaConfig(kafka_bootstrap=tuple(bootstrap.split(",")), **kafka), **own)


def kafka_log(broker: Broker, writes: Collection[str], **settings: Any) -> KafkaLog:
    return KafkaLog(kafka_config(broker.bootstrap, **settings), writes)


def played_log(cluster: MockCluster, writes: Collection[str], **settings: Any) -> KafkaLog:
    return KafkaLog(kafka_config(cluster.bootstrap, **settings), writes, api_version=API_VERSION)
