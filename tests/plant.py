"""Plants each fault of faults.toml alone in a copy of the code: the tests named with it must fail, and pass without it.

python -m tests.plant [PART OF A NAME …]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("feedback", "serving", "learner", "deploy", "tests")


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to be wrong: `planted` in the place of what stands in `file`."""

    name: str
    file: str
    stands: str
    planted: str
    tests: tuple[str, ...]


def faults() -> list[Fault]:
    listed = tomllib.loads((ROOT / "tests" / "faults.toml").read_text("utf-8"))["fault"]
    return [Fault(f["name"], f["file"], f["is"], f["planted"], tuple(f["tests"])) for f in listed]


def main(parts: Sequence[str]) -> int:
    chosen = [fault for fault in faults() if not parts or any(part in fault.name for part in parts)]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="heed-faults-") as folder:
        copy = Path(folder)
        for room in ROOMS:
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            assert failing(copy, tests) is None, f"{tests} fail without a fault"
        for fault in chosen:
            path = copy / fault.file
            text = path.read_text("utf-8")
            path.write_text(text.replace(fault.stands, fault.planted), "utf-8")
            caught = failing(copy, fault.tests)
            path.write_text(text, "utf-8")
            missed += caught is None
            print(f"{'caught' if caught else 'MISSED'}  {fault.name}: {caught or 'no test fails'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed or not chosen else 0


def failing(copy: Path, tests: Sequence[str]) -> str | None:
    """The first of these tests that fails in the copy; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-rfE", *tests]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    told = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert told, done.stdout + done.stderr
    return told[0].split(" - ")[0].partition("::")[2] or told[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
