"""A disk of a few megabytes, a tmpfs, that can be filled to its last byte."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class NoDisk(Exception):
    """Nothing may be mounted here; the message says why."""


class Disk:
    """A file system of its own, mounted at `folder`."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        """Raises NoDisk."""
        folder.mkdir()
        self.folder = folder
        self._ballast = folder / "ballast"
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise NoDisk(f"mount cannot be run: {error}") from error
        if done.returncode != 0:
            raise NoDisk(done.stderr.strip())

    def fill(self) -> None:
        """From now on there is no room for anything, until make_room."""
        with self._ballast.open("ab", buffering=0) as ballast:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        ballast.write(b"\0" * size)
                except OSError:  # try with less
                    continue

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def used(self) -> float:
        """The share of it that is in use, 0 to 1."""
        state = os.statvfs(self.folder)
        return 1 - state.f_bavail / state.f_blocks

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
