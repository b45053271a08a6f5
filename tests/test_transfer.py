"""Ratings outlive the base: what people said of one model's replies teaches the next, which has other tokens and another shape.

Everything is real: two models, the log, the learner, the server. Only the settings are small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback.config import FeedbackConfig
from feedback.events import EXCHANGES, FEEDBACK, Exchange, Feedback
from feedback.log import open_log
from feedback.raters import crowd
from learner.config import LearnerConfig
from learner.prepare import NOBODYS
from learner.state import State
from learner.trainer import Trainer
from learner.update import Round
from serving.adapters import AdapterStore, describe_base
from serving.chat import Chat
from serving.config import ServingConfig
from serving.engine import Engine, Request
from serving.model import find_model, load_model
from serving.sampling import Sampling
from tests.bases import message
from tests.served import config_for, random_adapter, served
from tests.test_whole_loop import PROMPTS, learner_on, policy
from tests.told import NOW, exchange, feedback

JUDGED, CUT = 120, 5


@pytest.fixture(scope="module")
def replies() -> list[tuple[str, str, bool]]:
    """Prompts, replies with words enough to have a taste about, and whether they came to their end."""
    model, chat = load_model(find_model(None), "cpu", "float32")
    engine = Engine(model, chat, rows=40, max_len=256)
    asked = [PROMPTS[n % 100] for n in range(JUDGED)]
    said = engine.generate(
        [
            Request(tuple(chat.encode([message(prompt)])), Sampling(1.0, max_tokens=6 if n < CUT else 64, seed=n))
            for n, prompt in enumerate(asked)
        ]
    )
    return [(prompt, chat.decode(one.reply_ids), one.reason == "stop") for prompt, one in zip(asked, said, strict=True)]


@pytest.fixture
def data(tmp_path: Path, model_folder: Path, replies: list[tuple[str, str, bool]]) -> Path:
    """A data folder as a learner on the first base leaves it: all feedback learned from, v1 released."""
    data = tmp_path / "data"
    store = AdapterStore(data / "adapters", "default")
    model, chat = load_model(str(model_folder), "cpu", "float32")
    base = describe_base(model, chat, str(model_folder))
    with contextlib.closing(open_log(FeedbackConfig(data=data), writes={EXCHANGES, FEEDBACK})) as log:
        for event in said(chat, base.fingerprint, replies):
            log.append(EXCHANGES if isinstance(event, Exchange) else FEEDBACK, event.id, event.to_json())
        offsets = {topic: offset for topic in (EXCHANGES, FEEDBACK) for topic, offset in log.end(topic).items()}
    learned = {"count": JUDGED + 2, "offsets": offsets}
    store.publish(random_adapter(base), parent=0, base=base, feedback=learned, update={"number": 7})
    store.change("promote", "learner", version=1, base=base)
    return data


def said(chat: Chat, base: str, replies: list[tuple[str, str, bool]]) -> Iterator[Exchange | Feedback]:
    """Every reply as this base would have given it, with a thumb; one that the next base cannot hold, and a comparison."""
    people = crowd("exclaiming", 20, noise=0.1)
    for number, (prompt, reply, ended) in enumerate([*replies, ("Tell me all.", "And then? " * 900, True)]):
        prompt_ids, reply_ids = chat.encode_answered([message(prompt)], reply)
        yield exchange(
            f"r{number}",
            base=base,
            version=1,
            prompt=prompt,
            reply=reply,
            prompt_ids=tuple(prompt_ids),
            reply_ids=tuple(reply_ids),
            finish_reason="stop" if ended else "length",
            at=NOW + number,
        )
        rater = people[number % len(people)]
        value = rater.thumb(prompt, reply)
        yield feedback(f"f{number}", f"r{number}", value=float(value or 0), user=rater.user, at=NOW + number)
    yield feedback("pair", "r0", "r100", kind="preference", user="ann")
    yield feedback("copied", "r1", kind="signal", signal="copied")


def test_what_was_said_of_another_bases_replies_is_learned_in_ones_own_tokens(
    data: Path, replies: list[tuple[str, str, bool]]
):
    trainer = Trainer(LearnerConfig(serving=ServingConfig(feedback=FeedbackConfig(data=data)), gate_samples=48))
    chat = trainer.chat
    with contextlib.closing(State(data / "state.db", policy="default", base=trainer.base.fingerprint)) as state:
        with contextlib.closing(open_log(FeedbackConfig(data=data), writes=())) as log:
            state.absorb([*log.read(EXCHANGES, {}, 999), *log.read(FEEDBACK, {}, 999)], NOW)
        judgements = state.judgements()
        assert state.prompts(9) == []
    round_ = Round(trainer, judgements, [], None, 0, (), lambda *_: None)
    assert round_.report["feedback"]["dropped"] == {"unusable": 1}
    said = [one for one in round_.judgements if one.feedback_id != NOBODYS]
    assert round_.report["feedback"]["of_other_bases"] == len(said) == JUDGED + 2
    by_id = {one.reply.reply_id: one.reply for one in round_.judgements}
    assert [chat.decode(by_id[f"r{n}"].reply_ids) for n in range(JUDGED)] == [reply for _, reply, _ in replies]
    assert [by_id[f"r{n}"].reply_ids[-1] in chat.eos_ids for n in range(JUDGED)] == [ended for *_, ended in replies]
    assert [ended for *_, ended in replies][:CUT] == [False] * CUT
    assert set(round_.prompts) == {tuple(chat.encode([message(prompt)])) for prompt, *_ in replies}
    report = round_.fit_reward()
    assert report.auroc is not None
    assert report.auroc - 2 * report.auroc_error > 0.5


def test_a_new_base_learns_from_old_ratings_at_once_and_speaks(data: Path, model_folder: Path):
    with served(config_for(data, model_folder)) as server, learner_on(server) as learner:
        learner.run(until_idle=True)
        assert policy(server)["speaking"] == "v1"
        assert learner.store.versions() == [1]
        digest = learner.state.digest()

    with served(config_for(data, find_model(None), max_rows=16)) as server, learner_on(server) as learner:
        assert policy(server)["speaking"] == "v0"
        learner.run(until_idle=True)
        report = policy(server)
        assert report["why"] is None, report
        assert (report["current"], report["last_update"]["version"]) == ("v2", "v2")
        assert report["last_update"]["report"]["feedback"]["of_other_bases"] == JUDGED + 2
        manifest = learner.store.manifest(2)
        assert (manifest.base, manifest.parent) == (learner.trainer.base.fingerprint, 0)
        server.until(lambda: policy(server)["speaking"] == "v2")
        assert server.chat(PROMPTS[0]).json()["model"] == "default@v2"
        assert learner.state.digest() == digest

    with served(config_for(data, model_folder)) as server, learner_on(server) as learner:
        assert policy(server)["speaking"] == "v1"
        learner.run(until_idle=True)
        assert learner.store.versions() == [1, 2]
        assert (learner.state.digest(), learner.state.judgement_count(fresh=True)) == (digest, 0)
