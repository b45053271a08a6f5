"""Tables that the documents hold, made from the code: settings, metrics, commands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import typer.main
from prometheus_client import CollectorRegistry

from deploy.cli import app
from feedback.config import reference
from learner.config import LearnerConfig
from learner.metrics import LearnerMetrics
from serving.metrics import Metrics, Now
from serving.vllm_metrics import VllmMetrics

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARKS = re.compile(r"(?P<begin><!-- (?P<name>\w+): [^\n]* -->\n)(?P<made>.*)(?P<end><!-- /(?P=name) -->)", re.DOTALL)
MOST_VALUES = 12
"""Of a label, shown; of more the number is said."""


def settings() -> str:
    rows = ["| setting | default | may be | what it is |", "|---|---|---|---|"]
    for doc in reference(LearnerConfig):
        rows.append(row(f"`{doc.name}`", doc.default, doc.allowed, doc.description))
    return lines(rows)


def metrics() -> str:
    """Each process's families with their labels and the values that are always there."""
    told = []
    for process, registry in registries().items():
        told += [f"\n## Of the {process}\n", "| metric | type | labels | what it is |", "|---|---|---|---|"]
        for family in sorted(registry.collect(), key=lambda family: family.name):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            told.append(row(f"`{name}`", family.type, labels(family.samples), family.documentation))
    return lines(told)


def registries() -> dict[str, CollectorRegistry]:
    """What each process exports when nothing has happened yet."""
    server, vllm, now = Metrics("default"), CollectorRegistry(), Now(True, 0, 0, 0, 0, 0.0, {0: "base"})
    server.watch(lambda: now)
    vllm.register(VllmMetrics(server, lambda: now))
    learner = LearnerMetrics()
    learner.count({"dropped": {}, "new": 0, "by_status": {}, "duplicates": 0, "late": 0})
    return {"server": server.registry, "server, by HEED_VLLM_METRICS": vllm, "learner": learner.registry}


def labels(samples: Iterable[Any]) -> str:
    values: dict[str, list[str]] = {}
    for sample in samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in (known := values.setdefault(label, [])):
                known.append(value)
    return "; ".join(
        f"`{label}`: {', '.join(known) if len(known) <= MOST_VALUES else f'{len(known)} values'}"
        for label, known in values.items()
    )


def commands() -> str:
    told: list[str] = []
    for name, command in each_command():
        told += [
            f"\n## {name}\n",
            (command.help or "").replace("\n\n", "\n").strip(),
            "\n```",
            usage(name, command),
            "```",
        ]
        rows = [row(*cells) for parameter in command.params if (cells := cells_of(parameter))]
        if rows:
            told += ["\n| flag | default | what it is |", "|---|---|---|", *rows]
    return lines(told)


def each_command() -> Iterator[tuple[str, Any]]:
    """Every verb that does something, with its full name, in the order of `heed --help`."""
    waiting = [("heed", root())]
    while waiting:
        name, command = waiting.pop(0)
        inner = getattr(command, "commands", {})
        waiting = [(f"{name} {verb}", one) for verb, one in inner.items() if not one.hidden] + waiting
        if not inner:
            yield name, command


def verb(words: Sequence[str]) -> tuple[Any, list[str]]:
    """The command that these words name, and the words left. Raises LookupError."""
    command, rest = root(), list(words)
    while inner := getattr(command, "commands", {}):
        if not rest or rest[0].startswith("-"):
            break
        if rest[0] not in inner:
            raise LookupError(f"no command heed {' '.join(words)}")
        command = inner[rest.pop(0)]
    return command, rest


def flags(command: Any) -> set[str]:
    """Everything that begins with a dash and that the command takes."""
    return {option for parameter in command.params for option in parameter.opts if option.startswith("-")}


@cache
def root() -> Any:
    return typer.main.get_command(app)


def usage(name: str, command: Any) -> str:
    asked = [one for one in command.params if one.param_type_name == "argument"]
    names = [(one.metavar or one.name).strip("_").upper() for one in asked]
    words = [name if one.required else f"[{name}]" for one, name in zip(asked, names, strict=True)]
    return " ".join([name, *words, *(["[flags]"] if any(map(cells_of, command.params)) else [])])


def cells_of(parameter: Any) -> tuple[str, str, str] | None:
    """Flag, default and meaning; None for an argument, and for what is hidden or the same for all."""
    if parameter.param_type_name != "option" or parameter.hidden or "--help" in parameter.opts:
        return None
    default = parameter.default
    shown = "" if default is None or parameter.is_flag or callable(default) or default == "" else str(default)
    flags = ", ".join(f"`{one}`" if parameter.is_flag else f"`{one} …`" for one in parameter.opts)
    return flags, shown, parameter.help or ""


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells) + " |"


def lines(told: Iterable[str]) -> str:
    return "\n".join(told).rstrip() + "\n"


MADE = {"settings.md": settings, "metrics.md": metrics, "cli.md": commands}
"""The pages, and what writes their middle."""


def write() -> None:
    """Write the tables again."""
    for name, make in MADE.items():
        page, made = DOCS / name, make()
        page.write_text(
            MARKS.sub(lambda found, made=made: found["begin"] + made + found["end"], page.read_text("utf-8")), "utf-8"
        )
