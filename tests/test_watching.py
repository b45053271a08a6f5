"""An update as it goes by: a table in a terminal, lines elsewhere, event files for TensorBoard where they are asked for."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from feedback.config import SettingError
from learner.ledger import Update
from learner.phases import Phases
from learner.tensorboard import TensorBoard
from learner.watching import SHOWN, Lines, LiveTable, picture
from tests.disk import Disk, NoDisk

BATCH = {"score": 0.5, "kl": 1.25, "explained_variance": 0.1, "clipped": 0.031, "rollouts_s": 1.0, "steps_s": 2.5}
LAST = {name: BATCH[name] for name in ("score", "kl", "explained_variance", "rollouts_s")}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def phases(*batches: dict[str, float]) -> Phases:
    found = Phases(3, Clock())
    found.enter("ppo", 0.25)
    found.batches.extend(batches)
    return found


def drawn(of: Phases) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(picture(of))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_has_a_row_a_batch() -> None:
    text = drawn(phases(BATCH, LAST))
    assert "update 3: ppo 25%" in text
    [first] = [line.split() for line in text.splitlines() if line.split()[1:2] == ["1"]]
    assert first == ["│", "1", "│", "+0.50", "│", "1.25", "│", "0.10", "│", "3.1%", "│", "3.5", "│"]
    [last] = [line.split() for line in text.splitlines() if line.split()[1:2] == ["2"]]
    assert last[9:12] == ["–", "│", "1.0"]


def test_a_long_update_shows_its_newest_batches() -> None:
    rows = [line.split()[1] for line in drawn(phases(*[BATCH] * (SHOWN + 5))).splitlines() if line.startswith("│")]
    assert rows == [str(number) for number in range(6, SHOWN + 6)]


def test_the_time_of_each_phase_ends_where_the_next_begins() -> None:
    clock = Clock()
    found = Phases(1, clock)
    for phase, seconds in (("reward", 2.0), ("rollouts", 3.0), ("reward", 1.0)):
        clock.now += seconds
        found.enter(phase, 0.0)
    assert found.seconds() == {"preparing": 2.0, "reward": 3.0, "rollouts": 1.0}


def test_without_a_terminal_there_are_lines_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Lines().entered(phases())
    Lines().batch(phases(BATCH))
    assert [record.getMessage() for record in caplog.records] == [
        "update 3: ppo",
        "update 3: batch 1: score +0.50, KL 1.25, explained 0.10, clipped 3.1%, seconds 3.5",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[io.StringIO], logging.StreamHandler[Any]]]:
    """Makes standard error this stream, and has the log write to it."""
    made: list[logging.StreamHandler[Any]] = []

    def make(stream: io.StringIO) -> logging.StreamHandler[Any]:
        monkeypatch.setattr(sys, "stderr", stream)
        made.append(logging.StreamHandler(stream))
        logging.getLogger().addHandler(made[0])
        return made[0]

    yield make
    for one in made:
        logging.getLogger().removeHandler(one)


def test_lines_of_the_log_stand_above_the_table_and_not_inside_it(handler: Callable[..., Any]) -> None:
    stderr, stdout = Terminal(), io.StringIO()
    own = handler(stderr)
    table = LiveTable(Console(file=stdout, force_terminal=True, width=100))
    table.entered(phases(BATCH))
    table.entered(phases(BATCH))
    logging.getLogger("learner").warning("something is away")
    table.over()
    table.over()
    assert "something is away" in stdout.getvalue()
    assert "+0.50" in stdout.getvalue()
    assert stderr.getvalue() == ""
    assert own.stream is sys.stderr is stderr
    logging.getLogger("learner").warning("afterwards")
    assert stderr.getvalue() == "afterwards\n"


def test_a_log_that_goes_into_a_file_stays_there(handler: Callable[..., Any]) -> None:
    stderr, stdout = io.StringIO(), io.StringIO()
    handler(stderr)
    table = LiveTable(Console(file=stdout, force_terminal=True, width=100))
    table.entered(phases(BATCH))
    logging.getLogger("learner").warning("something is away")
    table.over()
    assert stderr.getvalue() == "something is away\n"


# TensorBoard


def tensorboard(folder: Path) -> TensorBoard:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install 'heed[test]'")
    return TensorBoard(folder)


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Name and step → value, of the event files of a run: length, checksum, event, checksum, again and again."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found: dict[tuple[str, int], float] = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            if len(content) < 16 + length:  # torn: TensorBoard waits for the rest
                break
            whole, content = content[: 16 + length], content[16 + length :]
            event = Event.FromString(whole[12:-4])
            assert struct.unpack("<I", whole[8:12]) == (masked_crc32c(whole[:8]),)
            assert struct.unpack("<I", whole[-4:]) == (masked_crc32c(whole[12:-4]),)
            assert all((value.tag, event.step) not in found for value in event.summary.value), "drawn twice"
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def test_event_files_hold_each_batch_and_each_update(tmp_path: Path) -> None:
    board, going = tensorboard(tmp_path / "runs"), phases(BATCH)
    board.batch(going)
    going.batches.append({"kl": 1.5})
    board.batch(going)
    report = {"reward": {"auroc": 0.75}, "seconds": {"ppo": 9.0}}
    board.learned(Update(3, "published", 0.0, None, 0, 0, {}, 50, 1, None, report, None))
    board.over()
    board.over()
    batches = scalars(tmp_path / "runs" / "update-000003")
    assert batches["batch/kl", 1] == 1.25
    assert batches["batch/kl", 2] == 1.5
    assert ("batch/score", 2) not in batches
    assert scalars(tmp_path / "runs" / "updates") == {("update/reward_auroc", 3): 0.75, ("seconds/ppo", 3): 9.0}


def test_an_update_that_is_run_again_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, again = tensorboard(tmp_path), tensorboard(tmp_path)
    before = phases(BATCH)
    before.number = 2
    killed.batch(before)
    killed.batch(phases(BATCH))
    killed.over()
    monkeypatch.setattr(Clock, "now", Clock.now + 10)
    going = phases()
    again.entered(going)
    going.batches.append({"kl": 1.5})
    again.batch(going)
    again.entered(going)
    assert scalars(tmp_path / "update-000003") == {("batch/kl", 1): 1.5}
    again.over()
    assert scalars(tmp_path / "update-000002")["batch/kl", 1] == 1.25


def test_a_full_disk_costs_a_warning_and_the_rest_of_the_updates_curves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        disk = Disk(tmp_path / "disk", megabytes=1)
    except NoDisk as why:
        pytest.skip(str(why))
    with contextlib.closing(disk):
        board, going = tensorboard(disk.folder / "runs"), phases(BATCH)
        board.batch(going)
        disk.fill()
        for _ in range(400):  # more than a page of the file has room for, and than any queue holds
            going.batches.append(BATCH)
            board.batch(going)
        assert 0 < len(scalars(disk.folder / "runs" / "update-000003")) < 400 * len(BATCH)
        board.learned(Update(3, "refused", 0.0, None, 0, 0, {}, 50, None, None, {"reward": {"auroc": 0.75}}, None))
        [warning] = caplog.messages
        assert warning.startswith("update 3: nothing more of it is written for TensorBoard: [Errno 28]")
        disk.make_room()
        following = phases(BATCH)
        following.number = 4
        board.entered(following)
        board.batch(following)
        assert scalars(disk.folder / "runs" / "update-000004")["batch/kl", 1] == 1.25


def test_a_folder_that_is_removed_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board, going = tensorboard(tmp_path / "runs"), phases(BATCH)
    board.batch(going)
    shutil.rmtree(tmp_path / "runs")
    for _ in range(2):
        going.batches.append(BATCH)
        board.batch(going)
    assert len(caplog.messages) == 1
    assert "No such file" in caplog.text


def test_a_folder_that_cannot_be_tidied_is_told_of_once_an_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board, going = tensorboard(tmp_path), phases()
    for number in (3, 4):
        going.number = number
        # a folder in a file's place: it cannot be unlinked, whoever asks
        (tmp_path / f"update-{number:06d}" / "events.out.tfevents.0").mkdir(parents=True)
        for _ in range(3):
            board.entered(going)
    assert [message.partition(":")[0] for message in caplog.messages] == ["update 3", "update 4"]


def test_a_missing_library_is_told_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        SettingError, match=r"^HEED_TENSORBOARD=.*: needs tensorboardX: pip install 'heed\[tensorboard\]'"
    ):
        TensorBoard(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
