"""The version table: references hold slots, and only the last one frees them."""

from __future__ import annotations

import pytest

from serving.sites import BASE
from serving.versions import NoFreeSlot, UnknownVersion, VersionInUse, Versions


def table(*versions: int, slots: int = 2) -> Versions:
    made = Versions(slots)
    for version in versions:
        made.add(version, made.reserve())
    return made


def test_the_base_is_always_there_and_takes_no_slot():
    versions = table(slots=0)
    assert (versions.current, versions.loaded(), versions.slot_of(0)) == (0, {0: 0}, BASE)
    with pytest.raises(NoFreeSlot):
        versions.reserve()


def test_a_retired_version_goes_with_its_last_reference():
    versions = table(1, 2)
    versions.activate(2)
    versions.refer(1)
    versions.refer(1)
    versions.retire(1)
    versions.drop(1)
    assert versions.loaded() == {0: 0, 1: 1, 2: 0}
    assert not versions.known(1)
    with pytest.raises(UnknownVersion, match="v1 is not loaded; loaded now: v0, v2"):
        versions.check(1)
    with pytest.raises(NoFreeSlot, match=r"v1 \(1 running\), v2 \(0 running\)"):
        versions.reserve()
    slot = versions.slot_of(1)
    versions.drop(1)
    assert versions.loaded() == {0: 0, 2: 0}
    assert versions.reserve() == slot


def test_a_retirement_is_taken_back_by_activation_or_staging():
    versions = table(1)
    versions.refer(1)
    versions.retire(1)
    assert versions.keep(1)
    assert versions.known(1)
    versions.retire(1)
    versions.activate(1)
    versions.drop(1)
    assert versions.loaded() == {0: 0, 1: 0}
    assert not versions.keep(7)
    with pytest.raises(UnknownVersion):
        versions.activate(7)


def test_a_version_in_use_is_neither_replaced_nor_removed():
    versions = table(1)
    versions.activate(1)
    versions.refer(1)
    with pytest.raises(VersionInUse, match="1 replies"):
        versions.unused_slot(1)
    with pytest.raises(VersionInUse):
        versions.remove(1)
    versions.drop(1)
    versions.remove(1)
    assert (versions.current, versions.loaded()) == (0, {0: 0})
    with pytest.raises(UnknownVersion):
        versions.unused_slot(1)


def test_a_reserved_slot_can_be_given_back():
    versions = table(slots=1)
    slot = versions.reserve()
    versions.release(slot)
    assert versions.reserve() == slot
