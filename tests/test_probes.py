"""The operator's probes: the file is read with its faults named by line and key, and the gate asks them."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from deploy import check, check_settings
from deploy.finding import Seen
from feedback.config import FeedbackConfig, SettingError
from learner import probes, process
from learner.config import LearnerConfig
from learner.gate import GateReport
from learner.rollouts import Sampler
from learner.trainer import Trainer
from serving.config import ServingConfig
from serving.engine import Engine
from tests import bases

GOOD = r"""
[opening-hours]
prompt = "When do you open?"
must = ['\b(9|nine)\b', '(?i)morning']
must_not = '(?i)as an ai'
share = 0.5

["two turns"]
messages = [
  {role = "user", content = "Hello!"},
  {role = "assistant", content = "Hi."},
  {role = "user", content = "Swear!"},
]
must_not = "damn"
samples = 0
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "probes.toml"
    path.write_text(text, "utf-8")
    return path


def test_a_file_of_probes_is_read(tmp_path: Path) -> None:
    read = probes.read_probes(written(tmp_path, GOOD))
    assert list(read) == ["opening-hours", "two turns"]
    hours, turns = read.values()
    assert (hours.samples, hours.share, turns.samples, turns.share) == (4, 0.5, 0, 1.0)
    assert [(said.role, said.content) for said in hours.asked] == [("user", "When do you open?")]
    assert [said.role for said in turns.asked] == ["user", "assistant", "user"]
    assert probes.read_probes(None) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[a]\nprompt = "x"\n\n\nmust = "("\n', r"line 5: \[a\] must: '\(' is no regular expression: missing \)"),
        ('[a]\nprompt = "x"\nmust = []\n', r"line 3: \[a\] must: must be a regular expression, or a list"),
        (
            '[a]\nprompt = "x"\nmust = "y"\n[b]\nprompt = "x"\nmust_not = "y"\nsamples = -1\n',
            r"line 7: \[b\] samples: ",
        ),
        ('[a]\nprompt = "x"\nmust = "y"\nshare = 1.5\n', r"line 4: \[a\] share: "),
        ('[a]\nprompt = "x"\nmust = "y"\nmusst = "z"\n', r"line 4: \[a\] musst: "),
        ('[a]\nmust = "y"\n[b]\nprompt = "x"\nmust = "y"\n', r"line 1: \[a\] a probe has either prompt or messages"),
        ('# c\n["a b"] # d\nprompt = "x"\n', r"line 2: \[a b\] a probe has must, or must_not"),
        ('[a]\nmessages = [{role = "robot", content = "x"}]\nmust = "y"\n', r"line 2: \[a\] messages.0.role: "),
        ('[a]\nprompt = "x\n', r"cannot be read: .*line 2"),
        ('prompt = "x"\n', "prompt stands outside of all tables"),
        ("", "holds no probe"),
    ],
)
def test_what_is_wrong_in_the_file_is_told_by_line_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingError, match=says) as raised:
        probes.read_probes(path)
    assert str(raised.value).startswith(f"HEED_PROBES={path}: ")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read: No such file"):
        probes.read_probes(tmp_path / "none.toml")


def test_a_reply_complies_when_it_has_all_it_must_and_nothing_it_must_not(tmp_path: Path) -> None:
    probe = probes.read_probes(written(tmp_path, GOOD))["opening-hours"]
    assert probe.fault("At nine in the Morning.") is None
    assert probe.fault("At 9.") == "lacks /(?i)morning/ (must)"
    assert probe.fault("At 99 in the morning.") == r"lacks /\b(9|nine)\b/ (must)"
    assert probe.fault("As an AI, I say 9 in the morning.") == "has /(?i)as an ai/ (must_not)"


def test_a_no_names_the_probe_the_reply_and_the_pattern(tmp_path: Path) -> None:
    read = probes.read_probes(written(tmp_path, GOOD))
    good, bad = "nine in the morning", "We never open. " * 20
    kept = probes.judge(read, {"opening-hours": [good, bad], "two turns": ["no"]})
    assert (kept.name, kept.verdict, kept.value) == ("probes", "pass", 1.0)
    broken = probes.judge(read, {"opening-hours": [good, bad, bad], "two turns": ["no"]})
    assert (broken.verdict, broken.value, broken.bound) == ("fail", 0.5, 1.0)
    assert broken.sentence.startswith(
        'Probe "opening-hours": 1 of 3 replies comply, 50% must. '
        "Asked “When do you open?”, the candidate said “We never open. We never open."
    )
    assert broken.sentence.endswith(r"…”, which lacks /\b(9|nine)\b/ (must).")
    assert len(broken.sentence) < 300
    assert not GateReport.of([broken]).passed


def test_the_candidate_is_asked_once_at_its_likeliest_and_some_times_at_random(tmp_path: Path) -> None:
    text = '[a]\nprompt = "x"\nmust = "y"\nsamples = 3\n[b]\nprompt = "z"\nmust_not = "y"\nsamples = 0\n'
    read = probes.read_probes(written(tmp_path, text))
    model, chat = bases.llama(), bases.chat()
    sampler = Sampler(Engine(model, chat, rows=4, max_len=128, rank=4), 8)
    prompts, weights = probes.encode(read, chat, 100), bases.adapter(model)
    said: dict[str, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "judge", lambda _, replies: said.update(replies))
        probes.ask(read, prompts, chat, sampler, weights, 1)
        first = dict(said)
        probes.ask(read, prompts, chat, sampler, weights, 2)
    assert {name: len(replies) for name, replies in said.items()} == {"a": 4, "b": 1}
    assert first["a"][0] == said["a"][0]
    assert first["a"][1:] != said["a"][1:]
    assert len(set(said["a"][1:])) > 1
    [likeliest] = sampler.sample([prompts["b"]], weights, 9, temperature=0.0)
    assert said["b"] == [chat.decode(likeliest.reply_ids)]


def test_a_probe_without_room_for_a_reply_is_told_at_the_start(tmp_path: Path) -> None:
    read = probes.read_probes(written(tmp_path, GOOD))
    with pytest.raises(SettingError, match=r"HEED_PROBES: \[opening-hours\] has \d+ tokens; 5 leave room"):
        probes.encode(read, bases.chat(), 5)


def test_the_gate_asks_the_probes_and_says_no(tmp_path: Path, base_folder: Path) -> None:
    from tests.test_update import asked, learn, thumbs

    path = written(tmp_path, '[impossible]\nprompt = "say 1"\nmust = "^no noise says this$"\n')
    settings = {"rollouts": 32, "minibatch": 16, "update_batches": 1, "rollout_tokens": 12, "gate_samples": 48}
    trainer = Trainer(LearnerConfig(serving=ServingConfig(model=str(base_folder)), probes=path, **settings))
    trainer.ppo = dataclasses.replace(trainer.ppo, lr=5e-3)
    assert asked(trainer)
    last = learn(trainer, thumbs(trainer)).gate.checks[-1]
    assert (last.name, last.verdict) == ("probes", "fail")
    assert 'Probe "impossible": 0 of 5 replies comply' in last.sentence
    skipped = learn(trainer, []).gate.checks[-1]
    assert (skipped.name, skipped.verdict) == ("probes", "skipped")


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    bases.llama().save_pretrained(folder)
    bases.byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_wrong_file_is_told_before_anything_is_opened_and_by_heed_check(tmp_path: Path) -> None:
    path = written(tmp_path, '[a]\nprompt = "x"\nmust = "("\n')
    serving = ServingConfig(feedback=FeedbackConfig(data=tmp_path / "data"))
    config = LearnerConfig(serving=serving, probes=path)
    with pytest.raises(SettingError, match="line 3"):
        process.learn(config, until_idle=True)
    assert not (tmp_path / "data").exists()
    look = partial(check_settings.probes, Seen(config))
    [finding] = check.guarded("probes", look)
    assert (finding.verdict, finding.name) == ("fail", "probes")
    assert "line 3: [a] must: '(' is no regular expression" in finding.says
    path.write_text(GOOD, "utf-8")
    [finding] = check.guarded("probes", look)
    assert (finding.verdict, finding.says) == ("ok", f"{path}: opening-hours, two turns")


def test_what_a_candidate_says_cannot_write_to_a_terminal() -> None:
    probe = probes.Probe(prompt="Hi", must_not="red")
    found = probes.judge({"colour": probe}, {"colour": ["\x1b[31mred"]})
    assert "[31mred" in found.sentence
    assert found.sentence.isprintable()
