"""Which adapter versions are loaded, in which slot, and how many replies still run on each."""

from __future__ import annotations

import itertools

from serving.sites import BASE


class UnknownVersion(ValueError):
    """The version is not loaded, or on its way out."""


class NoFreeSlot(RuntimeError):
    """Every slot holds a version that is served, draining or being staged."""


class ProbeFailed(RuntimeError):
    """A forward with the adapter did not give finite numbers."""


class VersionInUse(RuntimeError):
    """Replies still run on the version."""


class Versions:
    """Slots by version. Version 0, the base, is always there, in no slot. A slot in use is never freed."""

    def __init__(self, slots: int) -> None:
        self.current, self.slots = 0, slots
        self._slot_of: dict[int, int] = {0: BASE}
        self._uid_of: dict[int, int] = {0: 0}
        self._references: dict[int, int] = {0: 0}
        self._retiring: set[int] = set()
        self._free = list(range(slots))[::-1]
        self._uids = itertools.count(1)

    @property
    def free(self) -> int:
        """How many slots nothing is in, and nothing is being staged into."""
        return len(self._free)

    def loaded(self) -> dict[int, int]:
        """Version to how many replies run on it (or wait for it by name)."""
        return dict(self._references)

    def slot_of(self, version: int) -> int:
        return self._slot_of[version]

    def uid_of(self, version: int) -> int:
        """A number for the weights that a version has now: others under the same name have another."""
        return self._uid_of[version]

    def known(self, version: int) -> bool:
        """True when new requests may name the version."""
        return version in self._slot_of and version not in self._retiring

    def check(self, version: int) -> None:
        """Raise UnknownVersion unless new requests may name the version."""
        if not self.known(version):
            loaded = ", ".join(f"v{v}" for v in sorted(self._slot_of) if self.known(v))
            raise UnknownVersion(f"version v{version} is not loaded; loaded now: {loaded}")

    def reserve(self) -> int:
        """Take a free slot. Raises NoFreeSlot."""
        if not self._free:
            held = ", ".join(f"v{v} ({n} running)" for v, n in sorted(self._references.items()) if v)
            raise NoFreeSlot(f"no adapter slot is free: {held}; retire one, or wait for its last reply")
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a reserved slot back unused."""
        self._free.append(slot)

    def add(self, version: int, slot: int) -> None:
        """A reserved slot now holds this version."""
        self._slot_of[version] = slot
        self._references[version] = 0
        self.changed(version)

    def changed(self, version: int) -> None:
        """The version has new weights."""
        self._uid_of[version] = next(self._uids)

    def unused_slot(self, version: int) -> int:
        """The slot of a version on which nothing runs. Raises VersionInUse, UnknownVersion."""
        if version not in self._slot_of:
            self.check(version)
        if self._references[version]:
            raise VersionInUse(f"{self._references[version]} replies still run on version v{version}; wait for them")
        return self._slot_of[version]

    def remove(self, version: int) -> None:
        """Forget a version on which nothing runs and free its slot. Raises VersionInUse."""
        self._free.append(self.unused_slot(version))
        del self._references[version], self._slot_of[version], self._uid_of[version]
        self._retiring.discard(version)
        if self.current == version:
            self.current = 0

    def activate(self, version: int) -> None:
        """New requests that name no version get this one. Raises UnknownVersion."""
        if not self.keep(version):
            self.check(version)
        self.current = version

    def keep(self, version: int) -> bool:
        """True when the version is loaded; a retirement that has not happened yet is taken back."""
        self._retiring.discard(version)
        return version in self._slot_of

    def retire(self, version: int) -> None:
        """Free the version's slot as soon as no reply refers to it. Raises ValueError for base and current version."""
        if version not in self._slot_of:
            return
        if version == 0 or version == self.current:
            raise ValueError(f"version v{version} is served now and cannot be retired; activate another one first")
        self._retiring.add(version)
        self._free_if_drained(version)

    def refer(self, version: int) -> None:
        """One more reply runs on the version."""
        self._references[version] += 1

    def drop(self, version: int) -> None:
        """One reply on the version has ended."""
        self._references[version] -= 1
        self._free_if_drained(version)

    def _free_if_drained(self, version: int) -> None:
        if version in self._retiring and self._references[version] == 0:
            self.remove(version)
