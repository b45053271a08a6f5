"""Traces for OpenTelemetry: spans of a request, of its chat, and of each event on its way into the log.

    POST /v1/chat/completions     from the request's arrival to its last byte; goes on with the client's traceparent
    └─ chat default               until each of its replies is whole and kept
       └─ append heed.exchanges   until the log has kept the exchange, or the outbox

Names and attributes are those of the semantic conventions 1.41 for HTTP, messaging and generative AI, and vLLM's where these
have none (time in the queue). Paths, queries, addresses and users are in no span; messages and replies only with
HEED_TRACE_CONTENT. This module is imported only where HEED_TRACES is set, for it needs the extra `otel`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from opentelemetry.context import Context, attach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, format_span_id, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from structlog.contextvars import bind_contextvars

from serving.config import ServingConfig
from serving.stream import Finished, Stream

if TYPE_CHECKING:
    from serving.routes.asked import Asked
    from serving.routes.door import Visit

CLOSE_S = 5.0
"""How long a server that stops waits for a collector to take its last spans."""

_propagator = TraceContextTextMapPropagator()


def exporting(endpoint: str) -> SpanProcessor:
    """Spans sent from a thread of their own to a collector, which need not be there: then they are lost, and it is said."""
    path = "" if urlsplit(endpoint).path.strip("/") else "/v1/traces"
    return BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + path))


class Traces:
    """The spans of one server."""

    def __init__(self, config: ServingConfig, processor: SpanProcessor) -> None:
        """`processor`: what becomes of spans that ended."""
        # its warnings quote what a client sent as traceparent or tracestate, with each request
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
        ours = {"service.name": "heed-server", "service.version": version("heed")}
        named = Resource(ours).merge(OTELResourceDetector().detect())  # what the environment says goes first
        self._provider = TracerProvider(resource=Resource.create(named.attributes), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("heed", version("heed"))
        self._policy = config.feedback.policy
        self._content = config.trace_content
        self._system = "kafka" if config.feedback.kafka.kafka_bootstrap else "sqlite"

    @contextmanager
    def request(self, visit: Visit) -> Iterator[None]:
        """The span of a request; spans begun within are its children, and lines of the log name it."""
        method = "HTTP" if visit.method == "_OTHER" else visit.method
        above = _propagator.extract(visit.headers, Context())
        asked = {"http.request.method": visit.method, "url.scheme": visit.scope["scheme"], "heed.request.id": visit.id}
        with self._tracer.start_as_current_span(
            method, above, SpanKind.SERVER, asked, record_exception=False, set_status_on_exception=False
        ) as span:
            _name_in_the_log(span)
            try:
                yield
            finally:
                span.update_name(f"{method} {visit.route}")
                span.set_attributes({"http.route": visit.route, "http.response.status_code": visit.status})
                if visit.status >= 500:
                    _fail(span, str(visit.status))

    def chat(self, asked: Asked) -> ChatTrace:
        """The span of a chat, current in this context from here on."""
        sampling = asked.sampling
        about: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "heed",
            "gen_ai.output.type": "text",
            "gen_ai.conversation.id": asked.place.conversation,
            "gen_ai.request.model": asked.model,
            "gen_ai.request.stream": asked.stream,
            "gen_ai.request.choice.count": asked.choices,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.response.id": asked.id,
            "gen_ai.usage.input_tokens": len(asked.prompt_ids),
        }
        if sampling.seed is not None:
            about["gen_ai.request.seed"] = sampling.seed
        span = self._tracer.start_span(f"chat {asked.model}", None, SpanKind.INTERNAL, about)
        attach(set_span_in_context(span))
        _name_in_the_log(span)
        # a chat that is not to be kept is kept nowhere
        return ChatTrace(span, asked, self._policy, content=self._content and asked.kept)

    @contextmanager
    def append(self, topic: str) -> Iterator[Span]:
        """The span of an event on its way into the log."""
        about = {
            "messaging.system": self._system,
            "messaging.operation.name": "append",
            "messaging.operation.type": "send",
            "messaging.destination.name": topic,
        }
        with self._tracer.start_as_current_span(
            f"append {topic}", None, SpanKind.PRODUCER, about, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except Exception as error:
                _fail(span, type(error).__name__)
                raise

    def close(self) -> None:
        """Send what has ended, as long as that takes no more than CLOSE_S."""
        closing = threading.Thread(target=self._provider.shutdown, name="heed-traces-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class ChatTrace:
    """The span of one chat, which ends with the last of its replies, whether anybody still listens or not."""

    def __init__(self, span: Span, asked: Asked, policy: str, *, content: bool) -> None:
        self._span = span
        self._asked = asked
        self._policy = policy
        self._content = content
        self._finished: dict[int, Finished] = {}
        self._queued_s: list[float] = []
        self._begun = False

    def began(self, seconds: float) -> None:
        """A reply's first token came, so long after the chat."""
        if not self._begun and self._asked.stream:
            self._begun = True
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)

    def ended(self, choice: int, finished: Finished, stream: Stream) -> None:
        """A reply is whole, and the log has answered."""
        self._finished[choice] = finished
        if stream.admitted_at is not None:
            self._queued_s.append(stream.admitted_at - stream.submitted_at)
        if finished.reason == "error":
            _fail(self._span, "engine_failed")
        if len(self._finished) == self._asked.choices:
            self._end([reply for _, reply in sorted(self._finished.items())])

    def _end(self, replies: list[Finished]) -> None:
        span = self._span
        span.set_attribute("gen_ai.response.model", f"{self._policy}@v{replies[0].version}")
        span.set_attribute("gen_ai.response.finish_reasons", [reply.reason for reply in replies])
        span.set_attribute("gen_ai.usage.output_tokens", sum(len(reply.reply_ids) for reply in replies))
        if self._queued_s:
            span.set_attribute("gen_ai.latency.time_in_queue", max(self._queued_s))
        if self._content:
            asked = [_message(message.role, message.content) for message in self._asked.messages]
            said = [_message("assistant", reply.text) | {"finish_reason": reply.reason} for reply in replies]
            span.set_attribute("gen_ai.input.messages", json.dumps(asked, ensure_ascii=False))
            span.set_attribute("gen_ai.output.messages", json.dumps(said, ensure_ascii=False))
        span.end()


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def _fail(span: Span, kind: str) -> None:
    """What went wrong, without its message, which may quote what was sent."""
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", kind)


def _name_in_the_log(span: Span) -> None:
    """Lines about what this span is of lead to it."""
    ids = span.get_span_context()
    bind_contextvars(trace_id=format_trace_id(ids.trace_id), span_id=format_span_id(ids.span_id))
