"""The fast part of the battery of bad arguments."""

from batteries import bad_arguments


def test_bad_arguments():
    found = bad_arguments.run(full=False)
    assert found["unknown"] == found["silent"] == 0, found["bad"]
    assert found["unclear"] <= 0.02 * found["tries"], found["bad"]
