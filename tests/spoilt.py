"""Adapters spoilt in every way we thought of, and what must be said of each."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

Break = Callable[[Path], object]
"""Spoils the adapter in a folder."""


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


def widen(rank: int) -> Break:
    """The same adapter with zeros up to this rank: whole, and as its config says."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            more = (0, 0, 0, rank - len(tensor)) if "lora_A" in key else (0, rank - tensor.shape[1])
            tensors[key] = pad(tensor, more)

    return both(edit_tensors(change), edit_config(r=rank))


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
    "rank too high": (widen(17), "rank 17 is above 8, the highest"),
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


def replace_with_link(folder: Path) -> None:
    """The weights lie outside the store's root, as they were."""
    weights, outside = folder / "adapter_model.safetensors", folder.parents[2] / "outside"
    weights.rename(outside)
    weights.symlink_to(outside)


def edit_manifest(**values: object) -> Break:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def redigest(folder: Path) -> None:
    """Let the manifest say what lies in the folder by now."""
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    edit_manifest(files={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})(folder)


def lead_outside(folder: Path) -> None:
    """The manifest names one file more, which is there, outside the store's root, and has the right digest."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "../../../secret").write_text("secret")
    edit_manifest(files=files | {"../../../secret": hashlib.sha256(b"secret").hexdigest()})(folder)


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
    "a path in the manifest": (lead_outside, "its manifest lists"),
}


def published(kind: str, message: str | None = None) -> tuple[Break, str]:
    """Bad as in BAD, but in the store, with a manifest and digests that are right."""
    break_it, said = BAD[kind]
    return both(break_it, redigest), message or said


TEN: dict[str, tuple[Break, str]] = {
    "torn file": published("torn weights"),
    "wrong digest": TAMPERED["weights changed"],
    "wrong base": TAMPERED["another base"],
    "wrong shape": published("wrong shape"),
    "NaN": published("NaN"),
    "pickle": published("pickled weights", r"its manifest lists .*'adapter_model\.bin'\]; expected"),
    "missing tensor": published("half a pair"),
    "rank too large": published("rank too high", "rank 17 is above 16, the highest"),
    "path outside the root": TAMPERED["a link"],
    "DoRA": published("dora"),
}
"""Versions of a store that must never be served, each spoilt in one way and otherwise whole."""
