"""`heed up` as people see it: the lines of both processes, and once they are ready, where everything is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy.local import Child, Say, Supervisor, Timing, url_of
from deploy.logs import set_up_logs
from learner.config import LearnerConfig

COLOURS = {"server": "cyan", "learner": "magenta", "heed": "green"}

_log = logging.getLogger(__name__)


def run_local(config: LearnerConfig, environ: Mapping[str, str], console: Console, timing: Timing | None = None) -> int:
    """Runs both processes until told to stop; returns the exit code. `environ` is what they inherit."""
    serving = config.serving
    port = serving.port or free_port(serving.host)
    environ = environ_of_children(config, port, environ)

    if serving.log_format == "json":
        set_up_logs(serving, "supervisor", sys.stdout)
    say = _as_json if serving.log_format == "json" else partial(_for_people, console)
    supervisor = Supervisor(
        Child("server", command("serve"), environ),
        Child("learner", command("learn"), environ),
        ready=(serving.host, port),
        say=say,
        on_ready=lambda: welcome(config, port, console, say),
        timing=timing,
    )
    say("heed", f"starting the server, then the learner; everything is kept in {serving.feedback.data.absolute()}")
    return asyncio.run(supervised(supervisor))


def _for_people(console: Console, source: str, line: str) -> None:
    with contextlib.suppress(OSError, SystemExit):  # a terminal that closed, a full disk: no reason to stop serving
        console.print(Text(f"{source:>7} | ", COLOURS[source]) + Text(line), soft_wrap=True)


def _as_json(source: str, line: str) -> None:
    """The children's lines are JSON already, and say whose they are."""
    if source == "heed":
        _log.info(line)
    else:
        with contextlib.suppress(OSError):
            print(line, flush=True)


async def supervised(supervisor: Supervisor) -> int:
    return await supervisor.run()


def command(name: str) -> list[str]:
    """-P: a folder of the same name where the user happens to stand must not be taken for ours."""
    return [sys.executable, "-P", "-m", "deploy.cli", name, "--supervised"]


def environ_of_children(config: LearnerConfig, port: int, environ: Mapping[str, str]) -> dict[str, str]:
    """What the children inherit: flags handed on as variables, which beat heed.toml as the flags did."""
    serving = config.serving
    handed_on = {
        "HEED_DATA": str(serving.feedback.data),
        "HEED_HOST": serving.host,
        "HEED_PORT": str(port),
        **({"HEED_MODEL": serving.model} if serving.model is not None else {}),
        **({"HEED_INSECURE": "true"} if serving.insecure else {}),
        "PYTHONUNBUFFERED": "1",
    }
    if serving.log_format == "auto":
        handed_on["HEED_LOG_FORMAT"] = "pretty"  # they write into a pipe, but people read what comes out of it
    if "drain_delay_s" not in serving.model_fields_set:
        handed_on["HEED_DRAIN_DELAY_S"] = "0"  # no proxy stands before it that would have to notice
    # server and learner share the cores: threads that spin while they wait would stop each other, tenfold slower
    return {"OMP_WAIT_POLICY": "PASSIVE", **environ, **handed_on}


def free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def welcome(config: LearnerConfig, port: int, console: Console, say: Say) -> None:
    """Where everything is, and what to do first."""
    url, heed = url_of(config.serving.host, port), own_name()
    named = "" if port == 8000 else f" --url {url}"
    places = {
        "page": f"{url}/",
        "API": f"{url}/v1   (base_url of any OpenAI client)",
        "server": f"{url}/metrics",
        "learner": f"{url_of(config.serving.host, config.learner_metrics_port)}/metrics",
        "data": str(config.serving.feedback.data.absolute()),
        "API keys": f"{config.serving.api_keys_file}   (heed chat and simulate take one from HEED_API_KEY)",
    }
    if config.serving.api_keys_file is None:
        del places["API keys"]
    if not config.learner_metrics_port:
        del places["learner"]
    nexts = {
        "talk and rate": "open the page, or: " + f"{heed} chat{named}",
        "watch it learn": f"{heed} simulate --rater emoji{named}",
        "stop": "Ctrl-C",
    }
    if not console.is_terminal or config.serving.log_format == "json":
        for what, value in {**places, **nexts}.items():
            say("heed", f"{what}: {value}")
        return
    table = Table.grid(padding=(0, 2))
    for what, value in {**places, "": "", **nexts}.items():
        table.add_row(Text(what, "bold"), Text(value, overflow="fold"))
    console.print(Panel(table, title="Heed is running", border_style="green", expand=False))


def own_name() -> str:
    """How the user calls this command from where they stand."""
    own = Path(sys.argv[0])
    if shutil.which("heed") or own.name != "heed":
        return "heed"
    return min(str(own), os.path.relpath(own), key=len)
