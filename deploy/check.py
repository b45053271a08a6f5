"""`heed check`: is everything reachable and sane here? One line a thing, each with what to do when it is not.

It changes nothing and loads no weights, so that it can be asked beside a server that fills the memory; what is quick comes
first. What is looked at: check_settings.py, check_machine.py, check_log.py, check_running.py, check_model.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy import check_log, check_machine, check_model, check_running, check_settings
from deploy.door import exit_code_of
from deploy.finding import Finding, Look, Seen
from learner.config import LearnerConfig

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}

LOOKS: Mapping[str, Look] = {
    "data": check_machine.folders,
    "disk": check_machine.disks,
    "clock": check_machine.clock,
    "keys": check_settings.keys,
    "probes": check_settings.probes,
    "log": check_log.log,
    "outbox": check_log.outbox,
    "redis": check_log.redis,
    "server": check_running.server,
    "learner": check_running.learner,
    "reading": check_log.reading,
    "learning": check_running.learning,
    "secret": check_settings.secret,
    "device": check_model.device,
    "model": check_model.model,
}
"""In the order in which they are looked at: one may rely on what those before it saw."""
REMEDIES = {
    "log": "Stop Heed, and put that file back from a copy (heed backup).",
    "reading": "heed learn --rebuild makes the learner's state anew from the log.",
    "keys": "Until then no server starts; one that runs keeps the keys it has.",
    "probes": "Until then no learner starts.",
    "model": "See HEED_MODEL: name another, or fetch it again.",
}
"""What to do about a fault that says of itself no more than what it is."""


def run(config: LearnerConfig, environ: Mapping[str, str], console: Console, as_json: bool) -> int:
    """Looks at everything and prints each finding as it comes; 1 when something failed, else 0."""
    started = before = time.monotonic()
    found = []
    with console.status("looking"):
        for finding in findings(config, environ):
            now = time.monotonic()
            found.append({**asdict(finding), "seconds": round(now - before, 3)})
            before = now
            if not as_json:
                console.print(line(finding))
    if as_json:
        print(json.dumps(found))
    else:
        console.print(verdict(found, time.monotonic() - started))
    return int(any(finding["verdict"] == "fail" for finding in found))


def findings(config: LearnerConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    seen = Seen(config)
    yield from check_settings.settings(config, environ)
    for name, look in LOOKS.items():
        yield from guarded(name, partial(look, seen))


def guarded(name: str, look: partial[Iterator[Finding]]) -> Iterator[Finding]:
    """What `look` finds; an expected fault is a finding, a defect rises."""
    try:
        yield from look()
    except OSError as error:
        yield Finding(name, "fail", str(error), "See to the file or folder named, and its permissions.")
    except Exception as error:
        if exit_code_of(error) is None:
            raise
        yield Finding(name, "fail", str(error), REMEDIES.get(name, ""))


def line(finding: Finding) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=4)
    table.add_column(width=8)
    colour = COLOURS[finding.verdict]
    says = escape(finding.says) + (f"\n[dim]→ {escape(finding.do)}[/dim]" if finding.do else "")
    table.add_row(f"[{colour}]{finding.verdict}[/{colour}]", finding.name, says)
    return table


def verdict(found: list[dict[str, object]], seconds: float) -> str:
    """The last line."""
    counts = [sum(finding["verdict"] == one for finding in found) for one in ("fail", "warn")]
    words = [f"{count} {word}" for count, word in zip(counts, ("failed", "to look at"), strict=True) if count]
    return f"[dim]{', '.join(words) or 'all is well'} ({len(found)} findings in {seconds:.1f} s)[/dim]"
