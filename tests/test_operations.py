"""Health, readiness, build, and that every error has OpenAI's shape."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.served import Served, config_for, served


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Served]:
    """A server without a model."""
    with served(config_for(tmp_path_factory.mktemp("data"), model_folder), speaks=False) as server:
        yield server


def test_alive_at_once_and_ready_when_the_model_is_loaded(quiet: Served, server: Served):
    assert quiet.http.get("/health").json() == {"status": "alive"}
    loading = quiet.http.get("/ready")
    assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading")
    assert server.http.get("/ready").json() == {"status": "ready"}


def test_a_draining_server_is_alive_and_not_ready_and_says_goodbye(server: Served):
    server.wiring.draining = True
    ready = server.http.get("/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
    assert ready.headers["connection"] == "close"
    assert server.http.get("/health").status_code == 200
    assert server.chat().status_code == 200


def test_the_build_says_its_version(quiet: Served):
    told = quiet.http.get("/version").json()
    assert told["base"] == "random-llama"
    assert set(told) >= {"version", "python", "torch", "transformers"}


def test_prompts_are_those_beside_the_model(server: Served, model_folder: Path):
    assert server.http.get("/prompts.json").json() == []
    (model_folder / "prompts.json").write_text('["what is open?"]')
    try:
        assert server.http.get("/prompts.json").json() == ["what is open?"]
    finally:
        (model_folder / "prompts.json").unlink()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PUT", "/v1/feedback", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/static/nothing.js", 404, "not_found"),
        ("GET", "/static/../app.py", 404, "not_found"),
        ("GET", "/static/%2e%2e/app.py", 404, "not_found"),
        ("DELETE", "/v1/users/ann", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/openapi.json", 404, "not_found"),
        ("POST", "/v1/feedback/", 404, "not_found"),
    ],
)
def test_every_error_has_openais_shape(quiet: Served, method: str, path: str, status: int, code: str):
    answer = quiet.http.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}


def test_a_wrong_method_says_which_is_right(quiet: Served):
    answer = quiet.http.get("/v1/chat/completions")
    assert answer.headers["allow"] == "POST"
    assert "POST" in answer.json()["error"]["message"]


def test_a_defect_is_500_in_the_same_shape_and_the_server_goes_on(
    serve_with: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
):
    quiet = serve_with(speaks=False)
    monkeypatch.setattr(quiet.wiring, "board", None)
    answer = quiet.http.get("/v1/policy")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "NoneType" not in answer.text
    monkeypatch.undo()
    assert quiet.http.get("/v1/policy").status_code == 200
    assert quiet.metric("heed_requests_total", route="/v1/policy", status="500") == 1


def test_what_is_no_http_harms_nobody(quiet: Served):
    for bad in (b"\x00" * 100, b"GET / HTTP/9\r\n\r\n", b"POST /v1/feedback HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        host, port = quiet.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(bad)
            raw.recv(1000)
    assert quiet.http.get("/health").status_code == 200


def test_json_may_be_sent_under_its_other_names(server: Served):
    body = json.dumps({"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).encode()
    for name in ("application/json; charset=utf-8", "Application/JSON", "application/problem+json"):
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": name})
        assert answer.status_code == 200
