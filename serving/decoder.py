"""Llama and its kin in few operations: what a step computes is what the Hugging Face model does, with a third of the calls.

A step of few rows is bound by how many operations are started, not by arithmetic. This spelling asks for about thirty a
layer. It reads the model's own weights and settings, and serves models of one build only: RMSNorm, rotary positions,
grouped attention and a gated feed-forward (Llama and so SmolLM, Mistral, Qwen 2 and 3). All others go through the model's
own forward (serving/forward.py). On a CPU the native step takes its place where it can be compiled.

Axes: B rows, T tokens a row, N = B·T, H hidden, A heads (of queries, then keys, then values), G heads of keys, X of queries
to each of these, L = X·T, D of one head, K positions seen, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

from serving.kv import KeyValueRows
from serving.lora import Slots, target_modules

KINDS = ("llama", "mistral", "qwen2", "qwen3")
_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary positions whose angles depend on the position alone."""


Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    attention: Step
    qkv: Step
    q_norm: Step | None
    k_norm: Step | None
    scaling: float
    o: Step
    feed: Step
    gate_up: Step
    act: Step
    down: Step


def fits(model: PreTrainedModel, targets: Collection[str]) -> bool:
    """True for a model of the one build, all of whose linear layers but the head may carry adapters."""
    config = model.config
    return (
        config.model_type in KINDS
        and config.rope_parameters["rope_type"] in _STATIC_ROPE
        and config.hidden_act == "silu"
        and model.lm_head.bias is None
        and set(targets) == set(target_modules(model))
    )


class Decoder:
    """The forward of one model over key/value rows."""

    def __init__(self, model: PreTrainedModel, slots: Slots, kv: KeyValueRows) -> None:
        """Raises ValueError for a model of another build."""
        if not fits(model, slots.targets):
            raise ValueError(f"{model.config.model_type}; allowed: {KINDS}, with slots beside all linear layers")
        inner: Any = model.model
        self._kv, self._embed, self._head, self._norm = kv, inner.embed_tokens, model.lm_head, _norm(inner.norm)
        self._layers = [_layer(layer, f"model.layers.{i}", slots) for i, layer in enumerate(inner.layers)]
        attention = inner.layers[0].self_attn
        self._dim: int = attention.head_dim
        self._heads = attention.q_proj.out_features // self._dim
        self._kv_heads = attention.k_proj.out_features // self._dim
        positions_1K = torch.arange(kv.length + 1, device=model.device)[None]
        cos_1KD, sin_1KD = inner.rotary_emb(inner.embed_tokens.weight[:1, None], position_ids=positions_1K)
        half_D = torch.arange(self._dim, device=model.device) < self._dim // 2
        # rotate_half(x)·sin = roll(x, D/2)·(∓sin)
        self._cos_KD, self._sin_KD = cos_1KD[0], torch.where(half_D, -sin_1KD[0], sin_1KD[0])

    def __call__(self, ids_BT: Tensor, position_BT: Tensor, mask_B1TK: Tensor) -> Tensor:
        """Logits of each row's last token, logits_BV. The rows and places are those that `kv.aim` was told."""
        rows, width = ids_BT.shape
        flat_N = position_BT.flatten()
        cos_N1D, sin_N1D = self._cos_KD[flat_N][:, None], self._sin_KD[flat_N][:, None]
        groups = self._heads // self._kv_heads
        if width > 1:  # the heads that share keys and values are read as more tokens, so that nothing is repeated
            mask_B1TK = mask_B1TK.repeat(1, 1, groups, 1)
        x_NH = self._embed(ids_BT).flatten(0, 1).float()  # the sum of all layers: in fp32, which is no slower
        turned = self._heads + self._kv_heads
        for number, layer in enumerate(self._layers):
            heads_NAD = layer.qkv(layer.attention(x_NH)).view(rows * width, -1, self._dim)
            qk_NAD = heads_NAD[:, :turned]
            if layer.q_norm is not None and layer.k_norm is not None:
                q_NAD, k_NAD = qk_NAD[:, : self._heads], qk_NAD[:, self._heads :]
                qk_NAD = torch.cat((layer.q_norm(q_NAD), layer.k_norm(k_NAD)), 1)
            qk_NAD = torch.addcmul(qk_NAD * cos_N1D, qk_NAD.roll(self._dim // 2, -1), sin_N1D)
            k_BTGD = qk_NAD[:, self._heads :].unflatten(0, (rows, width))
            v_BTGD = heads_NAD[:, turned:].unflatten(0, (rows, width))
            keys, values = self._kv.write(number, k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2))
            q_BTGXD = qk_NAD[:, : self._heads].reshape(rows, width, self._kv_heads, groups, self._dim)
            q_BGLD = q_BTGXD.permute(0, 2, 3, 1, 4).reshape(rows, self._kv_heads, groups * width, self._dim)
            seen = scaled_dot_product_attention(q_BGLD, keys, values, mask_B1TK, scale=layer.scaling)
            seen = seen.view(rows, self._kv_heads, groups, width, -1).permute(0, 3, 1, 2, 4)
            x_NH.add_(layer.o(seen.reshape(rows * width, -1)))
            gate_NF, up_NF = layer.gate_up(layer.feed(x_NH)).chunk(2, -1)
            x_NH.add_(layer.down(layer.act(gate_NF).mul_(up_NF)))
        last_BH = x_NH.view(rows, width, -1)[:, -1]
        logits_BV: Tensor = self._head(self._norm(last_BH))
        return logits_BV


def _norm(module: Any) -> Step:
    dtype, weight, eps = module.weight.dtype, module.weight.float(), module.variance_epsilon
    return lambda x: rms_norm(x.float(), weight.shape, weight, eps).to(dtype)


def _layer(layer: Any, path: str, slots: Slots) -> _Layer:
    attention, feed = layer.self_attn, layer.mlp
    return _Layer(
        attention=_norm(layer.input_layernorm),
        qkv=slots.product([f"{path}.self_attn.{name}_proj" for name in "qkv"]),
        q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        scaling=attention.scaling,
        o=slots.product([f"{path}.self_attn.o_proj"]),
        feed=_norm(layer.post_attention_layernorm),
        gate_up=slots.product([f"{path}.mlp.{name}_proj" for name in ("gate", "up")]),
        act=feed.act_fn,
        down=slots.product([f"{path}.mlp.down_proj"]),
    )
