"""The breaker: nobody waits in vain, one asks again, and each change is said once."""

from __future__ import annotations

import pytest

from feedback.breaker import FAILURES, REST_S, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("It", clock)


def fail(breaker: Breaker, times: int = FAILURES) -> None:
    for _ in range(times):
        assert breaker.may_ask()
        breaker.failed(OSError("gone"))


def test_failures_in_a_row_and_only_those_stop_the_asking(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    breaker.answered(wrote=False)
    fail(breaker, FAILURES - 1)
    assert breaker.may_ask()
    breaker.failed(OSError("gone"))
    assert not breaker.may_ask()


def test_after_a_rest_one_asks_and_the_others_wait_for_how_that_ends(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += REST_S
    assert [breaker.may_ask() for _ in range(3)] == [True, False, False]
    breaker.failed(OSError("still gone"))
    assert not breaker.may_ask()
    clock.now += REST_S
    assert [breaker.may_ask() for _ in range(3)] == [True, False, False]
    breaker.answered(wrote=False)
    assert [breaker.may_ask() for _ in range(3)] == [True, True, True]


def test_one_who_asks_again_and_gives_up_makes_way_for_another(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += REST_S
    assert breaker.may_ask()
    breaker.gave_up()
    assert breaker.may_ask()


def test_going_and_coming_back_are_one_line_each(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fail(breaker)
    for _ in range(5):
        clock.now += REST_S
        fail(breaker, 1)
    clock.now += REST_S
    assert breaker.may_ask()
    breaker.answered(wrote=False)
    breaker.answered(wrote=True)
    assert caplog.messages == ["It is away (gone): going on without it, asking again every 1 s", "It is back"]


def test_one_that_refuses_is_asked_on_and_is_well_once_it_keeps_things_again(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for _ in range(10):
        assert breaker.may_ask()
        breaker.refused(ValueError("full"))
        breaker.answered(wrote=False)
        breaker.answered(wrote=True)  # another may fit
    clock.now += 2 * REST_S
    breaker.answered(wrote=False)
    assert caplog.messages == ["It refuses what it is asked for (full): going on without"]
    breaker.answered(wrote=True)
    assert caplog.messages[1:] == ["It refuses nothing any more"]


def test_what_it_was_to_keep_is_in_no_line(breaker: Breaker, caplog: pytest.LogCaptureFixture) -> None:
    breaker.refused(ValueError("unknown command 'SET', with args beginning with: 'a key' 'what a person said' "))
    assert caplog.messages == ["It refuses what it is asked for (unknown command 'SET'): going on without"]


def test_an_answer_to_what_was_asked_before_it_went_does_not_bring_it_back(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    assert breaker.may_ask()  # and this one is slow
    for _ in range(FAILURES):
        breaker.failed(OSError("gone"))
    breaker.answered(wrote=False)
    assert not breaker.may_ask()
    clock.now += REST_S
    assert breaker.may_ask()
    breaker.answered(wrote=False)
    assert breaker.may_ask()
    assert [line.partition(" (")[0] for line in caplog.messages] == ["It is away", "It is back"]
