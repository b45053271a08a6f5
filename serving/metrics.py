"""What the server counts, for Prometheus: seconds and totals, with labels that are few and known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from feedback.events import KINDS, Release

REQUEST_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""From what a small model takes to its first token, to what a chat may take where no setting says more."""
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SWAP_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120, 300)
"""From below a millisecond, because a flip takes that long, to a drain that waits for a long reply."""

CHAT = "/v1/chat/completions"
OTHER = "other"
"""Stands for every path that is no route, and for a status that its route is not known to answer."""
_BODY = (400, 408, 413)
_ADMIN = (200, *_BODY, 401, 409, 422, 503)
ANSWERS: Mapping[str, tuple[int, ...]] = {
    CHAT: (200, *_BODY, 401, 404, 429, 503),
    "/v1/models": (200, 401, 503),
    "/v1/models/{model:path}": (200, 401, 404, 503),
    "/v1/feedback": (202, *_BODY, 401, 404, 409, 422, 429, 503),
    "/v1/feedback/{feedback_id}": (200, 401, 404, 503),
    "/v1/policy": (200, 401),
    "/v1/replies/{reply_id}": (200, 401, 404, 409),
    "/health": (200,),
    "/ready": (200, 503),
    "/version": (200,),
    "/metrics": (200,),
    "/prompts.json": (200,),
    "/": (200, 206, 400, 404, 416),
    "/static": (200, 206, 304, 400, 404, 416),
    "/admin/promote": (*_ADMIN, 404),
    "/admin/rollback": _ADMIN,
    "/admin/pause": _ADMIN,
    "/admin/resume": _ADMIN,
    "/admin/update": (202, *_BODY, 401, 422),
    OTHER: (404,),
}
"""Route → the statuses that it can answer, beside those of every route."""
ALWAYS = (405, 500)

ROLES = ("current", "candidate", "previous", "older", "base")
FEEDBACK_OUTCOMES = (
    *("accepted", "repeated", "retracted", "conflict", "unknown_reply", "not_stored", "malformed", "unavailable"),
)
EXCHANGE_OUTCOMES = ("kept", "not_stored", "dropped")
SWAP_OUTCOMES = ("activated", "failed")
SWAP_PHASES = ("load", "stage", "warm", "flip", "drain")
REASONS = ("stop", "length", "abort", "error")
VALUES = {"thumb": ("up", "down"), "rating": ("1", "2", "3", "4", "5")}


def role_of(version: int, release: Release) -> str:
    """What a version is to the release; the base is the base, whatever it is to the release."""
    if version == 0:
        return "base"
    if version == release.current:
        return "current"
    if version == release.candidate:
        return "candidate"
    return "previous" if version == release.last_good else "older"


class Metrics:
    """The server's own metrics, in a registry of their own. Every known label set is there from the first scrape."""

    def __init__(self, policy: str) -> None:
        self.registry = CollectorRegistry()
        self.policy = policy
        self.requests = self._counter("heed_requests", "Requests answered.", ["route", "status"])
        self.request_seconds = self._histogram(
            "heed_request_seconds", "From a request's arrival to its last byte.", REQUEST_BUCKETS, ["route"]
        )
        self.time_to_first_token = self._histogram(
            "heed_time_to_first_token_seconds", "From a chat's arrival to its first token.", REQUEST_BUCKETS
        )
        self.inter_token = self._histogram(
            "heed_inter_token_seconds", "Between two tokens of one reply.", TOKEN_BUCKETS
        )
        self.queue = self._histogram("heed_queue_seconds", "From a chat's arrival to its admission.", REQUEST_BUCKETS)
        self.tokens = self._counter("heed_tokens", "Tokens read (prompt) and said (reply).", ["kind"])
        self.replies = self._counter("heed_replies", "Replies, by why they ended.", ["reason"])
        self.exchanges = self._counter("heed_exchanges", "Replies, by what became of their exchange.", ["outcome"])
        self.version_requests = self._counter(
            "heed_version_requests", "Chats, by the role of the version that spoke.", ["policy", "role"]
        )
        self.swaps = self._counter("heed_swaps", "Attempts to serve another version.", ["outcome"])
        self.swap_seconds = self._histogram("heed_swap_seconds", "Phases of a swap.", SWAP_BUCKETS, ["phase"])
        self.feedback = self._counter("heed_feedback", "Feedback posted, by what became of it.", ["kind", "outcome"])
        self.feedback_value = self._counter(
            "heed_feedback_value", "What people think of a version's replies.", ["policy", "kind", "value", "role"]
        )
        self._answered = {
            (route, status): (self.requests.labels(route, status), self.request_seconds.labels(route))
            for route, statuses in ANSWERS.items()
            for status in (*statuses, *ALWAYS)
        }
        self._unforeseen = self.requests.labels(OTHER, OTHER)
        self._prepare()

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request; its two time series were looked up before. What is not among ANSWERS makes none of its own."""
        found = self._answered.get((route, status))
        if found is None:
            found = self._unforeseen, self.request_seconds.labels(route if route in ANSWERS else OTHER)
        found[0].inc()
        found[1].observe(seconds)

    def watch(self, look: Callable[[], Now]) -> None:
        """Report what is running now, as `look` sees it at each scrape."""
        self.registry.register(_Watch(look, self.policy))

    def _prepare(self) -> None:
        for kind in ("prompt", "reply"):
            self.tokens.labels(kind)
        for reason in REASONS:
            self.replies.labels(reason)
        for outcome in EXCHANGE_OUTCOMES:
            self.exchanges.labels(outcome)
        for role in ROLES:
            self.version_requests.labels(self.policy, role)
            for kind, values in VALUES.items():
                for value in values:
                    self.feedback_value.labels(self.policy, kind, value, role)
        for outcome in SWAP_OUTCOMES:
            self.swaps.labels(outcome)
        for phase in SWAP_PHASES:
            self.swap_seconds.labels(phase)
        for kind in (*KINDS, "unknown"):
            for outcome in FEEDBACK_OUTCOMES:
                self.feedback.labels(kind, outcome)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, text, tuple(labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: Iterable[str] = ()) -> Histogram:
        return Histogram(name, text, tuple(labels), buckets=buckets, registry=self.registry)


@dataclass(frozen=True, slots=True)
class Now:
    """What a scrape sees of the engine and the release."""

    ready: bool
    running: int
    waiting: int
    prompt_tokens: int
    """Prompt tokens read, in all."""
    prefix_tokens: int
    """Prompt tokens found already read, in all."""
    kv_usage: float
    """Share of the key/value rows' room that is in use, 0 to 1."""
    loaded: Mapping[int, str]
    """Version → its role."""
    previous: int = 0
    """The version that was served before the current one, loaded or not."""
    rows: int = 0
    """Replies that can be generated at once."""
    slots: int = 0
    """Adapters that can be loaded beside the base."""
    free_slots: int = 0
    outbox: int = 0
    """Events that wait for a log that is away."""


class _Watch(Collector):
    """Gauges that are read rather than kept, so that they can never be stale."""

    def __init__(self, look: Callable[[], Now], policy: str) -> None:
        self._look = look
        self._policy = policy

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        now = self._look()
        yield GaugeMetricFamily("heed_ready", "1 while chats can be answered.", value=float(now.ready))
        yield GaugeMetricFamily("heed_running_requests", "Replies being generated.", value=now.running)
        yield GaugeMetricFamily("heed_waiting_requests", "Replies waiting for a row.", value=now.waiting)
        yield GaugeMetricFamily("heed_rows_limit", "Rows that there are: replies generated at once.", value=now.rows)
        slots = GaugeMetricFamily("heed_slots", "Places for adapters, by whether one is in it.", labels=["state"])
        slots.add_metric(["used"], now.slots - now.free_slots)
        slots.add_metric(["free"], now.free_slots)
        yield slots
        yield GaugeMetricFamily("heed_kv_usage_ratio", "Share of the key/value room in use.", value=now.kv_usage)
        yield GaugeMetricFamily("heed_outbox_events", "Events that wait for a log that is away.", value=now.outbox)
        prefix = CounterMetricFamily(
            "heed_prefix_tokens", "Prompt tokens that an earlier prompt had read (hit), or not.", labels=["hit"]
        )
        prefix.add_metric(["yes"], now.prefix_tokens)
        prefix.add_metric(["no"], now.prompt_tokens)
        yield prefix
        info = GaugeMetricFamily(
            "heed_version_info",
            "1 for each loaded version; 0 for the one before the current, which people may judge still, once it is not.",
            labels=["policy", "version", "role"],
        )
        roles = {now.previous: "previous", **now.loaded} if now.previous else now.loaded
        for version, role in sorted(roles.items()):
            info.add_metric([self._policy, f"v{version}", role], float(version in now.loaded))
        yield info
