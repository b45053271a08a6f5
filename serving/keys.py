"""API keys: whose requests are answered, from a TOML file that is read again when it changes. One table a key:

    [web]
    sha256 = "9f86d081…"      64 hex digits, the SHA-256 of the key; or a list, so that a key can be replaced by another
    quota = 600               chats and feedback a minute; none: no limit

The name of the key, never the key, is what ids, callers and messages carry.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from feedback.config import SettingError, variable
from serving.errors import UnknownKey

LOOK_EVERY_S = 1.0
MAX_QUOTA = 1_000_000

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key."""

    name: str
    quota: int | None = None
    """Chats and feedback a minute; None: no limit."""


class Keys:
    """The keys of a file. Used from one thread, the event loop's."""

    def __init__(self, path: Path) -> None:
        """Raises SettingError where the file cannot be read, is wrong, or holds no key."""
        self._path = path
        self._looked = time.monotonic()
        self._problem: str | None = None
        """What is wrong with the file now, while the keys it held before are in force."""
        try:
            self._text = _read(path)
            self._keys = parse_keys(self._text)
            if not self._keys:
                raise ValueError('holds no key; it needs a table for each: [name], below it sha256 = "…"')
        except (OSError, ValueError) as error:
            raise SettingError(f"{variable('api_keys_file')}={path}", None, _reason(error)) from None

    @property
    def names(self) -> list[str]:
        """The names of the keys now in force, sorted."""
        return sorted({key.name for key in self._keys.values()})

    def holder(self, authorization: str) -> Key:
        """The key that this Authorization header carries. Raises UnknownKey."""
        self._look()
        key = bearer(authorization)
        if not key:
            raise UnknownKey("This server needs an API key: send the header Authorization: Bearer followed by yours.")
        # not compared in constant time, and need not be: how long a look-up takes could tell of digests alone, and
        # nobody can make a key whose digest begins as they wish, beyond what guessing gives them anyway
        known = self._keys.get(hashlib.sha256(key.encode("latin-1")).digest())
        if known is None:
            raise UnknownKey("This API key is not one of this server's; ask for another where you got it.")
        return known

    def _look(self) -> None:
        """Read the file again, at most once a second. One that is wrong changes nothing, and is told of once.

        The whole of it, because its time and size may stay the same when a digest is replaced within a clock's tick.
        """
        now = time.monotonic()
        if now < self._looked + LOOK_EVERY_S:
            return
        self._looked = now
        try:
            text = _read(self._path)
            if text != self._text:
                self._keys = parse_keys(text)
                self._text = text
                _log.info("%s was read again; its keys: %s.", self._path, ", ".join(self.names) or "none")
            self._problem = None
        except (OSError, ValueError) as error:
            problem = _reason(error)
            if problem != self._problem:
                _log.error("%s: %s. The keys that it held before stay in force.", self._path, problem)
            self._problem = problem


def parse_keys(text: bytes) -> dict[bytes, Key]:
    """Digest → key. No keys at all are well-formed, so that the last one can be taken away.

    Raises ValueError, which says what is wrong and what is allowed, and repeats no value.
    """
    try:
        tables = tomllib.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply to be a list of keys") from None
    found: dict[bytes, Key] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError('a line stands outside of all tables; a key is a table: [name], below it sha256 = "…"')
        if not _NAME.fullmatch(name):
            raise ValueError("the name of a key must be 1 to 64 letters, digits, _ . or -")
        if strangers := sorted(table.keys() - {"sha256", "quota"}):
            raise ValueError(f"[{name}] {strangers[0]} is not known; a key has sha256 and quota")
        for digest in _digests(name, table.get("sha256")):
            if digest in found:
                raise ValueError(f"[{name}] has a sha256 that stands in [{found[digest].name}] already")
            found[digest] = Key(name, _quota(name, table.get("quota")))
    return found


def bearer(authorization: str) -> str:
    """What an Authorization header bears; "" where it is of another kind, or none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip(" \t") if scheme.lower() == "bearer" else ""


def _digests(name: str, given: object) -> list[bytes]:
    texts = given if isinstance(given, list) else [given]
    right = [text for text in texts if isinstance(text, str) and _SHA256.fullmatch(text)]
    if not right or len(right) < len(texts):
        raise ValueError(f"[{name}] sha256 must be 64 hex digits, the SHA-256 of the key, or a list of such")
    return [bytes.fromhex(text) for text in right]


def _quota(name: str, given: object) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MAX_QUOTA:
        raise ValueError(f"[{name}] quota must be a whole number from 1 to {MAX_QUOTA}, requests a minute")
    return given


def _read(path: Path) -> bytes:
    """Raises OSError, also for what is no plain file, which might never be read to its end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is no plain file")
    return path.read_bytes()


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8 text"
    return f"is not valid TOML: {error}" if isinstance(error, tomllib.TOMLDecodeError) else str(error)
