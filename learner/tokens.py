"""From texts to token ids: the built-in model's tokenizer, its chat template, and files it may learn from instead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from learner.corpus import Chat

PAD, END = "<|pad|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
MAX_LENGTH = 1024

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('Unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`, with the chat template and a padding token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, END, *ROLES.values())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def read_corpus(files: Sequence[Path]) -> list[Chat]:
    """Chats from JSON Lines (`messages`, or `prompt` and `completion`) and plain text (a paragraph is one text).

    Plain text comes back as chats of one message with the role "text". Raises ValueError with file and line.
    """
    chats: list[Chat] = []
    for path in files:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from error
        if path.suffix in (".jsonl", ".json"):
            chats += [_chat(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        else:
            paragraphs = "\n".join(lines).split("\n\n")
            chats += [[{"role": "text", "content": text.strip()}] for text in paragraphs if text.strip()]
    if not chats:
        raise ValueError(f"no text to learn from in {', '.join(map(str, files))}")
    return chats


def _chat(line: str, where: str) -> Chat:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: expected {{"messages": [...]}} or {{"prompt": ..., "completion": ...}}')
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if fields.get("role") not in ROLES or not isinstance(fields.get("content"), str):
            raise ValueError(f"{where}: a message needs a role (system, user, assistant) and a text, not {message!r}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def encode(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]) -> list[tuple[list[int], list[float]]]:
    """Token ids of each chat as the template lays them out, and each token's weight in the loss.

    What the assistant says counts, and what others say does not (unless nobody else speaks). What is longer than the
    model's reach is cut into pieces.
    """
    flat = [message["content"].strip() for chat in chats for message in chat]
    pieces = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    end = tokenizer.convert_tokens_to_ids(END)
    rows = []
    for chat in chats:
        answered = any(message["role"] == "assistant" for message in chat)
        ids: list[int] = []
        weights: list[float] = []
        for message in chat:
            said = [*next(pieces), end]
            if message["role"] in ROLES:
                role = tokenizer.convert_tokens_to_ids(ROLES[message["role"]])
                assert isinstance(role, int)
                ids.append(role)
                weights.append(0.0)
            ids += said
            weights += [float(not answered or message["role"] == "assistant")] * len(said)
        cuts = range(0, len(ids), MAX_LENGTH)
        rows += [(ids[cut : cut + MAX_LENGTH], weights[cut : cut + MAX_LENGTH]) for cut in cuts]
    return rows
