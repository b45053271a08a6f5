"""The operator's own probes: what a candidate must say and must not, to the prompts of a TOML file. One table a probe:

    [opening-hours]
    prompt = "When do you open?"            or messages = [{role = "user", content = "…"}, …]
    must = ['\\b(9|nine)\\b', '(?i)morning'] regular expressions, or one: each is found in the reply
    must_not = '(?i)as an ai'               likewise: none is found
    samples = 4                             replies drawn at T=1, beside the likeliest one (T=0)
    share = 1.0                             of all these replies that must comply

A regular expression is searched for anywhere in the reply, as Python's `re` does; in single quotes TOML leaves backslashes alone.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from feedback.config import SettingError, variable
from learner.gate import Check
from serving.chat import Chat, ChatError

if TYPE_CHECKING:
    from learner.rollouts import Prompt, Sampler
    from serving.lora import AdapterWeights

SHOWN = 80
"""Characters of a prompt or a reply that a verdict repeats."""


def _compiled(given: object) -> object:
    """A regular expression or a list of them, compiled. Raises ValueError, which names the one that is wrong."""
    texts = given if isinstance(given, list) else [given]
    right = [text for text in texts if isinstance(text, str) and text]
    if not right or len(right) < len(texts):
        raise ValueError("must be a regular expression, or a list of them")
    try:
        return tuple(re.compile(text) for text in right)
    except re.error as error:
        raise ValueError(f"{error.pattern!r} is no regular expression: {error}") from None


Patterns = Annotated[tuple[re.Pattern[str], ...], BeforeValidator(_compiled)]


class Said(BaseModel):
    """One message of a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Probe(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = Field(None, min_length=1)
    messages: tuple[Said, ...] | None = Field(None, min_length=1)
    must: Patterns = ()
    must_not: Patterns = ()
    samples: int = Field(4, ge=0, le=256, strict=True)
    share: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> Probe:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a probe has either prompt or messages")
        if not self.must and not self.must_not:
            raise ValueError("a probe has must, or must_not, or both")
        return self

    @property
    def asked(self) -> tuple[Said, ...]:
        """The prompt as messages."""
        return self.messages or (Said(role="user", content=self.prompt or ""),)

    def fault(self, reply: str) -> str | None:
        """What is wrong with a reply, in words; None where it complies."""
        missing = next((f"lacks /{one.pattern}/ (must)" for one in self.must if not one.search(reply)), None)
        return missing or next((f"has /{one.pattern}/ (must_not)" for one in self.must_not if one.search(reply)), None)


def read_probes(path: Path | None) -> dict[str, Probe]:
    """The probes of a file, by name; none without a file. Raises SettingError, which names the line and the key."""
    if path is None:
        return {}
    setting = f"{variable('probes')}={path}"
    try:
        text = path.read_text("utf-8-sig")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(setting, None, f"cannot be read: {reason}") from None
    found: dict[str, Probe] = {}
    for name, table in tables.items():
        try:
            if not isinstance(table, dict):
                raise SettingError(setting, None, f"{name} stands outside of all tables; a probe is a table: [name]")
            found[name] = Probe.model_validate(table)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            says = first["msg"].removeprefix("Value error, ")
            place = f"line {_line(text, name, key.partition('.')[0])}: [{name}]"
            raise SettingError(setting, None, f"{place} {key + ': ' if key else ''}{says}") from None
    if not found:
        raise SettingError(setting, None, "holds no probe; it needs a table for each: [name]")
    return found


def encode(probes: Mapping[str, Probe], chat: Chat, room: int) -> dict[str, Prompt]:
    """The prompts as token ids, by name. Raises SettingError for one that the template refuses or that exceeds `room`."""
    prompts: dict[str, Prompt] = {}
    for name, probe in probes.items():
        try:
            prompts[name] = tuple(chat.encode(probe.asked))
        except ChatError as error:
            raise SettingError(variable("probes"), None, f"[{name}] {error}") from None
        if len(prompts[name]) > room:
            says = f"[{name}] has {len(prompts[name])} tokens; {room} leave room for a reply"
            raise SettingError(variable("probes"), None, says)
    return prompts


def ask(
    probes: Mapping[str, Probe],
    prompts: Mapping[str, Prompt],
    chat: Chat,
    sampler: Sampler,
    weights: AdapterWeights,
    seed: int,
) -> Check:
    """(e) Whether the candidate keeps to every probe: the likeliest reply and `samples` drawn ones, each prompt's own."""
    likeliest = sampler.sample([prompts[name] for name in probes], weights, seed, temperature=0.0)
    names = list(chain.from_iterable([name] * probe.samples for name, probe in probes.items()))
    drawn = sampler.sample([prompts[name] for name in names], weights, seed) if names else []
    replies: dict[str, list[str]] = {name: [] for name in probes}
    for name, rollout in zip([*probes, *names], [*likeliest, *drawn], strict=True):
        replies[name].append(chat.decode(rollout.reply_ids))
    return judge(probes, replies)


def judge(probes: Mapping[str, Probe], replies: Mapping[str, Sequence[str]]) -> Check:
    """The verdict on replies to each probe's prompt; a "no" names the probes, what was said and the pattern."""
    broken = [said for name, probe in probes.items() if (said := _broken(name, probe, replies[name]))]
    kept = (len(probes) - len(broken)) / len(probes)
    sentence = " ".join(broken) or f"The candidate keeps to all {len(probes)} probes."
    return Check("probes", "fail" if broken else "pass", kept, 1.0, sentence)


def _broken(name: str, probe: Probe, replies: Sequence[str]) -> str | None:
    faults = [(reply, fault) for reply in replies if (fault := probe.fault(reply))]
    comply = len(replies) - len(faults)
    if comply >= probe.share * len(replies):
        return None
    reply, fault = faults[0]
    asked = probe.asked[-1].content
    return (
        f'Probe "{name}": {comply} of {len(replies)} replies comply, {probe.share:.0%} must. '
        f"Asked “{_shortened(asked)}”, the candidate said “{_shortened(reply)}”, which {fault}."
    )


def _shortened(text: str) -> str:
    line = "".join(one for one in " ".join(text.split()) if one.isprintable())  # it reaches logs and terminals
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _line(text: str, name: str, key: str) -> int:
    """The line of a table's key, or of its head, from 1: tomllib gives lines only of what is no TOML."""
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if re.match(r"\s*\[[^\[\]{},=]+\]\s*(#.*)?$", line)]
    own = re.compile(rf"""\s*\[\s*["']?{re.escape(name)}["']?\s*\]""")
    head = next((number for number in heads if own.match(lines[number])), 0)
    end = next((number for number in heads if number > head), len(lines))
    found = (number for number in range(head + 1, end) if re.match(rf"\s*{re.escape(key)}\s*=", lines[number]))
    return 1 + next(found, head)
