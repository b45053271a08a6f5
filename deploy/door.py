"""The door of a process: settings are read here and nowhere else, and expected faults become one line.

Exit codes: 0 done; 1 a command did not get what it was asked for; 2 a wrong setting or flag; from 3 on a start that
cannot succeed as things are (serving/exits.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape

from serving.exits import Exit

if TYPE_CHECKING:
    from deploy.logs import Process
    from learner.config import LearnerConfig
    from serving.config import ServingConfig

T = TypeVar("T")

EXPECTED = {
    "feedback.config.SettingError": Exit.SETTING,
    "feedback.log.LogUnavailable": Exit.DATA,
    "serving.model.ModelError": Exit.MODEL,
    "serving.peft_files.BadAdapter": Exit.FAILED,
    "serving.release.ReleaseRefused": Exit.FAILED,
    "serving.release.ReleaseBroken": Exit.FAILED,
    "serving.durable.StoreBusy": Exit.FAILED,
    "deploy.client.Refused": Exit.FAILED,
    "deploy.door.NotDone": Exit.FAILED,
    "builtins.OSError": Exit.FAILED,
}
"""Faults told in one line, with their exit codes. By name: importing them would load torch for `heed --help`."""


class NotDone(Exception):
    """A command did not get what it was asked for; the message says why."""


def guarded(command: Callable[[], object]) -> None:
    """Runs a command line. An expected fault is one line on standard error and an exit code, never a traceback."""
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        complain(str(error), "red")
        sys.exit(code)


def exit_code_of(error: Exception) -> int | None:
    """The exit code of an expected fault, by the names of its class and of those above it; None for a defect."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
    return next((EXPECTED[name] for name in names if name in EXPECTED), None)


def complain(message: str, colour: str) -> None:
    Console(stderr=True).print(f"[{colour}]heed:[/{colour}] {escape(message)}", soft_wrap=True, highlight=False)


def shown_on(console: Console, doing: str, things: Iterable[T], count: int) -> Iterable[T]:
    """The things, with a bar of how many were taken, where the console is a terminal."""
    from rich.progress import track

    return track(things, doing, count, console=console, transient=True, disable=not console.is_terminal)


def settings(*, warn: bool = True, **flags: object) -> LearnerConfig:
    """All that is set: flags (None: not given) before HEED_* variables before ./heed.toml. Raises SettingError."""
    from feedback.config import load, unknown_settings
    from learner.config import LearnerConfig

    for message in unknown_settings(os.environ, LearnerConfig) if warn else ():
        complain(message, "yellow")
    return load(LearnerConfig, environ=os.environ, toml=Path("heed.toml"), flags=flags)


def server(url: str | None, key: str | None) -> tuple[str, str | None]:
    """The address of the server to talk to, and the API key for it: those named, else those of the settings."""
    from deploy.local import url_of

    serving = settings(api_key=key).serving
    if url is None:
        url = url_of(serving.host, serving.port)
    return url if "://" in url else f"http://{url}", serving.api_key


def prepare_process(config: ServingConfig, process: Process, supervised: bool) -> None:
    """What a server or learner needs before its first heavy import: a log on standard error, and its supervisor."""
    from deploy.logs import set_up_logs

    set_up_logs(config, process, supervised=supervised)
    if supervised:
        from deploy.local import stop_with_the_supervisor

        stop_with_the_supervisor()
