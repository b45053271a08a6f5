"""The engine: log-probs as a plain forward gives them, versions that never mix, and rows that are always given back."""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import logging
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import steps as steps_module
from serving.engine import (
    Engine,
    Event,
    Finished,
    NoFreeSlot,
    ProbeFailed,
    PromptTooLong,
    QueueFull,
    Request,
    Sampling,
    Stream,
    Token,
    UnknownVersion,
    VersionInUse,
)
from serving.lora import AdapterWeights, target_modules
from serving.model import ModelError
from serving.native import one_thread
from serving.sampling import RowSampling, sample
from tests import bases, tape

MODEL = bases.llama()
CHAT = bases.chat()
ADAPTERS = {version: bases.adapter(MODEL, seed=version) for version in (1, 2, 3)}
ORACLES = {0: MODEL} | {v: bases.with_peft(copy.deepcopy(MODEL), w) for v, w in ADAPTERS.items()}
PROMPT = (5, 6, 7, 8)


WAY = {"native": True}


@pytest.fixture(params=["native", "torch", "recorded"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test is run with the native step, where there is a compiler; with torch's operations; and with these
    recorded, as on a GPU."""
    WAY["native"] = request.param == "native"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "recorded":
            patch.setattr("serving.forward.recorder", tape.recorder)
        yield


@contextmanager
def an_engine(*, versions: tuple[int, ...] = (), started: bool = False, **settings: Any) -> Iterator[Engine]:
    """As the server has it: products laid out, prefixes remembered (few, so that they give way to others)."""
    chosen = {"rows": 4, "max_len": 96, "seed": 0, "packed": True, "prefix_tokens": 192} | WAY | settings
    engine = Engine(MODEL, CHAT, **chosen)
    try:
        for version in versions:
            engine.stage(version, ADAPTERS[version])
        if started:
            engine.start()
        yield engine
    finally:
        engine.close()


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(3, 320) for _ in range(length))


def request(which: int = 0, *, length: int = 6, version: int | None = None, caller: str = "", **how: Any) -> Request:
    """A request for a random prompt, by default with a seed of the same number."""
    chosen = {"max_tokens": 12, "seed": which, "ignore_eos": True} | how
    return Request(prompt(which, length), Sampling(**chosen), version, caller)


def check(finished: Finished) -> None:
    """The log-probs are those of one plain forward of that version over the whole text."""
    expected = bases.logprobs_of(ORACLES[finished.version], finished.prompt_ids, finished.reply_ids)
    assert finished.raw_logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def is_idle(engine: Engine) -> bool:
    """Nothing runs, nothing waits, nobody holds a version, and the free rows are blank."""
    memory = engine._forward.kv._blocks[0][:, :, :, : engine._forward.kv._zeroed]
    stats = engine.stats()
    return (
        stats.running == stats.waiting == stats.kv_used == 0
        and not any(engine.loaded().values())
        and not memory.any().item()
    )


# What the learner trains on is what was served.


@pytest.mark.parametrize("share", [4, 17, 2048])
def test_logprobs_are_those_of_a_plain_forward(monkeypatch: pytest.MonkeyPatch, share: int):
    """Versions mixed in one batch, prompts read in pieces, more requests than rows."""
    monkeypatch.setattr(steps_module, "PROMPT_TOKENS_A_STEP_UNHEARD", share)
    with an_engine(versions=(1, 2, 3)) as engine:
        requests = [
            request(
                i, length=1 + 5 * i % 43, version=i % 4, max_tokens=1 + i * 7 % 30, temperature=(1.0, 0.6, 0.0)[i % 3]
            )
            for i in range(14)
        ]
        for asked, finished in zip(requests, engine.generate(requests), strict=True):
            assert (finished.reason, finished.version) == ("length", asked.version)
            assert finished.prompt_ids == asked.prompt_ids
            assert len(finished.reply_ids) == asked.sampling.max_tokens
            check(finished)
        assert is_idle(engine)


def test_processed_logprobs_are_those_of_the_distribution_drawn_from():
    with an_engine() as engine:
        plain, sharp, greedy, cut = engine.generate(
            [request(1), request(1, temperature=0.5), request(1, temperature=0), request(1, top_k=1)]
        )
    assert plain.logprobs == plain.raw_logprobs
    assert sharp.logprobs != sharp.raw_logprobs
    assert set(greedy.logprobs) == {0.0}
    assert cut.reply_ids == greedy.reply_ids
    assert cut.logprobs == pytest.approx([0.0] * 12, abs=1e-6)


def test_the_end_of_sequence_is_part_of_the_reply_but_not_of_its_text():
    with an_engine() as engine:
        finished = next(
            f
            for f in engine.generate([request(i, ignore_eos=False, max_tokens=80, temperature=2.0) for i in range(60)])
            if f.reason == "stop"
        )
        ignored = engine.generate([Request(finished.prompt_ids, Sampling(max_tokens=5, ignore_eos=True))])[0]
    assert finished.reply_ids[-1] in CHAT.eos_ids
    assert not set(finished.reply_ids[:-1]) & CHAT.eos_ids
    assert len(finished.logprobs) == len(finished.raw_logprobs) == len(finished.reply_ids)
    assert finished.text == CHAT.decode(finished.reply_ids[:-1])
    check(finished)
    assert len(ignored.reply_ids) == 5


def test_a_seed_gives_the_same_reply_whatever_else_is_in_the_batch():
    with an_engine(versions=(1, 2)) as engine:
        alone = [engine.generate([request(i, version=i % 3)])[0] for i in range(6)]
        crowd = [request(100 + i, length=1 + i * 3, version=i % 3) for i in range(9)]
        together = engine.generate([*crowd[:4], *(request(i, version=i % 3) for i in range(6)), *crowd[4:]])[4:10]
        assert [f.reply_ids for f in together] == [f.reply_ids for f in alone]
        unseeded = engine.generate([request(0, seed=None) for _ in range(4)])
    assert len({f.reply_ids for f in unseeded}) > 1


def test_replies_to_one_prompt_read_it_once():
    with an_engine(versions=(1,)) as engine:
        same = [request(7, length=20, seed=i) for i in range(3)]
        finished = engine.generate([*same, request(7, length=20, version=1)])
        assert engine.stats().prompt_tokens == 40
        for one in finished:
            check(one)
        assert len({f.reply_ids for f in finished}) == 4
        assert [f.reply_ids for f in finished[:3]] == [engine.generate([r])[0].reply_ids for r in same]
        assert is_idle(engine)


# Versions.


def test_the_next_turn_of_a_conversation_reads_only_what_is_new():
    with an_engine(versions=(1,), prefix_tokens=512) as engine:
        (first,) = engine.generate([request(0, length=40, version=1)])
        turn = (*first.prompt_ids, *first.reply_ids, 5, 6, 7)
        (second,) = engine.generate([Request(turn, Sampling(max_tokens=8, seed=1, ignore_eos=True), 1)])
        check(second)
        stats = engine.stats()
        assert (stats.prefix_tokens, stats.prompt_tokens) == (48, 40 + len(turn) - 48)
        assert is_idle(engine)


@pytest.mark.parametrize("prefix_tokens", [0, 512])
def test_another_version_says_what_a_cold_server_says(prefix_tokens: int):
    asked = [request(i, length=50) for i in range(3)]
    with an_engine(versions=(1, 2), prefix_tokens=prefix_tokens) as engine:
        for version in (0, 1):
            engine.activate(version)
            engine.generate(asked)
        engine.activate(2)
        warm = engine.generate(asked)
        engine.activate(0)
        engine.restage(2, ADAPTERS[3])
        engine.activate(2)
        anew = engine.generate(asked)
    for replies, weights in ((warm, ADAPTERS[2]), (anew, ADAPTERS[3])):
        with an_engine(prefix_tokens=prefix_tokens) as cold:
            cold.stage(2, weights)
            cold.activate(2)
            assert [reply.reply_ids for reply in replies] == [reply.reply_ids for reply in cold.generate(asked)]


@pytest.mark.parametrize("started", [True, False])
def test_a_version_is_warmed_with_what_prompts_begin_with(started: bool):
    shared = prompt(7, 40)
    with an_engine(versions=(1,), prefix_tokens=512, started=started) as engine:
        engine.warm(1)  # nothing is known yet
        for i in range(3):
            engine.submit(Request((*shared, i), Sampling(max_tokens=2))).result()
        before = engine.stats()
        assert before.prefix_tokens == 2 * 32
        engine.warm(1)
        engine.activate(1)
        reply = engine.submit(Request((*shared, 9), Sampling(max_tokens=8, seed=1, ignore_eos=True))).result()
        check(reply)
        assert (reply.version, engine.stats().prefix_tokens) == (1, 3 * 32)
        assert is_idle(engine)


def test_a_reply_keeps_its_version_through_a_swap():
    with an_engine(versions=(1,)) as engine:
        engine.activate(1)
        early = [engine.submit(request(i, max_tokens=20)) for i in range(2)]
        for _ in range(4):
            engine.step()
        engine.stage(2, ADAPTERS[2])
        engine.activate(2)
        late = [engine.submit(request(i, max_tokens=20)) for i in range(2)]
        engine.step()
        assert engine.loaded() == {0: 0, 1: 2, 2: 2}
        engine.retire(1)
        with pytest.raises(UnknownVersion, match=r"v1 is not loaded; loaded now: v0, v2"):
            engine.submit(request(version=1))
        for stream, version in zip([*early, *late], [1, 1, 2, 2], strict=True):
            assert stream.result().version == stream.version == version
            check(stream.result())
        assert engine.loaded() == {0: 0, 2: 0}


def test_a_waiting_request_gets_the_version_current_at_its_admission():
    with an_engine(versions=(1,), rows=1) as engine:
        first, second, pinned = (engine.submit(request(i, version=v)) for i, v in enumerate((None, None, 0)))
        engine.step()
        engine.activate(1)
        assert [s.result().version for s in (first, second, pinned)] == [0, 1, 0]


def test_slots_run_out_and_come_back():
    with an_engine(versions=(1, 2), slots=2) as engine:
        engine.stage(2, ADAPTERS[3])  # loaded already: nothing happens
        with pytest.raises(NoFreeSlot, match=r"v1 \(0 running\), v2"):
            engine.stage(3, ADAPTERS[3])
        stream = engine.submit(request(version=1))
        engine.retire(1)
        with pytest.raises(NoFreeSlot):
            engine.stage(3, ADAPTERS[3])
        stream.result()
        engine.stage(3, ADAPTERS[3])
        assert engine.loaded() == {0: 0, 2: 0, 3: 0}
        check(engine.generate([request(version=3)])[0])


def test_the_base_and_the_current_version_cannot_be_retired():
    with an_engine(versions=(1,)) as engine:
        engine.activate(1)
        for version in (0, 1):
            with pytest.raises(ValueError, match=f"v{version} is served now"):
                engine.retire(version)
        engine.retire(9)
        with pytest.raises(UnknownVersion, match="v9"):
            engine.activate(9)
        engine.activate(0)
        engine.retire(1)
        assert engine.loaded() == {0: 0}


def spoilt(value: float) -> AdapterWeights:
    weights = bases.adapter(MODEL, 5)
    path = target_modules(MODEL)[2]
    a, b = weights.tensors[path]
    return AdapterWeights(4, 1.0, dict(weights.tensors) | {path: (a, torch.full_like(b, value))})


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_an_adapter_without_finite_numbers_fails_its_probe(value: float):
    with an_engine(versions=(1,), slots=2) as engine:
        engine.activate(1)
        error = ProbeFailed if math.isfinite(value) else ValueError
        for _ in range(3):  # its slot is free again each time
            with pytest.raises(error, match="numbers that are not finite"):
                engine.stage(2, spoilt(value))
        assert (engine.current, engine.loaded()) == (1, {0: 0, 1: 0})
        engine.stage(2, ADAPTERS[2])
        for finished in engine.generate([request(version=1), request(version=2)]):
            check(finished)


def test_weights_that_do_not_fit_leave_the_slot_free():
    with an_engine(slots=1) as engine:
        with pytest.raises(ValueError, match="rank 17"):
            engine.stage(1, bases.adapter(MODEL, rank=17))
        engine.stage(1, ADAPTERS[1])


def test_restaging_replaces_the_weights_of_an_idle_version():
    with an_engine() as engine:
        engine.restage(1, ADAPTERS[2])
        engine.activate(1)
        engine.restage(1, ADAPTERS[1])
        check(engine.generate([request()])[0])
        stream = engine.submit(request())
        engine.step()
        with pytest.raises(VersionInUse, match="1 replies still run on version v1"):
            engine.restage(1, ADAPTERS[2])
        check(stream.result())
        with pytest.raises(ProbeFailed):
            engine.restage(1, spoilt(3e38))
        assert (engine.current, engine.loaded()) == (0, {0: 0})
        with pytest.raises(ValueError, match="v0 is the base"):
            engine.restage(0, ADAPTERS[1])


def test_nan_in_one_version_ends_its_own_replies_and_nobody_elses():
    with an_engine(versions=(1, 2)) as engine:
        requests = [request(i, version=i % 3, max_tokens=10 + i) for i in range(9)]
        clean = engine.generate(requests)
        slot = engine._versions.slot_of(2)
        engine._slots.write(slot, spoilt(3e38))  # behind the probe's back
        got = engine.generate(requests)
        for before, after in zip(clean, got, strict=True):
            if after.version == 2:
                assert (after.reason, after.error) == ("error", "the model's logits are not finite")
            else:
                assert after.reply_ids == before.reply_ids
                assert after.logprobs == pytest.approx(before.logprobs, abs=1e-5)
        engine._slots.write(slot, ADAPTERS[2])
        for finished in engine.generate(requests):  # the rows they left are clean
            check(finished)
        assert is_idle(engine)


def test_a_row_that_ends_in_nan_leaves_none_behind():
    with an_engine(versions=(1,)) as engine:
        stream = engine.submit(request(1, version=1, max_tokens=60))
        for _ in range(4):
            engine.step()
        engine._slots.write(engine._versions.slot_of(1), spoilt(3e38))
        finished = stream.result()
        assert finished.reason == "error"
        assert len(finished.reply_ids) > 0
        assert is_idle(engine)
        check(engine.generate([request(2, max_tokens=60)])[0])


# Streams.


async def collect(stream: Stream) -> list[Event]:
    events: list[Event] = []
    ended = asyncio.Event()

    def hear() -> None:
        while (event := stream.take()) is not None:
            events.append(event)
            if isinstance(event, Finished):
                ended.set()

    stream.listen(hear)
    await ended.wait()
    return events


def test_streams_say_piece_by_piece_what_the_whole_says():
    with an_engine(versions=(1,), started=True) as engine:

        async def everybody() -> list[list[Event]]:
            streams = [
                engine.submit(request(i, version=i % 2, max_tokens=30, top_logprobs=i % 3), tokens=True)
                for i in range(9)
            ]
            return await asyncio.gather(*(collect(stream) for stream in streams))

        streams = asyncio.run(everybody())
        quiet = engine.generate([request(i, version=i % 2, max_tokens=30, top_logprobs=i % 3) for i in range(9)])
    for i, (*tokens, finished) in enumerate(streams):
        assert isinstance(finished, Finished)
        assert finished == quiet[i]
        assert all(isinstance(token, Token) and len(token.top) == i % 3 for token in tokens)
        assert tuple(token.id for token in tokens) == finished.reply_ids
        assert tuple(token.logprob for token in tokens) == finished.logprobs
        assert tuple(token.raw_logprob for token in tokens) == finished.raw_logprobs
        assert "".join(token.text for token in tokens) == finished.text == CHAT.decode(finished.reply_ids)
        check(finished)


def test_a_reader_that_fails_keeps_no_other_waiting():
    complaints: list[object] = []

    async def both() -> list[Event]:
        asyncio.get_running_loop().set_exception_handler(lambda _, said: complaints.append(said["exception"]))
        bad, good = engine.submit(request(1)), engine.submit(request(2))
        bad.listen(lambda: 1 / 0)
        return await collect(good)

    with an_engine(started=True) as engine:
        assert isinstance(asyncio.run(both())[-1], Finished)
    assert complaints
    assert all(isinstance(complaint, ZeroDivisionError) for complaint in complaints)


def test_a_callback_gets_every_event_in_order():
    events: list[Event] = []
    with an_engine(started=True) as engine:
        finished = engine.submit(request(3), events.append).result(timeout=60)
    assert [type(event) for event in events] == [Token] * 12 + [Finished]
    assert events[-1] is finished


def test_a_failing_listener_ends_its_own_reply_only(caplog: pytest.LogCaptureFixture):
    def fail(_: Event) -> None:
        raise RuntimeError("no ears")

    with an_engine(started=True) as engine, caplog.at_level(logging.ERROR):
        deaf, other = engine.submit(request(1, max_tokens=60), fail), engine.submit(request(2))
        assert other.result(timeout=60).reason == "length"
        assert deaf.result(timeout=60).reason == "abort"
        assert is_idle(engine)
    assert caplog.text.count("a listener failed") == 1


def stop_case(size: int) -> tuple[Finished, str]:
    """A reply, and a stop text of this size cut out of the middle of it, across its tokens."""
    with an_engine() as engine:
        whole = engine.generate([request(4, max_tokens=80)])[0]
    found = re.search(f"(?<=..)[ -~]{{{size}}}", whole.text)
    assert found is not None
    return whole, found[0]


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("tokens", [True, False])
def test_a_reply_ends_before_a_stop_text(size: int, tokens: bool):
    whole, stop = stop_case(size)
    events: list[Event] = []
    with an_engine() as engine:
        asked = request(4, max_tokens=80, stop=("never said", stop))
        finished = engine.submit(asked, events.append, tokens=tokens).result()
        assert is_idle(engine)
    assert finished.reason == "stop"
    assert finished.text == whole.text[: whole.text.index(stop)]
    count = len(finished.reply_ids)
    assert finished.reply_ids == whole.reply_ids[:count]
    assert stop in CHAT.decode(finished.reply_ids)
    assert stop not in CHAT.decode(finished.reply_ids[:-1])
    if tokens:
        assert "".join(event.text for event in events if isinstance(event, Token)) == finished.text


def test_text_held_back_for_a_stop_text_comes_when_it_was_none():
    whole, stop = stop_case(4)
    with an_engine() as engine:
        events: list[Event] = []
        finished = engine.submit(request(4, max_tokens=80, stop=(stop + "§",)), events.append).result()
    assert finished == whole
    assert "".join(event.text for event in events if isinstance(event, Token)) == whole.text


# Limits.


def test_a_reply_ends_where_the_memory_ends():
    with an_engine(max_len=40) as engine:
        finished = engine.generate([request(1, length=30, max_tokens=500), request(2, length=39, max_tokens=500)])
        assert [(f.reason, len(f.reply_ids)) for f in finished] == [("length", 10), ("length", 1)]
        for one in finished:
            check(one)
        for length in (0, 40):
            with pytest.raises(PromptTooLong, match=f"has {length} tokens; allowed: 1 to 39"):
                engine.submit(request(length=length))


def test_the_line_is_bounded_and_generate_is_not():
    with an_engine(rows=1, max_waiting=2) as engine:
        streams = [engine.submit(request(i)) for i in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait already; allowed: 2"):
            engine.submit(request())
        assert len(engine.generate([request(i) for i in range(5)])) == 5
        assert all(stream.finished for stream in streams)


def test_callers_take_turns():
    order: list[str] = []
    with an_engine(rows=1) as engine:
        streams = [
            engine.submit(request(i, caller=caller, max_tokens=2), lambda _, c=caller: order.append(c), tokens=False)
            for i, caller in enumerate("aaaabbc")
        ]
        for stream in streams:
            stream.result()
    assert "".join(order) == "abcabaa"


def test_a_deadline_ends_a_reply_wherever_it_is():
    with an_engine(rows=1) as engine:
        running = engine.submit(
            Request(PROMPT, Sampling(max_tokens=80, ignore_eos=True), deadline=time.monotonic() + 60)
        )
        waiting = engine.submit(Request(PROMPT, deadline=time.monotonic() - 1))
        engine.step()
        finished = waiting.result()
        assert (finished.reason, finished.error, finished.reply_ids) == ("abort", "the deadline passed", ())
        assert waiting.admitted_at is None
        object.__setattr__(running.request, "deadline", time.monotonic() - 1)
        engine._scheduler._earliest_deadline = 0.0
        cut = running.result()
        assert (cut.reason, cut.error) == ("abort", "the deadline passed")
        assert len(cut.reply_ids) > 0
        check(cut)
        assert is_idle(engine)


def test_a_cancelled_reply_ends_once_with_what_it_has():
    ends: list[Event] = []
    with an_engine(rows=2, versions=(1,)) as engine:
        running = engine.submit(request(1, version=1, max_tokens=60), ends.append, tokens=False)
        reading = [engine.submit(request(2, seed=i, length=70, max_tokens=9)) for i in range(2)]
        waiting = engine.submit(request(3, version=1))
        for _ in range(3):
            engine.step()
        for stream in (running, reading[0], waiting):
            engine.cancel(stream)
            engine.cancel(stream)
        kept = reading[1].result()
        engine.cancel(running)
        engine.step()
        assert is_idle(engine)
    assert len(ends) == 1
    cut = running.result()
    assert (cut.reason, cut.error) == ("abort", "cancelled")
    assert len(cut.reply_ids) > 0
    check(cut)
    assert waiting.result().reply_ids == ()
    assert kept.reason == "length"
    check(kept)


def test_a_reply_that_read_for_others_may_leave(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps_module, "PROMPT_TOKENS_A_STEP_UNHEARD", 16)
    with an_engine(rows=4) as engine:
        same = [engine.submit(request(2, seed=i, length=70), tokens=False) for i in range(4)]
        engine.step()
        engine.cancel(same[0])
        engine.cancel(same[2])
        assert [stream.result().reason for stream in same] == ["abort", "length", "abort", "length"]
        assert engine.stats().prompt_tokens == 70
        check(same[1].result())
        check(same[3].result())
        assert is_idle(engine)


# What breaks, breaks alone.


def test_an_error_of_the_model_ends_the_replies_it_met(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with an_engine(started=True) as engine, caplog.at_level(logging.ERROR):
        right = type(engine._forward).run

        def run(self: Any, first: int, ids: Any, starts: Any, slots: Any) -> Any:
            if any(13 in row for row in ids):
                raise RuntimeError("out of memory")
            return right(self, first, ids, starts, slots)

        monkeypatch.setattr(type(engine._forward), "run", run)
        for _ in range(2):
            broken = engine.submit(Request((5, 13, 5), Sampling(max_tokens=5)))
            finished = broken.result(timeout=60)
            assert (finished.reason, finished.error) == ("error", "the model failed: RuntimeError: out of memory")
        monkeypatch.undo()
        check(engine.submit(request(1)).result(timeout=60))
        assert is_idle(engine)
    assert caplog.text.count("Traceback") == 1  # the second time in one line


def test_the_thread_outlives_a_step_that_fails(monkeypatch: pytest.MonkeyPatch):
    with an_engine(started=True) as engine:
        monkeypatch.setattr(engine._scheduler, "admit", lambda: 1 / 0)
        finished = engine.submit(request()).result(timeout=60)
        assert (finished.reason, finished.error) == ("error", "the engine failed: ZeroDivisionError: division by zero")
        monkeypatch.undo()
        check(engine.submit(request()).result(timeout=60))


@pytest.mark.parametrize("started", [True, False])
def test_closing_aborts_what_runs_and_refuses_what_comes(started: bool):
    with an_engine(started=started, rows=1) as engine:
        streams = [engine.submit(request(i, max_tokens=80)) for i in range(3)]
        engine.close()
        assert {stream.result(timeout=60).reason for stream in streams} <= {"abort", "length"}
        with pytest.raises(QueueFull, match="closed"):
            engine.submit(request())
        assert is_idle(engine)
    with an_engine() as again:  # the model is as it was
        check(again.generate([request()])[0])


def test_commands_run_between_steps_while_others_talk():
    """Stage, activate and retire from another thread; every reply is whole and of one version."""
    with an_engine(started=True, rows=4, slots=2) as engine:
        done = threading.Event()
        finished: list[Finished] = []

        def talk(seed: int) -> None:
            while not done.is_set():
                finished.append(engine.submit(request(seed, max_tokens=8)).result(timeout=60))

        talkers = [threading.Thread(target=talk, args=(i,)) for i in range(6)]
        for talker in talkers:
            talker.start()
        for i in range(12):
            version, before = 1 + i % 3, engine.current
            while True:
                try:
                    engine.stage(version, ADAPTERS[version])
                    break
                except NoFreeSlot:
                    time.sleep(0.005)
            engine.activate(version)
            if before:
                engine.retire(before)
        done.set()
        for talker in talkers:
            talker.join()
        assert is_idle(engine)
    assert {f.reason for f in finished} == {"length"}
    assert len({f.version for f in finished}) > 1
    for one in finished[:: max(1, len(finished) // 60)]:
        check(one)


def test_a_stuck_thread_is_reported(monkeypatch: pytest.MonkeyPatch):
    with an_engine(started=True) as engine:
        stuck, go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(engine._scheduler, "admit", lambda: (stuck.set(), go_on.wait(60)))
        stream = engine.submit(request())
        assert stuck.wait(60)
        with pytest.raises(TimeoutError):
            engine.stage(1, ADAPTERS[1], timeout=0.2)
        with pytest.raises(TimeoutError, match=r"no whole reply within 0\.05 s"):
            stream.result(timeout=0.05)
        monkeypatch.undo()
        go_on.set()
        stream.result(timeout=60)
        engine.stage(1, ADAPTERS[1])
        assert engine.loaded() == {0: 0, 1: 0}


# An architecture that cannot be served says so at once.


def test_a_model_that_reads_in_pieces_otherwise_than_whole_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = bases.gpt2(seed=3)
    right = type(model).forward

    @functools.wraps(right)
    def forward(self: Any, **inputs: Any) -> Any:
        return right(self, **(inputs | {"position_ids": None}))

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ModelError, match=r"gpt2 model cannot be served: read in pieces, its log-probs are .* off"):
        Engine(model, CHAT, max_len=64)


# Whatever comes and goes.

ROWS, SLOTS, LENGTH, MOST = 3, 2, 40, 12


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._forwards = itertools.count()

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        """A forward takes a millisecond."""
        return next(self._forwards) / 1000


@functools.cache
def spelled_out(prompt_ids: tuple[int, ...], sampling: Sampling, weights: int) -> tuple[list[int], list[float]]:
    """The ids that an adapter says and their log-probs, each by a plain forward over all before it."""
    ids: list[int] = []
    logprobs: list[float] = []
    while len(ids) < sampling.max_tokens and len(prompt_ids) + len(ids) < LENGTH:
        with torch.no_grad():
            logits_1TV = ORACLES[weights](input_ids=torch.tensor([[*prompt_ids, *ids]])).logits
        assert sampling.seed is not None
        drawn = sample(logits_1TV[:, -1], RowSampling([sampling], [sampling.seed]), [len(ids)])
        ids += drawn.ids
        logprobs += drawn.raw_logprobs
    return ids, logprobs


@dataclass(frozen=True)
class Wish:
    """What a crowd asks for: replies to one of two prompts, cut at some length."""

    prompt: int
    length: int
    version: int | None
    most: int
    copies: int
    stop: tuple[int, int, tuple[str, ...]]
    """Where in the reply to cut out a piece, of what length, and what to put behind it for a stop text each."""
    patience: int | None
    """Seconds until the deadline."""
    heard: bool

    def requests(self, weights: int, now: float) -> Iterator[Request]:
        """With stop texts from what these weights would say."""
        for seed in range(self.copies):
            # of two tokens each: then no draw falls so near the border between two that rounding decides
            sampling = Sampling(max_tokens=MOST, seed=seed, ignore_eos=True, top_k=2)
            ids, (start, size, behind) = prompt(self.prompt, self.length), self.stop
            whole = CHAT.decode(spelled_out(ids, sampling, weights)[0])
            letters = max(re.findall("[^�]+", whole), key=len, default="§")
            stop = tuple(letters[start % len(letters) :][:size] + more for more in behind)
            deadline = None if self.patience is None else now + self.patience
            yield Request(ids, replace(sampling, max_tokens=self.most, stop=stop), self.version, deadline=deadline)


class Crowd:
    """All who want something of an engine of which each step takes a second, and what must hold for them."""

    def __init__(self, engine: Engine, clock: Clock, patch: pytest.MonkeyPatch) -> None:
        self.engine, self.clock = engine, clock
        self.live: dict[Stream, list[Event]] = {}
        self.weights = {0: 0}
        """By version: which of the ADAPTERS it is now."""
        self.current = 0
        self.current_at: dict[float, int] = {}
        self._really_step, self._really_submit = engine.step, engine._submit
        patch.setattr(engine, "step", self._step)
        patch.setattr(engine, "_submit", self._submit)

    # what they do

    def submit(self, wish: Wish) -> None:
        version = self.current if wish.version is None else wish.version
        for request in wish.requests(self.weights.get(version, 0), self.clock.now):
            try:
                self.engine.submit(request, tokens=wish.heard)
            except UnknownVersion:
                assert version not in (0, self.current)

    def cancel(self, which: int) -> None:
        for stream in list(self.live)[which : which + 1]:
            self.engine.cancel(stream)

    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    def swap(self, version: int) -> None:
        loaded = self.engine.loaded()
        try:
            self.engine.stage(version, ADAPTERS[version])
        except NoFreeSlot:
            assert len(loaded) == SLOTS + 1
        else:
            if version not in loaded:
                self.weights[version] = version
            self.engine.activate(version)
            self.current = version

    def retire(self, version: int) -> None:
        if version != self.current:
            self.engine.retire(version)

    def restage(self, version: int, weights: int) -> None:
        loaded = self.engine.loaded()
        try:
            self.engine.restage(version, ADAPTERS[weights])
        except NoFreeSlot:
            assert version not in loaded
            assert len(loaded) == SLOTS + 1
        except VersionInUse:
            assert loaded[version] > 0
        else:
            assert not loaded.get(version)
            self.weights[version] = weights

    def warm(self, version: int) -> None:
        if version in self.engine.loaded():
            begun = self.clock.now
            with suppress(UnknownVersion):  # it is on its way out
                self.engine.warm(version, timeout=3)
            assert self.clock.now <= begun + 3 + 1

    # what must hold

    def check(self) -> None:
        """After everything that happens, and after every step of it."""
        engine, batch, stats = self.engine, self.engine._batch, self.engine.stats()
        assert engine.current == self.current
        assert stats.running + stats.waiting == len(self.live)
        assert stats.running <= ROWS
        bound = (stream.request.version if stream.version is None else stream.version for stream in self.live)
        assert Counter(engine.loaded()) == Counter(version for version in bound if version is not None)
        assert stats.kv_used <= stats.kv_capacity
        assert all(reply.used <= LENGTH for reply in batch)
        assert [reply.row for reply in batch.replies] == list(range(len(batch.replies)))
        assert all(reply.left_to_read == 0 for reply in batch.replies[: batch.decoding])
        assert all(reply.left_to_read > 0 for reply in batch.reading)
        blocks = [*engine._prefixes._free, *(block.place for block in engine._prefixes._known.values())]
        assert sorted(blocks) == list(range(engine._prefixes._capacity))

    def _submit(self, request: Request, _on_event: None, **how: bool) -> Stream:
        """The crowd's requests and, while it warms a version, the engine's own."""
        events: list[Event] = []
        stream = self._really_submit(request, events.append, **how)
        self.live[stream] = events
        return stream

    def _step(self) -> bool:
        begun = self.clock.now
        self.current_at[begun] = self.current
        unwanted = [stream for stream in self.live if stream.cancelled or is_late(stream, begun)]
        more = self._really_step()
        self.clock.now += 1
        assert all(stream.finished for stream in unwanted)
        for stream in [stream for stream in self.live if stream.finished]:
            self._judge(stream, self.live.pop(stream))
        self.check()
        return more

    def _judge(self, stream: Stream, events: list[Event]) -> None:
        """A reply is the beginning of what its version says to its prompt, and its listener heard all of it."""
        finished, request = stream.finished, stream.request
        assert finished is not None
        if stream.admitted_at is not None:
            current = self.current_at[stream.admitted_at]
            assert finished.version == (current if request.version is None else request.version)
        alone = replace(request.sampling, max_tokens=MOST, stop=())
        ids, logprobs = spelled_out(request.prompt_ids, alone, self.weights[finished.version])
        count = len(finished.reply_ids)
        assert list(finished.reply_ids) == ids[:count]
        assert finished.raw_logprobs == pytest.approx(logprobs[:count], abs=1e-4)
        if finished.reason == "stop":
            assert CHAT.decode(ids).startswith(finished.text)
        self._judge_the_end(stream, finished)
        *tokens, last = events
        assert last is finished
        assert [token.id for token in tokens] == list(finished.reply_ids if stream.tokens else ())
        if stream.tokens and finished.reason != "abort":
            assert "".join(token.text for token in tokens) == finished.text

    def _judge_the_end(self, stream: Stream, finished: Finished) -> None:
        """It ends before the first stop text, at its length or its deadline, and not one token later."""
        sampling, deadline = stream.request.sampling, stream.request.deadline
        count, text = len(finished.reply_ids), CHAT.decode(finished.reply_ids)
        stops = [text.index(stop) for stop in sampling.stop if stop in text]
        assert finished.text == text[: min(stops, default=len(text))]
        if finished.reason == "stop":
            assert stops
            before = CHAT.decode(finished.reply_ids[:-1])
            assert not any(stop in before for stop in sampling.stop)
        elif finished.reason == "length":
            assert not stops
            assert count == min(sampling.max_tokens, LENGTH - len(finished.prompt_ids))
        else:
            assert finished.error == ("cancelled" if stream.cancelled else "the deadline passed")
            assert stream.cancelled or is_late(stream, self.clock.now - 1)
        if deadline is not None and stream.admitted_at is not None:
            # the step that reads the end of a prompt may say two tokens
            assert count <= deadline - stream.admitted_at + 1
        if stream.admitted_at is None:
            assert count == 0


def is_late(stream: Stream, now: float) -> bool:
    return stream.request.deadline is not None and now >= stream.request.deadline


VERSIONS = st.integers(1, 3)
WISHES = st.builds(
    Wish,
    prompt=st.integers(0, 1),
    length=st.sampled_from([1, 2, 16, 17, 31, 32, 33, 39]),
    version=st.sampled_from([None, None, 0, 1, 2, 3]),
    most=st.integers(1, MOST),
    copies=st.integers(1, 3),
    stop=st.tuples(st.integers(0, 9), st.integers(1, 9), st.sampled_from([(), ("",), ("§",), ("§", "")])),
    patience=st.none() | st.integers(0, 15),
    heard=st.booleans(),
)
SUBMIT = st.tuples(st.just("submit"), WISHES)
ACTIONS = st.one_of(
    SUBMIT,
    SUBMIT,
    st.tuples(st.just("step"), st.integers(1, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("swap"), VERSIONS),
    st.tuples(st.just("retire"), VERSIONS),
    st.tuples(st.just("restage"), VERSIONS, VERSIONS),
    st.tuples(st.just("warm"), st.integers(0, 3)),
)


@settings(max_examples=120, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=15, max_size=60), share=st.sampled_from([5, 16, 2048]))
def test_rows_and_versions_are_given_back_whatever_happens(actions: list[tuple[Any, ...]], share: int):
    chosen = {"rows": ROWS, "slots": SLOTS, "max_len": LENGTH, "prefix_tokens": 96}
    with one_thread(), pytest.MonkeyPatch.context() as patch, an_engine(**chosen) as engine:
        clock = Clock()
        for module in ("engine", "scheduler", "stream"):
            patch.setattr(f"serving.{module}.time", clock)
        patch.setattr(steps_module, "PROMPT_TOKENS_A_STEP", share)
        patch.setattr(steps_module, "PROMPT_TOKENS_A_STEP_UNHEARD", share)
        crowd = Crowd(engine, clock, patch)
        for action, *values in actions:
            getattr(crowd, action)(*values)
            crowd.check()
        for stream in list(crowd.live):
            stream.result()
        assert is_idle(engine)
