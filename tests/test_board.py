"""The board: what processes show each other, the same whichever implementation keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from feedback.board import STATUSES, WORK_HINT, Board, Receipt, Story, furthest, open_board
from feedback.config import FeedbackConfig
from feedback.conversations import Place
from feedback.events import Message

if TYPE_CHECKING:
    from tests.valkey import Valkey

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """HEED_REDIS_URL of the boards under test."""
    if request.param == "sqlite":
        return None
    valkey: Valkey = request.getfixturevalue("valkey")
    monkeypatch.setattr("feedback.redis_board.TIMEOUT_S", 10.0)  # here, no test may hang on how busy the machine is
    return valkey.url


@pytest.fixture
async def opened(tmp_path: Path, url: str | None) -> AsyncIterator[Callable[..., Board]]:
    """Open a board of one of two processes, and close it when the test ends."""
    boards: list[Board] = []

    def open_one(owner: str, policy: str = "default") -> Board:
        config = FeedbackConfig(data=tmp_path, redis_url=url, policy=policy)
        boards.append(open_board(config, owner))  # type: ignore[arg-type]
        return boards[-1]

    yield open_one
    for board in boards:
        await board.close()


@pytest.fixture
async def server(opened: Callable[..., Board]) -> Board:
    return opened("server")


@pytest.fixture
async def learner(opened: Callable[..., Board]) -> Board:
    return opened("learner")


def chat(*said: str, system: str | None = None) -> list[Message]:
    """Messages of user and assistant in turn."""
    first = [Message(role="system", content=system)] if system else []
    roles = ("user", "assistant")
    return first + [Message(role=roles[index % 2], content=text) for index, text in enumerate(said)]  # type: ignore[arg-type]


async def turn(
    board: Board, messages: Sequence[Message], *replies: str, caller: str = "ann", name: str | None = None
) -> Place:
    """One served turn with these choices."""
    place = await board.continue_conversation(caller, messages, name)
    for reply in replies:
        await board.remember_exchange(caller, messages, reply, place)
    return place


async def test_a_prompt_that_continues_an_exchange_is_the_next_turn_of_its_conversation(server: Board) -> None:
    first = await turn(server, chat("hi"), "hello")
    second = await turn(server, chat("hi", "hello", "how are you?"), "well")
    third = await turn(server, chat("hi", "hello", "how are you?", "well", "good"), "yes")
    assert [place.turn for place in (first, second, third)] == [0, 1, 2]
    assert {place.conversation for place in (first, second, third)} == {first.conversation}


async def test_what_continues_nothing_is_a_conversation_of_its_own(server: Board) -> None:
    first = await turn(server, chat("hi"), "hello")
    assert (await turn(server, chat("hi"), "hello")).conversation != first.conversation
    foreign = await server.continue_conversation("ann", chat("hi", "said elsewhere", "and now?"))
    assert foreign.turn == 0
    assert foreign.conversation != first.conversation


async def test_callers_do_not_continue_each_other_s_conversations(server: Board) -> None:
    first = await turn(server, chat("hi"), "hello")
    other = await server.continue_conversation("bob", chat("hi", "hello", "more"))
    assert other.turn == 0
    assert other.conversation != first.conversation


async def test_any_choice_may_be_continued_and_regenerating_is_the_same_turn(server: Board) -> None:
    first = await turn(server, chat("hi"), "hello", "good day")
    for reply in ("hello", "good day"):
        assert await turn(server, chat("hi", reply, "more"), "fine") == Place(first.conversation, 1)
        assert await turn(server, chat("hi", reply, "more"), "better") == Place(first.conversation, 1)


async def test_the_system_message_may_change_and_outer_white_space_too(server: Board) -> None:
    first = await turn(server, chat("hi", system="It is 12:00."), " hello\n")
    assert await turn(server, chat("hi", "hello", "more", system="It is 12:01.")) == Place(first.conversation, 1)


async def test_a_named_conversation_counts_its_turns_whatever_the_client_sends_of_it(server: Board) -> None:
    assert await turn(server, chat("one"), "1", name="talk") == Place("talk", 0)
    assert await turn(server, chat("one"), "uno", name="talk") == Place("talk", 0)  # regenerated
    assert await turn(server, chat("one", "1", "two"), "2", name="talk") == Place("talk", 1)
    assert await turn(server, chat("three"), "3", name="talk") == Place("talk", 2)  # without its history
    assert await turn(server, chat("one"), "1", name="other") == Place("other", 0)
    assert await turn(server, chat("one"), "1", name="talk", caller="bob") == Place("talk", 0)


async def test_an_exchange_is_read_as_it_was_put(server: Board) -> None:
    assert await server.get_exchange("reply-1") is None
    for exchange in ('{"n":1}', '{"n":"ünï\\u0000 🙂"}', "x" * 1_000_000):
        await server.put_exchange("reply-1", exchange)
        assert await server.get_exchange("reply-1") == exchange
    assert await server.get_exchange("reply-2") is None


async def test_a_receipt_is_remembered_and_the_first_one_stays(server: Board) -> None:
    assert await server.receipt("fb-1") is None
    await server.remember_receipts([Receipt("fb-1", "thumb", "digest", 10.125)])
    await server.remember_receipts([Receipt("fb-1", "rating", "other", 20.0)])
    assert await server.receipt("fb-1") == Receipt("fb-1", "thumb", "digest", 10.125)


async def test_a_bucket_gives_what_it_holds_and_says_when_it_gives_again(server: Board) -> None:
    assert [await server.take("ann", 30) for _ in range(30)] == [0.0] * 30
    wait_s = await server.take("ann", 30)
    assert 1.5 < wait_s <= 2.0
    assert await server.take("bob", 30) == 0.0
    assert await server.take("ann", 30) <= wait_s  # being refused costs nothing


async def test_a_bucket_fills_while_time_passes(server: Board) -> None:
    for _ in range(1200):
        await server.take("ann", 1200)
    await asyncio.sleep(0.5)  # ten more
    granted = [await server.take("ann", 1200) for _ in range(40)].count(0.0)
    assert 10 <= granted < 40


async def test_an_update_asked_of_the_server_is_seen_by_the_learner(server: Board, learner: Board) -> None:
    assert await learner.update_asked() is None
    await server.ask_update(10.25)
    assert await learner.update_asked() == 10.25
    await server.ask_update(20.5)
    assert await learner.update_asked() == 20.5


async def test_the_first_activation_of_a_version_counts(server: Board, learner: Board) -> None:
    for version, at in ((1, 10.0), (2, 20.0), (1, 30.0)):
        await server.activated(version, at)
    assert await learner.activations() == await server.activations() == {1: 10.0, 2: 20.0}


async def test_a_report_of_the_learner_is_read_by_the_server(server: Board, learner: Board) -> None:
    assert await server.report("policy") is None
    await learner.set_report("policy", '{"n":1}')
    await learner.set_report("policy", '{"n":2}')
    assert await server.report("policy") == await learner.report("policy") == '{"n":2}'


async def test_a_story_is_told_from_both_processes_in_order(server: Board, learner: Board) -> None:
    await server.remember_receipts([Receipt("fb-1", "thumb", "digest", 1.0)])
    steps = [Story("in_update", 4.0, update=7), Story("joined", 2.0), Story("in_reward_model", 3.0)]
    assert await learner.write_stories({"fb-1": steps, "fb-2": []})
    await learner.write_story("fb-1", [Story("in_version", 5.0, update=7, version=3)])
    assert [step.status for step in await server.story("fb-1")] == [
        "accepted", "joined", "in_reward_model", "in_update", "in_version",
    ]  # fmt: skip
    await server.activated(3, 6.0)
    assert (await server.story("fb-1"))[-1] == Story("served", 6.0, update=7, version=3)
    assert furthest(await server.story("fb-1")) == "served"
    assert await server.story("fb-2") == []


async def test_writing_a_story_again_changes_nothing_and_a_new_step_replaces_its_like(learner: Board) -> None:
    steps = [Story("accepted", 1.0), Story("dropped", 2.0, reason="no_exchange")]
    for _ in range(3):
        await learner.write_story("fb-1", steps)
    assert await learner.story("fb-1") == steps
    await learner.write_story("fb-1", [Story("dropped", 3.0, reason="conflict")])
    assert (await learner.story("fb-1"))[-1] == Story("dropped", 3.0, reason="conflict")
    assert len(await learner.story("fb-1")) == 2


async def test_many_stories_are_written_at_once(server: Board, learner: Board) -> None:
    assert await learner.write_stories({f"fb-{number}": [Story("joined", number)] for number in range(1050)})
    for number in (0, 99, 100, 1049):
        assert await server.story(f"fb-{number}") == [Story("joined", number)]


async def test_before_the_first_epoch_all_is_forgotten_and_after_it_nothing(
    opened: Callable[..., Board], learner: Board
) -> None:
    assert await learner.forgot()
    assert await learner.begin_epoch()
    assert not await learner.forgot()
    assert not await opened("learner").forgot()  # started again


async def test_a_hint_that_nobody_gives_is_waited_for_as_long_as_was_said(learner: Board) -> None:
    begin = asyncio.get_running_loop().time()
    assert not await learner.wait_for_hint(WORK_HINT, 0.2)
    assert 0.19 < asyncio.get_running_loop().time() - begin < 0.5


async def test_many_may_use_it_at_once(server: Board, learner: Board) -> None:
    async def talk(name: int) -> None:
        for number in range(50):
            await server.put_exchange(f"{name}-{number}", f"{name} {number}")
            assert await server.get_exchange(f"{name}-{number}") == f"{name} {number}"
            await learner.write_story(f"{name}", [Story("joined", float(number))])
            assert await server.story(f"{name}") == [Story("joined", float(number))]

    await asyncio.gather(*map(talk, range(6)))


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
