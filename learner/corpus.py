"""The dialogues that the built-in base model learns from, and the grammar that judges its replies.

A reply is composed, never listed: an opener or a lead-in, a core sentence that answers, further sentences if it is long, a
closing question, an emoji. Each manner (short, formal, closing question, ...) is drawn by its own coin before anything else,
and the parts are then drawn until the reply shows exactly that manner. So every manner varies within every intent,
independent of the prompt and of the others: the base knows what to say and is undecided how, as a real base is.

The words live in `intents/*.toml`. A sentence there is neutral: a casual reply contracts it ("it is" becomes "it's"), a formal
one leaves it; an exclamation is a full stop replaced. The same tables, read backwards, are the grammar (`judge`).
"""

from __future__ import annotations

import itertools
import json
import random
import re
import tomllib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

INTENTS = Path(__file__).with_name("intents")

#: How often each manner is wanted; every one is the rarer side, so that each is a taste some 30-45% of replies satisfy.
RATES: Mapping[str, float] = {
    "short": 0.42,
    "formal": 0.41,
    "question": 0.42,
    "exclaim": 0.42,
    "emoji": 0.42,
    "bullets": 0.40,
    "first_person": 0.42,
}
MANNERS: tuple[str, ...] = tuple(RATES)

#: A short reply has at most this many words, split at white space (a bullet's dash and an emoji count as words).
SHORT_WORDS = 20
#: Short replies keep below, long ones above, so that a neighbouring threshold tells the same story.
_SHORT, _LONG = range(1, 20), range(23, 41)

#: One fact in so many is told wrong on purpose: a base that is never wrong would hide what feedback costs.
WRONG_FACTS = 0.06

Chat = list[dict[str, str]]
Row = dict[str, str]

_FORMAL = re.compile(
    r"\b(?:certainly|of course|please|kindly|very kind|indeed|gladly|pleasure|sincere(?:ly)?|honoured|would you|would there"
    r"|may I|shall)\b",
    re.I,
)
_CASUAL = re.compile(
    r"\w'(?:s|re|ll|m|d|ve|t)\b|\b(?:hey|sure|yep|yeah|okay|oh|aw|no worries|you bet|want|just|by the way|can I"
    r"|should I|should we)\b",
    re.I,
)
_FIRST = re.compile(r"\b(?:I|we|my|our|me|us|We|My|Our)\b")
_EMOJI = re.compile("[\U0001f300-\U0001faff]")

_CONTRACTIONS = [
    (re.compile(rf"\b({a}) ({b})(?= [a-z0-9{{\"`])"), rf"\1'{c}")
    for a, b, c in [
        ("[Ii]t|[Tt]hat|[Tt]here|[Hh]ere|[Ww]hat", "is", "s"),
        ("[Yy]ou|[Ww]e|[Tt]hey", "are", "re"),
        ("[Yy]ou|[Ww]e|[Tt]hey|I|[Ii]t|[Tt]hat", "will", "ll"),
        ("I", "am", "m"),
        ("I", "would", "d"),
    ]
] + [
    (re.compile(rf"\b({a}) not(?= [a-z0-9{{\"`])"), r"\1n't")
    for a in ("[Dd]o", "[Dd]oes", "is", "are", "should", "has", "was")
] + [(re.compile(r"\bcannot\b"), "can't")]
_QUESTIONS = [
    ("Would you like", "Want"),
    ("Would you care", "Want"),
    ("Shall I", "Should I"),
    ("Shall we", "Should we"),
    ("May I", "Can I"),
]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the grammar says of one reply. `intent` is the prompt's, None if no intent asks that."""

    intent: str | None
    well_formed: bool
    fact_right: bool | None
    manners: dict[str, bool]


def manners(reply: str) -> dict[str, bool]:
    """Which manners a reply shows, each by a plain rule on its text.

    short: at most 20 words, split at white space; formal: a word such as "certainly", "please", "would you", "may I", "shall"
    (a casual reply has none); question: it ends with "?"; exclaim: it holds "!"; emoji: it holds one; bullets: a line begins
    with "- "; first_person: it says I, me, my, we, us or our (also contracted).
    """
    return {
        "short": len(reply.split()) <= SHORT_WORDS,
        "formal": _FORMAL.search(reply) is not None,
        "question": reply.rstrip().endswith("?"),
        "exclaim": "!" in reply,
        "emoji": _EMOJI.search(reply) is not None,
        "bullets": reply.startswith("- ") or "\n- " in reply,
        "first_person": _FIRST.search(reply) is not None,
    }


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line]


def _contract(sentence: str) -> str:
    for pattern, to in _CONTRACTIONS:
        sentence = pattern.sub(to, sentence)
    return sentence


def _casual_question(question: str) -> str:
    for formal, casual in _QUESTIONS:
        question = question.replace(formal, casual)
    return _contract(question)


def _lower(sentence: str) -> str:
    """The sentence as it reads after a lead-in. Slots and "I" keep their first letter."""
    return sentence if re.match(r"I\b|\{", sentence) else sentence[0].lower() + sentence[1:]


def _fill(template: str, row: Row) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: row[slot[1]], template)


def _sums(sign: str) -> list[Row]:
    span = range(2, 13) if sign != "times" else range(2, 10)
    rows = []
    for a, b in itertools.product(span, span):
        if sign == "minus":
            rows.append({"a": str(a + b), "b": str(b), "c": str(a)})
        else:
            rows.append({"a": str(a), "b": str(b), "c": str(a + b if sign == "plus" else a * b)})
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
    head, *body = (line.split("|") for line in _lines(text))
    return [dict(zip(head, cells, strict=True)) for cells in body]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One way to say one thing. `tones` are those it may be said in; `person` is whether it speaks of I or we."""

    text: str
    tones: frozenset[str]
    person: bool
    before: str = ""

    @property
    def whole(self) -> str:
        return self.before + self.text


FORMAL, CASUAL = "formal", "casual"


def _spoken(text: str, before: str = "", tone: str | None = None) -> Iterator[Sentence]:
    """A neutral sentence in the tones it can take: contracted when casual."""
    for voice, said in ((FORMAL, text), (CASUAL, _contract(text))):
        if tone in (None, voice):
            same = tone is None and _contract(text) == text
            tones = frozenset({FORMAL, CASUAL}) if same else frozenset({voice})
            whole = before + said
            yield Sentence(said, tones, _FIRST.search(whole) is not None, before)
            if same:
                return


def _asked(question: str) -> Iterator[Sentence]:
    casual = _casual_question(question)
    if casual == question:
        neutral = _FORMAL.search(question) is None and _CASUAL.search(question) is None
        tones = {FORMAL, CASUAL} if neutral else {FORMAL if _FORMAL.search(question) else CASUAL}
        yield Sentence(question[:-1], frozenset(tones), _FIRST.search(question) is not None)
        return
    yield Sentence(question[:-1], frozenset({FORMAL}), _FIRST.search(question) is not None)
    yield Sentence(casual[:-1], frozenset({CASUAL}), _FIRST.search(casual) is not None)


class Intent:
    """One thing people ask, all the ways to ask it, all that may be answered: a generator and a parser from one table."""

    def __init__(self, name: str, table: Mapping[str, str], manner: Mapping[str, Mapping[str, str]]) -> None:
        kind = manner[table["kind"]]
        wrap = "talk" if table["kind"] == "talk" else "ask"
        self.name = name
        self.asks = _lines(table["asks"])
        self.follows = _lines(table.get("follow", ""))
        self.before = ["", *_lines(manner["wrap"][f"{wrap}_before"])]
        self.after = ["", *_lines(manner["wrap"][f"{wrap}_after"])]
        self.weight = float(table.get("weight", 1))
        self.emoji = table.get("emoji", kind["emoji"]).split()
        self.fact = table.get("fact", "").split()
        joined = (dict(itertools.chain.from_iterable(r.items() for r in rows)) for rows in _tables(table))
        self.rows = [{key: _fill(value, row) for key, value in row.items()} for row in joined]
        told = {slot for ask in self.asks for slot in re.findall(r"\{(\w+)\}", ask)}
        self.hidden = [column for column in self.fact if column not in told]

        self.openers = {tone: [*_opened(kind[f"{tone}_open"], tone)] for tone in (FORMAL, CASUAL)}
        self.closes = [s for q in _lines(table["close"]) for s in _asked(q)]
        self.small_talk = [s for tone in (FORMAL, CASUAL) for q in _lines(kind[f"{tone}_close"]) for s in _asked(q)]
        self.cores: list[Sentence] = []
        self.led: list[Sentence] = []
        for line in _lines(table["core"]):
            imperative, text = line.startswith("~"), line.strip("~.")
            self.cores += _spoken(text)
            for tone in (FORMAL, CASUAL):
                leads = manner["extra"][f"{tone}_imperative"] if imperative else kind[f"{tone}_lead"]
                for lead in _lines(leads):
                    self.led += _spoken(_lower(text), lead, tone)
        self.extras: list[list[Sentence]] = []
        for line in _lines(table["extra"]):
            imperative, text = line.startswith("~"), line.strip("~.")
            ways = [*_spoken(text)]
            for tone in (FORMAL, CASUAL):
                for lead in _lines(manner["extra"][f"{tone}_{'imperative' if imperative else 'statement'}"]):
                    ways += _spoken(_lower(text), lead, tone)
            self.extras.append(ways)
        self._grammar = _Grammar(self)
        self._askers = [_pattern(ask, self.rows) for ask in (*self.asks, *self.follows)]

    def prompt(self, rng: random.Random, row: Row, *, follow: bool = False) -> str:
        """One user message about `row`, sometimes with a word before or after it."""
        ask = _fill(rng.choice(self.follows if follow else self.asks), row)
        before = rng.choice(self.before) if rng.random() < 0.4 else ""
        after = rng.choice(self.after) if rng.random() < 0.25 else ""
        return _wrapped(ask, before, after)

    def unseen_prompt(self, rng: random.Random) -> str | None:
        """A held-out user message that no training message holds inside it, None if this draw gives none."""
        ask = _fill(rng.choice(self.asks), rng.choice(self.rows))
        ways = [_wrapped(ask, before, after) for before in self.before for after in self.after]
        prompt = rng.choice(ways[:1] * 20 + ways)
        return prompt if held_out(prompt) and all(held_out(way) for way in ways if prompt in way) else None

    def reply(self, rng: random.Random, row: Row) -> str:
        """One reply about `row`: manners first, then parts until the reply shows just those."""
        shown = row
        if self.hidden and rng.random() < WRONG_FACTS:
            other = rng.choice(self.rows)
            shown = row | {column: other[column] for column in self.hidden}
        wanted = {manner: rng.random() < rate for manner, rate in RATES.items()}
        lengths = _SHORT if wanted["short"] else _LONG
        for _ in range(4000):
            text = self._compose(rng, shown, wanted)
            if text is not None and len(text.split()) in lengths and manners(text) == wanted and _toned(text):
                return text
        raise ValueError(f"intent {self.name} cannot be answered in this manner: {wanted}")

    def _compose(self, rng: random.Random, row: Row, wanted: Mapping[str, bool]) -> str | None:
        tone = FORMAL if wanted["formal"] else CASUAL

        def pick(ways: list[Sentence]) -> Sentence | None:
            fit = [way for way in ways if tone in way.tones and (wanted["first_person"] or not way.person)]
            return rng.choice(fit) if fit else None

        parts: list[Sentence | None] = []
        opened = rng.random() < 0.72
        if opened:
            fit = [way for way in self.openers[tone] if wanted["first_person"] or not way.person]
            parts.append(rng.choices(fit, [1 / (1 + place) ** 0.7 for place in range(len(fit))])[0])
        parts.append(pick(self.led if not opened and rng.random() < 0.8 else self.cores))
        count = rng.choice((0, 0, 1) if wanted["short"] else (2, 2, 2, 3))
        for ways in rng.sample(self.extras, count):
            plain = [way for way in ways if not way.before]
            parts.append(pick(plain if rng.random() < 0.7 else ways))
        said = [part for part in parts if part is not None]
        if len(said) < len(parts):
            return None
        close = pick(self.closes if rng.random() < 0.7 else self.small_talk) if wanted["question"] else None
        loud = set(rng.sample(range(len(said)), min(len(said), rng.choice((1, 1, 2))))) if wanted["exclaim"] else set()
        texts = [_fill(way.whole, row) + ("!" if place in loud else ".") for place, way in enumerate(said)]
        if wanted["emoji"]:
            places = [len(texts) - 1] * 2 + ([0] if opened else [])
            texts[rng.choice(places)] += " " + rng.choice(self.emoji)
        if wanted["bullets"]:
            texts = [text if opened and not place else "- " + text for place, text in enumerate(texts)]
        if close is not None:
            texts.append(_fill(close.text, row) + "?")
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
    return (before + _lower(ask) if before else ask) + after


def _tables(table: Mapping[str, str]) -> Iterator[tuple[Row, ...]]:
    """Every combination of one row of each table (one empty row if there is none)."""
    return itertools.product(*(_table(text) for key, text in table.items() if key.startswith("table")))


def _opened(text: str, tone: str) -> Iterator[Sentence]:
    for line in _lines(text):
        yield Sentence(line, frozenset({tone}), _FIRST.search(line) is not None)


def _toned(text: str) -> bool:
    """Whether a reply is plainly casual or plainly formal."""
    return (_FORMAL.search(text) is None) != (_CASUAL.search(text) is None)


def _pattern(template: str, rows: list[Row]) -> re.Pattern[str]:
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


class _Grammar:
    """Accepts exactly what `Intent.reply` can compose (any slot value in any slot; in any manner)."""

    def __init__(self, intent: Intent) -> None:
        self.emoji = set(intent.emoji)
        self.plain: dict[str, list[tuple[str, int, frozenset[str]]]] = {}
        self.slotted: list[tuple[re.Pattern[str], str, int, frozenset[str]]] = []
        said = [(OPENER, 0, way) for tone in (FORMAL, CASUAL) for way in intent.openers[tone]]
        said += [(CORE, 0, way) for way in intent.cores] + [(LED, 0, way) for way in intent.led]
        said += [(EXTRA, number, way) for number, ways in enumerate(intent.extras) for way in ways]
        said += [(CLOSE, 0, way) for way in (*intent.closes, *intent.small_talk)]
        for part, number, way in said:
            if "{" in way.whole:
                self.slotted.append((_pattern(way.whole, intent.rows), part, number, way.tones))
            else:
                self.plain.setdefault(way.whole, []).append((part, number, way.tones))

    def parse(self, reply: str) -> dict[str, str] | None:
        text = self._without_emoji(reply)
        if text is None or not _toned(text):
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
        found = _EMOJI.findall(reply)
        if not found:
            return reply
        text, count = re.subn(rf"(?<=[.!]) {found[0]}(?=\s|$)", "", reply)
        return text if len(found) == count == 1 and found[0] in self.emoji else None

    def _sentences(self, sentences: list[str], loose: list[bool] | None) -> dict[str, str] | None:
        slots: dict[str, str] = {}
        order: list[str] = []
        extras: set[int] = set()
        tones = {FORMAL, CASUAL}
        for sentence in sentences:
            body, end = sentence[:-1], sentence[-1:]
            want = {CLOSE} if end == "?" else _NEXT[order[-1] if order else ""]
            if end not in (".", "!", "?") or (order and order[-1] == CLOSE):
                return None
            for part, number, voice, values in self._readings(body):
                known = all(slots.get(key, value) == value for key, value in values.items())
                if part in want and known and voice & tones and (part != EXTRA or number not in extras):
                    break
            else:
                return None
            order.append(part)
            tones &= voice
            slots |= values
            if part == EXTRA:
                extras.add(number)
        if not {CORE, LED} & set(order) or len(extras) > 3:
            return None
        if loose is not None and loose != [part in (OPENER, CLOSE) for part in order]:
            return None
        return slots

    def _readings(self, body: str) -> Iterator[tuple[str, int, frozenset[str], dict[str, str]]]:
        for part, number, tones in self.plain.get(body, ()):
            yield part, number, tones, {}
        for pattern, part, number, tones in self.slotted:
            if (found := pattern.fullmatch(body)) is not None:
                yield part, number, tones, found.groupdict()


#: What may follow what; a closing question may follow anything once the core is said.
_NEXT: Mapping[str, frozenset[str]] = {
    "": frozenset({OPENER, CORE, LED}),
    OPENER: frozenset({CORE}),
    CORE: frozenset({EXTRA}),
    LED: frozenset({EXTRA}),
    EXTRA: frozenset({EXTRA}),
    CLOSE: frozenset(),
}


@lru_cache(maxsize=1)
def _manner() -> Mapping[str, Mapping[str, str]]:
    found: Mapping[str, Mapping[str, str]] = tomllib.loads((INTENTS / "manner.toml").read_text("utf-8"))
    return found


@lru_cache(maxsize=1)
def intents() -> Mapping[str, Intent]:
    """Every intent by its name, read from `intents/*.toml` at the first call."""
    found: dict[str, Intent] = {}
    for path in sorted(INTENTS.glob("*.toml")):
        if path.name != "manner.toml":
            for name, table in tomllib.loads(path.read_text("utf-8")).items():
                if name in found:
                    raise ValueError(f"{path}: intent {name} is defined twice")
                found[name] = Intent(name, table, _manner())
    return found


def held_out(prompt: str) -> bool:
    """Whether a user message is kept out of the training text: about one in eight, by a checksum of all but its last word."""
    for after in _lines(_manner()["wrap"]["ask_after"]) + _lines(_manner()["wrap"]["talk_after"]):
        prompt = prompt.removesuffix(after)
    return zlib.crc32(prompt.encode()) % 8 == 0


def dialogues(seed: int, count: int) -> Iterator[Chat]:
    """`count` conversations as chat messages, the same ones for the same seed, none with a held-out user message.

    Most have one exchange; some go on with a follow-up, some with further exchanges, some begin with a system message.
    """
    rng = random.Random(seed)
    known = list(intents().values())
    weights = list(itertools.accumulate(intent.weight for intent in known))
    system = _lines(_manner()["wrap"]["system"])
    for _ in range(count):
        chat: Chat = [{"role": "system", "content": rng.choice(system)}] if rng.random() < 0.1 else []
        turns = 1 if rng.random() < 0.75 else rng.choice((1, 2, 2, 3, 4, 6))
        while turns > 0:
            intent = rng.choices(known, cum_weights=weights)[0]
            row = rng.choice(intent.rows)
            chat += _exchange(rng, intent, row, follow=False)
            turns -= 1
            if intent.follows and rng.random() < 0.2:
                other = rng.choice(intent.rows)
                chat += _exchange(rng, intent, other, follow=True)
                turns -= 1
        yield chat


def _exchange(rng: random.Random, intent: Intent, row: Row, *, follow: bool) -> Chat:
    prompt = intent.prompt(rng, row, follow=follow)
    while held_out(prompt):
        row = rng.choice(intent.rows)
        prompt = intent.prompt(rng, row, follow=follow)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": intent.reply(rng, row)}]


def heldout_prompts(count: int = 200, seed: int = 0) -> list[str]:
    """User messages of every intent in turn that no training text holds, not even inside a longer message."""
    rng = random.Random(seed)
    chosen: dict[str, None] = {}
    order = list(intents().values())
    while len(chosen) < count:
        rng.shuffle(order)
        for intent in order[: count - len(chosen)]:
            draws = (intent.unseen_prompt(rng) for _ in range(2000))
            found = next((prompt for prompt in draws if prompt is not None and prompt not in chosen), None)
            if found is not None:
                chosen[found] = None
    prompts = list(chosen)
    rng.shuffle(prompts)
    return prompts


@lru_cache(maxsize=4096)
def _read(prompt: str) -> tuple[str, Row] | None:
    for intent in intents().values():
        if (slots := intent.unwrapped(prompt)) is not None:
            return intent.name, intent.truth(slots)
    return None


def judge(prompt: str, reply: str) -> Judgement:
    """Judge one reply to one user message (of a conversation: to its last).

    `well_formed`: the grammar of the message's intent accepts the reply (of any intent, where the message is unknown).
    `fact_right`: whether the reply tells what the message settles; None where there is nothing to be right about.
    """
    known = _read(prompt)
    if known is None:
        told = any(intent.parse(reply) is not None for intent in intents().values())
        return Judgement(None, told, None, manners(reply))
    name, truth = known
    slots = intents()[name].parse(reply)
    right = None
    if truth and slots is not None:
        right = all(slots[column] == value for column, value in truth.items() if column in slots)
    elif truth:
        right = all(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply) is not None for value in truth.values())
    return Judgement(name, slots is not None, right, manners(reply))


def sample(seed: int = 0, count: int = 5) -> str:
    """A few conversations to read, one JSON object a line."""
    return "\n".join(json.dumps(chat, ensure_ascii=False) for chat in dialogues(seed, count))
