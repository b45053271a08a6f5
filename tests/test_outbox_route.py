"""A server whose Kafka is away: replies go on, feedback is taken as long as there is room, and all of it follows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import Log
from feedback.outbox import Outbox
from tests.broker import Broker, free_port
from tests.kafka_logs import kafka_config, kafka_log
from tests.served import Served, config_for, served
from tests.test_log import read_all


def config(data: Path, model: Path, bootstrap: str, **settings: float):
    made = config_for(data, model)
    return made.model_copy(update={"feedback": kafka_config(bootstrap, data, kafka_deadline_s=0.3, **settings)})


@pytest.fixture
def alone(tmp_path: Path, model_folder: Path) -> Iterator[Served]:
    """A server with a megabyte of outbox and nobody where its Kafka should be."""
    with served(config(tmp_path / "data", model_folder, f"127.0.0.1:{free_port()}", outbox_mb=1)) as server:
        yield server


def comment(server: Served, reply_id: str, text: str = "fine"):
    return server.http.post("/v1/feedback", json={"kind": "comment", "reply_id": reply_id, "text": text})


def test_replies_and_feedback_go_on_without_kafka_and_what_waits_is_counted(alone: Served) -> None:
    reply = alone.chat()
    assert (reply.status_code, reply.json()["heed"]["kept"]) == (200, True)
    assert comment(alone, reply.json()["id"]).status_code == 202
    assert alone.metric("heed_outbox_events") == 2
    assert alone.metric("heed_exchanges_total", outcome="kept") == 1
    story = alone.http.get("/v1/feedback/" + comment(alone, reply.json()["id"]).json()["id"]).json()
    assert story["status"] == "accepted"


def test_a_full_outbox_refuses_feedback_and_keeps_no_exchange_and_replies_go_on(alone: Served) -> None:
    reply_id = alone.chat().json()["id"]
    answers = [comment(alone, reply_id, "x" * 90_000) for _ in range(14)]
    assert {answer.status_code for answer in answers[:10]} == {202}
    refused = answers[-1]
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "log_unavailable")
    assert "the outbox is full (1 MB, HEED_OUTBOX_MB)" in error["message"]
    assert alone.metric("heed_feedback_total", kind="comment", outcome="unavailable") >= 1

    def dropped() -> float:  # each topic has the room to itself
        alone.chat("y" * 150, n=16)
        return alone.metric("heed_exchanges_total", outcome="dropped")

    alone.until(lambda: dropped() > 0, seconds=60)
    last = alone.chat("y" * 150)
    assert (last.status_code, last.json()["heed"]["kept"]) == (200, False)
    assert comment(alone, last.json()["id"]).status_code == 409


def test_what_waited_is_in_kafka_once_it_is_there(kafka: Broker, tmp_path: Path, model_folder: Path) -> None:
    kafka.pause()
    try:
        with served(config(tmp_path / "data", model_folder, kafka.bootstrap)) as server:
            receipts = [comment(server, server.chat().json()["id"], f"{n}").json()["id"] for n in range(5)]
            assert server.metric("heed_outbox_events") == 10
    finally:
        kafka.resume()
    log: Log = Outbox(
        kafka_log(kafka, [EXCHANGES, FEEDBACK]), tmp_path / "data" / "outbox", [EXCHANGES, FEEDBACK], 10**6
    )
    Served.until(lambda: log.waiting() == 0, seconds=30)
    said = read_all(log, FEEDBACK, 5)
    assert sorted(record.event.partition('"id":"')[2][:43] for record in said) == sorted(receipts)
    log.close()
