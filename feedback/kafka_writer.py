"""Writing to Kafka: one thread with a producer of its own, which it gives up and makes anew when it does not get on.

An idempotent producer may stay broken after one error that it does not retry, or wait for ever for a leader that the
metadata do not name. So its word is not relied on: when one event failed, or none was acknowledged by its deadline, it
is stopped, all that are on their way fail together, in their order, and the next event finds a new producer.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple
from zlib import crc32

from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError
from kafka.partitioner import Partitioner

from feedback.config import FeedbackConfig
from feedback.kafka_topics import MAX_EVENT_BYTES, prepare_topics
from feedback.log import EventTooLarge, Line, LogUnavailable, Offset

logger = logging.getLogger(__name__)

LOOK_S = 0.1
"""Between two looks at whether what is on its way gets on."""
GATHER_S = 0.006
CROWD = 4
"""Where more than a few came together, the next are let gather: a batch costs kafka-python more than an event in it."""
GREAT_CROWD = 200
"""So many need not wait for more."""
LINGER_MS = 0
"""They have gathered here: to let kafka-python wait as well only leaves the processor idle."""
REQUESTS = 1
"""On their way at a time: what comes meanwhile makes a larger batch of the next."""
BATCH_BYTES = 256 * 2**10
PATIENCE = 4
"""Deadlines that an event may wait while others get on."""
OVERHEAD = 200
"""Bytes that Kafka adds to an event at most."""
_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


class _ByChecksum(Partitioner):  # type: ignore[misc]  # kafka-python has no types
    """Keys to partitions by CRC-32, as librdkafka's clients do: kafka-python's own hash is computed byte by byte in Python."""

    def partition(
        self, topic: str, _key: Any, serialized_key: bytes, _value: Any, _serialized_value: Any, cluster: Any
    ) -> int:
        return crc32(serialized_key) % len(cluster.partitions_for_topic(topic))


class _Entry(Future[Offset]):
    """One event on its way. Whoever takes it out of `flying` answers it: the producer's thread, or give_up."""

    def __init__(self, topic: str, key: bytes, event: bytes, epoch: int | None) -> None:
        super().__init__()
        self.epoch = epoch
        """That of the line on which it was handed in, if any."""
        self.topic = topic
        self.key = key
        self.event = event
        self.at = time.monotonic()
        self.flight: _Flight | None = None

    def cancel(self) -> bool:
        return False  # it will be kept

    def success(self, metadata: Any) -> None:
        """Called by kafka-python, in its thread."""
        assert self.flight is not None
        self.flight.heard, self.flight.acknowledged = time.monotonic(), True
        if self.flight.flying.pop(self, False) is None:
            self.set_result(metadata.offset + 1)

    def failure(self, error: BaseException) -> None:
        """Called by kafka-python, in its thread."""
        assert self.flight is not None
        if isinstance(error, _TOO_LARGE) and self.flight.flying.pop(self, False) is None:
            self.set_exception(EventTooLarge(f"Kafka's topic {self.topic} does not take it: {error}"))
        self.flight.fail(error)


class KafkaWriter:
    """Hands events to Kafka. Nothing here blocks but `close`; the broker may be away at any time, at the start too."""

    def __init__(self, config: FeedbackConfig, topics: Collection[str], client: dict[str, Any]) -> None:
        """`client`: what every Kafka client is told (feedback.kafka_log.client_settings)."""
        self.topics = frozenset(topics)
        self._config = config
        self._client = client
        self._deadline_s = config.kafka.kafka_deadline_s
        self._limits: dict[str, int] | None = None
        """Topic → bytes of the largest event it takes; None: the topics are to be looked at."""
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._flight: _Flight | None = None
        self._epoch = 0
        """Grows with each failure, before anyone is told of it."""
        self._said = False
        self._crowded = False
        self._thread = threading.Thread(target=self._run, name="heed-kafka-writer", daemon=True)
        self._thread.start()

    def line(self) -> Line:
        """See feedback.log.Log.line: lines opened before a failure have an epoch that is over."""
        return _Line(self, self._epoch)

    def submit(self, topic: str, key: str, event: str, epoch: int | None = None) -> Future[Offset]:
        """See feedback.log.Line; within about twice the deadline the future has an answer."""
        if topic not in self.topics:
            raise ValueError(f"this log was not opened to write {topic!r}: name it in `writes`")
        entry = _Entry(topic, key.encode(), event.encode(), epoch)
        size, most = len(entry.event) + len(entry.key) + OVERHEAD, (self._limits or {}).get(topic, MAX_EVENT_BYTES)
        if size > most:
            raise EventTooLarge(f"an event of {size} bytes is larger than Kafka's topic {topic} takes ({most})")
        with self._closing:
            if self._closed:
                raise LogUnavailable(f"the log is closed: the event for {topic} was not kept")
            self._queue.put(entry)
        return entry

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
            self._say(self._why(error))
        more = True
        while more:
            batch, more = self._next_batch()
            self._crowded = CROWD < len(batch) < GREAT_CROWD
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
            if self._crowded:
                time.sleep(GATHER_S)
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
            why = self._why(error)
            self._epoch += 1
            for entry in batch:
                entry.set_exception(_unavailable(why, error))
            self._say(why)
            return
        for entry in batch:
            if entry.epoch is None or entry.epoch == self._epoch:
                flight.send(entry)
            else:
                entry.set_exception(LogUnavailable("an event before it on the same line was not kept"))

    def _take_off(self) -> _Flight:
        """A new producer, once the topics are as they should be. Raises what Kafka's clients raise."""
        if self._limits is None:
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
                max_in_flight_requests_per_connection=REQUESTS,
                partitioner=_ByChecksum(),
                batch_size=BATCH_BYTES,
                max_request_size=MAX_EVENT_BYTES,
                metrics_enabled=False,
                max_block_ms=deadline_ms,
                delivery_timeout_ms=(PATIENCE + 1) * deadline_ms,  # ours comes first
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
        if oldest is not None and flight.failure is None and self._late(oldest, flight):
            flight.fail(TimeoutError(f"no acknowledgement within {self._deadline_s:g} s"))
        if flight.failure is None:
            if self._said and flight.acknowledged:
                self._said = False
                logger.info("Kafka takes events again")
            return
        self._flight = None
        self._epoch += 1
        if isinstance(flight.failure, KafkaError):
            self._limits = None  # the operator may have changed the topics: look again
        flight.give_up()
        self._say(self._why(flight.failure))

    def _late(self, oldest: _Entry, flight: _Flight) -> bool:
        """Whether nothing gets on; or something does, while the oldest waits and waits, say for a leader."""
        now = time.monotonic()
        waits_s = now - oldest.at
        stands = now - flight.heard > self._deadline_s
        return waits_s > self._deadline_s and (stands or waits_s > PATIENCE * self._deadline_s)

    def _why(self, error: BaseException) -> str:
        """What is wrong, and what may be behind it: a broker that refuses a login only hangs up."""
        login = self._config.kafka.kafka_security_protocol != "PLAINTEXT"
        return f"{error}; is the login right (HEED_KAFKA_SASL_*, HEED_KAFKA_SSL_*)?" if login else str(error)

    def _say(self, why: str) -> None:
        if not self._said:
            logger.warning("Kafka takes no events (%s): trying again with each that comes", why)
        self._said = True


class _Line(NamedTuple):
    writer: KafkaWriter
    epoch: int

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        return self.writer.submit(topic, key, event, self.epoch)


class _Flight:
    """One producer, and what it has not acknowledged yet."""

    def __init__(self, producer: KafkaProducer) -> None:
        self._send: Callable[..., Any] = producer.send
        self._producer = producer
        self.flying: dict[_Entry, None] = {}
        """In the order in which they were sent."""
        self.heard = time.monotonic()
        """When an event was last acknowledged, or this began (time.monotonic())."""
        self.acknowledged = False
        self.failure: BaseException | None = None

    def send(self, entry: _Entry) -> None:
        entry.flight = self
        self.flying[entry] = None
        if self.failure is not None:  # none of those behind a failed one may overtake it
            return
        try:
            sent = self._send(entry.topic, entry.event, entry.key)
        except Exception as error:
            entry.failure(error)
            return
        sent.chain(entry)

    def oldest(self) -> _Entry | None:
        try:
            return next(iter(self.flying), None)
        except RuntimeError:  # the producer's thread took one out at this moment: they get on
            return None

    def give_up(self) -> None:
        """Tell everyone who waits that nobody knows, and let go of the producer."""
        assert self.failure is not None
        for entry in list(self.flying):
            if self.flying.pop(entry, False) is None:
                entry.set_exception(_unavailable(str(self.failure), self.failure))
        self.retire(0)
        self._producer._closed = True  # it has been stopped; close() gives up while it waits for what is lost

    def fail(self, error: BaseException) -> None:
        """Nothing more is to leave: what comes behind a lost event must not overtake it. Any thread may call this."""
        if self.failure is None:
            self.failure = error
            # what close(0) comes to, once it need not wait for what is lost; else it would look for a leader without a pause
            self._producer._sender.force_close()

    def retire(self, at_most_s: float) -> None:
        """Close the producer; whether it has kept everything by then, nobody asks any more."""
        with contextlib.suppress(Exception):  # whatever it is, the thread that writes goes on
            self._producer.close(at_most_s)


def _unavailable(why: str, error: BaseException) -> LogUnavailable:
    failure = LogUnavailable(f"Kafka did not say that it was kept: {why}")
    failure.__cause__ = error
    return failure
