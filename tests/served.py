"""A real server over a real, tiny, random model: what the HTTP tests talk to."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from feedback.board import open_board
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK, Exchange, Feedback, Retraction, parse_event
from feedback.log import Line, Log, LogUnavailable, Offset, Offsets, Record, open_log
from serving.adapters import AdapterStore, Base
from serving.app import create_app, follow_hints
from serving.config import ServingConfig
from serving.ids import Ids, load_secret
from serving.keys import Keys
from serving.lora import AdapterWeights
from serving.process import load_speaker
from serving.routes.wiring import Wiring

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_LEN = 192
Wrap = Callable[[Log], Log]
T = TypeVar("T")


def make_model(folder: Path, length: int = MAX_LEN) -> Path:
    """A Hugging Face directory: a random one-layer Llama that seldom ends by itself, byte-level tokenizer, template.

    `length`: tokens of prompt and reply together.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<|pad|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=length,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def random_adapter(base: Base, seed: int = 1, size: float = 0.3) -> AdapterWeights:
    """An adapter that changes what the model says."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        path: (torch.randn(4, inputs, generator=rng) * size, torch.randn(outputs, 4, generator=rng) * size)
        for path, (inputs, outputs) in base.targets.items()
    }
    return AdapterWeights(rank=4, scaling=1.0, tensors=tensors)


class TroubledLog:
    """A real log that is full while `full` is set, and gives no answer until `answers` is set."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.full = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        told: Future[Offset] = Future()
        if self.full.is_set():
            told.set_exception(LogUnavailable("No space left on device"))
        else:
            kept = self._log.submit(topic, key, event)
            threading.Thread(target=lambda: (self.answers.wait(), told.set_result(kept.result()))).start()
        return told

    def line(self) -> Line:
        return self

    def append(self, topic: str, key: str, event: str) -> Offset:
        return self.submit(topic, key, event).result()

    def read(self, topic: str, after: Offsets, max_events: int) -> list[Record]:
        return self._log.read(topic, after, max_events)

    def end(self, topic: str) -> Offsets:
        return self._log.end(topic)

    def away(self) -> bool:
        return self._log.away()

    def waiting(self) -> int:
        return self._log.waiting()

    def close(self) -> None:
        self._log.close()


@dataclass(frozen=True)
class Served:
    """A server that is running, seen from outside and from inside."""

    url: str
    http: httpx.Client
    wiring: Wiring
    loop: asyncio.AbstractEventLoop

    @property
    def base(self) -> Base:
        assert self.wiring.speaker is not None
        return self.wiring.speaker.base

    def chat(self, text: str = "hello", **more: Any) -> httpx.Response:
        body = {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 6, **more}
        return self.http.post("/v1/chat/completions", json=body)

    def ask(self, question: Coroutine[Any, Any, T]) -> T:
        """What the board answers, asked where the server runs."""
        return asyncio.run_coroutine_threadsafe(question, self.loop).result(10)

    def exchanges(self) -> list[Exchange]:
        events = [parse_event(record.event) for record in self.wiring.log.read(EXCHANGES, {}, 10_000)]
        return [event for event in events if isinstance(event, Exchange)]

    def said(self) -> list[Feedback | Retraction]:
        events = [parse_event(record.event) for record in self.wiring.log.read(FEEDBACK, {}, 10_000)]
        return [event for event in events if isinstance(event, Feedback | Retraction)]

    def publish(self, seed: int = 1, *, promote: bool = True) -> int:
        """A new version; by default the one that speaks when this returns."""
        version = self.wiring.store.publish(random_adapter(self.base, seed), parent=0, base=self.base)
        if promote:
            self.wiring.store.change("promote", "operator", version=version)
            self.until(lambda: self.wiring.speaker is not None and self.wiring.speaker.engine.current == version)
        return version

    def metric(self, name: str, **labels: str) -> float:
        """A sample as /metrics shows it; 0 where it does not."""
        wanted = set(labels.items())
        for family in self.wiring.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == name and wanted == set(sample.labels.items()):
                    return sample.value
        return 0.0

    @staticmethod
    def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
        give_up = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < give_up, "it never became true"
            time.sleep(0.01)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def served(config: ServingConfig, *, log: Wrap = lambda log: log, speaks: bool = True) -> Iterator[Served]:
    """Serve on a free port until the block ends. `log` may put a log of its own around the real one."""
    feedback = config.feedback
    feedback.data.mkdir(parents=True, exist_ok=True)
    real = open_log(feedback, writes=(EXCHANGES, FEEDBACK), outbox=True)
    board = open_board(feedback, "server")
    store = AdapterStore(config.adapter_root, feedback.policy)
    keys = Keys(config.api_keys_file) if config.api_keys_file else None
    app = create_app(config, ids=Ids(load_secret(feedback)), log=log(real), board=board, store=store, keys=keys)
    wiring: Wiring = app.state.wiring
    loop = wiring.loop = asyncio.new_event_loop()
    if speaks:
        wiring.speaker = load_speaker(config, wiring)
    server = _Uvicorn(uvicorn.Config(app, port=0, lifespan="off", ws="none", log_config=None, log_level="warning"))
    hints = loop.create_task(follow_hints(wiring))
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve()), name="test-server")
    thread.start()
    Served.until(lambda: server.started or not thread.is_alive())
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as http:
            seen = Served(url, http, wiring, loop)
            yield seen
            # what a route can answer stands in serving.metrics.ANSWERS: any test may show that it lacks something
            assert seen.metric("heed_requests_total", route="other", status="other") == 0
    finally:
        server.should_exit = True
        thread.join()
        hints.cancel()
        loop.run_until_complete(wiring.settle())
        if wiring.speaker is not None:
            wiring.speaker.swapper.close()
            wiring.speaker.engine.close()
        loop.run_until_complete(wiring.settle())
        loop.run_until_complete(board.close())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        real.close()


def config_for(data: Path, model: Path, **settings: Any) -> ServingConfig:
    return ServingConfig(
        feedback=FeedbackConfig(data=data, redis_url=settings.pop("redis_url", None)),
        model=str(model),
        threads=1,
        **{"port": 0, "max_rows": 4, "admin_token": "let-me-in", "drain_delay_s": 0.0, "ask_share": 0.0} | settings,
    )
