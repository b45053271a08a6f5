"""Past chats come in from files, and judgements go out to files, through the command: what is said stays what it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deploy import imports, rows, writing
from feedback import sqlite_log
from feedback.config import FeedbackConfig
from feedback.events import Exchange
from feedback.log import open_log
from feedback.sqlite_file import open_reading
from learner.intake import Intake
from learner.metrics import LearnerMetrics
from learner.state import State
from serving.chat import Chat
from serving.claims import hold
from serving.exits import Exit
from serving.ids import Ids, load_secret
from serving.model import fingerprint, load_chat
from tests.commands import Heed
from tests.told import NOW, exchange, feedback, records, retraction

ROOT = Path(__file__).resolve().parent.parent
UP = {"prompt": "What is 2 plus 3?", "completion": "It is 5.", "label": True, "user": "ann", "at": NOW}
FOUR = {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello!", "rating": 4, "user": "bob"}
BETTER = {"prompt": "Hi", "chosen": "Hello!", "rejected": [{"role": "assistant", "content": "What?"}], "user": "cy"}
SILENT = {"prompt": "How are you?", "completion": "Fine."}

Row = dict[str, Any]
Said = tuple[Any, ...]
Learned = Callable[[Path], State]


@pytest.fixture(scope="session")
def built_in() -> tuple[Chat, str]:
    """The built-in model's chat, and its fingerprint."""
    folder, chat, _ = load_chat()
    return chat, fingerprint(folder, chat)


def jsonl(path: Path, *said: Row | str) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in said), "utf-8")
    return path


def parquet(path: Path, said: list[Row], **types: pyarrow.DataType) -> Path:
    table = pyarrow.Table.from_pylist(said)
    for name, kind in types.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture
def learned(built_in: tuple[Chat, str]) -> Iterator[Learned]:
    """The learner's state of a data folder, with all of its log absorbed."""
    opened: list[State] = []

    def absorb(data: Path) -> State:
        state = State(data / "learner" / "state.db", policy="default", base=built_in[1])
        opened.append(state)
        with closing(open_log(FeedbackConfig(data=data), writes=())) as log:
            intake = Intake(log, state, LearnerMetrics(), join_wait_s=0, clock=lambda: NOW)
            while intake.absorb():
                pass
        return state

    yield absorb
    for state in opened:
        state.close()


def kept(state: State) -> list[Exchange]:
    """The exchanges, in log order."""
    rows = state.db.execute("SELECT event FROM exchanges ORDER BY rowid")
    return [Exchange.model_validate_json(event) for (event,) in rows]


def written(data: Path) -> int:
    """How many judgements the log of a data folder holds."""
    path = data / "log" / "heed.feedback.db"
    if not path.exists():
        return 0
    with closing(open_reading(path)) as db:
        count: int = db.execute("SELECT count(*) FROM records").fetchone()[0]
        return count


def judged(state: State) -> list[Said]:
    """What was judged and how, without the ids that this folder gave."""
    return sorted(
        (one.kind, one.user or "", one.value, one.at, one.reply.prompt_ids, one.reply.reply_ids,
         one.other.reply_ids if one.other else ())
        for one in state.judgements()
    )  # fmt: skip


# import


def test_past_chats_reach_the_learner(heed: Heed, tmp_path: Path, learned: Learned, built_in: tuple[Chat, str]):
    done = heed("feedback", "import", jsonl(tmp_path / "past.jsonl", UP, FOUR, BETTER, SILENT))
    assert (done.code, done.err) == (0, "")
    assert "4 lines: 5 exchanges, 1 thumbs, 1 ratings, 1 preferences, 1 without a judgement" in done.out
    chat, base = built_in
    state = learned(tmp_path / "heed-data")
    found = [
        (
            one.kind,
            one.user,
            one.value,
            chat.decode(one.reply.reply_ids),
            one.other and chat.decode(one.other.reply_ids),
        )
        for one in state.judgements()
    ]
    assert found == [
        ("thumb", "ann", 1.0, "It is 5.", None),
        ("rating", "bob", 4.0, "Hello!", None),
        ("preference", "cy", 1.0, "Hello!", "What?"),
    ]
    assert {chat.decode(prompt) for prompt in state.prompts(9)} == {"What is 2 plus 3?", "Hi", "How are you?"}
    first = kept(learned(tmp_path / "heed-data"))[0]
    assert first.content.prompt_ids == tuple(chat.encode(first.content.messages))
    assert first.content.reply_ids[-1] in chat.eos_ids
    assert (first.base, first.version, first.at, first.live) == (base, 0, NOW, False)
    assert (first.content.logprobs, first.content.raw_logprobs, first.sampling.full_support) == ((), (), False)


def test_ids_prove_themselves(heed: Heed, tmp_path: Path, learned: Learned):
    assert heed("feedback", "import", jsonl(tmp_path / "past.jsonl", UP)).code == 0
    data = tmp_path / "heed-data"
    ids = Ids(load_secret(FeedbackConfig(data=data)))
    [judgement] = learned(data).judgements()
    assert ids.verify_reply(judgement.reply.reply_id, "").kept
    ids.verify_feedback(judgement.feedback_id)


def test_the_same_file_again_changes_nothing(heed: Heed, tmp_path: Path, learned: Learned):
    file = jsonl(tmp_path / "past.jsonl", UP, FOUR, BETTER, SILENT)
    assert heed("feedback", "import", file).code == 0
    before = learned(tmp_path / "heed-data").judgements()
    assert heed("feedback", "import", jsonl(file, SILENT, FOUR, UP, BETTER)).code == 0
    state = learned(tmp_path / "heed-data")
    assert state.judgements() == before
    assert state.db.execute("SELECT count(*) FROM exchanges").fetchone() == (5,)


def test_the_same_file_for_another_base_is_the_same_judgements(
    heed: Heed, tmp_path: Path, learned: Learned, model_folder: Path
):
    file = jsonl(tmp_path / "past.jsonl", UP, FOUR, BETTER, SILENT)
    assert heed("feedback", "import", file, HEED_MODEL=str(model_folder)).code == 0
    before = learned(tmp_path / "heed-data").judgements()
    assert [one.reply.words.text for one in before if one.reply.words] == ["It is 5.", "Hello!", "Hello!"]
    assert heed("feedback", "import", file).code == 0
    assert learned(tmp_path / "heed-data").judgements() == before


def test_an_import_that_was_killed_goes_on(heed: Heed, tmp_path: Path, learned: Learned):
    file = jsonl(tmp_path / "past.jsonl", *({**UP, "user": f"u{i}"} for i in range(3000)))
    command = [sys.executable, "-m", "deploy.cli", "feedback", "import", file, "--data", tmp_path / "heed-data"]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while not written(tmp_path / "heed-data"):
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < give_up
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 0 < written(tmp_path / "heed-data") < 3000
    assert heed("feedback", "import", file).code == 0
    assert len(learned(tmp_path / "heed-data").judgements()) == 3000


def test_two_equal_lines_are_two_judgements_unless_their_id_is_one(heed: Heed, tmp_path: Path, learned: Learned):
    named = {**FOUR, "id": 17}
    file = jsonl(tmp_path / "past.jsonl", UP, UP, named, named, {**FOUR, "id": "17b"})
    done = json.loads(heed("feedback", "import", file, "--json").out)
    assert (done["judgements"], done["skipped"]) == ({"thumb": 2, "rating": 2, "preference": 0}, {"repeated": 1})
    assert len(learned(tmp_path / "heed-data").judgements()) == 4


def test_an_id_under_which_something_else_was_said_is_bad(heed: Heed, tmp_path: Path):
    done = heed("feedback", "import", jsonl(tmp_path / "past.jsonl", {**UP, "id": "7"}, {**FOUR, "id": 7}))
    assert done.code == 1
    assert "line 2: id '7' is that of an earlier line which says something else" in done.err


def test_whole_conversations_share_their_prompt(heed: Heed, tmp_path: Path, learned: Learned):
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    good, bad = ([*asked, {"role": "assistant", "content": text}] for text in ("Hello!", "What?"))
    file = jsonl(
        tmp_path / "past.jsonl",
        {"chosen": good, "rejected": bad},
        {"prompt": asked, "chosen": good, "rejected": bad[2:]},
        {"prompt": asked, "chosen": "Hello!", "rejected": "What?", "label": None},
    )
    assert heed("feedback", "import", file).code == 0
    data = tmp_path / "heed-data"
    assert {tuple((m.role, m.content) for m in one.content.messages) for one in kept(learned(data))} == {
        (("system", "Be kind."), ("user", "Hi"))
    }
    assert len(learned(data).judgements()) == 3


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "line 1: line is no JSON"),
        ('["prompt"]', "line must be a JSON object, not list"),
        ({"completion": "x"}, "prompt is missing; a line has prompt, completion"),
        ({"prompt": "x"}, "completion is missing"),
        ({"prompt": "", "completion": "x"}, "prompt is empty"),
        ({"prompt": [], "completion": "x"}, "prompt is empty"),
        ({"prompt": 5, "completion": "x"}, "prompt must be a text or a list of messages, not 5"),
        ({"prompt": [{"role": "tool", "content": "x"}], "completion": "x"}, "prompt [0].role: input should be 'system'"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "prompt [0].content is missing"),
        ({"prompt": ["x"], "completion": "x"}, "prompt [0]: input should be"),
        ({"prompt": "x", "completion": [{"role": "user", "content": "y"}]}, "one assistant message, not messages by: user"),
        ({**UP, "label": "maybe"}, 'label must be true, false, 1, 0, "up" or "down", not "maybe"'),
        ({**UP, "label": 2}, "label must be true, false, 1, 0"),
        ({**FOUR, "rating": 6}, "rating must be a whole number from 1 to 5, not 6"),
        ({**FOUR, "rating": 3.5}, "rating must be a whole number from 1 to 5, not 3.5"),
        ({**FOUR, "rating": True}, "rating must be a whole number from 1 to 5, not true"),
        ({**UP, "rating": 4}, "rating does not go with label"),
        ({**BETTER, "label": 1}, "label does not go with chosen and rejected"),
        ({**BETTER, "completion": "x"}, "completion does not go with chosen and rejected"),
        ({**BETTER, "rejected": "Hello!"}, "rejected must be another reply than chosen"),
        ({"prompt": "x", "chosen": "y"}, "rejected is missing"),
        ({"chosen": "y", "rejected": "z"}, "without it chosen and rejected must be whole conversations"),
        ({**BETTER, "aspect": "safety"}, "aspect goes with label or rating"),
        ({**UP, "aspect": "Safety!"}, "aspect must be a lower-case word"),
        ({**UP, "user": ""}, "user must be a text of 1 to 256 characters"),
        ({**UP, "user": "u" * 257}, "user must be a text of 1 to 256 characters"),
        ({**UP, "at": NOW * 1000}, "at must be seconds since 1970 or an ISO 8601 time"),
        ({**UP, "at": "yesterday"}, "at must be seconds since 1970"),
        ({**UP, "prompt": "\ud83d"}, "line holds what is no UTF-8 text"),
        ({**UP, "prompt": "long " * 1500}, "more than the 1024 tokens that this model takes"),
        ({**UP, "completion": "x" * 1_000_000}, "line has 1000017 characters, more than the 1024 tokens"),
    ],
)  # fmt: skip
def test_a_bad_line_says_what_is_wrong_and_what_is_allowed(row: Row | str, told: str, heed: Heed, tmp_path: Path):
    done = heed("feedback", "import", jsonl(tmp_path / "past.jsonl", row), "--dry-run")
    assert done.code == 1
    assert told in done.err


@pytest.mark.parametrize(
    ("given", "value"), [(True, 1), (0, 0), (1.0, 1), ("up", 1), ("Down", 0), ("false", 0), ("1.0", 1)]
)
def test_a_label_may_be_written_in_many_ways(given: object, value: int, heed: Heed, tmp_path: Path, learned: Learned):
    assert heed("feedback", "import", jsonl(tmp_path / "past.jsonl", {**UP, "label": given})).code == 0
    assert [one.value for one in learned(tmp_path / "heed-data").judgements()] == [value]


@pytest.mark.parametrize("at", ["2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00", "2023-11-14 22:13:20", str(NOW)])
def test_a_time_may_be_written_in_many_ways(at: str, heed: Heed, tmp_path: Path, learned: Learned):
    assert heed("feedback", "import", jsonl(tmp_path / "past.jsonl", {**UP, "at": at})).code == 0
    assert [one.at for one in kept(learned(tmp_path / "heed-data"))] == [NOW]


def test_one_bad_line_and_nothing_is_imported(heed: Heed, tmp_path: Path, learned: Learned):
    bad = [{**UP, "label": "?"}] * 23
    file = jsonl(tmp_path / "past.jsonl", UP, *bad, {**FOUR, "mood": "good"}, {**FOUR, "mood": "bad"})
    done = heed("feedback", "import", file)
    assert done.code == 1
    assert done.err.count("label must be") == 20
    assert "and 3 more lines" in done.err
    assert done.err.count("mood") == 1
    assert "nothing was imported: 23 of 26 lines are bad" in done.err
    assert not (tmp_path / "heed-data" / "log").exists()

    done = heed("feedback", "import", file, "--skip-bad", "--json")
    told = json.loads(done.out)
    assert (done.code, told["imported"], told["judgements"]) == (0, True, {"thumb": 1, "rating": 2, "preference": 0})
    assert (told["skipped"], told["bad"], told["unknown_columns"]) == ({"label": 23}, 23, ["mood"])
    assert told["problems"][0]["line"] == 2
    assert len(kept(learned(tmp_path / "heed-data"))) == 3


def test_a_dry_run_leaves_nothing_behind(heed: Heed, tmp_path: Path):
    done = heed("feedback", "import", jsonl(tmp_path / "past.jsonl", UP), "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "can be imported. 1 lines: 1 exchanges, 1 thumbs" in done.out
    assert not (tmp_path / "heed-data").exists()


def test_a_running_server_is_not_written_beside(heed: Heed, tmp_path: Path):
    data = tmp_path / "heed-data"
    data.mkdir()
    file = jsonl(tmp_path / "past.jsonl", UP)
    with hold(data / "server.lock") as lock:
        os.write(lock, b"4711 http://127.0.0.1:8000\n")
        done = heed("feedback", "import", file)
        assert done.code == Exit.HELD
        assert done.err.count("\n") == 1
        assert "belongs to a server that is running (pid 4711, http://127.0.0.1:8000)" in done.err
        assert [path.name for path in data.iterdir()] == ["server.lock"]
        assert heed("feedback", "import", file, "--dry-run").code == 0
    assert heed("feedback", "import", file).code == 0


def test_a_csv_as_spreadsheets_write_it(heed: Heed, tmp_path: Path, learned: Learned):
    file = tmp_path / "past.csv"
    messages = '"[{""role"": ""user"", ""content"": ""Hi""}]"'
    file.write_bytes(
        "\ufeffprompt,completion,label,rating,user,at\r\n"
        '"What is\r\n2 plus 3?","It is 5, I ""think"".",up,,12,\r\n'
        "\r\n"
        f"{messages},Hello!,,5.0,,2023-11-14T22:13:20Z\r\n"
        "Hi,Hello!,,\r\n".encode()
    )
    done = json.loads(heed("feedback", "import", file, "--json").out)
    assert (done["lines"], done["judgements"]) == (3, {"thumb": 1, "rating": 1, "preference": 0})
    first, second, third = kept(learned(tmp_path / "heed-data"))
    assert first.content.messages[0].content == "What is\r\n2 plus 3?"
    assert (first.content.reply, first.content.user) == ('It is 5, I "think".', "12")
    assert (second.content.messages, second.at) == (third.content.messages, NOW)
    assert sorted(one.value for one in learned(tmp_path / "heed-data").judgements()) == [1.0, 5.0]


def test_bad_rows_of_a_csv_are_told_by_the_line_they_begin_on(heed: Heed, tmp_path: Path):
    file = tmp_path / "past.csv"
    rows = ["prompt,completion,label", '"two', 'lines",x,up', '"two', 'lines",x,maybe', "a,b,up,d", "a,\xff,up"]
    rows += ["\"[{'role': 'user'}]\",x,up", 'a,"b"c,up', 'a,"b']
    file.write_bytes("\n".join(rows).encode("latin-1"))
    done = json.loads(heed("feedback", "import", file, "--dry-run", "--json").out)
    assert [(one["line"], one["problem"][:34]) for one in done["problems"]] == [
        (4, 'label must be true, false, 1, 0, "'),
        (6, "line has 4 cells, and the first li"),
        (7, "line holds what is no UTF-8 text"),
        (8, "line has a cell that begins as a l"),
        (9, "line is no CSV: ',' expected after"),
        (10, "line is no CSV: unexpected end of "),
    ]


def test_bytes_that_are_no_text_and_lines_without_end_are_bad_lines(
    heed: Heed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rows, "LONGEST_BYTES", 1 << 20)
    file = tmp_path / "past.jsonl"
    good = json.dumps(UP).encode()
    file.write_bytes(b"\xef\xbb\xbf" + good + b'\r\n\r\n{"prompt": "\xff"}\n' + b"x" * (5 << 19) + b"\n" + good)
    done = json.loads(heed("feedback", "import", file, "--dry-run", "--json").out)
    assert done["problems"] == [
        {"line": 3, "problem": "line is not UTF-8 text"},
        {"line": 4, "problem": "line is longer than 1 MiB"},
    ]
    assert done["judgements"]["thumb"] == 2


def test_parquet_as_pandas_and_datasets_write_it(heed: Heed, tmp_path: Path, learned: Learned):
    """Lists of structs, gaps that are NaN, times that are timestamps, fields that only other messages have."""
    messages = [{"role": "user", "content": "Hi", "name": None}]
    said = [
        {"prompt": messages, "completion": [messages[0] | {"role": "assistant"}], "label": 1.0, "rating": float("nan"),
         "user": 3.0, "at": datetime(2023, 11, 14, 22, 13, 20), "extra": 1},
        {"prompt": messages, "completion": [messages[0] | {"role": "assistant"}], "label": None, "rating": 2.0,
         "user": float("nan"), "at": None, "extra": 2},
    ]  # fmt: skip
    done = json.loads(heed("feedback", "import", parquet(tmp_path / "past.parquet", said), "--json").out)
    assert (done["judgements"], done["unknown_columns"]) == ({"thumb": 1, "rating": 1, "preference": 0}, ["extra"])
    assert [(one.kind, one.value, one.user) for one in learned(tmp_path / "heed-data").judgements()] == [
        ("thumb", 1.0, "3"),
        ("rating", 2.0, None),
    ]
    assert kept(learned(tmp_path / "heed-data"))[0].at == NOW


def test_parquet_without_pyarrow_says_how_to_get_it(heed: Heed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "past.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = heed("feedback", "import", tmp_path / "past.parquet")
    assert (done.code, done.err.strip()) == (1, f"heed: {rows.NEEDS_PYARROW}")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("past.txt", "{}", "has none of the suffixes .jsonl"),
        ("past.jsonl", "\n\n", "holds nothing"),
        ("past.csv", "prompt,prompt\n", "names a column twice"),
        ("past.parquet", "no parquet", "cannot be read as Parquet"),
        ("missing/past.jsonl", None, "is not a file that is there"),
    ],
)
def test_a_file_that_is_none_is_refused_before_anything_is_touched(
    name: str, content: str | None, told: str, heed: Heed, tmp_path: Path
):
    if content is not None:
        (tmp_path / name).write_text(content)
    done = heed("feedback", "import", tmp_path / name)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert told in done.err
    assert not (tmp_path / "heed-data").exists()


def test_a_format_may_be_named(heed: Heed, tmp_path: Path):
    assert heed("feedback", "import", jsonl(tmp_path / "past.txt", UP), "--format", "jsonl", "--dry-run").code == 0
    done = heed("feedback", "import", tmp_path / "past.txt", "--format", "xml")
    assert "--format xml: must be one of jsonl, csv, parquet" in done.err


def test_another_policy_learns_from_the_same_file_for_itself(heed: Heed, tmp_path: Path, learned: Learned):
    file = jsonl(tmp_path / "past.jsonl", UP)
    assert heed("feedback", "import", file).code == 0
    assert heed("feedback", "import", file, HEED_POLICY="other").code == 0
    assert len({one.id for one in kept(learned(tmp_path / "heed-data"))}) == 2


def test_lines_do_not_wait_for_the_disk_one_by_one(heed: Heed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "IN_FLIGHT", 100)
    keep, batches = sqlite_log._keep, list[int]()

    def slowly(*batch: Any) -> None:
        batches.append(len(batch[1]))
        time.sleep(0.02)
        keep(*batch)

    monkeypatch.setattr(sqlite_log, "_keep", slowly)
    assert heed("feedback", "import", jsonl(tmp_path / "past.jsonl", *[UP] * 500)).code == 0
    assert sum(batches) == 1000
    assert len(batches) < 250
    assert max(batches) <= 100


# export


def exported(folder: Path, shape: str) -> list[Row]:
    return [json.loads(line) for line in (folder / f"{shape}.jsonl").read_text().splitlines()]


def test_what_goes_out_has_the_columns_that_trl_asks_for(heed: Heed, tmp_path: Path, learned: Learned):
    heed("feedback", "import", jsonl(tmp_path / "past.jsonl", UP, FOUR, BETTER, SILENT))
    learned(tmp_path / "heed-data")
    assert heed("feedback", "export", "--out", "out").code == 0
    [thumb], [stars], [pair] = (exported(tmp_path / "out", shape) for shape in ("unpaired", "ratings", "preferences"))
    asked, answered = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
    assert thumb["prompt"] == [{"role": "user", "content": "What is 2 plus 3?"}]
    assert thumb["completion"] == [{"role": "assistant", "content": "It is 5."}]
    assert thumb["label"] is True
    assert (thumb["user"], thumb["at"], thumb["status"], thumb["aspect"]) == ("ann", NOW, "joined", "overall")
    assert thumb["version"] is None  # nobody of ours said it
    assert (stars["prompt"], stars["completion"], stars["rating"]) == ([asked], [answered], 4)
    assert (pair["prompt"], pair["chosen"]) == ([asked], [answered])
    assert pair["rejected"] == [{"role": "assistant", "content": "What?"}]
    assert len(exported(tmp_path / "out", "exchanges")) == 5


@pytest.mark.parametrize("flags", [(), ("--text",), ("--format", "parquet"), ("--text", "--format", "parquet")])
def test_what_went_out_comes_in_again_as_the_same_judgements(
    flags: tuple[str, ...], heed: Heed, tmp_path: Path, learned: Learned
):
    down = {**UP, "label": 0, "user": None, "aspect": "safety"}
    heed("feedback", "import", jsonl(tmp_path / "past.jsonl", UP, UP, down, FOUR, BETTER, SILENT))
    there = learned(tmp_path / "heed-data")
    assert heed("feedback", "export", "--out", "out", *flags).code == 0
    for file in sorted((tmp_path / "out").iterdir()):
        assert heed("feedback", "import", file, "--data", "new").code == 0
    here = learned(tmp_path / "new")
    assert judged(here) == judged(there)
    assert len(judged(here)) == 5
    assert set(here.prompts(99)) == set(there.prompts(99))
    aspects = "SELECT aspect, count(*) FROM feedback GROUP BY aspect"
    assert here.db.execute(aspects).fetchall() == there.db.execute(aspects).fetchall()


def test_what_this_folder_knows_is_not_imported_into_it_again(heed: Heed, tmp_path: Path, learned: Learned):
    heed("feedback", "import", jsonl(tmp_path / "past.jsonl", UP, SILENT))
    learned(tmp_path / "heed-data")
    heed("feedback", "export", "--out", "out")
    for shape, count in {"unpaired": 1, "exchanges": 2}.items():
        done = json.loads(heed("feedback", "import", tmp_path / "out" / f"{shape}.jsonl", "--json").out)
        assert (done["skipped"], done["exchanges"]) == ({"known": count}, 0)


@pytest.fixture
def told(tmp_path: Path) -> Iterator[State]:
    """A learner's state of live replies, open for writing as while a learner runs."""
    state = State(tmp_path / "heed-data" / "learner" / "state.db", policy="default", base="base-fingerprint")
    state.absorb(
        records(
            *(exchange(f"r{i}", version=3, prompt=f"hello {i % 2}") for i in range(4)),
            feedback("first", "r0", value=1, user="ann"),
            feedback("second", "r0", value=0, user="ann"),
            feedback("taken-back", "r1", user="bob"),
            retraction("taken-back"),
            feedback("pair", "r0", "r2", kind="preference"),
            feedback("across", "r0", "r1", kind="preference"),
            feedback("note", "r0", kind="comment", value=None),
            feedback("early", "nowhere"),
        ),
        NOW,
    )
    yield state
    state.close()


def test_only_what_counts_goes_out_unless_all_is_asked_for(told: State, heed: Heed, tmp_path: Path):
    done = heed("feedback", "export", "--out", "out")
    assert [(row["id"], row["label"], row["version"]) for row in exported(tmp_path / "out", "unpaired")] == [
        ("second", False, "v3")
    ]
    assert [row["id"] for row in exported(tmp_path / "out", "preferences")] == ["pair"]
    for words in ("1 comment", "1 preference between two prompts", "1 superseded", "1 retracted", "1 pending"):
        assert words in done.err

    heed("feedback", "export", "--out", "all", "--all")
    everything = exported(tmp_path / "all", "unpaired")
    assert [(row["id"], row["status"]) for row in everything] == [
        ("first", "superseded"),
        ("second", "joined"),
        ("taken-back", "retracted"),
    ]
    again = json.loads(heed("feedback", "import", "all/unpaired.jsonl", "--data", "new", "--json").out)
    assert (again["judgements"]["thumb"], again["skipped"]) == (1, {"not counted": 2})
    assert told.judgement_count(fresh=False) == 3


def test_one_kind_goes_to_one_file_or_is_printed(told: State, heed: Heed, tmp_path: Path):
    printed = heed("feedback", "export", "--kind", "preferences", "--text")
    row = json.loads(printed.out)
    assert (row["prompt"], row["chosen"], row["rejected_id"]) == ("hello 0", "there", "r2")
    assert heed("feedback", "export", "--kind", "exchanges", "--out", "chats.parquet").code == 0
    table = pyarrow.parquet.read_table(tmp_path / "chats.parquet")
    assert table.num_rows == 4
    assert table.schema.field("prompt").type == pyarrow.list_(
        pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    )
    assert told.judgement_count(fresh=False) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kind", "thumbs"), "--kind thumbs: must be one of unpaired, ratings, preferences, exchanges"),
        (("--format", "csv"), "the format csv cannot be written: --format must be jsonl or parquet"),
        (("--kind", "unpaired", "--format", "parquet"), "name a file with --out"),
        (("--out", "all.jsonl"), "--out all.jsonl must be a folder"),
        ((), "there is no learner state"),
    ],
)
def test_what_cannot_go_out_is_one_line(flags: tuple[str, ...], words: str, heed: Heed, tmp_path: Path):
    done = heed("feedback", "export", *flags)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert words in done.err
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_file_that_was_there(told: State, heed: Heed, tmp_path: Path):
    (tmp_path / "chats.jsonl").write_text("mine\n")
    told.db.execute("UPDATE exchanges SET event = '{}' WHERE reply_id = 'r3'")
    with pytest.raises(ValueError, match="validation error"):
        heed("feedback", "export", "--kind", "exchanges", "--out", "chats.jsonl")
    assert [path.name for path in tmp_path.glob("chats*")] == ["chats.jsonl"]
    assert (tmp_path / "chats.jsonl").read_text() == "mine\n"


def test_a_file_that_changes_between_its_two_readings_is_told(
    heed: Heed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = jsonl(tmp_path / "past.jsonl", UP)
    passed = imports.Importer._pass

    def changing(self: imports.Importer, doing: str, writing: Any) -> imports.Tally:
        tally = passed(self, doing, writing)
        jsonl(file, "{")
        return tally

    monkeypatch.setattr(imports.Importer, "_pass", changing)
    done = heed("feedback", "import", file)
    assert done.code == 1
    assert "changed while it was read: line 1" in done.err
