"""`heed feedback`: its commands and their flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy import completing
from deploy.door import settings
from deploy.flags import AsJson, Data, Model

judgements = typer.Typer(name="feedback", help="What people said: brought in, taken out, and the story of one.")


@judgements.command("import")
def import_feedback(
    file: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet, with TRL's column names.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="jsonl, csv or parquet. (by the suffix)",
            autocompletion=completing.one_of(completing.formats),
        ),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad lines out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the file.")] = False,
    data: Data = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Past chats and judgements, for the learner to begin with.

    A line has prompt and completion, with label (up, down, true, false, 1, 0) or rating (1 to 5) or neither; or
    prompt, chosen and rejected. Prompts and replies are texts or lists of messages. user, at, id, aspect and
    conversation may be added. A bad line refuses the whole file, unless --skip-bad.
    """
    from deploy.imports import Plan, run

    plan = Plan(file, format_, skip_bad, dry_run)
    raise typer.Exit(run(plan, settings(data=data, model=model), Console(stderr=as_json), as_json))


@judgements.command("export")
def export_feedback(
    out: Annotated[Path | None, typer.Option(help="Folder of the files, or the file of one kind.")] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="jsonl or parquet.",
            autocompletion=completing.one_of(lambda: ("jsonl", "parquet")),
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="unpaired, preferences, ratings or exchanges, to --out or printed. (all)",
            autocompletion=completing.one_of(lambda: ("unpaired", "preferences", "ratings", "exchanges")),
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also feedback that does not count.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Prompts and replies as texts, not as messages.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """What was said and what people thought of it, in TRL's column names: for KTO, DPO and reward models."""
    from deploy.exports import Plan, run

    run(Plan(out, format_, kind, everything, text), settings(data=data), Console(stderr=as_json), as_json)


@judgements.command("why")
def why_feedback(
    id_: Annotated[str, typer.Argument(metavar="ID", help="A receipt's id (fb-…), or a reply's (chatcmpl-…).")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """What became of a feedback: its history, its reply, whether it counts, and which version learned from it."""
    from deploy.why import run

    run(id_, settings(data=data), Console(), as_json)
