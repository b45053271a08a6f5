"""Which numbers of an update's report become gauges."""

from __future__ import annotations

from typing import Any

from learner.figures import figures
from learner.metrics import LearnerMetrics

REPORT: dict[str, Any] = {
    "reward": {"auroc": 0.7, "nll": None, "top_rater_share": 0.08},
    "policy": {
        "batches": [
            {"score": 0.1, "clipped": 0.02, "moved": 0.001, "entropy": 2.0},
            {"score": 0.4, "clipped": 0.05, "moved": 0.004, "entropy": 1.8},
            {"score": 0.5, "entropy": 1.7},
        ]
    },
    "live": {"used": 6, "staleness": 1.5, "share": 0.125},
}


def test_of_the_batches_the_last_that_has_a_figure_is_shown():
    found = figures(REPORT)
    assert (found["heed_ppo_score"], found["heed_ppo_entropy_nats"]) == (0.5, 1.7)
    assert (found["heed_ppo_clip_fraction"], found["heed_ppo_approximate_kl_nats"]) == (0.05, 0.004)
    assert (found["heed_reward_auroc"], found["heed_rater_weight_top_share"]) == (0.7, 0.08)
    assert (found["heed_live_staleness_versions"], found["heed_live_replies_ratio"]) == (1.5, 0.125)


def test_what_a_report_does_not_say_stays_as_it_was_but_live_replies_which_were_none():
    assert figures({"reward": {"auroc": 0.5, "nll": None}, "policy": {"batches": []}}) == {"heed_reward_auroc": 0.5}
    metrics = LearnerMetrics()
    value = metrics.registry.get_sample_value
    metrics.show(REPORT)
    assert (value("heed_ppo_score"), value("heed_live_replies_ratio")) == (0.5, 0.125)
    metrics.show({"reward": {"auroc": 0.5}})
    assert (value("heed_reward_auroc"), value("heed_ppo_score")) == (0.5, 0.5)
    assert value("heed_live_replies_ratio") == value("heed_live_staleness_versions") == 0
