"""What a client asks for, made ready for the engine: prompt ids, sampling, the place in its conversation, an id."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from feedback.conversations import Place
from feedback.events import Message, SamplingUsed
from serving.chat import ChatError
from serving.errors import BadRequest, ContextTooLong
from serving.routes.wiring import Client, Speaker, Wiring
from serving.sampling import Sampling
from serving.schemas import ChatIn


@dataclass(frozen=True, slots=True)
class Asked:
    """One chat completion, before anyone has answered it."""

    id: str
    """The completion's id, which the first reply bears too."""
    model: str
    """As the client named it."""
    caller: str
    user: str | None
    metadata: dict[str, str]
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    place: Place
    sampling: Sampling
    choices: int
    kept: bool
    """False for `store: false`: served, never kept."""
    ask: bool
    """True when its replies were drawn for the unbiased slice of which feedback is asked."""
    stream: bool
    tokens: bool
    """True when tokens are wanted one by one, not only whole replies."""
    created: float = field(default_factory=time.time)
    arrived: float = field(default_factory=time.monotonic)

    def reply_id(self, choice: int) -> str:
        return f"{self.id}:{choice}" if choice else self.id

    def sampling_of(self, choice: int) -> Sampling:
        """Choices of one seed differ from each other, and are the same ones each time."""
        if self.sampling.seed is None:
            return self.sampling
        return replace(self.sampling, seed=self.sampling.seed + choice)

    def sampling_used(self, choice: int) -> SamplingUsed:
        used = self.sampling_of(choice)
        return SamplingUsed(
            temperature=used.temperature,
            top_p=used.top_p,
            top_k=used.top_k,
            min_p=used.min_p,
            max_tokens=used.max_tokens,
            seed=used.seed,
            stop=used.stop,
            bias=used.bias,
        )


async def ask(wiring: Wiring, speaker: Speaker, body: ChatIn, client: Client) -> Asked:
    """Raises BadRequest where the chat template refuses the messages, ContextTooLong where they leave no room."""
    messages, metadata, caller = body.said, dict(body.metadata or {}), client.caller(body.user)
    characters = sum(len(message.content) for message in messages)
    if characters > speaker.engine.max_len * speaker.chat.longest_token:  # encoding it all would keep others waiting
        raise ContextTooLong(
            f"The messages have {characters} characters; the {speaker.engine.max_len} tokens that this model takes with the "
            f"reply hold at most {speaker.engine.max_len * speaker.chat.longest_token}. Send fewer or shorter ones.",
            param="messages",
        )
    try:
        # off the loop: a long prompt takes milliseconds, in which other replies would stand still
        prompt_ids = await asyncio.to_thread(speaker.chat.encode, messages)
    except ChatError as error:
        raise BadRequest(f"The messages cannot be answered: {error}.", param="messages") from error
    room = speaker.engine.max_len - len(prompt_ids)
    if room < 1:
        raise ContextTooLong(
            f"The messages have {len(prompt_ids)} tokens, and this model takes {speaker.engine.max_len} with "
            f"the reply: at most {speaker.engine.max_len - 1} of messages. Send fewer or shorter ones.",
            param="messages",
        )
    return Asked(
        id=wiring.ids.new_reply(client.key, kept=body.kept, choices=body.n or 1),
        model=body.model,
        caller=caller,
        user=body.user,
        metadata=metadata,
        messages=messages,
        prompt_ids=tuple(prompt_ids),
        place=await wiring.board.continue_conversation(caller, messages, metadata.get("conversation")),
        sampling=_sampling(body, room, speaker.engine.vocab_size),
        choices=body.n or 1,
        kept=body.kept,
        ask=body.kept and wiring.dice.random() < wiring.config.ask_share,
        stream=bool(body.stream),
        tokens=bool(body.stream or body.logprobs),
    )


def _bias(body: ChatIn, vocab: int) -> tuple[tuple[int, float], ...]:
    """Raises BadRequest for a token id that the model does not have."""
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if bias and (largest := max(bias)) >= vocab:
        raise BadRequest(
            f"logit_bias names token {largest}; this model has tokens 0 to {vocab - 1}.", param="logit_bias"
        )
    return tuple(bias.items())


def _sampling(body: ChatIn, room: int, vocab: int) -> Sampling:
    """`room`: tokens that fit after the prompt; max_tokens is a bound, so that more than fit may be asked for."""
    heed = body.heed
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-9),  # OpenAI's 0 means the likeliest token alone
        top_k=heed.top_k if heed else 0,
        min_p=heed.min_p if heed else 0.0,
        max_tokens=room if body.limit is None else min(body.limit, room),
        stop=tuple(body.stop),
        bias=_bias(body, vocab),
        seed=body.seed,
        top_logprobs=body.top_logprobs or 0,
        ignore_eos=bool(heed and heed.ignore_eos),
    )
