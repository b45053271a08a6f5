"""The forward over rows, for the architectures people bring: what it says is what a plain forward says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from serving import steps as steps_module
from serving.decoder import KINDS as DECODER_KINDS
from serving.engine import Engine, Request, Sampling
from serving.forward import Forward, _mask_names
from serving.lora import Slots
from serving.model import ModelError
from tests import bases, tape

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "smollm (odd sizes, biases)": {
        "model_type": "llama",
        "hidden_size": 54,
        "intermediate_size": 75,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral, window 9": {"model_type": "mistral", "sliding_window": 9},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2, mixed": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 9},
    "gemma3, mixed": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 9, "layer_types": MIXED},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "olmo": {"model_type": "olmo"},
    "olmo2": {"model_type": "olmo2"},
    "mixture of experts": {"model_type": "mixtral", "num_local_experts": 4},
    "opt (flattens)": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def make(settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(COMMON | settings)))
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    return model.eval()


WAYS = {
    "native": {"native": True},
    "packed": {"native": False, "packed": True},
    "plain": {"native": False},
    "recorded": {"native": False},
}
CASES = [
    *((kind, "native") for kind in KINDS if KINDS[kind]["model_type"] in DECODER_KINDS),
    *((kind, "packed") for kind in KINDS),
    *((kind, "plain") for kind in ("llama", "gpt2", "mixture of experts")),
    *((kind, "recorded") for kind in KINDS if kind != "mixture of experts"),
]


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_rows_pieces_and_adapters_agree_with_a_plain_forward(kind: str, way: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps_module, "PROMPT_TOKENS_A_STEP_UNHEARD", 40)
    if way == "recorded":
        monkeypatch.setattr("serving.forward.recorder", tape.recorder)
    model = make(KINDS[kind])
    weights = bases.adapter(model)
    engine = Engine(model, bases.chat(), rows=3, max_len=64, **WAYS[way])
    assert engine._forward.native == (way == "native")
    assert engine.way.startswith("recordings of") == (way == "recorded")
    engine.stage(1, weights)
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    prompts = [tuple(range(3, 3 + length)) for length in (1, 7, 18, 33, 50)]
    replies = engine.generate([Request(p, sampling, version) for p in prompts for version in (0, 1)])
    engine.close()
    oracles = [model, bases.with_peft(make(KINDS[kind]), weights)]
    for reply in replies:
        expected = bases.logprobs_of(oracles[reply.version], reply.prompt_ids, reply.reply_ids)
        assert reply.raw_logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_windows_are_told_to_each_kind_of_layer():
    model = make(KINDS["gemma3, mixed"])
    assert Forward(model, Slots(model, []), rows=2, max_len=64)._windows == {MIXED[0]: 9, MIXED[1]: None}
    assert Forward(model, Slots(model, []), rows=2, max_len=8)._windows == {"": None}  # nobody sees so far back


def test_an_unknown_mixture_of_layers_is_refused():
    model = make(KINDS["gemma3, mixed"])
    model.config.layer_types = ["sliding_attention", "chunked_attention"]
    with pytest.raises(ModelError, match=r"mixes attention layers of kinds \['chunked.*allowed"):
        _mask_names(model, [9, None])


def test_an_architecture_that_takes_no_rows_is_refused():
    model = make({"model_type": "bloom", "n_layer": 2, "n_head": 4})
    with pytest.raises(ModelError, match="a bloom model cannot be served"):
        Engine(model, bases.chat(), rows=2, max_len=64)


@pytest.mark.parametrize(("rows", "max_len"), [(1, 64), (2, 3), (1, 2)])
def test_the_check_fits_any_size_and_leaves_no_trace(rows: int, max_len: int):
    model = bases.llama()
    forward = Forward(model, Slots(model, []), rows, max_len)
    with torch.inference_mode():
        forward.check()
    assert not forward.kv.layers[0].keys[:, :, : forward.kv._zeroed].any()
