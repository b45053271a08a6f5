"""Checkpoints of what trains: tensors and their meta data as one atomic step.

    <folder>/000004/  tensors.safetensors
                      checkpoint.json      written last: its existence means the checkpoint is whole

A checkpoint is written beside its place, synced, and renamed. A torn or foreign one is passed over for the one before.
safetensors and JSON only; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

if TYPE_CHECKING:
    from serving.adapters import Base

KEPT = 2
TENSORS = "tensors.safetensors"
META = "checkpoint.json"

_NAME = re.compile(r"\d{6,12}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `save` was given."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Trains(Protocol):
    """What has a state to keep: learner.trainer.Trainer."""

    @property
    def base(self) -> Base: ...
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None: ...


class Checkpoints:
    """One trainer's checkpoints in a folder."""

    def __init__(self, folder: Path, trainer: Trains) -> None:
        self.folder = folder
        self.trainer = trainer

    def save(self, number: int, offsets: Mapping[str, int]) -> None:
        """Keep what an update left in the trainer, with the offsets it had read up to. Raises OSError.

        To be looked at: the next update learns anew from all judgements.
        """
        tensors, meta = self.trainer.state()
        label = {"base": self.trainer.base.fingerprint, "offsets": dict(offsets), "trainer": meta}
        save(self.folder, number, tensors, label)

    def restore(self) -> None:
        """Go on from the newest checkpoint, if it fits the base."""
        found = load(self.folder)
        if found is None or found.meta.get("base") != self.trainer.base.fingerprint:
            return
        try:
            self.trainer.restore(found.tensors, found.meta["trainer"])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            _log.warning("the checkpoint does not fit, learning starts afresh: %s", error)


def save(folder: Path, number: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Keep a checkpoint under a number that grows, and the one before it; older ones go. Raises OSError (a full disk).

    The same number again replaces it. After a failure the checkpoints that were there are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    place, draft = folder / f"{number:06d}", folder / f".{number:06d}.{secrets.token_hex(4)}.tmp"
    draft.mkdir()
    try:
        # tensors may share storage, which safetensors refuses
        content = save_tensors({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        _write(draft / TENSORS, content)
        label = {"sha256": hashlib.sha256(content).hexdigest(), "meta": dict(meta)}
        _write(draft / META, json.dumps(label, indent=1).encode())
        if place.exists():
            place.rename(folder / f".{number:06d}.{secrets.token_hex(4)}.tmp")
        draft.rename(place)
        _sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in _places(folder)[KEPT:]:
        shutil.rmtree(old)
    _sweep(folder)
    return place


def load(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None. Torn ones are passed over, and said so."""
    for place in _places(folder):
        try:
            return _read(place)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _log.warning("checkpoint %s is torn (%s): passed over", place, error)
    return None


def _read(place: Path) -> Checkpoint:
    label = json.loads((place / META).read_bytes())
    content = (place / TENSORS).read_bytes()
    if hashlib.sha256(content).hexdigest() != label["sha256"]:
        raise ValueError(f"{TENSORS} has another digest than {META} says")
    return Checkpoint(load_tensors(content), dict(label["meta"]))


def _places(folder: Path) -> list[Path]:
    """Every checkpoint, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: -int(path.name))


def _sweep(folder: Path) -> None:
    """Delete what a killed writer left behind. Only the one learner of a data folder writes here."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
