"""What the server counts, for Prometheus: seconds and totals, with labels that are few and known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from feedback.events import KINDS, Release

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SWAP_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30)
"""From below a millisecond, because a flip takes that long, to a drain that waits for a long reply."""

ROLES = ("current", "candidate", "previous", "older", "base")
FEEDBACK_OUTCOMES = (
    *("accepted", "repeated", "retracted", "conflict", "unknown_reply", "not_stored", "malformed", "unavailable"),
)
EXCHANGE_OUTCOMES = ("kept", "not_stored", "dropped")
SWAP_OUTCOMES = ("activated", "failed")
SWAP_PHASES = ("load", "stage", "warm", "flip", "drain")
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
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._prepare()

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request; its two time series are looked up once."""
        found = self._answered.get((route, status))
        if found is None:
            found = self.requests.labels(route, str(status)), self.request_seconds.labels(route)
            self._answered[route, status] = found
        found[0].inc()
        found[1].observe(seconds)

    def watch(self, look: Callable[[], Now]) -> None:
        """Report what is running now, as `look` sees it at each scrape."""
        self.registry.register(_Watch(look, self.policy))

    def _prepare(self) -> None:
        for kind in ("prompt", "reply"):
            self.tokens.labels(kind)
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
        yield GaugeMetricFamily("heed_kv_usage_ratio", "Share of the key/value room in use.", value=now.kv_usage)
        yield GaugeMetricFamily("heed_outbox_events", "Events that wait for a log that is away.", value=now.outbox)
        prefix = CounterMetricFamily(
            "heed_prefix_tokens", "Prompt tokens that an earlier prompt had read (hit), or not.", labels=["hit"]
        )
        prefix.add_metric(["yes"], now.prefix_tokens)
        prefix.add_metric(["no"], now.prompt_tokens)
        yield prefix
        info = GaugeMetricFamily(
            "heed_version_info", "1 for each loaded version.", labels=["policy", "version", "role"]
        )
        for version, role in sorted(now.loaded.items()):
            info.add_metric([self._policy, f"v{version}", role], 1.0)
        yield info
