"""kill -9 of server, learner or both at any moment: every 202 counts once, and no torn version is ever served.

Real processes over one data folder; a crowd chats and rates over HTTP, through every outage, and notes each 202.
`KILL_SEED` repeats a run as far as its choices go.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.welcome import free_port
from feedback.config import FeedbackConfig
from feedback.events import RELEASES, Release
from feedback.log import open_log
from serving.adapters import AdapterStore
from tests.crowd import Crowd, counts_each_once
from tests.house import Folder, House, quick_settings, until


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Folder:
    return Folder(FeedbackConfig(data=tmp_path / "data"), model_folder)


@pytest.fixture
def house(folder: Folder, tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "ends", **quick_settings(folder, free_port("127.0.0.1")))
    yield house
    house.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.soak)])
def test_every_202_counts_once_and_no_torn_version_is_served(house: House, folder: Folder, kills: int):
    seed = int(os.environ.get("KILL_SEED", random.randrange(10_000)))
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)
    both = ("server", "learner")
    house.start(*both)
    with Crowd(house) as crowd:
        until(lambda: len(crowd.promised) > 10, "the crowd is talking")
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 4.0))
            doomed = chance.choice([both, ("server",), ("learner",)])
            house.end(signal.SIGKILL, *doomed)
            house.start(*doomed)
        before = len(crowd.promised)
        until(lambda: len(crowd.promised) > before + 10, "the crowd is talking again")
        until(lambda: len(crowd.versions) > 1, "a version that the learner made speaks")
    crowd.until_everyone_was_heard(last=2 * crowd.size)
    assert house.end(signal.SIGTERM, *both) == {"server": 0, "learner": 0}

    assert crowd.oddities == []
    with contextlib.closing(folder.state()) as state, contextlib.closing(folder.state_from_the_log()) as again:
        counts_each_once(crowd, state)
        assert state.digest() == again.digest()
    serves_whole_versions(crowd, folder)


def serves_whole_versions(crowd: Crowd, folder: Folder) -> None:
    """Versions were made and served between the kills; each that anyone heard was released once, and all are whole."""
    with contextlib.closing(open_log(folder.config, writes=())) as log:
        mirrored = [Release.model_validate_json(record.event) for record in log.read(RELEASES, {}, 10_000)]
    changes = [change for release in mirrored for change in release.changes]
    assert [change.generation for change in changes] == list(range(1, len(changes) + 1))
    released = [change.current for change in changes]
    assert released == sorted(set(released))
    heard = {int(version.removeprefix("v")) for version in crowd.versions}
    assert len(heard) > 1
    assert heard - {0} <= set(released)
    store = AdapterStore(folder.data / "adapters", "default")
    for version in store.versions():
        store.verify(version, folder.base)
    numbers = [store.manifest(version).update["number"] for version in store.versions()]
    assert numbers == sorted(set(numbers))
