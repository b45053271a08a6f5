"""Swaps: from a changed release to another version speaking, with no reply broken, mixed or refused.

The way of a swap, all of it in a thread of its own:

    look      poll the release file, at once when told that it was changed: is another version wanted than the one that speaks?
    load      read that version and verify it: digests, base, shapes, finite numbers   (serving/adapters.py)
    stage     copy it into a free slot beside the running ones, and try one forward with it   (serving/engine.py)
    warm      let it read what most prompts begin with, so that its first replies need not wait for that
    flip      between two steps the engine changes one integer: replies admitted from now on are the new version's
    drain     replies that were running end on the version they began with; with the last of them its slot is free

Whatever fails on the way, the version that spoke goes on speaking. A failure is logged and counted, and tried again when the
release or the version's files change; after a disk fault or a timeout, every RETRY_S. If the release changes meanwhile, the
newest wins. Who changes it: learner/release.py, or a person (heed adapters promote, rollback).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from feedback.events import Release
from serving.adapters import AdapterStore, BadAdapter, Base
from serving.backend import Backend
from serving.lora import AdapterWeights, Unfit
from serving.native import one_thread
from serving.versions import NoFreeSlot, ProbeFailed

RETRY_S = 5.0
"""Between two attempts at a version that met a passing fault."""

_log = logging.getLogger(__name__)


class PinRefused(Exception):
    """A version that a request names cannot speak now. The message says why, and which versions can."""


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What became of a version, and how long each phase of its swap took."""

    version: int
    outcome: Literal["activated", "failed", "drained"]
    seconds: Mapping[str, float]
    """By phase: `load`, `stage`, `warm`, `flip` of a version that came, `drain` of one that went."""
    error: str | None = None


Listener = Callable[[SwapReport], object]


class Swapper:
    """Keeps one engine on the version that the release of its policy names."""

    def __init__(
        self,
        store: AdapterStore,
        engine: Backend,
        base: Base,
        poll_s: float = 0.2,
        on_activated: Listener | None = None,
        on_failed: Listener | None = None,
        on_drained: Listener | None = None,
        pins: int = 2,
    ) -> None:
        """`poll_s`: seconds between two looks. `pins`: versions kept loaded beside the current one because requests
        name them; the engine needs two slots more than that. Listeners are called in the swapper's thread.
        """
        self._store, self._engine, self._base = store, engine, base
        self._poll_s = poll_s
        self._listeners = {"activated": on_activated, "failed": on_failed, "drained": on_drained}
        self._max_pins = pins
        # one swap or pin at a time; requests never wait for it
        self._swapping = threading.Lock()
        self._reports: list[SwapReport] = []
        self._pinned: dict[int, None] = {}  # least recently named first
        self._draining: dict[int, float] = {}  # version -> since when, by time.monotonic()
        self._given_up: object = None  # the attempt that failed, so that it is not repeated
        self._not_before = 0.0  # by time.monotonic(): when an attempt that met a passing fault is repeated
        self._loaded: tuple[int, AdapterWeights] | None = None  # read and verified, waiting for a slot
        self._stop = threading.Event()
        self._soon = threading.Event()
        self._thread = threading.Thread(target=self._run, name="swapper", daemon=True)
        self.failures = 0
        self.problem: str | None = None
        """Why the release's current version is not the one that speaks; None when it is."""

    def start(self) -> None:
        """Bring the engine to the released version, or else to the last good one or the base; then keep watching.

        Returns once that version speaks, so that a server is not ready before.
        """
        with self._swapping:
            self._begin()
        self._tell()
        self._thread.start()

    def close(self) -> None:
        """Stop watching. The engine goes on with what it has."""
        self._stop.set()
        self._soon.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Look at the release once, and swap if another version is wanted."""
        with self._swapping:
            self._tidy()
            self._follow(self._store.release())
        self._tell()

    def look_soon(self) -> None:
        """Have the swapper's thread look now, instead of at its next time. Does not wait for it."""
        self._soon.set()

    def ensure(self, version: int) -> None:
        """Make sure that requests may name this version, loading it into a free slot if need be; for that it blocks.

        It displaces at most an older pin on which no reply runs. Raises PinRefused.
        """
        there = version in self._engine.loaded() and version not in self._draining
        if not self._swapping.acquire(blocking=not there):
            return  # it is there; while a swap is busy, nobody needs to know that it was named just now
        try:
            if version not in self._engine.loaded() or version in self._draining:
                self._pin(version)
            elif version in self._pinned:
                self._pinned[version] = self._pinned.pop(version)  # now the latest named
        finally:
            self._swapping.release()

    # one swap

    def _begin(self) -> None:
        release = self._store.release()
        for version in dict.fromkeys((release.current, release.last_good, 0)):
            if self._swap(release, version):
                if version != release.current:
                    _log.error("v%d cannot be served; v%d is served instead.", release.current, version)
                return

    def _follow(self, release: Release) -> None:
        """Swap to what the release names, unless that speaks already, or failed and has not changed since."""
        if release.current == self._engine.current:
            self.problem = None
        elif self._attempt(release) != self._given_up and time.monotonic() >= self._not_before:
            self._swap(release, release.current)

    def _swap(self, release: Release, version: int) -> bool:
        """Load, stage, flip; true once the version speaks. Until then, and after any failure, the one before does."""
        attempt = self._attempt(release)
        seconds: dict[str, float] = {}
        try:
            with one_thread():
                if version and not self._prepare(release, version, seconds):
                    return False
            with _timed(seconds, "warm"):
                self._engine.warm(version)
            if self._superseded(release) and version == release.current:
                return False  # another version is wanted by now: the next look brings it
            with _timed(seconds, "flip"):
                self._engine.activate(version)
        except Exception as error:  # whatever is wrong with a new version, the old one goes on
            self._fail(version, seconds, error)
            if version == release.current:
                self.problem = str(error)
                if isinstance(error, OSError):  # a disk that is away, a step that took too long: it may pass
                    self._not_before = time.monotonic() + RETRY_S
                else:
                    self._given_up = attempt
            return False
        if version == release.current:
            self.problem = None
        self._pinned.pop(version, None)
        self._draining.pop(version, None)
        _log.info("v%d speaks (%s).", version, ", ".join(f"{phase} {s * 1000:.1f} ms" for phase, s in seconds.items()))
        self._reports.append(SwapReport(version, "activated", seconds))
        self._tidy()
        return True

    def _prepare(self, release: Release, version: int, seconds: dict[str, float]) -> bool:
        """Load and stage. False when another version is wanted by now, or no slot is free: the next look tries again."""
        if self._loaded is None or self._loaded[0] != version:
            with _timed(seconds, "load"):
                self._loaded = version, self._store.load(version, self._base)
        if self._superseded(release):
            return False
        with _timed(seconds, "stage"):
            if not self._stage(*self._loaded):
                return False
        self._loaded = None
        return not self._superseded(release)

    def _stage(self, version: int, weights: AdapterWeights) -> bool:
        """Stage, dropping idle pins if need be; false when every slot holds a version on which replies run."""
        while True:
            try:
                self._engine.stage(version, weights)
                return True
            except NoFreeSlot:
                if not self._drop_idle_pin():
                    return False

    def _fail(self, version: int, seconds: Mapping[str, float], error: Exception) -> None:
        self._loaded = None
        self.failures += 1
        unforeseen = None if isinstance(error, BadAdapter | ProbeFailed | Unfit) else error
        _log.error("v%d is not served: %s v%d goes on.", version, error, self._engine.current, exc_info=unforeseen)
        self._reports.append(SwapReport(version, "failed", seconds, str(error)))

    def _tidy(self) -> None:
        """Retire what neither speaks nor is pinned (staged, but no longer wanted), and note what has drained."""
        now = time.monotonic()
        for version in self._engine.loaded():
            if version not in (0, self._engine.current, *self._pinned, *self._draining):
                self._engine.retire(version)
                self._draining[version] = now
        for version in self._draining.keys() - self._engine.loaded().keys():
            seconds = {"drain": time.monotonic() - self._draining.pop(version)}
            self._reports.append(SwapReport(version, "drained", seconds))

    # pins

    def _pin(self, version: int) -> None:
        if version not in self._store.release().approved:
            raise PinRefused(f"v{version} neither passed the gate nor was promoted; {self._speaking()}.")
        if len(self._pinned) >= self._max_pins and not self._drop_idle_pin():
            raise PinRefused(f"v{version} finds no free slot now; {self._speaking()}.")
        try:
            with one_thread():
                self._engine.stage(version, self._store.load(version, self._base))
        except (BadAdapter, NoFreeSlot, ProbeFailed, ValueError, TimeoutError, OSError) as error:
            raise PinRefused(f"v{version} cannot be loaded: {error} Of the others, {self._speaking()}.") from error
        self._draining.pop(version, None)
        self._pinned[version] = None

    def _drop_idle_pin(self) -> bool:
        """Free the slot of the least recently named pin on which no reply runs; false when there is none."""
        references = self._engine.loaded()
        for version in self._pinned:
            if not references.get(version):
                del self._pinned[version]
                self._engine.retire(version)
                return True
        return False

    def _speaking(self) -> str:
        return "loaded now: " + ", ".join(f"v{version}" for version in sorted(self._engine.loaded()))

    # looking

    def _superseded(self, release: Release) -> bool:
        return self._store.release().current != release.current

    def _attempt(self, release: Release) -> object:
        return release.generation, release.current, self._store.stamp(release.current)

    def _tell(self) -> None:
        reports, self._reports = self._reports, []
        for report in reports:
            listener = self._listeners[report.outcome]
            try:
                if listener is not None:
                    listener(report)
            except Exception:  # a listener's trouble (a board that is away) must not stop the swaps
                _log.exception("a listener failed on the report of v%d", report.version)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._soon.wait(self._poll_s)
            self._soon.clear()
            if self._stop.is_set():
                return
            try:
                self.look()
            except Exception:  # a fault nobody foresaw must not be the last swap's
                _log.exception("the swapper failed, and looks again in %g s", RETRY_S)
                self._stop.wait(RETRY_S)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = time.perf_counter() - begin
