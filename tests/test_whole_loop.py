"""The whole loop on one data folder: people chat and rate over HTTP, the learner learns, the server speaks better.

Everything is real: the built-in model, the server, the log, the trainer. Only the settings are small.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from feedback.board import open_board
from feedback.events import RELEASES, Release
from feedback.log import open_log
from feedback.raters import Rater, crowd
from learner.board import LearnersBoard
from learner.config import LearnerConfig
from learner.loop import Learner
from learner.metrics import LearnerMetrics
from learner.state import State
from learner.stopping import Stopping
from learner.trainer import Trainer
from serving.adapters import AdapterStore
from serving.config import ServingConfig
from serving.model import find_model
from tests.served import Served, config_for, served

PROMPTS: list[str] = json.loads((Path(__file__).parent.parent / "serving" / "tiny" / "prompts.json").read_text())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    """A server of the built-in model."""
    with served(config_for(tmp_path / "data", find_model(None), max_rows=16)) as server:
        yield server


@contextlib.contextmanager
def learner_on(server: Served, **settings: Any) -> Iterator[Learner]:
    """A learner on the server's data folder, as `heed learn` makes it."""
    serving: ServingConfig = server.wiring.config
    small = {"rollouts": 48, "minibatch": 24, "update_batches": 8, "gate_samples": 64, "rollout_tokens": 64}
    config = LearnerConfig(serving=serving, **{**small, "update_min_feedback": 60, **settings})
    trainer = Trainer(config)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(open_log(serving.feedback, writes={RELEASES})))
        board = LearnersBoard(open_board(serving.feedback, "learner"))
        stack.callback(board.close)
        state = State(config.folder / "state.db", policy=serving.feedback.policy, base=trainer.base.fingerprint)
        stack.enter_context(contextlib.closing(state))
        yield Learner(
            config,
            log=log,
            board=board,
            store=AdapterStore(serving.adapter_root, serving.feedback.policy),
            state=state,
            trainer=trainer,
            metrics=LearnerMetrics(),
            stopping=Stopping(),
        )


def talk_and_rate(server: Served, count: int, opinion: Callable[[Rater, str, str], bool | None]) -> list[str]:
    """So many replies, each rated by one of 20 people; the receipts' ids."""
    people = crowd("exclaiming", 20, noise=0.1)

    def one(number: int) -> str | None:
        prompt, rater = PROMPTS[number % 100], people[number % len(people)]
        reply = server.chat(prompt, max_tokens=80, user=rater.user).json()
        value = opinion(rater, prompt, reply["choices"][0]["message"]["content"])
        if value is None:
            return None
        thumb = {"kind": "thumb", "reply_id": reply["id"], "value": "up" if value else "down", "user": rater.user}
        answer = server.http.post("/v1/feedback", json=thumb)
        assert answer.status_code == 202
        return str(answer.json()["id"])

    with ThreadPoolExecutor(8) as pool:
        return [receipt for receipt in pool.map(one, range(count)) if receipt is not None]


def policy(server: Served) -> dict[str, Any]:
    parsed: dict[str, Any] = server.http.get("/v1/policy").json()
    return parsed


def test_thumbs_become_a_version_that_speaks(server: Served):
    receipts = talk_and_rate(server, 120, lambda rater, prompt, reply: rater.thumb(prompt, reply))
    with learner_on(server) as learner:
        learner.run(until_idle=True)
        report = policy(server)
        assert report["why"] is None, report
        assert report["current"] == "v1"
        assert report["last_update"]["version"] == "v1"
        server.until(lambda: policy(server)["speaking"] == "v1")

        reply = server.chat(PROMPTS[0]).json()
        assert reply["model"] == "default@v1"
        learner.run(until_idle=True)
        learner.report()

    story = server.http.get(f"/v1/feedback/{receipts[0]}").json()
    assert story["status"] == "served"
    statuses = [step["status"] for step in story["history"]]
    assert statuses == ["accepted", "joined", "in_reward_model", "in_update", "in_version", "served"]
    report = policy(server)
    assert report["freshness"]["count"] == 120
    assert 0 < report["freshness"]["p50"] <= report["freshness"]["p95"]
    assert report["feedback"]["by_kind"] == {"thumb": 120}
    assert report["liked"]["v0"]["count"] == 120
    with contextlib.closing(open_log(server.wiring.config.feedback, writes=())) as log:
        [mirrored] = [Release.model_validate_json(record.event) for record in log.read(RELEASES, {}, 10)]
    assert mirrored.current == 1


def test_feedback_that_is_all_the_same_ships_nothing_and_says_why(server: Served):
    talk_and_rate(server, 60, lambda *_: True)
    with learner_on(server) as learner:
        learner.run(until_idle=True)
        assert AdapterStore(server.wiring.config.adapter_root, "default").versions() == []
    report = policy(server)
    assert report["current"] == "v0"
    assert report["why"].startswith("the gate said no to update 1")
    assert report["gate"]["passed"] is False
