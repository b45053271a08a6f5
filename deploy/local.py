"""`heed up`: the server and the learner on this machine, kept alive, stopped together.

Each runs as a process of its own in a session of its own, so that Ctrl-C reaches the supervisor alone, which passes it
on as SIGTERM. Each child's standard input is a pipe whose other end only the supervisor holds: when the supervisor
dies, however suddenly, the pipe closes and the child stops itself (`stop_with_the_supervisor`): nothing is orphaned.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

from serving.exits import Exit

FINAL_EXITS = frozenset({Exit.SETTING, Exit.MODEL, Exit.PORT, Exit.HELD, Exit.DATA})
"""Exit codes of a child that say trying again is no use until someone has changed something."""
ANSWER_S = 2.0
"""How long a process on this machine may take to answer that it is well."""

Say = Callable[[str, str], None]
"""Prints a line of a source: "server", "learner" or "heed"."""


@dataclass(frozen=True, slots=True)
class Timing:
    """All in seconds."""

    first_pause: float = 1.0
    """Before a child that ended is started again; doubled while it keeps ending."""
    longest_pause: float = 30.0
    healthy_after: float = 60.0
    """A child that ran this long was well: the next pause is the first one again."""
    stop: float = 30.0
    """How long children may take to stop before they are killed."""
    occupied_for: float = 3.0
    """A server that answers for so long before any was started is somebody else's."""
    poll: float = 0.1


@dataclass(slots=True)
class Child:
    """One process that is to be running."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            env=dict(self.environ),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )

    async def finish(self, say: Say) -> int:
        """Prints what the process prints; returns its exit code (negative: the signal that ended it)."""
        assert self.process is not None
        assert self.process.stdout is not None
        await _print_lines(self.process.stdout, lambda line: say(self.name, line))
        return await self.process.wait()

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)


class Supervisor:
    """Keeps the server, and once that is ready the learner, running until told to stop or one of them cannot start."""

    def __init__(
        self,
        server: Child,
        learner: Child,
        *,
        ready: tuple[str, int],
        say: Say,
        on_ready: Callable[[], None],
        timing: Timing | None = None,
    ) -> None:
        """`ready`: the host and port whose `/ready` says that the server answers chats; then `on_ready` is called."""
        self.server, self.learner = server, learner
        self.ready = ready
        self.say = say
        self.on_ready = on_ready
        self.timing = timing or Timing()
        self.stopping = asyncio.Event()
        self.exit_code = 0

    async def run(self) -> int:
        """Runs until SIGINT, SIGTERM or SIGHUP (0), or until a child ends with a code that is final (that code).

        Where another server answers already, nothing is started: it would be taken for the one that was.
        """
        # SIGINT explicitly: a job started in the background begins with it ignored. SIGHUP: not when under nohup.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        if await self._occupied():
            self.say(
                "heed", f"{url_of(*self.ready)} answers already: stop what runs there, or set HEED_PORT to a free port"
            )
            return Exit.PORT
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._keep(self.server))
                both.create_task(self._keep_learner())
        finally:
            self._send(signal.SIGKILL)
        return self.exit_code

    def stop(self, exit_code: int = 0) -> None:
        """Stops both children, with a bounded wait; called once more, kills them."""
        if self.stopping.is_set():
            self._send(signal.SIGKILL)
            return
        self.exit_code = exit_code
        self.stopping.set()
        self._send(signal.SIGTERM)
        asyncio.get_running_loop().call_later(self.timing.stop, self._send, signal.SIGKILL)
        self.say("heed", "stopping; once more, and it stops at once")

    async def _occupied(self) -> bool:
        """True where a server answers, and goes on to: one whose own supervisor was killed stops within a moment."""
        until = time.monotonic() + self.timing.occupied_for
        while await asyncio.to_thread(answers, *self.ready, "/ready"):
            if time.monotonic() > until or await self._stopped_within(self.timing.poll):
                return True
        return False

    async def _keep_learner(self) -> None:
        """The learner starts after the server is ready: importing torch twice at once would delay the first reply."""
        while not await asyncio.to_thread(answers, *self.ready, "/ready"):
            if await self._stopped_within(self.timing.poll):
                return
        self.on_ready()
        await self._keep(self.learner)

    async def _keep(self, child: Child) -> None:
        """Runs a child again and again, with pauses that double while it keeps ending."""
        pause = self.timing.first_pause
        while not self.stopping.is_set():
            started = time.monotonic()
            await child.start()
            if self.stopping.is_set():
                child.send(signal.SIGTERM)  # it was being started while the others were told
            code = await child.finish(self.say)
            if self.stopping.is_set():
                return
            if code in FINAL_EXITS:
                self.stop(code)
                return
            if time.monotonic() - started >= self.timing.healthy_after:
                pause = self.timing.first_pause
            self.say("heed", f"the {child.name} ended ({meaning(code)}); starting it again in {pause:g} s")
            await self._stopped_within(pause)
            pause = min(self.timing.longest_pause, 2 * pause)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _send(self, number: signal.Signals) -> None:
        for child in (self.server, self.learner):
            child.send(number)


async def _print_lines(stream: asyncio.StreamReader, say: Callable[[str], None]) -> None:
    """Prints line by line; not by readline(), which fails on a line longer than its buffer."""
    rest = b""
    while chunk := await stream.read(65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            say(line.decode(errors="replace").rstrip("\r"))
    if rest:
        say(rest.decode(errors="replace"))


def meaning(exit_code: int) -> str:
    """What an exit code of subprocess says, for people."""
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def answers(host: str, port: int, path: str) -> bool:
    """True when a GET is answered with 200 within ANSWER_S. Goes to the address itself, whatever proxy is set."""
    try:
        with connected(host, port) as connection:
            connection.request("GET", path)
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def connected(host: str, port: int) -> Iterator[http.client.HTTPConnection]:
    """A connection that is cut after ANSWER_S, though a byte comes now and then. Raises TimeoutError then, or OSError."""
    deadline = time.monotonic() + ANSWER_S
    with closing(http.client.HTTPConnection(reachable(host), port, timeout=ANSWER_S)) as connection:
        connection.connect()
        cut = threading.Timer(ANSWER_S, _cut, [connection.sock])
        cut.start()
        try:
            yield connection
        finally:
            cut.cancel()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {ANSWER_S:g} s")


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


def reachable(host: str) -> str:
    """The address under which this machine reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def url_of(host: str, port: int) -> str:
    """The address for a browser or client on this machine."""
    shown = reachable(host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def stop_with_the_supervisor(grace_s: float = 10.0) -> None:
    """In a child: when standard input closes, the supervisor is gone; stop as by SIGTERM, then in any case."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="supervisor-watch", daemon=True).start()
