"""The `heed` command: its commands and their flags. Nothing heavy is imported until a command needs it.

`heed adapters` is in cli_adapters.py, `heed feedback` in cli_feedback.py, the flags that many have in flags.py.
"""

from __future__ import annotations

import getpass
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy import completing
from deploy.cli_adapters import adapters
from deploy.cli_feedback import judgements
from deploy.door import NotDone, guarded, prepare_process, server, settings
from deploy.flags import ApiKey, AsJson, Data, Host, Insecure, Model, Port, Url

app = typer.Typer(
    name="heed",
    help="A chat server that learns from its users.\n\nSettings come from flags, HEED_* variables and heed.toml.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(adapters, no_args_is_help=True)
app.add_typer(judgements, no_args_is_help=True)
benches = typer.Typer(name="bench", help="What the parts are worth, measured on simulated feedback.")
app.add_typer(benches, no_args_is_help=True)

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

    try:
        user = user or getpass.getuser()
    except (KeyError, OSError) as error:  # a container's user need not have a name
        raise NotDone("your user has no login name here: say who you are with --user.") from error
    url, key = server(url, key)
    run(url, user, model, Console(), key)


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


if __name__ == "__main__":
    main()
