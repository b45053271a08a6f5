"""What the documents say is so: commands, routes, settings, files and versions exist as they are written.

`python tests/test_docs.py` writes the README's table of settings again.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

from deploy.cli import app
from feedback.config import reference
from feedback.events import KINDS, SIGNALS
from learner.config import LearnerConfig
from serving.keys import Keys
from serving.routes import admin, chat, feedback, operations, policy

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MARKS = re.compile(r"(<!-- settings: [^\n]* -->\n).*(<!-- /settings -->)", re.DOTALL)
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""sha256 of https://www.apache.org/licenses/LICENSE-2.0.txt"""


def blocks(language: str = "") -> list[str]:
    """Fenced blocks of the README in this language; without one, those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def commands(name: str) -> list[list[str]]:
    """Every call of a command in the README, in blocks and in sentences, as words after its name."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE))
    split = [
        shlex.split(line, comments=True) for line in [*lines, *inline] if "'" not in line or line.count("'") % 2 == 0
    ]
    return [words[1:] for words in split if words and Path(words[0]).name == name]


def settings_table() -> str:
    rows = ["| setting | default | may be | what it is |", "|---|---|---|---|"]
    for doc in reference(LearnerConfig):
        cells = (f"`{doc.name}`", doc.default, doc.allowed, doc.description)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def test_the_table_of_settings_is_complete_and_true():
    found = MARKS.search(README)
    assert found, "the README has lost the marks around its table of settings"
    table = found[0].partition("\n")[2].removesuffix(found[2])
    assert table == settings_table(), "write it again: python tests/test_docs.py"


def test_heed_commands_of_the_readme_exist_with_their_flags():
    called = commands("heed")
    assert len(called) >= 5
    for words in called:
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        assert not (hasattr(command, "commands") and words and not words[0].startswith("-")), f"no command {words}"
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, words


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    called = {words[0] for words in commands("make")}
    assert {"up", "test"} <= called <= targets
    assert {"up", "test", "lint", "bench", "soak"} <= targets


def test_routes_of_the_readme_exist():
    routers = (chat.router, feedback.router, policy.router, operations.router, admin.router)
    routes = {route.path for router in routers for route in router.routes} | {feedback.GIVE}
    named = set(re.findall(r"127\.0\.0\.1:8000(/[\w./…-]*)", README)) - {"/v1"}
    assert len(named) >= 4
    for path in named:
        pattern = path.replace("fb-…", "{feedback_id}")
        assert pattern in routes, path


def test_the_command_that_makes_a_key_makes_one_that_is_known(tmp_path: Path):
    [block] = [text for text in blocks("sh") if "openssl" in text]
    making, _, starting = block.partition("\n\n")
    made = subprocess.run(["bash", "-ec", making], cwd=tmp_path, capture_output=True, text=True, check=True)
    key = made.stdout.strip().removeprefix("the key: ")
    assert len(key) == 48
    [setting] = re.findall(r"HEED_API_KEYS_FILE=(\S+) ", starting)
    known = Keys(tmp_path / setting).holder(f"Bearer {key}")
    assert (known.name, known.quota) == ("web", 600)


def test_every_kind_of_feedback_is_explained():
    assert re.findall(r"^\| `(\w+)` \|", README.partition("## Settings")[0], re.MULTILINE) == list(KINDS)
    assert all(f"`{signal}`" in README for signal in SIGNALS)


def test_the_tree_of_rooms_names_files_that_exist():
    [tree] = [block for block in blocks() if block.startswith("feedback/")]
    room = ""
    for line in tree.splitlines():
        names = [name for name in re.split(r",? +", line.strip().split("   ")[0]) if name]
        if not line.startswith(" "):
            room = names[0]
            assert (ROOT / room).is_dir(), room
            continue
        for name in names:
            assert (ROOT / room / name).exists(), f"{room}{name}"


def test_one_version_of_torch_is_meant_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [torch] = [requirement for requirement in project["dependencies"] if requirement.startswith("torch")]
    assert f"TORCH := {torch}\n" in (ROOT / "Makefile").read_text("utf-8")
    assert f'"{torch}"' in (ROOT / "Dockerfile").read_text("utf-8")


def test_the_licence_is_the_apache_licence_word_for_word():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_the_changelog_has_a_place_for_what_is_new():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_continuous_integration_runs_the_tests_as_the_readme_does():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert re.search(r"\bmake test$", script.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("target", ["up", "test", "lint"])
def test_make_knows_what_it_would_do(target: str):
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def write() -> None:
    table = settings_table()
    (ROOT / "README.md").write_text(MARKS.sub(lambda found: found[1] + table + found[2], README), "utf-8")


if __name__ == "__main__":
    sys.exit(write())
