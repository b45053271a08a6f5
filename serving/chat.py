"""Messages to token ids and back: the one chat template and tokenizer path of the whole project."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Used when a model comes without a chat template: one `role: text` line a message, then `assistant:`. A model that was
never taught to chat will often go on to write the user's next line itself; give it the stop string "\\nuser:"."""

_UNFINISHED = "�"
"""What a decoder shows for bytes that are no whole character (yet)."""


class ChatError(ValueError):
    """The messages cannot be written as this model's prompt."""


class Message(Protocol):
    """What a chat needs of a message."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int] = ()) -> None:
        """`eos_ids`: ids that end a reply, beside the tokenizer's own end-of-sequence."""
        self.tokenizer = tokenizer
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_ids = frozenset([*own, *eos_ids])
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.vocab_size = len(tokenizer)
        self.template: str = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else PLAIN_TEMPLATE
        if isinstance(tokenizer.chat_template, dict) and "default" in tokenizer.chat_template:
            self.template = tokenizer.chat_template["default"]
        vocabulary = tokenizer.get_vocab()
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self.byte_ids = frozenset(vocabulary[name] for name in names if name in vocabulary)
        """Tokens that stand for one byte each, whose text depends on the bytes around them (sentencepiece)."""
        special = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.special_ids = frozenset(special)
        """Tokens that `decode` leaves out."""
        self.longest_token = max(map(len, vocabulary), default=1)
        """Characters: a text has at least as many tokens as it has these."""
        self._encoding = threading.Lock()
        """The tokenizer switches its way with control tokens to and fro while it encodes one chat."""

    @classmethod
    def load(cls, model: str | Path) -> Chat:
        """The chat of a model directory. Raises OSError or ValueError for a directory without a tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        return cls(tokenizer, _eos_ids(Path(model)))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Prompt ids: the messages by the template, ready for the assistant's reply.

        Control tokens written by a user (a typed `<|im_end|>`) are encoded as text, so that nobody can end their own
        turn and speak as another. Raises ChatError when the template refuses the messages.
        """
        return self._laid_out(_plain(messages), answering=True)

    def encode_answered(self, messages: Sequence[Message], reply: str) -> tuple[list[int], list[int]]:
        """Prompt ids, and the ids of a reply that came from elsewhere, as an engine would have sampled them: to its end.

        The reply is what the template writes after the prompt, up to the first id that ends replies. Where there is no
        such thing it is the text's own ids and the tokenizer's end. Raises ChatError as `encode` does.
        """
        plain = _plain(messages)
        prompt = self._laid_out(plain, answering=True)
        whole = self._laid_out([*plain, {"role": "assistant", "content": reply}], answering=False)
        rest = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
        end = next((place for place, one in enumerate(rest, 1) if one in self.eos_ids), None)
        return prompt, self._ended(reply) if end is None else rest[:end]

    def _laid_out(self, plain: list[dict[str, str]], *, answering: bool) -> list[int]:
        try:
            with self._encoding:
                ids = self.tokenizer.apply_chat_template(
                    plain,
                    chat_template=self.template,
                    add_generation_prompt=answering,
                    sanitize_control_tokens=True,
                    return_dict=False,
                )
        except (TemplateError, ValueError, TypeError) as error:
            raise ChatError(f"the model's chat template refuses these messages: {error}") from error
        return cast(list[int], ids)

    def _ended(self, reply: str) -> list[int]:
        with self._encoding:
            ids = self.tokenizer(reply, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [*cast(list[int], ids), *([] if end is None else [end])]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of reply ids, special tokens left out."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self)


class Detokenizer:
    """Text of a reply as its ids arrive. Never half a character; all pieces together equal `Chat.decode` of all ids."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        # decoded before the new ids: what comes first in a text is decoded differently (a leading space is dropped)
        self._context: list[int] = []
        self._before = ""
        self._new: list[int] = []
        self._within_bytes = False
        self._given = 0
        """Characters of the new ids' text that were given out already."""

    def push(self, token_id: int) -> str:
        """The text that is certain now; often that of this id, sometimes none yet, sometimes that of several."""
        self._new.append(token_id)
        if token_id not in self._chat.special_ids and token_id < self._chat.vocab_size:
            self._within_bytes = token_id in self._chat.byte_ids
        if self._within_bytes:
            return ""
        text = self._text()
        certain = text.rstrip(_UNFINISHED)
        piece = certain[self._given :]
        self._given += len(piece)
        if text and certain == text:
            self._start_anew()
        return piece

    def finish(self) -> str:
        """What is left: bytes that never became a character are shown as U+FFFD."""
        piece = self._text()[self._given :]
        self._start_anew()
        return piece

    def _text(self) -> str:
        return self._chat.decode(self._context + self._new)[len(self._before) :]

    def _start_anew(self) -> None:
        self._context, self._new, self._given = self._new, [], 0
        self._before = self._chat.decode(self._context)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": _role(message.role), "content": message.content} for message in messages]


def _role(role: str) -> str:
    """Templates know `system`; OpenAI's later name for the same is `developer`."""
    return "system" if role == "developer" else role


def _eos_ids(folder: Path) -> list[int]:
    """The ids by which the model's own generation settings end a reply."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
