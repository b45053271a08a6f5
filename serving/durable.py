"""How the adapter store writes: whole or not at all, one writer at a time, on disk before it is said to be done."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_WAIT_S = 30.0


class StoreBusy(Exception):
    """Another process has held a lock of the store for too long."""


def replace(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file in one step, and return once that is on disk. The caller holds the lock that names one writer.

    `mode`: who may read and write it, less what the umask takes away.
    """
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)  # a mode counts only where a file is made
    try:
        with open(draft, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names made or changed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Hold the lock of this file against every other thread and process. Freed by the system when a process dies.

    Raises StoreBusy after `wait_s` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + wait_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise StoreBusy(
                        f"{path} has been locked by another process for {wait_s:g} s. Is one stuck?"
                    ) from None
                time.sleep(0.01)
        yield
