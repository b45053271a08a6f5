"""What the server asks of whatever makes its replies: the engine here (serving/engine.py), or another server's some day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serving.lora import AdapterWeights
from serving.stream import Event, Request, Stream


class PromptTooLong(ValueError):
    """The prompt leaves no room for a reply, or is empty."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at a moment, and totals since it was made."""

    running: int
    waiting: int
    rows: int
    kv_used: int
    """Positions that hold keys and values, of `kv_capacity`."""
    kv_capacity: int
    slots: int
    """Adapters that can be loaded beside the base."""
    free_slots: int
    steps: int
    prompt_tokens: int
    """Prompt tokens read; a prompt that several replies share is read once."""
    prefix_tokens: int
    """Prompt tokens that did not have to be read, because an earlier prompt or reply began alike."""
    reply_tokens: int
    ended: dict[str, int]
    """Replies by the reason they ended with."""


class Backend(Protocol):
    """Replies, each by one version, and versions that come and go meanwhile. Callable from any thread."""

    @property
    def max_len(self) -> int:
        """Most tokens of a prompt and its reply together."""

    @property
    def vocab_size(self) -> int:
        """How many tokens the model tells apart."""

    def submit(
        self, request: Request, on_event: Callable[[Event], None] | None = None, *, tokens: bool = True
    ) -> Stream:
        """Put a request in line. `on_event` gets each event, in order; `tokens=False`: the last one only.

        Raises QueueFull, PromptTooLong, UnknownVersion.
        """

    def cancel(self, stream: Stream) -> None:
        """End a reply with what it has, at once; nothing happens if it has ended already."""

    @property
    def current(self) -> int:
        """The version of requests that name none."""

    def loaded(self) -> dict[int, int]:
        """How many replies run on each loaded version or wait for it by name; the base is 0."""

    def stage(self, version: int, weights: AdapterWeights, timeout: float | None = 60.0) -> None:
        """Load an adapter and try it: from then on it may be activated or named.

        If the version is loaded already, this only takes back its retirement. Raises NoFreeSlot, ProbeFailed, ValueError
        for weights that do not fit, TimeoutError when that is not done in `timeout` seconds.
        """

    def warm(self, version: int, timeout: float = 5.0) -> None:
        """Let a loaded version read what prompts to the current one most often begin with, as far as the time allows.

        Raises UnknownVersion.
        """

    def activate(self, version: int, timeout: float | None = 60.0) -> None:
        """From now on requests that name no version get this one. Raises UnknownVersion, TimeoutError."""

    def retire(self, version: int) -> None:
        """Free the version's place once its last reply has ended; new requests for it are refused.

        Nothing happens if it is not loaded. Raises ValueError for the base and the current version.
        """

    def stats(self) -> EngineStats:
        """Numbers for metrics, of a moment that may lie within a step."""

    def close(self) -> None:
        """Stop; replies that have not ended are aborted."""
