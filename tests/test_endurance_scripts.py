"""The fast part of the battery of scripts."""

from batteries import scripts


def test_nothing_that_data_brings_is_more_than_text():
    counts = scripts.run(full=False)
    bad = counts.pop("bad")
    assert counts.pop("tries") > 30
    assert not any(counts.values()), "\n".join([str(counts), *bad])


def test_it_would_be_seen():
    assert scripts.check("<p><img src=x></p>")[0] == "executions"
    assert scripts.check("a\x1b[2J")[0] == "unmarked"
