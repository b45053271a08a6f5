"""Two servers and a learner on Kafka, Redis and one adapter root, behind nginx as Heed recommends it.

While a crowd chats and rates, each server is restarted, and nobody notices; a version that the learner releases speaks on
both within two seconds. Of a server that is killed only the streams that it had begun are lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from feedback.config import FeedbackConfig, KafkaConfig
from feedback.events import EXCHANGES, Exchange, parse_event
from feedback.log import open_log
from serving.adapters import AdapterStore
from tests import bases, nginx
from tests.broker import Broker, free_ports
from tests.crowd import CHAT, Crowd, counts_each_once
from tests.house import Folder, House, quick_settings, until
from tests.valkey import Valkey

SERVERS = ("server", "second")
SECRET = "shared by both servers"
DRAIN_S = 3.0
SWITCH_S = 2.0
NOTICED_S = 2.0
"""Until nginx, which counts in whole seconds, asks a server again that it had found away; less than DRAIN_S."""
PEOPLE = 8
EVERY_S = 0.25


@dataclass
class Pair:
    """Two servers, a learner, and nginx in front."""

    house: House
    folder: Folder
    proxy: nginx.Nginx
    urls: dict[str, str]
    """Of each server itself."""
    store: AdapterStore

    def ask(self, name: str, path: str) -> httpx.Response:
        return httpx.get(self.urls[name] + path, timeout=10)

    def is_ready(self, name: str) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.ask(name, "/ready").status_code == 200
        return False

    def chat(self, url: str, **more: Any) -> httpx.Response:
        body = {"model": "default", "messages": [{"role": "user", "content": "who?"}], "max_tokens": 4, "store": False}
        return httpx.post(url + CHAT, json=body | more, timeout=60)

    def start(self, *names: str) -> None:
        """Start servers, and wait until they are ready."""
        self.house.start(*names)
        for name in names:
            until(lambda name=name: self.is_ready(name), f"{name} is ready")  # type: ignore[misc]


@pytest.fixture
def pair(tmp_path: Path, model_folder: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    if (why := nginx.why_not()) is not None:
        pytest.skip(why)
    kafka: Broker = request.getfixturevalue("kafka")
    valkey: Valkey = request.getfixturevalue("valkey")
    ports = free_ports(2)
    shared = {"kafka_bootstrap": kafka.bootstrap, "redis_url": valkey.url, "secret": SECRET}
    shared |= {"adapters": str(tmp_path / "adapters"), "drain_delay_s": DRAIN_S, "update_min_feedback": 100}
    config = FeedbackConfig(
        data=tmp_path / "data",
        kafka=KafkaConfig(kafka_bootstrap=(kafka.bootstrap,)),
        redis_url=valkey.url,
        secret=SECRET,
    )
    folder = Folder(config, model_folder)
    second = {"data": str(tmp_path / "second"), "port": ports[1]}
    with contextlib.ExitStack() as stack:
        settings = quick_settings(folder, ports[0]) | shared
        house = stack.enter_context(contextlib.closing(House(tmp_path / "ends", second, **settings)))
        proxy = stack.enter_context(nginx.nginx(tmp_path / "nginx", ports))
        house.url = proxy.url
        urls = {name: f"http://127.0.0.1:{port}" for name, port in zip(SERVERS, ports, strict=True)}
        pair = Pair(house, folder, proxy, urls, AdapterStore(tmp_path / "adapters", "default"))
        house.start("learner")
        pair.start(*SERVERS)
        yield pair


def test_a_rolling_restart_fails_no_request_and_kill_9_only_streams_that_had_begun(pair: Pair):
    """People's feedback has no id: sent on twice by whomever, it must count once all the same."""
    with Crowd(pair.house, PEOPLE, every_s=EVERY_S, ids=False) as crowd:
        talks_on(crowd)
        assert comes_in_pieces(pair)
        print(f"both speak the new version after {switch_s(pair):.2f} s")
        for name in SERVERS:
            drains(pair, name)
            pair.start(name)
            talks_on(crowd)
        print(f"both speak the new version after {switch_s(pair):.2f} s")
        print(f"restarted: {crowd}; asked of a second server: {pair.proxy.asked_again()}")
        assert (crowd.outages, crowd.refusals, crowd.oddities) == (0, {}, []), pair.proxy.troubles()

        for name in SERVERS:
            time.sleep(NOTICED_S)
            pair.house.end(signal.SIGKILL, name)
            talks_on(crowd)
            pair.start(name)
    print(f"and killed: {crowd}; asked of a second server: {pair.proxy.asked_again()}")
    assert (crowd.refusals, crowd.oddities) == ({}, []), pair.proxy.troubles()
    assert crowd.outages == crowd.cut_streams <= PEOPLE
    counts(pair, crowd)
    each_is_one_versions(pair)


def talks_on(crowd: Crowd) -> None:
    before = len(crowd.promised)
    until(lambda: len(crowd.promised) > before + 2 * PEOPLE, "the crowd is talking")


def comes_in_pieces(pair: Pair) -> bool:
    """Whether a stream comes through nginx as it is made."""
    body = {"model": "default", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 60}
    with httpx.stream("POST", pair.proxy.url + CHAT, json=body | {"heed": {"ignore_eos": True}}) as answer:
        return len(list(answer.iter_raw())) > 5


def drains(pair: Pair, name: str) -> None:
    """Told to stop, a server is not ready, but serves on; then it ends well."""
    os.kill(pair.house.pids[name], signal.SIGTERM)
    until(lambda: pair.ask(name, "/ready").status_code == 503, f"{name} drains", DRAIN_S / 2)
    late = pair.chat(pair.urls[name])
    assert (late.status_code, late.headers["connection"]) == (200, "close")
    assert pair.house.end(signal.SIGTERM, name) == {name: 0}


def switch_s(pair: Pair) -> float:
    """Seconds from a change of the release to the moment from which both servers speak the new version."""
    before = pair.store.release().current
    until(lambda: pair.store.release().current > before, "the learner released a version")
    change = pair.store.release().changes[-1]
    for name in SERVERS:
        until(lambda name=name: spoken(pair, name) >= change.current, f"{name} speaks it", SWITCH_S)  # type: ignore[misc]
    took = time.time() - change.at
    assert took < SWITCH_S
    return took


def spoken(pair: Pair, name: str) -> int:
    """The version that a server answers a chat with."""
    return int(pair.chat(pair.urls[name]).json()["model"].removeprefix("default@v"))


def counts(pair: Pair, crowd: Crowd) -> None:
    crowd.until_everyone_was_heard(last=2 * PEOPLE)
    names = (*SERVERS, "learner")
    assert pair.house.end(signal.SIGTERM, *names) == dict.fromkeys(names, 0)
    with contextlib.closing(pair.folder.state()) as state:
        pair.folder.catch_up(state)  # with what the servers brought to the log after the learner had ended
        counts_each_once(crowd, state)


def each_is_one_versions(pair: Pair) -> None:
    """The first and last replies of each version have the log-probs of a full forward of that version."""
    with contextlib.closing(open_log(pair.folder.config, writes=())) as log:
        events = [parse_event(record.event) for record in log.read(EXCHANGES, {}, 100_000)]
    kept = sorted((event for event in events if isinstance(event, Exchange)), key=lambda event: event.at)
    versions = {event.version for event in kept} & {0, *pair.store.versions()}
    assert len(versions) > 2
    for version in versions:
        model = AutoModelForCausalLM.from_pretrained(pair.folder.model, dtype=torch.float32)
        if version:
            model = bases.with_peft(model, pair.store.load(version, pair.folder.base))
        contents = [event.content for event in kept if event.version == version]
        for one in contents[:4] + contents[-4:]:
            expected_T = bases.logprobs_of(model, one.prompt_ids, one.reply_ids)
            assert one.raw_logprobs == pytest.approx(expected_T.tolist(), abs=1e-4)
