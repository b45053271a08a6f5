"""The adapter store: plain peft reads what it writes, nothing bad gets past it, numbers are never used again."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
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
from tests.spoilt import BAD, TAMPERED

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


def test_the_lock_of_the_policy_s_learner_is_no_version_and_outlives_them(store: AdapterStore, base: Base):
    store.folder.mkdir(parents=True)
    lock = store.folder / "learner.lock"
    lock.write_text("1 on host")
    versions = [store.publish(random_weights(base, seed=seed), parent=0, base=base) for seed in range(3)]
    assert store.versions() == versions == [1, 2, 3]
    for version in versions:
        store.verify(version, base)
    assert store.prune(keep=1) == [1, 2]
    assert lock.read_text() == "1 on host"


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


def test_a_page_lies_beside_the_manifest_for_its_owner_alone_and_goes_with_the_version(tmp_path: Path) -> None:
    store, base = AdapterStore(tmp_path, "default"), Base("f" * 64, {"layer.0": (4, 3)})
    weights = AdapterWeights(1, 1.0, {"layer.0": (torch.ones(1, 4), torch.ones(3, 1))})
    umask = os.umask(0)
    try:
        version = store.publish(weights, parent=0, base=base, page=lambda number: f"<p>v{number} – é")
    finally:
        os.umask(umask)
    assert store.page(version).read_text("utf-8") == "<p>v1 – é"
    assert stat.S_IMODE(store.page(version).stat().st_mode) == 0o600
    assert store.page(version).name not in store.manifest(version).files
    store.verify(version, base)
    newer = store.publish(weights, parent=1, base=base)
    assert not store.page(newer).exists()
    store.change("promote", "operator", version=newer, base=base)
    assert store.prune(keep=1) == [version]
    assert not store.page(version).parent.exists()


def test_a_page_that_cannot_be_made_publishes_nothing(tmp_path: Path) -> None:
    store, base = AdapterStore(tmp_path, "default"), Base("f" * 64, {"layer.0": (4, 3)})
    weights = AdapterWeights(1, 1.0, {"layer.0": (torch.ones(1, 4), torch.ones(3, 1))})

    def torn(version: int) -> str:
        raise OSError(f"the disk filled up at v{version}")

    with pytest.raises(OSError, match="filled up at v1"):
        store.publish(weights, parent=0, base=base, page=torn)
    assert store.versions() == []
    assert [path.name for path in store.folder.iterdir() if path.name.endswith(".tmp")] == []
