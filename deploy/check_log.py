"""What is kept: the log, what waits for it, Redis, and how far the learner has read."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

from deploy import known
from deploy.finding import Finding, Seen
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK, TOPICS, Exchange, parse_event
from feedback.log import Log, open_log
from feedback.sqlite_file import open_reading

CONNECT_S = 1.5
"""How long a host may take to be found and to accept a connection."""
MUCH = 1000
"""Events behind which a learner that is at work is worth a word."""


def log(seen: Seen) -> Iterator[Finding]:
    feedback = seen.config.serving.feedback
    brokers = feedback.kafka.kafka_bootstrap or ()
    silent = [broker for broker in brokers if not connects(*broker.rsplit(":", 1))]
    do = "Start it, or see HEED_KAFKA_BOOTSTRAP. Until it is there, events wait in the server's outbox."
    if brokers and len(silent) == len(brokers):
        yield Finding("log", "fail", f"no Kafka accepts connections at {', '.join(brokers)}", do)
        return
    if not brokers and not (feedback.data / "log").is_dir():
        seen.ends = {topic: {topic: 0} for topic in TOPICS}
        yield Finding("log", "ok", "nothing is there yet")
        return
    for broker in silent:
        yield Finding("log", "warn", f"{broker} does not accept connections; another broker does", do)
    with closing(open_log(feedback, writes=())) as opened:
        seen.ends = {topic: opened.end(topic) for topic in TOPICS}
        if brokers and not any(seen.ends.values()):
            do = "See its log, and HEED_KAFKA_* for how to log in. A server makes the topics when it first writes."
            yield Finding("log", "fail", f"the Kafka at {', '.join(brokers)} does not answer, or has no topics yet", do)
            return
        seen.newest = _newest(opened, seen.ends, feedback)
    counts = ", ".join(f"{sum(end.values()):,} {topic.removeprefix('heed.')}" for topic, end in seen.ends.items())
    yield Finding("log", "ok", f"{'Kafka' if brokers else 'embedded'}, readable: {counts}")


def connects(host: str, port: str) -> bool:
    """Whether somebody accepts connections there within CONNECT_S, the look-up of the name included."""

    def connect() -> None:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()

    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(connect).result(CONNECT_S)
    except (OSError, TimeoutError):
        return False
    finally:
        pool.shutdown(wait=False)  # a look-up cannot be cut short
    return True


def _newest(opened: Log, ends: Mapping[str, Mapping[str, int]], feedback: FeedbackConfig) -> Exchange | None:
    """Reads the last event of each partition; the newest exchange among them that a server of this policy gave."""
    spoken: list[Exchange] = []
    for topic, end in ends.items():
        for record in opened.read(topic, {partition: max(0, offset - 1) for partition, offset in end.items()}, 100):
            if topic == EXCHANGES:
                with suppress(ValueError):  # none of ours, or a newer Heed's: the learner counts these
                    event = parse_event(record.event)
                    if isinstance(event, Exchange) and event.live and event.policy == feedback.policy:
                        spoken.append(event)
    return max(spoken, key=lambda exchange: exchange.at, default=None)


def outbox(seen: Seen) -> Iterator[Finding]:
    """Events on this machine that Kafka has not taken."""
    feedback = seen.config.serving.feedback
    waiting = {topic: _count(feedback, topic) for topic in (EXCHANGES, FEEDBACK)}
    aside = sum(_count(feedback, f"{topic}.refused") for topic in waiting)
    if sum(waiting.values()):
        counts = ", ".join(f"{count:,} {topic.removeprefix('heed.')}" for topic, count in waiting.items())
        do = "Nothing is lost: they follow once Kafka is there and a server runs on this data folder."
        yield Finding("outbox", "warn", f"{counts} wait for Kafka", do)
        if not feedback.kafka.kafka_bootstrap:
            do = "Set HEED_KAFKA_BOOTSTRAP as it was: the embedded log does not get them."
            yield Finding("outbox", "fail", "they wait for a Kafka, and none is set", do)
    if aside:
        do = "Raise max.message.bytes of Heed's topics; the next start of the server tries them again."
        yield Finding("outbox", "warn", f"{aside:,} events were too large for Kafka and are set aside", do)


def _count(feedback: FeedbackConfig, topic: str) -> int:
    path = feedback.data / "outbox" / f"{topic}.db"
    if not path.exists():
        return 0
    try:
        with closing(open_reading(path)) as db:
            return int(db.execute("SELECT count(*) FROM records").fetchone()[0])
    except sqlite3.DatabaseError as error:
        raise OSError(f"{path} cannot be read: {error}") from error


def redis(seen: Seen) -> Iterator[Finding]:
    config = seen.config
    from feedback.redis_board import RedisBoard

    url, policy = config.serving.feedback.redis_url, config.serving.feedback.policy
    if url is None:
        return

    async def trouble() -> str | None:
        board = RedisBoard(url, policy)
        try:
            return await board.trouble()
        finally:
            await board.close()

    found = asyncio.run(trouble())
    if found is None:
        yield Finding("redis", "ok", "answers, and keeps what it is given")
        return
    do = "Start it, or see HEED_REDIS_URL. Until then all goes on, and servers share nothing."
    yield Finding("redis", "fail", found, do)


def reading(seen: Seen) -> Iterator[Finding]:
    """How far the learner has read, and whether that is this log at all."""
    config = seen.config
    if not known.state_path(config).exists():
        return
    with known.reading(config) as db:
        reached = dict(db.execute("SELECT partition, last FROM offsets"))
    if not seen.ends:
        return
    ends = [(partition, end) for topic in (EXCHANGES, FEEDBACK) for partition, end in seen.ends[topic].items()]
    if beyond := _beyond(ends, reached):
        do = "Put the right log back, or begin anew: heed learn --rebuild."
        yield Finding("reading", "fail", f"the learner knows {beyond}: the log was replaced, or is an older copy", do)
        return
    behind = sum(max(0, end - reached.get(partition, 0)) for partition, end in ends)
    if not behind:
        yield Finding("reading", "ok", "the learner has read all of the log")
    elif seen.learns:
        do = "It catches up; where this number grows, see the learner's log." if behind > MUCH else ""
        yield Finding("reading", "warn" if behind > MUCH else "ok", f"the learner is {behind:,} events behind", do)
    else:
        do = "Start a learner, which goes on where the last one ended."
        yield Finding("reading", "warn", f"{behind:,} events wait for a learner", do)


def _beyond(ends: Sequence[tuple[str, int]], reached: Mapping[str, int]) -> str | None:
    """Where the log ends before what was read of it."""
    for partition, end in ends:
        if end < reached.get(partition, 0):
            return f"{reached[partition]:,} events of {partition}, which ends at {end:,}"
    return None
