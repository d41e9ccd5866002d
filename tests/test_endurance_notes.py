"""The fast part of the battery of notes."""

from batteries import notes


def test_nothing_is_lost_and_nothing_silent():
    counts = notes.run(full=False)
    bad = counts.pop("bad")
    assert counts.pop("tries") == 60
    assert not any(counts.values()), "\n".join([str(counts), *bad])
