"""The supervisor of `heed up`, with small real processes in the place of server and learner."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local import Child, Supervisor, Timing, answers, meaning, url_of
from deploy.welcome import environ_of_children
from feedback.config import load
from learner.config import LearnerConfig
from serving.exits import Exit

ROOT = Path(__file__).resolve().parent.parent
FAST = Timing(first_pause=0.1, longest_pause=0.4, healthy_after=60, stop=3, poll=0.02)

SERVER = """
    import http.server, sys
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
        def log_message(self, *_): pass
    print("listening", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
WAIT = "import time; print('here', flush=True); time.sleep(600)"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Run:
    """One supervised run, with what it said."""

    def __init__(self, server: str, learner: str, port: int, timing: Timing = FAST) -> None:
        self.lines: list[tuple[float, str, str]] = []
        self.ready_at: list[float] = []
        self.server, self.learner = (
            Child(name, [sys.executable, "-c", textwrap.dedent(program), str(port)], os.environ)
            for name, program in (("server", server), ("learner", learner))
        )
        self.port, self.timing = port, timing

    def until(self, done: Callable[[Run], bool], then: Callable[[Supervisor], None] = Supervisor.stop) -> int:
        """Runs until `done`, does `then`, and returns the exit code; fails after 20 s."""

        async def main() -> int:
            supervisor = Supervisor(
                self.server,
                self.learner,
                ready=("127.0.0.1", self.port),
                say=lambda source, line: self.lines.append((time.monotonic(), source, line)),
                on_ready=lambda: self.ready_at.append(time.monotonic()),
                timing=self.timing,
            )
            running = asyncio.create_task(supervisor.run())
            async with asyncio.timeout(20):
                while not running.done() and not done(self):
                    await asyncio.sleep(0.01)
                if not running.done():
                    then(supervisor)
                return await running

        return asyncio.run(main())

    def said(self, source: str, words: str) -> int:
        return sum(words in line for _, who, line in self.lines if who == source)


def never(_: Run) -> bool:
    return False


def test_the_learner_starts_once_the_server_is_ready_and_both_stop(port: int):
    run = Run(SERVER, WAIT, port)
    assert run.until(lambda run: run.said("learner", "here") == 1) == 0
    assert len(run.ready_at) == 1
    listening, here = (next(at for at, _, line in run.lines if line == word) for word in ("listening", "here"))
    assert listening <= run.ready_at[0] <= here
    for child in (run.server, run.learner):
        assert child.process is not None
        assert child.process.returncode == -signal.SIGTERM


def test_nothing_is_started_where_another_server_answers(port: int):
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(SERVER), str(port)]) as other:
        try:
            while not answers("127.0.0.1", port, "/ready"):
                time.sleep(0.02)
            run = Run(SERVER, WAIT, port, Timing(occupied_for=0.2, poll=0.02))
            assert run.until(never) == Exit.PORT
        finally:
            other.kill()
    assert [line for _, _, line in run.lines] == [
        f"http://127.0.0.1:{port} answers already: stop what runs there, or set HEED_PORT to a free port"
    ]
    assert not run.ready_at


def test_a_child_that_ends_is_started_again_after_pauses_that_double_up_to_the_longest(port: int):
    run = Run(SERVER, "print('here', flush=True); raise SystemExit(1)", port)
    run.until(lambda run: run.said("learner", "here") >= 6)
    said = [line for _, source, line in run.lines if source == "heed"]
    assert said[0] == "the learner ended (exit code 1); starting it again in 0.1 s"
    assert [line.split()[-2] for line in said[:5]] == ["0.1", "0.2", "0.4", "0.4", "0.4"]


def test_after_a_minute_of_health_the_pause_is_the_first_one_again(port: int):
    always_well = Timing(first_pause=0.05, longest_pause=1, healthy_after=0.0, stop=3, poll=0.02)
    run = Run(SERVER, "raise SystemExit(1)", port, always_well)
    run.until(lambda run: run.said("heed", "ended") >= 4)
    said = [line for _, _, line in run.lines if "ended" in line]
    assert all(line.endswith("in 0.05 s") for line in said)


def test_a_killed_server_comes_back_and_the_learner_goes_on(port: int):
    run = Run(SERVER, WAIT, port)
    killed: list[int] = []

    def back_again(run: Run) -> bool:
        if run.said("learner", "here") and not killed:
            run.server.send(signal.SIGKILL)
            killed.append(port)
        return run.said("server", "listening") == 2

    assert run.until(back_again) == 0
    assert run.said("heed", "the server ended (killed by SIGKILL)") == 1
    assert run.said("learner", "here") == 1


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6])
def test_a_start_that_cannot_succeed_ends_everything_with_its_code(port: int, code: int):
    run = Run(SERVER, f"print('no model there', flush=True); raise SystemExit({code})", port)
    assert run.until(never) == code
    assert run.said("learner", "no model there") == 1
    assert not run.said("heed", "again")


def test_a_server_that_cannot_start_ends_everything_though_it_was_never_ready(port: int):
    run = Run("raise SystemExit(3)", WAIT, port)
    assert run.until(never) == 3
    assert not run.ready_at


def test_a_child_that_will_not_stop_is_killed(port: int):
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"
    run = Run(SERVER, stubborn, port, Timing(stop=0.3, poll=0.02))
    started = time.monotonic()
    assert run.until(lambda run: run.said("learner", "here") == 1) == 0
    assert time.monotonic() - started < 10
    assert run.learner.process is not None
    assert run.learner.process.returncode == -signal.SIGKILL


def test_both_are_stopped_though_nobody_can_be_told(port: int):
    """As where the terminal has closed."""

    class Deaf(list[tuple[float, str, str]]):
        def append(self, line: tuple[float, str, str]) -> None:
            if "stopping" in line[2]:
                raise OSError(5, "Input/output error")
            super().append(line)

    def stop(supervisor: Supervisor) -> None:
        with pytest.raises(OSError, match="Input/output error"):
            supervisor.stop()

    run = Run(SERVER, WAIT, port)
    run.lines = Deaf()
    assert run.until(lambda run: run.said("learner", "here") == 1, stop) == 0
    assert run.learner.process is not None
    assert run.learner.process.returncode == -signal.SIGTERM


def test_told_twice_it_does_not_wait(port: int):
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"
    run = Run(SERVER, stubborn, port, Timing(stop=600, poll=0.02))

    def twice(supervisor: Supervisor) -> None:
        supervisor.stop()
        supervisor.stop()

    assert run.until(lambda run: run.said("learner", "here") == 1, twice) == 0


def test_every_line_is_told_whole_however_long_and_without_a_newline_at_the_end(port: int):
    run = Run(SERVER, "import sys; sys.stdout.write('x' * 300_000 + '\\nlast'); sys.exit(2)", port)
    run.until(never)
    assert [len(line) for _, source, line in run.lines if source == "learner"] == [300_000, 4]


SUPERVISOR = """
    import asyncio, json, os, sys
    from deploy.local import Child, Supervisor, Timing
    from deploy.welcome import supervised
    port, server, learner = json.loads(sys.argv[1])
    def child(name, program):
        return Child(name, [sys.executable, "-c", program, str(port)], os.environ)
    supervisor = Supervisor(
        child("server", server), child("learner", learner), ready=("127.0.0.1", port),
        say=lambda source, line: print(source, line, flush=True), on_ready=lambda: None, timing=Timing(poll=0.02),
    )
    sys.exit(asyncio.run(supervised(supervisor)))
"""
CHILD_OF_A_SUPERVISOR = """\
import os, time
from deploy.local import stop_with_the_supervisor
stop_with_the_supervisor(grace_s=2)
print("pid", os.getpid(), flush=True)
time.sleep(600)
"""


def start_supervisor(port: int, learner: str, *, sigint_ignored: bool = False) -> subprocess.Popen[str]:
    watch = "from deploy.local import stop_with_the_supervisor; stop_with_the_supervisor()\n"
    children = [port, watch + textwrap.dedent(SERVER), learner]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SUPERVISOR), json.dumps(children)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if sigint_ignored else None,
    )


def pid_of_learner(supervisor: subprocess.Popen[str]) -> int:
    assert supervisor.stdout is not None
    return next(int(line.split()[-1]) for line in supervisor.stdout if line.startswith("learner pid"))


def is_gone(pid: int, within_s: float = 10) -> bool:
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_both_and_the_exit_code_is_0_even_as_a_background_job(port: int, number: signal.Signals):
    with start_supervisor(port, CHILD_OF_A_SUPERVISOR, sigint_ignored=True) as supervisor:
        learner = pid_of_learner(supervisor)
        supervisor.send_signal(number)
        assert supervisor.wait(20) == 0
    assert is_gone(learner)
    assert not answers("127.0.0.1", port, "/ready")


def test_children_do_not_outlive_a_supervisor_that_was_killed(port: int):
    with start_supervisor(port, CHILD_OF_A_SUPERVISOR) as supervisor:
        learner = pid_of_learner(supervisor)
        supervisor.kill()
        assert is_gone(learner)


def test_children_do_not_outlive_it_even_when_they_ignore_sigterm(port: int):
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILD_OF_A_SUPERVISOR
    with start_supervisor(port, stubborn) as supervisor:
        learner = pid_of_learner(supervisor)
        supervisor.kill()
        assert is_gone(learner)


def test_flags_reach_the_children_as_variables_and_beat_those():
    config = load(
        LearnerConfig,
        environ={"HEED_PORT": "8001", "HEED_MODEL": "gpt2"},
        toml=None,
        flags={"port": 9000, "data": Path("elsewhere")},
    )
    environ = environ_of_children(config, 9000, {"HEED_PORT": "8001", "HEED_MODEL": "gpt2", "OTHER": "x"})
    assert environ["HEED_PORT"] == "9000"
    assert environ["HEED_DATA"] == "elsewhere"
    assert environ["HEED_MODEL"] == "gpt2"
    assert environ["OTHER"] == "x"
    assert "HEED_INSECURE" not in environ
    insecure = load(LearnerConfig, environ={}, toml=None, flags={"insecure": True})
    assert environ_of_children(insecure, 9000, {})["HEED_INSECURE"] == "true"


def test_heed_up_drains_at_once_unless_told_otherwise(tmp_path: Path):
    def drain(environ: dict[str, str], toml: Path | None = None) -> str | None:
        config = load(LearnerConfig, environ=environ, toml=toml, flags={})
        return environ_of_children(config, 8000, environ).get("HEED_DRAIN_DELAY_S")

    toml = tmp_path / "heed.toml"
    toml.write_text("drain_delay_s = 7\n")
    assert drain({}) == "0"
    assert drain({"HEED_DRAIN_DELAY_S": "3"}) == "3"
    assert drain({}, toml) is None  # the child reads it there itself


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:1"), ("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1")],
)
def test_the_address_shown_is_one_that_a_browser_here_can_open(host: str, url: str):
    assert url_of(host, 1) == url


def test_exit_codes_are_told_in_words():
    assert (meaning(1), meaning(-9)) == ("exit code 1", "killed by SIGKILL")
