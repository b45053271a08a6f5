"""The `heed` command as its users meet it: help, settings, faults in one line, adapters by hand, and checks."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.door import EXPECTED, exit_code_of, settings
from deploy.versions import base_of, number, store_of
from feedback.config import SettingError
from learner.config import LearnerConfig
from serving.adapters import AdapterStore, BadAdapter, Base
from serving.exits import Exit
from serving.lora import AdapterWeights
from tests.commands import Done, Heed
from tests.served import Served

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("up", "serve", "learn", "chat", "simulate", "adapters", "feedback", "bench", "pretrain", "check", "backup")
ADAPTERS = ("list", "show", "promote", "rollback", "verify", "import")
FEEDBACK = ("import", "export", "why")


def process(*arguments: str | Path, cwd: Path, **variables: str) -> Done:
    """Runs the command as a process of its own, as a shell would."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HEED_")}
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *map(str, arguments)],
        cwd=cwd,
        env={**environ, "COLUMNS": "160", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers that knows 32 words, as a model directory."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture
def base(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    monkeypatch.chdir(tmp_path)
    return base_of(settings(model=str(tiny)))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "heed-data" / "adapters", "default")


def weights(base: Base, seed: int = 0) -> AdapterWeights:
    draw = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        rank=2,
        scaling=1.0,
        tensors={
            path: (torch.randn(2, inputs, generator=draw) * 0.1, torch.randn(outputs, 2, generator=draw) * 0.1)
            for path, (inputs, outputs) in base.targets.items()
        },
    )


# help


def test_help_names_every_command_and_comes_at_once(tmp_path: Path):
    process("--help", cwd=tmp_path)  # once, so that bytecode is there
    started = time.monotonic()
    done = process("--help", cwd=tmp_path)
    assert time.monotonic() - started < 3.0  # 0.4 s on an idle machine; torch alone would take longer than this
    assert done.code == 0
    assert all(f"│ {command} " in done.out for command in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [
        *((name,) for name in COMMANDS),
        *(("adapters", name) for name in ADAPTERS),
        *(("feedback", name) for name in FEEDBACK),
        ("bench", "learn"),
    ],
)
def test_every_command_explains_itself(command: tuple[str, ...], heed: Heed):
    done = heed(*command, "--help")
    assert done.code == 0
    assert f"heed {' '.join(command)}".replace("heed ", "", 1) in done.out


# completion


def offered(words: str, *, shell: str = "bash", cwd: Path, **variables: str) -> list[str]:
    """What a shell is offered for the last of the words. It must come without torch, and say nothing else."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_TYPER_COMPLETE_ARGS": words}
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_WORD_TO_COMPLETE": words.rpartition(" ")[2]}
    script = "import sys; sys.argv = ['heed']\nfrom deploy.cli import main\ntry:\n    main()\nfinally:\n"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HEED_")}
    done = subprocess.run(
        [sys.executable, "-c", script + "    assert 'torch' not in sys.modules"],
        cwd=cwd,
        env={**environ, "PYTHONPATH": str(ROOT), "_HEED_COMPLETE": f"complete_{shell}", **asked, **fish, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_is_offered_verbs_flags_and_values(base: Base, store: AdapterStore, tmp_path: Path):
    store.publish(weights(base), parent=0, base=base)
    elsewhere = AdapterStore(tmp_path / "elsewhere" / "adapters", "default")
    elsewhere.publish(weights(base), parent=0, base=base)
    elsewhere.publish(weights(base), parent=0, base=base)
    assert offered("heed ad", cwd=tmp_path) == ["adapters"]
    assert offered("heed adapters promote v", cwd=tmp_path) == ["v1", "v0"]
    assert offered("heed adapters promote --data elsewhere v", cwd=tmp_path) == ["v2", "v1", "v0"]
    assert offered("heed simulate --rater emoji+sh", cwd=tmp_path) == ["emoji+short"]
    assert offered("heed simulate --kinds thumb,r", cwd=tmp_path) == ["thumb,rating"]
    assert offered("heed adapters show v", cwd=tmp_path, HEED_PORT="many") == []  # no traceback in a command line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_every_shell_can_complete(shell: str, tmp_path: Path):
    assert any("reinforce" in word for word in offered("heed bench learn --objective rei", shell=shell, cwd=tmp_path))


def test_version(heed: Heed):
    assert heed("--version").out.startswith("heed 0.")


# settings


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("HEED_")]:
        monkeypatch.delenv(name)
    assert settings().serving.port == 8000
    (tmp_path / "heed.toml").write_text("port = 8001\n")
    assert settings().serving.port == 8001
    monkeypatch.setenv("HEED_PORT", "8002")
    assert settings().serving.port == 8002
    assert settings(port=8003).serving.port == 8003
    assert settings(port=None).serving.port == 8002


@pytest.mark.parametrize(
    "command", ["up", "serve", "learn", "check", "simulate", "chat", pytest.param("adapters list", id="adapters")]
)
def test_a_wrong_setting_is_refused_at_the_start_by_name(command: str, heed: Heed, tmp_path: Path):
    done = heed(*command.split(), HEED_PORT="many")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "HEED_PORT=many: must be a whole number from 0 to 65535" in done.err
    assert not (tmp_path / "heed-data").exists()


@pytest.mark.parametrize("flag", ["--port=99999", "--port=many"])
def test_a_wrong_flag_is_refused_by_name(flag: str, heed: Heed):
    done = heed("serve", flag)
    assert done.code == 2
    assert "--port" in done.err


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest_name(heed: Heed, tmp_path: Path):
    (tmp_path / "heed.toml").write_text("prot = 8001\n")
    done = heed("adapters", "list")
    assert done.code == 2
    assert done.err.strip() == "heed: heed.toml: prot: is not a setting of Heed; did you mean port?"


def test_an_unknown_variable_is_a_warning_with_the_nearest_name(heed: Heed):
    done = heed("adapters", "list", HEED_PROT="8001")
    assert done.code == 0
    assert done.err.strip() == "heed: HEED_PROT is not a setting of Heed and is ignored; did you mean HEED_PORT?"


@pytest.mark.parametrize("variable", ["HEED_CANARY_SHARE"])
def test_a_setting_whose_feature_is_not_built_is_refused(variable: str, heed: Heed):
    done = heed("serve", **{variable: "somewhere"})
    assert done.code == 2
    assert variable in done.err
    assert "not built yet" in done.err


# faults


def test_expected_faults_are_classes_that_exist():
    for name in EXPECTED:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception), name


def test_an_expected_fault_has_an_exit_code_and_a_defect_has_none():
    class Special(SettingError):
        pass

    assert exit_code_of(SettingError("HEED_PORT", "x", "a number")) == 2
    assert exit_code_of(Special("HEED_PORT", "x", "a number")) == 2
    assert exit_code_of(ZeroDivisionError()) is None


@pytest.mark.parametrize("command", ["serve", "learn", "up"])
def test_a_missing_model_is_one_line(command: str, tmp_path: Path):
    ports = {"HEED_PORT": "0", "HEED_LEARNER_METRICS_PORT": "0"}
    done = process(command, "--model", tmp_path / "nowhere", cwd=tmp_path, **ports)
    assert done.code == Exit.MODEL
    assert "Traceback" not in done.err + done.out
    assert "nowhere" in done.err + done.out


def test_a_taken_port_is_one_line_and_ends_heed_up(tmp_path: Path, tiny: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = process("up", "--model", tiny, cwd=tmp_path, HEED_PORT=port, HEED_LEARNER_METRICS_PORT="0")
    assert done.code == Exit.PORT
    told = [line for line in done.out.splitlines() if line.startswith(" server |")]
    assert len(told) == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in told[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simulate", "--url", "http://127.0.0.1:9"), "cannot be reached"),
        (("chat", "--url", "http://127.0.0.1:9"), "cannot be reached"),
        (("simulate", "--rater", "?"), "known are short, long"),
        (("adapters", "show", "v7"), "v7: no such version"),
        (("adapters", "show", "latest"), "'latest' is no version: write it as v3 or 3"),
        (("adapters", "promote", "v7"), "v7: no such version"),
        (("adapters", "rollback"), "nothing to roll back to"),
        (("pretrain", "--out", "model", "--corpus", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_a_fault_is_one_line_on_standard_error(arguments: tuple[str, ...], words: str, heed: Heed, tiny: Path):
    done = heed(*arguments, HEED_MODEL=str(tiny))
    assert done.code == 1
    assert words in done.err
    assert done.err.splitlines()[-1].startswith("heed: ")
    assert "Traceback" not in done.err


def test_who_has_no_login_name_is_asked_for_one(heed: Heed, monkeypatch: pytest.MonkeyPatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as in a container that runs as a number
    done = heed("chat", "--url", "http://127.0.0.1:9")
    assert (done.code, done.err) == (1, "heed: your user has no login name here: say who you are with --user.\n")


# adapters


@pytest.mark.parametrize(("text", "version"), [("3", 3), ("v3", 3), ("default@v12", 12), ("v0", 0)])
def test_a_version_may_be_written_in_every_way_in_which_it_is_shown(text: str, version: int):
    assert number(text) == version


@pytest.mark.parametrize("text", ["", "v", "three", "v-1", "3.5"])
def test_what_is_no_version_is_refused(text: str):
    with pytest.raises(BadAdapter):
        number(text)


def test_adapters_are_listed_shown_promoted_and_rolled_back_without_a_server(
    base: Base, store: AdapterStore, heed: Heed, tiny: Path
):
    def run(*arguments: str) -> str:
        done = heed("adapters", *arguments, HEED_MODEL=str(tiny))
        assert done.code == 0, done.err
        return done.out

    assert "No versions yet" in run("list")
    assert store.publish(weights(base), parent=0, base=base, feedback={"count": 120}, gate={"passed": True}) == 1
    assert store.publish(weights(base, 1), parent=1, base=base, gate={"passed": False}) == 2
    assert run("promote", "v1").strip() == "default serves v1 (before: v0)"
    assert run("promote", "2", "--reason", "a friend asked").strip() == "default serves v2 (before: v1)"

    listed = json.loads(run("list", "--json"))
    assert listed["current"] == "v2"
    assert [row["version"] for row in listed["versions"]] == ["v1", "v2"]
    assert listed["versions"][0] | {"created": 0} == {
        "version": "v1",
        "roles": ["last good", "approved"],
        "parent": "v0",
        "created": 0,
        "feedback": 120,
        "gate": True,
        "imported_from": None,
    }
    table = run("list")
    assert "serves v2" in table
    assert "passed" in table
    assert "refused" in table

    shown = json.loads(run("show", "v2"))
    assert shown["parent"] == 1
    assert shown["roles"] == ["current", "approved"]
    assert shown["changes"][0]["reason"] == "a friend asked"
    assert shown["changes"][0]["by"] == "operator"

    assert run("rollback").strip() == "default serves v1 (before: v2)"
    assert run("promote", "v1").strip() == "default serves v1 already"
    assert json.loads(run("promote", "v0", "--json")) == {"current": "v0", "before": "v1", "generation": 4}
    assert store.release().current == 0


def test_a_running_server_follows_what_is_promoted_and_rolled_back_by_hand(
    serve_with: Callable[..., Served], heed: Heed, model_folder: Path, tmp_path: Path
):
    server = serve_with(data=tmp_path / "heed-data")
    server.publish(promote=False)
    assert heed("adapters", "promote", "v1", HEED_MODEL=str(model_folder)).code == 0
    server.until(lambda: server.chat().json()["model"] == "default@v1")
    assert heed("adapters", "rollback").code == 0
    server.until(lambda: server.chat().json()["model"] == "default@v0")


def test_a_version_that_does_not_fit_is_neither_verified_nor_promoted(
    base: Base, store: AdapterStore, heed: Heed, tiny: Path
):
    store.publish(weights(base), parent=0, base=base)
    store.publish(weights(base, 1), parent=0, base=base)
    (store.folder / "v000002" / "adapter_model.safetensors").write_bytes(b"torn")
    good = heed("adapters", "verify", "v1", HEED_MODEL=str(tiny))
    assert (good.code, good.out.strip()) == (0, "v1: whole, and fits the base")
    both = heed("adapters", "verify", "--json", HEED_MODEL=str(tiny))
    assert both.code == 1
    assert json.loads(both.out)["v1"] == ""
    assert "digest" in json.loads(both.out)["v2"]
    promoted = heed("adapters", "promote", "v2", HEED_MODEL=str(tiny))
    assert promoted.code == 1
    assert store.release().current == 0


def test_an_adapter_from_elsewhere_becomes_the_next_version_and_is_served_to_nobody(
    base: Base, store: AdapterStore, heed: Heed, tiny: Path, tmp_path: Path
):
    elsewhere = AdapterStore(tmp_path / "elsewhere", "other")
    elsewhere.publish(weights(base), parent=0, base=base)
    folder = elsewhere.folder / "v000001"
    done = heed("adapters", "import", folder, HEED_MODEL=str(tiny))
    assert done.code == 0, done.err
    assert done.out.strip() == "imported as v1; to serve it: heed adapters promote v1"
    assert store.manifest(1).imported_from == str(folder)
    assert store.release().current == 0
    assert store.release().approved == ()

    wrong = heed("adapters", "import", tmp_path / "nothing-here", HEED_MODEL=str(tiny))
    assert wrong.code == 1
    assert "nothing-here" in wrong.err


def test_the_store_of_the_settings_is_where_they_say(tmp_path: Path):
    config = LearnerConfig.model_validate({"serving": {"adapters": tmp_path / "shared"}})
    assert store_of(config).folder == tmp_path / "shared" / "default"
