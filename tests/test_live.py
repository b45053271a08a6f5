"""Live replies as experience: which may serve, what their tokens count, and what people said of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from learner import ppo
from learner.live import LARGEST_WEIGHT, STALEST, Live, LiveReply, served
from learner.model import Batch
from learner.rollouts import Rollout
from learner.state import State
from tests.test_update import PROMPTS, SMALL, improver
from tests.told import BASE, POLICY, exchange, records

REPLY = LiveReply((1, 2), (3, 4), ended=True, logprobs=(-1.0, -2.0), behind=0, full_support=True)


def live(*replies: LiveReply, surprise: dict[tuple[tuple[int, ...], tuple[int, ...]], float] | None = None) -> Live:
    return Live.of(replies, surprise or {}, room=8, max_len=12, eos_ids={0}, seed=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"full_support": False}, "support"),
        ({"logprobs": (-1.0,)}, "support"),
        ({"behind": STALEST + 1}, "stale"),
        ({"behind": -1}, "stale"),
        ({"reply_ids": (3,) * 9, "logprobs": (-1.0,) * 9}, "length"),
        ({"reply_ids": (), "logprobs": ()}, "length"),
        ({"prompt_ids": (1,) * 11}, "length"),
        ({"ended": False}, "cut"),
        ({"reply_ids": (3, 0, 4, 0), "logprobs": (-1.0,) * 4}, "cut"),
    ],
)
def test_what_may_not_serve_is_counted_by_reason(changes: dict[str, object], reason: str) -> None:
    found = live(dataclasses.replace(REPLY, **changes))
    assert found.rejected == {reason: 1}
    assert found.draw(5, lambda _: []) == []


def test_a_reply_serves_once_and_as_it_was() -> None:
    found = live(REPLY, dataclasses.replace(REPLY, reply_ids=(5, 6), behind=STALEST))
    first = found.draw(1, lambda taken: [one.logprobs for one in taken])
    second = found.draw(5, lambda taken: [one.logprobs for one in taken])
    assert {one.reply_ids for one in (*first, *second)} == {(3, 4), (5, 6)}
    assert all(one.logprobs == (-1.0, -2.0) and one.ended for one in (*first, *second))
    assert found.draw(5, lambda taken: [one.logprobs for one in taken]) == []
    told = {"used": 2, "share": 0.25, "effective": 2.0, "staleness": STALEST / 2, "rejected": {}}
    assert found.report(replies=8) == told


@pytest.mark.parametrize("factor", [1.3, 1 / 1.3])
def test_a_reply_that_the_policy_would_not_say_any_more_is_rejected_whole(factor: float) -> None:
    found = live(REPLY)
    assert found.draw(1, lambda _: [[p + math.log(factor) for p in REPLY.logprobs]]) == []
    assert found.rejected == {"ratio": 1}


def test_a_reply_whose_tokens_moved_either_way_serves() -> None:
    assert len(live(REPLY).draw(1, lambda _: [[-1.0 + 0.5, -2.0 - 0.5]])) == 1


def test_a_token_counts_by_how_likely_it_became_and_twice_at_most() -> None:
    prox_BT = torch.tensor([[math.log(0.3), math.log(0.9), float("nan")]])
    behaviour_BT = torch.tensor([[math.log(0.6), math.log(0.1), 0.0]])
    mask_BT = torch.tensor([[True, True, False]])
    weights_BT = ppo.staleness_weight(prox_BT, behaviour_BT, mask_BT, LARGEST_WEIGHT)
    assert weights_BT[0].tolist() == pytest.approx([0.5, 2.0, 1.0])


def test_what_people_said_counts_for_those_who_said_nothing() -> None:
    """Of four replies two are rated: each one's surprise counts twice, so that the mean over all is what it would be."""
    others = [dataclasses.replace(REPLY, reply_ids=(9, place)) for place in range(3)]
    key = (REPLY.prompt_ids, REPLY.reply_ids)
    found = live(REPLY, *others, surprise={key: 0.4, (REPLY.prompt_ids, (9, 0)): -0.1})
    assert found.said(Rollout(*key, True, ())) == pytest.approx(0.8)
    assert found.said(Rollout(REPLY.prompt_ids, (9, 0), True, ())) == pytest.approx(-0.2)
    assert found.said(Rollout(REPLY.prompt_ids, (9, 1), True, ())) == 0.0


def test_only_what_was_served_with_full_support_comes_from_the_state(tmp_path) -> None:
    with_state = State(tmp_path / "state.db", policy=POLICY, base=BASE)
    said = [
        exchange("a", version=2, at=1.0),
        exchange("b", version=1, at=2.0, source="imported"),
        exchange("c", version=1, at=3.0, base="another"),
        exchange("d", version=1, at=4.0),
    ]
    cut = said[3].model_copy(update={"sampling": said[3].sampling.model_copy(update={"top_p": 0.9})})
    with_state.absorb(records(*said[:3], cut), now=5.0)
    found = served(with_state, 10, current=3)
    with_state.close()
    assert [(one.behind, one.full_support, one.logprobs) for one in found] == [
        (2, False, (-0.5, -0.5)),
        (1, True, (-0.5, -0.5)),
    ]


def test_beside_fresh_replies_it_learns_from_them_as_if_they_were() -> None:
    """Replies that the policy itself said a moment ago, as live ones: the same experience, but for the figures."""
    found = improver(dataclasses.replace(SMALL, live_share=0.25))
    rollouts = found.collector.sampler.sample(PROMPTS, found.policy.weights(), 0)
    plain = found.collector.look_at(rollouts)
    fresh, last = rollouts[:-2], rollouts[-2:]
    found.collector.live = live()
    mixed = found.collector.look_at(fresh, last)
    torch.testing.assert_close(mixed.advantages_BT, plain.advantages_BT, rtol=1e-3, atol=1e-4)
    assert mixed.figures["live"] == 2
    assert mixed.figures["kl"] == pytest.approx(found.collector.look_at(fresh).figures["kl"], abs=1e-6)


def test_at_most_its_share_of_a_batch_is_live() -> None:
    found = improver(dataclasses.replace(SMALL, live_share=0.25))
    rollouts = found.collector.sampler.sample(PROMPTS * 9, found.policy.weights(), 0)
    said = [LiveReply(one.prompt_ids, one.reply_ids, one.ended, one.logprobs, 0, True) for one in rollouts]
    found.collector.live = Live.of(
        said, {}, room=10, max_len=500, eos_ids=found.collector.sampler.engine.chat.eos_ids, seed=0
    )
    report = found.run(PROMPTS, lambda *_: None)
    assert all(batch.get("live", 0) <= 0.25 * SMALL.rollouts for batch in report.batches)
    assert report.batches[0]["live"] == int(0.25 * SMALL.rollouts)
    told = found.collector.live.report(replies=len(report.batches) * SMALL.rollouts)
    assert told["used"] == sum(batch.get("live", 0) for batch in report.batches)
    assert told["share"] == told["used"] / (len(report.batches) * 32) > 0
    assert told["staleness"] == 0.0


def test_what_is_only_looked_at_keeps_no_graph() -> None:
    found = improver()
    batch = Batch.of(found.collector.sampler.sample(PROMPTS, None, 0))

    def learns() -> list[bool]:
        return [on for _, on in found.steps.each(lambda *_: torch.is_grad_enabled(), batch)]

    assert all(learns())
    with torch.no_grad():
        assert not any(learns())


def test_an_objective_that_compares_replies_to_one_prompt_takes_none() -> None:
    found = improver(dataclasses.replace(SMALL, objective="rloo", live_share=0.25))
    found.collector.live = live(REPLY)
    assert found.collector.draw_live() == []
