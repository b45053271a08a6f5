"""What README and docs/ tell people to do can be done: commands parse, requests are answered, files and versions exist.

`python tests/test_docs.py` writes the tables of settings, metrics and commands again (docs/settings.md, metrics.md, cli.md).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from feedback.events import KINDS, SIGNALS
from serving.keys import Keys
from tests import reference
from tests.documents import EVERYTHING, PAGES, README, ROOT, blocks, in_blocks, in_sentences
from tests.served import Served

CHAT = PAGES["docs/chat.md"]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""sha256 of https://www.apache.org/licenses/LICENSE-2.0.txt"""


@pytest.mark.parametrize("page", PAGES)
def test_heed_commands_parse(page: str):
    for words in in_blocks(PAGES[page], "heed"):
        command, rest = reference.verb(words)
        command.make_context("heed", rest)  # raises for an unknown flag, a wrong value, and what is missing
    for words in in_sentences(PAGES[page], "heed"):
        command, rest = reference.verb(words)
        assert {word for word in rest if word.startswith("-")} <= reference.flags(command) | {"--help"}, words


def test_the_readme_shows_how_to_begin():
    assert {"simulate", "adapters", "check"} <= {words[0] for words in in_blocks(README, "heed")}
    assert {"up", "test"} <= {words[0] for words in in_blocks(README, "make")}


def test_links_of_the_readme_lead_somewhere():
    """Those of docs/ are looked at when the site is built (test_site.py)."""
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", README):
        page = (ROOT / path).read_text("utf-8")
        heads = [re.sub(r"[^\w\s-]", "", head).strip() for head in re.findall(r"^#+ (.+)$", page, re.MULTILINE)]
        assert not anchor or anchor in [re.sub(r"\s+", "-", head.lower()) for head in heads], (path, anchor)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    called = {words[0] for words in [*in_blocks(EVERYTHING, "make"), *in_sentences(EVERYTHING, "make")]}
    assert called <= targets
    assert {"up", "test", "lint", "docs", "bench", "soak"} <= targets


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if in_blocks(text, "curl")])
def test_requests_in_curl_s_words_are_answered(page: str, server: Served):
    words = argparse.ArgumentParser()
    words.add_argument("-s", action="store_true")
    for flag, name in (("-X", "method"), ("-H", "header"), ("-d", "body")):
        words.add_argument(flag, dest=name)
    words.add_argument("url")
    reply = server.chat().json()["id"]
    thumb = {"kind": "thumb", "reply_id": reply, "value": "up"}
    receipt = server.http.post("/v1/feedback", json=thumb).json()["id"]
    for call in in_blocks(PAGES[page], "curl"):
        asked = words.parse_args([word.replace("chatcmpl-…", reply).replace("fb-…", receipt) for word in call])
        path = asked.url.removeprefix("http://127.0.0.1:8000")
        headers = dict([asked.header.split(": ")] if asked.header else [])
        method = asked.method or ("POST" if asked.body else "GET")
        answer = server.http.request(method, path, content=asked.body, headers=headers)
        assert answer.is_success, (shlex.join(call), answer.text)


def test_the_command_that_makes_a_key_makes_one_that_is_known(tmp_path: Path):
    [block] = [text for text in blocks(CHAT, "sh") if "openssl" in text]
    making, _, starting = block.partition("\n\n")
    made = subprocess.run(["bash", "-ec", making], cwd=tmp_path, capture_output=True, text=True, check=True)
    key = made.stdout.strip().removeprefix("the key: ")
    assert len(key) == 48
    [setting] = re.findall(r"HEED_API_KEYS_FILE=(\S+) ", starting)
    known = Keys(tmp_path / setting).holder(f"Bearer {key}")
    assert (known.name, known.quota) == ("web", 600)


def test_every_kind_of_feedback_is_explained():
    table = CHAT.partition("| kind | body")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(KINDS)
    assert all(f"`{signal}`" in table for signal in SIGNALS)


def test_the_tree_of_rooms_names_files_that_exist():
    [tree] = [block for block in blocks(README) if block.startswith("feedback/")]
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


@pytest.mark.parametrize("target", ["up", "test", "lint", "docs"])
def test_make_knows_what_it_would_do(target: str):
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    sys.exit(reference.write())
