"""The learner's model: one frozen base, adapters that take turns, and log-probs that are those of the server."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.model import Batch, LearnerModel, length_sorted
from serving.engine import Engine, Request
from serving.lora import AdapterWeights
from serving.model import twin
from serving.sampling import Sampling
from tests import bases

MODELS = [bases.llama, bases.gpt2]


@dataclass(frozen=True)
class Said:
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]


def samples(count: int = 6, seed: int = 0) -> list[Said]:
    """Prompts and replies of all lengths, of random ids."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(3, 320, (length,), generator=generator).tolist())

    return [Said(ids(2, 9), ids(1, 12)) for _ in range(count)]


def learner_model(base: PreTrainedModel | None = None, **settings: object) -> LearnerModel:
    options = {"rank": 4, "scaling": 2.0, "seed": 0} | settings
    return LearnerModel(twin(base or bases.llama()), ("policy", "other"), **options)  # type: ignore[arg-type]


def stir(model: LearnerModel, name: str, seed: int = 5) -> None:
    """Make an adapter do something."""
    model.adapter(name).load(bases.adapter(model.base, seed=seed))


def said_by(model: LearnerModel, batch: Batch, adapter: str | None = "policy") -> Tensor:
    return model.logprobs(batch, adapter)[batch.mask_BT]


def bytes_of(model: LearnerModel, name: str) -> bytes:
    return b"".join(tensor.detach().numpy().tobytes() for tensor in model.adapter(name).parameters())


def loss_of(model: LearnerModel, batch: Batch, adapter: str) -> Tensor:
    return model.logprobs(batch, adapter).sum()


# 2. The log-ratio is 0 for every batch size, padding side and generate-vs-forward


@pytest.mark.parametrize("make", MODELS)
def test_2_log_probs_do_not_depend_on_the_batch(make: type) -> None:
    model, said = learner_model(make()), samples()
    stir(model, "policy")
    together = Batch.of(said)
    whole_BT = model.logprobs(together, "policy")
    for row, one in enumerate(said):
        alone = Batch.of([one])
        torch.testing.assert_close(said_by(model, alone), whole_BT[row, together.mask_BT[row]], rtol=0, atol=2e-5)
    rows = [4, 1]
    some_BT = model.logprobs(together.rows(rows), "policy")
    torch.testing.assert_close(some_BT, whole_BT[rows, : some_BT.shape[1]], rtol=0, atol=2e-5)
    assert not whole_BT[~together.mask_BT].any()


@pytest.mark.parametrize("make", MODELS)
def test_2_padding_on_the_left_would_give_the_same(make: type) -> None:
    base, said = make(), samples()
    texts = [(*one.prompt_ids, *one.reply_ids) for one in said]
    width = max(map(len, texts))
    ids_BT = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts])
    real_BT = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    positions_BT = (real_BT.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits_BTV = base(input_ids=ids_BT, attention_mask=real_BT, position_ids=positions_BT).logits.log_softmax(-1)
    batch = Batch.of(said)
    ours_BT = learner_model(base).logprobs(batch, None)
    for row, one in enumerate(said):
        count = len(one.reply_ids)
        theirs_T = logits_BTV[row, -count - 1 : -1].gather(1, torch.tensor(one.reply_ids)[:, None])[:, 0]
        torch.testing.assert_close(ours_BT[row, batch.mask_BT[row]], theirs_T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("adapter", [None, "policy"])
def test_2_what_was_generated_has_the_log_probs_of_a_forward(adapter: str | None) -> None:
    base, chat = bases.llama(), bases.chat()
    model = learner_model(base)
    stir(model, "policy")
    engine = Engine(base, chat, rows=4, max_len=64, rank=4)
    version = 0 if adapter is None else 1
    if version:
        engine.stage(version, model.adapter("policy").weights())
    requests = [
        Request(one.prompt_ids, Sampling(max_tokens=16, seed=seed), version) for seed, one in enumerate(samples(9))
    ]
    finished = engine.generate(requests)
    batch = Batch.of(finished)
    served = torch.tensor(list(itertools.chain.from_iterable(reply.raw_logprobs for reply in finished)))
    torch.testing.assert_close(said_by(model, batch, adapter), served, rtol=0, atol=1e-4)
    assert len(served) > 40


def test_2_so_have_replies_to_a_prompt_that_comes_again_and_again() -> None:
    base = bases.llama()
    prompts = [(5, 6, 7, 8, 9), (10, 11), (12, 13, 14)]
    requests = [Request(prompts[seed % 3], Sampling(max_tokens=8, seed=seed)) for seed in range(24)]
    finished = Engine(base, bases.chat(), rows=24, max_len=64, rank=4).generate(requests)
    served = torch.tensor(list(itertools.chain.from_iterable(reply.raw_logprobs for reply in finished)))
    ours = said_by(learner_model(base), Batch.of(finished), None)
    torch.testing.assert_close(ours, served, rtol=0, atol=1e-4)


# 6. A fresh adapter has KL exactly 0; updates of one adapter leave the other's bytes unchanged


def test_6_a_fresh_adapter_is_exactly_the_reference() -> None:
    model, batch = learner_model(), Batch.of(samples())
    assert model.full_kl(batch, "policy")[0].tolist() == [0.0] * 6
    found = model.compare(batch, "policy")
    assert torch.equal(found.new_BT, found.base_BT)
    assert not found.kl_BT.any()


def test_a_comparison_keeps_apart_what_is_the_adapters_and_what_the_bases() -> None:
    model, batch = learner_model(), Batch.of(samples())
    stir(model, "policy")
    found, before_BT = model.compare(batch, "policy"), batch.before_BT
    with torch.no_grad():
        torch.testing.assert_close(found.new_BT, model.logprobs(batch, "policy"))
        torch.testing.assert_close(found.base_BT, model.logprobs(batch, None))
        assert torch.equal(found.hidden_NH, model.hidden(batch, "policy")[before_BT])
        assert not torch.allclose(found.hidden_NH, model.hidden(batch, None)[before_BT], atol=1e-3)
    assert torch.equal(found.states_BS, model.states(batch))
    assert torch.equal(model.full_kl(batch, "policy")[1], model.states(batch))


def test_6_training_one_adapter_leaves_the_other_and_the_base_unchanged() -> None:
    base = bases.llama()
    model, batch = learner_model(base), Batch.of(samples())
    frozen = b"".join(tensor.numpy().tobytes() for tensor in base.parameters())
    for name, other in (("policy", "other"), ("other", "policy")):
        before, untouched = bytes_of(model, name), bytes_of(model, other)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        optimiser.zero_grad()
        loss_of(model, batch, name).backward()
        optimiser.step()
        assert bytes_of(model, name) != before
        assert bytes_of(model, other) == untouched
    assert b"".join(tensor.numpy().tobytes() for tensor in base.parameters()) == frozen
    assert not any(parameter.requires_grad for parameter in base.parameters())


# 7. A trained adapter changes, and what the server says follows


def test_7_the_server_follows_a_trained_adapter() -> None:
    base, chat = bases.llama(), bases.chat()
    model, batch = learner_model(base), Batch.of(samples())
    engine = Engine(base, chat, rows=4, max_len=64, rank=4)
    requests = [Request((5, 6, 7), Sampling(max_tokens=12, seed=seed), 1) for seed in range(4)]
    before = bytes_of(model, "policy")
    engine.stage(1, model.adapter("policy").weights())
    untrained = engine.generate(requests)
    optimiser = torch.optim.SGD(model.adapter("policy").parameters(), lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        (-loss_of(model, batch, "policy") / batch.mask_BT.sum()).backward()
        optimiser.step()
    engine.restage(1, model.adapter("policy").weights())
    trained = engine.generate(requests)
    assert bytes_of(model, "policy") != before
    assert [reply.raw_logprobs for reply in trained] != [reply.raw_logprobs for reply in untrained]
    served = torch.tensor([logprob for reply in trained for logprob in reply.raw_logprobs])
    torch.testing.assert_close(said_by(model, Batch.of(trained)), served, rtol=0, atol=1e-4)


# 8. Checkpointed and plain gradients agree while adapters take turns


def gradients(model: LearnerModel, batch: Batch) -> list[Tensor]:
    """Of a loss that both adapters are part of, backward coming after both forwards."""
    model.zero_grad()
    loss = loss_of(model, batch, "policy") + 2 * loss_of(model, batch, "other")
    with model.using("other"):  # whoever is active when backward runs must not matter
        loss.backward()  # type: ignore[no-untyped-call]
    return [parameter.grad for parameter in model.adapters.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("make", MODELS)
def test_8_checkpointing_changes_no_gradient(make: type) -> None:
    base, batch = make(), Batch.of(samples())
    plain, saving = learner_model(base), learner_model(base, checkpointing=True)
    for model in (plain, saving):
        stir(model, "policy", seed=5)
        stir(model, "other", seed=6)
    expected, found = gradients(plain, batch), gradients(saving, batch)
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert max(float(one.abs().max()) for one in expected) > 0.1


def test_8_layers_are_really_run_twice() -> None:
    model, batch, runs = learner_model(checkpointing=True), Batch.of(samples()), []
    model.base.get_submodule("model.layers.0.input_layernorm").register_forward_hook(
        lambda *_: runs.append(model.active)
    )
    loss_of(model, batch, "policy").backward()
    assert runs == ["policy", "policy"]


# The rest


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_log_probs_by_chunks_are_the_same_with_the_same_gradient(chunk: int) -> None:
    base, batch = bases.llama(), Batch.of(samples())
    whole, pieces = learner_model(base), learner_model(base, chunk_tokens=chunk)
    found = []
    for model in (whole, pieces):
        stir(model, "policy")
        logprobs = said_by(model, batch)
        logprobs.square().sum().backward()  # type: ignore[no-untyped-call]
        found.append((logprobs.detach(), [parameter.grad for parameter in model.adapter("policy").parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_full_kl_is_its_definition() -> None:
    base, said = bases.llama(), samples()
    model, batch = learner_model(base), Batch.of(samples())
    stir(model, "policy")
    peft = bases.with_peft(twin(base), model.adapter("policy").weights())

    def kl(one: Said) -> float:
        ids = torch.tensor([[*one.prompt_ids, *one.reply_ids]])
        with torch.no_grad():
            new_TV, reference_TV = (
                net(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1].log_softmax(-1) for net in (peft, base)
            )
        return float((new_TV.exp() * (new_TV - reference_TV)).sum())

    assert model.full_kl(batch, "policy")[0].tolist() == pytest.approx([kl(one) for one in said], rel=1e-4)
    assert float(model.compare(batch, "policy").kl_BT.sum()) == pytest.approx(sum(map(kl, said)), rel=1e-4)


def test_an_adapter_of_lower_rank_and_other_scaling_means_the_same_here() -> None:
    base, batch = bases.llama(), Batch.of(samples())
    theirs = bases.adapter(base, rank=2, scaling=0.5)
    small, large = learner_model(base, rank=2, scaling=0.5), learner_model(base, rank=8, scaling=2.0)
    for model in (small, large):
        model.adapter("policy").load(theirs)
    torch.testing.assert_close(said_by(large, batch), said_by(small, batch), rtol=0, atol=1e-5)
    again = learner_model(base, rank=8, scaling=2.0)
    again.adapter("policy").load(large.adapter("policy").weights())
    assert bytes_of(again, "policy") == bytes_of(large, "policy")


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    base = bases.llama()
    with pytest.raises(ValueError, match="rank 8 on 14 layers; this learner trains rank 4 on 14 layers"):
        learner_model(base).adapter("policy").load(bases.adapter(base, rank=8))


def test_groups_hold_every_row_once_and_keep_to_their_size() -> None:
    lengths = [5, 40, 7, 7, 3, 12, 90]
    groups = list(length_sorted(lengths, 30))
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(7))
    assert all(len(group) == 1 or len(group) * max(lengths[row] for row in group) <= 30 for group in groups)
    assert groups == [[4, 0, 2, 3], [5], [1], [6]]


def test_adapters_are_made_from_their_seed() -> None:
    def made(seed: int) -> Sequence[bytes]:
        model = learner_model(seed=seed)
        return bytes_of(model, "policy"), bytes_of(model, "other")

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert made(1)[0] != made(1)[1]


def test_an_adapter_of_some_layers_and_of_several_ranks_is_taken_over() -> None:
    base = bases.llama()
    model, batch = learner_model(base), Batch.of(samples())
    whole = bases.adapter(base, seed=6)
    paths = list(whole.tensors)[:3]
    tensors = {path: whole.tensors[path] for path in paths}
    down_rI, up_Or = tensors[paths[0]]
    tensors[paths[0]] = (down_rI[:1], up_Or[:, :1])
    model.adapter("policy").load(AdapterWeights(rank=whole.rank, scaling=whole.scaling, tensors=tensors))
    engine = Engine(base, bases.chat(), rows=8, max_len=64, rank=whole.rank)
    engine.stage(1, AdapterWeights(rank=whole.rank, scaling=whole.scaling, tensors=tensors))
    [said] = engine.generate([Request(samples()[0].prompt_ids, Sampling(max_tokens=8, seed=0), 1)])
    ours = said_by(model, Batch.of([said]), "policy")
    torch.testing.assert_close(ours, torch.tensor(said.raw_logprobs), rtol=0, atol=1e-4)
    assert bool((model.full_kl(batch, "policy")[0] > 0).all())
