"""The list of breaks stays alive: each still fits the file that it is for."""

import pytest
from support.breaks import BREAKS, ROOT


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_each_can_be_applied(one):
    assert (ROOT / one.file).read_text().count(one.old) == 1
    assert one.new != one.old and one.noticed_by


def test_names_are_unique():
    assert len({one.name for one in BREAKS}) == len(BREAKS)
