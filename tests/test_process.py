"""The server process: it starts or says why not in one line, is one to a data folder, and cuts nobody off."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK, Exchange, parse_event
from feedback.log import open_log
from serving import process
from serving.claims import LEAVING, CannotStart, hold, listen
from serving.config import ServingConfig
from serving.exits import Exit
from serving.model import load_model
from serving.native import Native
from serving.process import load_base, serve
from tests.served import config_for, make_model

PROGRAM = """
import logging, sys
from serving.config import ServingConfig
from serving.process import serve
logging.basicConfig(level=logging.INFO)
sys.exit(serve(ServingConfig.model_validate_json(sys.argv[1])))
"""
ROOT = Path(__file__).resolve().parent.parent
LONG = 4096


def test_auto_is_the_type_of_the_files_where_it_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_model(tmp_path / "model")
    model, chat = load_model(folder)
    whole = ServingConfig(model=str(folder))
    assert load_base(whole)[0].dtype == torch.float32
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    chat.tokenizer.save_pretrained(tmp_path / "half")
    half = ServingConfig(model=str(tmp_path / "half"))
    monkeypatch.setattr(process, "computes_bfloat16", lambda: True)
    assert load_base(half)[0].dtype == torch.bfloat16
    monkeypatch.setattr(process, "computes_bfloat16", lambda: False)
    monkeypatch.setattr(Native, "library", lambda _model, _targets: None)
    assert load_base(half)[0].dtype == torch.float32
    assert load_base(half.model_copy(update={"dtype": "bfloat16"}))[0].dtype == torch.bfloat16


class Running:
    """A server process that listens."""

    def __init__(self, config: ServingConfig, process: subprocess.Popen[str]) -> None:
        self.config, self.process = config, process
        lock = config.feedback.data / "server.lock"
        self.until(lambda: lock.exists() and str(process.pid) in lock.read_text())
        self.url = lock.read_text().split()[1]

    def until(self, true: Callable[[], bool], seconds: float = 120.0) -> None:
        give_up = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < give_up
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.02)

    def ready(self) -> bool:
        return httpx.get(f"{self.url}/ready").status_code == 200

    def chat(self, **more: Any) -> httpx.Response:
        body = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def exchanges(self) -> list[Exchange]:
        log = open_log(self.config.feedback, writes=())
        events = [parse_event(record.event) for record in log.read(EXCHANGES, {}, 1000)]
        log.close()
        return [event for event in events if isinstance(event, Exchange)]


@contextlib.contextmanager
def running(data: Path, model: Path, ignore_sigint: bool = False, **settings: Any) -> Iterator[Running]:
    config = config_for(data, model, **settings)
    sent = config.model_dump_json()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, sent],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignore_sigint else None,
    )
    try:
        yield Running(config, process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose replies may take seconds."""
    return make_model(tmp_path_factory.mktemp("models") / "long-llama", LONG)


def starts_not(config: ServingConfig, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and the one line on standard error."""
    code = serve(config)
    told = capsys.readouterr().err
    assert told.startswith("heed: ")
    assert told.count("\n") == 1
    return code, told


def test_on_sigterm_it_serves_on_then_finishes_what_is_running(tmp_path: Path, long_model: Path):
    """A proxy's view: not ready at once, still served during the delay, then closed; a stream that ran is whole."""
    tokens = 3000
    with running(tmp_path / "data", long_model, drain_delay_s=2.0) as server:
        server.until(server.ready)
        body = {"model": "default", "messages": [{"role": "user", "content": "x"}], "stream": True}
        body |= {"max_tokens": tokens, "heed": {"ignore_eos": True}, "stream_options": {"include_usage": True}}
        with (
            httpx.Client(timeout=60) as pooled,
            httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as stream,
        ):
            lines = (line for line in stream.iter_lines() if line)
            for _ in range(20):
                next(lines)
            pooled.get(f"{server.url}/health")
            server.process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            server.until(lambda: pooled.get(f"{server.url}/ready").status_code == 503, 1.9)
            late = server.chat()
            assert (late.status_code, late.headers["connection"]) == (200, "close")
            assert time.monotonic() - told < 2.0, "this machine is too slow for the test to say anything"
            server.until(lambda: not _listens(server.url), 10)
            assert time.monotonic() - told >= 1.9
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == tokens
        assert server.process.wait(30) == Exit.DONE
        assert sorted(len(one.content.reply_ids) for one in server.exchanges())[-1] == tokens
        assert {one.finish_reason for one in server.exchanges()} <= {"length", "stop"}
        assert "Traceback" not in server.process.communicate()[1]


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux can turn away who knocks while it lets in who is at the door"
)
def test_whoever_got_in_before_the_door_closed_is_answered(tmp_path: Path, model_folder: Path):
    """A proxy that asks nobody for /ready sends on until it is refused, and each request on a connection of its own."""
    told: Counter[str] = Counter()
    with running(tmp_path / "data", model_folder, drain_delay_s=0.5) as server:
        server.until(server.ready)
        host, port = server.url.removeprefix("http://").split(":")

        def ask_until_refused(number: int) -> None:
            chance = random.Random(number)
            while True:
                try:
                    connection = socket.create_connection((host, int(port)), timeout=10)
                except ConnectionRefusedError:
                    return
                with connection:
                    time.sleep(chance.uniform(0, 0.02))
                    told[_asked(connection)] += 1

        with ThreadPoolExecutor(16) as people:
            asking = [people.submit(ask_until_refused, number) for number in range(16)]
            server.until(lambda: told["HTTP/1.1 200 OK"] > 100)
            server.process.send_signal(signal.SIGTERM)
            for each in asking:
                each.result()
        assert server.process.wait(30) == Exit.DONE
    assert set(told) == {"HTTP/1.1 200 OK"}, told


def _asked(connection: socket.socket) -> str:
    """What became of a request on this connection, in a line."""
    try:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        return connection.recv(4096).decode().partition("\r\n")[0]
    except OSError as error:
        return repr(error)


def _listens(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_one_server_a_data_folder_one_a_port_and_a_full_disk_stops_no_chat(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    data = tmp_path / "data"
    with running(data, model_folder, ignore_sigint=True) as server:
        server.until(server.ready)
        code, told = starts_not(config_for(data, model_folder), capsys)
        assert code == Exit.HELD
        assert f"pid {server.process.pid}" in told
        assert server.url in told

        port = int(server.url.rsplit(":", 1)[1])
        code, told = starts_not(config_for(tmp_path / "other", model_folder, port=port), capsys)
        assert code == Exit.PORT
        assert f"port {port}" in told

        reply = server.chat(n=2).json()["id"]
        thumb = {"kind": "thumb", "reply_id": reply, "value": "up", "id": "1"}
        assert httpx.post(f"{server.url}/v1/feedback", json=thumb).status_code == 202
        full = max(path.stat().st_size for path in data.rglob("*") if path.is_file())
        before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (min(4096, full), resource.RLIM_INFINITY))
        answer = server.chat()
        assert (answer.status_code, answer.json()["heed"]["kept"]) == (200, False)
        refused = httpx.post(f"{server.url}/v1/feedback", json=thumb | {"id": "2"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "log_unavailable")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)
        assert server.chat().json()["heed"]["kept"] is True
        assert httpx.post(f"{server.url}/v1/feedback", json=thumb | {"id": "2"}).status_code == 202

        # a job in the background of a shell begins with SIGINT ignored; ours has a handler all the same
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == Exit.DONE
    log = open_log(FeedbackConfig(data=data), writes=())
    assert len(log.read(FEEDBACK, {}, 100)) == 2
    log.close()


def test_after_a_kill_it_starts_again_and_what_was_acknowledged_is_there(tmp_path: Path, long_model: Path):
    data = tmp_path / "data"
    with running(data, long_model) as server:
        server.until(server.ready)
        reply = server.chat().json()["id"]
        thumb = {"kind": "thumb", "reply_id": reply, "value": "up", "id": "1"}
        receipt = httpx.post(f"{server.url}/v1/feedback", json=thumb).json()
        server.process.kill()
        server.process.wait()
    with running(data, long_model) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.post(f"{server.url}/v1/feedback", json=thumb).json() == receipt
        server.process.send_signal(signal.SIGTERM)  # perhaps while the model is being loaded: either way it ends well
        assert server.process.wait(60) == Exit.DONE


@pytest.mark.parametrize(
    ("model", "said"), [("nowhere/at-all/really", "nowhere"), ("/", "config.json"), ("{tmp}", "safetensors")]
)
def test_a_missing_or_broken_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, said: str
):
    (tmp_path / "config.json").write_text("{}")
    config = config_for(tmp_path / "data", Path(model.format(tmp=tmp_path)))
    code, told = starts_not(config, capsys)
    assert code == Exit.MODEL
    assert said in told


def test_more_tokens_than_the_model_can_are_a_wrong_setting(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    code, told = starts_not(config_for(tmp_path, model_folder, max_model_len=100_000), capsys)
    assert code == Exit.SETTING
    assert "HEED_MAX_MODEL_LEN=100000: must be at most 192" in told


def test_a_data_folder_that_cannot_be_is_one_line(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/heed")):
        code, told = starts_not(config_for(folder, model_folder), capsys)
        assert code == Exit.DATA
        assert str(folder) in told


def test_a_full_disk_at_the_start_is_one_line(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]):
    """No file may grow: what a full disk does, as far as a process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        code, told = starts_not(config_for(tmp_path / "data", model_folder), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == Exit.DATA
    assert "cannot be written" in told


def test_a_secret_that_is_none_is_one_line(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "secret").write_text("")
    code, told = starts_not(config_for(tmp_path, model_folder), capsys)
    assert code == Exit.DATA
    assert "secret" in told


def test_an_address_that_is_not_here_is_one_line(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    for host in ("203.0.113.1", "no-such-host.invalid"):
        code, told = starts_not(config_for(tmp_path, model_folder, host=host, insecure=True), capsys)
        assert code == Exit.PORT
        assert host in told


def test_a_lock_is_held_until_its_block_ends(tmp_path: Path):
    path = tmp_path / "server.lock"
    with hold(path) as descriptor:
        os.write(descriptor, b"123 http://here\n")
        with pytest.raises(CannotStart, match=r"pid 123, http://here"), hold(path):
            pass
    with hold(path):
        assert path.read_text() == ""


def test_a_holder_that_is_leaving_is_waited_for(tmp_path: Path):
    path = tmp_path / "server.lock"
    with hold(path) as descriptor:
        os.write(descriptor, b"123 http://here\n" + LEAVING)
        with pytest.raises(CannotStart, match=r"pid 123, http://here\)"), hold(path, patience_s=0.2):
            pass
        leaving = threading.Timer(0.3, os.close, [os.dup(descriptor)])  # the lock lives as long as any copy of it
        leaving.start()
    with hold(path):
        assert not leaving.is_alive()


def test_a_port_is_taken_from_the_moment_it_is_listened_on():
    [first] = listen("127.0.0.1", 0)
    with first, pytest.raises(CannotStart, match="in use"):
        listen("127.0.0.1", first.getsockname()[1])


def test_what_lives_as_long_as_the_process_is_out_of_the_collectors_way(monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    monkeypatch.setattr(process, "load_speaker", lambda *_: done.append("loaded"))
    monkeypatch.setattr(gc, "freeze", lambda: done.append("frozen"))
    loop = SimpleNamespace(call_soon_threadsafe=lambda *_: done.append("speaks"))
    process._Server._load(SimpleNamespace(_settings=None, _wiring=None, _loop=loop, _speak=None))  # type: ignore[arg-type]
    assert done == ["loaded", "frozen", "speaks"]


def test_an_answer_in_two_pieces_does_not_wait_for_the_first_to_be_acknowledged():
    [listening] = listen("127.0.0.1", 0)

    async def accept() -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def meet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(meet, sock=listening):
            with socket.create_connection(listening.getsockname()):
                return await told

    assert asyncio.run(accept()) != 0
