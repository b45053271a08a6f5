"""A swap that nobody feels: 60 seconds under 16 talkers, another version every two seconds.

Counts what went wrong, compares the gaps between tokens that overlap a swap with all others, and scores every kept
reply again by a plain forward of the version it names.

    python -m benchmarks.swaps [--seconds 60] [--shape S] [--beside]     --beside: vLLM's load_lora_adapter under the same load
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.load import Answer, ask, quantile
from benchmarks.peers import Vllm
from benchmarks.servers import CACHE, Heed, Server
from benchmarks.shapes import ADAPTERS, SHAPES, make, prompt
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, Exchange, parse_event
from feedback.log import open_log
from serving.adapters import AdapterStore
from serving.base import describe_base
from serving.engine import load_model

TALKERS, EVERY_S, PROMPT, NEW = 16, 2.0, 64, 64
Json = dict[str, Any]


class Fp32(Heed):
    dtype = "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="S")
    parser.add_argument("--beside", action="store_true", help="vLLM instead of Heed, in its fastest type")
    given = parser.parse_args()
    model = make(SHAPES[given.shape], CACHE / "models")
    count = int(given.seconds / EVERY_S) + 1
    with tempfile.TemporaryDirectory(prefix="heed-swaps-") as work:
        server = (Vllm if given.beside else Fp32)(model, Path(work))
        server.install()
        server.start()
        try:
            names = [f"swap{i}" for i in range(count)]
            if isinstance(server, Fp32):
                names = [f"default@v{version}" for version in publish(server, model, count)]
            answers, failures, swaps = asyncio.run(talk_and_swap(server, model, names, given.seconds))
        finally:
            server.stop()
        told = report(answers, failures, swaps)
        print(json.dumps(told | (rescored(server, model) if isinstance(server, Fp32) else {}), indent=1))


def publish(server: Heed, model: Path, count: int) -> list[int]:
    """More versions in the server's store, each the first adapter under another scale."""
    base_model, chat = load_model(model)
    base = describe_base(base_model, chat, model)
    store = AdapterStore(server.work / "data" / "adapters", "default")
    weights = store.load(1, base)
    assert isinstance(weights.scaling, float)
    made = []
    for i in range(count):
        changed = replace(weights, scaling=weights.scaling * (0.5 + i / count))
        made.append(store.publish(changed, parent=0, base=base))
    return made


async def talk_and_swap(
    server: Server, model: Path, names: Sequence[str], seconds: float
) -> tuple[list[Answer], list[str], list[tuple[float, float]]]:
    """Answers, what failed, and from when to when each swap took: promoted, and first heard."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [prompt(tokenizer, PROMPT, seed) for seed in range(TALKERS * 64)]  # before, since it takes time
    gc.freeze()  # a full collection of what was imported takes longer than any gap
    answers: list[Answer] = []
    failures: list[str] = []
    heard: dict[str, float] = {}
    until = time.perf_counter() + seconds

    async def talker(number: int) -> None:
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            body = server.body(prompts[(64 * number + turn) % len(prompts)], NEW, None) | {"model": speaking}
            try:
                answer = await ask(server.port, server.path, body)
                said = json.loads(answer.last)
                if said["usage"]["completion_tokens"] != NEW:
                    raise RuntimeError(f"broken stream: {said}")
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
                continue
            heard.setdefault(said["model"], answer.at[0])
            answers.append(answer)

    promoted: dict[str, float] = {}
    speaking = "default" if isinstance(server, Heed) else "a"

    async def swapper() -> None:
        nonlocal speaking
        for number, name in enumerate(names):
            await asyncio.sleep(EVERY_S)
            if time.perf_counter() > until - EVERY_S:
                return
            promoted[name] = time.perf_counter()
            if isinstance(server, Heed):
                await asyncio.to_thread(promote, server.port, int(name.rpartition("v")[2]))
            else:  # new requests name the new adapter once it is loaded
                await asyncio.to_thread(load, server.port, name, model / "adapters" / ADAPTERS[number % 2])
                speaking = name

    await asyncio.gather(swapper(), *(talker(number) for number in range(TALKERS)))
    return answers, failures, [(at, heard[name]) for name, at in promoted.items() if name in heard]


def promote(port: int, version: int) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/admin/promote",
        data=json.dumps({"version": version}).encode(),
        headers={"authorization": "Bearer benchmark", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def load(port: int, name: str, adapter: Path) -> None:
    """vLLM's way to another adapter."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/load_lora_adapter",
        data=json.dumps({"lora_name": name, "lora_path": str(adapter)}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def report(answers: Sequence[Answer], failures: Sequence[str], swaps: Sequence[tuple[float, float]]) -> Json:
    during: list[float] = []
    others: list[float] = []
    timed, most = 0, max(len(answer.at) for answer in answers)
    for answer in answers:
        tokens = answer.at[:-2]  # the last two say that it has ended, once the log has it
        if len(answer.at) < most:  # text was held back (half a character): its gaps are no gaps between tokens
            continue
        timed += 1
        for before, after in itertools.pairwise(tokens):
            overlaps = any(start < after and before < end for start, end in swaps)
            (during if overlaps else others).append(1000 * (after - before))
    return {
        "answers": len(answers),
        "answers_with_an_event_for_each_token": timed,
        "failed": list(failures),
        "swaps": len(swaps),
        "promoted_to_heard_ms_p50": 1000 * quantile([end - start for start, end in swaps], 0.5),
        **{
            f"{name}_{what}_ms": value
            for name, gaps in (("during_swaps", during), ("others", others))
            for what, value in (
                ("gaps", len(gaps)), ("p50", quantile(gaps, 0.5)), ("p99", quantile(gaps, 0.99)), ("max", max(gaps))
            )
        },
    }  # fmt: skip


@torch.inference_mode()
def rescored(server: Heed, model: Path) -> Json:
    """The largest difference of a served log-prob from that of a plain forward of the version that is named."""
    log = open_log(FeedbackConfig(data=server.work / "data"), writes=())
    of_version: dict[int, list[Exchange]] = defaultdict(list)
    after: dict[str, int] = {}
    while records := log.read(EXCHANGES, after, 1000):
        for record in records:
            exchange = parse_event(record.event)
            assert isinstance(exchange, Exchange)
            of_version[exchange.version].append(exchange)
        after = {record.partition: record.offset for record in records}
    log.close()
    worst, count = 0.0, 0
    for version, exchanges in of_version.items():
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        folder = server.work / "data" / "adapters" / "default" / f"v{version:06d}"
        plain = (PeftModel.from_pretrained(plain, folder) if version else plain).eval()
        for start in range(0, len(exchanges), 16):
            for exchange in exchanges[start : start + 16]:
                content = exchange.content
                ids = torch.tensor([[*content.prompt_ids, *content.reply_ids]])
                logprobs = plain(input_ids=ids).logits[0, len(content.prompt_ids) - 1 : -1].float().log_softmax(-1)
                expected = logprobs.gather(1, torch.tensor(content.reply_ids)[:, None])[:, 0]
                worst = max(worst, (expected - torch.tensor(content.raw_logprobs)).abs().max().item())
                count += 1
    return {"exchanges": count, "versions": len(of_version), "max_logprob_difference": worst}


if __name__ == "__main__":
    main()
