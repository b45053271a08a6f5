"""An update's page: whole without JavaScript, deaf to what strangers wrote, for its owner's eyes; and the plots in it."""

from __future__ import annotations

import dataclasses
import re
import stat
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from learner import drawing, gate
from learner.exhibits import END, Alike, Exhibits, Pair, Piece, Reply, first_of_each, most_alike, pieces_of, said_of
from learner.figures import jsonable
from learner.gate import GateReport
from learner.judgement import Judgement, Sample
from learner.ledger import Update
from learner.page import KEPT, keep_page, update_page
from learner.rollouts import Rollout
from tests import bases
from tests.test_gate import BASE, reward_report

SCRIPT = "<script>alert('x')</script>\" onmouseover=\"alert(1)"
UPDATE = Update(3, "running", 0.0, None, 1, 2, {"heed.feedback": 300}, 300, None, None, None, None)
BATCH = {"score": 0.2, "kl": 0.5, "explained_variance": 0.1}
REPORT = {
    "reward": reward_report(0.8).to_json() | {"calibration": [(0.2, 0.3, 10), (0.8, 0.7, 30)]},
    "policy": {
        "started_from": "reference",
        "stopped": SCRIPT,
        "kept": 1,
        "share": 0.75,
        "batches": [BATCH | {"loss": float("nan"), "clipped": 0.1}, BATCH],
    },
    "score": {"candidate": 1.2, "base": 0.0},
    "kl": {"reference": 1.5},
    "seconds": {"reward": 1.0, "ppo": 9.0},
}


def reply(*texts: str, score: float = 0.5) -> Reply:
    return Reply((1,), tuple(Piece(text, 0.4, -0.1) for text in texts), score, torch.zeros(2))


PAIR = Pair(SCRIPT, reply("old"), reply(SCRIPT, " said"), (Alike(SCRIPT, SCRIPT, "thumb up"),))
EXHIBITS = Exhibits((-1.0, 0.0, 1.0), (0.5, 1.0, 1.5), (PAIR,))


def page(report: dict[str, Any] = REPORT, checks: Sequence[gate.Check] = (), exhibits: Exhibits = EXHIBITS) -> str:
    told = GateReport.of([gate.knows(reward_report(0.8)), gate.within_budget(1.5, 2.0), *checks])
    version = 7 if told.passed else None
    return update_page(UPDATE, version, jsonable(report), jsonable(dataclasses.asdict(told)), exhibits, 0.0)


class Reader(HTMLParser):
    """Elements, attributes and text; raises where elements are not closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID and "/>" not in (self.get_starttag_text() or ""):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not (self.get_starttag_text() or "").endswith("/>") or self.open[-1:] == [tag]:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_loads_and_runs_nothing() -> None:
    text = page()
    read = Reader(text)
    assert not read.tags & {"script", "link", "img", "iframe", "object", "form"}
    assert not [name for name in read.attributes if name.startswith("on") or name in ("src", "href")]
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)


def test_what_strangers_wrote_is_shown_as_they_wrote_it() -> None:
    probe = gate.Check("probes", "fail", 0.0, 1.0, SCRIPT)
    read = Reader(page(checks=[probe]))
    assert "script" not in read.tags
    assert "onmouseover" not in read.attributes
    # the prompt, a reply, the rated reply and its prompt, why the training stopped, and the check, there and at the top
    assert read.text.count(SCRIPT) == 7


def test_the_page_says_what_the_gate_said() -> None:
    passed, refused = Reader(page()).text, Reader(page(checks=[gate.changed(0.0)])).text
    assert "The gate said yes." in passed
    assert "made v7 from v2" in passed
    assert "The gate said no." in refused
    assert "was to replace v2" in refused
    assert refused.count("Training did not move the weights.") == 2


def test_every_figure_says_what_good_and_bad_look_like() -> None:
    read = Reader(page())
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page())
    assert len(captions) == 7
    assert all("Good" in caption or "1:" in caption for caption in captions)
    assert all("Bad" in caption for caption in captions)
    assert page().count("<svg") == 7
    assert "nan" not in read.text.lower().replace("finan", "")


def test_an_update_that_the_gate_stopped_early_has_a_page_too() -> None:
    read = Reader(page({"seconds": {"reward": 0.0}}, gate.skipped(["kl"]), Exhibits()))
    assert "The gate said no." in read.text
    assert "svg" not in read.tags
    Reader(page({"reward": {"auroc": 0.6, "nll": float("nan")}, "seconds": {"ppo": 1.5}}, (), Exhibits()))


def test_a_refused_updates_page_is_for_its_owner_alone_and_old_ones_go(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    for number in range(1, KEPT + 3):
        place = keep_page(folder, number, f"<p>{number}")
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == [f"update-{number:06d}.html" for number in range(3, KEPT + 3)]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keep_page(folder, KEPT + 2, "again")
    assert (folder / kept[-1]).read_text() == "again"


# What it shows


def test_tokens_become_pieces_of_whole_characters() -> None:
    chat = bases.chat()
    ids = [*chat.tokenizer("hi 😀", add_special_tokens=False)["input_ids"], *chat.eos_ids]
    shown = pieces_of(ids, [0.5] * len(ids), [float(n) for n in range(len(ids))], chat)
    assert "".join(piece.text for piece in shown) == "hi 😀" + END
    assert "�" not in "".join(piece.text for piece in shown)
    assert sum(piece.kl for piece in shown) == pytest.approx(0.5 * len(ids))
    assert sum(piece.worth for piece in shown) == sum(range(len(ids)))
    torn = pieces_of(ids[:-2], [1.0] * (len(ids) - 2), [0.0] * (len(ids) - 2), chat)
    assert torn[-1].text == "�"


def test_each_prompt_is_shown_once() -> None:
    said = [Rollout((prompt,), (n,), True, (0.0,)) for n, prompt in enumerate([5, 5, 3, 5, 4, 3])]
    assert [one.reply_ids for one in first_of_each(said, 2)] == [(0,), (2,)]
    assert first_of_each(BASE, 0) == []


def test_the_rated_replies_most_alike_point_the_same_way() -> None:
    states_NS = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.9, 0.2], [0.0, -1.0]])
    rated = [Sample(f"r{n}", (n,), (n,), 0) for n in range(4)]
    own = dataclasses.replace(reply("x"), state_S=torch.tensor([5.0, 0.0]))
    other = dataclasses.replace(reply("x"), state_S=torch.tensor([-0.2, -3.0]))
    [first, second] = most_alike([own, other], rated, states_NS)
    assert (first[0], second[0]) == (0, 3)
    assert len(first) == 2
    assert most_alike([own], rated[:1], states_NS[:1]) == [[0]]


def test_what_people_said_of_a_reply_in_words() -> None:
    one, other = Sample("a", (1,), (2,), 0), Sample("b", (1,), (3,), 0)
    judged = [("thumb", 1.0, None), ("thumb", 1.0, None), ("rating", 4.0, None), ("preference", 1.0, other)]
    said = said_of([Judgement("f", kind, None, value, one, than, 0.0) for kind, value, than in judged])
    assert said == {((1,), (2,)): "thumb up × 2, 4 of 5 stars, preferred", ((1,), (3,)): "the other one preferred"}


# Plots


def test_ticks_are_round_and_inside() -> None:
    assert drawing.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert drawing.ticks(-3.2, 1.4) == [-3.0, -2.0, -1.0, 0.0, 1.0]
    assert drawing.ticks(0.0, 0.021, 4) == [0.0, 0.01, 0.02]


def test_a_line_goes_through_its_values_and_marks_the_one_that_was_taken() -> None:
    svg = drawing.line([0.0, None, 1.0], "score", marked=2)
    path = re.search(r'class="line" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    dot = re.search(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert path is not None
    assert dot is not None
    assert dot.groups() == path.groups()[2:]
    assert float(path[1]) == drawing.LEFT
    assert float(path[4]) < float(path[2])  # up is less
    assert 'class="bound"' in drawing.line([0.1], "kl", bound=2.5)
    assert 'class="line"' not in drawing.line([None], "loss")


def test_the_bars_of_a_histogram_are_the_shares() -> None:
    svg = drawing.histogram({"a": [0.0, 0.0, 0.0, 2.4], "b": [2.4]}, "scores")
    heights = {
        group: [float(one) for one in re.findall(rf'class="{group}".*?height="([\d.]+)"', svg)] for group in "ab"
    }
    assert heights["a"][0] == pytest.approx(3 * heights["a"][1], rel=0.01)
    assert heights["b"][0] == pytest.approx(heights["a"][0] / 3 * 4, rel=0.01)
    assert drawing.histogram({"a": [1.0], "b": [1.0]}, "all the same").count("<rect") == 2


def test_a_calibrated_bin_lies_on_the_diagonal() -> None:
    frame = drawing.Frame(0, 1, 0, 1, height=300)
    assert f'cx="{frame.x(0.3):.1f}" cy="{frame.y(0.3):.1f}" r="12.0"' in drawing.calibration([(0.3, 0.3, 8)], "c")
