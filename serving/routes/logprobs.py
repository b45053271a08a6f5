"""OpenAI's entries for tokens: text, bytes, and the model's own log-probs, whatever the sampling was."""

from __future__ import annotations

import re
from typing import Any

from serving.chat import Chat
from serving.engine import Token

Json = dict[str, Any]

LEAST = -9999.0
"""What OpenAI writes for log 0, which JSON has no number for."""

_ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def entries(chat: Chat, token: Token) -> list[Json]:
    """The entry of a token with its alternatives; none for the token that ends a reply."""
    if token.id in chat.eos_ids:
        return []
    alternatives = [_entry(chat, token_id, logprob) for token_id, logprob in token.top]
    return [_entry(chat, token.id, token.raw_logprob) | {"top_logprobs": alternatives}]


def _entry(chat: Chat, token_id: int, logprob: float) -> Json:
    text = chat.decode([token_id])
    raw = text.encode() if "�" not in text else _piece_of_a_character(chat, token_id)
    if raw is not None and "�" in text:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)  # as OpenAI writes it
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": None if raw is None else list(raw)}


def _piece_of_a_character(chat: Chat, token_id: int) -> bytes | None:
    """The bytes of a token that has no text of its own; None where the vocabulary does not say."""
    token = chat.tokenizer.convert_ids_to_tokens(token_id)
    assert isinstance(token, str)
    if one := _ONE_BYTE.fullmatch(token):
        return bytes([int(one[1], 16)])
    return bytes(map(_BYTE_OF.__getitem__, token)) if all(letter in _BYTE_OF for letter in token) else None


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's alphabet, by which byte-level vocabularies write bytes: themselves if printable, else U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _letters_of_bytes()
