"""Heed's topics in Kafka: how they are made where they are missing, and what is said where they were made otherwise.

A topic that exists is never altered: its settings are its operator's, and what differs from ours is reported.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError, TopicAlreadyExistsError

from feedback.config import FeedbackConfig
from feedback.events import RELEASES

logger = logging.getLogger(__name__)

MAX_EVENT_BYTES = 16 * 2**20
"""The largest event that the topics are made for: an exchange of a hundred thousand tokens and their log-probs has 8 MB."""

DAY_MS = 86_400_000

Json = Mapping[str, Any]


def topic_settings(topic: str, config: FeedbackConfig) -> dict[str, str]:
    """The settings that a topic of ours is made with, as Kafka spells them.

    Exchanges and feedback are what a learner is rebuilt from: kept for ever, unless the operator says how long. Of the
    releases only the last of each policy matters.
    """
    settings = {"max.message.bytes": str(MAX_EVENT_BYTES)}
    if topic == RELEASES:
        return {**settings, "cleanup.policy": "compact"}
    settings |= {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
    if config.log_keep_days:
        settings["retention.ms"] = str(round(config.log_keep_days * DAY_MS))
    if config.log_keep_mb:  # of the whole topic; Kafka counts each partition by itself
        settings["retention.bytes"] = str(config.log_keep_mb * 1_000_000 // config.kafka.kafka_partitions)
    return settings


def prepare_topics(admin: KafkaAdminClient, topics: Collection[str], config: FeedbackConfig) -> dict[str, int]:
    """Make the topics that are missing, report those that are otherwise; topic → bytes of its largest event.

    A topic whose settings we may not see is missing from the answer.
    Raises kafka.errors.KafkaError.
    """
    there = {topic["name"]: topic for topic in admin.describe_topics(sorted(topics)) if not topic["error_code"]}
    for topic in sorted(topics - there.keys()):
        _make(admin, topic, config)
    found = _described(admin, topics)
    for topic in sorted(found.keys() & there.keys()):
        for difference in _differences(topic, there[topic], found[topic], config):
            logger.warning(
                "Kafka's topic %s was made with other settings, which stay as they are: %s", topic, difference
            )
    return {topic: int(settings["max.message.bytes"]["value"]) for topic, settings in found.items()}


def _described(admin: KafkaAdminClient, topics: Collection[str]) -> Mapping[str, Json]:
    """Topic → its settings; none where we may not look at them, which is no reason not to write."""
    wanted = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in sorted(topics)]
    try:
        described: Mapping[str, Json] = admin.describe_configs(wanted, config_filter="all")["topic"]
    except KafkaError as error:
        logger.warning("cannot compare the settings of Kafka's topics with ours: %s", error)
        return {}
    return described


def _make(admin: KafkaAdminClient, topic: str, config: FeedbackConfig) -> None:
    kafka = config.kafka
    partitions = 1 if topic == RELEASES else kafka.kafka_partitions
    made = {
        "num_partitions": partitions,
        "replication_factor": kafka.kafka_replication or -1,
        "configs": topic_settings(topic, config),
    }
    try:
        admin.create_topics({topic: made}, wait_for_metadata=True)
    except TopicAlreadyExistsError:  # another server was faster, with the same settings or its own
        return
    copies = kafka.kafka_replication or "the broker's default number of"
    logger.info("made Kafka's topic %s: %d partitions, %s copies", topic, partitions, copies)


def _differences(topic: str, there: Json, found: Json, config: FeedbackConfig) -> Iterator[str]:
    kafka, partitions = config.kafka, there["partitions"]
    if topic != RELEASES and len(partitions) != kafka.kafka_partitions:
        yield f"it has {len(partitions)} partitions, not {kafka.kafka_partitions} (HEED_KAFKA_PARTITIONS)"
    copies = min((len(partition["replica_nodes"]) for partition in partitions), default=0)
    if kafka.kafka_replication and copies != kafka.kafka_replication:
        yield f"it has {copies} copies, not {kafka.kafka_replication} (HEED_KAFKA_REPLICATION)"
    for name, value in topic_settings(topic, config).items():
        other = found[name]["value"]
        if other != value:
            yield f"{name} is {other}, not {value}"
