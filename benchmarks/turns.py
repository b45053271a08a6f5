"""What the prefix cache is worth: the first token of a conversation's second turn, and what a swap changes.

A conversation of 1,000 tokens is told to a fresh server, and gone on with. Then another version is promoted: the same
prompt must give the very reply that a server gives which never knew another version.

    python -m benchmarks.turns [--shape M] [--conversations 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.servers import CACHE, Heed, Json
from benchmarks.shapes import SHAPES, make, prompt
from benchmarks.swaps import promote

TOKENS, NEW, MORE = 1000, 32, 16


class Long(Heed):
    def environment(self) -> dict[str, str]:
        return super().environment() | {"HEED_MAX_MODEL_LEN": "2048", "HEED_MAX_ROWS": "4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="M")
    parser.add_argument("--conversations", type=int, default=5)
    given = parser.parse_args()
    model = make(SHAPES[given.shape], CACHE / "models")
    tokenizer = AutoTokenizer.from_pretrained(model)
    first: list[float] = []
    second: list[float] = []
    with tempfile.TemporaryDirectory(prefix="heed-turns-") as work:
        server = Long(model, Path(work) / "warm")
        server.start()
        try:
            promote(server.port, 1)
            told = [{"role": "user", "content": "a"}]
            say(server, told, "default")
            for seed in range(given.conversations):
                told = [{"role": "user", "content": prompt(tokenizer, TOKENS, seed).text}]
                text, seconds, _ = say(server, told, "default")
                first.append(seconds)
                more = prompt(tokenizer, MORE + 5, seed).text
                told += [{"role": "assistant", "content": text}, {"role": "user", "content": more}]
                _, seconds, _ = say(server, told, "default")
                second.append(seconds)
            promote(server.port, 2)
            until = time.monotonic() + 60
            while say(server, told[:1], "default")[2] != "default@v2" and time.monotonic() < until:
                time.sleep(0.1)
            after, swapped, spoke = say(server, told, "default")
        finally:
            server.stop()
        cold = Long(model, Path(work) / "cold")
        cold.start()
        try:
            alone, _, _ = say(cold, told, "default@v2")
        finally:
            cold.stop()
    print(json.dumps({
        "shape": given.shape,
        "first_turn_ms": [round(1000 * s, 1) for s in first],
        "second_turn_ms": [round(1000 * s, 1) for s in second],
        "ratio_of_medians": statistics.median(second) / statistics.median(first),
        "after_swap_ms": round(1000 * swapped, 1),
        "after_swap_as_a_cold_server": after == alone and spoke == "default@v2",
    }, indent=1))  # fmt: skip


def say(server: Heed, messages: list[Json], model: str) -> tuple[str, float, str]:
    """The reply, the seconds to its first text, and the version that spoke."""
    body = {"model": model, "messages": messages, "max_tokens": NEW, "temperature": 0, "stream": True, "seed": 1}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions",
        data=json.dumps(body | {"heed": {"ignore_eos": True}}).encode(),
        headers={"content-type": "application/json"},
    )
    begin, first, text, spoke = time.perf_counter(), 0.0, "", ""
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                said = json.loads(line[6:])
                spoke = said["model"]
                for choice in said["choices"]:
                    text += choice["delta"].get("content") or ""
            if text and not first:
                first = time.perf_counter() - begin
    return text, first, spoke


if __name__ == "__main__":
    main()
