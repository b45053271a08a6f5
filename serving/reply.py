"""One reply in the making: what was sampled, and its text with stop texts held back."""

from __future__ import annotations

from collections.abc import Sequence

from serving.chat import Chat
from serving.stream import Finished, Reason, Stream, Token


class Reply:
    """The engine's side of a stream, from admission to its last token."""

    def __init__(self, stream: Stream, version: int, slot: int, uid: int, seed: int, chat: Chat, max_len: int) -> None:
        """`uid`: of the weights that speak (serving/versions.py)."""
        request = stream.request
        self.stream, self.version, self.slot, self.uid, self.seed = stream, version, slot, uid, seed
        self.prompt_ids, self.sampling = request.prompt_ids, request.sampling
        self.admitted = False
        self.row = -1
        """The key/value row; -1 before there is one and after."""
        self.followers: list[Reply] = []
        """Replies to the same prompt that wait for this one to read it."""
        self.prefilled = 0
        """Prompt ids whose keys and values are in the row."""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.raw_logprobs: list[float] = []
        self._piece = ""
        self._top: tuple[tuple[int, float], ...] = ()
        self._chat = chat
        self._most = min(self.sampling.max_tokens, max_len - len(self.prompt_ids))
        self._eos_ids = frozenset[int]() if self.sampling.ignore_eos else chat.eos_ids
        # without a reader of tokens and without stop texts, the text is decoded once, at the end
        self._text = ReplyText(chat, self.sampling.stop) if stream.tokens or self.sampling.stop else None

    @property
    def used(self) -> int:
        """Positions of the row that hold keys and values: all ids but the last sampled one."""
        return self.prefilled + max(0, len(self.ids) - 1)

    @property
    def read_ids(self) -> tuple[int, ...]:
        """The ids whose keys and values are in the row."""
        return (*self.prompt_ids[: self.prefilled], *self.ids[: self.used - self.prefilled])

    @property
    def left_to_read(self) -> int:
        return len(self.prompt_ids) - self.prefilled

    def take(
        self, token_id: int, logprob: float, raw_logprob: float, top: Sequence[tuple[int, float]]
    ) -> Reason | None:
        """Add a sampled id; returns why the reply ends with it, None when it goes on."""
        self.ids.append(token_id)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw_logprob)
        reason: Reason | None = None
        if token_id in self._eos_ids:
            reason = "stop"
        elif len(self.ids) >= self._most:
            reason = "length"
        self._piece = ""
        if self._text is not None:
            self._piece = self._text.push(None if reason == "stop" else token_id, last=reason is not None)
            if self._text.stopped:
                reason = "stop"
        self._top = tuple(top[: self.sampling.top_logprobs])
        return reason

    def token(self) -> Token:
        """The event of the id taken last."""
        return Token(self.ids[-1], self._piece, self.logprobs[-1], self.raw_logprobs[-1], self._top)

    def finished(self, reason: Reason, error: str | None = None) -> Finished:
        """The whole reply, as far as it came."""
        return Finished(
            reason=reason,
            version=self.version,
            prompt_ids=self.prompt_ids,
            reply_ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            raw_logprobs=tuple(self.raw_logprobs),
            text=self._whole_text(),
            error=error,
        )

    def _whole_text(self) -> str:
        if self._text is not None:
            return self._text.whole()
        ends = bool(self.ids) and self.ids[-1] in self._eos_ids
        return self._chat.decode(self.ids[:-1] if ends else self.ids)


class ReplyText:
    """Text as it becomes certain: never half a character, never a piece of a stop text."""

    def __init__(self, chat: Chat, stop: Sequence[str]) -> None:
        self.stopped = False
        """True once a stop text was met; nothing comes after."""
        self._detokenizer = chat.detokenizer()
        self._stop = stop
        self._given: list[str] = []
        self._held = ""
        """The end of the text so far, where it may be the beginning of a stop text."""

    def push(self, token_id: int | None, last: bool) -> str:
        """The text that is certain after this id (None: an id without text). `last`: hold nothing back."""
        if token_id is not None:
            self._held += self._detokenizer.push(token_id)
        if last:
            self._held += self._detokenizer.finish()
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain = min(found)
        else:
            certain = len(self._held) - (0 if last else self._may_begin_a_stop())
        piece, self._held = self._held[:certain], "" if found else self._held[certain:]
        self._given.append(piece)
        return piece

    def whole(self) -> str:
        """All of the text, what was held back included unless a stop text ended it."""
        if not self.stopped:
            self.push(None, last=True)
        return "".join(self._given)

    def _may_begin_a_stop(self) -> int:
        """Length of the longest end of the held text that a stop text begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
