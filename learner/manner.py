"""How often each manner is wanted, and the turns of phrase that make a sentence formal or casual."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from feedback.manners import FIRST_PERSON, FORMAL_WORDS

#: How often each manner is wanted, always the rarer side. Those that a sharpened softmax makes rarer stand higher, so that
#: each is a taste which 30-45% of the finished model's replies satisfy.
RATES: Mapping[str, float] = {
    "short": 0.45,
    "formal": 0.44,
    "question": 0.45,
    "exclaim": 0.43,
    "emoji": 0.42,
    "bullets": 0.33,
    "first_person": 0.44,
}
MANNERS: tuple[str, ...] = tuple(RATES)

#: Short replies keep below, long ones above, so that a neighbouring threshold tells the same story.
SHORT_LENGTHS, LONG_LENGTHS = range(1, 20), range(22, 36)

CASUAL_WORDS = re.compile(
    r"\w'(?:s|re|ll|m|d|ve|t)\b|\b(?:hey|sure|yep|yeah|okay|oh|aw|no worries|you bet|want|just|by the way|can I"
    r"|should I|should we)\b",
    re.I,
)
_CONTRACTIONS = (
    [
        (re.compile(rf"\b({a}) ({b})(?= [a-z0-9{{\"`])"), rf"\1'{c}")
        for a, b, c in [
            ("[Ii]t|[Tt]hat|[Tt]here|[Hh]ere|[Ww]hat", "is", "s"),
            ("[Yy]ou|[Ww]e|[Tt]hey", "are", "re"),
            ("[Yy]ou|[Ww]e|[Tt]hey|I|[Ii]t|[Tt]hat", "will", "ll"),
            ("I", "am", "m"),
            ("I", "would", "d"),
        ]
    ]
    + [
        (re.compile(rf"\b({a}) not(?= [a-z0-9{{\"`])"), r"\1n't")
        for a in ("[Dd]o", "[Dd]oes", "is", "are", "should", "has", "was")
    ]
    + [(re.compile(r"\bcannot\b"), "can't")]
)
_QUESTIONS = [
    ("Would you like", "Want"),
    ("Would you care", "Want"),
    ("Shall I", "Should I"),
    ("Shall we", "Should we"),
    ("May I", "Can I"),
]


def lines(text: str) -> list[str]:
    """The entries of a table in `intents/*.toml`: one a line, blank ones left out."""
    return [line for line in text.split("\n") if line]


def _contract(sentence: str) -> str:
    for pattern, to in _CONTRACTIONS:
        sentence = pattern.sub(to, sentence)
    return sentence


def _casual_question(question: str) -> str:
    for formal, casual in _QUESTIONS:
        question = question.replace(formal, casual)
    return _contract(question)


def lower(sentence: str) -> str:
    """The sentence as it reads after a lead-in. Slots and "I" keep their first letter."""
    return sentence if re.match(r"I\b|\{", sentence) else sentence[0].lower() + sentence[1:]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One way to say one thing. `tones` are those it may be said in; `person` is whether it speaks of I or we."""

    text: str
    tones: frozenset[str]
    person: bool
    before: str = ""

    @property
    def whole(self) -> str:
        """With the lead-in, without the mark at its end."""
        return self.before + self.text


FORMAL, CASUAL = "formal", "casual"


def spoken(text: str, before: str = "", tone: str | None = None) -> Iterator[Sentence]:
    """A neutral sentence in the tones it can take: contracted when casual."""
    for voice, said in ((FORMAL, text), (CASUAL, _contract(text))):
        if tone in (None, voice):
            same = tone is None and _contract(text) == text
            tones = frozenset({FORMAL, CASUAL}) if same else frozenset({voice})
            whole = before + said
            yield Sentence(said, tones, FIRST_PERSON.search(whole) is not None, before)
            if same:
                return


def asked(question: str) -> Iterator[Sentence]:
    """A closing question as each tone asks it: "Would you like" is "Want" when casual."""
    casual = _casual_question(question)
    if casual == question:
        neutral = FORMAL_WORDS.search(question) is None and CASUAL_WORDS.search(question) is None
        tones = {FORMAL, CASUAL} if neutral else {FORMAL if FORMAL_WORDS.search(question) else CASUAL}
        yield Sentence(question[:-1], frozenset(tones), FIRST_PERSON.search(question) is not None)
        return
    yield Sentence(question[:-1], frozenset({FORMAL}), FIRST_PERSON.search(question) is not None)
    yield Sentence(casual[:-1], frozenset({CASUAL}), FIRST_PERSON.search(casual) is not None)


def opened(text: str, tone: str) -> Iterator[Sentence]:
    """The openers of one tone, one a line."""
    for line in lines(text):
        yield Sentence(line, frozenset({tone}), FIRST_PERSON.search(line) is not None)


def toned(text: str) -> bool:
    """Whether a reply is plainly casual or plainly formal."""
    return (FORMAL_WORDS.search(text) is None) != (CASUAL_WORDS.search(text) is None)


def mixed(text: str) -> bool:
    """Whether a reply is both at once."""
    return FORMAL_WORDS.search(text) is not None and CASUAL_WORDS.search(text) is not None
