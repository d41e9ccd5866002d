"""What a line asks for: words, a sentence, conditions."""

import pytest

from sae_lab.feature_index import query
from sae_lab.feature_index.searching import stem


@pytest.mark.parametrize(
    ("line", "kind", "text", "label", "limits"),
    [
        ("war", "words", "war", None, []),
        ("New York City", "words", "New York City", None, []),
        ("The army marched on", "sentence", "The army marched on", None, []),
        ('"war"', "sentence", "war", None, []),
        ("“At dawn” density>1%", "sentence", "At dawn", None, [("density", ">", 0.01)]),
        ('"not typed to its end', "sentence", "not typed to its end", None, []),
        ('"if count > 5: stop"', "sentence", "if count > 5: stop", None, []),  # no condition within quotation marks
        ('He said "no" to them', "sentence", 'He said "no" to them', None, []),
        ('label:"at war" Density >= 5', "", "", "at war", [("density", ">=", 5.0)]),
        ("war density>0.1% norm<20 label:arms", "words", "war", "arms", [("density", ">", 0.001), ("norm", "<", 20.0)]),
        ("label:", "", "", "", []),
        ("  ", "", "", None, []),
        ("max", "words", "max", None, []),
    ],
)
def test_parse(line, kind, text, label, limits):
    assert query.parse(line) == (kind, text, label, limits)


def test_what_was_searched_is_said():
    said = str(query.parse('"At dawn" density<1% label:arms'))
    assert said == "sentence: At dawn; density < 0.01, label with “arms”"
    assert str(query.parse("war")) == "words: war" and str(query.parse("")) == ""


def test_a_limit_that_is_no_number():
    with pytest.raises(ValueError, match="density is compared with a number, got 'x': write for instance"):
        query.parse("war density>x")


@pytest.mark.parametrize(
    ("word", "stemmed"),
    [("wars", "war"), ("cities", "city"), ("houses", "house"), ("class", "class"), ("virus", "virus"), ("war", "war"),
     ("s", "s"), ("his", "his"), ("shoes", "shoe")],
)  # fmt: skip
def test_stem(word, stemmed):
    assert stem(word) == stemmed
