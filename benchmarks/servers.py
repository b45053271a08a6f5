"""A server that is measured: how it is started, paused, asked and stopped; and Heed as one of them.

While one is measured the others are stopped (SIGSTOP), so that their idling costs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import Answer, talk
from benchmarks.shapes import ADAPTERS, Prompt

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benchmarks" / "cache"
"""What benchmarks make or fetch once; git does not see it."""
ROWS, LENGTH = 32, 256
START_S = 600.0
Json = dict[str, Any]


class NotHere(Exception):
    """A peer cannot be installed or started on this machine; the message says why."""


@dataclass
class Server(ABC):
    """One running server. Subclasses say how it is installed and started, and how a request to it looks."""

    model: Path
    """The model's directory, with its adapters."""
    work: Path
    """A folder of its own."""
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    name = ""
    path = "/v1/completions"
    ready = "/health"
    adapters = True

    @abstractmethod
    def install(self) -> str:
        """Make what it needs, once; returns the version in words. Raises NotHere."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """What starts it, on `port`."""

    def environment(self) -> dict[str, str]:
        return {}

    @abstractmethod
    def body(self, prompt: Prompt, new: int, adapter: int | None) -> Json:
        """A greedy, streamed request for exactly `new` tokens, from an adapter (0, 1) or the base (None)."""

    def talk(self, bodies: Sequence[Json], at_once: int) -> tuple[list[Answer], float]:
        """All these requests, `at_once` at a time; the answers, and the seconds it took."""
        return talk(self.port, self.path, bodies, at_once)

    def count(self, answer: Answer) -> int:
        """Reply tokens, as the server itself counts them."""
        usage: int = json.loads(answer.last)["usage"]["completion_tokens"]
        return usage

    def start(self) -> None:
        """Start, and wait until it answers. Raises NotHere."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        with (self.work / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command()],
                env={**os.environ, **self.environment()},
                cwd=self.work,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until = time.monotonic() + START_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > until:
                tail = (self.work / "log").read_text(errors="replace")[-2000:]
                self.stop()
                raise NotHere(f"{self.name} did not start: ...{tail}")
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.ready}", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.go_on()
            self._signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)


class Heed(Server):
    """This repository, by its own interpreter; both versions promoted by hand, requests pinned to them."""

    name = "heed"
    path = "/v1/chat/completions"
    ready = "/ready"
    dtype = "bfloat16"

    def install(self) -> str:
        commit = output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
        return f"heed {commit}"

    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT),
            "HEED_MODEL": str(self.model),
            "HEED_DATA": str(self.work / "data"),
            "HEED_PORT": str(self.port),
            "HEED_DTYPE": self.dtype,
            "HEED_MAX_ROWS": str(ROWS),
            "HEED_MAX_MODEL_LEN": str(LENGTH),
            "HEED_ADMIN_TOKEN": "benchmark",
        }

    def command(self) -> Sequence[str]:
        shutil.rmtree(self.work / "data", ignore_errors=True)
        for name in ADAPTERS:
            run([*HEED, "adapters", "import", str(self.model / "adapters" / name)], self.environment())
        for version in range(1, len(ADAPTERS) + 1):
            run([*HEED, "adapters", "promote", f"v{version}"], self.environment())
        return [*HEED, "serve"]

    def body(self, prompt: Prompt, new: int, adapter: int | None) -> Json:
        return {
            "model": "default@v0" if adapter is None else f"default@v{adapter + 1}",
            "messages": [{"role": "user", "content": prompt.text}],
            "max_tokens": new,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "heed": {"ignore_eos": True},
        }


HEED = [sys.executable, "-m", "deploy.cli"]
"""The command of this very tree."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Raises NotHere with the end of what it printed."""
    done = subprocess.run([*command], env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"{' '.join(command)} failed: ...{(done.stdout + done.stderr)[-2000:]}")


def output(command: Sequence[str]) -> str:
    return subprocess.run([*command], capture_output=True, text=True, check=True).stdout.strip()
