"""`heed check`, while everything that it looks at is really broken, one thing at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deploy import check_machine
from deploy.check_model import without_gpu
from deploy.finding import Seen
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import open_log
from feedback.sqlite_log import SqliteLog
from learner.config import LearnerConfig
from learner.intake import Intake
from learner.metrics import LearnerMetrics
from learner.state import State
from serving.config import ServingConfig
from serving.ids import Ids
from tests.broker import Broker
from tests.commands import Heed
from tests.kafka_logs import kafka_config
from tests.served import Served
from tests.told import NOW, exchange, feedback
from tests.valkey import Valkey

NOBODY = {"HEED_PORT": "9", "HEED_LEARNER_METRICS_PORT": "9"}
SECRET = "a secret of more than sixteen bytes"
Found = dict[str, list[tuple[str, str]]]
Checked = Callable[..., tuple[int, Found]]


@pytest.fixture
def checked(heed: Heed, model_folder: Path) -> Checked:
    """Runs `heed check`; the exit code, and verdicts and words by name."""

    def run(**variables: str) -> tuple[int, Found]:
        done = heed("check", "--json", **{"HEED_MODEL": str(model_folder), **NOBODY, **variables})
        found: Found = {}
        for one in json.loads(done.out):
            found.setdefault(one["name"], []).append((one["verdict"], one["says"]))
            assert one["verdict"] == "ok" or one["do"], f"what to do about this? {one}"
            assert one["seconds"] < 5, one
        return done.code, found

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "heed-data"


def kept(data: Path) -> dict[Path, bytes]:
    """What a data folder holds, but for the marks that SQLite's readers leave in memory that they share."""
    return {path: path.read_bytes() for path in data.rglob("*") if path.is_file() and path.suffix != ".db-shm"}


def of_port(url: str) -> dict[str, str]:
    return {"HEED_PORT": url.rpartition(":")[2]}


def one(found: Found, name: str) -> tuple[str, str]:
    [finding] = found[name]
    return finding


# as it should be


def test_a_fresh_folder_is_well_and_nothing_runs(checked: Checked, data: Path):
    code, found = checked()
    assert code == 0
    worse = {name for name, some in found.items() if any(verdict != "ok" for verdict, _ in some)}
    assert worse - {"disk"} == {"server", "learner"}
    assert {"settings", "data", "disk", "log", "clock", "secret", "versions", "device", "model", "adapters"} <= set(
        found
    )
    assert not data.exists()  # looking leaves nothing behind


def test_people_are_told_what_to_do_and_how_long_it_took(heed: Heed, model_folder: Path):
    shown = heed("check", HEED_MODEL=str(model_folder), **NOBODY).out
    assert "nothing answers at http://127.0.0.1:9" in shown
    assert "→ Start it: heed up (or heed serve)." in shown
    assert "2 to look at (" in shown.splitlines()[-1]
    assert " s)" in shown.splitlines()[-1]


def test_beside_a_server_it_changes_nothing_and_loads_no_weights(
    checked: Checked, serve_with: Callable[..., Served], data: Path, monkeypatch: pytest.MonkeyPatch
):
    server = serve_with(data=data)
    reply = server.chat(user="ann").json()["id"]
    server.http.post("/v1/feedback", json={"kind": "thumb", "reply_id": reply, "value": "up"}).raise_for_status()
    server.publish()
    (data / "server.lock").write_text(f"{os.getpid()} {server.url}\n")
    server.ask(server.wiring.settle())
    before = kept(data)
    with monkeypatch.context() as here:
        here.setattr(AutoModelForCausalLM, "from_pretrained", None)
        code, found = checked(**of_port(server.url))
    assert code == 0
    assert one(found, "server") == ("ok", f"ready at {server.url}")
    assert one(found, "log") == ("ok", "embedded, readable: 1 exchanges, 1 feedback, 0 releases")
    assert one(found, "learning") == ("warn", server.http.get("/v1/policy").json()["why"])
    assert one(found, "base")[1].startswith("the server that spoke last: the same as here")
    assert one(found, "adapters") == ("ok", "1 versions, those in use and the newest whole; v1 is served")
    assert kept(data) == before


# settings and secret


def test_what_is_set_here_is_said_but_no_secret(checked: Checked, tmp_path: Path):
    (tmp_path / "heed.toml").write_text("max_rows = 7\n")
    _, found = checked(HEED_PROT="1", HEED_SECRET=SECRET, HEED_TRACES="http://user:password@collector:4318")
    (ok, words), stranger = found["settings"]
    assert ok == "ok"
    assert {"HEED_PORT=9", "HEED_MAX_ROWS=7", "HEED_SECRET=(hidden)"} <= set(words.partition(" (")[0].split(", "))
    assert "password" not in words
    assert f"with {tmp_path / 'heed.toml'}" in words
    assert stranger == ("warn", "HEED_PROT is not a setting of Heed and is ignored; did you mean HEED_PORT?")


def replied(data: Path, reply_id: str, **how: Any) -> None:
    with contextlib.closing(SqliteLog(data / "log", [EXCHANGES, FEEDBACK])) as log:
        log.append(EXCHANGES, reply_id, exchange(reply_id, at=time.time(), **how).to_json())
        log.append(FEEDBACK, reply_id, feedback("fb-1", reply_id).to_json())


def test_a_secret_that_others_may_read_do_not_share_or_that_is_another(checked: Checked, data: Path):
    data.mkdir()
    (data / "secret").write_text(SECRET)
    (data / "secret").chmod(0o644)
    assert checked()[1]["secret"][0][0] == "warn"
    (data / "secret").chmod(0o600)
    assert one(checked()[1], "secret")[0] == "ok"
    verdict, words = one(checked(HEED_ADAPTERS="shared")[1], "secret")
    assert (verdict, "no other server accepts" in words) == ("warn", True)
    replied(data, Ids(SECRET.encode()).new_reply("", kept=True))
    assert one(checked()[1], "secret")[0] == "ok"
    code, found = checked(HEED_SECRET="not that secret at all")
    assert (code, one(found, "secret")) == (1, ("fail", "the newest reply in the log was signed with another secret"))
    (data / "secret").write_text("short")
    assert one(checked()[1], "secret")[0] == "fail"


# the machine


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Where this user is root, who may everything; else it is this one."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_this_user_cannot_write_is_named_with_its_owner():
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # which others may enter, unlike a test's own folder
    try:
        seen = Seen(LearnerConfig(serving=ServingConfig(feedback=FeedbackConfig(data=place / "data"))))
        (place / "data").mkdir()
        (place / "data" / "secret").write_text(SECRET)
        (place / "data" / "secret").chmod(0o400)
        place.chmod(0o755)
        (place / "data").chmod(0o777)
        with as_another_user():
            [closed] = check_machine.folders(seen)
        (place / "data").chmod(0o555)
        with as_another_user():
            [shut] = check_machine.folders(seen)
    finally:
        (place / "data").chmod(0o777)
        shutil.rmtree(place)
    assert (closed.verdict, shut.verdict) == ("fail", "fail")
    assert f"{place / 'data' / 'secret'} cannot be read and written by" in closed.says
    assert f"{place / 'data'} cannot be written by" in shut.says
    assert Path("/tmp").owner() in shut.do or str(os.geteuid()) in shut.do


def test_a_data_folder_that_is_a_file(checked: Checked, tmp_path: Path):
    (tmp_path / "file").write_text("")
    code, found = checked(HEED_DATA=str(tmp_path / "file"))
    assert (code, one(found, "data")[0]) == (1, "fail")


def test_both_disks_are_looked_at(checked: Checked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no disk of its own here")
    monkeypatch.setattr(check_machine, "DISK_WARN", 1 << 60)
    found = checked(HEED_ADAPTERS="/dev/shm/of-no-test")[1]
    assert [verdict for verdict, _ in found["disk"]] == ["warn", "warn"]
    assert "GiB free for /dev/shm" in str(found["disk"])
    assert one(found, "store") == ("ok", "/dev/shm/of-no-test can be written (it is not there yet)")


def test_a_clock_that_was_set_back(checked: Checked, data: Path):
    replied(data, "r1")
    ahead = time.time() + 3600
    os.utime(data / "log" / "heed.feedback.db", (ahead, ahead))
    code, found = checked(HEED_SECRET="")
    assert (code, one(found, "clock")[0]) == (1, "fail")


@pytest.mark.parametrize(
    ("wanted", "built_for", "driver", "verdict", "words"),
    [
        ("auto", None, None, "ok", "cpu, "),
        ("cpu", "12.8", "550.54", "ok", "cpu, "),
        ("auto", None, "550.54", "warn", "this torch is for CPUs alone"),
        ("cuda", None, "550.54", "fail", "this torch is for CPUs alone"),
        ("auto", "12.8", "470.10", "warn", "torch for CUDA 12.8 cannot use the GPU (driver 470.10): it is too old"),
        ("cuda:1", "12.8", None, "fail", "no NVIDIA driver is here"),
    ],
)
def test_a_gpu_that_is_not_used_is_told_of(wanted: str, built_for: str, driver: str, verdict: str, words: str):
    found = without_gpu(wanted, built_for, driver, "it is too old")
    assert found.verdict == verdict
    assert words in found.says
    assert bool(found.do) == (verdict != "ok")


def test_a_gpu_that_is_wanted_and_not_here(checked: Checked):
    code, found = checked(HEED_DEVICE="cuda:77")
    assert (code, one(found, "device")[0]) == (1, "fail")


# log, outbox, Redis, and how far the learner is


def test_a_damaged_log(checked: Checked, data: Path):
    (data / "log").mkdir(parents=True)
    (data / "log" / "heed.feedback.db").write_bytes(b"no database" * 1000)
    code, found = checked()
    assert (code, one(found, "log")[0]) == (1, "fail")


def test_a_damaged_state_is_told_once_and_not_as_the_models_fault(checked: Checked, data: Path):
    (data / "learner").mkdir(parents=True)
    (data / "learner" / "state.db").write_bytes(b"no database" * 1000)
    code, found = checked()
    failed = [name for name, told in found.items() for verdict, _ in told if verdict == "fail"]
    assert (code, failed) == (1, ["reading"])
    assert found["model"][0][0] == "ok"


def test_a_kafka_that_is_dead_empty_or_does_not_answer(checked: Checked, data: Path, kafka: Broker):
    started = time.monotonic()
    dead = one(checked(HEED_KAFKA_BOOTSTRAP="127.0.0.1:9,127.0.0.1:10")[1], "log")
    assert dead == ("fail", "no Kafka accepts connections at 127.0.0.1:9, 127.0.0.1:10")
    assert time.monotonic() - started < 5
    assert "has no topics yet" in one(checked(HEED_KAFKA_BOOTSTRAP=kafka.bootstrap)[1], "log")[1]
    with contextlib.closing(open_log(kafka_config(kafka.bootstrap, data), writes=(EXCHANGES, FEEDBACK))) as log:
        log.append(EXCHANGES, "r1", exchange("r1").to_json())
        log.append(FEEDBACK, "r1", feedback("f1", "r1").to_json())
    found = checked(HEED_KAFKA_BOOTSTRAP=f"{kafka.bootstrap},127.0.0.1:9", HEED_SECRET=SECRET)[1]
    assert [verdict for verdict, _ in found["log"]] == ["warn", "ok"]
    assert found["log"][1][1] == "Kafka, readable: 1 exchanges, 1 feedback, 0 releases"
    kafka.pause()
    try:
        assert one(checked(HEED_KAFKA_BOOTSTRAP=kafka.bootstrap)[1], "log")[0] == "fail"
    finally:
        kafka.resume()


def test_what_waits_in_the_outbox(checked: Checked, data: Path):
    assert "outbox" not in checked()[1]
    config = kafka_config("127.0.0.1:9", data, kafka_deadline_s=0.2)
    with contextlib.closing(open_log(config, writes=(EXCHANGES, FEEDBACK), outbox=True)) as log:
        log.append(FEEDBACK, "r1", feedback("f1", "r1").to_json())
    with contextlib.closing(SqliteLog(data / "outbox", [f"{FEEDBACK}.refused"])) as box:
        box.append(f"{FEEDBACK}.refused", "r2", "a large one")
    waits, aside = checked(HEED_KAFKA_BOOTSTRAP="127.0.0.1:9")[1]["outbox"]
    assert waits == ("warn", "0 exchanges, 1 feedback wait for Kafka")
    assert aside == ("warn", "1 events were too large for Kafka and are set aside")
    assert ("fail", "they wait for a Kafka, and none is set") in checked()[1]["outbox"]


def test_redis_is_asked_where_one_is_set(checked: Checked, valkey: Valkey):
    assert "redis" not in checked()[1]
    assert one(checked(HEED_REDIS_URL=valkey.url)[1], "redis") == ("ok", "answers, and keeps what it is given")
    valkey.fill()
    code, found = checked(HEED_REDIS_URL=valkey.url)
    assert (code, one(found, "redis")[0]) == (1, "fail")
    assert "maxmemory" in one(found, "redis")[1]
    valkey.pause()
    assert one(checked(HEED_REDIS_URL=valkey.url)[1], "redis") == ("fail", "it does not answer within 1 s")


def test_a_learner_that_is_behind_or_ahead_of_the_log(checked: Checked, data: Path):
    replied(data, "r1")
    config = FeedbackConfig(data=data)
    with (
        contextlib.closing(State(data / "learner" / "state.db", policy="default", base="of-nobody")) as state,
        contextlib.closing(open_log(config, writes=())) as log,
    ):
        intake = Intake(log, state, LearnerMetrics(), join_wait_s=100, clock=lambda: NOW)
        while intake.absorb():
            pass
    assert one(checked(HEED_SECRET=SECRET)[1], "reading") == ("ok", "the learner has read all of the log")
    replied(data, "r2")
    assert one(checked(HEED_SECRET=SECRET)[1], "reading") == ("warn", "2 events wait for a learner")
    shutil.rmtree(data / "log")
    code, found = checked()
    assert code == 1
    assert one(found, "log") == ("ok", "nothing is there yet")
    SqliteLog(data / "log", [EXCHANGES, FEEDBACK]).close()
    verdict, words = one(checked()[1], "reading")
    assert verdict == "fail"
    assert "the learner knows 1 events of heed.exchanges, which ends at 0" in words


# who runs


class NotHeed(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_somebody_else_on_the_port(checked: Checked):
    with HTTPServer(("127.0.0.1", 0), NotHeed) as other:
        threading.Thread(target=other.serve_forever).start()
        code, found = checked(HEED_PORT=str(other.server_port))
        other.shutdown()
    assert (code, one(found, "server")[0]) == (1, "fail")
    assert one(found, "server")[1].endswith("is no Heed server")


def test_a_server_that_is_stuck(checked: Checked):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code, found = checked(HEED_PORT=str(silent.getsockname()[1]))
    assert (code, one(found, "server")[0]) == (1, "fail")
    assert "did not answer within 2 s" in one(found, "server")[1]


def test_keys_are_named_and_a_broken_file_of_them_is_told(checked: Checked, tmp_path: Path):
    path = tmp_path / "keys.toml"
    path.write_text(f'[web]\nsha256 = "{"0" * 64}"\n')
    assert one(checked(HEED_API_KEYS_FILE=str(path))[1], "keys") == ("ok", f"{path}: web")
    path.write_text("[web]\n")
    code, found = checked(HEED_API_KEYS_FILE=str(path))
    verdict, says = one(found, "keys")
    assert (code, verdict, "sha256 must be" in says) == (1, "fail", True)


class Trickles(NotHeed):
    def do_GET(self) -> None:
        self.send_response(200)
        with contextlib.suppress(OSError):
            while True:
                self.send_header("x-more", "to come")
                self.flush_headers()
                time.sleep(0.1)


def test_a_stranger_whose_answer_never_ends(checked: Checked):
    with HTTPServer(("127.0.0.1", 0), Trickles) as other:
        threading.Thread(target=other.serve_forever).start()
        code, found = checked(HEED_PORT=str(other.server_port))
        other.shutdown()
    assert (code, one(found, "server")[0]) == (1, "fail")
    assert "did not answer within 2 s" in one(found, "server")[1]


def test_a_server_of_another_data_folder_loading_or_with_keys(
    checked: Checked, serve_with: Callable[..., Served], tmp_path: Path
):
    (tmp_path / "keys.toml").write_text(f'[web]\nsha256 = "{"0" * 64}"\n')
    loading = serve_with(speaks=False)
    ready = serve_with(data=tmp_path / "other", api_keys_file=tmp_path / "keys.toml")
    words = [words for _, words in checked(**of_port(loading.url))[1]["server"]]
    assert "not ready: The model is still being loaded" in words[0]
    assert "has another data folder: this data folder never had one" in words[1]
    found = checked(**of_port(ready.url))[1]
    assert found["server"][-1] == ("warn", "it tells what it has learned only to who has a key")
    assert "learning" in checked(**of_port(ready.url), HEED_ADMIN_TOKEN="let-me-in")[1]


@pytest.mark.parametrize(
    ("host", "words"), [("0.0.0.0", "without API keys no server starts"), ("nowhere.invalid", "is no address of this")]
)
def test_an_address_that_no_server_can_take(host: str, words: str, checked: Checked):
    code, found = checked(HEED_HOST=host)
    assert code == 1
    assert found["server"][0][0] == "fail"
    assert words in found["server"][0][1]


@contextlib.contextmanager
def held(*locks: Path, by: str) -> Iterator[None]:
    with contextlib.ExitStack() as opened:
        for lock in locks:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{by}\n")
            file.flush()
        yield


def test_who_holds_the_lease_is_named(checked: Checked, data: Path):
    own, lease = data / "learner.lock", data / "adapters" / "default" / "learner.lock"
    with held(own, lease, by="12 on here"):
        runs = one(checked()[1], "learner")
    with held(lease, by="34 on elsewhere"):
        elsewhere = one(checked()[1], "learner")
        with held(own, by="12 on here"):
            waits = one(checked()[1], "learner")
    assert runs == ("warn", "process 12 on here runs, and nothing answers at http://127.0.0.1:9")
    assert elsewhere == ("ok", "process 34 on elsewhere holds the lease, of another data folder")
    assert waits == ("warn", "process 12 on here waits for the lease, which process 34 on elsewhere holds")
    assert one(checked()[1], "learner") == ("warn", "none runs on this data folder")


def test_why_nothing_ships_is_what_the_learner_says(checked: Checked, serve_with: Callable[..., Served], data: Path):
    server = serve_with(data=data)
    (data / "server.lock").write_text(f"1 {server.url}\n")

    def said(at: float, why: str | None, status: str = "released") -> list[tuple[str, str]]:
        report = json.dumps({"seen_at": at, "why": why, "last_update": {"status": status}})
        server.ask(server.wiring.board.set_report("policy", report))
        return checked(**of_port(server.url))[1]["learning"]

    now = time.time()
    assert said(now, None) == [("ok", "v0 is served, and nothing was said since")]
    assert said(now, "the gate said no", "refused") == [("warn", "the gate said no")]
    assert said(now - 600, "3 of the 50")[0] == ("warn", "the learner has reported nothing for 10 minutes")
    server.wiring.store.change("pause", "operator")
    assert said(now, "paused by operator") == [("warn", "paused by operator")]
    server.wiring.store.folder.joinpath("release.json").write_text("{}}")
    code, found = checked(**of_port(server.url))
    assert code == 1
    assert all(verdict == "fail" for verdict, _ in found["release"])


# base and adapters


def test_a_server_of_another_base(checked: Checked, data: Path):
    replied(data, "r1", base="f" * 64)
    verdict, words = one(checked(HEED_SECRET=SECRET)[1], "base")
    assert verdict == "warn"
    assert words.startswith("the server that spoke last has another base, ffffffffffff…")


def test_a_model_that_is_missing_torn_of_another_build_or_not_fetched(
    checked: Checked, model_folder: Path, tmp_path: Path
):
    def says(folder: Path | str) -> tuple[str, str]:
        return one(checked(HEED_MODEL=str(folder))[1], "model")

    assert says(tmp_path / "nowhere")[0] == "fail"
    assert says("nobody/nothing-of-this-name")[0] == "warn"
    torn, other = (shutil.copytree(model_folder, tmp_path / name) for name in ("torn", "other"))
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[:-100])
    assert says(torn)[0] == "fail"
    assert "is not whole" in says(torn)[1]
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({**tensors, name: tensors[name][:1].clone()}, other / "model.safetensors", {"format": "pt"})
    assert f"{name} has the shape" in says(other)[1]


def test_a_torn_version_is_named(checked: Checked, serve_with: Callable[..., Served], data: Path):
    server = serve_with(data=data)
    server.publish(promote=False)
    (server.wiring.store.folder / "v000001" / "adapter_model.safetensors").write_bytes(b"torn")
    code, found = checked()
    assert code == 1
    assert one(found, "adapters")[0] == "fail"
    assert "v1" in one(found, "adapters")[1]
