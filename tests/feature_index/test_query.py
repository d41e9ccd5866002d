"""What a line asks for: words, a sentence, conditions."""

import math

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
        ('label:"not typed to', "", "", "not typed to", []),
        ('"', "", "", None, []),
        ('""', "", "", None, []),
        ('" " density<inf', "", "", None, [("density", "<", math.inf)]),
        ("“", "", "", None, []),
        ("?!…", "words", "?!…", None, []),
        ("a<b x->y http://z 12:30 size>3 note:this", "sentence", "a<b x->y http://z 12:30 size>3 note:this", None, []),
        (">5 <", "words", ">5 <", None, []),
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


@pytest.mark.parametrize("limit", ["x", "NaN", "nan%", "%", "0,1", "--1", "9" * 9 + "x"])
def test_a_limit_that_is_no_number(limit):
    with pytest.raises(ValueError, match=f"density is compared with a number, got '{limit}': write for instance"):
        query.parse(f"war density>{limit}")


@pytest.mark.parametrize(
    ("line", "name", "meant"),
    [("densty>0.1%", "densty", "density"), ("war Densitiy < 5", "Densitiy", "density"), ("norms>=2", "norms", "norm"),
     ("war labels:arms", "labels", "label"), ("count=5", "count", "count"), ('"a sentence" lable:x', "lable", "label")],
)  # fmt: skip
def test_a_condition_that_is_misspelled(line, name, meant):
    """As words it would find nothing, or the wrong features."""
    with pytest.raises(ValueError, match=f"conditions are density, .*, got '{name}:?'; did you mean {meant}\\?"):
        query.parse(line)


@pytest.mark.parametrize(
    ("word", "stemmed"),
    [("wars", "war"), ("cities", "city"), ("houses", "house"), ("class", "class"), ("virus", "virus"), ("war", "war"),
     ("s", "s"), ("his", "his"), ("shoes", "shoe")],
)  # fmt: skip
def test_stem(word, stemmed):
    assert stem(word) == stemmed
