"""benchmarks/gold.py: a policy that people like less is found out, finished updates are kept, and the plot is drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import gold
from benchmarks.gold_plot import gain, gap, plot
from learner.config import LearnerConfig
from learner.crossfit import RewardConfig
from learner.gate import Check, GateReport
from learner.judgement import Judgement
from learner.rollouts import Prompt
from learner.steps import POLICY
from learner.trainer import Trainer
from learner.update import Candidate
from serving.lora import AdapterWeights

Json = gold.Json


@dataclass
class Planted:
    """Stands in for the learner's rounds: random adapters, each as large and as welcome to the gate as it is told."""

    size: Sequence[float]
    passes: Sequence[bool]
    heard: list[int] = field(default_factory=list)
    parents: list[AdapterWeights | None] = field(default_factory=list)

    def learn(
        self, trainer: Trainer, judgements: Sequence[Judgement], prompts: Sequence[Prompt], *, parent: Any, seed: int
    ) -> Candidate:
        number = seed % 1000 - 1
        self.heard.append(len(judgements))
        self.parents.append(parent)
        trainer.reward.fit(judgements, trainer.sampler.sample(prompts, None, seed), seed)
        policy = trainer.model.adapter(POLICY)
        policy.reset(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for up_Or in policy.up:
                up_Or.normal_(0, self.size[number])
        kl = trainer.mean_kl(trainer.sampler.sample(prompts, policy.weights(), seed))
        check = Check("kl", "pass" if self.passes[number] else "fail", None, None, "")
        return Candidate(policy.weights(), {"reward": {"auroc": None}, "kl": {"reference": kl}}, GateReport.of([check]))


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    trainer = Trainer(LearnerConfig(rollouts=16, gate_samples=16, rollout_tokens=32))
    trainer.reward.config = RewardConfig(folds=2, penalties=(1.0,))
    return trainer


@pytest.fixture
def plant(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Any:
    def planted(size: Sequence[float], passes: Sequence[bool]) -> Planted:
        learner = Planted(size, passes)
        monkeypatch.setattr(Trainer, "learn", lambda trainer, *given, **named: learner.learn(trainer, *given, **named))
        monkeypatch.setattr(gold, "Trainer", lambda _: trainer)
        monkeypatch.setattr(gold, "REPLIES", 1)
        monkeypatch.setattr(gold, "THUMBS", 8)
        return learner

    return planted


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, updates: int) -> str:
    """What the command ends with, for one seed."""
    given = ["gold", "--seed", "1", "--updates", str(updates), "--results", str(folder / "gold.jsonl")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        gold.main()
    return str(ended.value.code or "")


def rows_of(folder: Path) -> list[Json]:
    return [{name: row[name] for name in row if name != "wall_s"} for row in gold.read(folder / "gold.jsonl")]


def test_a_policy_that_people_like_less_ends_the_command_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    plant(size=[0.0, 1.0, 1.0], passes=[True, True, False])
    said = run(monkeypatch, tmp_path, 3)
    base, same, collapsed, kept = rows_of(tmp_path)
    assert (same["gold"], same["kl"], same["proxy"]) == (base["gold"], 0.0, 0.0)
    assert collapsed["gold"] < base["gold"] / 2
    assert collapsed["kl"] > 2
    assert [kept[name] for name in ("served", "gold", "kl")] == [2, collapsed["gold"], collapsed["kl"]]
    assert kept["refused"] == ["kl"]
    assert [line.partition(":")[0] for line in said.splitlines()] == ["seed 1, update 2", "seed 1, update 3"]
    assert f"gold is {collapsed['gold']:.3f}, below its start of {base['gold']:.3f}" in said


def test_a_run_cut_short_goes_on_where_it_was_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    whole = plant(size=[0.01, 0.02, 0.03], passes=[True, False, True])
    run(monkeypatch, tmp_path / "whole", 3)
    assert whole.heard == [8, 16, 24]
    assert [row["served"] for row in rows_of(tmp_path / "whole")] == [0, 1, 1, 3]
    assert whole.parents[0] is None
    for parent in whole.parents[1:]:  # what was refused changed nothing
        assert float(next(iter(parent.tensors.values()))[1].std()) == pytest.approx(0.01, rel=0.1)

    cut = plant(size=[0.01, 0.02, 0.03], passes=[True, False, True])
    run(monkeypatch, tmp_path / "cut", 1)
    (tmp_path / "cut/gold/seed-1/thumbs-2.json").write_text("[{")  # killed while it wrote
    run(monkeypatch, tmp_path / "cut", 3)
    assert cut.heard == whole.heard
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    heard = [json.loads((tmp_path / f"cut/gold/seed-1/thumbs-{n}.json").read_text()) for n in (1, 2, 3)]
    assert [{thumb["version"] for thumb in thumbs} for thumbs in heard] == [{0}, {1}, {1}]


def test_what_was_not_measured_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, 0) == "1"
    assert "0 of 30 updates made" in capsys.readouterr().out
    assert not (tmp_path / "gold.jsonl").exists()


def row(seed: int, update: int, gold: float, proxy: float = 0.0, released: bool = True) -> Json:
    return {
        "seed": seed, "update": update, "gold": gold, "error": 0.03, "proxy": proxy, "released": released and update > 0,
        "satisfied": gold, "facts": 1.0, "kl": 1.0,
    }  # fmt: skip


def test_a_small_fall_is_a_fall_and_its_depth_is_said() -> None:
    assert list(gold.faults([row(0, 0, 0.30), row(0, 1, 0.30), row(0, 2, 0.5)])) == []
    [said] = gold.faults([row(0, 0, 0.30), row(0, 1, 0.29), row(1, 0, 0.2), row(1, 1, 0.29)])
    assert said.startswith("seed 0, update 1: gold is 0.290, below its start of 0.300 by 0.2 standard errors")


def test_thirty_updates_that_bring_nothing_are_no_success() -> None:
    rows = [row(0, update, 0.3) for update in range(gold.UPDATES + 1)]
    assert list(gold.faults(rows)) == ["seed 0: 30 updates brought nothing"]
    assert list(gold.faults(rows[:-1])) == []
    assert list(gold.faults([*rows[:-1], row(0, gold.UPDATES, 0.4)])) == []


def test_the_gap_is_what_the_proxy_rose_more_than_gold_did() -> None:
    base, later = row(0, 0, 0.2), row(0, 5, 0.6, proxy=1.5)
    assert gain(base, later) == pytest.approx(1.0)  # 0.4 over √(0.2 · 0.8)
    assert gap(base, later) == pytest.approx(0.5)
    [*_, last] = gold.table([base, later]).splitlines()
    assert last.endswith("| 1.50 | 0.50 | 0.50 |")


def test_the_plot_shows_gold_proxy_and_gap_of_each_seed_on_one_scale() -> None:
    golds = {0: [0.2, 0.2, 0.6], 1: [0.2, 0.4]}
    rows = [row(seed, n, one, proxy=n / 2, released=n == 2) for seed, of in golds.items() for n, one in enumerate(of)]
    drawn = ElementTree.fromstring(plot(rows))
    paths = [one for one in drawn.iter("{http://www.w3.org/2000/svg}path") if one.get("class") != "grid"]
    assert [one.get("class") for one in paths] == ["bound", "proxy", "gold", "bound", "gap"] * 2
    points = [[tuple(map(float, point.split())) for point in one.get("d", "")[1:].split("L")] for one in paths[1:3]]
    proxy, climbed = points
    assert proxy[2] == climbed[2]  # both are one standard deviation up after two updates
    assert climbed[1][1] == climbed[0][1] > climbed[2][1]
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == 1
    assert {one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")} >= {"seed 0", "seed 1"}


# 11. Gold-reward simulator with 25% flips: gold rises, then the gate and the KL stop fire (three seeds: make bench-gold)


def test_11_gold_rises_with_a_quarter_of_the_thumbs_wrong_until_the_gate_and_the_kl_stop_fire(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gold, "THUMBS", 300)
    monkeypatch.setattr(gold, "REPLIES", 3)
    config = LearnerConfig(report_samples=0, rollout_tokens=64, rollouts=64, gate_samples=128, kl_limit=1.0)
    line, rows = gold.Line(Trainer(config), tmp_path, 2), list[Json]()
    for _ in range(3):
        rows.append(line.step(rows))
    assert not list(gold.faults(rows))
    assert rows[-1]["gold"] > rows[0]["gold"] + 0.2
    assert all(row["kl"] <= 1.1 * config.kl_limit for row in rows)
    assert any(row["stopped"].startswith("the KL") for row in rows[1:])
    line.trainer.config = config.model_copy(update={"kl_limit": rows[-1]["kl"] / 2})  # the gate alone is stricter
    assert line.step(rows)["refused"] == ["kl"]
