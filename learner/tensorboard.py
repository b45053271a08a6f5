"""Event files for TensorBoard: PPO's batches and the figures of each update, written as they come.

By tensorboardX: it needs protobuf alone, where torch's own writer asks for the whole of TensorBoard, with gRPC and a web server,
on the machine that learns. It is imported only where the setting names a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feedback.config import SettingError, variable
from learner.figures import figures
from learner.ledger import Update
from learner.phases import Phases
from learner.watching import Watcher

FLUSH_S = 1
"""So that who looks sees the newest batch but one."""


class TensorBoard(Watcher):
    """A run for each update's batches, `update-000003`, and one over all updates, `updates`."""

    def __init__(self, folder: Path) -> None:
        """Raises SettingError where tensorboardX is missing or the folder cannot be made."""
        setting = f"{variable('tensorboard')}={folder}"
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise SettingError(setting, None, "needs tensorboardX: pip install 'heed[tensorboard]'") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(setting, None, f"cannot be made: {error.strerror}") from None
        self.folder, self.open = folder, SummaryWriter
        self.run: Any = None

    def batch(self, phases: Phases) -> None:
        if self.run is None:
            self.run = self.open(str(self.folder / f"update-{phases.number:06d}"), flush_secs=FLUSH_S)
        for name, value in phases.batches[-1].items():
            self.run.add_scalar(f"batch/{name}", value, len(phases.batches))

    def learned(self, update: Update) -> None:
        report = update.report or {}
        with self.open(str(self.folder / "updates")) as run:
            for name, value in figures(report).items():
                run.add_scalar(f"update/{name.removeprefix('heed_')}", value, update.number)
            for phase, seconds in (report.get("seconds") or {}).items():
                run.add_scalar(f"seconds/{phase}", seconds, update.number)

    def over(self) -> None:
        if self.run is not None:
            self.run.close()
            self.run = None
