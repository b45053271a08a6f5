"""Base models: found, loaded, fingerprinted, and shared between two module trees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from serving.chat import Chat

BUILT_IN = "heed-tiny"
_BUILT_IN_FOLDER = Path(__file__).parent / "tiny"
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is fetched from the hub: weights as safetensors only, and no code. Nothing is ever unpickled."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_WHOLE_FILE = 64 * 2**20
"""Weight files up to this many bytes are fingerprinted whole, larger ones by samples of every tensor."""
_SAMPLE = 4096
_VOLATILE = {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache"}
"""Entries of config.json that say nothing about what the model computes."""


class ModelError(Exception):
    """The base model cannot be served: what is wrong, what is allowed and what to do, in one line."""


def load_model(
    model: str | Path | None = None, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, Chat]:
    """The base, frozen and in eval mode, and its chat.

    `model`: a Hugging Face directory or hub id; None or "heed-tiny" is the built-in one. `device`: auto (a GPU if there
    is one), cpu, cuda, …; `dtype`: auto (float32 on CPU, bfloat16 elsewhere), float32, bfloat16, float16.
    Raises ModelError.
    """
    where = _device(device)
    kind = _dtype(dtype, where)
    folder = find_model(model)
    try:
        with _quiet():
            base = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=kind, use_safetensors=True, local_files_only=True
            )
            chat = Chat.load(folder)
            base.requires_grad_(False).eval().to(where)
    except Exception as error:  # whatever is in the files: transformers and its validators raise errors of many kinds
        raise ModelError(f"model {str(folder)!r} cannot be loaded: {_one_line(error)}. {_ALLOWED}") from error
    return base, chat


def load_chat(model: str | Path | None = None) -> tuple[Path, Chat, PreTrainedConfig]:
    """A model's directory, chat and configuration: all but its weights. Raises ModelError."""
    folder = find_model(model)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            return folder, Chat.load(folder), config
    except Exception as error:  # as in load_model
        raise ModelError(f"model {str(folder)!r} cannot be loaded: {_one_line(error)}. {_ALLOWED}") from error


_ALLOWED = "Allowed: a directory with config.json, *.safetensors and tokenizer files, or a hub id (owner/name)."


def find_model(model: str | Path | None) -> Path:
    """The directory of a model, fetched from the hub where needed. Raises ModelError."""
    if model is None or str(model) == BUILT_IN:
        return _checked(_BUILT_IN_FOLDER, "the built-in model")
    if Path(model).expanduser().is_dir():
        return _checked(Path(model).expanduser(), f"model {str(model)!r}")
    try:
        with _quiet():
            return _checked(Path(snapshot_download(str(model), allow_patterns=_FILES)), f"model {str(model)!r}")
    except HFValidationError as error:
        raise ModelError(f"model {str(model)!r} is neither a directory nor a hub id. {_ALLOWED}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {str(model)!r} is no directory, and the hub does not give it: {_one_line(error)}. {_ALLOWED}"
        ) from error


def stored_as_bfloat16(model: str | Path | None) -> bool:
    """True when the files of a model hold bfloat16, by its config.json. Raises ModelError."""
    folder = find_model(model)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(
            f"{str(folder / 'config.json')!r} is no JSON object: {_one_line(error)}. {_ALLOWED}"
        ) from error


def fingerprint(source: str | Path | None, chat: Chat) -> str:
    """What a base is, as sha256 in hex: architecture, weights, tokenizer and chat template, wherever its files lie.

    It does not change with the type the weights are loaded as, nor with how they are split into files. Of weight files
    above 64 MB three blocks of each tensor are read. Raises ModelError.
    """
    folder = find_model(source)
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, description in sorted(_weights(folder)):
        digest.update(f"{name}\0{description}\0".encode())
    vocabulary = folder / "tokenizer.json"
    digest.update(vocabulary.read_bytes() if vocabulary.is_file() else _vocabulary(chat))
    digest.update(chat.template.encode())
    return digest.hexdigest()


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same weights: none is copied, and each tree has its own adapters and hooks.

    The twin is frozen; buffers are shared too.
    """
    with torch.device("meta"), _quiet():
        other: PreTrainedModel = type(model)(model.config)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        _put(other, name, nn.Parameter(parameter.detach(), requires_grad=False))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        _put(other, name, buffer)
    other.tie_weights()
    other.eval()
    return other


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)


def _checked(folder: Path, what: str) -> Path:
    """The folder, if it holds what a model needs."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{what} has no config.json in {str(folder)!r}. {_ALLOWED}")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{what} has no *.safetensors in {str(folder)!r}. {_ALLOWED} Convert other weights with save_pretrained."
        )
    return folder


def _weights(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of every tensor, whatever files hold them."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            try:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            except ValueError as error:
                raise ModelError(
                    f"{str(path)!r} is no whole safetensors file: {_one_line(error)}. Fetch it again."
                ) from error
            whole = path.stat().st_size <= _WHOLE_FILE
            for name, entry in header.items():
                if name != "__metadata__":
                    start, stop = entry["data_offsets"]
                    data = _sampled(file, 8 + size + start, 8 + size + stop, whole)
                    yield name, f"{entry['dtype']}{entry['shape']}{hashlib.sha256(data).hexdigest()}"


def _vocabulary(chat: Chat) -> bytes:
    return json.dumps(sorted(chat.tokenizer.get_vocab().items())).encode()


def _sampled(file: BinaryIO, start: int, stop: int, whole: bool) -> bytes:
    """A tensor's bytes, or blocks from its beginning, middle and end."""
    if whole or stop - start <= 3 * _SAMPLE:
        file.seek(start)
        return file.read(stop - start)
    blocks = []
    for at in (start, (start + stop - _SAMPLE) // 2, stop - _SAMPLE):
        file.seek(at)
        blocks.append(file.read(_SAMPLE))
    return b"".join(blocks)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} is not here: {_one_line(error)}. Allowed: auto, cpu, or one that torch has"
        ) from error
    return where


def _dtype(dtype: str, where: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if where.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise ModelError(f"dtype is {dtype!r}; allowed: auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": .")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and notices: what goes wrong is raised, in one line of ours."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
