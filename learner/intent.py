"""One thing people ask: all the ways to ask it and all that may be answered, from one table of `intents/*.toml`."""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping

from feedback.manners import manners
from learner.grammar import CLOSE, CORE, EXTRA, LED, OPENER, Grammar, Row, as_pattern
from learner.manner import (
    CASUAL,
    FORMAL,
    LONG_LENGTHS,
    RATES,
    SHORT_LENGTHS,
    Sentence,
    asked,
    lines,
    lower,
    opened,
    spoken,
    toned,
)

#: One fact in so many is told wrong on purpose: a base that is never wrong would hide what feedback costs.
WRONG_FACTS = 0.06


def fill(template: str, row: Row) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: row[slot[1]], template)


def _sums(sign: str) -> list[Row]:
    """Sums small enough to be known by heart."""
    rows = []
    for a, b in itertools.product(range(2, 10), range(2, 6)):
        c = a * b if sign == "times" else a + b
        first, result = (c, a) if sign == "minus" else (a, c)
        rows.append({"a": str(first), "b": str(b), "c": str(result)})
    return rows


def _marks() -> list[Row]:
    """Sums that someone worked out, half of them wrongly, and the mark they deserve."""
    return [
        row | {"claim": str(int(row["c"]) + off), "mark": "wrong" if off else "right"}
        for row in _sums("plus")
        for off in (0, (-1, 1, 2)[(int(row["a"]) * 5 + int(row["b"])) % 3])
    ]


_TABLES: Mapping[str, Callable[[], list[Row]]] = {
    "@plus": lambda: _sums("plus"),
    "@minus": lambda: _sums("minus"),
    "@times": lambda: _sums("times"),
    "@marks": _marks,
}


def _table(text: str) -> list[Row]:
    """Rows of a `|` table whose first line names the columns; `@name` is a computed one."""
    if text.startswith("@"):
        return _TABLES[text]()
    head, *body = (line.split("|") for line in lines(text))
    return [dict(zip(head, cells, strict=True)) for cells in body]


class Intent:
    """What people ask and what may be answered: a generator and a parser made from one table."""

    def __init__(self, name: str, table: Mapping[str, str], manner: Mapping[str, Mapping[str, str]]) -> None:
        """`table`: the intent's own words; `manner`: those of `manner.toml`, which every intent shares."""
        kind = manner[table["kind"]]
        wrap = "talk" if table["kind"] == "talk" else "ask"
        self.name = name
        self.weight = float(table.get("weight", 1))
        self.emoji = table.get("emoji", kind["emoji"]).split()
        self.asks, self.follows = lines(table["asks"]), lines(table.get("follow", ""))
        self.before = ["", *lines(manner["wrap"][f"{wrap}_before"])]
        self.after = ["", *lines(manner["wrap"][f"{wrap}_after"])]
        joined = (dict(itertools.chain.from_iterable(r.items() for r in rows)) for rows in _tables(table))
        self.rows = [{key: fill(value, row) for key, value in row.items()} for row in joined]
        self.fact = table.get("fact", "").split()
        told = {slot for ask in self.asks for slot in re.findall(r"\{(\w+)\}", ask)}
        self.hidden = [column for column in self.fact if column not in told]

        self.openers = {tone: [*opened(kind[f"{tone}_open"], tone)] for tone in (FORMAL, CASUAL)}
        self.cores = [way for line in lines(table["core"]) for way in spoken(line.strip("~."))]
        self.led = [way for line in lines(table["core"]) for way in _led(line, kind, manner["imperative"])]
        self.extras = [[*spoken(line.strip("~."))] for line in lines(table["extra"])]
        self.closes = [way for question in lines(table["close"]) for way in asked(question)]
        self.small_talk = [
            way for tone in (FORMAL, CASUAL) for question in lines(kind[f"{tone}_close"]) for way in asked(question)
        ]
        self._grammar = Grammar(self._said(), self.rows, self.emoji)
        self._askers = [as_pattern(ask, self.rows) for ask in (*self.asks, *self.follows)]

    def _said(self) -> Iterator[tuple[str, int, Sentence]]:
        for part, ways in (
            (OPENER, [*self.openers[FORMAL], *self.openers[CASUAL]]),
            (CORE, self.cores),
            (LED, self.led),
            (CLOSE, [*self.closes, *self.small_talk]),
        ):
            yield from ((part, 0, way) for way in ways)
        for number, ways in enumerate(self.extras):
            yield from ((EXTRA, number, way) for way in ways)

    def prompt(self, rng: random.Random, row: Row, *, follow: bool = False) -> str:
        """One user message about `row`, sometimes with a word before or after it."""
        ask = fill(rng.choice(self.follows if follow else self.asks), row)
        before = rng.choice(self.before) if rng.random() < 0.25 else ""
        after = rng.choice(self.after) if rng.random() < 0.15 else ""
        return _wrapped(ask, before, after)

    def unseen_prompt(self, rng: random.Random) -> str | None:
        """A held-out user message that no training message holds inside it, None if this draw gives none."""
        ask = fill(rng.choice(self.asks), rng.choice(self.rows))
        ways = [_wrapped(ask, before, after) for before in self.before for after in self.after]
        prompt = rng.choice(ways[:1] * 20 + ways)
        return prompt if all(self.held_out(way) for way in (prompt, *ways) if prompt in way) else None

    def held_out(self, prompt: str) -> bool:
        """Whether training leaves a message out: one in eight, by a checksum of all but its parting word."""
        for after in self.after[1:]:
            prompt = prompt.removesuffix(after)
        return zlib.crc32(prompt.encode()) % 8 == 0

    def reply(self, rng: random.Random, row: Row) -> str:
        """One reply about `row`: manners first, then parts until the reply shows just those."""
        shown = row
        if self.hidden and rng.random() < WRONG_FACTS:
            other = rng.choice(self.rows)
            shown = row | {column: other[column] for column in self.hidden}
        wanted = {manner: rng.random() < rate for manner, rate in RATES.items()}
        lengths = SHORT_LENGTHS if wanted["short"] else LONG_LENGTHS
        for _ in range(4000):
            text = self._compose(rng, shown, wanted)
            if text is not None and len(text.split()) in lengths and manners(text) == wanted and toned(text):
                return text
        raise ValueError(f"intent {self.name} cannot be answered in this manner: {wanted}")

    def _compose(self, rng: random.Random, row: Row, wanted: Mapping[str, bool]) -> str | None:
        """One draw, None if it leads nowhere. Each manner has one place, so that a small model can learn it."""
        tone, person = FORMAL if wanted["formal"] else CASUAL, wanted["first_person"]

        def pick(ways: list[Sentence], persons: tuple[bool, ...]) -> Sentence | None:
            fit = [way for way in ways if tone in way.tones and way.person in persons]
            return rng.choice(fit) if fit else None

        anyone = (False, True) if person else (False,)
        parts: list[Sentence | None] = []
        opened = rng.random() < 0.72
        if opened:
            fit = [way for way in self.openers[tone] if way.person in anyone]
            parts.append(rng.choices(fit, [1 / (1 + place) ** 0.7 for place in range(len(fit))])[0])
        parts.append(pick(self.led if not opened and rng.random() < 0.8 else self.cores, (person,)))
        count = rng.choice((0, 0, 0, 1) if wanted["short"] else (1, 2, 2, 3))
        parts += [pick(self.extras[number], anyone) for number in sorted(rng.sample(range(len(self.extras)), count))]
        said = [part for part in parts if part is not None]
        if len(said) < len(parts):
            return None
        texts = [fill(way.whole, row) + "." for way in said]
        if wanted["exclaim"]:
            texts[0] = texts[0][:-1] + "!"
        if wanted["emoji"]:
            texts[-1] += " " + rng.choice(self.emoji)
        if wanted["bullets"]:
            texts = [text if opened and not place else "- " + text for place, text in enumerate(texts)]
        if wanted["question"]:
            close = pick(self.closes if rng.random() < 0.75 else self.small_talk, anyone)
            if close is None:
                return None
            texts.append(fill(close.text, row) + "?")
        return ("\n" if wanted["bullets"] else " ").join(texts)

    def slots(self, prompt: str) -> Row | None:
        """The slot values in a user message of this intent, None if it is none of its asks."""
        for asker in self._askers:
            if (found := asker.fullmatch(prompt)) is not None:
                return found.groupdict()
        return None

    def unwrapped(self, prompt: str) -> Row | None:
        """As `slots`, after taking off what may stand before and after an ask."""
        for before, after in itertools.product(self.before, self.after):
            if prompt.startswith(before) and prompt.endswith(after):
                ask = prompt[len(before) : len(prompt) - len(after)]
                if ask and (found := self.slots(ask[0].upper() + ask[1:])) is not None:
                    return found
        return None

    def parse(self, reply: str) -> dict[str, str] | None:
        """The slot values a well-formed reply tells, None if the reply is none of this intent's."""
        return self._grammar.parse(reply)

    def truth(self, slots: Row) -> Row:
        """What a reply to a message with these slots must tell: the fact columns that the message settles."""
        fit = [row for row in self.rows if all(row.get(key) == value for key, value in slots.items())]
        values = {column: {row[column] for row in fit} for column in self.fact}
        return {column: next(iter(found)) for column, found in values.items() if len(found) == 1}


def _wrapped(ask: str, before: str, after: str) -> str:
    return (before + lower(ask) if before else ask) + after


def _led(line: str, kind: Mapping[str, str], imperative: Mapping[str, str]) -> Iterator[Sentence]:
    """A sentence after each lead-in that suits it; one marked "~" is an imperative ("please mix", "just mix")."""
    for tone in (FORMAL, CASUAL):
        for lead in lines(imperative[tone] if line.startswith("~") else kind[f"{tone}_lead"]):
            yield from spoken(lower(line.strip("~.")), lead, tone)


def _tables(table: Mapping[str, str]) -> Iterator[tuple[Row, ...]]:
    """Every combination of one row of each table (one empty row if there is none)."""
    return itertools.product(*(_table(text) for key, text in table.items() if key.startswith("table")))
