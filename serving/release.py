"""The release file: which version is served now. The one mutable file of the adapter store.

It is written by the learner, the admin routes and the command line, each under a lock: read, change, replace
atomically. So a rollback works with the learner dead, and a reader never sees half a change. A file that someone broke
by hand changes nothing: readers keep what they last read and say so, writers refuse to touch it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from feedback.events import SCHEMA, Release, ReleaseChange
from serving.durable import locked, replace

HISTORY = 100

Action = Literal["promote", "rollback", "pause", "resume", "candidate", "withdraw"]
By = Literal["learner", "operator"]

_log = logging.getLogger(__name__)


class ReleaseRefused(Exception):
    """A change that the release does not allow; nothing was changed."""


class ReleaseBroken(Exception):
    """The release file is no release: torn, edited by hand into nonsense, or from a newer Heed."""


class ReleaseFile:
    """Reads and changes `<root>/<policy>/release.json`. Safe from any thread, and from any number of processes."""

    def __init__(self, folder: Path, policy: str) -> None:
        self.path = folder / "release.json"
        self._policy = policy
        self._reading = threading.Lock()
        self._last_good: Release | None = None
        self._last_seen: tuple[int, int, int] | None = None
        self._broken: ReleaseBroken | None = None

    def read(self) -> Release:
        """The release now. Cheap enough to poll; it never fails.

        While the file is broken it is the last good one that this process read, else the one that serves the base.
        """
        with self._reading:
            seen = _stamp(self.path)
            if seen != self._last_seen or self._last_good is None:
                self._last_seen = seen
                self._look()
            return self._last_good or Release(policy=self._policy)

    @property
    def broken(self) -> str | None:
        """What is wrong with the file now, or None."""
        self.read()
        return str(self._broken) if self._broken else None

    def change(
        self,
        action: Action,
        by: By,
        *,
        version: int | None,
        reason: str,
        exists: Callable[[int], bool],
        expected: int | None = None,
    ) -> Release:
        """Apply one change and return the new release. A change that changes nothing returns the old one.

        `exists` says whether a version is still in the store; `expected` is the generation that the caller decided on.
        Raises ReleaseRefused, ReleaseBroken, StoreBusy, OSError; the file is then as it was.
        """
        with locked(self.path.parent / ".release.lock"):
            old = self.read_strictly()
            if expected is not None and old.generation != expected:
                raise ReleaseRefused(
                    f"{action} was decided on generation {expected} of the release, which is at {old.generation} "
                    f"by now. Read it again and decide anew."
                )
            new = _apply(old, action, by, version, exists)
            if new == old:
                return old
            new = _with_history(new, action, by, reason)
            replace(self.path, new.model_dump_json(by_alias=True, indent=1).encode() + b"\n")
            return new

    def _look(self) -> None:
        try:
            self._last_good, self._broken = self.read_strictly(), None
        except ReleaseBroken as error:
            if self._broken is None or str(self._broken) != str(error):
                kept = f"generation {self._last_good.generation}" if self._last_good else "the base"
                _log.error("%s Until then: %s.", error, kept)
            self._broken = error
            if isinstance(error.__cause__, OSError):
                self._last_seen = None  # the file may be well, and this reader out of luck: it looks again

    def read_strictly(self) -> Release:
        """The release as the file says; where there is no file, the one that serves the base. Raises ReleaseBroken."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            if self._last_good is not None and self._last_good.generation > 0:
                raise ReleaseBroken(
                    f"{self.path} is gone, which was there before. Restore it, or begin anew: heed adapters promote."
                ) from None
            return Release(policy=self._policy)
        except OSError as error:
            raise ReleaseBroken(f"{self.path} cannot be read: {error}.") from error
        try:
            release = Release.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ReleaseBroken(self._say(f"{where}: {first['msg']}")) from error
        problem = _problem(release, self._policy)
        if problem:
            raise ReleaseBroken(self._say(problem))
        return release

    def _say(self, problem: str) -> str:
        return f"{self.path} is no release ({problem}). Restore it, or delete it and promote again."


def _problem(release: Release, policy: str) -> str | None:
    if release.schema_ > SCHEMA:
        return f"it has schema {release.schema_}, this Heed reads up to {SCHEMA}: upgrade Heed"
    if release.policy != policy:
        return f"it belongs to policy {release.policy!r}, not {policy!r}"
    if min(release.generation, release.current, release.last_good, release.candidate or 0) < 0:
        return "a negative number"
    if release.current and release.current not in release.approved:
        return f"current v{release.current} is not among the approved versions"
    return None


def _apply(old: Release, action: Action, by: By, version: int | None, exists: Callable[[int], bool]) -> Release:
    if action == "promote":
        return _promote(old, by, version, exists)
    if action == "rollback":
        return _roll_back(old, exists)
    if action == "candidate":
        chosen = _existing(version, exists)
        return old.model_copy(update={"candidate": chosen, "approved": _approved(old, chosen, exists)})
    if action == "withdraw":
        return old.model_copy(update={"candidate": None})
    if action in ("pause", "resume"):
        return old.model_copy(update={"paused": action == "pause"})
    raise ReleaseRefused(f"{action!r} is no change of a release.")


def _promote(old: Release, by: By, version: int | None, exists: Callable[[int], bool]) -> Release:
    chosen = _existing(version, exists)
    if by == "learner" and old.paused:
        raise ReleaseRefused(f"v{chosen} is not promoted: the release is paused. An operator can resume it.")
    if chosen == old.current:
        return old
    return old.model_copy(
        update={
            "current": chosen,
            "last_good": old.current,
            "candidate": None if old.candidate == chosen else old.candidate,
            "approved": _approved(old, chosen, exists),
        }
    )


def _roll_back(old: Release, exists: Callable[[int], bool]) -> Release:
    target = old.last_good
    if target == old.current:
        raise ReleaseRefused(f"nothing to roll back to: v{old.current} is served, and nothing was served before it.")
    if target and not exists(target):
        raise ReleaseRefused(
            f"v{target}, served before v{old.current}, is no longer in the store. "
            f"Promote another version, or 0 for the base."
        )
    return old.model_copy(
        update={
            "current": target,
            "last_good": _served_before(old, target),
            "approved": _approved(old, target, exists),
        }
    )


def _existing(version: int | None, exists: Callable[[int], bool]) -> int:
    if version is None:
        raise ReleaseRefused("a version is needed: its number, or 0 for the base.")
    if version and not exists(version):
        raise ReleaseRefused(f"v{version} is not in the store; it was never published, or was deleted.")
    return version


def _approved(old: Release, chosen: int, exists: Callable[[int], bool]) -> tuple[int, ...]:
    """Those approved before that are still in the store, and the chosen one."""
    return tuple(sorted({version for version in (*old.approved, chosen) if version and exists(version)}))


def _served_before(release: Release, version: int) -> int:
    """The version that was served before `version` was promoted, by the history: where the next rollback goes."""
    stack = [0]
    for change in release.changes:
        if change.action == "promote":
            stack.append(change.current)
        elif change.action == "rollback" and len(stack) > 1:
            stack.pop()
    while len(stack) > 1 and stack[-1] != version:
        stack.pop()
    return stack[-2] if len(stack) > 1 else 0


def _with_history(new: Release, action: Action, by: By, reason: str) -> Release:
    generation = new.generation + 1
    change = ReleaseChange(
        generation=generation,
        at=time.time(),
        action=action,
        by=by,
        current=new.current,
        candidate=new.candidate,
        reason=reason,
    )
    return new.model_copy(update={"generation": generation, "changes": (*new.changes, change)[-HISTORY:]})


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file is replaced or written."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
