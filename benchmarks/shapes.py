"""Models for benchmarks: random weights in real shapes, a tokenizer of made-up words, adapters on all linear layers.

Weights do not change how fast a model is; so that nothing has to be downloaded, these are drawn.
"""

from __future__ import annotations

import itertools
import random
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from serving.lora import target_modules

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
RANK = 16
ADAPTERS = ("a", "b")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def linear_parameters(self) -> int:
        """Weights that every token passes: all linear layers, and the head (which is the embedding)."""
        attention = 2 * self.hidden * self.hidden * (self.heads + self.kv_heads) // self.heads
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one position, in bf16."""
        return 2 * 2 * self.layers * self.hidden * self.kv_heads // self.heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", hidden=256, layers=6, heads=8, kv_heads=4, ffn=704, vocab=4096),
        Shape("M", hidden=576, layers=30, heads=9, kv_heads=3, ffn=1536, vocab=49152),  # SmolLM-135M
    )
}


LLAMA_8B = Shape("8B", hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256)
"""Llama 3 8B's shape, but for a head that is the embedding too: for machines with a GPU (benchmarks/decode.py)."""


def make(shape: Shape, folder: Path) -> Path:
    """The model's directory, made once; its adapters lie in `adapters/a` and `adapters/b`, in PEFT's format."""
    place = folder / shape.name
    if (place / "whole").exists():
        return place
    torch.manual_seed(0)
    tokenizer = words(shape.vocab)
    model = LlamaForCausalLM(config(shape, tokenizer))
    model.to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target_modules(model), init_lora_weights=False)
    for name in ADAPTERS:
        adapter = get_peft_model(LlamaForCausalLM.from_pretrained(place, dtype=torch.float32), lora)
        adapter.peft_config["default"].base_model_name_or_path = str(place)
        adapter.save_pretrained(place / "adapters" / name)
    (place / "whole").touch()
    return place


def config(shape: Shape, tokenizer: FastTokenizer) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def words(size: int) -> FastTokenizer:
    """Byte-level BPE with `size` tokens: all bytes, then letters put together, as words with and without a space."""
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    letters = string.ascii_lowercase
    for length in itertools.count(2):
        for head in map("".join, itertools.product("Ġ" + letters, *[letters] * (length - 2))):
            for letter in letters:
                if len(vocabulary) == size - len(special):
                    return _fast(vocabulary, merges, special)
                vocabulary.append(head + letter)
                merges.append((head, letter))
    raise AssertionError


def _fast(vocabulary: list[str], merges: list[tuple[str, str]], special: list[str]) -> FastTokenizer:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return FastTokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|start|>"],
        chat_template=TEMPLATE,
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user message, and the ids of the whole prompt it becomes by the chat template: servers ask for one or the other."""

    text: str
    ids: list[int]


def prompt(tokenizer: FastTokenizer, tokens: int, seed: int) -> Prompt:
    """A prompt of exactly `tokens` ids."""

    def ids_of(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    draw = random.Random(seed)
    letters = tokens - len(ids_of("a")) + 1  # each a token, with the space before it
    text = " ".join(draw.choice(string.ascii_lowercase) for _ in range(letters))
    if len(ids := ids_of(text)) != tokens:
        raise ValueError(f"no prompt of {tokens} tokens: {letters} letters make {len(ids)}")
    return Prompt(text, ids)
