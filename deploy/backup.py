"""`heed backup`: a copy of the data folder, made while server and learner go on, that they can be started on.

    the learner's state → releases in the log → adapters → board → outbox → the log → the rest

In this order the copy is what a kill might have left behind. What the state has read, the log has by the time it is copied;
what the board calls accepted, the outbox or the log has; what the state calls published, the store has. Databases are copied
by SQLite itself, each as it is at one moment; everything else was put in place by one rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.door import NotDone
from feedback.events import FEEDBACK, RELEASES
from feedback.sqlite_file import open_reading, sync_folder
from learner.config import LearnerConfig

BOARD = "board"
"""Never the truth: a damaged file of it is left out."""
FIRST = ("learner/state.db", f"log/{RELEASES}.db", "learner", "adapters", BOARD, "outbox", f"log/{FEEDBACK}.db", "log")
"""What is copied before the rest, in this order; a folder with all that is in it.

Feedback comes before the exchanges, so that each finds the one that it is about.
"""
LEFT_OUT = (".lock", ".tmp", ".new", "-wal", "-shm", "-journal")
"""Endings of what belongs to a running process, or to a database that is copied."""
DRAFT = ".heed-backup.tmp"
"""How the name of a copy that is not whole yet ends."""
PAGES = 2000
"""Of a database, copied at a time: 8 MB."""


def run(out: Path, config: LearnerConfig, console: Console, as_json: bool) -> None:
    """Make the copy, and give it its name once it is whole and on disk. Raises NotDone, OSError."""
    data, adapters, out = (
        config.serving.feedback.data.absolute(),
        config.serving.adapter_root.absolute(),
        out.absolute(),
    )
    started = time.monotonic()
    size = _check(data, adapters, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out.parent)
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}{DRAFT}")
    draft.mkdir(mode=0o700)  # it will hold what people said, and the secret
    held = _hold(draft)
    try:
        if size > (free := shutil.disk_usage(draft).free):
            raise NotDone(f"{size / 1e6:,.0f} MB are to be copied, and {out.parent} has {free / 1e6:,.0f} MB free.")
        size = _copy(data, adapters, draft, console, size)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(held)
    sync_folder(out.parent)
    seconds, kafka = time.monotonic() - started, config.serving.feedback.kafka.kafka_bootstrap is not None
    if as_json:
        print(json.dumps({"out": str(out), "bytes": size, "seconds": round(seconds, 3), "with_log": not kafka}))
        return
    console.print(f"{out}: {size / 1e6:,.1f} MB in {seconds:.1f} s", soft_wrap=True, markup=False)
    if kafka:
        console.print("The log is Kafka's to keep: what comes after this copy is read from there again.")
    moved = f", its folder adapters in place of {adapters}" if adapters.parent != data else ""
    console.print(f"To restore, stop Heed, put a copy of it in place of {data}{moved}, and start.", soft_wrap=True)


def _check(data: Path, adapters: Path, out: Path) -> int:
    """About how many bytes there are to copy. Raises NotDone where there are none, or `out` is no place for them."""
    if not data.is_dir():
        raise NotDone(f"there is no data folder {data}: name it with --data or HEED_DATA.")
    if out.exists():
        raise NotDone(f"{out} is there already, and a backup replaces nothing: name a new folder.")
    if any(out.resolve().is_relative_to(folder.resolve()) for folder in (data, adapters)):
        raise NotDone(f"{out} lies in what it is to be a copy of: name a folder elsewhere.")
    return sum(_size(path) for path, _ in _files(data, adapters))


def _files(data: Path, adapters: Path) -> Iterator[tuple[Path, Path]]:
    """Each file to copy, with its place in the copy, in the order of this file's first lines. Looked for as it goes."""
    done = set[Path]()
    for name in (*FIRST, ""):
        where = adapters if name == "adapters" else data / name
        for path in [where] if where.is_file() else _walk(where, links=bool(name)):
            place = Path(name) / path.relative_to(where)
            if place not in done and (name or place.parts[0] != "adapters"):  # which may lie elsewhere
                done.add(place)
                yield path, place


def _walk(folder: Path, *, links: bool, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The files of a folder, then those of its folders, so that a release comes before the versions that it names.

    A file that is a link to another disk, or to a mounted secret, is copied as what it leads to; so is a folder, if `links`.
    """
    for path in _entries(folder):
        if path.is_file():
            yield path
    within = above | {folder.resolve()}
    for path in _entries(folder):
        if path.is_dir() and (links or not path.is_symlink()) and path.resolve() not in within:
            yield from _walk(path, links=links, above=within)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.endswith(LEFT_OUT))
    except FileNotFoundError:  # an old version, deleted by now; or nothing of this kind was ever kept
        return []


def _copy(data: Path, adapters: Path, draft: Path, console: Console, size: int) -> int:
    """Copy everything into `draft`; returns how many bytes it has. Raises NotDone, OSError."""
    columns = (TextColumn("copying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=size)
        copied = 0
        for path, place in _files(data, adapters):
            target = draft / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if _copy_file(path, target, lambda: bar.update(task)):
                copied += _size(target)
                bar.update(task, completed=copied)
        for name, _, _ in os.walk(draft):
            folder = Path(name)
            first, *below = (*folder.relative_to(draft).parts, "")
            _own_alike((adapters if first == "adapters" else data / first).joinpath(*below), folder)
            sync_folder(folder)
    return copied


def _copy_file(path: Path, target: Path, went_on: Callable[[], None]) -> bool:
    """Copy one file, to disk; False where it is gone by now, or cannot be read and is no loss."""
    try:
        if path.suffix == ".db":
            _copy_database(path, target, went_on)
        else:
            shutil.copyfile(path, target)
        _make_alike(path, target)
    except FileNotFoundError:
        target.unlink(missing_ok=True)
        return False
    except sqlite3.DatabaseError as error:
        target.unlink(missing_ok=True)
        if path.parent.name == BOARD:
            return False
        raise NotDone(f"{path} cannot be copied: {error}. See heed check.") from error
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return True


def _copy_database(path: Path, target: Path, went_on: Callable[[], None]) -> None:
    """By SQLite's own backup, whoever writes meanwhile. Raises sqlite3.DatabaseError, also where the copy is not whole."""
    with closing(open_reading(path)) as source, closing(sqlite3.connect(target)) as copy:
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # from here on it stays as it is now, for us
        source.backup(copy, pages=PAGES, progress=lambda *_: went_on())
        verdict = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {verdict}")


def _make_alike(path: Path, target: Path) -> None:
    """Mode, times and owner."""
    shutil.copystat(path, target)
    _own_alike(path, target)


def _own_alike(path: Path, target: Path) -> None:
    """Where we may, the same owner: a server that is not root must be able to use what root restores."""
    if os.geteuid() == 0:
        with suppress(FileNotFoundError):  # a version's folder, deleted by now
            found = path.stat()
            os.chown(target, found.st_uid, found.st_gid)


def _hold(draft: Path) -> int:
    """Lock a draft for as long as this process lives, where the disk has locks; returns what to close."""
    handle = os.open(draft, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _sweep(folder: Path) -> None:
    """Delete what backups that were killed have left here: it is large, and holds what people said."""
    for draft in folder.glob(f".*{DRAFT}"):
        with suppress(OSError):  # another backup is at work on it, or it is not ours to delete
            handle = os.open(draft, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(draft)
            finally:
                os.close(handle)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
