"""The learner's loop, with real log, board, store and state, and a trainer that hands out ready-made adapters."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from feedback.board import RELEASE_HINT, WORK_HINT, Board, Story, furthest, open_board
from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK, RELEASES, Exchange, Feedback, Release, Retraction
from feedback.keeping import Keep
from feedback.log import LogUnavailable
from feedback.sqlite_log import SqliteLog
from learner import checkpoint, loop
from learner.board import LearnersBoard
from learner.checkpoint import Checkpoints
from learner.config import LearnerConfig
from learner.exhibits import Exhibits
from learner.judgement import Judgement
from learner.ledger import Ledger, Update
from learner.live import LiveReply
from learner.loop import Learner
from learner.metrics import LearnerMetrics
from learner.phases import Phases
from learner.release import Releaser
from learner.state import State
from learner.statefile import remove_state
from learner.stopping import Stopping
from learner.watching import Watcher
from serving.adapters import AdapterStore, Base
from serving.config import ServingConfig
from serving.lora import AdapterWeights
from tests.told import BASE, NOW, exchange, feedback, retraction

if TYPE_CHECKING:
    from tests.valkey import Valkey

TARGETS = {"layer.0": (4, 3), "layer.1": (3, 4)}


class Killed(BaseException):
    """Stands for kill -9 in one process: nothing after it runs, but what was written stays."""


@dataclass
class Check:
    name: str
    verdict: str
    value: float
    bound: float
    sentence: str


@dataclass
class Gate:
    passed: bool
    checks: list[Check]


@dataclass
class Candidate:
    weights: AdapterWeights
    report: dict[str, object]
    gate: Gate
    exhibits: Exhibits = field(default_factory=Exhibits)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass
class ReadyMade:
    """A trainer whose gate says what the test wants."""

    base: Base = field(default_factory=lambda: Base(BASE, TARGETS))
    passes: bool = True
    left_out: Mapping[str, str] = field(default_factory=dict)
    during: Callable[[], None] = lambda: None
    calls: list[dict[str, Any]] = field(default_factory=list)
    restored: dict[str, Any] | None = None

    def learn(
        self,
        judgements: Sequence[Judgement],
        prompts: Sequence[tuple[int, ...]],
        *,
        parent: AdapterWeights | None,
        seed: int,
        served: Sequence[LiveReply],
        progress: Callable[[str, float], None],
    ) -> Candidate:
        given = {"judgements": judgements, "prompts": prompts, "parent": parent, "seed": seed, "served": served}
        self.calls.append(given)
        for phase in ("reward", "rollouts", "ppo", "rollouts", "ppo", "gate"):
            progress(phase, 0.5)
            if phase == "ppo":
                self.during()
        rng = torch.Generator().manual_seed(seed)
        tensors = {
            path: (torch.randn(2, inputs, generator=rng), torch.randn(outputs, 2, generator=rng))
            for path, (inputs, outputs) in TARGETS.items()
        }
        verdict = "pass" if self.passes else "fail"
        checks = [
            Check("reward_model", verdict, 0.47, 0.5, "reward model knows too little: AUROC lower bound 0.47 ≤ 0.50.")
        ]
        report: dict[str, object] = {"reward": {"auroc": 0.6, "nll": float("nan")}, "seconds": {"ppo": 1.5}}
        return Candidate(AdapterWeights(2, 1.0, tensors), report, Gate(self.passes, checks), left_out=self.left_out)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"value": torch.ones(2) * len(self.calls)}, {"beta": 0.05}

    def restore(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        self.restored = {"tensors": tensors, "meta": meta}


class World:
    """One data folder, with a server's hands on it, and learners that come and go."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.now = NOW
        self.folder = folder
        feedback_config = FeedbackConfig(
            data=folder, join_wait_s=settings.pop("join_wait_s", 1000), redis_url=settings.pop("redis_url", None)
        )
        self.config = LearnerConfig(
            serving=ServingConfig(feedback=feedback_config),
            **{"update_min_feedback": 4, "update_interval_s": 100, **settings},
        )
        self.server_log = SqliteLog(folder / "log", [EXCHANGES, FEEDBACK])
        self.runner = asyncio.Runner()
        self.ask = self.runner.run
        self.server_board = self.new_board("server")
        self.store = AdapterStore(folder / "adapters", "default")
        self.trainer = ReadyMade()
        self.metrics = LearnerMetrics()
        self.said = 0
        self.open: list[Any] = []
        self.learner = self.new_learner()

    def new_learner(self) -> Learner:
        """Another process takes over: everything is opened anew."""
        self.close_learner()
        self.log = SqliteLog(self.folder / "log", [RELEASES])
        self.board = LearnersBoard(self.new_board("learner"))
        keep = Keep.of(self.config.state_keep_days, self.config.state_keep_mb)
        self.state = State(
            self.config.folder / "state.db",
            policy="default",
            base=self.trainer.base.fingerprint,
            keep=keep,
            weightless=self.config.weightless,
        )
        self.open = [self.log, self.board, self.state]
        self.learner = Learner(
            self.config,
            log=self.log,
            board=self.board,
            store=self.store,
            state=self.state,
            trainer=self.trainer,  # type: ignore[arg-type]
            metrics=self.metrics,
            stopping=Stopping(),
            clock=lambda: self.now,
        )
        return self.learner

    def new_board(self, owner: Literal["server", "learner"]) -> Board:
        return open_board(self.config.serving.feedback, owner)

    def close_learner(self) -> None:
        for thing in self.open:
            thing.close()
        self.open = []

    def close(self) -> None:
        self.close_learner()
        self.server_log.close()
        self.ask(self.server_board.close())
        self.runner.close()

    def tell(self, *events: Exchange | Feedback | Retraction) -> None:
        for event in events:
            self.server_log.append(EXCHANGES if isinstance(event, Exchange) else FEEDBACK, "key", event.to_json())

    def thumbs(self, count: int, version: int = 0, base: str = BASE) -> None:
        """So many replies, each with a thumb."""
        for _ in range(count):
            self.said += 1
            ids = (1, 2, self.said)
            self.tell(
                exchange(f"r{self.said}", version=version, base=base, prompt_ids=ids, at=self.now),
                feedback(f"f{self.said}", f"r{self.said}", value=self.said % 2, user=f"u{self.said % 3}", at=self.now),
            )

    def run(self) -> None:
        self.learner.run(until_idle=True)

    def report(self) -> dict[str, Any]:
        """As the server reads it for GET /v1/policy."""
        self.learner.report()
        report = self.ask(self.server_board.report("policy"))
        assert report is not None
        parsed: dict[str, Any] = json.loads(report)
        return parsed

    def story(self, feedback_id: str) -> list[Story]:
        return self.ask(self.server_board.story(feedback_id))

    def steps(self, feedback_id: str) -> list[str]:
        return [step.status for step in self.story(feedback_id)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def made(**settings: Any) -> World:
        worlds.append(World(tmp_path / f"data{len(worlds)}", **settings))
        return worlds[-1]

    yield made
    for world in worlds:
        world.close()


@pytest.fixture
def world(make: Callable[..., World]) -> World:
    return make()


def test_without_feedback_nothing_happens_and_the_report_says_so(world: World):
    world.run()
    assert world.trainer.calls == []
    report = world.report()
    assert report["why"] == "no feedback yet"
    assert report["last_update"] is None
    assert report["seen_at"] == NOW


def test_enough_thumbs_become_a_version_that_is_served(world: World):
    world.thumbs(3)
    world.run()
    assert world.trainer.calls == []
    assert world.report()["why"] == "3 of the 4 new judgements that start an update"

    world.thumbs(1)
    world.run()
    [call] = world.trainer.calls
    assert [judgement.feedback_id for judgement in call["judgements"]] == ["f1", "f2", "f3", "f4"]
    assert sorted(call["prompts"]) == [(1, 2, 1), (1, 2, 2), (1, 2, 3), (1, 2, 4)]
    assert call["parent"] is None
    release = world.store.release()
    assert (release.current, release.approved) == (1, (1,))
    assert release.changes[-1].by == "learner"
    manifest = world.store.manifest(1)
    assert (manifest.parent, manifest.update["number"]) == (0, 1)
    assert manifest.feedback == {"count": 4, "offsets": {EXCHANGES: 4, FEEDBACK: 4}, "left_out": {}}
    assert manifest.gate["passed"] is True
    assert world.steps("f1") == ["joined", "in_reward_model", "in_update", "in_version"]
    in_version = world.story("f1")[-1]
    assert (in_version.update, in_version.version) == (1, 1)
    saved = checkpoint.load(world.config.folder / "checkpoints")
    assert saved is not None
    assert saved.meta["trainer"] == {"beta": 0.05}
    report = world.report()
    assert report["why"] is None
    assert report["last_update"]["version"] == "v1"
    assert report["last_update"]["report"]["reward"] == {"auroc": 0.6, "nll": None}
    assert report["gate"]["checks"][0]["verdict"] == "pass"
    assert report["feedback"]["by_kind"] == {"thumb": 4}
    assert report["liked"] == {"v0": {"share": 0.5, "count": 4}}


def test_an_update_leaves_a_page_beside_its_version_or_where_it_was_refused(
    world: World, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    world.thumbs(4)
    world.run()
    page = world.store.page(1)
    assert "made v1 from the base" in page.read_text("utf-8")
    assert f"update 1: its report is {page}" in caplog.text
    world.trainer.passes = False
    world.thumbs(4, version=1)
    world.run()
    refused = world.config.folder / "reports" / "update-000002.html"
    assert "reward model knows too little" in refused.read_text("utf-8")
    assert stat.S_IMODE(refused.stat().st_mode) == 0o600
    assert f"update 2: its report is {refused}" in caplog.text


def test_neither_a_page_that_cannot_be_drawn_nor_who_watches_costs_an_update(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    class Broken(Watcher):
        def entered(self, phases: Phases) -> None:
            raise OSError(f"the disk is full in update {phases.number}")

    def broken(*_: object) -> str:
        raise ValueError("a number is none")

    monkeypatch.setattr(loop, "update_page", broken)
    world.learner.notices.watchers.append(Broken())
    world.thumbs(4)
    world.run()
    assert world.store.release().current == 1
    assert not world.store.page(1).exists()
    assert "no report can be made of it" in caplog.text
    assert "Broken is told nothing more" in caplog.text


def test_whoever_watches_is_told_of_phases_batches_and_the_end(world: World):
    told: list[object] = []

    class Watching(Watcher):
        def entered(self, phases: Phases) -> None:
            told.append(phases.phase)

        def batch(self, phases: Phases) -> None:
            told.append(phases.batches[-1])

        def learned(self, update: Update) -> None:
            told.append(update.number)

        def over(self) -> None:
            told.append("over")

    world.learner.notices.watchers = [Watching()]
    world.trainer.during = lambda: world.learner.progress("ppo", 0.5, {"score": 1.0})
    world.thumbs(4)
    world.run()
    assert told == ["reward", "rollouts", "ppo", {"score": 1.0}, {"score": 1.0}, "gate", 1, "over"]


def test_the_next_update_begins_from_what_is_served_and_learns_from_everything(world: World):
    world.thumbs(4)
    world.run()
    world.thumbs(4, version=1)
    world.run()
    first, second = world.trainer.calls
    assert len(second["judgements"]) == 8
    assert torch.equal(second["parent"].tensors["layer.0"][0], world.store.load(1, None).tensors["layer.0"][0])
    assert first["seed"] != second["seed"]
    assert world.store.manifest(2).parent == 1
    assert [step.version for step in world.story("f1") if step.status == "in_version"] == [1]
    assert [step.version for step in world.story("f8") if step.status == "in_version"] == [2]


def test_a_store_restored_from_an_older_copy_gives_no_number_twice(world: World, tmp_path: Path):
    kept = ("learner", "adapters")
    world.thumbs(4)
    world.run()
    for name in kept:
        shutil.copytree(world.folder / name, tmp_path / "copy" / name)
    world.thumbs(4, version=1)
    world.run()
    world.thumbs(4, version=2)
    world.run()
    assert world.store.release().current == 3  # which never spoke: that it was released the log alone will know
    judged = world.state.judgements()

    world.close_learner()
    for name in kept:
        shutil.rmtree(world.folder / name)
        (tmp_path / "copy" / name).rename(world.folder / name)
    world.store = AdapterStore(world.folder / "adapters", "default")
    world.new_learner()
    world.run()
    assert world.state.judgements() == judged  # the log went on where the copy ended
    assert world.store.versions() == [1, 4]
    assert world.store.release().current == 4


def test_only_of_feedback_that_was_used_a_story_says_so(world: World, monkeypatch: pytest.MonkeyPatch):
    world.trainer.left_out = {"f2": "duplicate"}
    world.trainer.passes = False
    world.thumbs(4)
    world.run()
    assert world.steps("f1") == ["joined", "in_reward_model", "in_update"]
    assert world.steps("f2") == ["joined"]
    world.trainer.left_out = {"f4": "contradictory"}
    world.trainer.passes = True
    monkeypatch.setattr(loop, "JUDGEMENTS", 6)  # which leaves no room for f1 and f2 any more
    world.thumbs(4)
    world.run()
    assert world.store.release().current == 1
    assert {f"f{n}": world.steps(f"f{n}")[1:] for n in range(1, 6)} == {
        "f1": ["in_reward_model", "in_update"],
        "f2": [],
        "f3": ["in_reward_model", "in_update", "in_version"],
        "f4": ["in_reward_model", "in_update"],
        "f5": ["in_reward_model", "in_update", "in_version"],
    }
    world.trainer.left_out = {}
    monkeypatch.undo()
    world.thumbs(4, version=1)
    world.run()
    assert [step.update for step in world.story("f2")[1:]] == [3, 3, 3]


def test_an_update_says_how_much_it_learned_from_and_not_how_much_there_was(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "JUDGEMENTS", 4)
    world.trainer.left_out = {"f3": "duplicate"}
    world.thumbs(5)
    world.run()
    assert world.store.manifest(1).feedback["count"] == 3
    assert world.store.release().changes[-1].reason == "update 1: 3 judgements, passed the gate"
    assert "<dt>Learned from</dt><dd>3</dd>" in world.store.page(1).read_text("utf-8")
    report = world.report()
    assert report["last_update"]["feedback"] == report["feedback"]["learned_from"] == 3
    assert report["feedback"]["not_learned_from"] == {"duplicate": 1, "surplus": 1}


def test_a_kill_between_store_and_ledger_makes_no_story_of_what_was_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        raise Killed

    world.trainer.left_out = {"f2": "duplicate"}
    world.thumbs(4)
    with monkeypatch.context() as here:
        here.setattr(Ledger, "published", killed)
        with pytest.raises(Killed):
            world.run()
    world.new_learner()
    world.run()
    assert len(world.trainer.calls) == 1
    assert "in_version" in world.steps("f1")
    assert world.steps("f2") == ["joined"]


def test_thumbs_on_an_aspect_that_weighs_nothing_start_no_update(make: Callable[..., World]):
    world = make(aspect_weights=("tone=0", "safe=2"))
    world.tell(exchange("r"), *(feedback(f"t{n}", "r", user=f"u{n}", aspect="tone") for n in range(4)))
    world.thumbs(3)
    world.run()
    assert world.trainer.calls == []
    assert world.report()["why"] == "3 of the 4 new judgements that start an update"
    world.tell(feedback("s", "r", aspect="safe"))
    world.run()
    assert len(world.trainer.calls) == 1


def test_after_the_interval_fewer_are_enough_but_never_none(make: Callable[..., World]):
    world = make(update_min_feedback=50)
    world.thumbs(20)
    world.run()
    assert world.trainer.calls == []
    world.now += 100
    world.run()
    assert len(world.trainer.calls) == 1
    world.now += 1000
    world.run()
    world.thumbs(19)
    world.run()
    assert len(world.trainer.calls) == 1
    assert world.report()["why"] == "19 of the 20 new judgements that start an update"
    world.thumbs(1)
    world.run()
    assert len(world.trainer.calls) == 2


def test_after_a_reward_model_that_knew_too_little_fewer_are_enough(make: Callable[..., World]):
    world = make(update_min_feedback=50)
    world.trainer.passes = False
    world.thumbs(50)
    world.run()
    assert len(world.trainer.calls) == 1
    world.thumbs(19)
    world.run()
    assert len(world.trainer.calls) == 1
    assert world.report()["why"].endswith("19 of the 20 new judgements that start an update")
    world.trainer.passes = True
    world.thumbs(1)
    world.run()
    assert len(world.trainer.calls) == 2
    world.thumbs(20)
    world.run()
    assert len(world.trainer.calls) == 2


def test_an_update_by_hand_needs_only_something_to_learn_from(world: World):
    world.ask(world.server_board.ask_update(world.now))
    world.run()
    assert world.trainer.calls == []
    world.now += 1
    world.thumbs(1)
    world.run()
    assert len(world.trainer.calls) == 1
    world.run()
    assert len(world.trainer.calls) == 1
    world.now += 1
    world.ask(world.server_board.ask_update(world.now))
    world.now += 1
    world.run()
    assert len(world.trainer.calls) == 2


def test_a_gate_that_says_no_ships_nothing_and_says_why(world: World):
    world.trainer.passes = False
    world.thumbs(4)
    world.run()
    world.run()
    assert len(world.trainer.calls) == 1
    assert world.store.versions() == []
    assert world.store.release() == Release()
    assert world.steps("f1") == ["joined", "in_reward_model", "in_update"]
    assert world.report()["why"] == (
        "the gate said no to update 1: reward model knows too little: AUROC lower bound 0.47 ≤ 0.50."
        " 0 of the 4 new judgements that start an update"
    )
    world.trainer.passes = True
    world.thumbs(4)
    world.run()
    assert world.store.release().current == 1
    assert [(step.status, step.update) for step in world.story("f1")][-2:] == [("in_update", 1), ("in_version", 2)]


def test_while_paused_it_listens_and_starts_nothing(world: World):
    world.store.change("pause", "operator", reason="holidays")
    world.thumbs(4)
    world.ask(world.server_board.ask_update(world.now))
    world.run()
    assert world.trainer.calls == []
    assert world.steps("f4") == ["joined"]
    assert world.report()["why"].startswith("paused by operator (holidays)")
    world.store.change("resume", "operator")
    world.run()
    assert world.store.release().current == 1


def test_a_pause_during_an_update_holds_its_version_back(world: World):
    world.trainer.during = lambda: world.store.change("pause", "operator") and None
    world.thumbs(4)
    world.run()
    world.run()
    assert world.store.versions() == [1]
    assert world.store.release().current == 0
    assert "in_version" not in world.steps("f1")
    world.new_learner()
    world.run()
    assert world.store.release().current == 0
    world.store.change("resume", "operator")
    world.run()
    assert world.store.release().current == 1
    assert len(world.trainer.calls) == 1
    assert world.steps("f1")[-1] == "in_version"


def test_a_release_changed_by_hand_during_an_update_keeps_what_the_hand_chose(world: World):
    world.thumbs(4)
    world.run()
    rolled_back = iter([True])
    world.trainer.during = lambda: next(rolled_back, None) and world.store.change("rollback", "operator") and None
    world.thumbs(4)
    world.run()
    assert world.store.versions() == [1, 2]
    assert world.store.release().current == 0
    assert world.report()["why"].startswith("v2 waits in the store: the release was changed by hand during update 2")
    world.thumbs(4)
    world.run()
    assert [call["parent"] is None for call in world.trainer.calls] == [True, False, True]
    assert [change.current for change in world.store.release().changes] == [1, 0, 3]
    assert [(step.status, step.version) for step in world.story("f8")][-1] == ("in_version", 3)


def test_a_trainer_that_breaks_ends_the_update_and_not_the_learner(world: World, caplog: pytest.LogCaptureFixture):
    def broken() -> None:
        raise RuntimeError("a matrix fell over")

    world.trainer.during = broken
    world.thumbs(4)
    with caplog.at_level(logging.ERROR):
        world.run()
        world.run()
    assert len(world.trainer.calls) == 1
    assert "a matrix fell over" in caplog.text
    assert world.report()["why"].startswith("update 1 failed")
    world.trainer.during = lambda: None
    world.thumbs(4)
    world.run()
    assert world.store.release().current == 1


def test_a_stop_during_an_update_is_prompt_and_the_update_runs_again(world: World):
    def stop() -> None:
        world.learner.stopping.set()

    world.trainer.during = stop
    world.thumbs(4)
    world.run()
    assert world.store.versions() == []
    world.trainer.during = lambda: None
    world.new_learner()
    world.run()
    assert len(world.trainer.calls) == 2
    assert world.store.manifest(1).update["number"] == 1
    assert world.store.release().current == 1


def test_feedback_that_comes_during_an_update_is_heard_and_left_for_the_next(world: World):
    def later() -> None:
        world.now += 2
        if world.said < 6:
            world.thumbs(1)

    world.trainer.during = later
    world.thumbs(4)
    seen: list[str] = []
    progress = world.learner.progress

    def watched(phase: str, fraction: float, batch: Mapping[str, float] | None = None) -> None:
        progress(phase, fraction, batch)
        seen.append(json.loads(world.ask(world.server_board.report("policy")) or "{}")["why"])

    world.learner.progress = watched  # type: ignore[method-assign]
    world.run()
    assert "training update 1 (rollouts 50%)" in seen
    assert len(world.trainer.calls) == 1
    assert world.steps("f6") == ["joined"]
    assert world.report()["why"] == "2 of the 4 new judgements that start an update"


KILLS: dict[str, tuple[type, str]] = {
    "begin": (Ledger, "begin"),
    "save": (Checkpoints, "save"),
    "publish": (AdapterStore, "publish"),
    "published": (Ledger, "published"),
    "change": (AdapterStore, "change"),
    "prune": (AdapterStore, "prune"),
    "released": (Ledger, "released"),
    "mirror": (Releaser, "mirror"),
    "mark told": (State, "mark_told"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", KILLS)
def test_a_kill_at_any_step_ships_exactly_once(world: World, monkeypatch: pytest.MonkeyPatch, what: str, when: str):
    owner, name = KILLS[what]
    real = getattr(owner, name)

    def deadly(*arguments: Any, **named: Any) -> Any:
        if when == "after":
            real(*arguments, **named)
        raise Killed

    world.thumbs(4)
    monkeypatch.setattr(owner, name, deadly)
    with pytest.raises(Killed):
        world.run()
    monkeypatch.undo()
    world.new_learner()
    world.run()
    assert world.store.versions() == [1]
    release = world.store.release()
    assert [(change.action, change.current) for change in release.changes] == [("promote", 1)]
    assert len(world.trainer.calls) <= 2
    if what in ("published", "change", "released", "prune"):
        assert len(world.trainer.calls) == 1
    assert set(world.steps("f1")) == {"joined", "in_reward_model", "in_update", "in_version"}
    assert world.report()["feedback"]["by_status"] == {"joined": 4}
    mirrored = [Release.model_validate_json(record.event) for record in world.log.read(RELEASES, {}, 100)]
    assert [change.generation for one in mirrored for change in one.changes] == [1]


def test_a_full_disk_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    real, failures = AdapterStore.publish, iter([OSError(28, "No space left on device")])

    def full(*arguments: Any, **named: Any) -> int:
        for failure in failures:
            raise failure
        return real(*arguments, **named)

    monkeypatch.setattr(AdapterStore, "publish", full)
    world.thumbs(4)
    with caplog.at_level(logging.INFO):
        world.run()
    assert world.store.release().current == 1
    assert "No space left on device" in caplog.text
    assert "what was away is back" in caplog.text


def test_a_log_that_is_away_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch):
    real, failures = SqliteLog.read, iter([LogUnavailable("the log is away"), LogUnavailable("the log is away")])

    def away(*arguments: Any) -> Any:
        for failure in failures:
            raise failure
        return real(*arguments)

    world.thumbs(4)
    monkeypatch.setattr(SqliteLog, "read", away)
    world.run()
    assert world.store.release().current == 1


def test_a_log_that_ends_before_what_is_learned_is_refused(world: World, monkeypatch: pytest.MonkeyPatch):
    world.thumbs(4)
    world.run()
    monkeypatch.setattr(SqliteLog, "end", lambda _, topic: {topic: 1})
    with pytest.raises(LogUnavailable, match=r"restored from a copy.*--rebuild"):
        world.learner.intake.absorb()


def test_an_emptied_board_is_told_everything_again(world: World):
    world.thumbs(4)
    world.run()
    world.tell(retraction("f1"))
    world.run()
    before = {feedback_id: world.steps(feedback_id) for feedback_id in ("f1", "f4")}
    assert furthest(world.story("f1")) == "retracted"
    world.close_learner()
    for path in (world.folder / "board").glob("learner.db*"):
        path.unlink()
    world.new_learner()
    assert world.steps("f1") == []
    world.run()
    assert {feedback_id: world.steps(feedback_id) for feedback_id in ("f1", "f4")} == before


@pytest.fixture
def shared(make: Callable[..., World], valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose board is in Redis, which may take its time where the machine is busy."""
    monkeypatch.setattr("feedback.redis_board.TIMEOUT_S", 5.0)
    return make(redis_url=valkey.url)


def test_a_redis_that_was_restarted_empty_is_told_everything_again(shared: World, valkey: Valkey):
    shared.thumbs(4)
    shared.run()
    shared.ask(shared.server_board.activated(1, NOW))
    shared.run()
    before = {feedback_id: shared.steps(feedback_id) for feedback_id in ("f1", "f4")}
    assert before["f1"][-1] == "served"
    reported = shared.report()
    valkey.kill()
    shared.run()
    valkey.start()
    give_up = time.monotonic() + 20
    while {feedback_id: shared.steps(feedback_id) for feedback_id in before} != before:
        assert time.monotonic() < give_up
        time.sleep(0.1)
        shared.run()
    assert shared.report()["feedback"] == reported["feedback"]


@pytest.mark.parametrize("emptied", [False, True])
def test_what_redis_could_not_take_is_told_when_it_can_and_the_learning_goes_on(
    shared: World, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, emptied: bool
):
    shared.run()
    valkey.fill()
    if emptied:
        valkey.flush()
    again: list[None] = []
    monkeypatch.setattr(State, "tell_all_again", lambda _: again.append(None))
    shared.thumbs(4)
    for _ in range(3):
        shared.run()
    assert shared.store.release().current == 1
    assert len(again) == emptied  # while it takes nothing, not at each look
    assert shared.steps("f1") == []
    valkey.make_room()
    shared.run()
    assert shared.steps("f1") == ["joined", "in_reward_model", "in_update", "in_version"]


def test_a_release_wakes_the_servers_and_feedback_wakes_the_learner(
    shared: World, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("learner.loop.POLL_S", 60.0)
    hints = shared.new_board("server")
    assert not shared.ask(hints.wait_for_hint(RELEASE_HINT, 0.2))

    def rate_then_stop() -> None:
        time.sleep(1)
        shared.thumbs(4)
        valkey.command("PUBLISH", f"heed:default:hint:{WORK_HINT}", "")
        while not shared.store.release().current:
            time.sleep(0.05)
        shared.learner.stopping.set()
        valkey.command("PUBLISH", f"heed:default:hint:{WORK_HINT}", "")

    rater = threading.Thread(target=rate_then_stop)
    rater.start()
    begin = time.monotonic()
    shared.learner.run()
    rater.join()
    assert time.monotonic() - begin < 30
    assert shared.ask(hints.wait_for_hint(RELEASE_HINT, 5))
    shared.ask(hints.close())


def test_a_state_made_anew_from_the_log_knows_what_the_versions_learned_from(world: World):
    world.thumbs(4)
    world.run()
    world.thumbs(3, version=1)
    world.run()
    before = world.state.digest()
    made_anew(world)
    world.run()
    assert world.state.digest() == before
    assert len(world.trainer.calls) == 1
    report = world.report()
    assert report["why"] == "3 of the 4 new judgements that start an update"
    assert report["last_update"]["version"] == "v1"
    world.thumbs(1)
    world.run()
    assert world.store.manifest(2).update["number"] == 2


def made_anew(world: World) -> None:
    """`heed learn --rebuild`."""
    world.close_learner()
    (world.config.folder / "state.db").unlink()
    world.new_learner()


def test_a_state_made_anew_knows_what_the_updates_left_out(world: World):
    world.trainer.left_out = {"f1": "duplicate", "f2": "contradictory"}
    world.thumbs(4)
    world.run()
    world.trainer.left_out = {"f1": "duplicate"}
    world.thumbs(4, version=1)
    world.run()
    known = {"f1": [], "f2": [2, 2, 2], "f3": [1, 1, 1]}
    assert {one: [step.update for step in world.story(one)[1:]] for one in known} == known
    made_anew(world)
    world.run()
    assert {one: [step.update for step in world.story(one)[1:]] for one in known} == known
    assert world.report()["feedback"]["not_learned_from"] == {"duplicate": 1}


def with_base(world: World, base: str) -> ReadyMade:
    """The learner is started with this base."""
    world.trainer = ReadyMade(base=Base(base, TARGETS))
    world.new_learner()
    return world.trainer


def test_another_base_learns_anew_and_from_all_feedback_at_once(world: World):
    world.thumbs(4)
    world.run()
    before, told = world.state.digest(), world.steps("f1")
    trainer = with_base(world, "another base")
    world.run()
    [call] = trainer.calls
    assert trainer.restored is None
    assert (call["parent"], call["prompts"]) == (None, [])
    assert [one.feedback_id for one in call["judgements"]] == ["f1", "f2", "f3", "f4"]
    assert all(one.reply.words.text == "there" for one in call["judgements"])
    manifest = world.store.manifest(2)
    assert (manifest.parent, manifest.base, manifest.update["number"]) == (0, "another base", 2)
    assert "made v2 from the base" in world.store.page(2).read_text("utf-8")
    assert world.report()["last_update"]["parent"] == "v0"
    assert (world.store.release().current, world.store.release().last_good) == (2, 1)
    assert (world.state.digest(), world.steps("f1")) == (before, told)
    assert world.report()["feedback"]["not_learned_from"] == {}
    world.new_learner()
    world.run()
    assert len(trainer.calls) == 1

    world.thumbs(4, version=2, base="another base")
    world.run()
    assert (len(trainer.calls[1]["judgements"]), len(trainer.calls[1]["prompts"])) == (8, 4)
    assert trainer.calls[1]["parent"] is not None
    assert world.store.manifest(3).parent == 2


def test_the_base_before_goes_on_where_it_was(world: World):
    world.thumbs(4)
    world.run()
    digest = world.state.digest()
    with_base(world, "another base")
    world.run()
    world.thumbs(3, version=2, base="another base")
    world.run()
    trainer = with_base(world, BASE)
    world.run()
    assert trainer.calls == []
    assert world.report()["why"] == "3 of the 4 new judgements that start an update"
    world.thumbs(1)
    world.run()
    [call] = trainer.calls
    assert [one.reply.words is None for one in call["judgements"]] == [True] * 4 + [False] * 3 + [True]
    assert world.store.release().current == 3
    assert world.state.digest() != digest
    anew = State(world.folder / "anew.db", policy="default", base=BASE)
    while anew.absorb(
        world.log.read(EXCHANGES, anew.offsets(), 99) + world.log.read(FEEDBACK, anew.offsets(), 99), NOW
    ):
        pass
    assert anew.digest() == world.state.digest()
    anew.close()


def test_on_return_to_a_base_it_goes_on_from_the_version_that_its_server_speaks(make: Callable[..., World]):
    world = make(live_share=0.25)
    world.thumbs(4)
    world.run()
    with_base(world, "another base")
    world.run()
    assert world.store.release().current == 2
    trainer = with_base(world, BASE)
    world.thumbs(4, version=1)
    world.run()
    [call] = trainer.calls
    assert call["parent"] is not None
    assert [one.behind for one in call["served"]] == [0] * 4 + [1] * 4
    assert (world.store.release().current, world.store.manifest(3).parent) == (3, 1)
    assert world.report()["last_update"]["parent"] == "v1"
    assert "made v3 from v1" in world.store.page(3).read_text("utf-8")


def test_a_base_that_was_only_tried_makes_nothing_new(world: World):
    world.thumbs(4)
    world.run()
    world.config = world.config.model_copy(update={"update_min_feedback": 5})
    tried = with_base(world, "another base")
    world.run()
    assert tried.calls == []
    assert world.report()["feedback"]["new"] == 4
    trainer = with_base(world, BASE)
    world.run()
    assert trainer.calls == []
    assert world.report()["feedback"]["new"] == 0


def test_a_state_made_anew_on_another_base_knows_what_that_ones_versions_learned_from(world: World):
    world.thumbs(4)
    world.run()
    with_base(world, "another base")
    world.run()
    made_anew(world)
    world.run()
    assert len(world.trainer.calls) == 1
    assert world.report()["last_update"]["number"] == 2


def test_a_state_made_anew_for_another_base_repeats_no_number(world: World):
    world.thumbs(4)
    world.run()
    world.trainer = ReadyMade(base=Base("another base", TARGETS))
    made_anew(world)
    world.run()
    assert [world.store.manifest(version).update["number"] for version in world.store.versions()] == [1, 2]


def test_an_update_of_another_base_that_a_kill_cut_short_after_its_version_was_made_keeps_its_number(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        raise Killed

    world.thumbs(4)
    with monkeypatch.context() as here:
        here.setattr(Ledger, "published", killed)
        with pytest.raises(Killed):
            world.run()
    with_base(world, "another base")
    world.run()
    assert [world.store.manifest(version).update["number"] for version in world.store.versions()] == [1, 2]
    assert world.store.release().current == 2
    assert {step.update for step in world.story("f1")[1:]} == {2}
    with_base(world, BASE)
    world.run()
    assert (world.learner.ledger[1].status, world.learner.ledger[1].version) == ("passed_over", 1)


def test_an_update_that_a_kill_cut_short_is_done_by_the_next_base(world: World):
    def killed() -> None:
        raise Killed

    world.trainer.during = killed
    world.thumbs(4)
    with pytest.raises(Killed):
        world.run()
    trainer = with_base(world, "another base")
    world.run()
    assert len(trainer.calls) == 1
    assert (world.store.manifest(1).base, world.store.manifest(1).update["number"]) == ("another base", 1)


def test_what_waits_for_a_resumed_release_is_passed_over_by_another_base(world: World):
    world.trainer.during = lambda: world.store.change("pause", "operator") and None
    world.thumbs(4)
    world.run()
    assert world.store.release().current == 0
    trainer = with_base(world, "another base")
    world.store.change("resume", "operator")
    world.run()
    assert len(trainer.calls) == 1
    assert world.learner.ledger[1].status == "passed_over"
    assert "made for another base" in (world.learner.ledger[1].why or "")
    assert world.store.release().current == 2


def test_a_restart_goes_on_from_the_checkpoint(world: World):
    world.thumbs(4)
    world.run()
    world.new_learner()
    world.run()
    assert world.trainer.restored is not None
    assert world.trainer.restored["meta"] == {"beta": 0.05}
    assert world.trainer.restored["tensors"]["value"].tolist() == [1.0, 1.0]


def test_a_checkpoint_that_does_not_fit_is_done_without(world: World, monkeypatch: pytest.MonkeyPatch):
    world.thumbs(4)
    world.run()

    def refuse(*_: object) -> None:
        raise ValueError("another rank")

    monkeypatch.setattr(ReadyMade, "restore", refuse)
    world.new_learner()
    world.thumbs(4)
    world.run()
    assert world.store.release().current == 2


def test_every_change_of_the_release_is_mirrored_once(world: World):
    world.thumbs(4)
    world.run()
    world.store.change("pause", "operator")
    world.store.change("resume", "operator")
    world.run()
    world.new_learner()
    world.store.change("rollback", "operator", reason="people frown")
    world.run()
    mirrored = [Release.model_validate_json(record.event) for record in world.log.read(RELEASES, {}, 100)]
    changes = [(change.generation, change.action, change.by) for one in mirrored for change in one.changes]
    assert changes == [
        (1, "promote", "learner"),
        (2, "pause", "operator"),
        (3, "resume", "operator"),
        (4, "rollback", "operator"),
    ]
    assert mirrored[-1].current == 0


def test_feedback_is_given_up_only_when_its_exchange_is_nowhere(make: Callable[..., World]):
    world = make(join_wait_s=50)
    world.tell(feedback("old", "r1", at=NOW - 100), feedback("lost", "nowhere", at=NOW - 100))
    world.run()
    assert world.steps("lost") == []  # no exchange was ever seen: the log may be away
    world.tell(exchange("r1"))
    world.run()
    assert world.steps("old") == ["joined"]
    assert [(step.status, step.reason) for step in world.story("lost")] == [("dropped", "no_exchange")]
    assert world.report()["feedback"]["dropped"] == {"no_exchange": 1}


def test_feedback_whose_exchange_comes_late_is_joined_and_its_story_says_so(make: Callable[..., World]):
    world = make(join_wait_s=50)
    world.tell(exchange("r"), feedback("late", "in an outbox", at=NOW - 100))
    world.run()
    assert world.steps("late") == ["dropped"]
    world.now += 3600
    world.tell(exchange("in an outbox", at=NOW - 200))
    world.run()
    assert world.steps("late") == ["dropped", "joined"]
    assert furthest(world.story("late")) == "joined"
    counts = world.report()["feedback"]
    assert (counts["late"], counts["dropped"], counts["learned_from"]) == (1, {}, 1)
    text = world.metrics.text().decode()
    assert 'heed_feedback_fates{fate="late"} 1.0' in text
    # a counter that fell would read as one that began anew
    assert 'heed_feedback_dropped_total{reason="no_exchange"} 1.0' in text


def test_what_grows_old_leaves_the_state_while_the_learner_runs(make: Callable[..., World]):
    world = make(join_wait_s=50, state_keep_days=1)
    world.thumbs(2)
    world.run()
    world.now += 86_400 - 40
    world.thumbs(1)
    world.run()
    assert world.report()["feedback"]["learned_from"] == 3
    world.now += 100
    world.run()
    assert world.report()["feedback"]["learned_from"] == 1
    assert world.report()["feedback"]["dropped"] == {"too_old": 2}
    assert 'heed_feedback_dropped_total{reason="too_old"} 2.0' in world.metrics.text().decode()
    assert world.state.prompts(10) == [(1, 2, 3)]


def test_nothing_leaves_the_state_before_the_log_is_read_to_its_end(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
):
    world = make(join_wait_s=50, state_keep_days=1)
    world.thumbs(1)
    world.run()
    world.now += 200_000
    monkeypatch.setattr("learner.intake.BATCH", 1)
    for number in range(3):
        world.tell(exchange(f"e{number}", at=world.now))
    while world.learner.intake.absorb():
        if world.learner.intake.lag(world.log.end(EXCHANGES)):
            assert world.state.db.execute("SELECT count(*) FROM exchanges WHERE reply_id = 'r1'").fetchone() == (1,)
    assert world.state.db.execute("SELECT count(*) FROM exchanges WHERE reply_id = 'r1'").fetchone() == (0,)


def test_freshness_is_measured_from_when_the_server_serves(world: World):
    world.thumbs(4)
    world.run()
    assert world.report()["freshness"] == {"p50": None, "p95": None, "count": 0}
    world.ask(world.server_board.activated(1, NOW + 12))
    world.now += 20
    world.run()
    assert world.report()["freshness"] == {"p50": 12.0, "p95": 12.0, "count": 4}
    assert world.steps("f1")[-1] == "served"
    assert b"heed_freshness_seconds_count 4.0" in world.metrics.text()


def test_everything_a_learner_counts_is_a_number_from_the_start():
    samples = [sample for family in LearnerMetrics(kl_limit=2.5).registry.collect() for sample in family.samples]
    samples = [sample for sample in samples if not sample.name.endswith("_created")]  # a learner shows none
    assert {sample.name: sample.value for sample in samples if sample.value} == {"heed_kl_limit_nats": 2.5}

    def labels(name: str) -> set[str]:
        return {",".join(sample.labels.values()) for sample in samples if sample.name == name}

    assert labels("heed_updates_total") == {"released", "refused", "failed", "passed_over"}
    assert labels("heed_update_seconds_count") == {"reward", "rollouts", "ppo", "gate"}
    assert labels("heed_learner_offset_lag") == {"heed.exchanges", "heed.feedback"}
    assert labels("heed_gate_checks_total") >= {"kl,pass", "reward_model,fail", "probes,skipped", "no_worse,pass"}
    bounds = {sample.labels["le"] for sample in samples if sample.name == "heed_freshness_seconds_bucket"}
    assert {"5.0", "3600.0", "604800.0"} <= bounds


def test_a_restart_does_not_look_like_a_rise_by_all_that_there_ever_was(make: Callable[..., World]):
    world = make(join_wait_s=50)
    names = ("heed_feedback_dropped_total", "heed_feedback_fates")

    def shown() -> dict[tuple[str, str], float]:
        samples = [sample for family in world.metrics.registry.collect() for sample in family.samples]
        return {(one.name, *one.labels.values()): one.value for one in samples if one.name in names}

    assert shown() == {}  # what was counted stands in the state, which nobody has read yet
    world.tell(exchange("r"), feedback("unknown", "nowhere", at=NOW - 100))
    world.run()
    world.report()
    before = shown()
    assert {label for name, label in before if name == names[0]} == {
        *("no_exchange", "too_old", "conflict", "malformed", "newer_schema"),
    }
    assert {label for name, label in before if name == names[1]} == {
        *("pending", "joined", "superseded", "retracted", "duplicate", "late"),
    }
    assert before["heed_feedback_dropped_total", "no_exchange"] == 1
    world.metrics = LearnerMetrics()
    world.new_learner()
    assert shown() == {}
    world.run()
    world.report()
    assert shown() == before


def test_the_metrics_count_every_fate(make: Callable[..., World]):
    world = make(join_wait_s=50, update_min_feedback=100, state_keep_days=1)
    world.tell(
        exchange("r"),
        feedback("joined", "r", user="ann"),
        feedback("joined", "r", user="ann"),
        feedback("joined", "r", user="ann", value=0, at=NOW + 1),
        feedback("superseded", "r", user="bob"),
        feedback("superseding", "r", user="bob", value=0),
        feedback("retracted", "r", user="cy"),
        retraction("retracted"),
        feedback("pending", "q"),
        feedback("unknown", "nowhere", at=NOW - 100),
        feedback("too old", "r", at=NOW - 100_000),
        feedback("malformed", "r", value=0.5),
    )
    world.server_log.append(FEEDBACK, "key", '{"schema": 99}')
    world.run()
    world.learner.report()
    text = world.metrics.text().decode()
    for reason in ("no_exchange", "too_old", "conflict", "malformed", "newer_schema"):
        assert f'heed_feedback_dropped_total{{reason="{reason}"}} 1.0' in text
    counts = {"pending": 1, "joined": 2, "superseded": 1, "retracted": 1, "duplicate": 1, "late": 0}
    for fate, count in counts.items():
        assert f'heed_feedback_fates{{fate="{fate}"}} {count}.0' in text


def test_the_metrics_tell_of_the_update(world: World):
    world.thumbs(4)
    world.tell(feedback("f1", "r1", value=0, body="another"))
    world.run()
    text = world.metrics.text().decode()
    for line in (
        'heed_updates_total{outcome="released"} 1.0',
        'heed_update_seconds_count{phase="ppo"} 1.0',
        'heed_gate_checks_total{check="reward_model",verdict="pass"} 1.0',
        'heed_feedback_dropped_total{reason="conflict"} 1.0',
        'heed_learner_offset_lag{topic="heed.feedback"} 0.0',
        "heed_reward_auroc 0.6",
        "heed_reward_nll_nats 0.0",
    ):
        assert line in text


def test_the_metrics_say_how_many_judgements_wait_and_how_many_start_an_update(make: Callable[..., World]):
    world = make(update_min_feedback=30)
    value = world.metrics.registry.get_sample_value
    world.thumbs(3)
    world.run()
    world.report()
    assert (value("heed_judgements_waiting"), value("heed_judgements_due")) == (3, 30)
    world.now += 101  # the interval is over, and 20 are enough
    world.report()
    assert (value("heed_judgements_waiting"), value("heed_judgements_due")) == (3, 20)
    world.thumbs(17)
    world.run()
    world.report()
    assert (value("heed_judgements_waiting"), value("heed_judgements_due")) == (0, 30)
    assert value("heed_last_update_timestamp_seconds") == world.now


def gauges(metrics: LearnerMetrics) -> dict[str, float]:
    """What does not count up, and was set."""
    families = [family for family in metrics.registry.collect() if family.type == "gauge"]
    samples = [sample for family in families for sample in family.samples if sample.value]
    return {sample.name: sample.value for sample in samples if not sample.labels}


def test_another_learner_shows_what_the_one_before_it_showed(world: World):
    world.thumbs(4)
    world.run()
    world.trainer.passes = False
    world.now += 5
    world.thumbs(4)
    world.run()
    world.report()
    shown = gauges(world.metrics)
    assert {"heed_reward_auroc", "heed_last_update_timestamp_seconds", "heed_judgements_due"} <= set(shown)
    world.metrics = LearnerMetrics()
    world.new_learner()
    world.run()
    assert gauges(world.metrics) == shown


def test_a_state_made_anew_shows_what_its_versions_came_from(world: World):
    world.thumbs(4)
    world.run()
    world.close_learner()
    remove_state(world.config.folder / "state.db")
    world.metrics = LearnerMetrics()
    world.new_learner()
    world.run()
    assert gauges(world.metrics)["heed_reward_auroc"] == 0.6


def test_an_update_whose_learner_was_killed_before_it_told_of_it_is_shown(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        raise Killed

    world.thumbs(4)
    with monkeypatch.context() as here:
        here.setattr(Ledger, "published", killed)
        with pytest.raises(Killed):
            world.run()
    world.metrics = LearnerMetrics()
    world.new_learner()
    world.run()
    value = world.metrics.registry.get_sample_value
    assert value("heed_reward_auroc") == 0.6
    assert value("heed_updates_total", {"outcome": "released"}) == 1
    assert value("heed_gate_checks_total", {"check": "reward_model", "verdict": "pass"}) == 1
