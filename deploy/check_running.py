"""Who runs here: the server on its port, the learner and who holds its lease, and why nothing ships."""

from __future__ import annotations

import fcntl
import http.client
import ipaddress
import json
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deploy.client import bearing
from deploy.finding import Finding, Seen
from deploy.local import ANSWER_S, answers, connected, url_of
from learner.config import LearnerConfig

SILENT_S = 120.0
"""A learner that reported nothing for so long is stuck, or away."""

Json = dict[str, Any]


class Stranger(Exception):
    """What answers is no Heed server."""


def server(seen: Seen) -> Iterator[Finding]:
    """Whether it answers, is Heed, of this version and this data folder, and ready."""
    config = seen.config
    url = url_of(config.serving.host, config.serving.port)
    yield from _address(config)
    if config.serving.port == 0:
        yield Finding("server", "warn", "cannot be asked: HEED_PORT is 0, which is any free port", "Give it a port.")
        return
    try:
        if _get(config, "/health")[1].get("status") != "alive":
            raise Stranger
        build, (status, ready) = _get(config, "/version")[1], _get(config, "/ready")
        seen.ready = status == 200
        policy = _get(config, "/v1/policy") if seen.ready else None
    except TimeoutError:
        do = "Is it stuck? See its log; if it is a Heed server, stop it and start it again."
        yield Finding("server", "fail", f"something listens at {url}, and did not answer within {ANSWER_S:g} s", do)
    except (Stranger, http.client.HTTPException, ConnectionResetError, BrokenPipeError):
        do = "Stop it, or set HEED_PORT to a free port."
        yield Finding("server", "fail", f"what answers at {url} is no Heed server", do)
    except OSError:
        yield Finding("server", "warn", f"nothing answers at {url}", "Start it: heed up (or heed serve).")
    else:
        yield _readiness(url, None if seen.ready else ready)
        yield from _is_ours(config, url, build)
        yield from _policy(seen, policy)


def _readiness(url: str, refusal: Json | None) -> Finding:
    if refusal is None:
        return Finding("server", "ok", f"ready at {url}")
    why = refusal.get("error", {}).get("message", "")
    return Finding("server", "warn", f"alive at {url}, not ready: {why}", "Wait until it has loaded, or see its log.")


def _policy(seen: Seen, policy: tuple[int, Json] | None) -> Iterator[Finding]:
    """Keep what the server says of its policy, where it says it."""
    if policy is not None and policy[0] == 200:
        seen.policy = policy[1]
    elif policy is not None:
        do = "Set HEED_API_KEY, or HEED_ADMIN_TOKEN as the server has it."
        yield Finding("server", "warn", "it tells what it has learned only to who has a key", do)


def _get(config: LearnerConfig, path: str) -> tuple[int, Json]:
    """Status and JSON object of a GET. Raises Stranger, TimeoutError, OSError, HTTPException."""
    serving = config.serving
    try:
        with connected(serving.host, serving.port) as connection:
            connection.request("GET", path, headers=bearing(serving.admin_token or serving.api_key))
            answer = connection.getresponse()
            body = json.loads(answer.read())
    except ValueError:
        raise Stranger from None
    if not isinstance(body, dict):
        raise Stranger
    return answer.status, body


def _address(config: LearnerConfig) -> Iterator[Finding]:
    """Whether a server could listen where it is told to."""
    host, serving = config.serving.host, config.serving
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, (address, *rest) in found:
            if not (serving.api_keys_file or serving.insecure) and not ipaddress.ip_address(address).is_loopback:
                says = f"HEED_HOST={host}: others may reach {address}, and without API keys no server starts there"
                do = "Set HEED_API_KEYS_FILE, or HEED_INSECURE=1 where only friends get there."
                yield Finding("server", "fail", says, do)
                return
            with socket.socket(family, kind, protocol) as probe:
                probe.bind((address, 0, *rest[1:]))  # any free port, and nobody listens
    except (OSError, UnicodeError) as error:
        says = f"HEED_HOST={host} is no address of this machine: {getattr(error, 'strerror', None) or error}"
        yield Finding("server", "fail", says, "Set HEED_HOST to one (127.0.0.1, 0.0.0.0, …).")


def _is_ours(config: LearnerConfig, url: str, build: Json) -> Iterator[Finding]:
    """Whether the server that answers is of this data folder, by what it wrote there of itself, and of this version."""
    lock = config.serving.feedback.data / "server.lock"
    _, _, address = lock.read_text().partition("\n")[0].partition(" ") if lock.exists() else ("", "", "")
    if address.rpartition(":")[2] != str(config.serving.port):
        own = f"the last server of this data folder was at {address}" if address else "this data folder never had one"
        do = "Is HEED_PORT, or HEED_DATA, that of another Heed?"
        yield Finding("server", "warn", f"the server at {url} has another data folder: {own}", do)
    if build.get("version") != version("heed"):
        says = f"the server is Heed {build.get('version')}, this command is {version('heed')}"
        yield Finding("server", "warn", says, "Start the server again with the newer one.")


def learner(seen: Seen) -> Iterator[Finding]:
    """By its port, and by the locks that it holds: of the data folder and, its lease, of the policy in the store."""
    config = seen.config
    serving, port = config.serving, config.learner_metrics_port
    lease = serving.adapter_root / serving.feedback.policy / "learner.lock"
    own, holder = _holder(serving.feedback.data / "learner.lock"), _holder(lease)
    url = url_of(serving.host, port)
    alive = port != 0 and answers(serving.host, port, "/health")
    seen.learns = holder is not None
    if own is None and holder is not None:
        do = "It learns for this policy, and one is enough: a learner of this folder waits until that one has ended."
        yield Finding("learner", "warn" if alive else "ok", f"{holder} holds the lease, of another data folder", do)
    elif own is None:
        yield Finding("learner", "warn", "none runs on this data folder", "Start it: heed up (or heed learn).")
        if alive:
            do = "Set HEED_LEARNER_METRICS_PORT to a free port, or 0: else this folder's learner cannot start."
            yield Finding("learner", "warn", f"that of another data folder, or policy, answers at {url}", do)
    elif holder != own:
        do = "It goes on once that one has ended, or the store is there again."
        yield Finding("learner", "warn", f"{own} waits for the lease, which {holder or 'nobody'} holds", do)
    elif port == 0:
        yield Finding("learner", "ok", f"{own} is at work; it shows no metrics (HEED_LEARNER_METRICS_PORT is 0)")
    elif alive:
        yield Finding("learner", "ok", f"{own} is at work, and answers at {url}")
    else:
        do = "See its log; heed up starts it again where it is stopped (kill)."
        yield Finding("learner", "warn", f"{own} runs, and nothing answers at {url}", do)


def _holder(lock: Path) -> str | None:
    """Who holds a learner's lock, in words; None where nobody does."""
    try:
        with lock.open("rb") as file:
            try:
                # shared and let go of at once: a learner that starts at this moment tries again half a second later
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"process {file.read(200).decode(errors='replace').strip() or '(unknown)'}"
    except FileNotFoundError:
        pass
    return None


def learning(seen: Seen) -> Iterator[Finding]:
    """What the server and the learner say of themselves: what speaks, and why nothing ships."""
    told = seen.policy
    if told is None:
        return
    if told.get("problem"):
        do = "The server keeps what it spoke before. heed adapters verify says more; heed adapters rollback goes back."
        yield Finding("release", "fail", str(told["problem"]), do)
    elif told["speaking"] != told["current"]:
        do = "A moment after a release that is normal; else see the server's log."
        yield Finding("release", "warn", f"{told['current']} is released, and the server speaks {told['speaking']}", do)
    at, why = told.get("seen_at"), told.get("why")
    if at is None:
        yield Finding("learning", "warn", str(why), "Start one: heed up (or heed learn).")
        return
    if (silent := time.time() - at) > SILENT_S:
        do = "Its last words stand below. See its log." if seen.learns else "Start it: heed up (or heed learn)."
        yield Finding("learning", "warn", f"the learner has reported nothing for {silent / 60:,.0f} minutes", do)
    last = told.get("last_update") or {}
    if told["paused"]:
        yield Finding("learning", "warn", str(why), "When it may go on: POST /admin/resume.")
    elif last.get("status") in ("failed", "refused", "passed_over"):
        do = "See its report, report.html, or update-….html in the folder learner/reports."
        yield Finding("learning", "warn", str(why), do)
    else:
        yield Finding("learning", "ok", str(why or f"{told['current']} is served, and nothing was said since"))
