"""The server's memory stays flat, however many chats and ratings it has seen: the soak version sees 120,000 of them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploy.welcome import free_port
from feedback.config import FeedbackConfig
from tests.crowd import ANSWER_S, CHAT, FEEDBACK
from tests.house import Folder, House, quick_settings, until

if TYPE_CHECKING:
    from tests.broker import Broker
    from tests.valkey import Valkey

PEOPLE = 25
SAMPLES = 20
BOUND = 0.05
SAID: tuple[dict[str, Any], ...] = (
    {"kind": "thumb", "value": "up"},
    {"kind": "rating", "value": 4},
    {"kind": "comment", "text": "I like how it begins, and not how it ends."},
    {"kind": "correction", "text": "What it should have said is this."},
    {"kind": "signal", "name": "dwell", "value": 3.2},
)
"""What is said of each reply."""

Serve = Callable[..., tuple[int, int]]


@pytest.fixture
def serve(tmp_path: Path, model_folder: Path) -> Iterator[Serve]:
    """Start a server with these settings; returns its port and its process."""
    with ExitStack() as stack:

        def start(**settings: Any) -> tuple[int, int]:
            port = free_port("127.0.0.1")
            folder = Folder(FeedbackConfig(data=tmp_path / "data"), model_folder)
            house = House(tmp_path / "ends", **(quick_settings(folder, port) | settings))
            stack.callback(house.close)
            house.start("server")
            until(lambda: ready(port), "the server is there")
            return port, house.pids["server"]

        yield start


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("exchanges", [500, pytest.param(20_000, marks=pytest.mark.soak)])
def test_it_stays_flat_with_everything_in_one_folder(serve: Serve, exchanges: int):
    stays_flat(*serve(), exchanges)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_it_stays_flat_with_kafka_and_redis(serve: Serve, kafka: Broker, valkey: Valkey):
    stays_flat(*serve(kafka_bootstrap=kafka.bootstrap, redis_url=valkey.url), exchanges=20_000)


def stays_flat(port: int, pid: int, exchanges: int) -> None:
    """Have so many replies rated, and look at the server's memory meanwhile; the first quarter warms it up."""
    series = [resident(pid)]
    for _ in range(SAMPLES):
        talk(port, exchanges // SAMPLES)
        series.append(resident(pid))
    print("resident memory, MB:", " ".join(f"{size / 1e6:.1f}" for size in series))
    first, *later = series[SAMPLES // 4 :]
    assert all(abs(size / first - 1) <= BOUND for size in later)


def talk(port: int, exchanges: int) -> None:
    """Have so many replies made and each rated in every way, by several people at once."""
    failures: list[BaseException] = []
    people = [threading.Thread(target=person, args=(port, exchanges // PEOPLE, failures)) for _ in range(PEOPLE)]
    for one in people:
        one.start()
    for one in people:
        one.join()
    assert failures == []


def person(port: int, exchanges: int, failures: list[BaseException]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        for number in range(exchanges):
            message = {"role": "user", "content": f"{threading.get_ident()} says {number} at {time.time()}"}
            chat = {"model": "default", "max_tokens": 6, "messages": [message], "user": f"user-{time.time()}"}
            reply = post(connection, CHAT, chat, 200)
            for said in SAID:
                post(connection, FEEDBACK, {**said, "reply_id": reply["id"], "user": f"user-{time.time()}"}, 202)
    except BaseException as failure:
        failures.append(failure)
    finally:
        connection.close()


def post(connection: http.client.HTTPConnection, path: str, body: dict[str, Any], expected: int) -> dict[str, Any]:
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status == expected, text
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
