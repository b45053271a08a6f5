"""The adapter store: plain peft reads what it writes, nothing bad gets past it, numbers are never used again."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from serving.adapters import AdapterStore, BadAdapter, Base, describe_base, save_peft
from serving.chat import Chat
from serving.lora import AdapterWeights

# peft 0.21 still asks transformers by the old name
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

IDS = torch.tensor([[1, 5, 9, 2, 7]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def chat(template: str | None = None) -> Chat:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    return Chat(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", chat_template=template))


def random_weights(base: Base, rank: int = 4, scaling: float = 0.75, seed: int = 1) -> AdapterWeights:
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        path: (torch.randn(rank, inputs, generator=rng) * 0.3, torch.randn(outputs, rank, generator=rng) * 0.3)
        for path, (inputs, outputs) in base.targets.items()
    }
    return AdapterWeights(rank=rank, scaling=scaling, tensors=tensors)


def by_hand(model: PreTrainedModel, weights: AdapterWeights) -> torch.Tensor:
    """Logits of the base with scaling·B·A added to its weights: the definition of LoRA."""
    modules = dict(model.named_modules())
    before = {path: modules[path].weight.detach().clone() for path in weights.tensors}
    with torch.no_grad():
        for path, (a, b) in weights.tensors.items():
            delta = weights.scaling_of(path) * (b @ a)
            modules[path].weight += delta if isinstance(modules[path], torch.nn.Linear) else delta.T
        logits = model(IDS).logits
        for path, weight in before.items():
            modules[path].weight.copy_(weight)
    return logits


@pytest.fixture
def base() -> Base:
    return describe_base(llama(), chat(), max_rank=8)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters", "default")


# PEFT's format


@pytest.mark.parametrize("build", [llama, gpt2])
def test_plain_peft_serves_the_same_logits_from_a_published_version(
    build: Callable[[], PreTrainedModel], store: AdapterStore
):
    model = build()
    base = describe_base(model, chat())
    weights = random_weights(base)
    expected = by_hand(model, weights)
    version = store.publish(weights, parent=0, base=base)
    wrapped = peft.PeftModel.from_pretrained(model, store.folder / f"v{version:06d}").eval()
    with torch.no_grad():
        assert torch.allclose(wrapped(IDS).logits, expected, atol=1e-5)
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(IDS).logits, expected, atol=1e-3)


def test_ranks_and_scalings_that_differ_by_module_survive_the_round_trip_and_peft(store: AdapterStore):
    model = llama()
    base = describe_base(model, chat())
    paths = sorted(base.targets)
    tensors = {
        path: (torch.randn(1 + i % 3, base.targets[path][0]), torch.randn(base.targets[path][1], 1 + i % 3) * 0.1)
        for i, path in enumerate(paths)
    }
    weights = AdapterWeights(rank=3, scaling={path: 0.1 * (1 + i % 4) for i, path in enumerate(paths)}, tensors=tensors)
    expected = by_hand(model, weights)
    version = store.publish(weights, parent=0, base=base)
    loaded = store.load(version, base)
    assert loaded.rank == 3
    for path, (a, b) in tensors.items():
        assert torch.equal(loaded.tensors[path][0], a)
        assert torch.equal(loaded.tensors[path][1], b)
        assert loaded.scaling_of(path) == pytest.approx(weights.scaling_of(path))
    wrapped = peft.PeftModel.from_pretrained(model, store.folder / f"v{version:06d}").eval()
    with torch.no_grad():
        assert torch.allclose(wrapped(IDS).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "lora_alpha": 3, "target_modules": r".*\.(q_proj|o_proj)"},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9}},
        {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 3}},
    ],
    ids=["list", "rslora", "expression", "patterns", "anchored pattern"],
)
def test_an_adapter_saved_by_peft_is_imported_and_means_the_same(
    settings: dict[str, object], tmp_path: Path, store: AdapterStore
):
    model = llama()
    base = describe_base(model, chat(), max_rank=8)
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "elsewhere")
    version = store.import_adapter(tmp_path / "elsewhere", base)
    with torch.no_grad():
        assert torch.allclose(by_hand(model, store.load(version, base)), wrapped.eval()(IDS).logits, atol=1e-5)
    assert store.manifest(version).imported_from == str((tmp_path / "elsewhere").resolve())
    assert version not in store.release().approved


# bad adapters

Break = Callable[[Path], object]


def edit_config(**settings: object) -> Break:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def set_one(suffix: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(tensors) if key.endswith(suffix))
        tensors[key] = value(tensors[key]).contiguous()

    return edit_tensors(change)


def drop_one(suffix: str) -> Break:
    return edit_tensors(lambda tensors: tensors.pop(next(key for key in sorted(tensors) if key.endswith(suffix))))


def add(name: str) -> Break:
    return edit_tensors(lambda tensors: tensors.update({name: torch.zeros(4, 16)}))


def rename(old: str, new: str) -> Break:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit_tensors(change)


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def both(*breaks: Break) -> Break:
    return lambda folder: [each(folder) for each in breaks]


BAD: dict[str, tuple[Break, str]] = {
    "torn weights": (truncate, "is torn or no safetensors file"),
    "empty weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "is torn or no safetensors file"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "pickled weights": (pickled, "is a pickle, which is never opened"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no JSON object"),
    "not lora": (edit_config(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
    "dora": (edit_config(use_dora=True), "DoRA"),
    "bias": (edit_config(bias="all"), "bias is 'all'; only 'none'"),
    "lora bias": (edit_config(lora_bias=True), r"\(lora_bias\)"),
    "modules to save": (edit_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (edit_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "a variant nobody knows yet": (edit_config(hyper_lora={"x": 1}), "'hyper_lora', a variant of LoRA that is not"),
    "rank too high": (edit_config(r=9), "rank 9 is above 8"),
    "rank too high for one module": (edit_config(rank_pattern={"q_proj": 64}), "rank 64 is above 8"),
    "rank no number": (edit_config(r=True), "rank is True; it must be a whole number"),
    "alpha no number": (edit_config(lora_alpha="x"), "lora_alpha is 'x'; it must be a finite number"),
    "alpha infinite": (edit_config(lora_alpha=float("inf")), "lora_alpha is inf; it must be a finite number"),
    "alpha absurd": (edit_config(lora_alpha=1e9), "is scaled by"),
    "pattern that never ends": (edit_config(rank_pattern={"(a+)+": 4}), "too involved to be matched safely"),
    "pattern that is none": (edit_config(alpha_pattern={"(": 4}), "which is not one"),
    "patterns no object": (edit_config(rank_pattern=[4]), "rank_pattern is not a JSON object"),
    "rank other than it says": (edit_config(r=3), r"expected \[3, "),
    "NaN": (set_one("lora_A.weight", lambda t: t * float("nan")), "holds NaN or infinity"),
    "infinity": (set_one("lora_B.weight", lambda t: t + float("inf")), "holds NaN or infinity"),
    "wrong type": (set_one("lora_B.weight", lambda t: t.to(torch.int8)), "torch.int8; expected float32"),
    "wrong shape": (set_one("lora_A.weight", lambda t: t[:, :-1]), "on this base"),
    "half a pair": (drop_one("lora_A.weight"), "without the other half"),
    "unknown module": (
        both(rename("q_proj", "z_proj"), edit_config(target_modules="all-linear")),
        "z_proj, which is none of the base's 14",
    ),
    "not its own target": (edit_config(target_modules=["v_proj"]), "which its own target_modules does not name"),
    "embedding": (add("base_model.model.model.embed_tokens.lora_embedding_A"), "holds the tensor"),
    "path for a name": (add("../../etc/passwd"), "holds the tensor"),
    "nothing in it": (edit_tensors(lambda tensors: tensors.clear()), "holds no tensors"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_with_its_own_message(kind: str, tmp_path: Path, store: AdapterStore, base: Base):
    break_it, message = BAD[kind]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    save_peft(folder, random_weights(base), "tiny")
    break_it(folder)
    with pytest.raises(BadAdapter, match=message):
        store.import_adapter(folder, base)
    assert store.versions() == []
    assert not [path for path in store.folder.iterdir() if "v0" in path.name], "nothing half-written stays"


def replace_with_link(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder.parent / "outside")
    weights.symlink_to(folder.parent / "outside")


def edit_manifest(**values: object) -> Break:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


TAMPERED: dict[str, tuple[Break, str]] = {
    "weights changed": (set_one("lora_A.weight", lambda t: t + 1), "adapter_model.safetensors has another digest"),
    "weights torn": (truncate, "adapter_model.safetensors has another digest"),
    "config changed": (edit_config(lora_alpha=99), "adapter_config.json has another digest"),
    "weights gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "a link": (replace_with_link, "is a link"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no such version"),
    "manifest torn": (lambda f: os.truncate(f / "manifest.json", 20), "is no manifest"),
    "manifest of a newer Heed": (edit_manifest(schema=99), "Upgrade Heed"),
    "manifest of another version": (edit_manifest(version=7), "a folder was renamed or copied"),
    "another base": (edit_manifest(base="0" * 64), "made for another base, tokenizer or chat template"),
    "a path in the manifest": (edit_manifest(files={"../../secret": "0" * 64}), "its manifest lists"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_version_that_was_tampered_with_is_refused(kind: str, store: AdapterStore, base: Base):
    tamper, message = TAMPERED[kind]
    version = store.publish(random_weights(base), parent=0, base=base)
    store.verify(version, base)
    tamper(store.folder / "v000001")
    with pytest.raises(BadAdapter, match=message):
        store.load(version, base)
    with pytest.raises(BadAdapter, match=message):
        store.change("promote", "operator", version=version, base=base)
    assert store.release().generation == 0


TEN = [
    *("torn weights", "wrong shape", "NaN", "pickled weights", "half a pair", "rank too high", "dora"),
    *("weights changed", "another base", "a path in the manifest"),
]


def test_ten_kinds_have_ten_messages(tmp_path: Path, base: Base):
    said = set()
    for number, kind in enumerate(TEN):
        store = AdapterStore(tmp_path / f"store{number}", "default")
        if kind in BAD:
            folder = tmp_path / f"elsewhere{number}"
            folder.mkdir()
            save_peft(folder, random_weights(base), "tiny")
            BAD[kind][0](folder)
            with pytest.raises(BadAdapter) as refused:
                store.import_adapter(folder, base)
        else:
            version = store.publish(random_weights(base), parent=0, base=base)
            TAMPERED[kind][0](store.folder / "v000001")
            with pytest.raises(BadAdapter) as refused:
                store.load(version, base)
        said.add(str(refused.value).replace(str(tmp_path), "").replace(str(number), ""))
    assert len(said) == 10, said


# versions


def test_a_manifest_says_where_a_version_came_from(store: AdapterStore, base: Base):
    first = store.publish(random_weights(base), parent=0, base=base)
    second = store.publish(
        random_weights(base, seed=2),
        parent=first,
        base=base,
        reward_model="rm-7",
        feedback={"count": 120, "offsets": {"heed.feedback": 130}},
        update={"kl": 1.25},
        gate={"passed": True},
    )
    manifest = store.manifest(second)
    assert (first, second) == (1, 2)
    assert store.versions() == [1, 2]
    assert (manifest.parent, manifest.base, manifest.reward_model) == (1, base.fingerprint, "rm-7")
    assert manifest.feedback == {"count": 120, "offsets": {"heed.feedback": 130}}
    assert manifest.update == {"kl": 1.25}
    assert manifest.gate == {"passed": True}
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_number_is_never_used_again(store: AdapterStore, base: Base, tmp_path: Path):
    def publish() -> int:
        return store.publish(random_weights(base), parent=0, base=base)

    assert [publish(), publish()] == [1, 2]
    shutil.rmtree(store.folder / "v000002")
    assert publish() == 3, "deleted by hand"
    (store.folder / ".highest").unlink()
    (store.folder / "v000009").mkdir()
    assert publish() == 10, "a half-written folder counts"
    shutil.rmtree(store.folder / "v000009")
    (store.folder / ".highest").write_text("rubbish")
    (store.folder / ".v000014.abcd.tmp").mkdir()
    assert publish() == 11, "a killed publisher's leavings are swept before anyone could have seen them"
    assert store.versions() == [1, 3, 10, 11]
    with pytest.raises(BadAdapter):
        store.import_adapter(tmp_path, base)
    assert publish() == 13, "a refused adapter's number is not used again either"


def publish_many(folder: Path, base: Base, count: int, results: multiprocessing.Queue) -> None:
    store = AdapterStore(folder, "default")
    results.put([store.publish(random_weights(base, seed=i), parent=0, base=base) for i in range(count)])


def test_publishers_in_several_processes_get_different_numbers(tmp_path: Path, base: Base):
    context = multiprocessing.get_context("fork")  # spawned ones would each import torch anew, for half a minute
    results = context.Queue()
    workers = [context.Process(target=publish_many, args=(tmp_path, base, 4, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    numbers = sorted(number for _ in workers for number in results.get(timeout=120))
    for worker in workers:
        worker.join()
    assert numbers == list(range(1, 13))
    store = AdapterStore(tmp_path, "default")
    assert store.versions() == numbers
    for version in numbers:
        store.verify(version, base)


def publish_for_ever(folder: Path, base: Base) -> None:
    store = AdapterStore(folder, "default")
    while True:
        store.publish(random_weights(base), parent=0, base=base)


def test_a_publisher_killed_at_any_time_leaves_only_whole_versions(tmp_path: Path, base: Base):
    context = multiprocessing.get_context("fork")
    store = AdapterStore(tmp_path, "default")
    seen: set[int] = set()
    for round_ in range(8):
        worker = context.Process(target=publish_for_ever, args=(tmp_path, base))
        worker.start()
        worker.join(0.05 + 0.013 * round_)
        worker.kill()
        worker.join()
        for version in store.versions():
            store.verify(version, base)
        assert seen <= set(store.versions())
        seen = set(store.versions())
        number = store.publish(random_weights(base), parent=0, base=base)
        assert number > max(seen, default=0)
        seen.add(number)
        assert not [path for path in store.folder.iterdir() if path.name.startswith(".v")]


def test_prune_keeps_what_is_served_was_served_or_is_loaded(store: AdapterStore, base: Base):
    weights = random_weights(base, rank=1)
    for _ in range(9):
        store.publish(weights, parent=0, base=base)
    for version in (2, 3):
        store.change("promote", "operator", version=version)
    store.change("candidate", "learner", version=4)
    assert store.prune(keep=2, loaded=[6]) == [1, 5, 7]
    assert store.versions() == [2, 3, 4, 6, 8, 9]
    assert store.prune(keep=2, loaded=[6]) == []
    assert store.release().approved == (2, 3, 4)


def test_the_store_of_another_policy_is_another_store(tmp_path: Path, base: Base):
    ours, theirs = AdapterStore(tmp_path, "default"), AdapterStore(tmp_path, "other")
    ours.publish(random_weights(base), parent=0, base=base)
    assert theirs.versions() == []
    shutil.copytree(tmp_path / "default" / "v000001", tmp_path / "other" / "v000001")
    with pytest.raises(BadAdapter, match="its manifest is of default@v1"):
        theirs.load(1, base)


# the base


def test_a_loaded_model_is_known_by_its_files_whatever_type_it_is_loaded_in(tmp_path: Path):
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    chat().tokenizer.save_pretrained(folder)
    full = LlamaForCausalLM.from_pretrained(folder)
    half = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    known = describe_base(full, chat())
    assert describe_base(half, chat()) == known
    assert describe_base(full, chat(), folder) == known
    assert known.name == str(folder)
    assert describe_base(full, chat("{{ messages }}")).fingerprint != known.fingerprint


def test_a_model_built_in_memory_is_known_by_its_weights_and_its_template():
    model = llama()
    known = describe_base(model, chat())
    assert describe_base(llama(), chat()) == known
    assert describe_base(model, chat("{{ messages }}")).fingerprint != known.fingerprint
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert describe_base(model, chat()).fingerprint != known.fingerprint


def test_targets_are_the_linear_modules_but_the_head():
    base = describe_base(llama(), chat())
    assert len(base.targets) == 14
    assert base.targets["model.layers.0.mlp.down_proj"] == (24, 16)
    assert not base.fan_in_fan_out
    base = describe_base(gpt2(), chat())
    assert base.targets["transformer.h.1.attn.c_attn"] == (16, 48)
    assert base.fan_in_fan_out
