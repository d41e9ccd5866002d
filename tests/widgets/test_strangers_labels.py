"""Labels that try to be more than a few words: too long, emoji, right to left, control characters, markup. They are
shown in the static form of every widget, in tables, in pictures, and on the page of a whole dictionary."""

import dataclasses
import io
import json
import subprocess
import sys
import threading
from html.parser import HTMLParser

import pytest
from circuits.test_attribution_graphs import transcoders

import sae_lab as sl
from sae_lab import circuits
from sae_lab.noting import Said
from sae_lab.results import MOST_TITLE, visible, visible_lines
from sae_lab.widgets import (
    FeatureInspector,
    FeatureMap,
    GraphLab,
    PatchingGrid,
    Session,
    SteeringSliders,
    TokenFeatures,
)

PROMPT, SOURCE = "the cat sat on", "the dog sat on"
FAMILY = "👨‍👩‍👧‍👦"
LABELS = {
    "long": "x" * 10_000,
    "long words": "word " * 1_999 + "end",
    "emoji": f"{FAMILY * 30} 🇨🇭❤️",
    "right to left": "שלום עולם مرحبا",
    "turned": "safe\u202egnp.exe\u2066",
    "control": "a\x00b\x1b[2Jc\x07\u200b\ufeffd\u2028e\u0085f",
    "lines": "first\nsecond\r\nthird\ttab",
    "markup": "</script></title><img src=x onerror=alert(1)><!-- {0} %s {x} &amp; '\" `${1}` $x$ \\frac _a",
    "marks": "Z" + "\u0351" * 500,
}


OTHER = """
import sys; from pathlib import Path; from sae_lab import noting
log = noting.Log(Path(sys.argv[1]))
for i in range(40):
    log.write({int(sys.argv[2]): {"label": f"b {i}"}})
"""


def METRIC(logits, tokens):
    return logits[:, -1, 5]


class Page(HTMLParser):
    """The elements of a page, and the text outside its scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.attributes, self._inside = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = [tag]

    def handle_endtag(self, tag):
        self._inside = []

    def handle_data(self, data):
        if self._inside[:1] not in (["script"], ["style"]):
            self.texts.append(data)


def require_safe(html):
    """No element, no handler and no hidden character came of a label; nothing shown is longer than a name may be."""
    page = Page(html)
    assert not {"img", "iframe", "object", "a"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert all(visible_lines(text) == text for text in page.texts), "hidden characters are marked"
    assert max(map(len, page.texts)) < 3_000, "a name is cut"
    assert all(len(value) <= 8 * MOST_TITLE for _, _, value in page.attributes)
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


@pytest.fixture
def index(lab, folder):
    """Built once, and opened by each test, which has notes of its own."""
    return sl.index_features(lab.sae, lab.lm, lab.store, path=folder / "index")


@pytest.fixture(scope="module")
def feature(lab):
    """The one with the largest effect."""
    table = circuits.attribution(lab.lm, lab.sae, [PROMPT], [SOURCE], METRIC, check=1).to_pandas()
    return int(table.query("feature >= 0").dropna()["feature"].iloc[0])


def in_script(file, function):
    return json.loads(file.read_text(encoding="utf-8").removeprefix(f"saelab.{function}(").removesuffix(")\n"))


def test_static_forms_of_all_widgets(lab, feature, index, tmp_path):
    session = Session()
    inspector = FeatureInspector(index, feature, session=session)
    sliders = SteeringSliders(lab.lm, lab.sae, {feature: 2.0}, PROMPT, session=session, max_new_tokens=2)
    tokens = TokenFeatures(lab.lm, lab.sae, PROMPT, token=1, session=session)
    tokens.feature = feature
    grid = PatchingGrid(lab.lm, PROMPT, SOURCE, coder=lab.sae, session=session)
    grid.features = {f"{lab.sae.site.key}:2": {"features": [[feature, 0.5]], "others": 0.0, "active": 1, "error": 0.0}}
    grid.kind, grid.cell = lab.sae.site.kind, [lab.sae.site.layer, 2]
    points = FeatureMap(lab.sae, [[i, i] for i in range(96)], session=session)
    panels = (inspector, sliders, tokens, grid, points, session.edits)
    for label in LABELS.values():
        sl.notes(lab.sae).write(feature, label)
        assert sl.notes(lab.sae)[feature].label == label.strip(), "nothing of it is lost"
        for panel in panels:
            page = require_safe(panel.snapshot()._repr_html_())
            assert "bdi" in page.tags, type(panel).__name__
            assert visible(repr(panel)) == repr(panel) and len(repr(panel)) < 4_000
        page = inspector.to_html(tmp_path / "page.html", [feature]).read_text(encoding="utf-8")
        state = page.split('id="state">')[1].split("</script>")[0]
        assert json.loads(state)["note"]["label"] == label.strip() and "<" not in state
    for panel in panels:
        panel.close()


def test_an_attribution_graph(lab, tmp_path):
    """Labels of its features, names of its groups, and tokens and outputs of a stranger's file."""
    coders = transcoders(lab.lm)
    graph = circuits.trace(lab.lm, coders, PROMPT)
    node, log = graph.nodes[0], sl.notes(coders[0])
    panel = GraphLab(graph)
    panel.node = 0
    for label in LABELS.values():
        log.write(node.feature, label)
        assert panel.names["0"] == label.strip()
        panel.groups = [{"name": label, "nodes": [1, 2]}]
        assert "bdi" in require_safe(panel.snapshot()._repr_html_()).tags
        assert visible(repr(panel)) == repr(panel) and json.dumps(panel.data(), allow_nan=False)
        state = panel.to_html(tmp_path / "page.html").read_text(encoding="utf-8").split('id="state">')[1]
        state = json.loads(state.split("</script>")[0])
        assert state["names"]["0"] == state["groups"][0]["name"] == label.strip()
        compile(panel.code(), "code", "exec")  # no name ends its comment
    log.write(node.feature, "")
    tokens, outputs = [LABELS["markup"]] * len(graph.tokens), [LABELS["turned"]] * len(graph.outputs)
    strange = dataclasses.replace(graph, tokens=tokens, outputs=outputs)
    other = GraphLab(strange)
    other.node, other.pinned = len(graph.nodes) - 1, [0, len(graph.nodes) - 1]
    require_safe(other.snapshot()._repr_html_())


def test_tables_edits_and_pictures(lab, feature, index):
    for label in LABELS.values():
        sl.notes(lab.sae).write(feature, label)
        found = circuits.attribution(lab.lm, lab.sae, [PROMPT], [SOURCE], METRIC, check=2)
        graph = circuits.feature_circuit(lab.lm, [lab.sae], [PROMPT], [SOURCE], METRIC, steps=1, sizes=())
        listed = index.search("label:", limit=5)
        for table in (sl.features(lab.lm, lab.sae, PROMPT), found, listed):
            require_safe(table._repr_html_())
            assert "\x1b" not in repr(table) and "\u202e" not in repr(table)
            assert max(map(len, repr(table).splitlines())) < 400
        assert set(found.to_pandas().query("feature == @feature")["name"]) == {label.strip()}, "data keeps the whole"
        edit = repr(sl.Steer(lab.sae, feature, strength=2.0))
        assert len(edit) < 250 and visible(edit) == edit
        for result in (found, graph):
            sl.plot(result).savefig(io.BytesIO(), format="png", dpi=30)


def test_the_page_of_a_dictionary(lab, index, tmp_path):
    best = index.order("best").tolist()
    labels = {feature: label.strip() for feature, label in zip(best, LABELS.values(), strict=False)}
    for feature, label in labels.items():
        index.annotate(feature, label, label)
    page = index.to_site(tmp_path / "site")
    html = page.read_text(encoding="utf-8")
    for own in ('<script src="site.js">', '<script src="features.js">', '<link rel="stylesheet" href="site.css">'):
        assert html.count(own) == 1
        html = html.replace(own, "")
    assert "table" in require_safe(html).tags and html.count("<bdi") == len(labels)
    for file in page.parent.glob("features*.js"):
        assert not {"<", "\u2028"} & set(file.read_text(encoding="utf-8"))
    assert in_script(page.parent / "features.js", "list")["labels"] == {str(i): label for i, label in labels.items()}


def test_the_page_of_a_dictionary_without_labels(index, tmp_path):
    assert len(index.notes) == 0
    page = index.to_site(tmp_path / "site")
    listing = in_script(page.parent / "features.js", "list")
    assert (listing["labels"], listing["said"], listing["explained"]) == ({}, {}, [])
    assert "<td" in page.read_text() and "None" not in page.read_text()
    chunk = in_script(page.parent / "features-0.js", "features")
    assert {tuple(one["note"].values()) for one in chunk["features"]} == {("", "")}


def test_one_rule_for_list_header_page_and_search(feature, index, tmp_path):
    """Beside top tokens stands your label, else the first explanation; where a name stands alone, tokens go before."""
    index.explanations.write({feature: [Said("small animals " * 20, "a model")]})
    for heading in ("small animals " * 20, "pets"):
        index.annotate(feature, "pets" if heading == "pets" else "", "a note")
        panel = FeatureInspector(index, feature)
        panel.query = "label:animals"
        [row] = panel.results
        header = panel.note["label"] or panel.view["explanations"][0]["text"]  # as widgets/src/inspector/pane.ts
        assert row["label"] == header == heading == index.search("label:animals").to_pandas()["label"][0]
        panel.close()
    index.annotate(feature, "", "a note")
    listing = in_script(index.to_site(tmp_path / "site").parent / "features.js", "list")
    assert listing["labels"] == {str(feature): "small animals " * 20} and listing["explained"] == [feature]
    assert listing["said"] == {str(feature): "a note"}


def test_two_panels_write_at_once(lab, feature, index):
    """Each hears the other; the later label stands in both, and every label that was written is in the file."""
    panels = [FeatureInspector(index, feature) for _ in range(2)]
    start = threading.Barrier(2)

    def write(panel, name):
        start.wait()
        for i in range(20):
            panel.write_note(f"{name} {i}", "")

    threads = [threading.Thread(target=write, args=(p, n), daemon=True) for p, n in zip(panels, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "neither waits for the other for ever"
    label = sl.notes(lab.sae)[feature].label
    assert label in ("a 19", "b 19")
    for panel in panels:
        assert panel.note["label"] == panel.view["names"][str(feature)] == label
        assert {row["label"] for row in panel.results if row["feature"] == feature} <= {label}
        panel.close()
    written = sl.notes(lab.sae).file.read_text()
    assert all(f'"{name} {i}"' in written for name in "ab" for i in range(20))


def test_another_process_writes_at_once(lab, feature, index):
    """What it wrote is read at the next look; neither loses a label to the other."""
    log = sl.notes(lab.sae)
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(log.file), str(feature)])
    for i in range(40):
        log.write(feature, f"a {i}")
    assert other.wait(60) == 0
    panel = FeatureInspector(index, feature)
    assert panel.note["label"] == log[feature].label in ("a 39", "b 39")
    written = log.file.read_text()
    assert all(f'"{name} {i}"' in written for name in "ab" for i in range(40))
    panel.close()
