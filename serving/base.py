"""The base an adapter must fit: which modules it may change, their sizes, and a fingerprint of what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from serving.lora import target_modules
from serving.model import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from serving.chat import Chat

MAX_RANK = 16


@dataclass(frozen=True)
class Base:
    """What an adapter must fit."""

    fingerprint: str
    """sha256, in hex, of configuration, weights, tokenizer and chat template."""
    targets: Mapping[str, tuple[int, int]]
    """Path of each module that may carry an adapter (as in `named_modules()`), with its (inputs, outputs)."""
    max_rank: int = MAX_RANK
    """The highest rank that the engine's slots hold."""
    name: str = ""
    """Directory or hub id, written into adapters for people and for plain peft."""
    fan_in_fan_out: bool = False
    """True when weights are stored [inputs, outputs], as GPT-2's Conv1D does."""


def describe_base(
    model: PreTrainedModel,
    chat: Chat,
    source: str | Path | None = None,
    *,
    max_rank: int = MAX_RANK,
    targets: Collection[str] | None = None,
) -> Base:
    """Describe a freshly loaded base, before adapter slots or peft layers are put around its modules.

    `source` is the directory or hub id it was loaded from, by default the one the model remembers; a model built
    in memory and never saved is fingerprinted by its weights and its chat's vocabulary and template.
    """
    modules = dict(model.named_modules())
    chosen = sorted(targets if targets is not None else target_modules(model))
    # a loaded model remembers its directory, which needs no look-up; what was named may be a hub id
    files = model.name_or_path or source
    name = str(source or model.name_or_path or "")
    return Base(
        fingerprint=fingerprint(files, chat) if files else _fingerprint_in_memory(model, chat),
        targets={path: _sizes(modules[path]) for path in chosen},
        max_rank=max_rank,
        name=name,
        fan_in_fan_out=any(not isinstance(modules[path], nn.Linear) for path in chosen),
    )


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of an nn.Linear, or of a Conv1D, whose weight lies the other way."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


def _fingerprint_in_memory(model: PreTrainedModel, chat: Chat) -> str:
    digest = hashlib.sha256(json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps(sorted(chat.tokenizer.get_vocab().items())).encode())
    digest.update(chat.template.encode())
    return digest.hexdigest()
