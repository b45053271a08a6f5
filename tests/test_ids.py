"""Ids prove themselves: what is forged, foreign, not kept or out of range is known without a look-up."""

from __future__ import annotations

import multiprocessing
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.config import FeedbackConfig
from serving.errors import NotStored, UnknownFeedback, UnknownReply
from serving.ids import MAX_CHOICES, Ids, ReplyId, load_secret

IDS = Ids(b"0123456789abcdef0123456789abcdef")
OTHER = Ids(b"another secret of 16 bytes and more")


def test_a_reply_id_says_what_it_was_made_with():
    made = IDS.new_reply("key", kept=True, choices=3)
    assert IDS.verify_reply(made, "key") == ReplyId(made, 0, True, 3)
    assert IDS.verify_reply(f"{made}:2", "key") == ReplyId(made, 2, True, 3)


def test_what_was_imported_has_ids_of_its_own_that_prove_themselves():
    made = IDS.imported_reply("default", "a")
    assert made == IDS.imported_reply("default", "a")
    assert IDS.verify_reply(made, "") == ReplyId(made, 0, True, 1)
    IDS.verify_feedback(IDS.imported_feedback("default", "a"))
    others = {OTHER.imported_reply("default", "a"), IDS.imported_reply("defaul", "ta"), IDS.imported_reply("default")}
    assert len({made, *others}) == 4
    assert IDS.imported_feedback("a", "b") != IDS.new_feedback("a", "b")


def test_ids_are_as_clients_expect_them_and_never_the_same():
    made = {IDS.new_reply("", kept=True) for _ in range(1000)}
    assert len(made) == 1000
    assert all(one.startswith("chatcmpl-") and len(one) == 49 for one in made)


@pytest.mark.parametrize("choice", [":0", ":3", ":16", ":01", ":", ":-1", ":1:1", ":x", ": 1", ":1 "])
def test_a_choice_that_was_never_given_is_unknown(choice: str):
    made = IDS.new_reply("", kept=True, choices=3)
    with pytest.raises(UnknownReply):
        IDS.verify_reply(made + choice, "")


def test_the_last_of_sixteen_choices_is_known():
    made = IDS.new_reply("", kept=True, choices=MAX_CHOICES)
    assert IDS.verify_reply(f"{made}:15", "").choice == 15


@pytest.mark.parametrize("choices", [0, 17])
def test_more_choices_than_an_id_can_carry_are_refused(choices: int):
    with pytest.raises(ValueError, match="1 to 16"):
        IDS.new_reply("", kept=True, choices=choices)


def test_a_foreign_id_and_an_unknown_one_get_the_same_answer():
    foreign = IDS.new_reply("theirs", kept=True)
    with pytest.raises(UnknownReply) as of_another:
        IDS.verify_reply(foreign, "mine")
    unknown = OTHER.new_reply("mine", kept=True)
    with pytest.raises(UnknownReply) as of_nobody:
        IDS.verify_reply(unknown, "mine")
    assert str(of_another.value).replace(foreign, "?") == str(of_nobody.value).replace(unknown, "?")


def test_a_foreign_id_does_not_tell_whether_it_was_kept():
    with pytest.raises(UnknownReply):
        IDS.verify_reply(IDS.new_reply("theirs", kept=False), "mine")


def test_a_reply_that_was_not_kept_is_known_as_such():
    made = IDS.new_reply("", kept=False)
    with pytest.raises(NotStored, match="store: false"):
        IDS.verify_reply(made, "")
    assert IDS.read_reply(made, "").kept is False


@pytest.mark.parametrize(
    "text", ["", "chatcmpl-", "chatcmpl-" + "a" * 40, "fb-" + "a" * 40, "\x00", "ü" * 49, "x" * 1000]
)
def test_what_is_no_id_is_unknown(text: str):
    with pytest.raises(UnknownReply):
        IDS.verify_reply(text, "")
    with pytest.raises(UnknownFeedback):
        IDS.verify_feedback(text)


@given(st.integers(9, 48), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_an_id_with_any_character_changed_is_unknown(place: int, letter: str):
    made = IDS.new_reply("", kept=True)
    changed = made[:place] + letter + made[place + 1 :]
    if changed != made:
        with pytest.raises(UnknownReply):
            IDS.verify_reply(changed, "")


def test_capital_letters_are_another_spelling_and_no_id():
    with pytest.raises(UnknownReply):
        IDS.verify_reply(IDS.new_reply("", kept=True).upper().replace("CHATCMPL", "chatcmpl"), "")


def test_a_receipt_is_the_same_for_the_same_caller_and_client_id():
    assert IDS.new_feedback("ann", "1") == Ids(b"0123456789abcdef0123456789abcdef").new_feedback("ann", "1")
    made = {IDS.new_feedback("ann", "1"), IDS.new_feedback("ann", "2"), IDS.new_feedback("bob", "1")}
    made |= {IDS.new_feedback("an", "n1"), OTHER.new_feedback("ann", "1"), IDS.new_feedback("ann", "")}
    assert len(made) == 6


def test_receipts_without_a_client_id_are_all_different_and_ours():
    made = {IDS.new_feedback("ann", None) for _ in range(100)}
    assert len(made) == 100
    for one in made:
        IDS.verify_feedback(one)


def test_a_reply_id_is_no_feedback_id_whatever_it_is_called():
    reply = IDS.new_reply("", kept=True).removeprefix("chatcmpl-")
    with pytest.raises(UnknownFeedback):
        IDS.verify_feedback("fb-" + reply)
    with pytest.raises(UnknownReply):
        IDS.verify_reply("chatcmpl-" + IDS.new_feedback("", None).removeprefix("fb-"), "")


def test_a_pseudonym_is_stable_and_says_no_name():
    assert IDS.pseudonym("user:ann") == IDS.pseudonym("user:ann") != IDS.pseudonym("user:bob")
    assert "ann" not in IDS.pseudonym("user:ann")


def test_a_short_secret_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        Ids(b"short")


def test_the_secret_is_made_once_and_for_its_owner_only(tmp_path: Path):
    config = FeedbackConfig(data=tmp_path)
    secret = load_secret(config)
    assert load_secret(config) == secret
    assert len(secret) >= 32
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_secret_from_the_settings_needs_no_file(tmp_path: Path):
    one = load_secret(FeedbackConfig(data=tmp_path, secret="a secret of some length"))
    assert one == load_secret(FeedbackConfig(data=tmp_path / "elsewhere", secret="a secret of some length"))
    assert one != load_secret(FeedbackConfig(data=tmp_path, secret="another secret of length"))
    assert not list(tmp_path.iterdir())


def test_an_empty_secret_file_is_refused_rather_than_used(tmp_path: Path):
    (tmp_path / "secret").write_bytes(b"\n")
    with pytest.raises(ValueError, match="delete it"):
        load_secret(FeedbackConfig(data=tmp_path))


def _load(data: Path) -> bytes:
    return load_secret(FeedbackConfig(data=data))


def test_processes_that_start_at_once_agree_on_the_secret(tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        for number in range(10):
            data = tmp_path / str(number)
            data.mkdir()
            assert len(set(pool.map(_load, [data] * 4, chunksize=1))) == 1
