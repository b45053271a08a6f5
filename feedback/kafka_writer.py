"""Writing to Kafka: one thread with a producer of its own, which it gives up and makes anew when it does not get on.

An idempotent producer may stay broken after one error that it does not retry, or wait for ever for a leader that the
metadata do not name. So its word is not relied on: when one event failed, or none was acknowledged by its deadline, all
that are on their way fail together, in their order, and the next event finds a new producer.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import MessageSizeTooLargeError, RecordListTooLargeError

from feedback.config import FeedbackConfig
from feedback.kafka_topics import MAX_EVENT_BYTES, prepare_topics
from feedback.log import EventTooLarge, LogUnavailable, Offset

logger = logging.getLogger(__name__)

LOOK_S = 0.1
"""Between two looks at whether what is on its way gets on."""
LINGER_MS = 2
BATCH_BYTES = 256 * 2**10
OVERHEAD = 200
"""Bytes that Kafka adds to an event at most."""
_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


class _Entry(NamedTuple):
    topic: str
    key: bytes
    event: bytes
    at: float
    """time.monotonic() when it was handed in."""
    kept: Future[Offset]


class KafkaWriter:
    """Hands events to Kafka. Nothing here blocks but `close`; the broker may be away at any time, at the start too."""

    def __init__(self, config: FeedbackConfig, topics: Collection[str], client: dict[str, Any]) -> None:
        """`client`: what every Kafka client is told (feedback.kafka_log.client_settings)."""
        self.topics = frozenset(topics)
        self._config = config
        self._client = client
        self._deadline_s = config.kafka.kafka_deadline_s
        self._limits: dict[str, int] = {}
        """Topic → bytes of the largest event it takes; known once the topics were looked at."""
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._flight: _Flight | None = None
        self._said = False
        self._thread = threading.Thread(target=self._run, name="heed-kafka-writer", daemon=True)
        self._thread.start()

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        """See feedback.log.Log; within about twice the deadline the future has an answer."""
        entry = _Entry(topic, key.encode(), event.encode(), time.monotonic(), Future())
        size, most = len(entry.event) + len(entry.key) + OVERHEAD, self._limits.get(topic, MAX_EVENT_BYTES)
        if size > most:
            raise EventTooLarge(f"an event of {size} bytes is larger than Kafka's topic {topic} takes ({most})")
        entry.kept.set_running_or_notify_cancel()  # from here on it cannot be cancelled: it will be kept
        with self._closing:
            if self._closed:
                raise LogUnavailable(f"the log is closed: the event for {topic} was not kept")
            self._queue.put(entry)
        return entry.kept

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._take_off()  # so that the topics are there for those who read, and the first event need not wait
        except Exception as error:
            self._say(error)
        more = True
        while more:
            batch, more = self._next_batch()
            if batch:
                self._send(batch)
            self._look()
        while self._flight is not None and self._flight.flying:
            time.sleep(0.005)
            self._look()
        if self._flight is not None:
            self._flight.retire(self._deadline_s)

    def _next_batch(self) -> tuple[list[_Entry], bool]:
        """Everything queued (waits a moment for the first), and whether more may follow."""
        batch: list[_Entry] = []
        try:
            entry = self._queue.get(timeout=LOOK_S if self._flight is not None and self._flight.flying else None)
            while entry is not None:
                batch.append(entry)
                entry = self._queue.get_nowait()
        except Empty:
            return batch, True
        return batch, False

    def _send(self, batch: list[_Entry]) -> None:
        try:
            flight = self._flight or self._take_off()
        except Exception as error:  # whatever it is, those who wait must hear of it
            for entry in batch:
                entry.kept.set_exception(_unavailable(error))
            self._say(error)
            return
        for entry in batch:
            flight.send(entry)

    def _take_off(self) -> _Flight:
        """A new producer, once the topics are as they should be. Raises what Kafka's clients raise."""
        if not self._limits:
            admin = KafkaAdminClient(**self._client)
            try:
                self._limits = prepare_topics(admin, self.topics, self._config)
            finally:
                admin.close()
        deadline_ms = round(self._deadline_s * 1000)
        self._flight = _Flight(
            KafkaProducer(
                **self._client,
                acks="all",
                enable_idempotence=True,
                compression_type="lz4",
                linger_ms=LINGER_MS,
                batch_size=BATCH_BYTES,
                max_request_size=MAX_EVENT_BYTES,
                metrics_enabled=False,
                max_block_ms=deadline_ms,
                delivery_timeout_ms=2 * deadline_ms,  # ours comes first
                allow_auto_create_topics=False,
            )
        )
        return self._flight

    def _look(self) -> None:
        """Give up a flight on which something failed, or which does not get on."""
        flight = self._flight
        if flight is None:
            return
        oldest = flight.oldest()
        late = oldest is not None and time.monotonic() - oldest.at > self._deadline_s
        if late and flight.failure is None:
            flight.failure = TimeoutError(f"no acknowledgement within {self._deadline_s:g} s")
        if flight.failure is None:
            if self._said and oldest is None:
                self._said = False
                logger.info("Kafka takes events again")
            return
        self._flight = None
        self._limits = {}  # the operator may have changed the topics: look again
        flight.give_up()
        self._say(flight.failure)
        threading.Thread(target=flight.retire, args=(2 * self._deadline_s,), name="heed-kafka-retire", daemon=True).start()

    def _say(self, error: BaseException) -> None:
        if not self._said:
            logger.warning("Kafka takes no events (%s): trying again with each that comes", error)
        self._said = True


class _Flight:
    """One producer, and what it has not acknowledged yet."""

    def __init__(self, producer: KafkaProducer) -> None:
        self._send: Callable[..., Any] = producer.send
        self._producer = producer
        self._sent = 0
        self.flying: dict[int, _Entry] = {}
        """In the order in which they were sent. Whoever pops an entry answers it: the producer's thread, or give_up."""
        self.failure: BaseException | None = None

    def send(self, entry: _Entry) -> None:
        number = self._sent = self._sent + 1
        self.flying[number] = entry
        if self.failure is not None:  # none of those behind a failed one may overtake it
            return
        try:
            sent = self._send(entry.topic, entry.event, entry.key)
        except Exception as error:
            self._failed(number, error)
            return
        sent.add_callback(partial(self._kept, number))
        sent.add_errback(partial(self._failed, number))

    def oldest(self) -> _Entry | None:
        flying = list(self.flying.values())  # a copy: the producer's thread takes entries out meanwhile
        return flying[0] if flying else None

    def give_up(self) -> None:
        """Tell everyone who waits that nobody knows."""
        assert self.failure is not None
        for number in list(self.flying):
            entry = self.flying.pop(number, None)
            if entry is not None:
                entry.kept.set_exception(_unavailable(self.failure))

    def retire(self, at_most_s: float) -> None:
        """End the producer's threads. It may wait for what it still holds, until that has expired."""
        with contextlib.suppress(Exception):  # whatever it has to say, nobody waits for it any more
            self._producer.close(at_most_s)
            return
        self._producer._sender.force_close()  # close() gives up before it comes to this
        self._producer._closed = True

    def _kept(self, number: int, metadata: Any) -> None:
        entry = self.flying.pop(number, None)
        if entry is not None:
            entry.kept.set_result(metadata.offset + 1)

    def _failed(self, number: int, error: BaseException) -> None:
        if isinstance(error, _TOO_LARGE):
            entry = self.flying.pop(number, None)
            if entry is not None:
                entry.kept.set_exception(EventTooLarge(f"Kafka's topic {entry.topic} does not take it: {error}"))
        self.failure = self.failure or error


def _unavailable(error: BaseException) -> LogUnavailable:
    failure = LogUnavailable(f"Kafka did not say that it was kept: {error}")
    failure.__cause__ = error
    return failure
