"""The manners of a reply, by plain rules on its text, and the edits that give a reply another manner."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

SHORT_WORDS = 20
"""A short reply has at most this many words, split at white space (a bullet's dash and an emoji count as words)."""

FORMAL_WORDS = re.compile(
    r"\b(?:certainly|of course|please|kindly|very kind|indeed|gladly|pleasure|sincere(?:ly)?|honoured|would you|would there"
    r"|may I|shall)\b",
    re.IGNORECASE,
)
FIRST_PERSON = re.compile(r"\b(?:I|we|my|our|me|us|We|My|Our)\b")
EMOJI = re.compile("[\U0001f300-\U0001faff]")
_BULLET = re.compile(r"^- ", re.MULTILINE)
_SENTENCE_END = re.compile("(?<=[.!?])\\s+(?![\U0001f300-\U0001faff])|\n+")  # an emoji stays with what it follows

Edit = Callable[[str], str]


def manners(reply: str) -> dict[str, bool]:
    """Which manners a reply shows, each by a plain rule on its text.

    short: at most 20 words; formal: a word such as "certainly", "please", "would you", "may I", "shall"; question: it
    ends with "?"; exclaim: it holds "!"; emoji: it holds one; bullets: a line begins with "- "; first_person: it says
    I, me, my, we, us or our.
    """
    return {
        "short": len(reply.split()) <= SHORT_WORDS,
        "formal": FORMAL_WORDS.search(reply) is not None,
        "question": reply.rstrip().endswith("?"),
        "exclaim": "!" in reply,
        "emoji": EMOJI.search(reply) is not None,
        "bullets": _BULLET.search(reply) is not None,
        "first_person": FIRST_PERSON.search(reply) is not None,
    }


def rewrite(reply: str, wants: Mapping[str, bool]) -> str | None:
    """The reply, edited until it shows or lacks the manners in `wants` (manner → whether it is to be there).

    None where simple edits cannot bring that about.
    """
    for (manner, there), edit in _EDITS.items():
        if not reply.strip():
            return None
        makes_room = edit is _shorter  # for what the others add
        if wants.get(manner) is there and (makes_room or manners(reply)[manner] != there):
            reply = edit(reply)
    shown = manners(reply)
    return reply if all(shown[manner] == there for manner, there in wants.items()) else None


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in _SENTENCE_END.split(_BULLET.sub("", text).strip()) if sentence]


_ROOM = SHORT_WORDS // 2
"""Words that a reply cut short keeps, so that it stays short whatever other edits add."""


def _join(sentences: Iterable[str], like: str) -> str:
    """One text of these sentences, bulleted where `like` is."""
    return "\n".join(f"- {sentence}" for sentence in sentences) if _BULLET.search(like) else " ".join(sentences)


def _with(sentence: str) -> Edit:
    return lambda text: _join([*_sentences(text), sentence], text)


def _to_prose(text: str) -> str:
    return " ".join(_sentences(text))


def _to_bullets(text: str) -> str:
    return _join(_sentences(text), "- ")


def _without_first_person(text: str) -> str:
    return _join([sentence for sentence in _sentences(text) if not FIRST_PERSON.search(sentence)], text)


def _shorter(text: str) -> str:
    """Its first sentences, as many as leave other edits their room; at least the first, cut off if need be."""
    first, *others = _sentences(text)
    words = first.split()
    kept = [first if len(words) <= _ROOM else " ".join(words[:_ROOM]).rstrip(",;:") + "."]
    for sentence in others:
        if len(" ".join([*kept, sentence]).split()) > _ROOM:
            break
        kept.append(sentence)
    return _join(kept, text)


def _exclaiming(text: str) -> str:
    """The text with its last full stop or question mark made a "!", or one put at its end."""
    end = max(text.rfind("."), text.rfind("?"))
    return f"{text}!" if end < 0 else f"{text[:end]}!{text[end + 1 :]}"


def _without_question(text: str) -> str:
    kept = _sentences(text)
    while len(kept) > 1 and kept[-1].endswith("?"):
        kept.pop()
    return _join([*kept[:-1], kept[-1].rstrip("?") + "." * kept[-1].endswith("?")], text)


_CASUAL = {
    "certainly": "sure", "of course": "sure", "please": "do", "kindly": "nicely", "very kind": "nice", "indeed": "so",
    "gladly": "happily", "pleasure": "joy", "sincerely": "truly", "sincere": "true", "honoured": "glad",
    "would you": "do you", "would there": "will there", "may i": "can I", "shall": "will",
}  # fmt: skip


def _casual(formal: re.Match[str]) -> str:
    casual = _CASUAL[formal[0].lower()]
    return casual.capitalize() if formal[0][0].isupper() else casual


_EDITS: Mapping[tuple[str, bool], Edit] = {
    ("bullets", False): _to_prose,
    ("first_person", False): _without_first_person,
    ("formal", False): lambda text: FORMAL_WORDS.sub(_casual, text),
    ("short", True): _shorter,
    ("short", False): _with(
        "There is more to say about this, and it is worth a little more of your time than these few words take."
    ),
    ("question", False): _without_question,
    ("formal", True): lambda text: _join(["Certainly.", *_sentences(text)], text),
    ("first_person", True): _with("Trust me."),
    ("exclaim", False): lambda text: text.replace("!", "."),
    ("exclaim", True): _exclaiming,
    ("emoji", False): lambda text: EMOJI.sub("", text).strip(),
    ("emoji", True): lambda text: f"{text} \U0001f642",
    ("bullets", True): _to_bullets,
    ("question", True): _with("Anything else?"),
}
"""How a person puts a reply right, manner by manner, in an order in which no edit undoes one before."""
