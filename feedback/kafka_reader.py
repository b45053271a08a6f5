"""Reading one topic from Kafka: by assigned partitions, from the offsets that the reader's own state holds."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from feedback.log import Offsets, Record

logger = logging.getLogger(__name__)

WAIT_MS = 1000
"""How long a read waits for records that are there, and an `end` for the broker."""
LOOK_UP_S = 60.0
"""Between two looks at which partitions there are."""
AWAY_S = 1.0
"""After the broker did not answer: how long it counts as away before it is asked again."""


class KafkaReader:
    """Reads one topic. Never raises for a broker that is away: then there is nothing to read."""

    def __init__(self, topic: str, client: dict[str, Any]) -> None:
        self._topic = topic
        self._client = client
        self._consumer: KafkaConsumer | None = None
        self._at: dict[str, int] = {}
        """Partition → the offset that the consumer goes on behind."""
        self._partitions: dict[str, TopicPartition] = {}
        """The topic's partitions by name, as they were when last looked up."""
        self._looked_up = 0.0
        self._away_until = 0.0
        self.away = False
        """Whether nobody answered when last asked."""
        self._lock = threading.Lock()

    def read(self, after: Offsets, max_events: int) -> list[Record]:
        """See feedback.log.Log.read."""
        if max_events <= 0:
            return []
        with self._lock:
            return self._asked(lambda consumer: self._read(consumer, after, max_events)) or []

    def end(self) -> Offsets:
        """See feedback.log.Log.end."""
        with self._lock:
            return self._asked(self._end) or {}

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _read(self, consumer: KafkaConsumer, after: Offsets, max_events: int) -> list[Record]:
        if not self._partitions:
            return []
        for name, partition in self._partitions.items():
            if self._at.get(name) != after.get(name, 0):
                consumer.seek(partition, after.get(name, 0))
                self._at[name] = after.get(name, 0)
        found = consumer.poll(timeout_ms=WAIT_MS, max_records=max_events)
        records = [self._record(one) for part in found.values() for one in part]
        self._at |= {record.partition: record.offset for record in records}
        return records

    def _end(self, consumer: KafkaConsumer) -> Offsets:
        names = {partition: name for name, partition in self._partitions.items()}
        if not names:
            return {}
        ends = consumer.end_offsets(list(names), timeout_ms=WAIT_MS)
        begins = consumer.beginning_offsets(list(names), timeout_ms=WAIT_MS)
        # a partition of which retention has left nothing has no end that a reader could come to
        return {names[partition]: end for partition, end in ends.items() if not 0 < end == begins[partition]}

    def _look_up(self, consumer: KafkaConsumer) -> None:
        """Have all the topic's partitions assigned to the consumer. They may become more."""
        if self._partitions and time.monotonic() - self._looked_up < LOOK_UP_S:
            return
        # the consumer's own way would wait for a broker for ever, and make a topic that is missing
        with contextlib.closing(KafkaAdminClient(**self._client)) as admin:
            [topic] = admin.describe_topics([self._topic])
        numbers = sorted(each["partition_index"] for each in topic["partitions"])
        self._partitions = {f"{self._topic}/{number}": TopicPartition(self._topic, number) for number in numbers}
        self._looked_up = time.monotonic()
        if consumer.assignment() != set(self._partitions.values()):
            consumer.assign(list(self._partitions.values()))
            self._at = {}

    def _record(self, one: Any) -> Record:
        """What another hand wrote may be anything; whoever parses it will say so."""
        key, event = ((text or b"").decode(errors="replace") for text in (one.key, one.value))
        return Record(self._topic, f"{self._topic}/{one.partition}", one.offset + 1, key, event)

    def _asked(self, question: Any) -> Any:
        """The answer; None where the broker gives none."""
        if time.monotonic() < self._away_until:
            return None
        try:
            consumer = self._opened()
            self._look_up(consumer)
            answer = question(consumer)
        except (KafkaError, OSError, ValueError) as error:
            self._drop()
            self._away_until = time.monotonic() + AWAY_S
            if not self.away:
                logger.warning("cannot read Kafka's topic %s (%s); trying again", self._topic, error)
            self.away = True
            return None
        self.away = False
        return answer

    def _opened(self) -> KafkaConsumer:
        if self._consumer is None:
            self._consumer = KafkaConsumer(
                **self._client,
                group_id=None,
                metrics_enabled=False,
                enable_auto_commit=False,
                auto_offset_reset="earliest",  # what its retention removed cannot be read any more
                fetch_max_wait_ms=100,
                allow_auto_create_topics=False,
            )
            self._at, self._partitions = {}, {}
        return self._consumer

    def _drop(self) -> None:
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=0)
            self._consumer = None
