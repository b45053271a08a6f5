"""The grammar of replies: an intent's sentences, read backwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from feedback.manners import EMOJI
from learner.manner import CASUAL, FORMAL, Sentence, mixed

Row = dict[str, str]


def as_pattern(template: str, rows: Sequence[Row]) -> re.Pattern[str]:
    """A template as a pattern; each slot takes any value its column has, the same one wherever it returns."""
    seen: set[str] = set()
    parts = []
    for place, part in enumerate(re.split(r"\{(\w+)\}", template)):
        if place % 2 == 0:
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P={part})")
        else:
            seen.add(part)
            values = sorted({row[part] for row in rows}, key=lambda value: (-len(value), value))
            parts.append(f"(?P<{part}>{'|'.join(map(re.escape, values))})")
    return re.compile("".join(parts))


OPENER, CORE, LED, EXTRA, CLOSE = "opener", "core", "led", "extra", "close"

#: What may follow what ("led" is a core after a lead-in); a closing question comes last.
_NEXT: Mapping[str, frozenset[str]] = {
    "": frozenset({OPENER, CORE, LED}),
    OPENER: frozenset({CORE}),
    CORE: frozenset({EXTRA, CLOSE}),
    LED: frozenset({EXTRA, CLOSE}),
    EXTRA: frozenset({EXTRA, CLOSE}),
    CLOSE: frozenset(),
}


Reading = tuple[str, int, frozenset[str]]  # the part it is, which extra it is, the tones it may have


class Grammar:
    """Accepts what `Intent.reply` can compose: any slot value in any slot, in any manner, in one tone.

    It is a little wider: up to four extras in any order, and a tone that does not show.
    """

    def __init__(self, said: Iterable[tuple[str, int, Sentence]], rows: Sequence[Row], emoji: Iterable[str]) -> None:
        """`said`: every sentence with the part it plays and, for an extra, which one it is."""
        self.emoji = set(emoji)
        self.plain: dict[str, list[Reading]] = {}
        self.slotted: list[tuple[re.Pattern[str], Reading]] = []
        for part, number, way in said:
            if "{" in way.whole:
                self.slotted.append((as_pattern(way.whole, rows), (part, number, way.tones)))
            else:
                self.plain.setdefault(way.whole, []).append((part, number, way.tones))

    def parse(self, reply: str) -> Row | None:
        """The slot values that a well-formed reply tells, None if the reply is not well-formed."""
        text = self._without_emoji(reply)
        if text is None or mixed(text):
            return None
        lines = text.split("\n")
        bulleted = [line.startswith("- ") for line in lines]
        if any(bulleted):
            first = 0 if bulleted[0] else 1
            last = len(lines) if bulleted[-1] else len(lines) - 1
            if not all(bulleted[first:last]) or first >= last:
                return None
            sentences = [line.removeprefix("- ") for line in lines]
            loose = [not bullet for bullet in bulleted]
        elif len(lines) == 1:
            sentences = re.split(r"(?<=[.!?]) ", text)
            loose = None
        else:
            return None
        return self._sentences(sentences, loose)

    def _without_emoji(self, reply: str) -> str | None:
        """The reply without its emoji, which stands after the last statement; None if it stands elsewhere."""
        found = EMOJI.search(reply)
        if found is None:
            return reply
        before, after = reply[: found.start()], reply[found.end() :]
        placed = before.endswith((". ", "! ")) and re.fullmatch(r"(?:[ \n][^.!]+\?)?", after) is not None
        return before[:-1] + after if placed and found[0] in self.emoji else None

    def _sentences(self, sentences: list[str], loose: list[bool] | None) -> Row | None:
        slots: Row = {}
        order: list[str] = []
        extras: set[int] = set()
        tones = {FORMAL, CASUAL}
        for sentence in sentences:
            body, end = sentence[:-1], sentence[-1:]
            if end not in (".", "?") and (end != "!" or order):  # only the first sentence is exclaimed
                return None
            follows = _NEXT[order[-1] if order else ""]
            for (part, number, voice), values in self._readings(body):
                known = all(slots.get(key, value) == value for key, value in values.items())
                placed = part in follows and (part == CLOSE) == (end == "?")
                first = part != EXTRA or number not in extras
                if placed and first and known and voice & tones:
                    break
            else:
                return None
            order.append(part)
            tones &= voice
            slots |= values
            if part == EXTRA:
                extras.add(number)
        if not {CORE, LED} & set(order) or len(extras) > 4:
            return None
        if loose is not None and loose != [part in (OPENER, CLOSE) for part in order]:
            return None
        return slots

    def _readings(self, body: str) -> Iterator[tuple[Reading, Row]]:
        for reading in self.plain.get(body, ()):
            yield reading, {}
        for template, reading in self.slotted:
            if (found := template.fullmatch(body)) is not None:
                yield reading, found.groupdict()
