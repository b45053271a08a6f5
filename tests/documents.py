"""README and docs/, as tests read them: their blocks, and the commands that they tell people to give."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
}
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())

_FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_GIVEN = re.compile(r"[A-Z][A-Z_]*=")


def blocks(text: str, language: str = "") -> list[str]:
    """Fenced blocks in this language; without one, those that name none."""
    return [body for named, body in _FENCED.findall(text) if named == language]


def inline(text: str) -> list[str]:
    """What stands between single backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCED.sub("", text))


def in_blocks(text: str, name: str) -> list[list[str]]:
    """Calls of a command in the blocks for a shell, as words after its name; those of `heed` in a container too."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [called for line in lines if (called := _called(line, name)) is not None]


def in_sentences(text: str, name: str) -> list[list[str]]:
    """The same in sentences, where arguments may be left out."""
    return [called for words in inline(text) if (called := _called(words, name)) is not None]


def _called(line: str, name: str) -> list[str] | None:
    if line.count("'") % 2 or line.count('"') % 2:
        return None
    words = shlex.split(line, comments=True)
    while words and _GIVEN.match(words[0]):
        words = words[1:]
    if words[:1] == ["docker"] and words[1] != "build" and name in words:
        words = words[words.index(name) :]
    return words[1:] if words and Path(words[0]).name == name else None
