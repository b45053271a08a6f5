"""How near a decoding step comes to what reading weights allows, in this process, on whatever device there is.

Random weights in bf16, replies of two versions in turns; the limit is (weights + keys and values) / measured bandwidth.
Then a third version is staged and activated while all rows decode: what that costs those who listen.

    python -m benchmarks.decode                                        8B on a GPU, M elsewhere
    python -m benchmarks.decode --shape S --rows 1 --rows 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.limits import bandwidth
from benchmarks.shapes import LLAMA_8B, RANK, SHAPES, Shape, config, words
from serving.chat import Chat
from serving.engine import AdapterWeights, Engine, Event, Request, Sampling, Stream
from serving.lora import target_modules

PROMPT, NEW = 64, 128
ALL = SHAPES | {LLAMA_8B.name: LLAMA_8B}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=list(ALL), default="8B" if torch.cuda.is_available() else "M")
    parser.add_argument("--rows", action="append", type=int, help="replies at once; may be repeated (1, 16, 64)")
    given = parser.parse_args()
    shape, device, rows = ALL[given.shape], torch.device(given.device), given.rows or [1, 16, 64]
    rate = bandwidth(device)
    with an_engine(shape, device, max(rows)) as engine:
        about = {
            "shape": shape.name,
            "device": _name(device),
            "way": engine.way,
            "bandwidth_gb_s": round(rate / 1e9, 1),
        }
        for many in rows:
            print(json.dumps(about | decode(engine, shape, many, rate)), flush=True)
        print(json.dumps(about | swap(engine, max(rows))))


@contextmanager
def an_engine(shape: Shape, device: torch.device, rows: int) -> Iterator[Engine]:
    tokenizer = words(shape.vocab)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config(shape, tokenizer))
    finally:
        torch.set_default_dtype(before)
    engine = Engine(model.requires_grad_(False).eval(), Chat(tokenizer), rows=rows, max_len=512)
    try:
        for version in (1, 2):
            engine.stage(version, adapter(model, version))
        engine.start()
        yield engine
    finally:
        engine.close()


def adapter(model: PreTrainedModel, seed: int) -> AdapterWeights:
    """Small and random: it changes how long nothing takes."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in target_modules(model):
        outputs, inputs = model.get_submodule(path).weight.shape
        tensors[path] = (
            torch.randn(RANK, inputs, generator=draw) / inputs,
            torch.randn(outputs, RANK, generator=draw) / 100,
        )
    return AdapterWeights(RANK, 1.0, tensors)


def decode(engine: Engine, shape: Shape, rows: int, rate: float) -> dict[str, float]:
    """The median step of so many rows, beside the limit."""
    talk(engine, rows)  # once for nothing: what libraries set up at first
    step = statistics.median(gap for gaps in talk(engine, rows) for _, gap in gaps)
    read = 2 * shape.linear_parameters + rows * (PROMPT + NEW / 2) * shape.kv_bytes
    limit = read / rate
    return {
        "rows": rows,
        "step_ms": round(1e3 * step, 3),
        "limit_ms": round(1e3 * limit, 3),
        "ratio": round(step / limit, 2),
    }


def swap(engine: Engine, rows: int) -> dict[str, float]:
    """Stage and activate a version while all rows decode."""
    weights, phases = adapter(engine.model, 3), {}
    streams, heard = begin(engine, rows)
    while min(map(len, heard)) < NEW // 4:
        time.sleep(0.001)
    begun = time.perf_counter()
    for name, work in (("stage", lambda: engine.stage(3, weights)), ("flip", lambda: engine.activate(3))):
        since = time.perf_counter()
        work()
        phases[f"{name}_ms"] = round(1e3 * (time.perf_counter() - since), 2)
    ended = time.perf_counter()
    for stream in streams:
        stream.result()
    all_gaps = [pair for gaps in map(gaps_of, heard) for pair in gaps]
    during = [gap for at, gap in all_gaps if begun <= at and at - gap <= ended]
    others = [gap for at, gap in all_gaps if not (begun <= at and at - gap <= ended)]
    return phases | {
        "rows": rows,
        "longest_gap_during_ms": round(1e3 * max(during), 2),
        "longest_gap_otherwise_ms": round(1e3 * max(others), 2),
    }


def talk(engine: Engine, rows: int) -> list[list[tuple[float, float]]]:
    """The gaps of so many replies at once."""
    streams, heard = begin(engine, rows)
    for stream in streams:
        stream.result()
    return [gaps_of(at) for at in heard]


def begin(engine: Engine, rows: int) -> tuple[list[Stream], list[list[float]]]:
    """So many replies by versions 1 and 2 in turns, and when their tokens come."""
    heard: list[list[float]] = [[] for _ in range(rows)]
    streams = []
    for row, at in enumerate(heard):

        def hear(_: Event, at: list[float] = at) -> None:
            at.append(time.perf_counter())

        ids = tuple(5 + (7 * row + i) % 200 for i in range(PROMPT))
        sampling = Sampling(temperature=0, max_tokens=NEW, ignore_eos=True)
        streams.append(engine.submit(Request(ids, sampling, 1 + row % 2), hear))
    return streams, heard


def gaps_of(at: list[float]) -> list[tuple[float, float]]:
    """When each token came, and how long after the one before; without the last event, which is no token."""
    return [(after, after - before) for before, after in pairwise(at[:-1])]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
