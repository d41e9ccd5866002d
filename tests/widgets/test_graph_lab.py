"""GraphLab: what is sent, what the sliders show, pins, groups, names, tests, steering, files."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from circuits.test_attribution_graphs import PROMPT, transcoders

import sae_lab as sl
from sae_lab import circuits
from sae_lab.circuits import AttributionGraph
from sae_lab.widgets import GraphLab, Session, TokenFeatures

# The limits of what a screen gets, made small.
from sae_lab.widgets import graph_lab as module

from .test_inspector import WIDGET_VIEW, Tags

ATTACK = "<script>alert(1)</script>"


def array(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.fixture(scope="module")
def traced(make_tiny):
    lm = make_tiny("llama")
    coders = transcoders(lm)
    for coder in coders:
        coder.f_scale.fill_(1.0)  # random coders have fired on nothing
    return lm, coders, circuits.trace(lm, coders, PROMPT)


@pytest.fixture
def shown(traced):
    return GraphLab(traced[2])


@pytest.fixture
def alone(traced, tmp_path):
    """From a file, without a model."""
    return GraphLab(AttributionGraph.load(traced[2].save(tmp_path / "graph.safetensors")))


def test_the_graph_goes_to_the_screen_whole(traced, shown):
    graph, view = traced[2], shown.view
    edges = {
        (s, t): w
        for s, t, w in zip(array(view["sources"], "<u4").tolist(), array(view["targets"], "<u4").tolist(),
                           array(view["effects"], "<f4").tolist(), strict=True)
    }  # fmt: skip
    assert len(edges) == int(graph.effects.count_nonzero()) and view["left"] == [0, 0]
    for edge in graph.top(30):
        assert edges[graph.number(edge.upstream), graph.number(edge.downstream)] == pytest.approx(edge.effect)
    assert array(view["places"], "<i4").reshape(-1, 3).tolist() == graph.places.tolist()
    incoming = array(view["incoming"], "<f4")
    row = graph.row(graph.nodes[3])
    assert incoming[3] == pytest.approx(float(graph.effects[row].abs().sum() + graph.rest_size[row]), rel=1e-5)
    assert incoming[graph.kinds.index("token")] == 0


def test_a_large_graph_is_pruned_to_what_a_screen_takes(traced, monkeypatch):
    monkeypatch.setattr(module, "MOST_NODES", 40)
    monkeypatch.setattr(module, "MOST_EDGES", 150)
    graph = traced[2]
    cut = GraphLab(graph)
    features, errors, tokens, logits = cut.graph.counts
    edges = int(cut.graph.effects.count_nonzero())
    assert 10 < features + errors <= 40 and (tokens, logits) == graph.counts[2:]
    assert 100 < edges <= 150, "nearly all that there is room for"
    assert cut.view["left"] == [len(graph.nodes) - len(cut.graph.nodes), int(graph.effects.count_nonzero()) - edges]
    scope = {"graph": graph}
    exec(cut.code(), scope)
    assert scope["part"].nodes == cut.part.nodes and torch.equal(scope["part"].effects, cut.part.effects)


def test_sliders_prune(traced, shown):
    assert (shown.nodes, shown.edges) == (0.8, 0.98) and shown.part.nodes == traced[2].prune().nodes
    shown.set_state({"nodes": 0.5, "edges": 0.9})
    assert shown.part.nodes == traced[2].prune(0.5, 0.9).nodes
    assert repr(shown).startswith(f"GraphLab({shown.part.counts[0]} feature")
    already = GraphLab(traced[2].prune(0.7))
    assert (already.nodes, already.part.nodes) == (1.0, traced[2].prune(0.7).nodes), "what was pruned is shown whole"


@pytest.mark.parametrize(
    ("trait", "value", "why"),
    [
        ("node", -1, "a node is an int from 0"), ("node", 10**6, "a node is an int"), ("pinned", [True], "a node is"),
        ("nodes", 1.5, "shares of the influence from 0 to 1, got 1.5"), ("edge", [0], "edge must be"),
        ("edge", [1, 0], "edge must be"), ("groups", [{"name": " ", "nodes": [1]}], "a group is a dict of name"),
        ("groups", [{"name": "a", "nodes": [1]}, {"name": "b", "nodes": [1]}], "node 1 is in two"),
    ],
)  # fmt: skip
def test_what_is_refused(shown, trait, value, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        setattr(shown, trait, value)
    before = getattr(shown, trait)
    shown.set_state({trait: value})
    assert getattr(shown, trait) == before and why in shown.error


def test_a_node_is_a_feature_in_the_other_widgets(traced):
    lm, coders, graph = traced
    session = Session()
    tokens = TokenFeatures(lm, coders[1], PROMPT, session=session)
    shown = GraphLab(graph, session=session)
    assert shown.node is None and session.selection.feature is None, "a new widget chooses nothing"
    number = next(i for i, node in enumerate(graph.nodes) if node.site.layer == 1 and node.position == 3)
    node = graph.nodes[number]
    shown.set_state({"node": number})
    assert (session.selection.feature, session.selection.site) == (node.feature, coders[1].site.key)
    assert (session.selection.prompt, session.selection.token) == (PROMPT, 3)
    assert tokens.token == 3 and tokens.feature == node.feature
    other = next(n for n in graph.nodes if n.site.layer == 1 and n.position == 4)
    tokens.token = 4
    tokens.feature = other.feature
    assert shown.node == graph.number(other)
    session.selection.pick(feature=other.feature, site="mlp_in-7")
    assert shown.node == graph.number(other), "another layer's feature"
    shown.close()
    session.selection.pick(feature=node.feature, site=coders[1].site.key, token=3)
    assert shown.node == graph.number(other)


def test_a_label_is_kept_with_the_coder(traced, shown, screen):
    coders, graph = traced[1:]
    other = GraphLab(graph)
    feature = graph.nodes[0].feature
    assert screen(shown).call("rename", number=0, name=ATTACK)[0] == "done"
    assert sl.notes(coders[0])[feature].label == ATTACK and other.names["0"] == ATTACK
    here = {str(i) for i, node in enumerate(graph.nodes[: graph.counts[0]]) if node.site.layer == 0}
    assert {i for i, name in shown.names.items() if name == ATTACK} <= here
    error = graph.kinds.index("error")
    kind, why = screen(shown).call("rename", number=error, name="x")
    assert kind == "error" and why.endswith("is no feature, and only a feature has a label")
    sl.notes(coders[0]).write(feature, "")
    assert shown.names == {}


def test_an_edge_is_tested(traced, shown, screen):
    graph = traced[2]
    edge = next(e for e in graph.top(50) if e.upstream.feature >= 0 and e.upstream.site.kind == "mlp_out")
    found = shown.test(edge)
    [test] = shown.tests
    row = test["rows"][0]
    assert row["predicted"] == pytest.approx(-edge.effect) == pytest.approx(row["frozen"], rel=1e-2)
    assert test["error"] == found.error < 1e-3
    number = graph.number(edge.upstream)
    assert screen(shown).call("run_test", sources=[number]) == ("done", None)
    rows = shown.tests[0]["rows"]
    assert 1 < len(rows) <= module.TESTED and len(shown.tests) == 2
    sizes = [abs(row["predicted"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True), "the strongest, and first"
    assert screen(shown).call("run_test", sources=[number])[0] == "done" and len(shown.tests) == 2, "not listed twice"
    assert shown.running == ""


def test_a_group_is_tested_together(traced, shown):
    graph = traced[2]
    logit = graph.nodes[-1]
    group = [e.upstream for e in graph.top(5, into=logit) if e.upstream.site.kind == "mlp_out"][:2]
    found = shown.test(group, logit)
    assert found.predicted[0, 0] == pytest.approx(-sum(graph.effect(node, logit) for node in group), rel=1e-4)
    assert shown.tests[0]["sources"] == [graph.number(node) for node in group]


def test_a_test_stops(traced, shown, screen, monkeypatch):
    """A cancelled test makes no further run of the model, and shows nothing."""
    live = screen(shown)
    runs, run = [], traced[2].local.run

    def slow(*args, **kwargs):
        runs.append(1)
        live.cancel(call)
        return run(*args, **kwargs)

    monkeypatch.setattr(traced[2].local, "run", slow)
    number = traced[2].number(shown.part.top(1)[0].upstream)
    call = 1
    assert live.start("run_test", sources=[number]) == call
    assert live.wait(call) == ("cancelled", None)
    assert len(runs) == 1 and shown.tests == [] and shown.running == ""


def test_without_a_model(traced, alone, screen):
    assert "came without one: sl.GraphLab(graph, lm, coders)" in alone.unable
    for method, args in (("run_test", {"sources": [0]}), ("run_steer", {"number": 0, "strength": 1.0, "here": False})):
        assert screen(alone).call(method, **args) == ("error", alone.unable)
    assert "a label is kept with the coder" in screen(alone).call("rename", number=0, name="x")[1]
    lm, coders, graph = traced
    with pytest.raises(ValueError, match="got lm alone: pass coders too"):
        GraphLab(alone.graph, lm)
    again = GraphLab(alone.graph, lm, coders)
    assert again.unable == "" and again.test(alone.graph.top(1)[0]).error < 1e-3
    with pytest.raises(ValueError, match="give other activations"):
        GraphLab(alone.graph, lm, transcoders(lm, seed=5))
    assert GraphLab(graph, lm, coders).graph is graph, "its own: nothing is made anew"


def test_steering(traced, shown, screen):
    lm, coders, graph = traced
    number = next(i for i, n in enumerate(graph.nodes) if n.site.layer == 1)
    node, ids = graph.nodes[number], graph.facts["ids"]
    assert screen(shown).call("run_steer", number=number, strength=30.0, here=True) == ("done", None)
    found, edit = shown.steered, sl.Steer(coders[1], node.feature, strength=30.0, positions=node.position)
    after = lm.logits(ids, [edit])[0, -1].softmax(-1)
    assert max(p for _, _, p in found["next"]) == pytest.approx(float(after.max()))
    assert found["baseline"] == lm.generate(ids, max_new_tokens=20)[-len(found["baseline"]) :]
    assert found["code"] == f"sl.Steer(coder, {node.feature}, positions={node.position}, strength=30.0)"
    scope = {"graph": graph, "coders": coders, "lm": lm}
    exec(re.sub("^# lm: .*", "", shown.code(), flags=re.MULTILINE), scope)  # the code runs
    assert scope["coder"] is coders[1]
    shown.steer(node, None)
    assert shown.steered["code"].startswith("sl.Ablate(coder, ")
    screen(shown).call("keep_edit", number=number, strength=2.0, here=False)
    assert [type(e).__name__ for e in shown.session.edits] == ["Steer"]
    error = graph.nodes[graph.kinds.index("error")]
    with pytest.raises(ValueError, match="is no feature: steer from a feature"):
        shown.steer(error)


def test_pinned_edges_are_sums(traced, shown):
    graph = traced[2]
    logit = graph.nodes[-1]
    two = [e.upstream for e in graph.top(5, into=logit)][:2]
    numbers = [graph.number(node) for node in two]
    shown.groups = [{"name": "pair", "nodes": numbers}]
    shown.pinned = [graph.number(logit), numbers[0]]
    [(target, weight)] = [row[1:] for row in shown.pinned_edges() if row[0] == "pair"]
    assert target.startswith("output ") and weight == pytest.approx(sum(graph.effect(n, logit) for n in two), rel=1e-5)
    shown.groups = [{"name": "pair", "nodes": []}]
    assert shown.groups == [] and len(shown.pinned_edges()) == 1, "an empty group is none"


def test_files(traced, shown, screen, tmp_path):
    graph = traced[2]
    part = shown.part
    shown.pinned = [graph.number(part.nodes[0]), graph.number(part.nodes[-1])]
    shown.groups = [{"name": ATTACK, "nodes": [graph.number(part.nodes[1])]}]
    kind, text = screen(shown).call("neuronpedia")
    content = json.loads(text)
    ids = [node["node_id"] for node in content["nodes"]]
    assert kind == "done" and content["qParams"]["pinnedIds"] == [ids[0], ids[-1]]
    assert content["qParams"]["supernodes"] == [[ATTACK, ids[1]]]
    (tmp_path / "np.json").write_text(text)
    again = AttributionGraph.from_json(tmp_path / "np.json")
    assert len(again.nodes) == len(part.nodes) and torch.equal(again.effects, part.effects)
    other = GraphLab(again)  # a stranger's file tells no influence
    assert bool(other.graph.influence.isfinite().all()) and other.part.nodes
    data = shown.data()
    assert len(data["edges"]) == int(part.effects.count_nonzero()) and json.dumps(data, allow_nan=False)
    page = shown.to_html(tmp_path / "graph.html").read_text()
    found = re.search(r'<script type="application/json" id="state">(.*?)</script>', page, re.DOTALL)
    assert found is not None and json.loads(found[1])["pinned"] == shown.pinned and ATTACK not in page


def test_the_static_form(traced, shown, monkeypatch):
    graph = traced[2]
    shown.node = 0
    shown.groups = [{"name": ATTACK, "nodes": [1]}]
    shown.test(graph.nodes[0])
    monkeypatch.setattr(shown, "_called", lambda: {0: ATTACK})  # a name without a coder's notes
    html = shown.snapshot()._repr_html_()
    tags = Tags(html)
    assert tags.tags <= {"div", "p", "b", "table", "tr", "th", "td", "bdi", "code"}
    assert tags.text.count(ATTACK) >= 2 and "Taken out: " in tags.text and PROMPT in tags.text
    assert WIDGET_VIEW in (shown._repr_mimebundle_() or ({}, {}))[0]


def test_the_graphs_groups_stand_on_the_screen_and_come_back(traced):
    graph = traced[2]
    nodes = graph.nodes[:3]
    lab = GraphLab(graph.with_groups({"first": nodes[:2]}))
    assert lab.groups == [{"name": "first", "nodes": [lab.graph.number(node) for node in nodes[:2]]}]
    lab.groups = [*lab.groups, {"name": "second", "nodes": [lab.graph.number(nodes[2])]}]
    found = lab.named_groups()
    assert {name: list(found[name].nodes) for name in found.names} == {"first": nodes[:2], "second": nodes[2:]}
    assert GraphLab(found.graph).groups == lab.groups


def test_a_graph_with_features_of_attention_is_refused(traced):
    graph = traced[2]
    with pytest.raises(ValueError, match="features of attention too: trace with transcoders alone"):
        GraphLab(dataclasses.replace(graph, facts={**graph.facts, "sites": []}))
