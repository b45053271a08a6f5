"""The native step: right for every size and type, the same to the last bit in any company, and dispensable."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from serving import native
from serving.engine import Engine, Finished, Request, Sampling
from serving.kv import KeyValueRows, given_cache
from serving.native import Native
from tests import bases
from tests.test_forward import KINDS, make

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler (apt-get install gcc libc6-dev)"
)
CHAT = bases.chat()


def engine_of(model: Any, *, threads: int | None = None, **settings: Any) -> Engine:
    """With two adapters; `threads` of the step."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        engine = Engine(model, CHAT, **({"rows": 8, "max_len": 96, "seed": 0} | settings))
    finally:
        torch.set_num_threads(before)
    assert engine.way == "the native step"
    assert engine.copied_bytes == 0
    for version in (1, 2):
        engine.stage(version, bases.adapter(model, seed=version))
    return engine


def request(which: int, *, length: int = 20, **how: Any) -> Request:
    draw = random.Random(which)
    ids = tuple(draw.randrange(3, 320) for _ in range(length))
    return Request(ids, Sampling(**({"max_tokens": 12, "seed": which, "ignore_eos": True} | how)), which % 3)


def said(finished: Finished) -> object:
    return finished.reply_ids, finished.raw_logprobs, finished.logprobs


def usual() -> PreTrainedModel:
    return bases.llama()


def odd() -> PreTrainedModel:
    """Nothing divides by anything."""
    return bases.llama(
        hidden_size=57,
        intermediate_size=71,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=22,
        vocab_size=321,
    )


def wide() -> PreTrainedModel:
    return bases.llama(hidden_size=512, intermediate_size=900, head_dim=128, initializer_range=0.05)


def qwen3() -> PreTrainedModel:
    return make(KINDS["qwen3"])


def windowed() -> PreTrainedModel:
    return make(KINDS["mistral, window 9"])


class AsStored(DynamicCache):
    """The keys and values that the step stored for a row, which must be the exact ones, rounded to the nearest.

    They are not rounded here: sums in another order may go to the other neighbour, which log-probs feel up to 2e-3.
    """

    def __init__(self, kv: KeyValueRows, row: int) -> None:
        super().__init__()
        self._kv, self._row = kv, row

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        stored = tuple(memory[self._row, None, :, : keys.shape[2]] for memory in self._kv.memory(layer))
        for exact, held in zip((keys, values), stored, strict=True):
            assert ((exact - 1e-4).to(held.dtype) <= held).all()
            assert (held <= (exact + 1e-4).to(held.dtype)).all()
        return tuple(held.float() for held in stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [usual, odd, wide, qwen3, windowed])
def test_weights_and_what_is_stored_are_rounded_and_nothing_else(
    base: Callable[[], PreTrainedModel], dtype: torch.dtype
):
    """The base and two adapters side by side, prompts of three lengths read in pieces, then token by token."""
    engine = engine_of(base().to(dtype))
    slots = [engine._versions.slot_of(version) for version in range(3)]
    texts = [request(which, length=40).prompt_ids for which in range(3)]
    ends = [[1 + 7 * row + more for more in (0, 11, 22, 23, 24, 25)] for row in range(3)]
    starts, logits = [0, 0, 0], []
    for upto in zip(*ends, strict=True):
        pieces = [text[start:end] for text, start, end in zip(texts, starts, upto, strict=True)]
        logits.append(engine._forward.run(0, pieces, starts, slots))
        starts = list(upto)
    said_BTV = torch.stack(logits, 1).log_softmax(-1)
    for row, text in enumerate(texts):
        exact = base().to(dtype).float()
        model = bases.with_peft(exact, bases.adapter(exact, seed=row)) if row else exact
        with torch.no_grad():
            cache = given_cache(exact, AsStored(engine._forward.kv, row))
            logits_1TV = model(input_ids=torch.tensor([text[: ends[row][-1]]]), **cache).logits
        expected_TV = logits_1TV[0, [end - 1 for end in ends[row]]].log_softmax(-1)
        assert torch.allclose(said_BTV[row], expected_TV, rtol=0, atol=1e-4), row
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [odd, qwen3, windowed])
def test_a_reply_is_the_same_to_the_last_bit_in_any_company(
    base: Callable[[], PreTrainedModel], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    model = base().to(dtype)
    requests = [request(i, length=5 + 9 * i) for i in range(8)]
    alone = engine_of(model)
    expected = [said(alone.generate([one])[0]) for one in requests]
    alone.close()
    monkeypatch.setattr("serving.steps.PROMPT_TOKENS_A_STEP_UNHEARD", 11)
    for threads in (1, 2, 5):
        together = engine_of(model, threads=threads, prefix_tokens=512)
        for _ in range(2):  # the second time, what was read is remembered
            assert [said(reply) for reply in together.generate(requests)] == expected
        assert together.stats().prefix_tokens > 0
        together.close()


@pytest.mark.usefixtures("home")
def test_threads_that_are_late_anywhere_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """Compiled so that threads sleep at random wherever they take or finish a task: some miss phases, and whole steps."""
    requests = [request(i, length=5 + 9 * i, max_tokens=40) for i in range(8)]
    punctual = engine_of(bases.llama(), threads=1)
    expected = [said(reply) for reply in punctual.generate(requests)]
    punctual.close()
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-DJITTER"])
    for threads in (2, 3, 8):
        late = engine_of(bases.llama(), threads=threads)
        assert [said(reply) for reply in late.generate(requests)] == expected
        late.close()


def test_ids_and_lengths_beyond_the_model_are_errors_and_not_memory():
    engine = engine_of(bases.llama())
    for ids, reason in (((5, 320), "error"), ((5, 2**31 - 1), "error"), ((5, 6), "length")):
        (reply,) = engine.generate([Request(ids, Sampling(max_tokens=3, ignore_eos=True))])
        assert reply.reason == reason
    step = engine._forward._native
    assert step is not None
    with pytest.raises(IndexError, match="a row holds 96"):
        step(0, [[1] * 97], [0], [-1])
    with pytest.raises(IndexError, match="an id is not among"):
        step(0, [[-1]], [0], [-1])
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        step(0, [[1]], [0], [-1])


def test_not_finite_in_a_slot_stays_with_those_who_chose_it():
    model = bases.llama()
    engine = engine_of(model)
    expected = said(engine.generate([request(0)])[0])
    engine._slots._all[0].b_SRO[0] = torch.nan
    replies = engine.generate([request(0), request(1), request(2)])
    assert [reply.reason for reply in replies] == ["length", "error", "length"]
    assert said(replies[0]) == expected
    engine.close()


def test_no_compiler_no_step_and_the_same_replies(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    model = bases.llama()
    engine = engine_of(model)
    expected = engine.generate([request(i) for i in range(3)])
    engine.close()
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    native._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            engine = Engine(model, CHAT, rows=8, max_len=96, seed=0)
    finally:
        native._library.cache_clear()
    assert "There is no C compiler" in caplog.text
    for version in (1, 2):
        engine.stage(version, bases.adapter(model, seed=version))
    for reply, native_reply in zip(engine.generate([request(i) for i in range(3)]), expected, strict=True):
        assert reply.reply_ids == native_reply.reply_ids
        assert reply.raw_logprobs == pytest.approx(native_reply.raw_logprobs, abs=1e-4)
    engine.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home of its own, and nothing loaded yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    return tmp_path / ".cache" / "heed"


def test_it_is_compiled_once_and_again_where_the_file_is_torn(home: Path, monkeypatch: pytest.MonkeyPatch):
    model, targets = bases.llama(), list(bases.adapter(bases.llama()).tensors)
    runs: list[Any] = []
    really_run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **how: (runs.append(command), really_run(command, **how))[1])
    assert Native.library(model, targets) is not None
    assert [("-shared" in command) for command in runs] == [False, True]
    assert Native.library(model, targets) is not None
    assert sum("-shared" in command for command in runs) == 1
    (place,) = home.iterdir()
    elsewhere = home.parent.parent / "elsewhere" / ".cache" / "heed"  # what is loaded once is not read again
    elsewhere.mkdir(mode=0o700, parents=True)
    (elsewhere / place.name).write_bytes(b"\x7fELF torn")
    monkeypatch.setenv("HOME", str(home.parent.parent / "elsewhere"))
    assert Native.library(model, targets) is not None
    assert sum("-shared" in command for command in runs) == 2
    assert (elsewhere / place.name).stat().st_size > 1000


def test_what_does_not_compile_is_said(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    broken = home.parent.parent / "step.c"
    broken.write_text("this is no C")
    monkeypatch.setattr(native, "SOURCE", broken)
    with caplog.at_level(logging.WARNING):
        assert Native.library(bases.llama(), list(bases.adapter(bases.llama()).tensors)) is None
    assert "cannot be compiled, replies are slower than they could be" in caplog.text
    assert "error:" in caplog.text


def test_a_folder_that_others_may_write_to_is_not_trusted(home: Path, monkeypatch: pytest.MonkeyPatch):
    targets = list(bases.adapter(bases.llama()).tensors)
    assert Native.library(bases.llama(), targets) is not None
    (place,) = home.iterdir()
    elsewhere = home.parent.parent / "elsewhere" / ".cache" / "heed"
    elsewhere.mkdir(parents=True)
    elsewhere.chmod(0o777)
    (elsewhere / place.name).write_bytes(b"planted")
    monkeypatch.setenv("HOME", str(home.parent.parent / "elsewhere"))
    assert Native.library(bases.llama(), targets) is not None
    assert (elsewhere / place.name).read_bytes() == b"planted"  # neither loaded nor, being torn, compiled anew


def test_a_user_without_a_home_has_it_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    monkeypatch.setattr(Path, "expanduser", lambda _self: (_ for _ in ()).throw(RuntimeError("no home")))
    assert Native.library(bases.llama(), list(bases.adapter(bases.llama()).tensors)) is not None


def test_models_of_another_build_go_their_own_way():
    for model in (bases.gpt2(), bases.llama(hidden_act="gelu"), bases.llama().half()):
        assert Native.library(model, list(bases.adapter(bases.llama()).tensors)) is None
    assert Native.library(bases.llama(), ["model.layers.0.mlp.down_proj"]) is None
