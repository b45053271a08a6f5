"""The list of planted faults stays true to the code; `make faults` plants them."""

from __future__ import annotations

import pytest

from tests.plant import ROOT, Fault, faults


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text("utf-8").count(fault.stands) == 1
    assert fault.planted != fault.stands
    assert all((ROOT / path).is_file() for path in fault.tests)


def test_there_are_enough_of_them() -> None:
    assert len({fault.name for fault in faults()}) == len(faults()) >= 20
