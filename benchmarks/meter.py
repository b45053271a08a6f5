"""What a learner of the benchmark took: seconds by phase and memory. Standard library alone: peers' environments have no more."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Meter:
    """Made right after the imports, so that what they alone take is known."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.imports_mb = peak_mb()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def write(self, path: Path, found: Json) -> None:
        """What was found, with seconds and memory, as JSON."""
        memory = {"imports_mb": self.imports_mb, "peak_mb": peak_mb()}
        path.write_text(json.dumps(found | {"seconds": self.seconds} | memory), "utf-8")


def peak_mb() -> float:
    """The most memory that this process ever held (VmHWM), in megabytes."""
    [line] = [line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
