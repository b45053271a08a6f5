"""The board in Redis: what it does when Redis is slow, full, cut off, restarted or gone. What it does else: test_board.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from feedback import redis_board
from feedback.board import RELEASE_HINT, WORK_HINT, Receipt, Story
from feedback.breaker import REST_S
from feedback.redis_board import CONNECTIONS, RedisBoard
from tests.test_board import chat, turn
from tests.valkey import Valkey, free_port

pytestmark = pytest.mark.anyio

SOON_S = 0.25
"""Every call is back by then, whatever Redis does."""

CALLS: dict[str, tuple[Callable[[RedisBoard], Awaitable[Any]], Any]] = {
    "place": (lambda board: board.place([b"digest"]), None),
    "remember_exchange": (lambda board: turn(board, chat("hi"), "hello", name="talk"), None),
    "put_exchange": (lambda board: board.put_exchange("reply", "{}"), None),
    "get_exchange": (lambda board: board.get_exchange("reply"), None),
    "remember_receipts": (lambda board: board.remember_receipts([Receipt("fb", "thumb", "digest", 1.0)]), None),
    "receipt": (lambda board: board.receipt("fb"), None),
    "take": (lambda board: board.take("ann", 1000), 0.0),
    "ask_update": (lambda board: board.ask_update(1.0), None),
    "update_asked": (lambda board: board.update_asked(), None),
    "activations": (lambda board: board.activations(), {}),
    "write_stories": (lambda board: board.write_stories({"fb": [Story("joined", 1.0)]}), False),
    "story": (lambda board: board.story("fb"), []),
    "report": (lambda board: board.report("policy"), None),
    "forgot": (lambda board: board.forgot(), False),
    "begin_epoch": (lambda board: board.begin_epoch(), False),
    "hint": (lambda board: board.hint(WORK_HINT), None),
    "wait_for_hint": (lambda board: board.wait_for_hint(WORK_HINT, 0.01), False),
}
"""Each with what it answers while Redis is away."""


@pytest.fixture
async def opened(valkey: Valkey) -> AsyncIterator[Callable[..., RedisBoard]]:
    """Open boards as processes of one policy do."""
    boards: list[RedisBoard] = []

    def open_one(url: str = valkey.url, policy: str = "default") -> RedisBoard:
        boards.append(RedisBoard(url, policy))
        return boards[-1]

    yield open_one
    for board in boards:
        await board.close()


@pytest.fixture
async def board(opened: Callable[..., RedisBoard]) -> RedisBoard:
    return opened()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not of the time bound, on machines that are busy."""
    monkeypatch.setattr(redis_board, "TIMEOUT_S", 10.0)


async def until(true: Callable[[], Awaitable[object]], seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while not await true():
        assert time.monotonic() < give_up, "it never became true"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("trouble", ["paused", "killed", "never there"])
async def test_every_call_is_back_soon_with_nothing_known(
    opened: Callable[..., RedisBoard], valkey: Valkey, trouble: str
) -> None:
    for name, (call, expected) in CALLS.items():
        board = opened(f"redis://127.0.0.1:{free_port()}") if trouble == "never there" else opened()
        if trouble != "never there":
            await board.get_exchange("reply")  # connects
        if trouble == "paused":
            valkey.pause()
        elif trouble == "killed":
            valkey.kill()
        begin = time.monotonic()
        answer = await call(board)
        assert time.monotonic() - begin < SOON_S, name
        if name != "remember_exchange":
            assert answer == expected, name
        valkey.make_well()


async def test_one_that_is_away_is_said_once_asked_seldom_and_noticed_when_it_is_back(
    board: RedisBoard, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "feedback")
    await board.put_exchange("reply", "{}")
    valkey.pause()
    begin = time.monotonic()
    for _ in range(200):
        assert await board.get_exchange("reply") is None
    assert time.monotonic() - begin < 3 * SOON_S
    valkey.resume()
    await asyncio.sleep(REST_S)
    await until(lambda: board.get_exchange("reply"))
    assert caplog.messages == [
        "Redis is away (no answer within 50 ms): going on without it, asking again every 1 s",
        "Redis is back",
    ]


async def test_while_it_is_away_one_asks_and_the_others_are_answered_at_once(board: RedisBoard, valkey: Valkey) -> None:
    valkey.pause()
    await asyncio.gather(*(board.get_exchange("reply") for _ in range(10)))
    await asyncio.sleep(REST_S)
    begin = time.monotonic()
    prober = asyncio.create_task(board.get_exchange("reply"))
    await asyncio.sleep(0)
    for _ in range(100):
        assert await board.get_exchange("reply") is None
    assert not prober.done(), f"after {time.monotonic() - begin:.3f} s"
    assert await prober is None


async def test_one_who_asked_again_and_gave_up_keeps_nobody_else_from_asking(board: RedisBoard, valkey: Valkey) -> None:
    await board.put_exchange("reply", "{}")
    valkey.pause()
    await asyncio.gather(*(board.get_exchange("reply") for _ in range(3)))
    await asyncio.sleep(REST_S)
    prober = asyncio.create_task(board.get_exchange("reply"))
    await asyncio.sleep(0.01)
    prober.cancel()
    await asyncio.wait([prober])
    valkey.resume()
    await until(lambda: board.get_exchange("reply"))


async def test_while_it_is_away_each_server_counts_by_itself(opened: Callable[..., RedisBoard], valkey: Valkey) -> None:
    one, two = opened(), opened()
    assert [await one.take("ann", 2), await two.take("ann", 2)] == [0.0, 0.0]
    assert await one.take("ann", 2) > 25  # they share
    valkey.kill()
    for board in (one, two):
        assert [await board.take("ann", 2) for _ in range(2)] == [0.0, 0.0]
        assert await board.take("ann", 2) > 25


@pytest.mark.usefixtures("patient")
async def test_a_full_redis_is_read_and_its_refusals_are_said_once(
    board: RedisBoard, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "feedback")
    await board.put_exchange("before", "{}")
    valkey.fill()
    for number in range(20):
        await board.put_exchange("after", f"what somebody said {number}")
        assert await board.get_exchange("before") == "{}"
        assert await board.get_exchange("after") is None
        assert not await board.write_stories({"fb": [Story("joined", 1.0)]})
        assert await board.take("ann", 1000) == 0.0
    [line] = caplog.messages
    assert line.startswith("Redis refuses what it is asked for (")
    assert "maxmemory" in line
    assert "what somebody said" not in line
    valkey.make_room()
    await asyncio.sleep(REST_S)
    await board.put_exchange("after", "{}")
    assert await board.get_exchange("after") == "{}"
    assert caplog.messages[1:] == ["Redis refuses nothing any more"]


async def test_killed_and_started_again_in_the_midst_of_traffic(board: RedisBoard, valkey: Valkey) -> None:
    longest = 0.0
    right = wrong = 0
    stopping = asyncio.Event()

    async def talk(name: int) -> None:
        nonlocal longest, right, wrong
        number = 0
        while not stopping.is_set():
            number += 1
            for call in (board.put_exchange(f"{name}", f"{name} {number}"), board.get_exchange(f"{name}")):
                begin = time.monotonic()
                found = await call
                longest = max(longest, time.monotonic() - begin)
            right += found == f"{name} {number}"
            wrong += found is not None and not found.startswith(f"{name} ")
            await asyncio.sleep(0.005)

    talking = [asyncio.create_task(talk(name)) for name in range(30)]
    for _ in range(2):
        await asyncio.sleep(0.3)
        await asyncio.to_thread(valkey.kill)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(valkey.start)
        before = right
        await asyncio.sleep(REST_S)
        await until(lambda before=before: _later(right > before))
    stopping.set()
    await asyncio.gather(*talking)
    assert wrong == 0
    assert longest < 2 * SOON_S  # thirty of them on a busy machine


async def _later(true: bool) -> bool:
    return true


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("loss", ["flush", "restart"])
async def test_one_that_lost_what_it_was_told_says_so_once(board: RedisBoard, valkey: Valkey, loss: str) -> None:
    assert await board.begin_epoch()
    assert not await board.forgot()
    if loss == "flush":
        valkey.flush()
    else:
        valkey.kill()
        valkey.start()
    await until(board.forgot)  # the first call may be the one that finds the connection broken
    assert await board.begin_epoch()
    assert not await board.forgot()


@pytest.mark.usefixtures("patient")
async def test_one_that_was_started_again_with_what_it_had_saved_may_lack_the_newest(
    board: RedisBoard, valkey: Valkey
) -> None:
    await board.begin_epoch()
    valkey.command("SAVE")
    await board.write_story("fb", [Story("joined", 1.0)])
    valkey.kill()
    valkey.start()
    assert valkey.command("GET", "heed:default:epoch")
    assert await board.story("fb") == []
    assert await board.forgot()
    (valkey.folder / "dump.rdb").unlink()


@pytest.mark.usefixtures("patient")
async def test_activations_are_told_again_by_whoever_knows_them(
    opened: Callable[..., RedisBoard], valkey: Valkey
) -> None:
    server, learner = opened(), opened()
    await server.activated(1, 10.0)
    assert await learner.activations() == {1: 10.0}
    valkey.flush()
    await server.activated(2, 20.0)
    assert await learner.activations() == {1: 10.0, 2: 20.0}
    assert await opened().activations() == {1: 10.0, 2: 20.0}
    valkey.flush()
    await opened().activated(1, 30.0)  # a server that was started after the loss
    assert await server.activations() == {1: 10.0, 2: 20.0}
    assert await opened().activations() == {1: 10.0, 2: 20.0}


async def test_an_activation_while_it_is_away_is_noted_as_soon_as_it_is_back(
    opened: Callable[..., RedisBoard], board: RedisBoard, valkey: Valkey
) -> None:
    valkey.kill()
    await board.activated(1, 10.0)
    assert await board.activations() == {1: 10.0}
    valkey.start()
    await until(board.begin_epoch)  # any call
    other = opened()
    await until(lambda: other.activations())
    assert await other.activations() == {1: 10.0}


@pytest.mark.usefixtures("patient")
async def test_one_who_gives_up_leaves_no_answer_to_the_next(board: RedisBoard, valkey: Valkey) -> None:
    for number in range(50):
        await board.put_exchange(f"{number}", f"{number}")
        await board.write_story(f"{number}", [Story("joined", float(number))])
    for wait_s in (0.0, 0.001, 0.01):
        valkey.pause()
        asking = [
            asyncio.create_task(one)
            for number in range(50)
            for one in (board.get_exchange(f"{number}"), board.steps(f"{number}"), board.put_exchange("x", "y"))
        ]
        await asyncio.sleep(wait_s)
        for one in asking:
            one.cancel()
        assert {type(one) for one in await asyncio.gather(*asking, return_exceptions=True)} == {asyncio.CancelledError}
        valkey.resume()
        for number in range(50):
            assert await board.get_exchange(f"{number}") == f"{number}"
            assert await board.steps(f"{number}") == [Story("joined", float(number))]


async def test_an_answer_that_came_too_late_is_nobody_s(board: RedisBoard, valkey: Valkey) -> None:
    await board.put_exchange("a", "of a")
    await board.put_exchange("b", "of b")
    valkey.pause()
    assert await asyncio.gather(board.get_exchange("a"), board.get_exchange("a")) == [None, None]
    valkey.resume()
    await until(lambda: board.get_exchange("b"))
    for _ in range(20):
        assert await board.get_exchange("b") in ("of b", None)


@pytest.mark.usefixtures("patient")
async def test_a_connection_cut_in_the_middle_of_an_answer_costs_that_answer(
    opened: Callable[..., RedisBoard], valkey: Valkey
) -> None:
    board = opened()
    await board.put_exchange("a", "of a" * 1000)
    async with _cutting(valkey, after=1000) as url:
        cut = opened(url)
        assert await cut.get_exchange("a") is None
        assert await cut.get_exchange("b") is None
    assert await board.get_exchange("a") == "of a" * 1000


class _cutting:  # noqa: N801 (reads as what it does)
    """A way to Redis that breaks off after so many bytes of what comes back."""

    def __init__(self, valkey: Valkey, after: int) -> None:
        self._valkey, self._after = valkey, after

    async def __aenter__(self) -> str:
        self._passing: list[asyncio.Task[None]] = []
        self._server = await asyncio.start_server(self._begin, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._passing.append(asyncio.create_task(self._pass(reader, writer)))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", self._valkey.port)
        left = self._after

        async def send() -> None:
            while data := await reader.read(65536):
                forth.write(data)

        sending = asyncio.create_task(send())
        try:
            while left and (data := await back.read(left)):
                writer.write(data)
                left -= len(data)
        finally:
            sending.cancel()
            for end in (writer, forth):
                end.close()
                await end.wait_closed()


@pytest.mark.usefixtures("patient")
async def test_connections_are_bounded_however_many_ask(board: RedisBoard, valkey: Valkey) -> None:
    await board.put_exchange("reply", "{}")
    assert set(await asyncio.gather(*(board.get_exchange("reply") for _ in range(500)))) == {"{}"}
    assert len(valkey.command("CLIENT", "LIST", "TYPE", "normal").splitlines()) <= CONNECTIONS + 1


@pytest.mark.usefixtures("patient")
async def test_all_that_grows_expires(board: RedisBoard, valkey: Valkey) -> None:
    for name in ("remember_exchange", "put_exchange", "remember_receipts", "take", "write_stories"):
        await CALLS[name][0](board)
    keys = valkey.command("KEYS", "*")
    assert {key.split(":")[2] for key in keys} == {"turn", "exchange", "receipt", "quota", "story"}
    for key in keys:
        assert 0 < valkey.command("PTTL", key) <= 30 * 86_400_000, key


@pytest.mark.usefixtures("patient")
async def test_policies_share_callers_and_replies_and_nothing_else(opened: Callable[..., RedisBoard]) -> None:
    one, other = opened(policy="one"), opened(policy="other")
    await one.put_exchange("reply", "{}")
    await one.take("ann", 1)
    assert await other.get_exchange("reply") == "{}"
    assert await other.take("ann", 1) > 50
    await one.set_report("policy", "{}")
    await one.activated(1, 1.0)
    await one.begin_epoch()
    await one.ask_update(1.0)
    assert await other.report("policy") is None
    assert await other.activations() == {}
    assert await other.forgot()
    assert await other.update_asked() is None


@pytest.mark.usefixtures("patient")
async def test_a_hint_wakes_those_who_wait_for_it_at_once(opened: Callable[..., RedisBoard]) -> None:
    server, another, learner, stranger = opened(), opened(), opened(), opened(policy="other")
    waiting = [asyncio.create_task(one.wait_for_hint(RELEASE_HINT, 20)) for one in (server, another)]
    others = [
        asyncio.create_task(one.wait_for_hint(name, 0.5))
        for one, name in ((learner, WORK_HINT), (stranger, RELEASE_HINT))
    ]
    await asyncio.sleep(0.2)
    begin = time.monotonic()
    await learner.hint(RELEASE_HINT)
    assert await asyncio.gather(*waiting) == [True, True]
    assert time.monotonic() - begin < 5
    assert await asyncio.gather(*others) == [False, False]


@pytest.mark.usefixtures("patient")
async def test_hints_that_came_since_the_last_wait_count_as_one(opened: Callable[..., RedisBoard]) -> None:
    server, learner = opened(), opened()
    assert not await learner.wait_for_hint(WORK_HINT, 0.1)
    for _ in range(100):
        await server.hint(WORK_HINT)
    await asyncio.sleep(0.1)
    assert await learner.wait_for_hint(WORK_HINT, 5)
    assert not await learner.wait_for_hint(WORK_HINT, 0.1)


@pytest.mark.usefixtures("patient")
async def test_who_waits_for_hints_outlives_a_restart(opened: Callable[..., RedisBoard], valkey: Valkey) -> None:
    server, learner = opened(), opened()
    for restart in (valkey.drop_clients, lambda: (valkey.kill(), valkey.start())):
        waiting = asyncio.create_task(learner.wait_for_hint(WORK_HINT, 0.5))
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        restart()
        assert not await waiting  # as long as was said, though the connection is gone
        assert time.monotonic() - begin > 0.3
        assert not await learner.wait_for_hint(WORK_HINT, 0.1)
        await until(lambda: _hinted(server, learner))


async def _hinted(server: RedisBoard, learner: RedisBoard) -> bool:
    await server.hint(WORK_HINT)
    return await learner.wait_for_hint(WORK_HINT, 0.2)


@pytest.mark.usefixtures("patient")
async def test_what_another_program_wrote_under_our_names_is_not_known(board: RedisBoard, valkey: Valkey) -> None:
    for key in ("heed::receipt:fb", "heed::exchange:reply", "heed::turn:" + b"digest".hex()):
        valkey.command("HSET", key, "a", "b")
    valkey.command("HSET", "heed::story:fb", "joined", "no JSON")
    valkey.command("SET", "heed:default:activations", "x")
    for name in ("place", "get_exchange", "receipt", "activations", "story", "report"):
        call, expected = CALLS[name]
        assert await call(board) == expected, name
    valkey.command("DEL", "heed::receipt:fb")
    valkey.command("SET", "heed::receipt:fb", '["too", "few"]')
    assert await board.receipt("fb") is None


@pytest.mark.usefixtures("patient")
async def test_through_a_unix_socket_too(opened: Callable[..., RedisBoard], valkey: Valkey) -> None:
    board = opened(valkey.socket_url)
    await board.put_exchange("reply", "{}")
    assert await opened().get_exchange("reply") == "{}"


@pytest.mark.usefixtures("patient")
async def test_a_wrong_password_is_told_without_the_password(
    opened: Callable[..., RedisBoard], valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    board = opened(f"redis://:correct-horse@127.0.0.1:{valkey.port}")
    for _ in range(3):
        assert await board.get_exchange("reply") is None
    assert "AUTH" in caplog.text
    assert "correct-horse" not in caplog.text
