"""Under vLLM's names there are the same numbers, where they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.served import Served

HISTOGRAMS = {
    "time_to_first_token_seconds": ("heed_time_to_first_token_seconds", {}),
    "inter_token_latency_seconds": ("heed_inter_token_seconds", {}),
    "time_per_output_token_seconds": ("heed_inter_token_seconds", {}),
    "request_queue_time_seconds": ("heed_queue_seconds", {}),
    "e2e_request_latency_seconds": ("heed_request_seconds", {"route": "/v1/chat/completions"}),
}
OTHERS = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "gpu_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(http: httpx.Client) -> tuple[dict[str, str], Samples]:
    """Types by name; values by name and labels."""
    families = list(text_string_to_metric_families(http.get("/metrics").text))
    samples = {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}
    return {family.name: family.type for family in families}, samples


def test_nothing_has_vllms_names_unless_it_is_asked_for(serve_with: Callable[..., Served]):
    assert "vllm:" not in serve_with(speaks=False).http.get("/metrics").text


def test_the_dashboards_of_the_field_find_their_names_with_heeds_numbers(serve_with: Callable[..., Served]):
    server = serve_with(vllm_metrics=True)
    types, samples = scrape(server.http)
    assert {f"vllm:{name}": kind for name, kind in OTHERS.items()}.items() <= types.items()
    assert {one for one in types if one.startswith("vllm:")} == {f"vllm:{name}" for name in (*OTHERS, *HISTOGRAMS)}
    assert all(value == 0 for (name, _), value in samples.items() if name.startswith("vllm:"))

    for _ in range(2):
        body = {"model": "default", "messages": [{"role": "user", "content": "hello " * 4}], "max_tokens": 5}
        with server.http.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True, "heed": {"ignore_eos": True}}
        ) as answer:
            list(answer.iter_lines())
    types, samples = scrape(server.http)

    def value(name: str, **labels: str) -> float:
        return samples[f"vllm:{name}", frozenset({"model_name": "default", **labels}.items())]

    def heeds(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    for theirs, (ours, only) in HISTOGRAMS.items():
        assert types[f"vllm:{theirs}"] == "histogram"
        same = {
            (
                f"vllm:{theirs}{name.removeprefix(ours)}",
                frozenset({"model_name": "default", **dict(labels)}.items()),
            ): one
            for (name, labels), one in (
                ((name, frozenset(labels - only.items())), one)
                for (name, labels), one in samples.items()
                if name in (f"{ours}_bucket", f"{ours}_sum", f"{ours}_count") and only.items() <= labels
            )
        }
        assert len(same) > 10
        assert same.items() <= samples.items()
    assert value("time_to_first_token_seconds_count") == value("e2e_request_latency_seconds_count") == 2
    assert value("inter_token_latency_seconds_count") == 8
    assert value("generation_tokens_total") == 10
    assert value("prompt_tokens_total") == heeds("heed_tokens_total", kind="prompt") > 48
    assert value("request_success_total", finished_reason="length") == 2
    assert value("request_success_total", finished_reason="stop") == 0
    hits, queries = value("prefix_cache_hits_total"), value("prefix_cache_queries_total")
    assert hits == heeds("heed_prefix_tokens_total", hit="yes") > 0
    assert queries == hits + heeds("heed_prefix_tokens_total", hit="no")
    assert value("num_requests_running") == value("num_requests_waiting") == 0
