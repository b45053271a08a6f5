"""Rankings, corrections, signals and aspects reach the reward model, and move its score the right way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from feedback.events import Exchange, Feedback
from learner.config import LearnerConfig
from learner.crossfit import CrossFit, RewardConfig
from learner.judgement import Judgement, Words
from learner.prepare import prepare
from learner.reward import RewardModel
from learner.state import State
from learner.trainer import Trainer
from learner.update import Round
from serving.config import ServingConfig
from tests import bases
from tests.test_reward import EOS, NICE, embeddings, judgement, no_states, reference, reply, sample, thumbs
from tests.told import NOW, exchange, feedback, records


def pairs(count: int, seed: int = 3) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A reply with the nice token, and the same without."""
    rng = random.Random(seed)
    plain = [ids for ids in (reply(rng) for _ in range(9 * count)) if NICE not in ids][:count]
    return [((*ids[:-2], NICE, EOS), ids) for ids in plain]


def of_kind(kind: str) -> list[Judgement]:
    """People who like the nice token, and say so in this way only."""
    made = []
    for n, (nice, plain) in enumerate(pairs(60)):
        good, bad, user = sample(2 * n, nice, n % 20), sample(2 * n + 1, plain, n % 20), f"u{n % 12}"
        if kind == "ranking":
            third = sample(1000 + n, (plain[-2], *plain[1:-2], plain[0], EOS), n % 20)
            made.append(replace(judgement(n, kind, 1.0, good, user, bad), ranked=(good, bad, third)))
        elif kind == "correction":
            made.append(judgement(n, kind, 1.0, good, user, bad))
        else:
            made.append(replace(judgement(n, "signal", 1.0, good, user), feedback_id=f"s{n}", signal=kind))
            made.append(judgement(n, "rating", 3.0, bad, user))  # the plain one was seen as well
    return prepare(made, _not_asked).judgements if kind not in ("ranking", "correction") else made


def _not_asked(words: Words) -> NoReturn:
    raise AssertionError(f"there is nothing to encode here, but {words}")


def gap(judgements: Sequence[Judgement], **settings: Any) -> float:
    """By how much the score likes fresh replies with the nice token better than those without."""
    model = RewardModel(embeddings(), {EOS}, replace(RewardConfig(), **settings))
    model.fit(judgements, reference(), seed=0)
    nice, plain = zip(*((sample(1, nice), sample(2, plain)) for nice, plain in pairs(40, seed=11)), strict=True)
    return float(model.score(nice).mean() - model.score(plain).mean())


@pytest.mark.parametrize(
    ("kind", "sign"), [("ranking", 1), ("correction", 1), ("copied", 1), ("clicked", 1), ("regenerated", -1)]
)
def test_each_kind_alone_moves_the_score_the_right_way(kind: str, sign: int) -> None:
    assert sign * gap(of_kind(kind)) > 1.0


def test_thumbs_say_which_way_a_dwell_speaks() -> None:
    judged = [
        replace(one, feedback_id=f"d{n}", kind="signal", signal="dwell", value=float(NICE not in one.reply.reply_ids))
        for n, one in enumerate(thumbs(200, noise=0.0))
    ]
    fit = CrossFit(embeddings(), {EOS}, [*thumbs(200), *judged], no_states, RewardConfig(), 0, lambda _: None)
    assert all(float(member.links.slope("signal:dwell")) < -0.3 for member in fit.members)


def test_an_aspect_that_has_nothing_to_do_with_the_whole_gets_a_small_slope() -> None:
    rng = random.Random(1)
    safe = [replace(one, feedback_id=f"s{n}", aspect="safe") for n, one in enumerate(thumbs(150, noise=0.0))]
    odd = [replace(one, aspect="odd", value=float(rng.random() < 0.5)) for one in safe]
    fit = CrossFit(embeddings(), {EOS}, [*thumbs(150), *safe, *odd], no_states, RewardConfig(), 0, lambda _: None)
    for member in fit.members:
        assert float(member.links.slope("thumb:odd")) < 0.5 * float(member.links.slope("thumb:safe"))


def test_an_aspect_counts_by_its_weight() -> None:
    """Overall people like the nice token, on the aspect they dislike it: it depends on the weight who is heard."""
    against = [
        replace(one, feedback_id=f"a{n}", aspect="brief", value=1 - one.value)
        for n, one in enumerate(thumbs(100, noise=0.0))
    ]
    said = [*thumbs(100, noise=0.0), *against]
    assert gap(prepare(said, _not_asked, {"brief": 0.1}).judgements) > 1.0
    assert gap(prepare(said, _not_asked, {"brief": 10.0}).judgements) < -1.0


# From the log into the reward model


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("base")
    bases.llama().save_pretrained(folder)
    bases.byte_tokenizer().save_pretrained(folder)
    settings: dict[str, Any] = {"rollout_tokens": 12, "gate_samples": 48, "aspect_weights": ("tone=0", "safe=2")}
    return Trainer(LearnerConfig(serving=ServingConfig(model=str(folder)), **settings))


def events(trainer: Trainer, count: int = 24) -> list[Exchange | Feedback]:
    """For each of some prompts three replies of this model, and what people said of them in all new ways."""
    told: list[Exchange | Feedback] = []
    for n in range(count):
        text = f"say {n}"
        prompt_ids = tuple(trainer.chat.encode([bases.message(text)]))
        ids = [one.reply_ids for one in trainer.sampler.sample([prompt_ids] * 3, None, n)]
        about = {"prompt": text, "prompt_ids": prompt_ids, "base": trainer.base.fingerprint}
        told += [exchange(f"{n}:{i}", reply_ids=reply_ids, **about) for i, reply_ids in enumerate(ids)]
        user, at = f"u{n % 8}", NOW + n
        told += [
            feedback(f"ranking {n}", f"{n}:1", f"{n}:0", f"{n}:2", kind="ranking", user=user, at=at),
            feedback(f"correction {n}", f"{n}:0", kind="correction", text="Hello, thank you!", user=user, at=at),
            feedback(f"signal {n}", f"{n}:1", kind="signal", signal="copied", value=None, user=user, at=at),
            feedback(f"aspect {n}", f"{n}:0", aspect="safe", value=n % 2, user=user, at=at),
            feedback(f"weightless {n}", f"{n}:0", aspect="tone", user=user, at=at),
            feedback(f"comment {n}", f"{n}:0", kind="comment", text="well", user=user, at=at),
            feedback(f"thumb {n}", f"{n}:2", value=n % 2, user=user, at=at),
        ]
    return told


def test_feedback_of_every_kind_posted_to_the_log_reaches_the_reward_model(trainer: Trainer, tmp_path: Path) -> None:
    with closing(State(tmp_path / "state.db", policy="default", base=trainer.base.fingerprint)) as state:
        state.absorb(records(*events(trainer)), NOW)
        judgements, prompts = state.judgements(), state.prompts(100)
    round_ = Round(trainer, judgements, prompts, None, 0, (), lambda *_: None)
    report = round_.fit_reward()
    assert report.judgements == {"ranking": 24, "correction": 24, "signal": 24, "thumb": 48}
    assert set(report.unseen) == {"thumb", "thumb:safe", "ranking", "correction", "signal:copied"}
    assert round_.report["feedback"] == {"given": 144, "of_other_bases": 0, "dropped": {"aspect": 24}}
    edited, original = zip(
        *((one.reply, one.other) for one in round_.judgements if one.kind == "correction"), strict=True
    )
    assert {trainer.chat.decode(one.reply_ids) for one in edited} == {"Hello, thank you!"}
    assert all(one.reply_ids[-1] in trainer.chat.eos_ids for one in edited)
    assert float(trainer.reward.score(edited).mean()) > float(trainer.reward.score(original).mean()) + 1
