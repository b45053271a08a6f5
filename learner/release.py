"""What the learner does to the release: serve a version that passed the gate, and mirror each change to the log.

An operator's hand goes first: while the release is paused nothing is promoted, and a release that was changed by hand
during an update keeps what the hand chose.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from feedback.events import RELEASES, Release
from feedback.log import Log
from learner.ledger import number_of
from serving.adapters import AdapterStore, BadAdapter, Base, Manifest, ReleaseRefused

if TYPE_CHECKING:
    from serving.lora import AdapterWeights

_log = logging.getLogger(__name__)

Outcome = Literal["released", "paused", "passed_over"]


class Releaser:
    """Promotes versions, finds those that updates made, and mirrors the release's changes, the operator's too."""

    def __init__(self, store: AdapterStore, base: Base, log: Log) -> None:
        self.store = store
        self.base = base
        self.log = log
        self._mirrored: int | None = None
        self.highest_mirrored = 0
        """Of the versions that releases in the log name: the store may have been restored from an older copy."""

    def promote(self, version: int, *, instead_of: int, reason: str) -> Outcome:
        """Serve a gated version to everyone, unless the release is paused or no longer names `instead_of`.

        To be called again after a kill: a version that is served already is not promoted twice. Raises BadAdapter,
        ReleaseBroken, ReleaseRefused, StoreBusy, OSError; the release is then as it was.
        """
        release = self.store.release()
        if version == release.current or any(change.current == version for change in release.changes):
            return "released"
        if release.paused:
            return "paused"
        if release.current != instead_of:
            return "passed_over"
        try:
            self.store.change(
                "promote", "learner", version=version, reason=reason, base=self.base, expected=release.generation
            )
        except ReleaseRefused:
            if self.store.release().generation == release.generation:
                raise
            # someone changed the release between our look and our change: look again
            return self.promote(version, instead_of=instead_of, reason=reason)
        return "released"

    def made_by_updates(self) -> list[Manifest]:
        """Manifests of the versions that updates on this base made, the oldest first."""
        return [manifest for manifest in self._made() if manifest.base == self.base.fingerprint]

    def highest_number(self) -> int:
        """Of the updates that made the store's versions, whatever their base."""
        return max(map(number_of, self._made()), default=0)

    def _made(self) -> list[Manifest]:
        manifests = []
        for version in self.store.versions():
            try:
                manifest = self.store.manifest(version)
            except BadAdapter:
                continue  # reported by whoever serves it
            if isinstance(manifest.update.get("number"), int):
                manifests.append(manifest)
        return manifests

    def made_by(self, number: int) -> Manifest | None:
        """The version that an update made, where it got that far."""
        return next((one for one in self.made_by_updates() if number_of(one) == number), None)

    def speaks(self, release: Release) -> int:
        """The version that a server of this base speaks from its start (serving/swap.py), and training goes on from: the one
        that is released, or the last good one where that is none of this base's or damaged, or else 0, the base."""
        for version in dict.fromkeys((release.current, release.last_good)):
            try:
                if version:
                    self.store.verify(version, self.base)
                return version
            except BadAdapter as error:
                _log.warning("training does not go on from what is released: %s", error)
        return 0

    def weights(self, version: int) -> AdapterWeights | None:
        """What training goes on from; None for the base, and where the version does not fit this base."""
        if version == 0:
            return None
        try:
            return self.store.load(version, self.base)
        except BadAdapter as error:
            _log.warning("learning anew from the base: %s", error)
            return None

    def mirror(self) -> None:
        """Append what changed since the last mirroring to the log: the release, with its new changes only.

        Raises LogUnavailable; the next call then catches up.
        """
        release = self.store.release()
        if self._mirrored is None:
            self._mirrored = self._last_mirrored()
        if release.generation == self._mirrored:
            return
        # a lower generation: the file was deleted and begins anew
        since = self._mirrored if release.generation > self._mirrored else 0
        new = tuple(change for change in release.changes if change.generation > since)
        event = release.model_copy(update={"changes": new}).model_dump_json(by_alias=True)
        self.log.append(RELEASES, release.policy, event)
        self._mirrored = release.generation

    def _last_mirrored(self) -> int:
        """Generation of the last release of this policy in the log; 0 where there is none."""
        generation, reached = 0, dict[str, int]()
        while records := self.log.read(RELEASES, reached, 1000):
            reached |= {record.partition: record.offset for record in records}
            own = [Release.model_validate_json(one.event) for one in records if one.key == self.store.policy]
            generation = own[-1].generation if own else generation
            named = [change.current for release in own for change in release.changes]
            self.highest_mirrored = max(self.highest_mirrored, *named, *(release.current for release in own))
        return generation
