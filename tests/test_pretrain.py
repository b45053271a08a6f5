"""A base model is made whole, the same for the same seed, from corpus or files; the shipped one keeps its word."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import corpus, pretrain, tokens

TINY = Path(__file__).parents[1] / "serving" / "tiny"
MICRO = pretrain.Size(
    hidden=32,
    layers=1,
    heads=2,
    kv_heads=1,
    feed_forward=64,
    vocabulary=400,
    steps=3,
    tokens=256,
    pool=64,
    tokenizer_chats=300,
)
CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Sure thing.\n- It's Paris! 🌍"},
    {"role": "user", "content": "And the capital of Spain?"},
]


def _make(out: Path, seed: int = 0, **more: object) -> Path:
    pretrain.pretrain(out, seed=seed, size=MICRO, threads=2, samples=0, progress=lambda *_: None, **more)  # type: ignore[arg-type]
    return out


def _digests(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir() if file.name != "README.md"
    }


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("made") / "micro")


def test_the_same_seed_gives_the_same_bytes(micro: Path, tmp_path: Path) -> None:
    assert _digests(_make(tmp_path / "again")) == _digests(micro)
    other = _digests(_make(tmp_path / "other", seed=1))
    assert other["model.safetensors"] != _digests(micro)["model.safetensors"]


def test_a_new_model_takes_the_place_of_the_old_one_whole(micro: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    _make(place, seed=1)
    _make(place)
    assert _digests(place) == _digests(micro)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no model"):
        _make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_training_ids_are_those_of_the_chat_template(micro: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro)
    whole = [*CHAT, {"role": "assistant", "content": "Madrid it is."}]
    [(ids, weights)] = tokens.encode(tokenizer, [whole])
    assert ids == tokenizer.apply_chat_template(whole, return_dict=False)
    asked = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids[: len(asked)] == asked
    assert ids[-1] == tokenizer.eos_token_id
    assert all(weight == 1 for weight in weights[len(asked) :])
    assert weights[len(asked) - 1] == 0


def test_the_tokenizer_gives_back_any_text(micro: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro)
    for text in ("It's  fine!\n- Grüße 🌍", " leading", "日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_an_unknown_role_is_refused_by_the_template(micro: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro)
    with pytest.raises(Exception, match="Unknown role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "beep"}])


def test_the_schedule_warms_up_holds_and_ends_near_zero() -> None:
    shares = [pretrain.schedule(step, 100) for step in range(100)]
    assert shares[0] == 0.5
    assert shares[1:41] == [1.0] * 40
    assert shares[70] == pytest.approx(0.5)
    assert shares[-1] < 0.001


def test_other_texts_can_be_learned_instead(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    rows = [{"messages": CHAT[1:3]}, {"prompt": "Hello?", "completion": "Good day."}]
    chats.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    text = tmp_path / "book.txt"
    text.write_text("One paragraph\nof two lines.\n\nAnother.\n", "utf-8")
    read = tokens.read_corpus([chats, text])
    assert [chat[0]["content"] for chat in read] == [
        CHAT[1]["content"],
        "Hello?",
        "One paragraph\nof two lines.",
        "Another.",
    ]
    made = _make(tmp_path / "model", corpus_files=[chats, text])
    assert json.loads((made / "prompts.json").read_text("utf-8")) == [CHAT[1]["content"], "Hello?"]
    assert AutoModelForCausalLM.from_pretrained(made).num_parameters() < 100_000


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "not JSON"),
        ('{"text": "no"}', "expected"),
        ('{"messages": []}', "expected"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "needs a role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "needs a role"),
        ('{"messages": ["hello"]}', "needs a role"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, wrong: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=wrong) as error:
        tokens.read_corpus([path])
    assert f"{path}:3" in str(error.value)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.txt: cannot be read"):
        tokens.read_corpus([tmp_path / "gone.txt"])
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"no text to learn from in .*empty\.txt"):
        tokens.read_corpus([tmp_path / "empty.txt"])


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return pretrain.measure(TINY, samples=400, seed=1)


def test_the_shipped_model_is_small() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert sum(path.stat().st_size for path in TINY.glob("*.safetensors")) <= 12_000_000
    assert model.config.max_position_embeddings >= 1024
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_shipped_model_ends_its_replies_and_is_undecided_in_manner(measured: dict[str, Any]) -> None:
    assert measured["ended_within_80"] >= 0.99
    for manner, share in measured["manners"].items():
        assert 0.22 <= share <= 0.53, manner  # 30-45% as measured on 4000, with the noise of 400


def test_the_shipped_model_is_fluent(measured: dict[str, Any]) -> None:
    assert measured["well_formed"] >= 0.93  # 96% as measured on 2000, with the noise of 400
    assert measured["facts_right"] >= 0.92


def test_the_shipped_card_reports_what_was_measured() -> None:
    text = (TINY / "README.md").read_text("utf-8")
    for word in ("license: apache-2.0", "well-formed", "ended within 80 tokens", *corpus.MANNERS):
        assert word in text
