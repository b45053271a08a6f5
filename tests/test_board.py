"""The board: what processes show each other, through two files that may be damaged, deleted or full at any time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from feedback.board import STATUSES, Place, Receipt, Room, SqliteBoard, Story, furthest, open_board
from feedback.config import FeedbackConfig
from feedback.events import Message

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SqliteBoard]:
    board = SqliteBoard(tmp_path / "board" / "server.db", tmp_path / "board" / "learner.db")
    yield board
    board.close()


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[SqliteBoard]:
    board = SqliteBoard(tmp_path / "board" / "learner.db", tmp_path / "board" / "server.db")
    yield board
    board.close()


def chat(*said: str, system: str | None = None) -> list[Message]:
    """Messages of user and assistant in turn."""
    first = [Message(role="system", content=system)] if system else []
    roles = ("user", "assistant")
    return first + [Message(role=roles[index % 2], content=text) for index, text in enumerate(said)]  # type: ignore[arg-type]


def turn(
    board: SqliteBoard, messages: Sequence[Message], *replies: str, caller: str = "ann", name: str | None = None
) -> Place:
    """One served turn with these choices."""
    place = board.continue_conversation(caller, messages, name)
    for reply in replies:
        board.remember_exchange(caller, messages, reply, place)
    return place


def test_a_prompt_that_continues_an_exchange_is_the_next_turn_of_its_conversation(server: SqliteBoard) -> None:
    first = turn(server, chat("hi"), "hello")
    second = turn(server, chat("hi", "hello", "how are you?"), "well")
    third = turn(server, chat("hi", "hello", "how are you?", "well", "good"), "yes")
    assert [place.turn for place in (first, second, third)] == [0, 1, 2]
    assert {place.conversation for place in (first, second, third)} == {first.conversation}


def test_what_continues_nothing_is_a_conversation_of_its_own(server: SqliteBoard) -> None:
    first = turn(server, chat("hi"), "hello")
    assert turn(server, chat("hi"), "hello").conversation != first.conversation
    foreign = server.continue_conversation("ann", chat("hi", "said elsewhere", "and now?"))
    assert foreign.turn == 0
    assert foreign.conversation != first.conversation


def test_callers_do_not_continue_each_other_s_conversations(server: SqliteBoard) -> None:
    first = turn(server, chat("hi"), "hello")
    other = server.continue_conversation("bob", chat("hi", "hello", "more"))
    assert other.turn == 0
    assert other.conversation != first.conversation


def test_any_choice_may_be_continued_and_regenerating_is_the_same_turn(server: SqliteBoard) -> None:
    first = turn(server, chat("hi"), "hello", "good day")
    for reply in ("hello", "good day"):
        assert turn(server, chat("hi", reply, "more"), "fine") == Place(first.conversation, 1)
        assert turn(server, chat("hi", reply, "more"), "better") == Place(first.conversation, 1)


def test_the_system_message_may_change_and_outer_white_space_too(server: SqliteBoard) -> None:
    first = turn(server, chat("hi", system="It is 12:00."), " hello\n")
    assert turn(server, chat("hi", "hello", "more", system="It is 12:01.")) == Place(first.conversation, 1)


def test_a_named_conversation_counts_its_turns_whatever_the_client_sends_of_it(server: SqliteBoard) -> None:
    assert turn(server, chat("one"), "1", name="talk") == Place("talk", 0)
    assert turn(server, chat("one"), "uno", name="talk") == Place("talk", 0)  # regenerated
    assert turn(server, chat("one", "1", "two"), "2", name="talk") == Place("talk", 1)
    assert turn(server, chat("three"), "3", name="talk") == Place("talk", 2)  # without its history
    assert turn(server, chat("one"), "1", name="other") == Place("other", 0)
    assert turn(server, chat("one"), "1", name="talk", caller="bob") == Place("talk", 0)


def test_an_exchange_is_found_until_there_is_no_more_room(tmp_path: Path) -> None:
    board = SqliteBoard(tmp_path / "own.db", tmp_path / "other.db", Room(exchanges=100))
    for number in range(1000):
        board.put_exchange(f"reply-{number}", f'{{"n":{number}}}')
    assert board.get_exchange("reply-999") == '{"n":999}'
    assert board.get_exchange("reply-0") is None
    kept = sum(board.get_exchange(f"reply-{number}") is not None for number in range(1000))
    assert 100 <= kept < 100 + 256
    board.close()


def test_large_exchanges_are_bounded_by_their_size(tmp_path: Path) -> None:
    board = SqliteBoard(tmp_path / "own.db", tmp_path / "other.db", Room(exchange_bytes=100_000))
    for number in range(512):
        board.put_exchange(f"reply-{number}", "x" * 10_000)
    kept = [number for number in range(512) if board.get_exchange(f"reply-{number}") is not None]
    assert kept == list(range(502, 512))
    board.close()


def test_everything_that_grows_is_bounded(tmp_path: Path) -> None:
    board = SqliteBoard(tmp_path / "own.db", tmp_path / "other.db", Room(conversations=10, receipts=10, stories=10))
    for number in range(600):
        board.remember_receipt(f"fb-{number}", "thumb", "digest", number)
        board.write_story(f"fb-{number}", [Story("joined", number)])
        turn(board, chat(f"prompt {number}"), "reply", name=f"talk-{number}")
    assert board.receipt("fb-0") is None
    assert board.story("fb-0") == []
    assert board.receipt("fb-599") is not None
    assert turn(board, chat("new"), name="talk-0").turn == 0
    assert turn(board, chat("new"), name="talk-599").turn == 1
    board.close()


def test_a_receipt_is_remembered_and_the_first_one_stays(server: SqliteBoard) -> None:
    assert server.receipt("fb-1") is None
    server.remember_receipt("fb-1", "thumb", "digest", 10.0)
    server.remember_receipt("fb-1", "rating", "other", 20.0)
    assert server.receipt("fb-1") == Receipt("fb-1", "thumb", "digest", 10.0)


def test_an_update_asked_of_the_server_is_seen_by_the_learner(server: SqliteBoard, learner: SqliteBoard) -> None:
    assert learner.update_asked() is None
    server.ask_update(10.25)
    assert learner.update_asked() == 10.25
    server.ask_update(20.5)
    assert learner.update_asked() == 20.5


def test_the_first_activation_of_a_version_counts(server: SqliteBoard, learner: SqliteBoard) -> None:
    for version, at in ((1, 10.0), (2, 20.0), (1, 30.0)):
        server.activated(version, at)
    assert learner.activations() == server.activations() == {1: 10.0, 2: 20.0}


def test_a_report_of_the_learner_is_read_by_the_server(server: SqliteBoard, learner: SqliteBoard) -> None:
    assert server.report("policy") is None
    learner.set_report("policy", '{"n":1}')
    learner.set_report("policy", '{"n":2}')
    assert server.report("policy") == learner.report("policy") == '{"n":2}'


def test_a_story_is_told_from_both_processes_in_order(server: SqliteBoard, learner: SqliteBoard) -> None:
    server.remember_receipt("fb-1", "thumb", "digest", 1.0)
    learner.write_stories(
        {"fb-1": [Story("in_update", 4.0, update=7), Story("joined", 2.0), Story("in_reward_model", 3.0)], "fb-2": []}
    )
    learner.write_story("fb-1", [Story("in_version", 5.0, update=7, version=3)])
    assert [step.status for step in server.story("fb-1")] == [
        "accepted", "joined", "in_reward_model", "in_update", "in_version",
    ]  # fmt: skip
    server.activated(3, 6.0)
    assert server.story("fb-1")[-1] == Story("served", 6.0, update=7, version=3)
    assert furthest(server.story("fb-1")) == "served"
    assert server.story("fb-2") == []


def test_writing_a_story_again_changes_nothing_and_a_new_step_replaces_its_like(learner: SqliteBoard) -> None:
    steps = [Story("accepted", 1.0), Story("dropped", 2.0, reason="no_exchange")]
    for _ in range(3):
        learner.write_story("fb-1", steps)
    assert learner.story("fb-1") == steps
    learner.write_story("fb-1", [Story("dropped", 3.0, reason="conflict")])
    assert learner.story("fb-1")[-1] == Story("dropped", 3.0, reason="conflict")
    assert len(learner.story("fb-1")) == 2


def test_the_status_is_the_furthest_step_reached() -> None:
    assert furthest([]) == "accepted"
    for index in range(len(STATUSES)):
        steps = [Story(status, float(at)) for at, status in enumerate(STATUSES[: index + 1])]
        assert furthest(reversed(steps)) == STATUSES[index]


def test_what_was_joined_after_it_was_dropped_or_superseded_counts_again() -> None:
    for ending in (Story("dropped", 2.0, reason="no_exchange"), Story("superseded", 2.0, reason="by fb-2")):
        assert furthest([Story("joined", 2.0), ending]) == ending.status
        assert furthest([ending, Story("joined", 3.0)]) == "joined"
    assert furthest([Story("retracted", 2.0), Story("joined", 3.0)]) == "retracted"


@pytest.mark.parametrize("damage", ["overwritten", "torn", "emptied", "deleted", "folder deleted", "another database"])
@pytest.mark.parametrize("running", [True, False])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str, running: bool) -> None:
    folder = tmp_path / "board"
    server = SqliteBoard(folder / "server.db", folder / "learner.db")
    learner = SqliteBoard(folder / "learner.db", folder / "server.db")
    server.activated(1, 1.0)
    for number in range(200):
        server.put_exchange(f"reply-{number}", "x" * 1000)
    assert learner.activations() == {1: 1.0}
    if not running:
        server.close()
        learner.close()
    _damage(folder, damage)
    if damage != "folder deleted":
        learner.activations()  # must not raise, whatever it makes of the damage
    for number in range(500):  # what is open goes on for a while on what it remembers, until it meets the damage
        server.put_exchange(f"again-{number}", "y" * 1000)
    server.activated(2, 2.0)
    assert server.get_exchange("again-499") == "y" * 1000
    assert server.activations()[2] == learner.activations()[2] == 2.0
    with closing(sqlite3.connect(folder / "server.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    server.close()
    learner.close()


def _damage(folder: Path, damage: str) -> None:
    file = folder / "server.db"
    if damage == "overwritten":
        file.write_bytes(b"this is no database" * 500)
        _remove(folder / "server.db-wal", folder / "server.db-shm")
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:1000])
        _remove(folder / "server.db-wal", folder / "server.db-shm")
    elif damage == "emptied":
        file.write_bytes(b"")
        _remove(folder / "server.db-wal", folder / "server.db-shm")
    elif damage == "deleted":
        file.unlink()
    elif damage == "folder deleted":
        _remove(*folder.iterdir())
        folder.rmdir()
    else:
        _remove(*folder.glob("server.db*"))
        db = sqlite3.connect(file)
        db.execute("CREATE TABLE something (else_ TEXT)")
        db.close()


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def test_without_a_place_to_write_it_goes_on_says_so_once_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "board").write_text("a file where the folder should be")
    board = SqliteBoard(tmp_path / "board" / "server.db", tmp_path / "board" / "learner.db")
    for _ in range(3):
        board.put_exchange("reply", "{}")
        assert board.get_exchange("reply") is None
        assert board.continue_conversation("ann", chat("hi", "hello", "more")).turn == 0
        assert board.story("fb-1") == []
        assert board.activations() == {}
    assert caplog.text.count("going on without it") == 1
    (tmp_path / "board").unlink()
    board.put_exchange("reply", "{}")
    assert board.get_exchange("reply") == "{}"
    board.close()


def test_a_full_disk_loses_what_did_not_fit_and_nothing_else(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from feedback.board import SqliteBoard

board = SqliteBoard(Path(sys.argv[1]) / "server.db", Path(sys.argv[1]) / "learner.db")
board.put_exchange("before", "{}")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # from here on the disk is as good as full
for number in range(20):
    board.put_exchange(f"large-{number}", "x" * 60_000)
assert board.get_exchange("before") == "{}"
assert board.get_exchange("large-19") is None
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
board.put_exchange("after", "x" * 60_000)
assert board.get_exchange("before") == "{}"
assert board.get_exchange("after") == "x" * 60_000
board.close()
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "going on without it" in ran.stderr


def test_a_mistake_of_ours_is_not_taken_for_damage(server: SqliteBoard) -> None:
    server.put_exchange("reply", "{}")
    with pytest.raises(Exception, match="type 'dict' is not supported"):
        server.put_exchange("reply", {})  # type: ignore[arg-type]
    assert server.get_exchange("reply") == "{}"


def test_many_threads_may_use_it(server: SqliteBoard, learner: SqliteBoard) -> None:
    def talk(name: int) -> None:
        for number in range(100):
            server.put_exchange(f"{name}-{number}", str(number))
            assert server.get_exchange(f"{name}-{number}") == str(number)
            learner.write_story(f"{name}", [Story("joined", float(number))])
            server.story(f"{name}")

    failed: list[BaseException] = []
    threads = [threading.Thread(target=_catching(talk, failed), args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert server.story("3") == [Story("joined", 99.0)]


def _catching(work, failed):  # type: ignore[no-untyped-def]
    def run(*arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            failed.append(error)

    return run


def test_open_board_gives_each_process_its_side(tmp_path: Path) -> None:
    config = FeedbackConfig(data=tmp_path)
    server, learner = open_board(config, "server"), open_board(config, "learner")
    server.activated(1, 1.0)
    learner.set_report("policy", "{}")
    assert learner.activations() == {1: 1.0}
    assert server.report("policy") == "{}"
    assert sorted(path.name for path in (tmp_path / "board").glob("*.db")) == ["learner.db", "server.db"]
    server.close()
    learner.close()
