"""A real nginx (Debian's nginx-light) with the configuration that Heed recommends, deploy/nginx.conf."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.broker import free_port
from tests.house import ROOT, until

CONFIG = ROOT / "deploy" / "nginx.conf"


def why_not() -> str | None:
    """Why no nginx can be run here; None where one can."""
    return None if _program() else "no nginx: apt-get install nginx-light"


class Nginx:
    """One nginx in front of servers on these ports of this machine."""

    def __init__(self, folder: Path, behind: Sequence[int]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._said = folder / "nginx.log"
        folder.mkdir()
        (folder / "nginx.conf").write_text(_configured(CONFIG.read_text("utf-8"), self.port, behind))
        program = _program()
        assert program is not None
        run = ["-p", str(folder), "-c", "nginx.conf", "-g", "daemon off; pid nginx.pid;"]
        with self._said.open("wb") as out:
            self._process = subprocess.Popen([program, *run], stdout=out, stderr=out)
        until((folder / "nginx.pid").exists, "nginx runs", 10)

    def asked_again(self) -> int:
        """How many requests so far a second server was asked."""
        return len(re.findall(r" asked=[\d.:]+, ", self._said.read_text()))

    def troubles(self) -> str:
        """What it wrote of failures, and of requests that it did not simply pass on."""
        plain = re.compile(r'" 20\d .* answered=20\d id=')
        return "\n".join(line for line in self._said.read_text().splitlines() if not plain.search(line))

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)


@contextlib.contextmanager
def nginx(folder: Path, behind: Sequence[int]) -> Iterator[Nginx]:
    with contextlib.closing(Nginx(folder, behind)) as one:
        yield one


def _program() -> str | None:
    return shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")


def _configured(config: str, port: int, behind: Sequence[int]) -> str:
    """The same configuration on other ports, with its folders where anyone may write."""
    for number, other in enumerate(behind):
        config = _replaced(config, f"server 127.0.0.1:{8000 + number} ", f"server 127.0.0.1:{other} ")
    config = _replaced(config, "listen 8080;", f"listen 127.0.0.1:{port};")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return _replaced(config, "http {\n", "http {\n" + "".join(f"    {kind}_temp_path {kind};\n" for kind in kinds))


def _replaced(config: str, old: str, new: str) -> str:
    assert config.count(old) == 1, old
    return config.replace(old, new)
