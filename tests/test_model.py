"""Base models: clear refusals, a fingerprint that means the model, and twins that share every weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from serving import model as model_module
from serving.base import describe_base
from serving.chat import Chat
from serving.lora import target_modules
from serving.model import BUILT_IN, ModelError, fingerprint, load_chat, load_model, twin
from tests import bases


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    bases.llama().save_pretrained(folder)
    bases.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_chat_alone_has_the_fingerprint_of_its_whole_model(folder: Path, tmp_path: Path):
    model, chat = load_model(folder)
    found, alone, config = load_chat(folder)
    assert fingerprint(found, alone) == describe_base(model, chat, folder).fingerprint
    assert config.max_position_embeddings == model.config.max_position_embeddings
    with pytest.raises(ModelError, match="nowhere"):
        load_chat(tmp_path / "nowhere")


def test_a_directory_loads_frozen_and_ready(folder: Path, capfd: pytest.CaptureFixture[str]):
    model, chat = load_model(folder, "cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert chat.eos_ids == {2}
    assert capfd.readouterr() == ("", "")  # no progress bars, no notices


def test_the_type_is_what_was_asked(folder: Path):
    assert load_model(folder, "cpu", "bfloat16")[0].dtype == torch.bfloat16


def test_the_built_in_model_needs_no_name():
    for name in (None, BUILT_IN):
        model, chat = load_model(name, "cpu")
        assert model.num_parameters() < 4_000_000
        assert chat.encode([bases.message("Hello!")])


def broken(what: str) -> Callable[[Path], object]:
    changes: dict[str, Callable[[Path], object]] = {
        "no config": lambda folder: (folder / "config.json").unlink(),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "torn weights": lambda folder: _cut(folder / "model.safetensors"),
        "torn config": lambda folder: _cut(folder / "config.json"),
        "config of another type": lambda folder: (folder / "config.json").write_text("[]"),
        "a number as text": lambda folder: _edit(folder / "config.json", hidden_size="thirty-two"),
        "unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "heptagon"}'),
        "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "pickled weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    }
    return changes[what]


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no config", "has no config.json"),
        ("no weights", r"has no \*.safetensors"),
        ("torn weights", "cannot be loaded"),
        ("torn config", "cannot be loaded"),
        ("config of another type", "cannot be loaded"),
        ("a number as text", "cannot be loaded"),
        ("unknown kind", "cannot be loaded"),
        ("no tokenizer", "cannot be loaded"),
        ("pickled weights", r"has no \*.safetensors"),
    ],
)
def test_a_broken_directory_is_refused_in_one_line(folder: Path, what: str, words: str):
    broken(what)(folder)
    with pytest.raises(ModelError, match=words) as refused:
        load_model(folder, "cpu")
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "Allowed: a directory with" in str(refused.value)


@pytest.mark.parametrize("name", ["no/such/place/here", "/nowhere/at/all", "a b"])
def test_what_is_neither_directory_nor_hub_id_is_refused(name: str):
    with pytest.raises(ModelError, match=r"neither a directory nor a hub id.*Allowed"):
        load_model(name, "cpu")


def test_an_unreachable_hub_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nTraceback")

    monkeypatch.setattr(model_module, "snapshot_download", unreachable)
    with pytest.raises(
        ModelError, match=r"'some/model' is no directory, and the hub does not give it: .*no route"
    ) as refused:
        load_model("some/model", "cpu")
    assert "\n" not in str(refused.value)


def test_a_wrong_device_or_type_is_refused(folder: Path):
    with pytest.raises(ModelError, match=r"device 'toaster'.*Allowed: auto, cpu"):
        load_model(folder, "toaster")
    with pytest.raises(ModelError, match="dtype is 'int3'; allowed: auto, float32"):
        load_model(folder, "cpu", "int3")


# The fingerprint.


def printed(folder: Path) -> str:
    return fingerprint(folder, Chat.load(folder))


def test_the_fingerprint_does_not_depend_on_place_type_or_files(saved: Path, folder: Path):
    before = printed(saved)
    assert printed(folder) == before
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, folder / "model-00001.safetensors", {"format": "pt"})
    save_file({name: tensors[name] for name in names[5:]}, folder / "model-00002.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"transformers_version": "9.9", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    assert printed(folder) == before


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("what", ["weight", "config", "tokenizer", "template"])
def test_the_fingerprint_changes_with_the_model(
    saved: Path, folder: Path, what: str, sampled: bool, monkeypatch: pytest.MonkeyPatch
):
    if sampled:
        monkeypatch.setattr(model_module, "_WHOLE_FILE", 0)
        monkeypatch.setattr(model_module, "_SAMPLE", 64)
    before = printed(saved)
    if what == "weight":
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, path, {"format": "pt"})
    elif what == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    elif what == "tokenizer":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"merges"', ' "merges"', 1))
    else:
        (folder / "chat_template.jinja").write_text(bases.TEMPLATE + " ")
    assert printed(folder) != before


def test_a_torn_file_has_no_fingerprint(folder: Path):
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{torn")
    with pytest.raises(ModelError, match="no whole safetensors file"):
        printed(folder)


# Twins.


@pytest.mark.parametrize("make", [bases.llama, bases.gpt2, lambda: bases.llama(tie_word_embeddings=False)])
def test_twins_share_every_weight_and_nothing_else(make: Callable[[], PreTrainedModel]):
    model = make()
    other = twin(model)
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert parameter.data_ptr() == theirs[name].data_ptr()
        assert parameter is not theirs[name]
    tied = other.get_output_embeddings().weight is other.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert not any(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
    ids = torch.randint(3, 320, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
        expected = bases.logprobs_of(model, [5, 6], [7, 8])
        bases.with_peft(other, bases.adapter(other))
        assert torch.equal(bases.logprobs_of(model, [5, 6], [7, 8]), expected)
    assert target_modules(model)
