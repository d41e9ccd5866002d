"""The fast part of the hostile server's tries."""

from batteries import ndif


def test_whatever_a_server_answers_is_our_error_in_time_and_without_the_key():
    counts = ndif.run(full=False)
    bad = counts.pop("bad")
    assert counts.pop("tries") == 30
    assert not any(counts.values()), "\n".join([str(counts), *bad])
