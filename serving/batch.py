"""The running replies and their rows: those that decode come first, then those whose prompt is still being read.

Rows stay packed: whoever leaves is replaced by the last of its part, so that a forward always covers a slice. What a
row has read is remembered (serving/prefix.py), so that the next prompt that begins alike reads only the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from serving.kv import KeyValueRows
from serving.prefix import PrefixCache
from serving.reply import Reply

LONG = 4
"""A prompt that takes more steps than this does not keep those behind it waiting for its end."""


class Batch:
    """Reply i of `replies` owns key/value row i. Of replies with the same prompt and version one reads it for all."""

    def __init__(self, kv: KeyValueRows, prefixes: PrefixCache) -> None:
        self.replies: list[Reply] = []
        self.decoding = 0
        """The first so many replies have read their prompt."""
        self.found = 0
        """Prompt ids, in all, whose keys and values were remembered."""
        self._kv, self._prefixes = kv, prefixes
        self._followers = 0

    def __len__(self) -> int:
        """Rows in use, or promised to replies that wait for another one to read their prompt."""
        return len(self.replies) + self._followers

    def __iter__(self) -> Iterator[Reply]:
        for reply in self.replies:
            yield reply
            yield from reply.followers

    @property
    def reading(self) -> list[Reply]:
        """The replies whose prompt is still being read."""
        return self.replies[self.decoding :]

    def next_pieces(self, share: int, *, padded: bool) -> list[tuple[Reply, int]]:
        """The replies whose prompts to read from now, whose rows lie together, with how many ids of each.

        In all at most `share` ids, counting the padding to the longest piece where they are `padded`. Elsewhere a prompt
        that will take more than LONG steps leaves half of each to those behind it.
        """
        pieces: list[tuple[Reply, int]] = []
        width, left, reading = 0, share, self.reading
        for number, reply in enumerate(reading, 1):
            count = min(reply.left_to_read, share if padded else left)
            if not padded and reply.left_to_read > LONG * share and number < len(reading):
                count = -(-left // 2)
            width = max(width, count)
            if count == 0 or (padded and width * (len(pieces) + 1) > share):
                break
            pieces.append((reply, count))
            left -= count
        return pieces

    def join(self, reply: Reply) -> None:
        """Give a reply a row, or let it follow one that reads the same prompt for the same version."""
        reply.admitted = True
        for other in self.reading:
            if other.version == reply.version and other.prompt_ids == reply.prompt_ids:
                other.followers.append(reply)
                self._followers += 1
                return
        reply.row = len(self.replies)
        self.replies.append(reply)
        reply.prefilled = self._prefixes.fill(reply.row, reply.uid, reply.prompt_ids)
        self.found += reply.prefilled

    def start_decoding(self, reply: Reply) -> list[Reply]:
        """The reply's prompt is read: it and its followers decode from now on. Returns them all."""
        followers, reply.followers = reply.followers, []
        self._followers -= len(followers)
        for follower in followers:
            follower.row, follower.prefilled = len(self.replies), reply.prefilled
            self._kv.copy(reply.row, follower.row, reply.prefilled)
            self.replies.append(follower)
        for one in (reply, *followers):
            self._exchange(one.row, self.decoding)
            self.decoding += 1
        return [reply, *followers]

    def remember(self, reply: Reply) -> None:
        """Let later prompts that begin as the reply's row does find what it has read."""
        self._prefixes.keep(reply.row, reply.uid, reply.read_ids)

    def leave(self, reply: Reply, *, dirty: bool = False) -> None:
        """Free the reply's row. `dirty`: it may hold anything at any position."""
        if reply.row < 0:
            leader = next(other for other in self.reading if reply in other.followers)
            leader.followers.remove(reply)
            self._followers -= 1
        elif reply.followers:
            self._hand_over(reply)
        else:
            hole = reply.row
            if not dirty:
                self.remember(reply)
            self._kv.wipe(hole, self._kv.length if dirty else reply.used)
            if hole < self.decoding:
                self.decoding -= 1
                self._fill(hole, self.decoding)
                hole = self.decoding
            self._fill(hole, len(self.replies) - 1)
            self.replies.pop()
        reply.row = -1

    def _hand_over(self, reply: Reply) -> None:
        """The first follower goes on where the leaving reply stopped reading."""
        heir, *rest = reply.followers
        reply.followers, heir.followers = [], rest
        heir.row, heir.prefilled = reply.row, reply.prefilled
        self.replies[heir.row] = heir
        self._followers -= 1

    def _fill(self, hole: int, source: int) -> None:
        """Move a row into a wiped one."""
        if hole != source:
            mover = self.replies[source]
            self._kv.copy(source, hole, mover.used)
            self._kv.wipe(source, mover.used)
            self.replies[hole] = mover
            mover.row = hole

    def _exchange(self, one: int, other: int) -> None:
        if one != other:
            a, b = self.replies[one], self.replies[other]
            self._kv.swap(one, other, max(a.used, b.used))
            self.replies[one], self.replies[other] = b, a
            a.row, b.row = other, one
