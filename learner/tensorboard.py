"""Event files for TensorBoard: PPO's batches and the figures of each update, written as they come.

In tensorboardX's words: it needs protobuf alone, where torch's own writer asks for the whole of TensorBoard, with gRPC and a web
server, on the machine that learns. It is imported only where the setting names a folder. Its own writer is not used: that has a
queue and a thread, which a full disk ends, and who then fills the queue waits for ever.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feedback.config import SettingError, variable
from learner.figures import figures
from learner.ledger import Update
from learner.phases import Phases
from learner.watching import Watcher

_log = logging.getLogger(__name__)


class TensorBoard(Watcher):
    """A run for each update's batches, `update-000003`, and one over all updates, `updates`."""

    def __init__(self, folder: Path) -> None:
        """Raises SettingError where tensorboardX is missing or the folder cannot be made."""
        setting = f"{variable('tensorboard')}={folder}"
        try:
            from tensorboardX import event_file_writer, record_writer, summary
        except ImportError:
            raise SettingError(setting, None, "needs tensorboardX: pip install 'heed[tensorboard]'") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(setting, None, f"cannot be made: {error.strerror}") from None
        self.folder = folder
        self.event, self.summary = event_file_writer.event_pb2.Event, summary.Summary
        self.checksum = record_writer.masked_crc32c
        self.given_up = 0
        """The update of which nothing more is written."""

    def entered(self, phases: Phases) -> None:
        if phases.batches or self.given_up == phases.number:
            return
        try:
            for earlier in self._run(phases.number).glob("*tfevents*"):  # a kill ended it, and it begins anew
                earlier.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(phases.number, error)

    def batch(self, phases: Phases) -> None:
        values = {f"batch/{name}": value for name, value in phases.batches[-1].items()}
        file, step = self._run(phases.number) / _name(phases.entered["preparing"]), len(phases.batches)
        self._write(file, phases.number, step, values, first=step == 1)

    def learned(self, update: Update) -> None:
        report = update.report or {}
        values = {f"update/{name.removeprefix('heed_')}": value for name, value in figures(report).items()}
        values |= {f"seconds/{phase}": seconds for phase, seconds in (report.get("seconds") or {}).items()}
        file = self.folder / "updates" / f"{_name(update.started)}.{update.number:06d}"
        self._write(file, update.number, update.number, values, first=True)

    def _run(self, number: int) -> Path:
        return self.folder / f"update-{number:06d}"

    def _write(self, file: Path, number: int, step: int, values: Mapping[str, float], *, first: bool) -> None:
        """Add values to an update's file. After a failure, which may have torn it, nothing more of this update is written."""
        if self.given_up == number:
            return
        told = self.summary(value=[self.summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        records = self._record(step=step, summary=told)
        try:
            if first:
                file.parent.mkdir(parents=True, exist_ok=True)
                records = self._record(file_version="brain.Event:2") + records
            with file.open("ab") as opened:
                opened.write(records)
        except OSError as error:
            self._give_up(number, error)

    def _give_up(self, number: int, error: OSError) -> None:
        self.given_up = number
        _log.warning("update %d: nothing more of it is written for TensorBoard: %s", number, error)

    def _record(self, **what: Any) -> bytes:
        """An event as TensorFlow's record files have it: length, its checksum, content, its checksum."""
        content: bytes = self.event(wall_time=time.time(), **what).SerializeToString()
        length = struct.pack("<Q", len(content))
        length_sum, content_sum = (struct.pack("<I", self.checksum(part)) for part in (length, content))
        return length + length_sum + content + content_sum


def _name(began: float) -> str:
    """TensorBoard reads a run's files in the order of their names."""
    return f"events.out.tfevents.{int(began):010d}"
