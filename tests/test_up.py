"""`heed up` as its users have it: two real processes, the built-in model, one command to start and one key to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from deploy.local import answers

START_S = 90
"""Generous: a busy machine imports torch slowly."""


class Up:
    """One `heed up`, and what it printed so far."""

    def __init__(self, folder: Path, heed: Sequence[str | Path]) -> None:
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.port, self.metrics = (probe.getsockname()[1] for probe in probes)
        for probe in probes:
            probe.close()
        self.printed = folder / "printed.txt"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HEED_")}
        ports = {"HEED_PORT": str(self.port), "HEED_LEARNER_METRICS_PORT": str(self.metrics)}
        with self.printed.open("w") as output:
            self.process = subprocess.Popen(
                [*heed, "up", "--data", folder / "data"],
                cwd=folder,
                env={**environ, **ports},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def text(self) -> str:
        return self.printed.read_text()

    def is_whole(self) -> bool:
        return answers("127.0.0.1", self.port, "/ready") and answers("127.0.0.1", self.metrics, "/health")

    def children(self) -> dict[str, int]:
        """ "serve" and "learn" → process id."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in listed}
        return {words[4]: pid for pid, words in commands.items() if len(words) > 4}

    def until(self, true: Callable[[], bool]) -> None:
        give_up = time.monotonic() + START_S
        while not true():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < give_up, self.text
            time.sleep(0.1)


@contextmanager
def running(folder: Path, heed: Sequence[str | Path] = (sys.executable, "-m", "deploy.cli")) -> Iterator[Up]:
    """`heed`: the command, as words."""
    up = Up(folder, heed)
    try:
        up.until(up.is_whole)
        yield up
    finally:
        up.process.kill()
        up.process.wait()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    with running(tmp_path) as started:
        yield started


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def first_words(url: str) -> str:
    """The start of a streamed reply."""
    body = {"model": "default", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                if choices and choices[0]["delta"].get("content"):
                    return str(choices[0]["delta"]["content"])
    return ""


def test_it_talks_says_where_everything_is_and_stops_at_ctrl_c(up: Up):
    assert first_words(up.url)
    for told in (f"page: {up.url}/", f"API: {up.url}/v1", f":{up.metrics}/metrics", str(up.printed.parent / "data")):
        assert told in up.text
    assert re.search(r"^ server \| ", up.text, re.MULTILINE)
    children = up.children()
    assert set(children) == {"serve", "learn"}
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    assert all(is_gone(pid) for pid in children.values())
    assert "Traceback" not in up.text


def test_whichever_process_is_killed_comes_back_and_the_other_goes_on(up: Up):
    before = up.children()
    for name in ("learn", "serve"):
        os.kill(before[name], signal.SIGKILL)
        up.until(lambda name=name: up.children().get(name, before[name]) != before[name])
    up.until(up.is_whole)
    assert first_words(up.url)
    assert up.text.count("killed by SIGKILL") == 2


def test_killed_itself_it_leaves_nothing_behind_and_the_folder_can_be_used_again_at_once(up: Up, tmp_path: Path):
    children = up.children()
    up.process.kill()
    up.process.wait()
    with running(tmp_path) as again:
        assert first_words(again.url)
        again.until(lambda: all(is_gone(pid) for pid in children.values()))
