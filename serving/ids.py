"""Reply and feedback ids that carry their own proof: unknown, foreign and not kept are known without a look-up.

    chatcmpl-<40 characters>[:<choice>]      12 random bytes | 1 byte kept and n | 4 bytes caller tag | 8 bytes MAC
    fb-<40 characters>                       17 bytes, random or derived from caller and client id    | 8 bytes MAC
                                             (of a domain of its own for each API key)

25 bytes are exactly 40 characters of base32, so that no two spellings mean the same id. The MAC is HMAC-SHA256 cut to
64 bits, under a key that is the secret's alone; every use of the secret has a domain of its own.

What was given while there were no API keys is nobody's: whoever holds such an id may go on using it, whatever their key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from feedback.config import FeedbackConfig
from serving.errors import NotStored, UnknownFeedback, UnknownReply

MAX_CHOICES = 16
SECRET_FILE = "secret"

_REPLY = re.compile(r"chatcmpl-([a-z2-7]{40})(?::([1-9]\d?))?", re.ASCII)
_FEEDBACK = re.compile(r"fb-([a-z2-7]{40})", re.ASCII)
_MAC = 8
_KEPT = 0x80
_MIN_SECRET = 16


@dataclass(frozen=True, slots=True)
class ReplyId:
    """What a reply id says of itself."""

    completion: str
    """The completion id, without the choice."""
    choice: int
    kept: bool
    choices: int
    """How many replies the completion had."""


class Ids:
    """Makes and verifies ids. Every server that shares a secret knows the others' ids as its own."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: at least 16 bytes, the same for all servers that share traffic. Raises ValueError when shorter."""
        if len(secret) < _MIN_SECRET:
            raise ValueError(f"the secret has {len(secret)} bytes; at least {_MIN_SECRET} are needed.")
        self._secret = secret

    def new_reply(self, caller_key: str, *, kept: bool, choices: int = 1) -> str:
        """A completion id for `choices` replies to the holder of `caller_key` ("" when there are no API keys)."""
        if not 1 <= choices <= MAX_CHOICES:
            raise ValueError(f"a completion has 1 to {MAX_CHOICES} choices, not {choices}.")
        about = bytes([(_KEPT if kept else 0) | (choices - 1)])
        return "chatcmpl-" + self._sealed("reply", secrets.token_bytes(12) + about + self._tag(caller_key))

    def verify_reply(self, reply_id: str, caller_key: str | None) -> ReplyId:
        """What the id says, if it is ours, this caller's, and of a reply that was kept.

        `caller_key`: the name of their API key, "" while there are none; None: an operator, who may see all. Raises
        UnknownReply (not ours, another caller's, or no such choice) and NotStored.
        """
        found = self.read_reply(reply_id, caller_key)
        if not found.kept:
            raise NotStored(
                f"The reply {reply_id} was not kept, because its chat was sent with store: false, "
                "so nothing can be learned from it. Rate a reply that was sent without it."
            )
        return found

    def read_reply(self, reply_id: str, caller_key: str | None) -> ReplyId:
        """As `verify_reply`, kept or not. Raises UnknownReply."""
        match = _REPLY.fullmatch(reply_id)
        payload = self._unsealed("reply", match[1]) if match else None
        # One answer for wrong and for foreign: whoever holds a foreign id learns nothing of it.
        if match is None or payload is None or not self._may_use(payload[13:], caller_key):
            raise _unknown_reply(reply_id)
        choices, choice = (payload[12] & 0x0F) + 1, int(match[2] or 0)
        if choice >= choices:
            raise _unknown_reply(reply_id)
        return ReplyId(f"chatcmpl-{match[1]}", choice, bool(payload[12] & _KEPT), choices)

    def new_feedback(self, caller: str, client_id: str | None, caller_key: str = "") -> str:
        """A receipt's id: the same for the same caller and client id, random where the client gave none."""
        derived = None if client_id is None else self._mac("receipt", _framed(caller, client_id))[:17]
        return "fb-" + self._sealed(_feedback_domain(caller_key), derived or secrets.token_bytes(17))

    def verify_feedback(self, feedback_id: str, caller_key: str = "") -> None:
        """Raises UnknownFeedback when the id is none that a server with this secret gave to this key."""
        match = _FEEDBACK.fullmatch(feedback_id)
        domains = {_feedback_domain(caller_key), _feedback_domain("")}
        if match is None or all(self._unsealed(domain, match[1]) is None for domain in domains):
            raise UnknownFeedback(
                f"There is no feedback {_shown(feedback_id)} here. "
                "Send the id from the receipt of POST /v1/feedback, as it was given."
            )

    def imported_reply(self, *parts: str) -> str:
        """The id of a reply that came from elsewhere: the same for the same parts, and known as one that is kept."""
        derived = self._mac("imported reply", _framed(*parts))[:12]
        return "chatcmpl-" + self._sealed("reply", derived + bytes([_KEPT]) + self._tag(""))

    def imported_feedback(self, *parts: str) -> str:
        """The id of feedback that came from elsewhere: the same for the same parts."""
        return "fb-" + self._sealed("feedback", self._mac("imported feedback", _framed(*parts))[:17])

    def pseudonym(self, caller: str) -> str:
        """What the log may say of a caller outside an event's `content`: the same for the same caller, and no name."""
        return self._mac("caller", caller.encode())[:8].hex()

    def digest(self, body: bytes) -> str:
        """Digest of a request's body, keyed, because the space of all thumbs is small enough to be searched."""
        return self._mac("body", body)[:16].hex()

    def _may_use(self, tag: bytes, caller_key: str | None) -> bool:
        if caller_key is None:
            return True
        return any(hmac.compare_digest(tag, self._tag(key)) for key in (caller_key, ""))

    def _tag(self, caller_key: str) -> bytes:
        return self._mac("key", caller_key.encode())[:4]

    def _sealed(self, domain: str, payload: bytes) -> str:
        return base64.b32encode(payload + self._mac(domain, payload)[:_MAC]).decode().lower()

    def _unsealed(self, domain: str, text: str) -> bytes | None:
        raw = base64.b32decode(text.upper())
        payload, mac = raw[:-_MAC], raw[-_MAC:]
        return payload if hmac.compare_digest(mac, self._mac(domain, payload)[:_MAC]) else None

    def _mac(self, domain: str, data: bytes) -> bytes:
        return hmac.digest(self._secret, domain.encode() + b"\0" + data, "sha256")


def _feedback_domain(caller_key: str) -> str:
    return f"feedback {caller_key}" if caller_key else "feedback"


def _framed(*parts: str) -> bytes:
    """Parts with their lengths, so that ("ab", "c") and ("a", "bc") differ."""
    encoded = [part.encode() for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def _unknown_reply(reply_id: str) -> UnknownReply:
    return UnknownReply(
        f"There is no reply {_shown(reply_id)} of yours here. Send the id of a chat completion as it was given, "
        "with :1, :2, … for its further choices."
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")


def load_secret(config: FeedbackConfig) -> bytes:
    """The key for ids: from the settings, else from `$HEED_DATA/secret`, made once.

    Two processes that start at the same moment get the same secret. Raises OSError when the file can be neither read
    nor made, ValueError when it holds no secret.
    """
    if config.secret is not None:
        return hashlib.sha256(config.secret.encode()).digest()
    path = config.data / SECRET_FILE
    if not path.exists():
        _make_secret(path)
    secret = path.read_bytes().strip()
    if len(secret) < _MIN_SECRET:
        raise ValueError(
            f"{path} holds {len(secret)} bytes, and a secret needs {_MIN_SECRET}: put it back from a backup, or delete "
            "it to have a new one made; replies given before can then no longer be rated."
        )
    return secret


def _make_secret(path: Path) -> None:
    """Write a new secret under a name of this process, then link it: only whole files appear, and the first stays."""
    own = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(own)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        own.unlink()
