"""Settings of the server: frozen, each with its unit and bounds, built once at the door."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from feedback.config import FeedbackConfig, Settings


class ServingConfig(Settings):
    """What a server is told at its start."""

    feedback: FeedbackConfig = Field(default_factory=FeedbackConfig)

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; the default is this machine alone")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes any free one")
    model: str | None = Field(
        None, min_length=1, description="base model, a Hugging Face directory or hub id; none: the built-in heed-tiny"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="where the model runs: auto, cpu, cuda, cuda:<index> or mps; auto takes a GPU if there is one",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="type of the base's weights; auto: bfloat16 on a GPU, and on a CPU where they are stored so and it "
        "computes with them fast, else float32; on a CPU the learner always takes float32",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="compute threads of the server; 0: one for each core that it may use"
    )
    max_rows: int = Field(32, ge=1, le=1024, description="replies generated at the same time; more of them wait")
    max_model_len: int = Field(
        0, ge=0, le=1_048_576, description="tokens of a prompt and its reply together; 0: what the model can"
    )
    max_waiting: int = Field(
        256, ge=1, le=1_000_000, description="requests that may wait for a row; one more is refused with 429"
    )
    packed: bool = Field(
        True,
        description="whether to lay the weights out for fast products where there is no native step (no C compiler, or a model "
        "of another build than Llama's); on a CPU they then take twice the memory",
    )
    prefix_tokens: int = Field(
        16_384,
        ge=0,
        le=100_000_000,
        description="tokens of earlier prompts and replies whose keys and values are remembered, so that the next turn "
        "of a conversation reads only what is new; 0: none",
    )
    request_timeout_s: float = Field(
        300.0, gt=0, le=86_400, description="how long a chat may take, waiting included, before it is cut off, seconds"
    )
    drain_delay_s: float = Field(
        5.0, ge=0, le=3600, description="how long to go on serving after SIGTERM, so that a proxy notices, seconds"
    )
    adapters: Path | None = Field(
        None, description="folder of the adapter store, which many servers may share; none: one in the data folder"
    )
    api_keys_file: Path | None = Field(
        None,
        description="TOML file of the API keys, read again when it changes: `[name]`, below it `sha256` and, if there is "
        "one, `quota`; with it every /v1 route needs a key",
    )
    insecure: bool = Field(
        False,
        description="whether to listen beyond this machine without API keys: whoever gets there may chat and rate",
    )
    api_key: str | None = Field(
        None,
        pattern=r"^[!-~]{1,1000}$",
        repr=False,
        description="the API key that `heed chat` and `heed simulate` send, where the server wants one",
    )
    admin_token: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        repr=False,
        description="bearer token of the /admin routes, which do not exist without one; it also opens every reply",
    )
    ask_share: float = Field(
        0.01, ge=0, le=1, description="share of replies, drawn at random, that ask for feedback: the unbiased slice"
    )
    log_format: Literal["auto", "json", "pretty"] = Field(
        "auto",
        description="how server and learner write the lines of their log: json for programs, pretty for people; auto: pretty "
        "in a terminal and under `heed up`, else json",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="the least that a line of the log is about; messages, replies and keys are in none from info up",
    )
    traces: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+(/\S*)?$",
        repr=False,
        description="where the server's traces go, by OTLP over HTTP: `http://collector:4318`, or with another path than "
        "/v1/traces (`pip install 'heed[otel]'`; sampling, headers and names: OTEL_*); none: nothing is traced",
    )
    trace_content: bool = Field(
        False,
        description="whether traces hold messages and replies, but of chats with `store: false`: people's own words",
    )

    vllm_metrics: bool = Field(
        False,
        description="whether /metrics shows what Heed counts under vLLM's names too, for dashboards that ask for those",
    )

    @property
    def adapter_root(self) -> Path:
        """Where the adapter store lies."""
        return self.adapters if self.adapters is not None else self.feedback.data / "adapters"
