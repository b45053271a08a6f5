"""Metrics once more under vLLM's names, for the dashboards of the field that ask for those (HEED_VLLM_METRICS).

They are read from Heed's own at each scrape: nothing is counted twice. What Heed does not count is not shown: lengths of
requests, times of prefill and decode; nor `vllm:lora_requests_info`, whose labels would be another time series with each version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.metrics import CHAT, Metrics, Now


class VllmMetrics(Collector):
    """The metrics of one server; `model_name` is the policy, as clients name it."""

    def __init__(self, metrics: Metrics, look: Callable[[], Now]) -> None:
        self._metrics = metrics
        self._look = look
        self._labels = {"model_name": metrics.policy}

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        metrics, now = self._metrics, self._look()
        yield self._gauge("num_requests_running", "Replies being generated.", now.running)
        yield self._gauge("num_requests_waiting", "Replies waiting for a row.", now.waiting)
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):  # the second is the older name
            yield self._gauge(name, "Share of the key/value room in use, 0 to 1.", now.kv_usage)
        found, queried = now.prefix_tokens, now.prefix_tokens + now.prompt_tokens
        yield self._counter("prefix_cache_queries", "Prompt tokens that were looked up.", {"": queried})
        yield self._counter("prefix_cache_hits", "Of them, those that an earlier prompt had read.", {"": found})
        tokens = _totals(metrics.tokens, "kind")
        yield self._counter("prompt_tokens", "Tokens of prompts.", {"": tokens["prompt"]})
        yield self._counter("generation_tokens", "Tokens of replies.", {"": tokens["reply"]})
        ended = _totals(metrics.replies, "reason")
        yield self._counter("request_success", "Replies, by why they ended.", ended, label="finished_reason")
        yield self._histogram("time_to_first_token_seconds", metrics.time_to_first_token)
        for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):  # the second is the older name
            yield self._histogram(name, metrics.inter_token)
        yield self._histogram("request_queue_time_seconds", metrics.queue)
        yield self._histogram("e2e_request_latency_seconds", metrics.request_seconds, {"route": CHAT})

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text)
        family.add_sample(f"vllm:{name}", self._labels, value)
        return family

    def _counter(self, name: str, text: str, values: Mapping[str, float], label: str = "") -> Metric:
        """`values`: by the value of `label`, where there is one."""
        family = CounterMetricFamily(f"vllm:{name}", text)
        for key, value in values.items():
            family.add_sample(f"vllm:{name}_total", self._labels | ({label: key} if label else {}), value)
        return family

    def _histogram(self, name: str, ours: Histogram, only: Mapping[str, str] | None = None) -> Metric:
        """The same histogram; `only`: of the one with these labels, which are left out."""
        only = only or {}
        (family,) = ours.collect()
        theirs = Metric(f"vllm:{name}", family.documentation, "histogram")
        for one in family.samples:
            if only.items() <= one.labels.items() and not one.name.endswith("_created"):
                labels = {label: value for label, value in one.labels.items() if label not in only}
                renamed = f"vllm:{name}{one.name.removeprefix(family.name)}"
                theirs.add_sample(renamed, {**self._labels, **labels}, one.value)
        return theirs


def _totals(counter: Counter, label: str) -> dict[str, float]:
    """A counter's values by this label; not when each was made, which there may be beside them."""
    samples = [one for family in counter.collect() for one in family.samples]
    return {one.labels[label]: one.value for one in samples if one.name.endswith("_total")}
