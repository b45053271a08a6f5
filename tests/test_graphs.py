"""Recorded steps: which one is taken, that nothing of Python is repeated, and what happens where none can be made."""

from __future__ import annotations

import logging

import pytest
import torch

from serving.engine import Engine, Request, Sampling
from serving.graphs import Graphs, Work, recorder
from serving.kv import KeyValueRows, LayerShape
from tests import bases, tape

PROMPT = (5, 6, 7)
REPLY = Sampling(max_tokens=9, seed=3, ignore_eos=True)

Size = tuple[int, int, bool]


def fixed_steps(said: list[Size], replayed: list[Size], *, off: float = 0.0) -> Graphs:
    """Of a model whose logits are ten times the id; recordings say `off` more."""
    kv = KeyValueRows([LayerShape(1, 2, 2, None)], 5, 300, torch.float32, torch.device("cpu"))

    def fixed(given_4B: torch.Tensor, read: int, adapters: bool) -> torch.Tensor:
        said.append((given_4B.shape[1], read, adapters))
        return given_4B[0, :, None] * 10.0

    def record(work: Work) -> Work:
        work()
        size = said[-1]

        def replay() -> None:
            replayed.append(size)
            work()
            graphs._logits_RV.add_(off)

        return replay

    graphs = Graphs(fixed, kv, record, torch.device("cpu"))
    graphs.record()
    return graphs


def test_the_smallest_recording_that_fits_is_taken():
    said: list[Size] = []
    replayed: list[Size] = []
    graphs = fixed_steps(said, replayed)
    assert replayed == [(rows, read, a) for rows in (5, 4, 2, 1) for read in (300, 256, 128) for a in (True, False)]
    replayed.clear()
    assert graphs([7], [127], [-1]).tolist() == [[70.0]]
    assert graphs([7, 8, 9], [3, 128, 4], [-1, 2, 0]).tolist() == [[70.0], [80.0], [90.0]]
    assert graphs([1] * 5, [299] * 5, [1] * 5).shape == (5, 1)
    assert replayed == [(1, 128, False), (4, 256, True), (5, 300, True)]
    given = graphs._given[4].tolist()
    assert given == [[7, 8, 9, 0], [3, 128, 4, 0], [3, 128, 4, 300], [-1, 2, 0, -1]], "the spare row writes nowhere"


def test_a_recording_that_says_something_else_is_refused():
    with pytest.raises(RuntimeError, match=r"the recording of 5 rows and 300 positions is 0\.5 off"):
        fixed_steps([], [], off=0.5)


def test_a_replay_runs_no_python_of_the_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.forward.recorder", tape.recorder)
    engine = Engine(bases.gpt2(), bases.chat(), rows=2, max_len=64, native=False)
    calls = []
    hook = engine.model.register_forward_hook(lambda *_: calls.append(1))
    engine.generate([Request(PROMPT, REPLY)])
    hook.remove()
    engine.close()
    assert len(calls) == 1, "the prompt was read, and eight tokens were replayed"


def test_weights_that_are_staged_later_speak_through_old_recordings(monkeypatch: pytest.MonkeyPatch):
    def said() -> list[tuple[int, ...]]:
        engine = Engine(bases.llama(), bases.chat(), rows=2, max_len=64, native=False)
        replies = []
        for seed in (1, 2):
            engine.restage(1, bases.adapter(engine.model, seed=seed))
            replies.append(engine.generate([Request(PROMPT, REPLY, 1)])[0].reply_ids)
        engine.close()
        return replies

    plain = said()
    monkeypatch.setattr("serving.forward.recorder", tape.recorder)
    assert said() == plain
    assert plain[0] != plain[1]


def test_a_model_that_cannot_be_recorded_is_served_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("serving.forward.recorder", tape.recorder)
    model = bases.llama()
    waits = model.model.embed_tokens.register_forward_hook(lambda _module, _given, out: out * out.max().item() ** 0)
    with caplog.at_level(logging.WARNING):
        engine = Engine(model, bases.chat(), rows=2, max_len=64, native=False)
    assert "cannot be recorded, replies are slower than they could be" in caplog.text
    assert engine.way == "the decoder"
    assert engine.generate([Request(PROMPT, REPLY)])[0].reason == "length"
    engine.close()
    waits.remove()


def test_a_processor_records_nothing():
    assert recorder(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_on_a_gpu_recordings_say_what_the_model_says(dtype: torch.dtype, tolerance: float):
    model = bases.llama().to("cuda", dtype)
    oracles = [model, bases.with_peft(bases.llama().to("cuda", dtype), bases.adapter(model))]
    engine = Engine(model, bases.chat(), rows=5, max_len=240)
    assert engine.way == "recordings of the decoder"
    engine.stage(1, bases.adapter(model))
    prompts = [tuple(3 + (i * j) % 200 for j in range(1, length)) for i, length in enumerate((4, 60, 126, 140, 200), 2)]
    for many in range(1, len(prompts) + 1):
        for reply in engine.generate([Request(p, REPLY, i % 2) for i, p in enumerate(prompts[:many])]):
            expected = bases.logprobs_of(oracles[reply.version], reply.prompt_ids, reply.reply_ids)
            assert reply.raw_logprobs == pytest.approx(expected.tolist(), abs=tolerance)
    engine.close()
