"""How fast Heed serves two adapter versions side by side, beside other servers, in the same run on the same cores.

Random-weight models in two shapes; prompts of 64 tokens, 64 new ones, greedy, end-of-sequence ignored, streamed over
HTTP to a client on the same cores. Every server is started once and stopped (SIGSTOP) while another is measured; the
runs are interleaved, and the table shows medians. Each run is a line of results/serving.jsonl.

    python -m benchmarks.serving                               everything
    python -m benchmarks.serving --shape S --server heed       one of them
    python -m benchmarks.serving --table                       the table of what is there
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks import limits
from benchmarks.load import Answer, quantile
from benchmarks.peers import PEERS
from benchmarks.servers import CACHE, Heed, NotHere, Server
from benchmarks.shapes import SHAPES, Shape, make, prompt

HERE = Path(__file__).resolve().parent
PROMPT, NEW = 64, 64
AT_ONCE = (1, 8, 32)
RUNS = 5
RUN_S = 4.0
"""A run has as many rounds as fit this time, at least one."""

Json = dict[str, Any]


class HeedBare(Heed):
    """Heed, asked for the base alone: what the adapters cost."""

    name = "heed, no adapter"
    adapters = False


SERVERS: list[type[Server]] = [Heed, HeedBare, *PEERS]


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped on the way out
    if not given.table:
        wanted = [server for server in SERVERS if not given.server or server.name in given.server]
        for name in given.shape or SHAPES:
            measure(SHAPES[name], wanted, given)
    print(table(read(given.results)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be repeated")
    parser.add_argument("--server", action="append", choices=[s.name for s in SERVERS], help="may be repeated")
    parser.add_argument("--at-once", action="append", type=int, help="talkers; may be repeated")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "serving.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    return parser.parse_args()


def measure(shape: Shape, wanted: Sequence[type[Server]], given: argparse.Namespace) -> None:
    """All runs of one shape; each becomes a line of the results."""
    folder = make(shape, CACHE / "models")
    batch = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}"
    with tempfile.TemporaryDirectory(prefix="heed-serving-") as work, ExitStack() as started:
        there = [server for kind in wanted if (server := _started(kind, folder, Path(work), started)) is not None]
        machine = limits.measure()
        rounds: dict[tuple[str, int], int] = {}
        for run in range(given.runs + 1):  # the first is not counted: it warms up, and says how long a round takes
            for at_once in given.at_once or AT_ONCE:
                for server, version in there:
                    key = server.name, at_once
                    many = rounds.get(key, 1)
                    with _awake(server):
                        row = one_run(server, shape, at_once, many, run)
                    rounds[key] = max(1, round(RUN_S * many / row["seconds"]))
                    if run:
                        limit = limits.tokens_a_second(machine, shape, at_once, PROMPT, NEW)
                        row = {"batch": batch, "run": run, "version": version, **row, "limit": limit, **machine}
                        keep(given.results, row)
                        print(
                            f"{shape.name} C={at_once} {server.name}: {row['tokens_a_second']:.0f} tok/s",
                            file=sys.stderr,
                        )


def _started(kind: type[Server], folder: Path, work: Path, started: ExitStack) -> tuple[Server, str] | None:
    """The server, running and paused; None if it is not to be had here."""
    server = kind(folder, work / kind.name.replace(" ", "-"))
    print(f"{kind.name}: installing and starting ...", file=sys.stderr)
    try:
        version = server.install()
        server.start()
    except NotHere as error:
        print(f"{kind.name} is left out: {error}", file=sys.stderr)
        return None
    started.callback(server.stop)
    server.pause()
    return server, version


@contextmanager
def _awake(server: Server) -> Iterator[None]:
    server.go_on()
    try:
        yield
    finally:
        server.pause()


def one_run(server: Server, shape: Shape, at_once: int, rounds: int, run: int) -> Json:
    """So many rounds of requests, adapters taking turns where the server has them."""
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    bodies = []
    for i in range(rounds * at_once):
        asked = prompt(tokenizer, PROMPT, seed=1_000_000 * run + i)
        bodies.append(server.body(asked, NEW, i % 2 if server.adapters else None))
    answers, seconds = server.talk(bodies, at_once)
    tokens = sum(server.count(answer) for answer in answers)
    if tokens != len(answers) * NEW:
        raise RuntimeError(f"{server.name}: {tokens} tokens came, {len(answers) * NEW} were asked for")
    return {
        "server": server.name,
        "shape": shape.name,
        "at_once": at_once,
        "requests": len(answers),
        "seconds": seconds,
        "tokens_a_second": tokens / seconds,
        **_latencies(answers),
    }


def _latencies(answers: Sequence[Answer]) -> Json:
    first = [answer.first_token for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        f"{name}_p{share}": quantile(values, share / 100) if values else math.nan
        for name, values in (("first_token", first), ("inter_token", gaps))
        for share in (50, 99)
    }


def keep(path: Path, row: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Json]:
    """The rows of the newest run of each shape."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    newest = {row["shape"]: row["batch"] for row in rows}
    return [row for row in rows if row["batch"] == newest[row["shape"]]]


def table(rows: Sequence[Json]) -> str:
    """Medians by cell, as Markdown, each beside the best peer with adapters and the physical limit."""
    lines = [
        "| shape | talkers | server | tokens/s | ÷ best peer with adapters | of the limit "
        "| first token p50 / p99 | between tokens p50 / p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, at_once in dict.fromkeys((row["shape"], row["at_once"]) for row in rows):
        cell = [row for row in rows if (row["shape"], row["at_once"]) == (shape, at_once)]
        rate = {name: _median(cell, name, "tokens_a_second") for name in dict.fromkeys(row["server"] for row in cell)}
        peers = [rate[kind.name] for kind in PEERS if kind.adapters and kind.name in rate]
        for name, tokens in rate.items():
            ratio = f"{tokens / max(peers):.2f}" if peers else "–"
            of_limit = f"{tokens / _median(cell, name, 'limit'):.0%}"
            first = _pair(cell, name, "first_token")
            between = _pair(cell, name, "inter_token")
            lines.append(
                f"| {shape} | {at_once} | {name} | {tokens:.0f} | {ratio} | {of_limit} | {first} | {between} |"
            )
    return "\n".join(lines)


def _median(cell: Sequence[Json], server: str, column: str) -> float:
    return statistics.median(row[column] for row in cell if row["server"] == server)


def _pair(cell: Sequence[Json], server: str, column: str) -> str:
    p50, p99 = (_median(cell, server, f"{column}_{share}") * 1000 for share in ("p50", "p99"))
    return "–" if math.isnan(p50) else f"{p50:.1f} / {p99:.1f} ms"


if __name__ == "__main__":
    main()
