"""An unmodified OpenAI client: chat, streams, choices, log-probs, models and errors, through its own types."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.served import Served


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, **more: object) -> ChatCompletion:
    return client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "hello"}], max_tokens=8, **more
    )  # type: ignore[call-overload, no-any-return]


def test_a_chat(client: openai.OpenAI):
    answer = ask(client)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8
    assert answer.model == "default@v0"
    assert answer.heed["version"] == "v0"  # type: ignore[attr-defined]


def test_several_choices_with_logprobs(client: openai.OpenAI):
    answer = ask(client, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        for entry in choice.logprobs.content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 2


def test_a_stream_with_usage(client: openai.OpenAI):
    chunks = list(ask(client, stream=True, n=2, stream_options={"include_usage": True}))
    assert chunks[-1].usage.total_tokens > 0
    assert chunks[-1].choices == []
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(reasons) == 2
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}


def test_the_clients_own_stream_helper(client: openai.OpenAI):
    said = ask(client, seed=1).choices[0].message.content
    assert said
    # ended by a stop text: of a reply that was cut off at its limit this helper makes an error
    with client.chat.completions.stream(
        model="default", messages=[{"role": "user", "content": "hello"}], max_tokens=8, seed=1, stop=said[-2:]
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == text == said[:-2]


def test_a_conversation_with_the_clients_own_messages(client: openai.OpenAI):
    first = ask(client, user="ann")
    messages = [{"role": "user", "content": "hello"}, first.choices[0].message, {"role": "user", "content": "and?"}]
    second = client.chat.completions.create(model="default", messages=messages, max_tokens=4, user="ann")  # type: ignore[arg-type]
    assert second.heed["conversation"] == first.heed["conversation"]  # type: ignore[attr-defined]
    assert second.heed["turn"] == 1  # type: ignore[attr-defined]


def test_heed_parameters_through_extra_body(client: openai.OpenAI):
    greedy = ask(client, temperature=0).choices[0].message.content
    assert ask(client, extra_body={"heed": {"top_k": 1}}).choices[0].message.content == greedy


def test_the_version_that_spoke_is_in_a_header(client: openai.OpenAI):
    raw = client.chat.completions.with_raw_response.create(
        model="default", messages=[{"role": "user", "content": "hello"}], max_tokens=2
    )
    assert raw.headers["x-heed-version"] == "default@v0"


def test_models(client: openai.OpenAI):
    assert {model.id for model in client.models.list()} == {"random-llama", "default", "default@v0"}
    assert client.models.retrieve("default@v0").owned_by == "heed"
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.models.retrieve("gpt-4")


def test_errors_are_the_clients_own_classes(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="default", messages=[{"role": "user", "content": "x" * 1000}])
    assert long.value.code == "context_length_exceeded"


def test_many_at_once_through_the_async_client(server: Served):
    async def talk() -> list[ChatCompletion]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = [
                client.chat.completions.create(
                    model="default", messages=[{"role": "user", "content": f"number {number}"}], max_tokens=10
                )
                for number in range(20)
            ]
            return list(await asyncio.gather(*asked))

    answers = asyncio.run(talk())
    assert len({answer.id for answer in answers}) == 20
    assert {exchange.id for exchange in server.exchanges()} == {answer.id for answer in answers}
