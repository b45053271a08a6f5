"""The rooms, and the one direction in which they import each other: feedback ← serving ← learner ← deploy."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("feedback", "serving", "learner", "deploy")
FOLDERS = {*ROOMS, "tests", "benchmarks", "docs", ".ci"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "core", "manager", "misc"}
WEB = {"fastapi", "starlette", "uvicorn", "kafka", "redis", "prometheus_client"}
SERVERS_OWN = {"app", "ids", "keys", "metrics", "process", "routes", "schemas", "static", "swap"}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".html", ".js", ".css"}
MACHINE_PATH = re.compile(r"""(?:^|[\s"'`(=])/(?:home|root|Users|work)/""", re.MULTILINE)


def project_files() -> list[Path]:
    """Every file git tracks or would track, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return [Path(name) for name in listing.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def modules(*rooms: str) -> list[Path]:
    """The Python files of these rooms; without a room, of the whole project."""
    return [path for path in project_files() if path.suffix == ".py" and (not rooms or path.parts[0] in rooms)]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, at the top or inside a function; relative ones made absolute."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(path.parts[: len(path.parts) - node.level]) if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_there_are_no_other_rooms():
    assert {path.parts[0] for path in project_files() if len(path.parts) > 1} <= FOLDERS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str):
    later = {*ROOMS[ROOMS.index(room) + 1 :], "tests", "benchmarks"}
    assert not [
        f"{path} imports {name}" for path in modules(room) for name in imports(path) if name.split(".")[0] in later
    ]


def test_the_learner_uses_the_engine_and_not_the_web_server():
    used = {name.split(".")[1] for path in modules("learner") for name in imports(path) if name.startswith("serving.")}
    assert not used & SERVERS_OWN


def test_ppo_imports_only_torch():
    outside = {name.split(".")[0] for name in imports(Path("learner/ppo.py"))} - set(sys.stdlib_module_names)
    assert outside == {"torch"}


def test_package_files_hold_a_docstring_and_import_nothing():
    packages = [path for path in modules(*ROOMS) if path.name == "__init__.py"]
    assert {path.parts[0] for path in packages} == set(ROOMS)
    for path in packages:
        [only] = ast.parse(read(path)).body
        assert isinstance(only, ast.Expr), f"{path} holds something else than a docstring"


def test_every_module_says_what_it_is():
    assert not [str(path) for path in modules() if not ast.get_docstring(ast.parse(read(path)))]


def test_no_file_has_a_name_that_says_nothing():
    names = {path: {part.lower() for part in path.with_suffix("").parts} for path in project_files()}
    assert not [str(path) for path, parts in names.items() if parts & FORBIDDEN_NAMES]


def test_no_file_knows_the_machine_it_was_written_on():
    assert not [str(path) for path in project_files() if path.suffix in TEXT and MACHINE_PATH.search(read(path))]


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("learner.ppo", WEB | {"pydantic", "transformers", "peft", "serving", "feedback"}),
        ("learner.reward", WEB),
        ("serving.engine", WEB),
        ("serving.lora", WEB),
        ("feedback.raters", WEB | {"torch", "pydantic"}),
        ("deploy.cli", {"torch", "transformers", "peft", "fastapi", "uvicorn", "kafka", "redis"}),
    ],
)
def test_a_module_loads_only_what_it_needs(module: str, never: set[str]):
    program = f"import {module}, json, sys; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) & never


def test_the_environment_is_read_at_the_door_only():
    """Settings are built in deploy/door.py and handed down; `heed up` hands the environment on to its children."""
    readers = {
        str(path)
        for path in modules(*ROOMS)
        for node in ast.walk(ast.parse(read(path)))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}
    }
    assert readers <= {"deploy/cli.py", "deploy/door.py"}
