"""Adapters in PEFT's own format: written so that plain peft loads them, read with suspicion.

`adapter_config.json` says how, `adapter_model.safetensors` holds `base_model.model.<module>.lora_A.weight`
[rank, inputs] and `….lora_B.weight` [outputs, rank]. Whatever cannot be served exactly as peft would apply it is
refused, each with its own message, before a byte of it reaches the engine. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from serving.base import Base
from serving.lora import AdapterWeights

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FILES = (CONFIG, WEIGHTS)

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CONFIG_LIMIT = 4 << 20

# Settings that leave the meaning of A and B as it is, whatever their value.
_HARMLESS = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "eva_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
}
_REFUSED = {
    "use_dora": "is a DoRA adapter, which also rescales the base's weights",
    "modules_to_save": "replaces whole modules of the base (modules_to_save)",
    "lora_bias": "trains a bias of B (lora_bias)",
    "target_parameters": "targets bare parameters (target_parameters) instead of linear modules",
    "trainable_token_indices": "changes token embeddings (trainable_token_indices)",
    "layer_replication": "repeats layers of the base (layer_replication)",
    "alora_invocation_tokens": "is an activated LoRA, on for part of a prompt only (alora_invocation_tokens)",
}
# The other ways to begin (pissa, olora, corda, loftq, lora_ga) change the base's own weights.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")

T = TypeVar("T")


class BadAdapter(Exception):
    """An adapter that cannot be served. The message says which, what is wrong with it, and what would be right."""


def save_peft(folder: Path, weights: AdapterWeights, base_name: str, *, fan_in_fan_out: bool = False) -> None:
    """Write an adapter into `folder` (which exists) so that `PeftModel.from_pretrained` on the base loads it."""
    tensors: dict[str, torch.Tensor] = {}
    for module, (a_rI, b_Or) in weights.tensors.items():
        for side, tensor in (("A", a_rI), ("B", b_Or)):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = (
                tensor.detach().float().cpu().contiguous().clone()
            )
    (folder / WEIGHTS).write_bytes(save_safetensors(tensors, metadata={"format": "pt"}))
    config = _config_of(weights, base_name, fan_in_fan_out)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_peft(name: str, config: bytes, weights: bytes, base: Base | None) -> AdapterWeights:
    """The adapter that these two files hold, its tensors in fp32 on the CPU.

    `name` is what messages call it. With `base`, rank, targets and shapes must fit it. Raises BadAdapter.
    """
    settings = _check_config(name, config, base)
    tensors = _pairs(name, weights)
    for module, (a_rI, b_Or) in tensors.items():
        _check_pair(name, module, a_rI, b_Or, settings, base)
    scalings = {module: _scaling(name, module, a_rI.shape[0], settings) for module, (a_rI, _) in tensors.items()}
    distinct = set(scalings.values())
    return AdapterWeights(
        rank=max(a_rI.shape[0] for a_rI, _ in tensors.values()),
        scaling=distinct.pop() if len(distinct) == 1 else scalings,
        tensors=tensors,
    )


def read_peft_folder(name: str, folder: Path) -> tuple[bytes, bytes]:
    """The bytes of (config, weights) of an adapter's directory. Raises BadAdapter when either is missing or pickled."""
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
        if pickled:
            raise BadAdapter(
                f"{name}: {pickled[0]} is a pickle, which is never opened. Save the adapter with safetensors "
                f"(peft's save_pretrained does so by default)."
            )
        raise BadAdapter(f"{name}: {WEIGHTS} is missing in {folder}. An adapter is {CONFIG} and {WEIGHTS}.")
    if not (folder / CONFIG).is_file():
        raise BadAdapter(f"{name}: {CONFIG} is missing in {folder}. An adapter is {CONFIG} and {WEIGHTS}.")
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


def _config_of(weights: AdapterWeights, base_name: str, fan_in_fan_out: bool) -> dict[str, object]:
    """PEFT's settings for these weights: the commonest rank and alpha for all, patterns for the modules that differ."""
    ranks = {module: a_rI.shape[0] for module, (a_rI, _) in weights.tensors.items()}
    alphas = {module: weights.scaling_of(module) * rank for module, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": sorted(weights.tensors),
        "rank_pattern": {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(module)}": a for module, a in alphas.items() if a != alpha},
    }


def _check_config(name: str, config: bytes, base: Base | None) -> dict[str, object]:
    """The settings, when each of them is one that can be served. Raises BadAdapter."""
    if len(config) > _CONFIG_LIMIT:
        raise BadAdapter(f"{name}: {CONFIG} is {len(config)} bytes; at most {_CONFIG_LIMIT} are read.")
    try:
        settings = json.loads(config)
    except ValueError as error:
        raise BadAdapter(f"{name}: {CONFIG} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise BadAdapter(f"{name}: {CONFIG} holds no JSON object.")
    _check_kind(name, settings)
    _check_ranks(name, settings, base)
    return settings


def _check_kind(name: str, settings: Mapping[str, object]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise BadAdapter(f"{name}: peft_type is {kind!r}; only LORA adapters are served.")
    for key, why in _REFUSED.items():
        if settings.get(key):
            raise BadAdapter(f"{name}: {why}; only plain LoRA on linear modules is served.")
    if settings.get("bias", "none") != "none":
        raise BadAdapter(
            f"{name}: bias is {settings['bias']!r}; only 'none' is served, as a bias would change the base."
        )
    if settings.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        raise BadAdapter(
            f"{name}: init_lora_weights is {settings['init_lora_weights']!r}, which changes the base's own weights. "
            f"Convert it to a plain LoRA first (peft: path_initial_model_for_weight_conversion)."
        )
    unknown = [key for key, value in settings.items() if value and key not in _HARMLESS | {"bias"}]
    if unknown:
        raise BadAdapter(f"{name}: {CONFIG} sets {sorted(unknown)[0]!r}, a variant of LoRA that is not supported.")


def _check_ranks(name: str, settings: Mapping[str, object], base: Base | None) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict):
            raise BadAdapter(f"{name}: {key} is not a JSON object of module pattern to number.")
        for expression in pattern:
            _check_pattern(name, key, expression)
    if isinstance(settings.get("target_modules"), str):
        _check_pattern(name, "target_modules", str(settings["target_modules"]))
    for rank in (settings.get("r"), *_mapping(settings, "rank_pattern").values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise BadAdapter(f"{name}: rank is {rank!r}; it must be a whole number from 1.")
        if base is not None and rank > base.max_rank:
            raise BadAdapter(f"{name}: rank {rank} is above {base.max_rank}, the highest that the slots hold.")
    for alpha in (settings.get("lora_alpha"), *_mapping(settings, "alpha_pattern").values()):
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise BadAdapter(f"{name}: lora_alpha is {alpha!r}; it must be a finite number.")


def _check_pattern(name: str, key: str, expression: str) -> None:
    """Refuse a pattern that could take for ever: the matcher backtracks, and the file may be a stranger's."""
    plain = re.sub(r"\\.", "", expression)
    if len(expression) > 400 or len(re.findall(r"[*+?{]", plain)) > 3 or re.search(r"\)[*+?{]", plain):
        raise BadAdapter(f"{name}: {key} has the pattern {expression[:80]!r}, too involved to be matched safely.")
    try:
        re.compile(expression)
    except re.error as error:
        raise BadAdapter(f"{name}: {key} has the pattern {expression!r}, which is not one: {error}.") from error


def _pairs(name: str, weights: bytes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [rank, inputs] and B [outputs, rank] of each module, in fp32. Raises BadAdapter."""
    try:
        tensors = load_safetensors(weights)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise BadAdapter(f"{name}: {WEIGHTS} is torn or no safetensors file: {error}.") from error
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise BadAdapter(
                f"{name}: holds the tensor {key!r}; expected base_model.model.<module>.lora_A.weight or lora_B."
            )
        if tensor.dtype not in _DTYPES:
            raise BadAdapter(f"{name}: {key} is {tensor.dtype}; expected float32, bfloat16 or float16.")
        if not bool(torch.isfinite(tensor).all()):
            raise BadAdapter(f"{name}: {key} holds NaN or infinity.")
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not sides:
        raise BadAdapter(f"{name}: {WEIGHTS} holds no tensors.")
    for module, pair in sides.items():
        if len(pair) != 2:
            raise BadAdapter(f"{name}: {module} has lora_{next(iter(pair))} without the other half of its pair.")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(sides.items())}


def _check_pair(
    name: str, module: str, a_rI: torch.Tensor, b_Or: torch.Tensor, settings: Mapping[str, object], base: Base | None
) -> None:
    if not _is_target(module, settings.get("target_modules")):
        raise BadAdapter(f"{name}: has weights for {module}, which its own target_modules does not name.")
    rank = _of_module(module, _mapping(settings, "rank_pattern"), settings["r"])
    if base is None:
        sizes = (a_rI.shape[-1], b_Or.shape[0])
    elif module in base.targets:
        sizes = base.targets[module]
    else:
        raise BadAdapter(f"{name}: targets {module}, which is none of the base's {len(base.targets)} linear modules.")
    wanted = ((rank, sizes[0]), (sizes[1], rank))
    if (tuple(a_rI.shape), tuple(b_Or.shape)) != wanted:
        raise BadAdapter(
            f"{name}: {module} has A {list(a_rI.shape)} and B {list(b_Or.shape)}; "
            f"expected {list(wanted[0])} and {list(wanted[1])} for rank {rank} on this base."
        )


def _scaling(name: str, module: str, rank: int, settings: Mapping[str, object]) -> float:
    """What peft multiplies B·A by: alpha / rank, or alpha / √rank with rslora (Kalajdzievski, 2312.03732)."""
    alpha = _of_module(module, _mapping(settings, "alpha_pattern"), settings["lora_alpha"])
    assert isinstance(alpha, int | float)
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if abs(scaling) > 1e4:
        raise BadAdapter(f"{name}: {module} is scaled by {scaling:g} (lora_alpha over rank); at most 10000 is served.")
    return scaling


def _mapping(settings: Mapping[str, object], key: str) -> dict[str, object]:
    value = settings.get(key) or {}
    assert isinstance(value, dict)
    return value


def _of_module(module: str, pattern: Mapping[str, T], otherwise: T) -> T:
    """The value for a module: the first pattern that ends it, on a dot, as peft's `get_pattern_key` matches."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", module):
            return value
    return otherwise


def _is_target(module: str, targets: object) -> bool:
    """As peft reads target_modules: one expression, or a list of names that are the module or end it on a dot."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    if isinstance(targets, Collection):
        return any(module == target or module.endswith(f".{target}") for target in targets)
    return targets is None
