"""What a shell offers at the tabulator: values that are quick to know, without torch, since it asks at each press.

Whatever goes wrong, nothing is offered, in silence: a traceback would stand in the middle of a command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

import typer

Complete = Callable[[str], list[str]]


def versions(ctx: typer.Context, incomplete: str) -> list[str]:
    """Those in the store, the newest first, as `heed adapters` takes them."""
    return _beginning(lambda: _versions(ctx), incomplete)


def speakers(incomplete: str) -> list[str]:
    """What `model` of a chat may be."""
    return _beginning(lambda: ["default", *(f"default@{version}" for version in _versions(None))], incomplete)


def one_of(words: Callable[[], Iterable[str]], joined_by: str = "\0") -> Complete:
    """One of these words, or several that are joined by a sign."""

    def complete(incomplete: str) -> list[str]:
        before, sign, last = incomplete.rpartition(joined_by)
        return [before + sign + word for word in _beginning(words, last)]

    return complete


def tastes() -> Iterable[str]:
    from feedback.raters import TASTES

    return TASTES


def kinds() -> Iterable[str]:
    from deploy.simulate import KINDS

    return KINDS


def objectives() -> Iterable[str]:
    from learner.config import LearnerConfig

    return get_args(LearnerConfig.model_fields["objective"].annotation)


def formats() -> Iterable[str]:
    from deploy.rows import Format

    return get_args(Format)


def _versions(ctx: typer.Context | None) -> list[str]:
    from deploy.door import settings

    serving = settings(warn=False, data=ctx and ctx.params.get("data")).serving
    manifests = (serving.adapter_root / serving.feedback.policy).glob("v*/manifest.json")
    return [f"v{number}" for number in sorted((int(path.parent.name[1:]) for path in manifests), reverse=True)] + ["v0"]


def _beginning(words: Callable[[], Iterable[str]], incomplete: str) -> list[str]:
    try:
        return [word for word in words() if word.startswith(incomplete)]
    except Exception:  # a wrong setting, a store that is away
        return []
