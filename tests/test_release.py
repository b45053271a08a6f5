"""The release file: one change at a time, whole or not at all, and no way to serve what nobody approved."""

from __future__ import annotations

import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from feedback.events import Release
from serving.durable import StoreBusy, locked
from serving.release import Action, By, ReleaseBroken, ReleaseFile, ReleaseRefused

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

IN_STORE = range(1, 1000)


class Desk:
    """A release file and a store in which certain versions exist."""

    def __init__(self, folder: Path, existing: Collection[int] = IN_STORE) -> None:
        self.file = ReleaseFile(folder, "default")
        self.existing = existing

    def change(self, action: Action, version: int | None = None, by: By = "operator", expected: int | None = None):
        exists = self.existing.__contains__
        return self.file.change(action, by, version=version, reason="test", exists=exists, expected=expected)

    def served(self) -> tuple[int, int]:
        release = self.file.read()
        return release.current, release.last_good


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_where_there_is_no_file_the_base_is_served(desk: Desk):
    release = desk.file.read()
    assert (release.generation, release.current, release.approved) == (0, 0, ())
    assert not desk.file.path.exists(), "reading writes nothing"


def test_promote_approves_serves_and_remembers_what_was_served_before(desk: Desk):
    before = time.time()
    desk.change("promote", 3)
    release = desk.change("promote", 5, by="learner")
    assert (release.current, release.last_good, release.approved, release.generation) == (5, 3, (3, 5), 2)
    change = release.changes[-1]
    assert (change.generation, change.action, change.by, change.current, change.reason) == (
        2,
        "promote",
        "learner",
        5,
        "test",
    )
    assert before <= change.at <= time.time()
    assert ReleaseFile(desk.file.path.parent, "default").read() == release


def test_promoting_what_is_served_changes_nothing(desk: Desk):
    release = desk.change("promote", 3)
    assert desk.change("promote", 3) == release


def test_rolling_back_goes_back_step_by_step_and_never_forth(desk: Desk):
    for version in (1, 2, 3):
        desk.change("promote", version)
    desk.change("rollback")
    assert desk.served() == (2, 1)
    desk.change("rollback")
    assert desk.served() == (1, 0)
    desk.change("promote", 4)
    assert desk.served() == (4, 1)
    desk.change("rollback")
    desk.change("rollback")
    assert desk.served() == (0, 0)
    with pytest.raises(ReleaseRefused, match="nothing to roll back to: v0 is served"):
        desk.change("rollback")
    assert desk.file.read().generation == 8


def test_a_rollback_to_a_version_that_was_deleted_is_refused(tmp_path: Path):
    desk = Desk(tmp_path, existing={1, 2})
    desk.change("promote", 1)
    desk.change("promote", 2)
    desk.existing = {2}
    with pytest.raises(ReleaseRefused, match="v1, served before v2, is no longer in the store"):
        desk.change("rollback")
    assert desk.change("promote", 0).current == 0


@pytest.mark.parametrize(("version", "message"), [(None, "a version is needed"), (1000, "v1000 is not in the store")])
def test_a_version_that_is_not_there_is_not_promoted(desk: Desk, version: int | None, message: str):
    with pytest.raises(ReleaseRefused, match=message):
        desk.change("promote", version)
    assert not desk.file.path.exists()


def test_while_paused_the_learner_ships_nothing_and_an_operator_may(desk: Desk):
    assert desk.change("pause").paused
    with pytest.raises(ReleaseRefused, match="v2 is not promoted: the release is paused"):
        desk.change("promote", 2, by="learner")
    assert desk.change("candidate", 2, by="learner").approved == (2,)
    assert desk.change("promote", 3).current == 3
    assert desk.change("resume").paused is False
    assert desk.change("promote", 2, by="learner").current == 2


def test_pausing_twice_is_one_change(desk: Desk):
    assert desk.change("pause") == desk.change("pause")


def test_a_candidate_is_approved_served_to_nobody_and_can_be_withdrawn(desk: Desk):
    release = desk.change("candidate", 4)
    assert (release.current, release.candidate, release.approved) == (0, 4, (4,))
    assert desk.change("withdraw").candidate is None
    desk.change("candidate", 4)
    release = desk.change("promote", 4)
    assert (release.current, release.candidate) == (4, None)


def test_a_change_decided_on_an_older_release_is_refused(desk: Desk):
    desk.change("promote", 1)
    desk.change("promote", 2, expected=1)
    with pytest.raises(ReleaseRefused, match="decided on generation 1 of the release, which is at 2"):
        desk.change("promote", 3, expected=1)
    assert desk.served() == (2, 1)


def test_the_history_holds_the_last_hundred_changes(desk: Desk):
    for version in range(1, 121):
        desk.change("promote", version)
    changes = desk.file.read().changes
    assert [change.generation for change in changes] == list(range(21, 121))
    for _ in range(40):
        desk.change("rollback")
    assert desk.served() == (80, 79)


BROKEN = {
    "empty": "",
    "torn": '{"schema": 1, "policy": "default", "gene',
    "not a release": '{"schema": 1, "policy": "default", "current": "three"}',
    "another policy": '{"schema": 1, "policy": "other"}',
    "newer Heed": '{"schema": 99, "policy": "default"}',
    "negative": '{"schema": 1, "policy": "default", "generation": -3}',
    "nobody approved it": '{"schema": 1, "policy": "default", "current": 7, "approved": [3]}',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_keeps_readers_on_the_last_good_one_and_writers_away(
    kind: str, desk: Desk, caplog: pytest.LogCaptureFixture
):
    good = desk.change("promote", 3)
    assert desk.file.read() == good
    desk.file.path.write_text(BROKEN[kind])
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            assert desk.file.read() == good
    assert len(caplog.records) == 1, "said once"
    assert desk.file.broken is not None
    assert str(desk.file.path) in desk.file.broken
    with pytest.raises(ReleaseBroken, match="is no release"):
        desk.change("promote", 4)
    assert desk.file.path.read_text() == BROKEN[kind], "a writer does not paper over it"
    newcomer = ReleaseFile(desk.file.path.parent, "default")
    assert "Restore it, or delete it and promote again" in str(newcomer.broken)
    assert newcomer.read() == Release(policy="default"), "who never read a good one serves the base"
    desk.file.path.write_text(good.model_dump_json(by_alias=True))
    assert desk.file.read() == good
    assert desk.file.broken is None


def test_a_file_that_vanishes_changes_nothing_for_those_who_knew_it(desk: Desk):
    good = desk.change("promote", 3)
    assert desk.file.read() == good
    desk.file.path.unlink()
    assert desk.file.read() == good
    with pytest.raises(ReleaseBroken, match=r"release\.json is gone, which was there before"):
        desk.change("pause")
    anew = Desk(desk.file.path.parent).change("promote", 4)
    assert (anew.generation, anew.current) == (1, 4)
    assert desk.file.read() == anew


def test_what_a_newer_heed_adds_within_a_schema_is_ignored(desk: Desk):
    text = json.loads(desk.change("promote", 3).model_dump_json(by_alias=True)) | {"mood": "sunny"}
    desk.file.path.write_text(json.dumps(text))
    assert desk.file.read().current == 3


def test_a_failed_write_leaves_the_old_release(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    good = desk.change("promote", 3)
    disk_full = OSError(28, "No space left on device")

    def fail(_descriptor: int) -> None:
        raise disk_full

    monkeypatch.setattr("serving.durable.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        desk.change("promote", 4)
    monkeypatch.undo()
    assert desk.file.read() == good
    assert {path.name for path in desk.file.path.parent.iterdir()} == {"release.json", ".release.lock"}


def promote_many(folder: Path, first: int) -> None:
    desk = Desk(folder)
    for version in range(first, first + 25):
        desk.change("promote", version)


def test_writers_in_several_processes_lose_no_change_and_readers_see_only_whole_ones(desk: Desk, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=promote_many, args=(tmp_path, first)) for first in (1, 101, 201)]
    for writer in writers:
        writer.start()
    generations = [0]
    while any(writer.is_alive() for writer in writers):
        generations.append(desk.file.read().generation)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    release = desk.file.read()
    assert release.generation == 75
    assert [change.generation for change in release.changes] == list(range(1, 76))
    assert sorted(change.current for change in release.changes) == sorted(release.approved)
    assert generations == sorted(generations)
    assert desk.file.broken is None


def test_a_lock_held_for_ever_is_reported(tmp_path: Path):
    lock = tmp_path / "lock"
    message = "locked by another process for"
    with locked(lock), pytest.raises(StoreBusy, match=message), locked(lock, wait_s=0.05):
        pass
    with locked(tmp_path / "lock", wait_s=0.05):
        pass


def test_threads_of_one_process_lock_each_other_out(desk: Desk):
    threads = [threading.Thread(target=promote_many, args=(desk.file.path.parent, first)) for first in (1, 101)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert desk.file.read().generation == 50


def test_reading_an_unchanged_file_does_not_open_it(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    release: Release = desk.change("promote", 3)
    assert desk.file.read() == release

    def refuse(_path: Path) -> bytes:
        raise AssertionError("opened")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert desk.file.read() == release
