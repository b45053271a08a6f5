"""What this machine gives: folders that can be written, room on the disks, the time."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from deploy.finding import Finding, Seen, Verdict

DISK_WARN, DISK_FAIL = 2 << 30, 200 << 20
"""Free bytes of a disk below which to warn, and to fail."""
_EFFECTIVE = {"effective_ids": os.access in os.supports_effective_ids}
FEW_FILES = 1000
"""So many more files must fit on a disk."""


def folders(seen: Seen) -> Iterator[Finding]:
    """The data folder, and the adapter store where that lies elsewhere."""
    config = seen.config
    yield _folder("data", config.serving.feedback.data, "HEED_DATA")
    if config.serving.adapters is not None:
        yield _folder("store", config.serving.adapters, "HEED_ADAPTERS")


def _folder(name: str, folder: Path, setting: str) -> Finding:
    folder, place = folder.absolute(), _existing(folder.absolute())
    if not place.is_dir():
        return Finding(name, "fail", f"{place} is not a folder", f"Name another one with {setting}.")
    try:
        with tempfile.TemporaryFile(dir=place) as probe:  # which has no name, and leaves nothing behind
            probe.write(b"can this be written?")
    except OSError as error:
        do = f"Give it to that user (chown -R), start Heed as its owner, or set {setting}. Owner: {_owner(place)}."
        return Finding(name, "fail", f"{place} cannot be written by {_user()}: {error.strerror}", do)
    closed = next((path for path in _files(folder) if not os.access(path, os.R_OK | os.W_OK, **_EFFECTIVE)), None)
    if closed is not None:
        do = f"It belongs to {_owner(closed)}: give it to the user that Heed runs as, e.g. chown -R."
        return Finding(name, "fail", f"{closed} cannot be read and written by {_user()}", do)
    return Finding(name, "ok", f"{folder} can be written" + ("" if place == folder else " (it is not there yet)"))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _files(folder: Path) -> Iterator[Path]:
    """What server and learner write again and again: not each version."""
    for pattern in ("secret", "*.lock", "*/*.db", "*/*.json", "*/.highest", "release.json"):
        yield from folder.glob(pattern)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"user {os.getuid()}"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"


def disks(seen: Seen) -> Iterator[Finding]:
    """Each disk that Heed writes to, once."""
    config = seen.config
    places = [_existing(config.serving.feedback.data.absolute()), _existing(config.serving.adapter_root.absolute())]
    for place in {path.stat().st_dev: path for path in reversed(places)}.values():
        free, files = shutil.disk_usage(place).free, os.statvfs(place)
        verdict: Verdict = "fail" if free < DISK_FAIL else "warn" if free < DISK_WARN else "ok"
        says = f"{free / 2**30:.1f} GiB free for {place}"
        if files.f_files and files.f_favail < FEW_FILES:
            verdict, says = "fail", f"{says}, and only {files.f_favail} more files fit (inodes)"
        do = "" if verdict == "ok" else "Make room, or move the folder: a full disk refuses feedback."
        yield Finding("disk", verdict, says, do)


def clock(seen: Seen) -> Iterator[Finding]:
    """Against the file system's clock, and against the newest thing that Heed wrote."""
    with tempfile.NamedTemporaryFile() as probe:
        drift = abs(time.time() - Path(probe.name).stat().st_mtime)
    data = seen.config.serving.feedback.data
    written = [path.stat().st_mtime for path in data.glob("log/*") if path.is_file()]
    newest = max(written, default=0.0)
    if newest > time.time() + 60:
        ahead = newest - time.time()
        yield Finding("clock", "fail", f"the log was written {ahead:.0f} s in the future", "Set this machine's clock.")
    elif drift > 5:
        yield Finding("clock", "warn", f"{drift:.0f} s from the file system's", "Set this machine's clock (NTP).")
    else:
        yield Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"))
