"""Two places for a house to stand, and all that can go wrong with what it stands on."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deploy.welcome import free_port
from feedback.config import FeedbackConfig, KafkaConfig
from tests.broker import Broker
from tests.disk import Disk, NoDisk
from tests.house import Folder, House, quick_settings
from tests.relay import Relay
from tests.valkey import Valkey


@dataclass(frozen=True)
class Fault:
    """One way for one victim to fail, and how that ends."""

    victim: str
    name: str
    begin: Callable[[], object]
    end: Callable[[], object]


@dataclass
class World:
    """A house, and its faults in the order in which they end."""

    folder: Folder
    house: House
    faults: list[Fault]
    disk: Disk | None = None

    def rounds(self, chance: random.Random) -> Iterator[list[Fault]]:
        """Every fault once, in a random order, alone or together with another victim's."""
        left = chance.sample(self.faults, len(self.faults))
        while left:
            group = [left.pop()]
            others = [fault for fault in left if fault.victim != group[0].victim]
            if others and chance.random() < 0.4:
                group.append(others[-1])
                left.remove(others[-1])
            yield sorted(group, key=self.faults.index)


@contextlib.contextmanager
def kafka_and_redis(tmp_path: Path, model: Path) -> Iterator[World]:
    """Kafka and Redis, each behind a network that can be cut."""
    with contextlib.ExitStack() as stack:
        to_broker, to_redis = (stack.enter_context(contextlib.closing(Relay())) for _ in range(2))
        (tmp_path / "redis").mkdir()
        kafka, redis = Broker(tmp_path / "broker", advertised=to_broker.port), Valkey(tmp_path / "redis")
        to_broker.behind, to_redis.behind = kafka.port, redis.port
        for service in (kafka, redis):
            stack.callback(service.kill)
            service.start()
        config = FeedbackConfig(
            data=tmp_path / "data",
            kafka=KafkaConfig(kafka_bootstrap=(kafka.bootstrap,), kafka_partitions=3),
            redis_url=f"redis://127.0.0.1:{to_redis.port}/0",
        )
        own = {"kafka_bootstrap": kafka.bootstrap, "kafka_partitions": 3, "redis_url": config.redis_url}
        with _house(tmp_path, Folder(config, model), own) as (folder, house):
            faults = [
                *_cuts("network to the broker", to_broker),
                *_cuts("network to Redis", to_redis),
                _killed(house, "server"),
                _killed(house, "learner"),
                Fault("Redis", "Redis killed, and empty again", redis.kill, redis.start),
                Fault("broker", "broker killed", kafka.kill, kafka.start),
            ]
            yield World(folder, house, faults)


@contextlib.contextmanager
def embedded(tmp_path: Path, model: Path) -> Iterator[World]:
    """Everything in one data folder, on a small disk where one may be mounted here."""
    with contextlib.ExitStack() as stack:
        disk = None
        try:
            disk = stack.enter_context(contextlib.closing(Disk(tmp_path / "disk", megabytes=128)))
        except NoDisk as why:
            print(f"The disk will not be full: {why}")
        config = FeedbackConfig(data=tmp_path / "disk" / "data")
        with _house(tmp_path, Folder(config, model), {}) as (folder, house):
            full = [Fault("disk", "disk full", disk.fill, disk.make_room)] if disk else []
            # the learner comes back on the full disk, and waits; a server is started again once there is room
            yield World(folder, house, [_killed(house, "learner"), *full, _killed(house, "server")], disk)


@contextlib.contextmanager
def _house(tmp_path: Path, folder: Folder, own: dict[str, Any]) -> Iterator[tuple[Folder, House]]:
    settings = quick_settings(folder, free_port("127.0.0.1")) | {"update_min_feedback": 30} | own
    with contextlib.closing(House(tmp_path / "ends", **settings)) as house:
        yield folder, house


def _killed(house: House, name: str) -> Fault:
    return Fault(name, f"{name} killed", partial(house.end, signal.SIGKILL, name), partial(house.start, name))


def _cuts(network: str, relay: Relay) -> Sequence[Fault]:
    ways: dict[str, Callable[[], object]] = {
        "slow": partial(relay.delay, 0.2),
        "slower than anyone waits": partial(relay.delay, 3.0),
        "reset": relay.cut,
        "halved": relay.halve,
    }
    return [Fault(network, f"{network} {way}", begin, relay.heal) for way, begin in ways.items()]
