"""The embedded board: two files that may be damaged, deleted or full at any time. What it does: test_board.py."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from feedback.board import Receipt, Story, open_board
from feedback.config import FeedbackConfig
from feedback.sqlite_board import Room, SqliteBoard
from tests.test_board import chat, turn

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[SqliteBoard]:
    board = SqliteBoard(tmp_path / "board" / "server.db", tmp_path / "board" / "learner.db")
    yield board
    await board.close()


async def test_an_exchange_is_found_until_there_is_no_more_room(tmp_path: Path) -> None:
    board = SqliteBoard(tmp_path / "own.db", tmp_path / "other.db", Room(exchanges=100))
    for number in range(1000):
        await board.put_exchange(f"reply-{number}", f'{{"n":{number}}}')
    assert await board.get_exchange("reply-999") == '{"n":999}'
    assert await board.get_exchange("reply-0") is None
    kept = [number for number in range(1000) if await board.get_exchange(f"reply-{number}") is not None]
    assert 100 <= len(kept) < 100 + 256
    await board.close()


async def test_large_exchanges_are_bounded_by_their_size(tmp_path: Path) -> None:
    board = SqliteBoard(tmp_path / "own.db", tmp_path / "other.db", Room(exchange_bytes=100_000))
    for number in range(512):
        await board.put_exchange(f"reply-{number}", "x" * 10_000)
    kept = [number for number in range(512) if await board.get_exchange(f"reply-{number}") is not None]
    assert kept == list(range(502, 512))
    await board.close()


async def test_everything_that_grows_is_bounded(tmp_path: Path) -> None:
    board = SqliteBoard(tmp_path / "own.db", tmp_path / "other.db", Room(conversations=10, receipts=10, stories=10))
    for number in range(600):
        await board.remember_receipts([Receipt(f"fb-{number}", "thumb", "digest", number)])
        await board.write_story(f"fb-{number}", [Story("joined", number)])
        await turn(board, chat(f"prompt {number}"), "reply", name=f"talk-{number}")
    assert await board.receipt("fb-0") is None
    assert await board.story("fb-0") == []
    assert await board.receipt("fb-599") is not None
    assert (await turn(board, chat("new"), name="talk-0")).turn == 0
    assert (await turn(board, chat("new"), name="talk-599")).turn == 1
    await board.close()


@pytest.mark.parametrize("damage", ["overwritten", "torn", "emptied", "deleted", "folder deleted", "another database"])
@pytest.mark.parametrize("running", [True, False])
async def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str, running: bool) -> None:
    folder = tmp_path / "board"
    server = SqliteBoard(folder / "server.db", folder / "learner.db")
    learner = SqliteBoard(folder / "learner.db", folder / "server.db")
    await server.activated(1, 1.0)
    for number in range(200):
        await server.put_exchange(f"reply-{number}", "x" * 1000)
    assert await learner.activations() == {1: 1.0}
    if not running:
        await server.close()
        await learner.close()
    _damage(folder, damage)
    if damage != "folder deleted":
        await learner.activations()  # must not raise, whatever it makes of the damage
    for number in range(500):  # what is open goes on for a while on what it remembers, until it meets the damage
        await server.put_exchange(f"again-{number}", "y" * 1000)
    await server.activated(2, 2.0)
    assert await server.get_exchange("again-499") == "y" * 1000
    assert (await server.activations())[2] == (await learner.activations())[2] == 2.0
    with closing(sqlite3.connect(folder / "server.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    await server.close()
    await learner.close()


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


async def test_without_a_place_to_write_it_goes_on_says_so_once_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "board").write_text("a file where the folder should be")
    board = SqliteBoard(tmp_path / "board" / "server.db", tmp_path / "board" / "learner.db")
    for _ in range(3):
        await board.put_exchange("reply", "{}")
        assert await board.get_exchange("reply") is None
        assert (await board.continue_conversation("ann", chat("hi", "hello", "more"))).turn == 0
        assert await board.story("fb-1") == []
        assert await board.activations() == {}
    assert caplog.text.count("going on without it") == 1
    (tmp_path / "board").unlink()
    await board.put_exchange("reply", "{}")
    assert await board.get_exchange("reply") == "{}"
    await board.close()


def test_a_full_disk_loses_what_did_not_fit_and_nothing_else(tmp_path: Path) -> None:
    code = """
import asyncio, resource, sys
from pathlib import Path
from feedback.sqlite_board import SqliteBoard

async def main():
    board = SqliteBoard(Path(sys.argv[1]) / "server.db", Path(sys.argv[1]) / "learner.db")
    await board.put_exchange("before", "{}")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # from here on the disk is as good as full
    for number in range(20):
        await board.put_exchange(f"large-{number}", "x" * 60_000)
        assert await board.get_exchange("before") == "{}"
    assert await board.get_exchange("large-19") is None
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    await board.put_exchange("after", "x" * 60_000)
    assert await board.get_exchange("before") == "{}"
    assert await board.get_exchange("after") == "x" * 60_000
    await board.close()

asyncio.run(main())
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("going on without it") == 1


async def test_a_mistake_of_ours_is_not_taken_for_damage(server: SqliteBoard) -> None:
    await server.put_exchange("reply", "{}")
    with pytest.raises(Exception, match="type 'dict' is not supported"):
        await server.put_exchange("reply", {})  # type: ignore[arg-type]
    assert await server.get_exchange("reply") == "{}"


async def test_open_board_gives_each_process_its_side(tmp_path: Path) -> None:
    config = FeedbackConfig(data=tmp_path)
    server, learner = open_board(config, "server"), open_board(config, "learner")
    await server.activated(1, 1.0)
    await learner.set_report("policy", "{}")
    assert await learner.activations() == {1: 1.0}
    assert await server.report("policy") == "{}"
    assert sorted(path.name for path in (tmp_path / "board").glob("*.db")) == ["learner.db", "server.db"]
    await server.close()
    await learner.close()


async def test_a_new_file_has_forgotten_what_was_told(server: SqliteBoard, tmp_path: Path) -> None:
    await server.begin_epoch()
    await server.write_story("fb-1", [Story("joined", 1.0)])
    _remove(*(tmp_path / "board").glob("server.db*"))
    assert await server.forgot()
    assert await server.steps("fb-1") == []
