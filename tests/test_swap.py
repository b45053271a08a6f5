"""Swaps: the released version comes to speak, replies under way are never mixed, and nothing bad gets in."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from feedback.sqlite_log import SqliteLog
from learner.release import Releaser
from serving.adapters import AdapterStore, Base, describe_base
from serving.chat import Chat
from serving.engine import Engine, Finished, Request, Sampling, Stream
from serving.lora import AdapterWeights
from serving.swap import PinRefused, Swapper, SwapReport
from tests.spoilt import TEN

MAX_LEN = 64
LONG = Sampling(max_tokens=40, ignore_eos=True)
SHORT = Sampling(max_tokens=3, ignore_eos=True)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def chat() -> Chat:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    return Chat(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2"))


def weights(base: Base, seed: int, size: float = 0.4) -> AdapterWeights:
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        path: (torch.randn(2, inputs, generator=rng) * size, torch.randn(outputs, 2, generator=rng) * size)
        for path, (inputs, outputs) in base.targets.items()
    }
    return AdapterWeights(rank=2, scaling=0.5, tensors=tensors)


class Place:
    """A store, an engine and a swapper that looks when told to."""

    def __init__(self, root: Path) -> None:
        model = llama()
        self.base = describe_base(model, chat())
        self.engine = Engine(model, chat(), rows=16, max_len=MAX_LEN, seed=1)
        self.store = AdapterStore(root, "default")
        self.reports: list[SwapReport] = []
        self.swapper = self.new_swapper()

    def new_swapper(self, poll_s: float = 3600) -> Swapper:
        hear = self.reports.append
        return Swapper(self.store, self.engine, self.base, poll_s, hear, hear, hear)

    def publish(self, *, size: float = 0.4) -> int:
        seed = len(self.store.versions()) + 1
        return self.store.publish(weights(self.base, seed, size), parent=0, base=self.base)

    def promote(self, version: int) -> None:
        self.store.change("promote", "operator", version=version)

    def ship(self) -> int:
        version = self.publish()
        self.promote(version)
        return version

    def outcomes(self) -> list[tuple[int, str]]:
        """What was reported since the last time."""
        seen, self.reports[:] = [(report.version, report.outcome) for report in self.reports], []
        return seen

    def spoil(self, version: int) -> None:
        path = self.store.folder / f"v{version:06d}" / "adapter_model.safetensors"
        os.truncate(path, path.stat().st_size // 2)

    def of_another_base(self, version: int) -> None:
        manifest = self.store.folder / f"v{version:06d}" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"base": "f" * 64}))

    def begin(self, sampling: Sampling = LONG, version: int | None = None) -> Stream:
        """A reply that has said something and is not at its end."""
        stream = self.engine.submit(Request((1, 5, 9), sampling, version))
        if self.engine._thread is None:
            self.engine.step()
        return stream

    def speaks(self) -> int:
        return self.engine.generate([Request((1, 5, 9), SHORT)])[0].version

    def learns_from(self) -> int:
        """What a learner goes on from, which is to be what speaks."""
        log = SqliteLog(self.store.folder.parent / "log", [])
        try:
            return Releaser(self.store, self.base, log).speaks(self.store.release())
        finally:
            log.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "adapters")
    yield place
    place.swapper.close()
    place.engine.close()


# swapping


def test_nothing_released_is_the_base(place: Place):
    place.swapper.start()
    assert place.speaks() == 0
    assert place.swapper.problem is None


def test_start_returns_once_the_released_version_speaks(place: Place):
    place.ship()
    place.ship()
    place.swapper.start()
    assert place.speaks() == 2
    assert place.outcomes() == [(2, "activated")]


def test_a_promoted_version_speaks_and_the_old_one_goes(place: Place):
    place.ship()
    place.swapper.look()
    place.ship()
    place.swapper.look()
    assert place.speaks() == 2
    assert place.engine.loaded().keys() == {0, 2}
    assert place.outcomes() == [(1, "activated"), (2, "activated"), (1, "drained")]


def test_a_report_tells_the_seconds_of_each_phase(place: Place):
    place.ship()
    begin = time.perf_counter()
    place.swapper.look()
    whole = time.perf_counter() - begin
    (report,) = place.reports
    assert set(report.seconds) == {"load", "stage", "warm", "flip"}
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert sum(report.seconds.values()) <= whole


def test_a_reply_under_way_ends_on_the_version_it_began_with(place: Place):
    place.ship()
    place.swapper.look()
    old = place.begin()
    place.ship()
    place.swapper.look()
    new = place.begin()
    assert place.engine.loaded() == {0: 0, 1: 1, 2: 1}
    assert (old.result().version, new.result().version) == (1, 2)
    assert place.outcomes() == [(1, "activated"), (2, "activated")]
    place.swapper.look()
    assert place.outcomes() == [(1, "drained")]
    assert place.engine.loaded() == {0: 0, 2: 0}


def test_a_rollback_brings_the_old_version_back_even_while_it_drains(place: Place):
    place.ship()
    place.swapper.look()
    old = place.begin()
    place.ship()
    place.swapper.look()
    place.store.change("rollback", "operator")
    place.swapper.look()
    assert place.engine.current == 1
    assert place.speaks() == 1
    place.swapper.look()
    assert place.engine.loaded().keys() == {0, 1}
    assert old.result().version == 1
    time.sleep(0.05)
    place.ship()
    place.swapper.look()
    assert (place.reports[-1].version, place.reports[-1].outcome) == (1, "drained")
    assert place.reports[-1].seconds["drain"] < 0.05, "counted from the swap that sent it away at last"


def test_back_to_the_base(place: Place):
    place.ship()
    place.swapper.look()
    place.promote(0)
    place.swapper.look()
    assert place.speaks() == 0
    assert place.engine.loaded() == {0: 0}


def test_of_many_versions_at_once_only_the_newest_is_loaded(place: Place):
    for _ in range(5):
        place.ship()
    place.swapper.look()
    assert place.speaks() == 5
    assert place.outcomes() == [(5, "activated")]


def test_a_version_that_is_replaced_while_it_loads_is_left_out(place: Place, monkeypatch: pytest.MonkeyPatch):
    place.ship()
    second = place.publish()
    load = place.store.load

    def load_while_another_is_promoted(version: int, base: Base | None) -> AdapterWeights:
        loaded = load(version, base)
        monkeypatch.undo()
        place.promote(second)
        return loaded

    monkeypatch.setattr(place.store, "load", load_while_another_is_promoted)
    place.swapper.look()
    assert place.speaks() == 0
    place.swapper.look()
    assert place.speaks() == second
    assert place.outcomes() == [(second, "activated")]


def test_with_every_slot_draining_a_swap_waits_and_the_newest_comes_next(place: Place):
    streams = []
    for _ in range(4):
        place.ship()
        place.swapper.look()
        streams.append(place.begin())
    place.ship()
    place.swapper.look()
    place.ship()
    place.swapper.look()
    assert place.engine.current == 4
    assert place.swapper.failures == 0
    assert [stream.result().version for stream in streams] == [1, 2, 3, 4]
    place.swapper.look()
    assert place.speaks() == 6
    assert (5, "activated") not in place.outcomes()


def test_its_thread_finds_a_promotion_by_itself_and_ends_when_told(place: Place):
    place.engine.start()
    place.swapper = place.new_swapper(poll_s=0.01)
    place.swapper.start()
    place.ship()
    deadline = time.monotonic() + 20
    while place.engine.current != 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert place.speaks() == 1
    place.swapper.close()
    assert "swapper" not in [thread.name for thread in threading.enumerate()]


# what is bad changes nothing


def overwrite_release(place: Place) -> None:
    (place.store.folder / "release.json").write_text('{"policy": "defa')


def refusal(place: Place, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture) -> str:
    """Release a version, spoil it, and look a few times: why it is not served, counted and said once."""
    version, speaking, failures = place.ship(), place.engine.current, place.swapper.failures
    spoil(place.store.folder / f"v{version:06d}")
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            place.swapper.look()
    assert place.swapper.failures == failures + 1
    assert place.outcomes() == [(version, "failed")]
    why = place.swapper.problem or ""
    assert [record.message for record in caplog.records] == [f"v{version} is not served: {why} v{speaking} goes on."]
    return why.removeprefix(f"v{version}: ")


def test_ten_kinds_of_bad_versions_change_nothing_that_is_served(place: Place, caplog: pytest.LogCaptureFixture):
    """All of them in one engine, of fewer slots."""
    asked = [Request((1, 5, 9), Sampling(max_tokens=20, seed=seed, ignore_eos=True)) for seed in range(3)]
    place.ship()
    place.swapper.look()
    place.outcomes()
    before = place.engine.generate(asked)
    assert {reply.version for reply in before} == {1}
    said = {}
    for kind, (spoil, _) in TEN.items():
        said[kind] = refusal(place, spoil, caplog)
        assert place.engine.loaded() == {0: 0, 1: 0}
        assert place.engine.generate(asked) == before, kind
    for kind, why in said.items():
        assert [other for other, (_, message) in TEN.items() if re.search(message, why)] == [kind]
    good = place.ship()
    place.swapper.look()
    assert place.speaks() == good


@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda folder: (folder / "manifest.json").unlink()])
def test_a_version_that_is_gone_changes_nothing(
    spoil: Callable[[Path], object], place: Place, caplog: pytest.LogCaptureFixture
):
    place.ship()
    place.swapper.look()
    place.outcomes()
    assert "no such version of policy default; the store holds: v1." in refusal(place, spoil, caplog)
    assert place.speaks() == 1
    assert place.engine.loaded() == {0: 0, 1: 0}


def test_a_fault_that_passes_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.swap.RETRY_S", 0.05)
    real, faults = place.store.load, iter([OSError(24, "Too many open files"), TimeoutError("no step ended in 60 s")])

    def load(version: int, base: Base | None = None) -> AdapterWeights:
        fault = next(faults, None)
        if fault is not None:
            raise fault
        return real(version, base)

    place.ship()
    monkeypatch.setattr(place.store, "load", load)
    place.swapper.look()
    place.swapper.look()
    assert place.swapper.failures == 1  # not at once
    for _ in range(2):
        time.sleep(0.06)
        place.swapper.look()
    assert place.speaks() == 1
    assert place.swapper.problem is None


def test_a_version_that_is_there_can_be_named_during_a_slow_swap(place: Place):
    place.ship()
    place.swapper.look()
    with place.swapper._swapping:
        naming = threading.Thread(target=place.swapper.ensure, args=(1,), daemon=True)
        naming.start()
        naming.join(5)
        assert not naming.is_alive()


def test_an_adapter_that_makes_numbers_overflow_fails_its_probe(place: Place):
    place.ship()
    place.swapper.look()
    for failures in range(1, 6):  # its slot, of four, is free again each time
        place.promote(place.publish(size=1e30))
        place.swapper.look()
        assert place.speaks() == 1
        assert place.engine.loaded() == {0: 0, 1: 0}
        assert place.swapper.failures == failures
        assert "numbers that are not finite" in (place.swapper.problem or "")


def test_a_bad_version_is_tried_again_when_its_files_or_the_release_change(place: Place):
    version = place.ship()
    folder = place.store.folder / f"v{version:06d}"
    shutil.copytree(folder, folder.parent / "kept")
    place.spoil(version)
    place.swapper.look()
    assert place.swapper.failures == 1
    place.store.change("pause", "operator")
    place.swapper.look()
    assert place.swapper.failures == 2
    shutil.copy(folder.parent / "kept" / "adapter_model.safetensors", folder)
    place.swapper.look()
    assert place.speaks() == version
    assert place.swapper.problem is None


def test_an_error_nobody_foresaw_keeps_the_old_version_too(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room")

    place.ship()
    monkeypatch.setattr(place.engine, "stage", out_of_memory)
    place.swapper.look()
    assert place.speaks() == 0
    assert "MemoryError" in caplog.text, "with its traceback"


def test_a_broken_release_file_changes_nothing(place: Place):
    place.ship()
    place.swapper.look()
    overwrite_release(place)
    place.swapper.look()
    assert place.speaks() == 1
    assert place.swapper.failures == 0


def test_a_listener_that_fails_stops_no_swap(place: Place, caplog: pytest.LogCaptureFixture):
    def fail(_report: SwapReport) -> None:
        raise OSError("the board is away")

    place.swapper = Swapper(place.store, place.engine, place.base, on_activated=fail)
    place.ship()
    place.swapper.look()
    assert place.speaks() == 1
    assert "the board is away" in caplog.text


def test_at_start_a_bad_version_gives_way_to_the_last_good_one(place: Place, caplog: pytest.LogCaptureFixture):
    place.ship()
    place.ship()
    place.spoil(2)
    place.swapper.start()
    assert place.speaks() == place.learns_from() == 1
    assert "v2 cannot be served; v1 is served instead" in caplog.text
    assert place.outcomes() == [(2, "failed"), (1, "activated")]
    place.swapper.look()
    assert place.outcomes() == [], "not tried again before something changes"
    assert "v2" in (place.swapper.problem or "")


def test_at_start_with_nothing_good_the_base_speaks(place: Place, caplog: pytest.LogCaptureFixture):
    place.ship()
    place.ship()
    place.spoil(1)
    place.spoil(2)
    place.swapper.start()
    assert place.speaks() == place.learns_from() == 0
    assert "v2 cannot be served; v0 is served instead" in caplog.text


def test_versions_of_another_base_are_refused_and_the_base_speaks(place: Place):
    for _ in range(2):
        place.of_another_base(place.ship())
    place.swapper.start()
    assert place.speaks() == place.learns_from() == 0
    assert "made for another base" in (place.swapper.problem or "")


def test_after_a_version_of_another_base_the_last_good_one_speaks(place: Place):
    place.ship()
    place.of_another_base(place.ship())
    place.swapper.start()
    assert place.speaks() == place.learns_from() == 1


def test_a_base_that_was_promoted_speaks_whatever_was_good_before(place: Place):
    place.ship()
    place.promote(0)
    assert place.store.release().last_good == 1
    place.swapper.start()
    assert place.speaks() == place.learns_from() == 0


def test_at_start_a_broken_release_file_means_the_base(place: Place):
    place.ship()
    overwrite_release(place)
    place.store = AdapterStore(place.store.folder.parent, "default")
    place.swapper = place.new_swapper()
    place.swapper.start()
    assert place.speaks() == 0


# pins


def test_an_approved_version_can_be_named_and_stays_loaded(place: Place):
    place.ship()
    place.ship()
    place.swapper.look()
    place.swapper.ensure(1)
    assert place.begin(version=1).result().version == 1
    place.swapper.look()
    assert place.engine.loaded().keys() == {0, 1, 2}
    assert place.speaks() == 2


@pytest.mark.parametrize("version", [2, 3])
def test_a_version_that_nobody_approved_cannot_be_named(place: Place, version: int):
    place.ship()
    place.publish()
    place.swapper.look()
    with pytest.raises(PinRefused, match=rf"v{version} neither passed the gate nor was promoted; loaded now: v0, v1\."):
        place.swapper.ensure(version)


def test_a_bad_version_cannot_be_named(place: Place):
    place.ship()
    place.ship()
    place.spoil(1)
    place.swapper.look()
    with pytest.raises(PinRefused, match=r"v1 cannot be loaded: v1: .* has another digest"):
        place.swapper.ensure(1)


def test_the_base_and_the_current_version_can_always_be_named(place: Place):
    place.ship()
    place.swapper.look()
    place.swapper.ensure(0)
    place.swapper.ensure(1)
    assert place.engine.loaded().keys() == {0, 1}


def test_a_pin_displaces_the_pin_longest_unnamed_but_none_that_speaks(place: Place):
    for _ in range(5):
        place.ship()
    place.swapper.look()
    place.swapper.ensure(1)
    place.swapper.ensure(2)
    place.swapper.ensure(1)
    place.swapper.ensure(3)
    assert place.engine.loaded().keys() == {0, 1, 3, 5}
    speaking = [place.begin(version=1), place.begin(version=3)]
    with pytest.raises(PinRefused, match="v4 finds no free slot now; loaded now: v0, v1, v3, v5"):
        place.swapper.ensure(4)
    assert [stream.result().version for stream in speaking] == [1, 3]
    place.swapper.ensure(4)
    assert place.engine.loaded().keys() == {0, 3, 4, 5}


def test_a_swap_takes_the_slot_of_an_idle_pin_rather_than_wait(place: Place):
    for _ in range(3):
        place.ship()
    place.swapper.look()
    place.swapper.ensure(1)
    place.swapper.ensure(2)
    speaking = [place.begin(), place.begin(version=2)]
    place.ship()
    place.swapper.look()
    speaking.append(place.begin())
    place.ship()
    place.swapper.look()
    assert place.engine.loaded().keys() == {0, 2, 3, 4, 5}
    assert [stream.result().version for stream in speaking] == [3, 2, 4]
    assert place.speaks() == 5


def test_a_version_that_drains_can_be_named_again(place: Place):
    place.ship()
    place.swapper.look()
    speaking = place.begin()
    place.ship()
    place.swapper.look()
    place.swapper.ensure(1)
    speaking.result()
    place.swapper.look()
    assert place.begin(version=1).result().version == 1


# the promises


def full_forward(base_model: LlamaForCausalLM, reply: Finished, adapter: AdapterWeights | None) -> torch.Tensor:
    """Log-probs of a reply's ids by one forward of the base with scaling·B·A added to its weights."""
    modules = dict(base_model.named_modules())
    tensors = {} if adapter is None else adapter.tensors
    before = {path: modules[path].weight.detach().clone() for path in tensors}
    with torch.no_grad():
        for path, (a, b) in tensors.items():
            modules[path].weight += adapter.scaling_of(path) * (b @ a)
        ids = torch.tensor([reply.prompt_ids + reply.reply_ids])
        logprobs = base_model(ids).logits[0, len(reply.prompt_ids) - 1 : -1].log_softmax(-1)
        for path, weight in before.items():
            modules[path].weight.copy_(weight)
    return logprobs.gather(1, torch.tensor(reply.reply_ids)[:, None])[:, 0]


def test_twenty_swaps_under_twelve_talkers(place: Place):
    """Nothing is refused or broken, every reply is of one version, and its log-probs are that version's."""
    versions = [place.publish() for _ in range(5)]
    place.engine.start()
    place.swapper = place.new_swapper(poll_s=0.005)
    place.swapper.start()
    done = threading.Event()
    replies: list[Finished] = []

    def talk(number: int) -> None:
        rng = random.Random(number)
        while not done.is_set():
            prompt = tuple(rng.randrange(3, 32) for _ in range(rng.randrange(1, 9)))
            sampling = Sampling(max_tokens=rng.randrange(5, 40), ignore_eos=True)
            replies.append(place.engine.submit(Request(prompt, sampling, caller=str(number))).result(timeout=60))

    talkers = [threading.Thread(target=talk, args=(number,)) for number in range(12)]
    for talker in talkers:
        talker.start()
    for swap in range(20):
        wanted = versions[swap % 5]
        place.promote(wanted)
        deadline = time.monotonic() + 30
        while place.engine.current != wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        assert place.engine.current == wanted
        said = len(replies)
        while len(replies) < said + 6 and time.monotonic() < deadline:
            time.sleep(0.002)
    done.set()
    for talker in talkers:
        talker.join()
    assert place.swapper.failures == 0
    assert {reply.reason for reply in replies} == {"length"}
    assert {reply.version for reply in replies} >= set(versions)
    model = llama()
    adapters = {0: None} | {version: place.store.load(version, place.base) for version in versions}
    for reply in random.Random(0).sample(replies, min(len(replies), 150)):
        expected = full_forward(model, reply, adapters[reply.version])
        assert torch.allclose(torch.tensor(reply.raw_logprobs), expected, atol=1e-4)
        assert torch.allclose(torch.tensor(reply.logprobs), expected, atol=1e-4)
