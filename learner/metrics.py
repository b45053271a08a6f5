"""The learner's numbers for Prometheus, and the small HTTP server that shows them with `/health`."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric

from feedback.events import EXCHANGES, FEEDBACK
from learner.figures import FIGURES, figures

OUTCOMES = ("released", "refused", "failed", "passed_over")
PHASES = ("reward", "rollouts", "ppo", "gate")
CHECKS = ("reward_model", "changed", "no_worse", "kl", "length", "ended", "repetition", "variety", "probes")
VERDICTS = ("pass", "fail", "skipped")

NO_LIVE = {"staleness": 0.0, "share": 0.0}
"""What the report of an update leaves out that took no served replies as experience."""

DROPS = ("no_exchange", "too_old", "conflict", "malformed", "newer_schema")
"""Why feedback, or an event, does not count."""
FATES = ("pending", "joined", "superseded", "retracted", "duplicate", "late")
"""What else became of feedback; what was late is among the joined too."""

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PHASE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 900, 3600, 14400)
_FRESHNESS_BUCKETS = (
    *(5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400, 172800, 604800),
)
"""To a week: a judgement waits for enough others, and where few people judge that takes days."""


class LearnerMetrics:
    """Every metric of the learner, in a registry of its own. Safe from any thread.

    Every label set is there from the start, but of what the state file counts: of that as soon as the file was read. Zeros
    before would make each restart look like a rise by all that there ever was.
    """

    def __init__(self, kl_limit: float = 0.0) -> None:
        """`kl_limit`: the setting, nats a reply."""
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.lag = Gauge("heed_learner_offset_lag", "Events in the log not yet absorbed.", ["topic"], **own)
        self.updates = Counter("heed_updates", "Learner rounds that ended.", ["outcome"], **own)
        self.seconds = Histogram(
            "heed_update_seconds", "Seconds a phase of an update took.", ["phase"], buckets=_PHASE_BUCKETS, **own
        )
        self.checks = Counter("heed_gate_checks", "Checks of the gate.", ["check", "verdict"], **own)
        self.freshness = Histogram(
            "heed_freshness_seconds",
            "Seconds from a feedback's acceptance to serving an adapter trained on it.",
            buckets=_FRESHNESS_BUCKETS,
            **own,
        )
        self.dropped = _Totals("heed_feedback_dropped", "Feedback that does not count.", "reason", DROPS)
        self.registry.register(self.dropped)
        self.fates = Gauge("heed_feedback_fates", "Feedback by what became of it.", ["fate"], **own)
        self.waiting = Gauge("heed_judgements_waiting", "New judgements that no update has learned from.", **own)
        self.due = Gauge("heed_judgements_due", "New judgements that start an update now.", **own)
        self.last_update = Gauge(
            "heed_last_update_timestamp_seconds", "When the last update ended, since the epoch; 0: none yet.", **own
        )
        Gauge("heed_kl_limit_nats", "KL to the base that an update may end at (HEED_KL_LIMIT).", **own).set(kl_limit)
        self._prepare()
        self.figures = {name: Gauge(name, text, **own) for name, (text, _) in FIGURES.items()}

    def show(self, report: Mapping[str, Any]) -> None:
        """Set the gauges of the last update, from its report."""
        for name, value in figures({"live": NO_LIVE, **report}).items():
            self.figures[name].set(value)

    def count(self, feedback: Mapping[str, Any]) -> None:
        """Show how much feedback there is of each fate, from learner.report.feedback_counts."""
        self.dropped.reach(feedback["dropped"])
        self.waiting.set(feedback["new"])
        counted = {**feedback["by_status"], "duplicate": feedback["duplicates"], "late": feedback["late"]}
        for fate in FATES:
            self.fates.labels(fate).set(counted.get(fate, 0))

    def _prepare(self) -> None:
        for topic in (EXCHANGES, FEEDBACK):
            self.lag.labels(topic)
        for outcome in OUTCOMES:
            self.updates.labels(outcome)
        for phase in PHASES:
            self.seconds.labels(phase)
        for check, verdict in itertools.product(CHECKS, VERDICTS):
            self.checks.labels(check, verdict)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Totals:
    """A counter whose totals live in the state file, so that a restart does not set them back."""

    def __init__(self, name: str, text: str, label: str, values: Sequence[str]) -> None:
        self.name, self.text, self.label, self.values = name, text, label, values
        self.totals: dict[str, int] = {}

    def reach(self, totals: Mapping[str, int]) -> None:
        """Never back: what was given up may still be joined, and a counter that falls reads as one that began anew."""
        self.totals = {value: max(self.totals.get(value, 0), totals.get(value, 0)) for value in self.values}

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self.name, self.text, labels=[self.label])
        for value, total in self.totals.items():
            family.add_metric([value], total)
        yield family


class MetricsServer:
    """Answers GET /metrics and GET /health on a thread of its own, until closed."""

    def __init__(
        self, host: str, port: int, metrics: LearnerMetrics, health: Callable[[], Mapping[str, object]]
    ) -> None:
        """Port 0 takes any free one; `port` says which. Raises OSError when the address is taken or not ours."""

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, _CONTENT_TYPE, metrics.text())
                elif path == "/health":
                    self._answer(200, "application/json", json.dumps(health()).encode())
                else:
                    self._answer(404, "text/plain", b"Here are /metrics and /health.\n")

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """A scrape every few seconds is no news."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self._server = Server((host, port), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="learner-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
