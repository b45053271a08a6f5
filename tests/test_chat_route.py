"""Chats over HTTP: what is answered, what is kept, and what happens when something is in the way."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from feedback.events import EXCHANGES
from serving.routes import bodies
from serving.routes.answers import _event
from serving.routes.completion import Completion
from tests import bases
from tests.served import MAX_LEN, Served, TroubledLog

HELLO = [{"role": "user", "content": "hello"}]


def stream(server: Served, **more: Any) -> tuple[httpx.Headers, list[dict[str, Any]]]:
    """The chunks of a streamed chat, without [DONE], which must be the last."""
    body = {"model": "default", "messages": HELLO, "max_tokens": 6, "stream": True, **more}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return answer.headers, [json.loads(line) for line in lines[:-1]]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_bias_makes_a_token_likely_and_must_name_one_that_is_there(server: Served):
    body = {"model": "default", "messages": HELLO, "max_tokens": 3, "temperature": 0, "heed": {"ignore_eos": True}}
    assert server.http.post("/v1/chat/completions", json=body | {"logit_bias": {"40": 100}}).status_code == 200
    kept = server.exchanges()[-1]
    assert (kept.content.reply_ids, kept.sampling.bias) == ((40, 40, 40), ((40, 100.0),))
    assert not kept.sampling.full_support
    refused = server.http.post("/v1/chat/completions", json=body | {"logit_bias": {"999999": 1}})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "logit_bias")
    assert "this model has tokens 0 to" in error_of(refused)["message"]


def test_no_character_of_a_reply_ends_a_line_of_the_event_stream():
    said = "".join(map(chr, [*range(0x110), 0x2028, 0x2029, 0x1F600]))
    line, *rest = _event({"content": said}).decode().splitlines()  # as httpx splits: by Unicode's line ends
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == {"content": said}


def test_a_chat_is_answered_in_openais_shape_by_a_version_with_a_name(server: Served):
    answer = server.chat()
    body = answer.json()
    assert answer.status_code == 200
    assert answer.headers["x-heed-version"] == body["model"] == "default@v0"
    assert (body["object"], len(body["choices"])) == ("chat.completion", 1)
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] in ("length", "stop")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    heed = body["heed"]
    assert (heed["version"], heed["kept"], heed["ask"], heed["turn"]) == ("v0", True, False, 0)


def test_what_was_said_is_in_the_log_exactly_as_it_was(server: Served):
    body = server.chat("héllo 🙂", user="ann", metadata={"page": "home"}, seed=7, temperature=0.8, stop=["zzz"]).json()
    [kept] = server.exchanges()
    assert kept.id == body["id"]
    assert (kept.version, kept.policy, kept.base) == (0, "default", server.base.fingerprint)
    assert kept.content.messages[0].content == "héllo 🙂"
    assert kept.content.reply == body["choices"][0]["message"]["content"]
    assert (kept.content.user, kept.content.metadata) == ("ann", {"page": "home"})
    assert (kept.sampling.seed, kept.sampling.temperature, kept.sampling.stop) == (7, 0.8, ("zzz",))
    assert len(kept.content.reply_ids) == len(kept.content.logprobs) == len(kept.content.raw_logprobs)
    assert body["usage"]["prompt_tokens"] == len(kept.content.prompt_ids)
    assert body["usage"]["completion_tokens"] == len(kept.content.reply_ids)
    assert (kept.conversation, kept.turn) == (body["heed"]["conversation"], 0)


def test_the_log_names_nobody_outside_an_events_content(server: Served):
    server.chat("my secret", user="ann-the-first")
    [record] = server.wiring.log.read(EXCHANGES, {}, 10)
    event = json.loads(record.event)
    del event["content"]
    assert "ann-the-first" not in json.dumps(event)
    assert "127.0.0.1" not in json.dumps(event)


def test_every_choice_is_an_exchange_of_its_own(server: Served):
    body = server.chat(n=3).json()
    kept = {exchange.id: exchange for exchange in server.exchanges()}
    assert set(kept) == {body["id"], f"{body['id']}:1", f"{body['id']}:2"}
    for choice in body["choices"]:
        name = body["id"] if choice["index"] == 0 else f"{body['id']}:{choice['index']}"
        assert kept[name].content.reply == choice["message"]["content"]
    assert body["usage"]["completion_tokens"] == sum(len(one.content.reply_ids) for one in kept.values())


def test_choices_of_one_seed_differ_and_come_again(server: Served):
    first, again = (server.chat(n=2, seed=11, max_tokens=12).json()["choices"] for _ in range(2))
    assert [one["message"] for one in first] == [one["message"] for one in again]
    assert first[0]["message"] != first[1]["message"]
    assert server.chat(seed=11, max_tokens=12).json()["choices"][0]["message"] == first[0]["message"]


def test_a_stream_tells_the_same_as_the_whole_answer(server: Served):
    whole = server.chat(n=2, seed=3, max_tokens=20).json()
    headers, chunks = stream(server, n=2, seed=3, max_tokens=20)
    assert headers["x-heed-version"] == "default@v0"
    assert headers["content-type"].startswith("text/event-stream")
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        assert text_of(chunks, choice["index"]) == choice["message"]["content"]
        own = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == choice["index"]]
        assert own[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [chunk["choices"][0]["finish_reason"] for chunk in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["heed"]["kept"] is True


def test_usage_comes_last_and_only_when_asked_for(server: Served):
    _, chunks = stream(server, stream_options={"include_usage": True}, n=2)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == sum(len(one.content.reply_ids) for one in server.exchanges())
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in stream(server)[1])


def test_no_reply_ends_before_its_exchange_is_in_the_log(serve_with: Callable[..., Served]):
    """While the log has not answered, all of the text is there and the end is not."""
    troubles: list[TroubledLog] = []
    server = serve_with(log=lambda log: troubles.append(TroubledLog(log)) or troubles[0])
    body = {"model": "default", "messages": HELLO, "max_tokens": 4, "stream": True}
    troubles[0].answers.clear()
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        server.until(lambda: len(server.exchanges()) == 1)  # it is written, but the log has not said so yet
        timer = threading.Timer(0.5, troubles[0].answers.set)
        timer.start()
        for line in lines:
            if '"finish_reason":"' in line:
                assert troubles[0].answers.is_set()
                break
            assert "[DONE]" not in line
        else:
            pytest.fail("the stream had no end")
    troubles[0].answers.clear()
    threading.Timer(0.5, troubles[0].answers.set).start()
    assert server.chat().json()["heed"]["kept"] is True
    assert troubles[0].answers.is_set()


def test_logprobs_are_the_models_own_and_agree_with_what_is_kept(server: Served):
    more = {"logprobs": True, "top_logprobs": 3, "temperature": 0.5, "seed": 3, "heed": {"ignore_eos": True}}
    choice = server.chat(**more).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    [kept] = server.exchanges()
    assert [entry["logprob"] for entry in entries] == pytest.approx(list(kept.content.raw_logprobs))
    assert kept.content.raw_logprobs != pytest.approx(list(kept.content.logprobs))
    for entry in entries:
        likeliest = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(likeliest) == 3
        assert likeliest == sorted(likeliest, reverse=True)
        assert likeliest[0] >= entry["logprob"]
    said = bytes(byte for entry in entries for byte in entry["bytes"])
    assert said.decode(errors="replace") == choice["message"]["content"]


def test_logprobs_of_a_stream_are_those_of_the_whole_answer(server: Served):
    more = {"logprobs": True, "top_logprobs": 1, "seed": 5, "max_tokens": 10}
    whole = server.chat(**more).json()["choices"][0]["logprobs"]["content"]
    _, chunks = stream(server, **more)
    told = [choice.get("logprobs") for chunk in chunks for choice in chunk["choices"]]
    assert [entry for one in told if one for entry in one["content"]] == whole


def test_a_stop_text_ends_the_reply_before_it(server: Served):
    free = server.chat(seed=2, max_tokens=40).json()["choices"][0]["message"]["content"]
    word = free[len(free) // 2 :][:2]
    stopped = server.chat(seed=2, max_tokens=40, stop=word).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == free[: free.index(word)]
    assert text_of(stream(server, seed=2, max_tokens=40, stop=[word])[1]) == free[: free.index(word)]


def test_top_p_0_and_top_k_1_are_greedy(server: Served):
    greedy = server.chat(temperature=0).json()["choices"][0]["message"]
    assert server.chat(top_p=0).json()["choices"][0]["message"] == greedy
    assert server.chat(heed={"top_k": 1}).json()["choices"][0]["message"] == greedy
    assert server.chat(heed={"min_p": 1.0}).json()["choices"][0]["message"] == greedy


def test_without_a_limit_a_reply_may_fill_the_context_and_with_a_larger_one_too(server: Served):
    for limit in ({"max_tokens": None}, {"max_completion_tokens": 10_000, "max_tokens": None}):
        body = server.chat(heed={"ignore_eos": True}, **limit).json()
        assert body["usage"]["total_tokens"] == MAX_LEN
        assert body["choices"][0]["finish_reason"] == "length"


def test_not_stored_is_served_and_never_kept(server: Served):
    body = server.chat(store=False).json()
    assert body["heed"]["kept"] is False
    assert body["choices"][0]["message"]["content"]
    assert server.exchanges() == []
    refused = server.http.post("/v1/feedback", json={"kind": "thumb", "reply_id": body["id"], "value": "up"})
    assert (refused.status_code, error_of(refused)["code"]) == (409, "not_stored")
    assert server.http.get(f"/v1/replies/{body['id']}").status_code == 409


def test_a_conversation_goes_on_when_the_prompt_does(server: Served):
    first = server.chat("hello", user="ann").json()
    messages = [*HELLO, first["choices"][0]["message"], {"role": "user", "content": "and?"}]
    second = server.chat(messages=messages, user="ann").json()["heed"]
    assert (second["conversation"], second["turn"]) == (first["heed"]["conversation"], 1)
    assert server.chat(messages=messages, user="bob").json()["heed"]["conversation"] != second["conversation"]
    assert server.chat("hello", user="ann").json()["heed"]["conversation"] != second["conversation"]


def test_a_conversation_has_the_name_the_client_gives_it(server: Served):
    first, second = (server.chat(text, metadata={"conversation": "c-1"}).json()["heed"] for text in ("one", "two"))
    assert (first["conversation"], first["turn"]) == ("c-1", 0)
    assert (second["conversation"], second["turn"]) == ("c-1", 1)
    assert [one.turn for one in server.exchanges()] == [0, 1]


def test_feedback_is_asked_of_the_share_that_is_set_and_only_of_what_is_kept(serve_with: Callable[..., Served]):
    server = serve_with(ask_share=1.0)
    assert server.chat().json()["heed"]["ask"] is True
    assert server.exchanges()[0].ask is True
    assert server.chat(store=False).json()["heed"]["ask"] is False


def test_models_are_the_base_the_policy_and_what_is_loaded(server: Served):
    version = server.publish()
    listed = {entry["id"]: entry for entry in server.http.get("/v1/models").json()["data"]}
    assert set(listed) == {"random-llama", "default", "default@v0", f"default@v{version}"}
    assert listed["default"]["parent"] == f"default@v{version}"
    assert listed[f"default@v{version}"]["parent"] == "default@v0"
    assert {entry["root"] for entry in listed.values()} == {"random-llama"}
    for name in listed:
        assert server.http.get(f"/v1/models/{name}").json() == listed[name]
    assert error_of(server.http.get("/v1/models/gpt-9"))["code"] == "model_not_found"


def test_each_name_of_a_model_speaks_with_its_version(server: Served):
    version = server.publish()
    for name, spoke in [
        ("default", version), (f"default@v{version}", version), ("default@v0", 0), ("random-llama", 0)
    ]:  # fmt: skip
        assert server.chat(model=name).json()["model"] == f"default@v{spoke}"


@pytest.mark.parametrize(
    "name", ["gpt-4", "default@v9", "default@v", "default@v01", "default@3", "other@v0", "default "]
)
def test_an_unknown_model_is_404_and_says_which_there_are(server: Served, name: str):
    answer = server.chat(model=name)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "default" in error["message"] or "v0" in error["message"]


def test_a_version_nobody_approved_cannot_be_pinned(server: Served):
    version = server.publish(promote=False)
    answer = server.chat(model=f"default@v{version}")
    assert answer.status_code == 404
    assert "promoted" in error_of(answer)["message"]


def test_swaps_refuse_no_chat_and_mix_no_two_versions(serve_with: Callable[..., Served]):
    """Talkers, and swaps all the while: nothing refused, and all choices of a completion come from one version.

    There are more choices than rows, so that swaps fall between the admissions of one completion's choices.
    """
    server = serve_with(max_rows=2)
    stop = threading.Event()

    def talk() -> list[tuple[int, int, str]]:
        seen = []
        while not stop.is_set():
            answer = server.chat(n=6, max_tokens=20, heed={"ignore_eos": True})
            body = answer.json()
            seen.append((answer.status_code, len(body["choices"]), body["model"]))
        return seen

    with ThreadPoolExecutor(4) as pool:
        talkers = [pool.submit(talk) for _ in range(4)]
        versions = [server.publish(seed) for seed in range(1, 5)]
        stop.set()
        seen = [one for talker in talkers for one in talker.result()]
    assert {(status, count) for status, count, _ in seen} == {(200, 6)}
    by_completion: dict[str, set[int]] = {}
    for kept in server.exchanges():
        by_completion.setdefault(kept.id.partition(":")[0], set()).add(kept.version)
    assert len(by_completion) == len(seen)
    assert {len(of) for of in by_completion.values()} == {1}
    assert server.metric("heed_swaps_total", outcome="activated") >= len(versions)


def test_20_swaps_under_12_talkers(serve_with: Callable[..., Served]):
    """Nothing refused, nothing broken, one version a reply, and its log-probs are a full forward's of that version."""
    server = serve_with(max_rows=8)
    stop = threading.Event()

    def talk(number: int) -> int:
        said = 0
        while not stop.is_set():
            if number % 2:
                _, chunks = stream(server, n=2, max_tokens=12, heed={"ignore_eos": True})
                assert {chunk["model"] for chunk in chunks} == {chunks[0]["model"]}
            else:
                answer = server.chat(n=2, max_tokens=12, heed={"ignore_eos": True})
                assert (answer.status_code, len(answer.json()["choices"])) == (200, 2)
            said += 2
        return said

    with ThreadPoolExecutor(12) as pool:
        talkers = [pool.submit(talk, number) for number in range(12)]
        versions = [server.publish(seed) for seed in range(1, 21)]
        stop.set()
        said = sum(talker.result() for talker in talkers)
    assert server.metric("heed_swaps_total", outcome="activated") >= 20
    kept = server.exchanges()
    assert len(kept) == said
    assert {len(one.content.reply_ids) for one in kept} == {12}
    speaker = server.wiring.speaker
    assert speaker is not None
    for version in {one.version for one in kept}:
        model = AutoModelForCausalLM.from_pretrained(speaker.folder, dtype=torch.float32)
        if version:
            model = bases.with_peft(model, server.wiring.store.load(version, speaker.base))
        for one in [one.content for one in kept if one.version == version][:6]:
            expected_T = bases.logprobs_of(model, one.prompt_ids, one.reply_ids)
            assert one.raw_logprobs == pytest.approx(expected_T.tolist(), abs=1e-4)
    assert {one.version for one in kept} >= set(versions[1:-1])


def test_a_client_that_leaves_frees_its_row_and_what_was_said_is_kept(server: Served):
    body = {"model": "default", "messages": HELLO, "stream": True, "heed": {"ignore_eos": True}, "n": 4}
    with httpx.Client(base_url=server.url) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    speaker = server.wiring.speaker
    assert speaker is not None
    server.until(lambda: speaker.engine.stats().running == 0)
    server.until(lambda: len(server.exchanges()) == 4)
    assert {one.finish_reason for one in server.exchanges()} == {"abort"}
    assert all(0 < len(one.content.reply_ids) < MAX_LEN - 10 for one in server.exchanges())


def test_a_thousand_clients_that_leave_mid_stream_leave_nothing(server: Served):
    """Two versions spoken, pins among them; each client cuts the connection after its first tokens."""
    speaker = server.wiring.speaker
    assert speaker is not None
    version = server.publish(1)
    server.until(lambda: speaker.engine.current == version)
    server.chat()

    def tasks() -> int:
        return asyncio.run_coroutine_threadsafe(_tasks(), server.loop).result()

    server.http.close()  # its idle connections have tasks too
    server.until(lambda: tasks() == (time.sleep(0.2), tasks())[1])
    at_rest = tasks()
    heard = asyncio.run(_talk_and_leave(server, 1000, version))
    assert heard == 1000
    server.until(lambda: speaker.engine.stats().running + speaker.engine.stats().waiting == 0)
    server.until(lambda: set(speaker.engine.loaded().values()) == {0})
    server.until(lambda: tasks() <= at_rest)
    assert len(speaker.engine._batch) == 0
    server.until(lambda: len(server.exchanges()) == 1001)
    kept = server.exchanges()
    assert {one.version for one in kept} == {0, version}


async def _tasks() -> int:
    return len(asyncio.all_tasks()) - 1


async def _talk_and_leave(server: Served, count: int, version: int) -> int:
    """How many heard something before they left."""
    host, port = server.url.removeprefix("http://").split(":")
    at_once, heard = asyncio.Semaphore(100), 0

    async def one(number: int) -> None:
        nonlocal heard
        model = "default@v0" if number % 2 else f"default@v{version}"
        body = {"model": model, "messages": HELLO, "stream": True, "max_tokens": 150, "heed": {"ignore_eos": True}}
        content = json.dumps(body).encode()
        async with at_once:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: heed\r\ncontent-type: application/json\r\n")
            writer.write(f"content-length: {len(content)}\r\n\r\n".encode() + content)
            await reader.readuntil(b'"content":"')
            heard += 1
            writer.transport.abort()

    await asyncio.gather(*(one(number) for number in range(count)))
    return heard


def test_a_client_that_leaves_before_the_answer_frees_its_row(server: Served):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "default", "messages": HELLO, "heed": {"ignore_eos": True}, "n": 16},
            timeout=0.05,
        )
    speaker = server.wiring.speaker
    assert speaker is not None
    server.until(lambda: speaker.engine.stats().running + speaker.engine.stats().waiting == 0)
    assert server.chat().status_code == 200


def test_a_text_far_too_long_is_refused_before_it_is_encoded(server: Served, monkeypatch: pytest.MonkeyPatch):
    speaker = server.wiring.speaker
    assert speaker is not None
    monkeypatch.setattr(speaker.chat, "encode", lambda _: pytest.fail("encoded"))
    answer = server.chat("a<|end|>" * 100_000)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
    assert "800000 characters" in error_of(answer)["message"]


def test_a_pin_whose_slot_a_swap_just_freed_is_loaded_again(server: Served, monkeypatch: pytest.MonkeyPatch):
    version = server.publish(7)
    speaker = server.wiring.speaker
    assert speaker is not None
    ensure, named = speaker.swapper.ensure, iter([None])

    def raced(wanted: int) -> None:
        ensure(wanted)
        for _ in named:  # between this look and the engine, the release goes on and the version's slot is freed
            server.wiring.store.change("promote", "operator", version=0)
            server.until(lambda: wanted not in speaker.engine.loaded())

    monkeypatch.setattr(speaker.swapper, "ensure", raced)
    answer = server.chat(model=f"default@v{version}")
    assert (answer.status_code, answer.json()["model"]) == (200, f"default@v{version}")


def test_a_body_that_stops_coming_is_408_and_one_cut_off_no_fault_of_ours(
    server: Served, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bodies, "BODY_WAIT_S", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/feedback HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    failed = server.metric("heed_requests_total", route="/v1/feedback", status="500")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head)
    time.sleep(0.5)
    assert server.metric("heed_requests_total", route="/v1/feedback", status="500") == failed == 0


def test_a_full_queue_is_429_and_says_when_to_come_again(serve_with: Callable[..., Served]):
    server = serve_with(max_rows=1, max_waiting=2)
    answer = server.chat(n=16, heed={"ignore_eos": True}, max_tokens=100)
    assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    assert server.chat().status_code == 200


def test_a_prompt_that_is_too_long_is_told_in_numbers(server: Served):
    answer = server.chat("x" * 500)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "503" in error["message"]
    assert str(MAX_LEN) in error["message"]
    fits = "x" * (MAX_LEN - 1 - 3)  # beside the template's three tokens, and one for the reply
    assert server.chat(fits, max_tokens=5).json()["usage"]["completion_tokens"] == 1


def test_a_reply_that_takes_too_long_is_cut_off(serve_with: Callable[..., Served]):
    server = serve_with(request_timeout_s=0.1)
    answers = [server.chat(n=16, max_tokens=180, heed={"ignore_eos": True}) for _ in range(2)]
    for answer in answers:
        if answer.status_code == 503:
            assert error_of(answer)["code"] == "timeout"
        else:
            assert {choice["finish_reason"] for choice in answer.json()["choices"]} == {"length"}
    assert any(one.finish_reason == "abort" for one in server.exchanges())


def test_when_the_log_is_full_replies_go_on_and_say_that_they_are_not_kept(serve_with: Callable[..., Served]):
    troubles: list[TroubledLog] = []
    server = serve_with(log=lambda log: troubles.append(TroubledLog(log)) or troubles[0])
    troubles[0].full.set()
    first = server.chat().json()
    assert first["heed"]["kept"] is False
    _, chunks = stream(server)
    assert chunks[-1]["heed"]["kept"] is False
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.metric("heed_exchanges_total", outcome="dropped") == 2
    troubles[0].full.clear()
    for lost in (first["id"], chunks[-1]["id"]):
        thumb = {"kind": "thumb", "reply_id": lost, "value": "up"}
        answer = server.http.post("/v1/feedback", json=thumb)
        assert (answer.status_code, error_of(answer)["code"]) == (409, "not_stored")
    assert server.chat().json()["heed"]["kept"] is True


def test_while_the_model_is_loading_chats_are_told_to_come_again(serve_with: Callable[..., Served]):
    server = serve_with(speaks=False)
    answer = server.chat()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "loaded" in error_of(answer)["message"]


@pytest.fixture(scope="module")
def post(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Iterator[Callable[..., httpx.Response]]:
    """POST /v1/chat/completions of a server without a model: enough for what is refused before it is asked."""
    from tests.served import config_for, served

    with served(config_for(tmp_path_factory.mktemp("data"), model_folder), speaks=False) as server:
        yield lambda **request: server.http.post("/v1/chat/completions", **request)


def test_malformed_chats_are_400_in_openais_shape(post: Callable[..., httpx.Response]):
    answer = post(json={"model": "default", "messages": HELLO, "tools": [{}]})
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "tools")
    broken = post(content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, error_of(broken)["code"]) == (400, "invalid_json")
    plain = post(content=json.dumps({"model": "default", "messages": HELLO}).encode())
    assert (plain.status_code, error_of(plain)["code"]) == (400, "invalid_content_type")
    assert post().status_code == 400


def test_a_body_that_is_too_large_is_413_announced_or_not(post: Callable[..., httpx.Response]):
    large = json.dumps({"model": "default", "messages": [{"role": "user", "content": "x" * (5 << 20)}]}).encode()
    json_type = {"content-type": "application/json"}
    announced = post(content=large, headers=json_type)
    assert (announced.status_code, error_of(announced)["code"]) == (413, "request_too_large")
    in_pieces = post(content=(large[i : i + 65536] for i in range(0, len(large), 65536)), headers=json_type)
    assert in_pieces.status_code == 413


def test_messages_the_template_refuses_are_a_bad_request(server: Served):
    template = "{{ raise_exception('roles must alternate') }}"
    speaker = server.wiring.speaker
    assert speaker is not None
    speaker.chat.template = template
    answer = server.chat()
    assert answer.status_code == 400
    assert "roles must alternate" in error_of(answer)["message"]


def poison(server: Served, value: float) -> None:
    """Make every number of the model what `value` is: with NaN no reply can be sampled any more."""
    speaker = server.wiring.speaker
    assert speaker is not None
    speaker.engine.model.get_parameter("model.norm.weight").data.fill_(value)


def test_when_the_engine_fails_it_is_said_with_a_status_or_within_the_stream(server: Served):
    body = {"model": "default", "messages": HELLO, "stream": True, "heed": {"ignore_eos": True}}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        poison(server, float("nan"))
        rest = [line.removeprefix("data: ") for line in lines]
    failed = [json.loads(line)["error"] for line in rest[:-1] if '"error"' in line]
    assert [error["type"] for error in failed] == ["server_error"]
    assert rest[-1] == "[DONE]"
    for more in ({}, {"n": 2}, {"stream": True}):
        answer = server.chat(**more)
        assert (answer.status_code, error_of(answer)["code"]) == (500, "engine_failed")
    assert server.exchanges() == []
    poison(server, 1.0)
    assert server.chat().status_code == 200


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_fault_of_ours_ends_a_choice_once_and_the_answer_too(
    server: Served, monkeypatch: pytest.MonkeyPatch, choices: int
):
    """A metric that fails on a second token: that choice ends with an error, the others are whole."""
    right, timed = Completion._time, []

    def time_it(self: Completion, choice: int) -> None:
        timed.append(choice)
        if timed.count(0) == 2 and choice == 0:
            raise ZeroDivisionError
        right(self, choice)

    monkeypatch.setattr(Completion, "_time", time_it)
    answer = server.chat(n=choices, stream=True, heed={"ignore_eos": True}, temperature=0)
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
    ended = [c["index"] for event in events for c in event.get("choices", ()) if c["finish_reason"]]
    assert sorted(ended) == list(range(1, choices))
    assert [event["error"]["type"] for event in events if "error" in event] == ["server_error"]
    server.until(lambda: server.wiring.speaker is not None and server.wiring.speaker.engine.stats().running == 0)


def test_at_the_deadline_what_was_said_is_answered_streamed_or_not(serve_with: Callable[..., Served]):
    """Of six choices two find a row, the others are still in line when time is up."""
    server = serve_with(max_rows=2, request_timeout_s=1)
    assert server.wiring.speaker is not None
    steps = server.wiring.speaker.engine._steps  # type: ignore[attr-defined]
    take = steps.take
    steps.take = lambda: (time.sleep(0.02), take())  # a slow model
    asked = {"n": 6, "seed": 1, "max_tokens": 150, "heed": {"ignore_eos": True}}
    whole = server.chat(**asked)
    _, chunks = stream(server, **asked)
    said = {choice["index"]: choice["message"]["content"] for choice in whole.json()["choices"]}
    assert sorted(said) == list(range(6))
    assert sum(map(bool, said.values())) == len(server.exchanges()) / 2 == 2
    assert not whole.json()["heed"]["kept"], "of all choices"
    assert {index for index in range(6) if text_of(chunks, index)} == {index for index in said if said[index]}


def test_no_reply_fails_because_the_board_does(
    server: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(server.wiring.board, "put_exchange", lambda *_: 1 / 0)
    answer = server.chat(seed=1)
    assert answer.status_code == 200
    assert answer.json()["heed"]["kept"]
    assert [exchange.id for exchange in server.exchanges()] == [answer.json()["id"]]
    assert "the board failed on chatcmpl-" in caplog.text


def test_an_answered_chat_leaves_nothing_for_a_collection(server: Served):
    server.chat(stream=True)
    gc.collect()
    gc.disable()
    try:
        for stream in (True, False):
            assert server.chat(stream=stream).status_code == 200
        server.until(lambda: not server.wiring.tasks)
        left = [one for one in gc.get_objects() if type(one) is Completion]
        assert left == []
    finally:
        gc.enable()
