"""A backup is made while everything runs, and is started on in another folder: no feedback is lost or counted twice."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local import answers
from deploy.welcome import free_port
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import open_log
from feedback.sqlite_log import SqliteLog
from learner.intake import Intake
from learner.metrics import LearnerMetrics
from learner.state import State
from serving.adapters import AdapterStore
from tests.broker import Broker
from tests.commands import Heed
from tests.crowd import CHAT, Crowd
from tests.crowd import FEEDBACK as GIVE
from tests.house import Folder, House, quick_settings, until
from tests.kafka_logs import kafka_config
from tests.told import BASE, NOW, exchange, feedback

BOTH = ("server", "learner")


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder, and the digest of what it holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_ready(house: House) -> bool:
    return answers("127.0.0.1", int(house.url.rpartition(":")[2]), "/ready")


def post(house: House, path: str, body: dict[str, Any]) -> str:
    """The id of what came back, which was no error."""
    answer = httpx.post(house.url + path, json=body, timeout=60)
    assert answer.status_code in (200, 202), answer.text
    made: str = answer.json()["id"]
    return made


@pytest.mark.timeout(300)
def test_what_was_backed_up_under_a_crowd_goes_on_in_another_folder(tmp_path: Path, model_folder: Path, heed: Heed):
    old, new = (Folder(FeedbackConfig(data=tmp_path / name), model_folder) for name in ("old", "new"))
    settings = quick_settings(old, free_port("127.0.0.1"))
    with contextlib.closing(House(tmp_path / "ends", **settings)) as house:
        house.start(*BOTH)
        until(lambda: is_ready(house), "the server is ready")
        hello = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "user": "ann"}
        opinion = {"kind": "thumb", "value": "up", "reply_id": post(house, CHAT, hello), "user": "ann", "id": "of ann"}
        receipt = post(house, GIVE, opinion)
        unrated = post(house, CHAT, hello)
        with Crowd(house) as before:
            until(lambda: len(before.versions) > 1, "a version that the learner made speaks")
            promised = dict(before.promised)
            told = json.loads(heed("backup", tmp_path / "copy", "--data", old.data, "--json").out)
            until(lambda: len(before.promised) > len(promised) + 10, "the crowd goes on")
        house.end(signal.SIGKILL, *BOTH)  # the machine is lost
        assert before.oddities == []
        assert told["with_log"]
        left = contents(old.data)
        copied = AdapterStore(tmp_path / "copy" / "adapters", "default").versions()
        known = {f"v{version}" for version in (0, *copied)}

        shutil.copytree(tmp_path / "copy", new.data)
        house.start(*BOTH, data=new.data)
        until(lambda: is_ready(house), "the server is ready")
        assert post(house, GIVE, opinion) == receipt
        late = post(house, GIVE, {"kind": "rating", "value": 5, "reply_id": unrated, "user": "ann", "id": "late"})
        with Crowd(house, ids=False) as after:
            until(lambda: not after.versions <= known, "a version that was made since speaks")
        after.promised |= {receipt: ("thumb", 1.0), late: ("rating", 5.0)}
        after.until_everyone_was_heard()
        assert house.end(signal.SIGTERM, *BOTH) == {"server": 0, "learner": 0}
        assert after.oddities == []

    assert contents(old.data) == left
    assert all(int(version.removeprefix("v")) > max(copied) for version in after.versions - known)
    with contextlib.closing(new.state()) as state, contextlib.closing(new.state_from_the_log()) as again:
        counted = [judgement.feedback_id for judgement in state.judgements()]
        assert len(counted) == len(set(counted))
        # promised before the backup, or since; while it was made, some are in it
        assert promised.keys() | after.promised.keys() <= set(counted) <= before.promised.keys() | after.promised.keys()
        values = {id_: (kind, value) for id_, kind, value in state.db.execute("SELECT id, kind, value FROM feedback")}
        assert values == {id_: (before.promised | after.promised)[id_] for id_ in counted}
        assert state.digest() == again.digest()


def test_a_learner_restored_from_an_older_copy_catches_up_from_kafka(tmp_path: Path, kafka: Broker, heed: Heed):
    config = kafka_config(kafka.bootstrap, data=tmp_path / "data")

    def absorbed(folder: Path) -> str:
        """What the state of a data folder knows, once it has read the log to its end."""
        with (
            contextlib.closing(State(folder / "learner" / "state.db", policy="default", base=BASE)) as state,
            contextlib.closing(open_log(config, writes=())) as log,
        ):
            intake = Intake(log, state, LearnerMetrics(), join_wait_s=100, clock=lambda: NOW)
            until(lambda: all(any(log.end(topic).values()) for topic in (EXCHANGES, FEEDBACK)), "the log is there")
            while intake.absorb():
                pass
            return state.digest()

    with contextlib.closing(open_log(config, writes=(EXCHANGES, FEEDBACK), outbox=True)) as log:
        for number in range(20):
            if number == 10:
                absorbed(config.data)
                told = heed("backup", "copy", "--data", config.data, HEED_KAFKA_BOOTSTRAP=kafka.bootstrap).out
                assert "The log is Kafka's to keep" in told
            reply = f"reply-{number}"
            log.append(EXCHANGES, reply, exchange(reply).to_json())
            log.append(FEEDBACK, reply, feedback(f"fb-{number}", reply).to_json())
        assert log.waiting() == 0
    assert absorbed(tmp_path / "copy") == absorbed(config.data) == absorbed(tmp_path / "empty")


def test_a_copy_is_whole_or_not_there(tmp_path: Path, heed: Heed):
    data = tmp_path / "heed-data"
    with contextlib.closing(SqliteLog(data / "log", [FEEDBACK])) as log:
        log.append(FEEDBACK, "key", "an event")
        (data / "secret").write_text("of sixteen bytes and more")
        (data / "secret").chmod(0o600)
        (data / "adapters" / "default").mkdir(parents=True)
        (data / "adapters" / "default" / ".highest").write_text("7\n")
        assert heed("backup", "copy").code == 0
    copy = tmp_path / "copy"
    assert contents(copy).keys() == {"log/heed.feedback.db", "secret", "adapters/default/.highest"}
    assert [(copy / name).stat().st_mode & 0o777 for name in (".", "secret")] == [0o700, 0o600]
    with contextlib.closing(SqliteLog(copy / "log", [])) as log:
        assert [record.event for record in log.read(FEEDBACK, {}, 10)] == ["an event"]

    database = data / "log" / "heed.feedback.db"
    database.write_bytes(database.read_bytes()[:4096] + b"torn" * 1024)
    torn = heed("backup", "torn")
    assert (torn.code, torn.err.count("\n")) == (1, 1)
    assert f"{database} cannot be copied" in torn.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "heed-data"]


def test_adapters_that_lie_elsewhere_come_along(tmp_path: Path, heed: Heed):
    (tmp_path / "shared" / "default").mkdir(parents=True)
    (tmp_path / "shared" / "default" / "release.json").write_text("{}")
    for unused in ("heed-data/adapters/default", "heed-data/learner"):
        (tmp_path / unused).mkdir(parents=True)
        (tmp_path / unused / "old.json").write_text("{}")
    told = heed("backup", "copy", HEED_ADAPTERS=str(tmp_path / "shared")).out
    assert f"its folder adapters in place of {tmp_path / 'shared'}" in told
    assert contents(tmp_path / "copy").keys() == {"adapters/default/release.json", "learner/old.json"}


@pytest.mark.parametrize(
    ("out", "words"), [("there", "is there already"), ("heed-data/copy", "lies in what it is to be a copy of")]
)
def test_a_place_that_will_not_do_is_refused(out: str, words: str, tmp_path: Path, heed: Heed):
    for folder in ("heed-data", "there"):
        (tmp_path / folder).mkdir()
    done = heed("backup", out)
    assert done.code == 1
    assert words in done.err
    assert heed("backup", "copy", "--data", "nowhere").err.startswith("heed: there is no data folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heed-data", "there"]


def test_links_are_copied_as_what_they_lead_to_and_one_that_leads_back_up_ends_nothing(tmp_path: Path, heed: Heed):
    """A mounted secret is a link; so is what was moved to a larger disk."""
    (tmp_path / "far" / "default" / "v000001").mkdir(parents=True)
    (tmp_path / "far" / "default" / "v000001" / "manifest.json").write_text("{}")
    (tmp_path / "far" / "default" / "up").symlink_to("..")
    (tmp_path / "mounted").write_text("of sixteen bytes and more")
    real = tmp_path / "real"
    (real / "adapters").mkdir(parents=True)
    (real / "adapters" / "default").symlink_to(tmp_path / "far" / "default")
    (real / "secret").symlink_to(tmp_path / "mounted")
    (real / "backups").symlink_to(tmp_path)
    (tmp_path / "heed-data").symlink_to(real)
    assert heed("backup", "copy").code == 0
    copy = contents(tmp_path / "copy")
    assert copy.keys() >= {"secret", "adapters/default/v000001/manifest.json"}
    assert copy["secret"] == contents(tmp_path)["mounted"]
    assert not any("backups" in name for name in copy)
    assert "lies in what it is to be a copy of" in heed("backup", real / "another").err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others")
def test_what_root_copies_of_another_users_folder_that_user_can_be_started_on(tmp_path: Path, heed: Heed):
    for folder in ("heed-data/log", "shared/default/v000001"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "some.json").write_text("{}")
    for path in (tmp_path / "heed-data", *(tmp_path / "heed-data").rglob("*"), *(tmp_path / "shared").rglob("*")):
        os.chown(path, 4321, 4322)
    assert heed("backup", "copy", HEED_ADAPTERS=str(tmp_path / "shared")).code == 0
    copy = tmp_path / "copy"
    owners = {
        str(path.relative_to(copy)): (path.stat().st_uid, path.stat().st_gid) for path in (copy, *copy.rglob("*"))
    }
    assert owners.pop("adapters") == (0, 0)
    assert owners.keys() > {".", "log", "adapters/default/v000001"}
    assert set(owners.values()) == {(4321, 4322)}


def test_what_a_killed_backup_left_is_deleted_by_the_next_and_what_one_is_at_work_on_is_not(tmp_path: Path, heed: Heed):
    (tmp_path / "heed-data").mkdir()
    left, live = (tmp_path / f".{name}.heed-backup.tmp" for name in ("left", "live"))
    for draft in (left, live):
        draft.mkdir()
        (draft / "secret").write_text("of sixteen bytes and more")
    held = os.open(live, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert heed("backup", "copy").code == 0
    os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == [live.name, "copy", "heed-data"]
