"""`heed adapters`: the versions in the store and the release, by hand; works with the server and the learner dead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from feedback.events import Release
from learner.config import LearnerConfig
from serving.adapters import AdapterStore, BadAdapter, Base

Json = dict[str, Any]


def store_of(config: LearnerConfig) -> AdapterStore:
    return AdapterStore(config.serving.adapter_root, config.serving.feedback.policy)


def base_of(config: LearnerConfig) -> Base:
    """What an adapter must fit. Loads the base model; raises its loader's ModelError."""
    from serving.base import describe_base
    from serving.model import find_model, load_model

    model, chat = load_model(config.serving.model, config.serving.device, config.serving.dtype)
    return describe_base(model, chat, find_model(config.serving.model))


def number(text: str) -> int:
    """The version in `3`, `v3` or `default@v3`. Raises BadAdapter where there is none."""
    found = re.fullmatch(r"(?:.*@)?v?(\d{1,12})", text.strip())
    if found is None:
        raise BadAdapter(f"{text!r} is no version: write it as v3 or 3 (v0 is the base without an adapter).")
    return int(found[1])


def listing(store: AdapterStore) -> Json:
    """Every version and what the release makes of it, for people and programs."""
    release = store.release()
    return {
        "policy": store.policy,
        "current": name(release.current),
        "last_good": name(release.last_good),
        "candidate": None if release.candidate is None else name(release.candidate),
        "share": release.share,
        "paused": release.paused,
        "generation": release.generation,
        "versions": [_row(store, version, release) for version in store.versions()],
    }


def _row(store: AdapterStore, version: int, release: Release) -> Json:
    try:
        manifest = store.manifest(version)
    except (BadAdapter, OSError) as error:
        return {"version": name(version), "roles": _roles(version, release), "broken": str(error)}
    return {
        "version": name(version),
        "roles": _roles(version, release),
        "parent": name(manifest.parent),
        "created": manifest.created,
        "feedback": manifest.feedback.get("count"),
        "gate": manifest.gate.get("passed"),
        "imported_from": manifest.imported_from,
    }


def _roles(version: int, release: Release) -> list[str]:
    roles = {"current": release.current, "last good": release.last_good, "candidate": release.candidate}
    named = [role for role, holder in roles.items() if holder == version]
    return [*named, *(["approved"] if version in release.approved else [])]


def show(store: AdapterStore, version: int) -> Json:
    """The whole manifest of a version and its place in the release. Raises BadAdapter."""
    release = store.release()
    changes = [change.model_dump() for change in release.changes if change.current == version]
    if version == 0:
        return {"version": "v0", "roles": _roles(0, release), "is": "the base without an adapter", "changes": changes}
    manifest = store.manifest(version).model_dump(by_alias=True)
    return {**manifest, "version": name(version), "roles": _roles(version, release), "changes": changes}


def verify(store: AdapterStore, versions: Iterable[int], base: Base) -> dict[str, str]:
    """Version → what is wrong with it; "" for one that could be served on this base."""
    problems = {}
    for version in versions:
        try:
            store.verify(version, base)
            problems[name(version)] = ""
        except BadAdapter as error:
            problems[name(version)] = str(error)
    return problems


def changed(left: int, release: Release, as_json: bool) -> str:
    """What a change did, for people or programs."""
    if as_json:
        return json.dumps({"current": name(release.current), "before": name(left), "generation": release.generation})
    if left == release.current:
        return f"{release.policy} serves {name(left)} already"
    return f"{release.policy} serves {name(release.current)} (before: {name(left)})"


def name(version: int) -> str:
    return f"v{version}"


def print_listing(listed: Json, console: Console) -> None:
    paused = " [yellow](paused: the learner promotes nothing)[/yellow]" if listed["paused"] else ""
    console.print(f"Policy [b]{listed['policy']}[/b] serves [b]{listed['current']}[/b]{paused}")
    if not listed["versions"]:
        console.print("No versions yet: the base speaks until the learner publishes one.")
        return
    table = Table("version", "made", "from", "feedback", "gate", "is")
    for row in listed["versions"]:
        if "broken" in row:
            table.add_row(row["version"], "", "", "", "", f"[red]{escape(row['broken'])}[/red]")
            continue
        table.add_row(
            row["version"],
            f"{datetime.fromtimestamp(row['created']):%Y-%m-%d %H:%M:%S}",
            escape(Path(row["imported_from"]).name) if row["imported_from"] else row["parent"],
            "" if row["feedback"] is None else str(row["feedback"]),
            {True: "passed", False: "[yellow]refused[/yellow]"}.get(row["gate"], "not gated"),
            ", ".join(row["roles"]),
        )
    console.print(table)


def print_problems(problems: dict[str, str], console: Console) -> None:
    for version, problem in problems.items():
        console.print(
            f"[red]{escape(problem)}[/red]" if problem else f"{version}: whole, and fits the base", soft_wrap=True
        )
    if not problems:
        console.print("No versions in the store.")
