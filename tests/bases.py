"""Tiny random base models, tokenizers and adapters, real in everything but size."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from serving.chat import Chat
from serving.lora import AdapterWeights, target_modules

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LINES = [
    "Hello, how are you today? I am fine, thank you!",
    "The quick brown fox jumps over the lazy dog; user and assistant and system.",
    "naïve café — привет, 日本語 😀 🇩🇪 👩‍🚀",
]


def message(content: str, role: str = "user") -> Any:
    return SimpleNamespace(role=role, content=content)


def byte_tokenizer(size: int = 320) -> FastTokenizer:
    """Byte-level BPE, as GPT-2 and most models since have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return FastTokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|start|>"],
        chat_template=TEMPLATE,
    )


def sentencepiece_tokenizer() -> FastTokenizer:
    """Pieces with ▁ for a space and bytes as tokens of their own, as Llama 2's and Gemma's."""
    pieces = ["<unk>", "<pad>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁Hello", "Hello", "▁world", "▁caf", "é", ",", "▁.", "�", "a", "▁日", "▁▁"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return FastTokenizer(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def chat() -> Chat:
    return Chat(byte_tokenizer())


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Two layers, hidden size 32, 320 tokens; weights large enough that replies differ."""
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return _frozen(LlamaForCausalLM(LlamaConfig(**(settings | changes))))


def gpt2(seed: int = 0) -> PreTrainedModel:
    """Two layers of Conv1D."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=2, bos_token_id=None
    )
    return _frozen(GPT2LMHeadModel(config))


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    model.eval()
    return model


def adapter(
    model: PreTrainedModel, seed: int = 1, rank: int = 4, scaling: float = 2.0, targets: Sequence[str] | None = None
) -> AdapterWeights:
    """A random adapter that changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    tensors = {}
    for path in targets if targets is not None else target_modules(model):
        weight: Any = modules[path].weight
        outputs, inputs = weight.shape if isinstance(modules[path], torch.nn.Linear) else weight.T.shape
        a = torch.randn(rank, inputs, generator=generator) * 0.2
        b = torch.randn(outputs, rank, generator=generator) * 0.1
        tensors[path] = (a, b)
    return AdapterWeights(rank, scaling, tensors)


def with_peft(model: PreTrainedModel, weights: AdapterWeights) -> PeftModel:
    """The same adapter by plain PEFT: the oracle. The model is changed; give a copy."""
    assert isinstance(weights.scaling, float)
    config = LoraConfig(r=weights.rank, lora_alpha=weights.rank * weights.scaling, target_modules=list(weights.tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for an attribute by its old name
        wrapped = get_peft_model(model, config)
    for path, (a, b) in weights.tensors.items():
        module: Any = wrapped.base_model.model.get_submodule(path)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(a)
            module.lora_B["default"].weight.copy_(b)
    return wrapped.eval()


def logprobs_of(model: Any, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> Tensor:
    """log p of each reply id by one plain forward over the whole text; [T]."""
    with torch.no_grad():
        ids_1T = torch.tensor([[*prompt_ids, *reply_ids]], device=model.device)
        logits_1TV = model(input_ids=ids_1T).logits.float().cpu()
    logprobs_TV = logits_1TV[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logprobs_TV.gather(1, torch.tensor(reply_ids)[:, None])[:, 0]
