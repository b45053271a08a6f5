"""Traces: what is a span of what, what they tell and what they do not, and that nothing of them is there until wanted."""

from __future__ import annotations

import ast
import http.server
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from deploy.logs import formatter
from feedback.config import FeedbackConfig, KafkaConfig, differing
from feedback.events import EXCHANGES, FEEDBACK
from feedback.outbox import Outbox
from serving import traces
from serving.config import ServingConfig
from serving.exits import Exit
from serving.process import _traces, serve
from serving.traces import Traces, exporting
from tests.served import Served, TroubledLog
from tests.test_layout import imports, modules, read
from tests.test_outbox import FarLog

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
MARK = "MARKER-of-a-person"
REQUEST, CHAT, APPEND = "POST /v1/chat/completions", "chat default", "append heed.exchanges"


class Seen:
    """The spans of one server."""

    def __init__(self, **settings: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.traces = Traces(ServingConfig(**settings), SimpleSpanProcessor(self.exporter))
        self.server: Served

    def spans(self, count: int) -> dict[str, ReadableSpan]:
        """Those that ended since the last call, by name, once there are so many."""
        Served.until(lambda: len(self.exporter.get_finished_spans()) >= count)
        ended = self.exporter.get_finished_spans()
        self.exporter.clear()
        assert len(ended) == count, [span.name for span in ended]
        return {span.name: span for span in ended}


@pytest.fixture
def traced(serve_with: Callable[..., Served]) -> Callable[..., Seen]:
    """Starts a server whose spans are seen."""

    def start(log: Any = lambda log: log, **settings: Any) -> Seen:
        seen = Seen(**settings)
        seen.server = serve_with(traces=seen.traces, log=log)
        return seen

    return start


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarLog]:
    with closing(FarLog(tmp_path / "far")) as log:
        yield log


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def own(span: ReadableSpan) -> int:
    return span.get_span_context().span_id


def test_a_chat_is_one_trace_from_the_request_to_the_exchange_in_the_log(traced: Callable[..., Seen]):
    seen = traced()
    answer = seen.server.chat(MARK, stream=True, n=2, seed=3, temperature=0.5, top_p=0.9, user=MARK, stop=[MARK])
    chunk = json.loads(answer.text.partition("\n")[0].removeprefix("data: "))
    Served.until(lambda: len(seen.exporter.get_finished_spans()) == 4)
    appends = [span for span in seen.exporter.get_finished_spans() if span.name == APPEND]
    spans = seen.spans(4)
    request, chat = spans[REQUEST], spans[CHAT]
    assert (request.kind, chat.kind, appends[0].kind) == (SpanKind.SERVER, SpanKind.INTERNAL, SpanKind.PRODUCER)
    assert parent(request) is None
    assert parent(chat) == own(request)
    assert [parent(append) for append in appends] == [own(chat)] * 2
    assert len({span.get_span_context().trace_id for span in (request, chat, *appends)}) == 1
    assert request.start_time < chat.start_time < appends[0].start_time
    assert appends[1].end_time <= chat.end_time <= request.end_time
    assert told(request) == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "heed.request.id": answer.headers["x-request-id"],
    }
    assert told(appends[0]) == {
        "messaging.system": "sqlite",
        "messaging.operation.name": "append",
        "messaging.operation.type": "send",
        "messaging.destination.name": "heed.exchanges",
        "heed.outbox": False,
    }
    chatted = told(chat)
    assert 0 < chatted.pop("gen_ai.response.time_to_first_chunk") < 60
    assert 0 <= chatted.pop("gen_ai.latency.time_in_queue") < 60
    kept = seen.server.exchanges()
    assert chatted == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "heed",
        "gen_ai.output.type": "text",
        "gen_ai.conversation.id": kept[0].conversation,
        "gen_ai.request.model": "default",
        "gen_ai.request.stream": True,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": chunk["id"],
        "gen_ai.response.model": answer.headers["x-heed-version"],
        "gen_ai.response.finish_reasons": tuple(exchange.finish_reason for exchange in kept),
        "gen_ai.usage.input_tokens": len(kept[0].content.prompt_ids),
        "gen_ai.usage.output_tokens": sum(len(exchange.content.reply_ids) for exchange in kept),
    }
    assert "MARKER" not in "".join(span.to_json() for span in (request, chat, *appends))


def test_a_clients_trace_goes_on_and_one_that_it_does_not_want_stays_unwritten(traced: Callable[..., Seen]):
    seen = traced()
    for flags in ("00", "01"):
        seen.server.http.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{CALLER}-{flags}"})
    [span] = seen.spans(1).values()
    assert (format(span.get_span_context().trace_id, "032x"), format(parent(span) or 0, "016x")) == (TRACE, CALLER)
    for broken in ("", "00-" + "0" * 32 + f"-{CALLER}-01", MARK):
        seen.server.http.get("/v1/models", headers={"traceparent": broken})
        assert parent(seen.spans(1)["GET /v1/models"]) is None


def test_feedback_is_a_trace_too_and_what_machines_ask_again_and_again_is_none(traced: Callable[..., Seen]):
    seen = traced()
    reply = seen.server.chat().json()["id"]
    seen.spans(3)
    for path in ("/health", "/metrics", "/ready", "/"):
        seen.server.http.get(path)
    body = {"kind": "comment", "reply_id": reply, "text": MARK, "user": MARK, "id": MARK}
    assert seen.server.http.post(f"/v1/feedback?text={MARK}", json=body).status_code == 202
    spans = seen.spans(2)
    assert parent(spans["append heed.feedback"]) == own(spans["POST /v1/feedback"])
    assert "MARKER" not in "".join(span.to_json() for span in spans.values())


def test_a_word_that_is_no_method_names_no_span(traced: Callable[..., Seen]):
    seen = traced()
    assert seen.server.http.request(MARK, "/v1/models").status_code == 405
    [(name, span)] = seen.spans(1).items()
    assert (name, told(span)["http.request.method"]) == ("HTTP /v1/models", "_OTHER")
    assert MARK not in span.to_json()


@pytest.mark.parametrize("header", ["traceparent", "tracestate"])
def test_what_is_no_trace_of_a_clients_is_passed_over_without_a_word(
    header: str, traced: Callable[..., Seen], caplog: pytest.LogCaptureFixture
):
    seen = traced()
    sent = {"traceparent": f"00-{TRACE}-{CALLER}-01", header: f"{MARK}=" + "x" * 600}
    assert seen.server.http.get("/v1/models", headers=sent).status_code == 200
    [span] = seen.spans(1).values()
    assert MARK not in span.to_json() + caplog.text


def test_a_stream_that_nobody_reads_to_its_end_ends_its_spans(traced: Callable[..., Seen]):
    seen = traced()
    body = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "n": 4}
    asked = body | {"stream": True, "heed": {"ignore_eos": True}}
    with (
        httpx.Client(base_url=seen.server.url) as http,
        http.stream("POST", "/v1/chat/completions", json=asked) as left,
    ):
        next(left.iter_lines())
    spans = seen.spans(6)
    assert told(spans[CHAT])["gen_ai.response.finish_reasons"] == ("abort",) * 4
    assert spans[CHAT].end_time <= spans[REQUEST].end_time


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_failure_its_kind_is_told_and_not_its_words(
    traced: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch, stream: bool
):
    logs = list[TroubledLog]()
    seen = traced(log=lambda real: logs.append(TroubledLog(real)) or logs[0])
    logs[0].full.set()
    assert seen.server.chat(stream=stream).status_code == 200
    spans = seen.spans(3)
    append = spans[APPEND]
    assert (append.status.status_code, append.status.description, append.events) == (StatusCode.ERROR, None, ())
    assert told(append)["error.type"] == "LogUnavailable"
    assert {spans[name].status.status_code for name in (REQUEST, CHAT)} == {StatusCode.UNSET}
    logs[0].full.clear()
    speaker = seen.server.wiring.speaker
    assert speaker is not None
    speaker.engine.model.get_parameter("model.norm.weight").data.fill_(float("nan"))  # type: ignore[attr-defined]
    assert seen.server.chat(stream=stream).status_code == 500
    spans = seen.spans(2)
    assert [told(spans[name])["error.type"] for name in (REQUEST, CHAT)] == ["500", "engine_failed"]
    monkeypatch.setattr("serving.routes.chat.ask", lambda *_: {}[MARK])
    assert seen.server.chat(stream=stream).status_code == 500
    [failed] = seen.spans(1).values()
    assert "MARKER" not in failed.to_json()


def test_words_are_told_where_the_setting_says_so_but_for_chats_that_are_not_to_be_kept(traced: Callable[..., Seen]):
    seen = traced(trace_content=True)
    said = seen.server.chat(MARK).json()["choices"][0]
    chat = told(seen.spans(3)[CHAT])
    assert json.loads(chat["gen_ai.input.messages"]) == [{"role": "user", "parts": [{"type": "text", "content": MARK}]}]
    assert json.loads(chat["gen_ai.output.messages"]) == [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": said["message"]["content"]}],
            "finish_reason": said["finish_reason"],
        }
    ]
    seen.server.chat(MARK, store=False)
    assert "MARKER" not in seen.spans(2)[CHAT].to_json()


def test_an_exchange_that_its_kafka_does_not_take_is_told_to_be_in_the_outbox(
    traced: Callable[..., Seen], tmp_path: Path, far: FarLog
):
    kafka = KafkaConfig(kafka_bootstrap=("nobody:9092",))
    with closing(Outbox(far, tmp_path / "outbox", [EXCHANGES, FEEDBACK], 10**6)) as box:
        far.away.set()
        seen = traced(log=lambda _: box, feedback=FeedbackConfig(kafka=kafka))
        assert seen.server.chat().status_code == 200
        append = told(seen.spans(3)[APPEND])
        far.away.clear()
    assert (append["messaging.system"], append["heed.outbox"]) == ("kafka", True)


def test_lines_of_the_log_lead_to_the_trace(
    traced: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.handler.setFormatter(formatter("server", pretty=False))
    caplog.set_level("INFO")
    seen = traced()
    monkeypatch.setattr(seen.server.wiring.board, "put_exchange", lambda *_: 1 / 0)
    seen.server.chat()
    spans = seen.spans(3)
    lines = [json.loads(line) for line in caplog.text.splitlines() if '"trace_id"' in line]
    found = {line["logger"]: (int(line["trace_id"], 16), int(line["span_id"], 16)) for line in lines}
    trace = spans[REQUEST].get_span_context().trace_id
    assert found["serving.access"] == (trace, own(spans[REQUEST]))
    assert found["serving.routes.completion"] == (trace, own(spans[CHAT]))


class Collector(http.server.ThreadingHTTPServer):
    """Takes what is sent by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.taken: list[tuple[str, ExportTraceServiceRequest]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Taking(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.taken.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as one:
        yield one
        one.shutdown()


@pytest.mark.parametrize(("path", "sent_to"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/otel/here", "/otel/here")])
def test_spans_reach_a_collector_by_the_time_the_server_has_stopped(collector: Collector, path: str, sent_to: str):
    one = Traces(ServingConfig(), exporting(f"http://127.0.0.1:{collector.server_port}{path}"))
    with one.append("heed.exchanges"):
        pass
    one.close()
    [(where, told)] = collector.taken
    assert where == sent_to
    resource = {each.key: each.value.string_value for each in told.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "heed-server"
    assert told.resource_spans[0].scope_spans[0].spans[0].name == "append heed.exchanges"


def test_a_collector_that_is_away_keeps_no_server_from_stopping(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traces, "CLOSE_S", 0.3)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # after the test, it gives up soon
    one = Traces(ServingConfig(), exporting("http://127.0.0.1:9"))
    with one.append("heed.exchanges"):
        pass
    began = time.monotonic()
    one.close()
    assert time.monotonic() - began < 5


def test_wanted_and_not_installed_is_said_at_start_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delitem(sys.modules, "serving.traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as where the extra is not installed
    config = ServingConfig(traces="http://us:secret@collector:4318", feedback=FeedbackConfig(data=tmp_path / "data"))
    assert serve(config) == Exit.SETTING
    assert capsys.readouterr().err == "heed: HEED_TRACES needs OpenTelemetry: pip install 'heed[otel]'\n"
    assert "secret" not in f"{config!r} {differing(config)}"


def test_nothing_of_it_is_imported_until_it_is_wanted():
    """One module imports OpenTelemetry; that module is imported by one function, which asks the setting first."""
    importers = {str(path): set(imports(path)) for path in modules("feedback", "serving", "learner", "deploy")}
    found = [path for path, names in importers.items() if any(name.startswith("opentelemetry") for name in names)]
    assert found == ["serving/traces.py"]
    at_the_top = {
        path: name
        for path, names in importers.items()
        if "serving.traces" in names
        for node in ast.parse(read(Path(path))).body
        if isinstance(node, ast.Import | ast.ImportFrom) and "serving.traces" in (name := ast.unparse(node))
    }
    assert at_the_top == {}
    assert _traces(ServingConfig()) is None
