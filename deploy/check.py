"""`heed check`: is everything reachable and sane here? One line a thing, each with what to do when it is not."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.door import exit_code_of
from deploy.local import answers, url_of
from learner.config import LearnerConfig

Verdict = Literal["ok", "warn", "fail"]
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
DISK_WARN, DISK_FAIL = 2 << 30, 200 << 20
"""Free bytes of the data folder's disk below which to warn, and to fail."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one thing; `do` is empty where nothing is to be done."""

    name: str
    verdict: Verdict
    says: str
    do: str = ""


def run(config: LearnerConfig, console: Console, as_json: bool) -> int:
    """Looks at everything and prints it; 1 when something failed, else 0."""
    found = list(findings(config))
    if as_json:
        print(json.dumps([asdict(finding) for finding in found]))
    else:
        console.print(pretty(found))
    return int(any(finding.verdict == "fail" for finding in found))


def findings(config: LearnerConfig) -> Iterator[Finding]:
    folder = list(guarded("data", lambda: data_folder(config)))
    yield from folder
    usable = folder[0].verdict == "ok"
    if usable:
        yield from guarded("log", lambda: log(config))
        yield from guarded("clock", lambda: clock(config))
    if config.serving.feedback.redis_url is not None:
        yield redis(config.serving.feedback.redis_url, config.serving.feedback.policy)
    yield from guarded("keys", lambda: keys(config))
    yield from guarded("probes", lambda: probes(config))
    yield from guarded("model", lambda: model_and_adapters(config, adapters=usable))
    yield server(config)
    yield learner(config)


def guarded(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What `look` finds; an expected fault is a finding, a defect rises."""
    try:
        yield from look()
    except OSError as error:
        yield Finding(name, "fail", str(error), "See to the file or folder named, and its permissions.")
    except Exception as error:
        if exit_code_of(error) is None:
            raise
        yield Finding(name, "fail", str(error))


def data_folder(config: LearnerConfig) -> Iterator[Finding]:
    data = config.serving.feedback.data.absolute()
    place = next(folder for folder in (data, *data.parents) if folder.exists())
    if not place.is_dir():
        yield Finding("data", "fail", f"{place} is not a folder", "Name another one with HEED_DATA.")
        return
    with tempfile.TemporaryFile(dir=place) as probe:
        probe.write(b"can this be written?")
    yield Finding("data", "ok", f"{data} can be written" + ("" if place == data else " (it is not there yet)"))
    free = shutil.disk_usage(place).free
    verdict: Verdict = "fail" if free < DISK_FAIL else "warn" if free < DISK_WARN else "ok"
    do = "" if verdict == "ok" else "Make room, or move the data folder: a full disk refuses feedback."
    yield Finding("disk", verdict, f"{free / 2**30:.1f} GiB free", do)


def log(config: LearnerConfig) -> Iterator[Finding]:
    from feedback.events import TOPICS
    from feedback.log import open_log

    opened = open_log(config.serving.feedback, writes=())
    try:
        ends = {topic: opened.end(topic) for topic in TOPICS}
        counts = ", ".join(f"{sum(end.values())} {topic.removeprefix('heed.')}" for topic, end in ends.items())
        for topic, end in ends.items():
            opened.read(topic, {partition: max(0, offset - 1) for partition, offset in end.items()}, 1)
    finally:
        opened.close()
    brokers = config.serving.feedback.kafka.kafka_bootstrap
    if brokers and not any(ends.values()):
        do = (
            "Start it, or see HEED_KAFKA_BOOTSTRAP. A server makes the topics; until it can, events wait in its outbox."
        )
        yield Finding("log", "fail", f"the Kafka at {', '.join(brokers)} does not answer, or has no topics yet", do)
        return
    yield Finding("log", "ok", f"readable: {counts}")


def redis(url: str, policy: str) -> Finding:
    from feedback.redis_board import RedisBoard

    async def trouble() -> str | None:
        board = RedisBoard(url, policy)
        try:
            return await board.trouble()
        finally:
            await board.close()

    found = asyncio.run(trouble())
    if found is None:
        return Finding("redis", "ok", "answers, and keeps what it is given")
    do = "Start it, or see HEED_REDIS_URL. Until then all goes on, and servers share nothing."
    return Finding("redis", "fail", found, do)


def clock(config: LearnerConfig) -> Iterator[Finding]:
    """Against the file system's clock, and against the newest thing that Heed wrote."""
    with tempfile.NamedTemporaryFile() as probe:
        drift = abs(time.time() - Path(probe.name).stat().st_mtime)
    data = config.serving.feedback.data
    newest = max((path.stat().st_mtime for path in data.glob("log/*") if path.is_file()), default=0.0)
    if newest > time.time() + 60:
        ahead = newest - time.time()
        yield Finding("clock", "fail", f"the log was written {ahead:.0f} s in the future", "Set this machine's clock.")
    elif drift > 5:
        yield Finding("clock", "warn", f"{drift:.0f} s from the file system's", "Set this machine's clock (NTP).")
    else:
        yield Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def keys(config: LearnerConfig) -> Iterator[Finding]:
    from serving.keys import Keys

    path = config.serving.api_keys_file
    if path is not None:
        yield Finding("keys", "ok", f"{path}: {', '.join(Keys(path).names)}")


def probes(config: LearnerConfig) -> Iterator[Finding]:
    from learner.probes import read_probes

    if config.probes is not None:
        yield Finding("probes", "ok", f"{config.probes}: {', '.join(read_probes(config.probes))}")


def model_and_adapters(config: LearnerConfig, adapters: bool) -> Iterator[Finding]:
    from deploy.versions import store_of, verify
    from serving.base import describe_base
    from serving.model import find_model
    from serving.process import load_base

    started = time.monotonic()
    model, chat = load_base(config.serving)
    took = time.monotonic() - started
    named = config.serving.model or "the built-in heed-tiny"
    yield Finding("model", "ok", f"{named}: {model.num_parameters() / 1e6:,.1f} M parameters, loaded in {took:.1f} s")
    yield Finding("device", "ok", f"{model.device}, {str(model.dtype).removeprefix('torch.')}")
    if not adapters:
        return
    store = store_of(config)
    if store.release_problem:
        yield Finding("release", "fail", store.release_problem, "Promote a version by hand: heed adapters promote V.")
    problems = verify(store, store.versions(), describe_base(model, chat, find_model(config.serving.model)))
    for problem in filter(None, problems.values()):
        yield Finding("adapters", "fail", problem, "It is never served. Restore it from a copy, or delete its folder.")
    if not any(problems.values()):
        yield Finding("adapters", "ok", f"{len(problems)} versions, all whole; v{store.release().current} is served")


def server(config: LearnerConfig) -> Finding:
    host, port = config.serving.host, config.serving.port
    url = url_of(host, port)
    if answers(host, port, "/ready"):
        return Finding("server", "ok", f"ready at {url}")
    if answers(host, port, "/health"):
        return Finding("server", "warn", f"alive at {url}, not ready yet", "Wait until it has loaded, or see its log.")
    return Finding("server", "warn", f"nothing answers at {url}", "Start it: heed up (or heed serve).")


def learner(config: LearnerConfig) -> Finding:
    host, port = config.serving.host, config.learner_metrics_port
    if port == 0:
        return Finding("learner", "warn", "cannot be asked: HEED_LEARNER_METRICS_PORT is 0", "Give it a port.")
    url = url_of(host, port)
    if answers(host, port, "/health"):
        return Finding("learner", "ok", f"alive at {url}")
    return Finding("learner", "warn", f"nothing answers at {url}", "Start it: heed up (or heed learn).")


def pretty(found: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    for finding in found:
        colour = COLOURS[finding.verdict]
        says = escape(finding.says) + (f"\n[dim]→ {escape(finding.do)}[/dim]" if finding.do else "")
        table.add_row(f"[{colour}]{finding.verdict}[/{colour}]", finding.name, says)
    return table
