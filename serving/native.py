"""The step on a processor: serving/step.c, compiled here once, over the model's own weights and the engine's rows and slots.

A step of few rows is bound by how many operations are started, and by how many bytes of weights are read. This one starts
one, reads the weights as they lie (no copy is made) in the type they are loaded as, and computes in float32. It serves
models of one build (serving/decoder.py says which); where there is no C compiler, everything runs without it, slower.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from serving.decoder import fits
from serving.kv import KeyValueRows, LayerShape
from serving.lora import Slots

SOURCE = Path(__file__).with_name("step.c")
_FLAGS = ["-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
_DEFINED = {torch.float32: [], torch.bfloat16: ["-DBF16"]}
_COMPILE_S = 120

_log = logging.getLogger(__name__)

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = (("w", _pointer), ("bias", _pointer), ("outputs", _int))


class _Site(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("inputs", "outputs", "members", "rank")),
        ("member", _Linear * 3),
        *((name, _pointer) for name in ("a", "b")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("attention_norm", "q_norm", "k_norm", "feed_norm")),
        *((name, _Site) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _pointer) for name in ("keys", "values")),
        ("window", _int),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "feed", "vocab", "length")),
        *((name, _float) for name in ("eps", "scaling")),
        *((name, _pointer) for name in ("embedding", "norm", "cos", "sin")),
        ("head", _Site),
        ("layer", ctypes.POINTER(_Layer)),
    )


class _Tokens(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("count", "last_count")),
        *((name, _pointer) for name in ("id", "row", "position", "slot", "last", "logits")),
    )


class Native:
    """The forward of one model over key/value rows, in one call."""

    @staticmethod
    def library(model: PreTrainedModel, targets: Collection[str]) -> ctypes.CDLL | None:
        """The compiled step for this model; None when it is of another build or on another device, or nothing compiles."""
        if not fits(model, targets) or model.device.type != "cpu" or model.dtype not in _DEFINED:
            return None
        linear = [model.model.embed_tokens, model.lm_head, *(model.get_submodule(path) for path in targets)]
        if any(m.weight.dtype != model.dtype or not m.weight.is_contiguous() for m in linear):
            return None
        return _library(model.dtype)

    def __init__(
        self, library: ctypes.CDLL, model: PreTrainedModel, slots: Slots, kv: KeyValueRows, shapes: Sequence[LayerShape]
    ) -> None:
        """Raises MemoryError."""
        self._library, self._model, self._slots = library, model, slots
        self._kv = kv
        self._kept: list[object] = []
        """What the step reads beside the model, slots and rows: it must not be freed."""
        config, inner = model.config, model.model
        attention = inner.layers[0].self_attn
        positions_1K = torch.arange(kv.length + 1)[None]
        cos_1KD, sin_1KD = inner.rotary_emb(torch.zeros(1, 1, dtype=torch.float32), position_ids=positions_1K)
        layers = (_Layer * len(shapes))(
            *(self._layer(f"model.layers.{i}", shape.window, *kv.memory(i)) for i, shape in enumerate(shapes))
        )
        self._ids: int = inner.embed_tokens.num_embeddings
        self._vocab: int = model.lm_head.out_features
        described = _Model(
            layers=len(shapes),
            hidden=config.hidden_size,
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=shapes[0].heads,
            dim=attention.head_dim,
            feed=config.intermediate_size,
            vocab=self._vocab,
            length=kv.length + 1,
            eps=config.rms_norm_eps,
            scaling=attention.scaling,
            embedding=self._weight(inner.embed_tokens),
            norm=self._float(inner.norm.weight),
            cos=self._float(cos_1KD[0]),
            sin=self._float(sin_1KD[0]),
            head=_Site(model.lm_head.in_features, self._vocab, 1, 0, (_Linear * 3)(self._linear(model.lm_head))),
            layer=layers,
        )
        self._kept.append(layers)
        self._stepper = library.heed_open(ctypes.byref(described), torch.get_num_threads())
        if not self._stepper:
            raise MemoryError("there is no memory, or there are no threads, for the native step")
        self.close = weakref.finalize(self, library.heed_close, self._stepper)
        """End its threads, and free its memory."""
        self.close.atexit = False  # a step may still be running then; threads and memory go with the process

    def __call__(self, first: int, ids: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[int]) -> Tensor:
        """As `Forward.run`."""
        if not self.close.alive:
            raise RuntimeError("the engine is closed")
        if any(not 0 <= min(row) <= max(row) < self._ids for row in ids):
            raise IndexError(f"an id is not among the model's {self._ids}")
        read = max(start + len(row) for start, row in zip(starts, ids, strict=True))
        if read > self._kv.length:
            raise IndexError(f"a row holds {self._kv.length} positions")
        self._kv.reach(read)
        lengths = [len(row) for row in ids]
        end, last = 0, array("i")
        for length in lengths:
            end += length
            last.append(end - 1)
        logits_BV = torch.empty(len(ids), self._vocab, dtype=torch.float32)
        each = range(len(ids))
        arrays = (
            array("i", [i for row in ids for i in row]),
            array("i", [first + b for b in each for _ in range(lengths[b])]),
            array("i", [p for b in each for p in range(starts[b], starts[b] + lengths[b])]),
            array("i", [slots[b] for b in each for _ in range(lengths[b])]),
            last,
        )
        tokens = _Tokens(end, len(ids), *(a.buffer_info()[0] for a in arrays), logits_BV.data_ptr())
        if self._library.heed_step(self._stepper, ctypes.byref(tokens)):  # never without tokens: every row has an id
            raise MemoryError(f"there is no memory for a step of {end} tokens")
        return logits_BV

    def _layer(self, path: str, window: int | None, keys: Tensor, values: Tensor) -> _Layer:
        layer: Any = self._model.get_submodule(path)
        attention: Any = layer.self_attn
        return _Layer(
            attention_norm=self._float(layer.input_layernorm.weight),
            q_norm=self._float(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
            k_norm=self._float(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
            feed_norm=self._float(layer.post_attention_layernorm.weight),
            qkv=self._site([f"{path}.self_attn.{name}_proj" for name in "qkv"]),
            o=self._site([f"{path}.self_attn.o_proj"]),
            gate_up=self._site([f"{path}.mlp.{name}_proj" for name in ("gate", "up")]),
            down=self._site([f"{path}.mlp.down_proj"]),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            window=window or 0,
        )

    def _site(self, paths: Sequence[str]) -> _Site:
        members: list[Any] = [self._model.get_submodule(path) for path in paths]
        a_SRI, b_SRO = self._slots.stacks(paths)
        linear = (_Linear * 3)(*map(self._linear, members))
        sizes = members[0].in_features, b_SRO.shape[-1], len(members), self._slots.rank
        return _Site(*sizes, linear, a_SRI.data_ptr(), b_SRO.data_ptr())

    def _linear(self, module: Any) -> _Linear:
        bias = None if module.bias is None else self._float(module.bias)
        return _Linear(self._weight(module), bias, module.out_features)

    def _weight(self, module: Any) -> int:
        """Where its weights lie, for as long as this lives."""
        self._kept.append(weight := module.weight.detach())
        return int(weight.data_ptr())

    def _float(self, tensor: Tensor) -> int:
        """Where a copy in float32 lies."""
        self._kept.append(copy := tensor.detach().float().contiguous())
        return copy.data_ptr()


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch works alone: after each operation its threads spin for a while, and take the cores from the step's.

    Of this thread; but what meets torch for the first time meanwhile, will keep to one thread too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The step for weights of this type, compiled unless it was before; None, with a line in the log, when that fails."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        _log.warning("There is no C compiler (cc, gcc, clang): replies are slower than they could be.")
        return None
    flags = [*_FLAGS, *_DEFINED[dtype]]
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, timeout=_COMPILE_S, check=True)
        parts = [SOURCE.read_text("utf-8"), said.stdout.decode(errors="replace"), _processor(), *flags]
        place = _cache() / f"step-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
        library = _load(place) or _load(_compile([compiler, *flags, str(SOURCE)], place))
        if library is None:
            raise OSError(f"{place} was compiled and cannot be loaded")
    except (OSError, subprocess.SubprocessError) as error:
        said_too = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        _log.warning("%s cannot be compiled, replies are slower than they could be: %s %s", SOURCE, error, said_too)
        return None
    library.heed_open.restype = _pointer
    library.heed_open.argtypes = [_pointer, _int]
    library.heed_step.argtypes = [_pointer, _pointer]
    library.heed_close.argtypes = [_pointer]
    library.heed_close.restype = None
    return library


def _load(place: Path) -> ctypes.CDLL | None:
    """None when it is not there, or torn."""
    try:
        return ctypes.CDLL(str(place))
    except OSError:
        return None


def _compile(command: Sequence[str], place: Path) -> Path:
    """Under another name first, so that nobody loads half of it."""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / place.name
        subprocess.run([*command, "-o", str(made), "-lm"], capture_output=True, timeout=_COMPILE_S, check=True)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name and half of what it names
        made.replace(place)
    return place


def _cache() -> Path:
    """A folder of this user's alone, where nobody else can put a library; a new one where there is no home."""
    try:
        place = Path("~/.cache/heed").expanduser()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
        state = place.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022:
            return place
    except (OSError, RuntimeError):  # it cannot be written, or this user has no home
        pass
    made = Path(tempfile.mkdtemp(prefix="heed-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _processor() -> str:
    """What -march=native means here."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    return "\n".join(
        dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU ")))
    )
