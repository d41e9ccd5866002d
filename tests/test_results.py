"""Tables of results: what came from data is shown as text, and nothing of it is HTML or moves a terminal's cursor."""

import ast
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

import sae_lab
from sae_lab.results import (
    GLYPHS,
    HIDDEN,
    Figure,
    Html,
    Result,
    Shown,
    counted,
    figure,
    filled,
    frame_rows,
    html_table,
    joined,
    number,
    result,
    tag,
    text_table,
    visible,
)  # fmt: skip

SOURCES = Path(__file__).parent.parent / "widgets" / "src"
PACKAGE = Path(sae_lab.__file__).parent
EVIL = "<img src=x onerror=alert(1)> & \"'\x1b[2J\u202e"


@dataclass(frozen=True, repr=False)
class Told(Shown):
    name: str

    def _rows(self):
        return [("", self.name), (self.name, "1.5")]

    def _footer(self):
        return f"of {self.name}\nin two lines"


def elements(page):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: found.append((name, attributes))
    parser.feed(page)
    return found


def test_what_is_not_seen_is_marked():
    assert visible("a\nb\tc\rd\u00a0e") == "a↵b⇥c␍d⍽e"
    assert visible("\x00\x1b[2J\u202egpj\ud800\U000e0041") == "U+0000U+001B[2JU+202EgpjU+D800U+E0041"
    seen = "Zürich, Ελλάδα, שלום, 東京, नमस्ते, 🙂"
    assert visible(seen) == seen


@pytest.mark.parametrize("kind", ["Cc", "Cf", "Zl", "Zp", "Cs"])
def test_every_character_that_unicode_calls_unseen_is_marked(kind):
    unseen = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) == kind]
    # Unicode also calls signs around a number format characters, and those that join hieroglyphs: they are drawn.
    drawn = {unicodedata.name(c).split()[0] for c in unseen if visible(c) == c}
    assert drawn <= {"ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN"}


def test_html_is_made_by_tag_alone():
    assert tag("b", EVIL, title=EVIL).count("<") == 2
    assert elements(tag("p", tag("i", "<b>"), "<b>", class_=1))[0][0] == "p"
    assert joined(["<", tag("i"), ">"], "&") == "&lt;&amp;<i></i>&amp;&gt;"
    # Put together in another way it is text again, which is escaped.
    assert joined([f"{tag('i')}"]) == "&lt;i&gt;&lt;/i&gt;"


def test_a_result_shows_data_as_text():
    told = Told(EVIL)
    page = told._repr_html_()
    assert isinstance(page, Html)
    assert {name for name, _ in elements(page)} == {"table", "tr", "th", "td", "p", "br"}
    assert {key for _, attributes in elements(page) for key, _ in attributes} == {"style"}
    assert visible(page) == page and "U+001B[2JU+202E" in page
    assert visible(repr(told)).replace("↵", "\n") == repr(told)


def test_a_frame_is_printed_as_pandas_does():
    frame = pd.DataFrame({"token": ["a", " bc"], "kl": [0.1, float("nan")], "n": [1, 20]})
    theirs = frame.to_string(index=False, float_format="{:.3f}".format)
    ours = text_table(frame_rows(frame))
    assert [line.split() for line in ours.splitlines()] == [line.split() for line in theirs.splitlines()]


def test_columns_stand_under_each_other():
    rows = [("", "value"), ("a", "1"), ("long", "100")]
    assert text_table(rows, "footer", "<>") == "      value\na         1\nlong    100\nfooter"
    assert html_table(rows, "", "<>").count("text-align:right") == 3


def test_whatever_shows_itself_in_a_notebook_is_made_in_results():
    """``-> Html`` is checked by beartype whenever a test calls it, and only ``results`` makes an ``Html``."""
    shown, made = [], []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            place = f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef) and node.name in ("_repr_html_", "_html"):
                shown.append((place, node.returns and ast.unparse(node.returns)))
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if re.fullmatch(r"(html\.)?escape|(.*\.)?(Html|to_string|to_html)", name):
                made.append((place, name))
    assert len(shown) > 8
    assert [place for place, returned in shown if returned != "Html"] == []
    # CircuitsVis' own page, whose arguments ``in_script`` writes; what a user exports.
    elsewhere = {(place.partition(":")[0], name) for place, name in made if not place.startswith("results.py")}
    assert elsewhere == {("widgets/attention_view.py", "Html"), ("widgets/inspector.py", "super().to_html")}


def test_the_widgets_mark_the_same_characters():
    theirs = (SOURCES / "shared/visible.ts").read_text()
    lists = re.findall(r'"([0-9A-F]{4}[0-9A-F -]+)"', theirs)
    assert "".join(lists) == HIDDEN
    glyphs = json.loads("{" + re.search(r"GLYPHS.*= \{(.*)\}", theirs)[1] + "}")
    assert glyphs == GLYPHS


def test_the_widgets_put_text_into_a_page_by_one_file():
    """``dom.ts`` marks what is not seen. Where a page or a link is made: CircuitsVis in a box without an origin, a
    download, and a feature's number as the address within its page."""
    sources = {str(file.relative_to(SOURCES)): file.read_text() for file in SOURCES.rglob("*.ts")}
    ways = r"\.(textContent|innerText) =[^=]|(inner|outer|Adjacent)HTML|document\.write|DOMParser|\beval\(|new Function"
    assert [name for name, text in sources.items() if re.search(ways, text)] == ["shared/dom.ts"]
    links = r"srcdoc|\bhref\b|window\.open|location\b|javascript:"
    assert sorted(name for name, text in sources.items() if re.search(links, text)) == [
        "patching/attention.ts", "shared/exporting.ts", "site/index.ts",
    ]  # fmt: skip
    assert 'sandbox: "allow-scripts",' in sources["patching/attention.ts"]
    assert "default-src 'none'" in sources["patching/attention.ts"].replace("\\", "")


@result
class Measured(Result):
    share: float = figure("share", "of {rows:,} rows", control="drawn", control_name="{seeds} random seeds", best="low")
    share_se: float
    drawn: float
    dead: float = figure("dead", digits=".1%")
    rows: int
    seeds: int
    _above, _below = "seed {seeds}", "{rows:,} rows\nof text"


def test_the_fields_of_a_result_are_its_figures():
    found = Measured(0.25, 0.01, 0.5, math.nan, 12_000, 3)
    assert found.figures()[0] == Figure("share", 0.25, 0.01, 0.5, "3 random seeds", "of 12,000 rows", "low", 3, "share")
    assert found.figure("dead").text == "undefined" and number(0.123, ".1%") == "12.3%"
    assert repr(found).splitlines() == [
        "seed 3",
        "       value          control",
        "share  0.250 ± 0.010  0.500 3 random seeds  of 12,000 rows",
        "dead   undefined",
        "12,000 rows",
        "of text",
    ]
    assert found._repr_html_().startswith("<p>seed 3</p><table>")
    assert list(found.to_pandas()) == ["share", "share_se", "drawn", "dead", "rows", "seeds"]
    with pytest.raises(KeyError, match="Measured has no figure 'rows'; it has: share, dead"):
        found.figure("rows")


@pytest.mark.parametrize(
    ("text", "one", "many"),
    [("{n:,} tokens", "1 token", "1,200 tokens"), ("{n} documents; {n} live features", "1 document; 1 live feature",
      "1200 documents; 1200 live features"), ("of {n} properties", "of 1 property", "of 1200 properties"),
     ("{n} classes", "1 class", "1200 classes"), ("{n} as, {n} across", "1 as, 1 across", "1200 as, 1200 across"),
     ("{n} bias, {n} shuffles{n}", "1 bias, 1 shuffle1", "1200 bias, 1200 shuffles1200"),
     ("{n:.1f} tokens", "1.0 token", "1200.0 tokens"), ("{{n}} {n}", "{n} 1", "{n} 1200")],
)  # fmt: skip
def test_one_of_a_thing_is_no_plural(text, one, many):
    assert (filled(text, {"n": 1}), filled(text, {"n": 1200})) == (one, many)
    assert filled("{n} tokens", {"n": 1.0}) == "1.0 tokens" and filled("{n!n} tokens", {"n": "a"}) == "1 token"
    assert filled("{n} tokens ± {n}", {"n": math.nan}) == "undefined tokens"
    assert (counted(1, "live feature"), counted(0, "token"), counted(1024, "token")) == (
        "1 live feature", "0 tokens", "1,024 tokens",
    )  # fmt: skip


class Row(NamedTuple):
    feature: int
    score: float


@result
class Found(Result):
    rows: list[Row]
    _records, _shown, _digits = "rows", 1, ".2f"


@result
class Curve(Result):
    size: tuple[int, ...]
    value: tuple[float, ...]
    _records = ("k=size", "value")


@result
class Tried(Result):
    names: tuple[str, ...]
    l0: tuple[float, ...]
    l0_se: tuple[float, ...]
    best_index: int
    _records = ("name=names", "l0", "l0_se")
    _columns = {"coder": "{name}", "L0": "{l0:.1f} ± {l0_se:.1f}", "": "{mark}"}  # noqa: RUF012
    _mark = "< least"
    _below = "{names!n} coders"


def test_a_result_without_figures_is_a_table_of_records():
    assert repr(Found([Row(7, 0.5), Row(8, 0.25)])).split() == ["feature", "score", "7", "0.50"]
    assert Found([Row(7, 0.5), Row(8, 0.25)]).to_pandas().score.tolist() == [0.5, 0.25]
    assert Curve((1, 2), (0.5, 1.0)).to_pandas().to_dict("list") == {"k": [1, 2], "value": [0.5, 1.0]}


@result
class Sorted(Result):
    effect: dict[str, float]
    _records, _sorted, _shown = "_nodes", "effect", 2

    @property
    def _nodes(self):
        return {"node": list(self.effect), "effect": list(self.effect.values())}


def test_records_are_printed_in_an_order_of_their_own_and_to_the_right():
    found = Sorted({"a": 0.5, "longer": -3.0, "c": 22.0})
    assert found.to_pandas().node.tolist() == ["a", "longer", "c"]
    assert repr(found).splitlines() == ["  node  effect", "     c  22.000", "longer  -3.000"]
    assert found._repr_html_().count("text-align:right") == 6
    assert repr(Found([])) == "no rows" and "no rows" in Found([])._repr_html_()


def test_records_are_printed_as_their_columns_say():
    assert repr(Tried(("a", "b", "c"), (8.0, 4.0, math.nan), (0.5, math.nan, math.nan), 1)).splitlines() == [
        "coder  L0",
        "a      8.0 ± 0.5",
        "b      4.0        < least",
        "c      undefined",
        "3 coders",
    ]


@result
class Sets(Result):
    each: object
    _records, _columns = "each", {"": "{index}", "share": "{share:.2f}"}


def test_results_of_one_row_each_are_the_rows_of_another():
    one, two = Measured(0.25, 0.01, 0.5, math.nan, 12_000, 3), Measured(0.5, 0.01, 0.5, 0.1, 12_000, 3)
    found = Sets({"own": one, "other": two})
    assert found.to_pandas().loc["other", "dead"] == 0.1 and list(found.to_pandas()) == list(one.to_pandas())
    assert repr(found).splitlines() == ["       share", "own    0.25", "other  0.50"]
    assert Sets([one, two]).to_pandas().index.tolist() == [0, 1]
