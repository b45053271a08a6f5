"""The `heed` command: its commands and their flags. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import getpass
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy import completing
from deploy.door import NotDone, guarded, prepare_process, server, settings

app = typer.Typer(
    name="heed",
    help="A chat server that learns from its users.\n\nSettings come from flags, HEED_* variables and heed.toml.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
adapters = typer.Typer(name="adapters", help="The versions in the adapter store, and which of them is served.")
app.add_typer(adapters, no_args_is_help=True)
judgements = typer.Typer(name="feedback", help="What people said: brought in, taken out, and the story of one.")
app.add_typer(judgements, no_args_is_help=True)
benches = typer.Typer(name="bench", help="What the parts are worth, measured on simulated feedback.")
app.add_typer(benches, no_args_is_help=True)

Data = Annotated[Path | None, typer.Option(help="Folder of everything Heed keeps. (HEED_DATA, else heed-data)")]
Port = Annotated[int | None, typer.Option(help="TCP port of chat, feedback and page. (HEED_PORT, else 8000)")]
Host = Annotated[str | None, typer.Option(help="Address to listen on. (HEED_HOST, else 127.0.0.1)")]
Model = Annotated[str | None, typer.Option(help="Base model: directory or hub id. (HEED_MODEL, else the built-in one)")]
Url = Annotated[str | None, typer.Option(help="Address of the server. (this machine, HEED_PORT)")]
ApiKey = Annotated[
    str | None, typer.Option("--key", "--api-key", help="API key, where the server wants one. (HEED_API_KEY)")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Listen beyond this machine without API keys. (HEED_INSECURE)")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Supervised = Annotated[bool, typer.Option("--supervised", hidden=True)]


def main() -> None:
    guarded(app)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"heed {installed('heed')}")
        raise typer.Exit


@app.command()
def up(
    data: Data = None, port: Port = None, model: Model = None, host: Host = None, insecure: Insecure = False
) -> None:
    """Start server and learner on this machine; keep them running until Ctrl-C."""
    from deploy.welcome import run_local

    config = settings(data=data, port=port, model=model, host=host, insecure=insecure or None)
    raise typer.Exit(run_local(config, os.environ, Console()))


@app.command()
def serve(
    data: Data = None,
    port: Port = None,
    model: Model = None,
    host: Host = None,
    insecure: Insecure = False,
    supervised: Supervised = False,
) -> None:
    """Start the server alone."""
    flags = {"data": data, "port": port, "model": model, "host": host, "insecure": insecure or None}
    config = settings(warn=not supervised, **flags)
    prepare_process(config.serving, "server", supervised)
    from serving.process import serve as run

    raise typer.Exit(run(config.serving))


@app.command()
def learn(
    data: Data = None,
    model: Model = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Stop when there is nothing to learn now.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Forget the learner's state; make it anew from the log.")
    ] = False,
    supervised: Supervised = False,
) -> None:
    """Start the learner alone."""
    config = settings(warn=not supervised, data=data, model=model)
    prepare_process(config.serving, "learner", supervised)
    from learner.process import learn as run

    raise typer.Exit(run(config, until_idle=until_idle, rebuild=rebuild))


@app.command()
def chat(
    url: Url = None,
    key: ApiKey = None,
    user: Annotated[str | None, typer.Option(help="Who you are as a rater. (your login name)")] = None,
    model: Annotated[
        str, typer.Option(help="A policy, or one version of it: default@v3.", autocompletion=completing.speakers)
    ] = "default",
) -> None:
    """Talk and rate in the terminal."""
    from deploy.chat import chat as run

    url, key = server(url, key)
    run(url, user or getpass.getuser(), model, Console(), key)


@app.command()
def simulate(
    url: Url = None,
    key: ApiKey = None,
    rater: Annotated[
        str,
        typer.Option(
            help="What they like: a manner, or several joined by +, as emoji+short; ? lists them.",
            autocompletion=completing.one_of(completing.tastes, joined_by="+"),
        ),
    ] = "emoji",
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of their judgements that is wrong.")] = 0.1,
    bias: Annotated[float, typer.Option(min=0, help="How much they differ in harshness, log-odds.")] = 0.0,
    sparsity: Annotated[float, typer.Option(min=0, max=1, help="Share of replies they say nothing of.")] = 0.0,
    exchanges: Annotated[int, typer.Option(min=1, help="Exchanges to have and rate.")] = 500,
    raters: Annotated[int, typer.Option(min=1, help="How many people.")] = 24,
    kinds: Annotated[
        str,
        typer.Option(
            help="How they rate, in turn: thumb, rating, preference, correction.",
            autocompletion=completing.one_of(completing.kinds, joined_by=","),
        ),
    ] = "thumb",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON array of what they say. (those of the built-in model)")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="People talking at the same time.")] = 8,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a better version at the end, before asking again.")
    ] = 120,
    seed: Annotated[int, typer.Option(help="The same seed: the same people.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Simulated people with a hidden taste chat and rate; watch what they think change."""
    from deploy.simulate import Plan, run

    url, key = server(url, key)
    plan = Plan(
        url=url, key=key, taste=rater, noise=noise, bias=bias, sparsity=sparsity, exchanges=exchanges, raters=raters,
        kinds=kinds, prompts=prompts, at_once=at_once, wait_s=wait, seed=seed,
    )  # fmt: skip
    run(plan, Console(stderr=as_json), as_json)


@app.command()
def check(
    data: Data = None, port: Port = None, model: Model = None, host: Host = None, as_json: AsJson = False
) -> None:
    """Is everything here reachable and sane? What is not, and what to do; it changes nothing."""
    from deploy.check import run

    config = settings(warn=False, data=data, port=port, model=model, host=host)
    raise typer.Exit(run(config, os.environ, Console(stderr=as_json), as_json))


@app.command()
def backup(
    out: Annotated[Path, typer.Argument(help="The folder to make, e.g. /backups/heed-2026-11-26.")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Copy the data folder while everything runs: what was learned, adapters, log and secret.

    The copy is a data folder: to restore it, stop Heed, put the copy in its place, and start. Kafka keeps its own log.
    """
    from deploy.backup import run

    run(out, settings(data=data), Console(), as_json)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Directory of the model to make.")],
    seed: Annotated[int, typer.Option(help="The same seed: the same model.")] = 0,
    corpus: Annotated[
        list[Path] | None, typer.Option(help="Text or JSONL of chats to learn instead; may be repeated.")
    ] = None,
) -> None:
    """Make the built-in base model again, or one from your own text."""
    from learner.pretrain import pretrain as run

    try:
        run(out, seed=seed, corpus_files=corpus or None)
    except (ValueError, FileExistsError) as error:
        raise NotDone(str(error)) from error


@benches.command("learn")
def bench_learn(
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="ppo, a2c, reinforce, rloo, kto, dpo or sft; may be repeated. (HEED_OBJECTIVE, else ppo)",
            autocompletion=completing.one_of(completing.objectives),
        ),
    ] = None,
    rater: Annotated[
        list[str] | None,
        typer.Option(
            help="What people like, as in heed simulate; may be repeated. (emoji)",
            autocompletion=completing.one_of(completing.tastes, joined_by="+"),
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Judgements of a run.")] = 300,
    kind: Annotated[
        str,
        typer.Option(
            help="How they judge: thumb or preference.",
            autocompletion=completing.one_of(lambda: ("thumb", "preference")),
        ),
    ] = "thumb",
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of their judgements that is wrong.")] = 0.1,
    seed: Annotated[
        list[int] | None, typer.Option(help="The same seed: the same feedback; may be repeated. (0)")
    ] = None,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="File to which each run adds a line of JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Objectives side by side: what each makes of the same simulated feedback, judged on prompts that got none."""
    from deploy.bench import Plan, run

    config = settings(model=model)
    plan = Plan(objective or [config.objective], rater or ["emoji"], count, noise, seed or [0], kind, out)
    run(plan, config, Console(stderr=as_json), as_json)


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
    problems = versions.verify(store, chosen, versions.base_of(config))
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

    run(Plan(out, format_, kind, everything, text), settings(data=data), Console(), as_json)


@judgements.command("why")
def why_feedback(
    id_: Annotated[str, typer.Argument(metavar="ID", help="A receipt's id (fb-…), or a reply's (chatcmpl-…).")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """What became of a feedback: its history, its reply, whether it counts, and which version learned from it."""
    from deploy.why import run

    run(id_, settings(data=data), Console(), as_json)


if __name__ == "__main__":
    main()
