"""`heed adapters`: its commands and their flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy import completing
from deploy.door import settings, shown_on
from deploy.flags import AsJson, Data, Model

adapters = typer.Typer(name="adapters", help="The versions in the adapter store, and which of them is served.")


@adapters.command("list")
def list_versions(data: Data = None, as_json: AsJson = False) -> None:
    """Every version, and which one is served."""
    from deploy import versions

    listed = versions.listing(versions.store_of(settings(data=data)))
    print(json.dumps(listed)) if as_json else versions.print_listing(listed, Console())


Version = Annotated[str, typer.Argument(help="As v3 or 3; v0 is the base.", autocompletion=completing.versions)]


@adapters.command("show")
def show_version(version: Version, data: Data = None, as_json: AsJson = False) -> None:
    """All that is known of a version, as JSON: parent, feedback, update, gate, files. --json puts it on one line."""
    from deploy import versions

    shown = versions.show(versions.store_of(settings(data=data)), versions.number(version))
    print(json.dumps(shown, indent=None if as_json else 2))


Reason = Annotated[str, typer.Option(help="Why; kept in the release's history.")]


@adapters.command("promote")
def promote_version(
    version: Version, reason: Reason = "", data: Data = None, model: Model = None, as_json: AsJson = False
) -> None:
    """Serve this version from now on, gated or not (v0: the base)."""
    from deploy import versions

    config = settings(data=data, model=model)
    store, chosen = versions.store_of(config), versions.number(version)
    base = versions.base_of(config) if chosen else None
    left = store.release().current
    release = store.change("promote", "operator", version=chosen, reason=reason, base=base)
    print(versions.changed(left, release, as_json))


@adapters.command("rollback")
def roll_back(reason: Reason = "", data: Data = None, as_json: AsJson = False) -> None:
    """Serve the version that was served before the current one."""
    from deploy import versions

    store = versions.store_of(settings(data=data))
    left = store.release().current
    print(versions.changed(left, store.change("rollback", "operator", reason=reason), as_json))


@adapters.command("verify")
def verify_versions(
    version: Annotated[
        str | None, typer.Argument(help="One version. (all)", autocompletion=completing.versions)
    ] = None,
    data: Data = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Check digests, shapes, numbers and fit to the base; exit code 1 when a version is bad."""
    from deploy import versions

    config = settings(data=data, model=model)
    store = versions.store_of(config)
    chosen = store.versions() if version is None else [versions.number(version)]
    base = versions.base_of(config)
    problems = versions.verify(store, shown_on(Console(stderr=True), "verifying", chosen, len(chosen)), base)
    print(json.dumps(problems)) if as_json else versions.print_problems(problems, Console())
    raise typer.Exit(int(any(problems.values())))


@adapters.command("import")
def import_adapter(folder: Path, data: Data = None, model: Model = None, as_json: AsJson = False) -> None:
    """Make a PEFT adapter from elsewhere the next version; served to nobody until it is promoted."""
    from deploy import versions

    config = settings(data=data, model=model)
    version = versions.store_of(config).import_adapter(folder, versions.base_of(config))
    told = f"imported as v{version}; to serve it: heed adapters promote v{version}"
    print(json.dumps({"version": f"v{version}"}) if as_json else told)
