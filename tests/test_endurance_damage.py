"""The fast part of the batteries on damaged and hostile files: all of what `make endurance` counts is 0."""

import pytest
from batteries import damage, hostile


@pytest.mark.parametrize("battery", [damage, hostile])
def test_damaged_and_hostile_files(battery):
    found = battery.run(full=False)
    assert found["tries"] and {name: n for name, n in found.items() if name not in ("tries", "bad") and n} == {}, found
