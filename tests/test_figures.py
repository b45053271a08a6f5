"""Which numbers of an update's report become gauges."""

from __future__ import annotations

from typing import Any

from learner.figures import figures

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


def test_what_a_report_does_not_say_is_not_shown_but_that_no_live_reply_was_used():
    found = figures({"reward": {"auroc": 0.5}, "policy": {"batches": []}})
    assert found == {"heed_reward_auroc": 0.5, "heed_live_staleness_versions": 0.0, "heed_live_replies_ratio": 0.0}
    assert "heed_reward_nll_nats" not in figures(REPORT)
