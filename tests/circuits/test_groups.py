"""Groups of a graph's nodes: copies of a feature by hand, what taking them out does, changes by hand, files."""

import json
import logging
import math

import numpy as np
import pytest
import tiny_models
import torch
import transformers as tf

import sae_lab as sl
from sae_lab.circuits import AttributionGraph, Node, trace
from sae_lab.circuits.group_scores import clustered, fires_alike, shuffled, similarity
from sae_lab.types import Site
from tests.circuits.test_attribution_graphs import PROMPT, VOCAB, D, direction, made, transcoders  # noqa: F401

DECOYS = 6
COPIES, THIRD = (0, 1), 2  # features of layer 0


def feature(layer, number, position=2):
    return Node(Site("mlp_out", layer), position, number)


@pytest.fixture(scope="module")
def copies():
    """A GPT-2 of two layers whose MLPs are what their transcoders say. In layer 0 all features read "A". Two of them
    write the same, which layer 1 reads to write "X"; a third writes what layer 1 reads to write "Y"; six decoys write
    what nothing reads, with signs that cancel, so that the norms stay as they are."""
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_layer=2, n_head=1, n_inner=3 + DECOYS, n_positions=32, activation_function="relu",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    module = tf.GPT2LMHeadModel(config).eval()
    tokenizer = tiny_models.tokenizer()
    a, x, y = (tokenizer(letter)["input_ids"][0] for letter in "AXY")
    writes = [direction(2), direction(2), 1.9 * direction(3), *((-1) ** i * direction(4) for i in range(DECOYS))]
    coders = []
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        for norm in [module.transformer.ln_f, *(n for block in module.transformer.h for n in (block.ln_1, block.ln_2))]:
            norm.weight.fill_(1.0)
        module.transformer.wte.weight[:] = direction(7)
        module.transformer.wte.weight[a] = direction(0)
        head = torch.zeros(VOCAB, D)
        head[x], head[y] = direction(5), direction(6)
        head[x + 32], head[y + 32] = -direction(5), -direction(6)  # the mean over the vocabulary stays 0
        module.lm_head.weight = torch.nn.Parameter(head)
        layers = [
            (torch.stack([direction(0)] * (3 + DECOYS), 1), 0.1 * torch.stack(writes)),
            (torch.stack([direction(2), direction(3)], 1), torch.stack([direction(5), direction(6)])),
        ]
        for layer, (reads, written) in enumerate(layers):
            mlp, n = module.transformer.h[layer].mlp, len(written)
            mlp.c_fc.weight[:, :n], mlp.c_fc.bias[:n], mlp.c_proj.weight[:n] = reads, -0.1, written
            coder = sl.JumpReLU(D, n, d_out=D).eval()
            coder.W_enc.copy_(reads)
            coder.b_enc.fill_(-0.1)
            coder.W_dec.copy_(written)
            coder.threshold.fill_(0.0)
            coder.reads, coder.writes = (Site("mlp_in", layer),), (Site("mlp_out", layer),)
            coders.append(coder)
    lm = sl.LM(module, tokenizer=tokenizer, prefix=None)
    return lm, sl.TranscoderSet(coders), trace(lm, sl.TranscoderSet(coders), "--A", targets=["X", "Y"])


def test_copies_are_grouped_and_nothing_else_is(copies):
    """The third reads the same and writes another thing; the decoys read the same and write nothing that is read."""
    found = copies[2].groups()
    assert [group.nodes for group in found.groups] == [tuple(feature(0, i) for i in COPIES)]
    assert found.of(feature(0, COPIES[0])) == found.names[0] and found.of(feature(0, THIRD)) is None
    influence = copies[2].influence[: copies[2].counts[0]]
    assert found.share == pytest.approx(float(influence[list(COPIES)].sum() / influence.sum()))
    assert found.names == ["0/0 at 'A'"], "without a label, the place of the member with most influence"


def test_taking_the_right_group_out_changes_the_answer(copies):
    lm, coders, graph = copies
    logits = lm.logits("--A")[0, -1]
    x, y = graph.places[-2:, 2].tolist()
    assert logits[x] > logits[y], "the answer is X"
    found = trace(lm, coders, "--A", targets="X").groups(of={"copies": [feature(0, i) for i in COPIES],
                                                            "decoys": [feature(0, i) for i in (3, 4)],
                                                            "third": [feature(0, THIRD)]}).score(draws=20)  # fmt: skip
    copied = found["copies"]
    without = logits[x] + copied.effect
    assert float(without) < float(logits[y]), "and without the group it is Y"
    assert without == pytest.approx(0.0, abs=0.02 * float(logits[x])), "nothing else writes X"
    assert copied.p < 0.1, "no random group does so much"
    assert abs(copied.random) + 3 * copied.random_sd < 0.2 * abs(copied.effect)
    assert abs(found["decoys"].effect) < 0.02 * abs(copied.effect)
    assert found["third"].effect > 0, "without what writes Y the norm's divisor is smaller, and X larger"
    assert "up to 20 groups of the same places and norms" in repr(found)


def test_the_effect_is_that_of_the_model_with_a_hook(copies):
    lm, coders, graph = copies
    (group,) = graph.groups().score(draws=1).groups
    x = lm.read("--A", Site("mlp_in", 0))[Site("mlp_in", 0)][0]

    def less(module, args, out):
        codes = coders[0].encode(x)
        out[0, 2] -= codes[2, list(COPIES)] @ coders[0].W_dec[list(COPIES)]
        return out

    handle = lm._module.transformer.h[0].mlp.register_forward_hook(less)  # the model's own module, past this library
    with torch.no_grad():
        now = lm._module(lm.tokenize("--A").ids).logits[0, -1]
    handle.remove()
    change = (now - lm.logits("--A")[0, -1])[graph.places[-2:, 2]]
    assert group.effect == pytest.approx(float(graph.weights @ change / graph.weights.sum()), rel=1e-4)


def test_no_group_without_enough_others_has_a_random_one(made):  # noqa: F811
    graph = made[2]
    every = [node for node in graph.nodes[: graph.counts[0]] if node.site.layer == 1]
    token = graph.nodes[sum(graph.counts[:2])]
    found = graph.groups(of={"layer": every, "token": [token], "one": [graph.nodes[0]]}).score(draws=2)
    assert math.isnan(found["layer"].random) and math.isnan(found["layer"].p) and found["layer"].effect != 0
    assert math.isnan(found["token"].p) and found["token"].effect != 0 and not math.isnan(found["one"].p)
    checked = graph.check([token], graph.targets[-graph.counts[3] :]).free[0]
    weights = graph.weights.numpy()
    assert found["token"].effect == pytest.approx(float(weights @ checked / weights.sum()), rel=1e-4)


def test_matched_features_are_others_of_the_same_place_and_of_near_norms(copies):
    """The copies and the six decoys write with one norm, the third with 1.9 times as much."""
    graph = copies[2]
    for seed in range(10):
        found = graph.matched([feature(0, COPIES[0]), feature(0, COPIES[1])], seed)
        assert len(set(found)) == 2 and {node.feature for node in found} <= set(range(3, 3 + DECOYS))
        assert {node[:2] for node in found} == {feature(0, 0)[:2]}
    draws = {tuple(graph.matched([feature(0, COPIES[0])], seed)) for seed in range(10)}
    assert len(draws) > 1, "the seed decides"
    with pytest.raises(ValueError, match="matched takes features of the graph, at least one, got"):
        graph.matched([graph.nodes[-1]])


# ---- how alike


def test_how_alike_two_features_are(made):  # noqa: F811
    """Written out for pairs: rows of effects; columns as signed shares of what a target reads, times its influence."""
    graph = made[2]
    found = similarity(graph, graph.effects, None)
    count = graph.counts[0]
    targets = torch.cat([graph.influence[:count], graph.weights])
    flows = graph.effects / graph.effects.abs().sum(1, keepdim=True) * targets[:, None]
    generator = np.random.default_rng(0)
    for a, b in [*generator.integers(0, count, (20, 2)).tolist(), (3, 3)]:
        read = torch.cosine_similarity(graph.effects[a], graph.effects[b], dim=0)
        write = torch.cosine_similarity(flows[:, a], flows[:, b], dim=0)
        expected = float(read.clamp_min(0) * write.clamp_min(0)) ** 0.5
        assert float(found[a, b]) == pytest.approx(expected, abs=1e-4)


def test_any_two_of_a_cluster_are_alike():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    alike = torch.corrcoef(x).clamp_min(0)
    labels = clustered(alike, 0.7)
    same = torch.from_numpy(labels[:, None] == labels)
    assert float(alike[same].min()) >= 0.7 and int(same.sum()) > 40
    means = torch.stack([alike[labels == a][:, labels == b].min() for a in set(labels) for b in set(labels) if a != b])
    assert float(means.max()) < 0.7, "and no two clusters could be one"
    assert clustered(torch.ones(1, 1), 0.5).tolist() == [0] and clustered(torch.zeros(0, 0), 0.5).tolist() == []


def test_shuffled_effects_stay_in_their_rows_and_where_they_could_be(made):  # noqa: F811
    graph = made[2]
    found = shuffled(graph, torch.Generator().manual_seed(0))
    assert torch.allclose(found.sort(1).values, graph.effects.sort(1).values), "each row has its own effects"
    assert not torch.equal(found, graph.effects)
    rows = torch.tensor([graph.number(node) for node in graph.targets])
    for t, s in found.nonzero()[::29].tolist():
        assert graph.places[s, 0] < graph.places[rows[t], 0] and graph.places[s, 1] <= graph.places[rows[t], 1]
    groups = graph.groups(alike=0.6)
    assert 0 <= groups.share_shuffled <= groups.share <= 1


def test_an_index_tells_when_features_fire(made, tmp_path):  # noqa: F811
    lm, coders, graph = made
    text = sl.load_text([PROMPT + " over the banks. " + "A fox ran away from the sea. " * 4] * 6)
    store = sl.harvest(lm, coders.sites, text, tokens=400, path=tmp_path / "store", context=32)
    indexes = [sl.index_features(c, lm, store.at(c.reads[0]), tmp_path / f"{n}") for n, c in enumerate(coders)]
    found = fires_alike(graph, indexes)
    codes = {}
    for layer, index in enumerate(indexes):
        dense = np.zeros((index.d_sae, index.tokens_seen), np.float32)
        for i in range(index.d_sae):
            rows, values = index.activations(i)
            dense[i, rows] = values
        codes[layer] = torch.from_numpy(dense)
    own = torch.stack([codes[layer][number] for layer, _, number in graph.places[: graph.counts[0]].tolist()])
    expected = torch.nn.functional.normalize(own, dim=1) @ torch.nn.functional.normalize(own, dim=1).T
    assert torch.allclose(found, expected, atol=1e-3) and float(expected.max()) > 0.9
    a, b = similarity(graph, graph.effects, None), similarity(graph, graph.effects, found)
    assert torch.allclose(b, (a**2 * found.clamp_min(0)) ** (1 / 3), atol=1e-3)
    with pytest.raises(ValueError, match="index= has none for mlp_out-1, where this graph has features"):
        graph.groups(indexes[0])
    other = sl.harvest(lm, coders.sites, text, tokens=200, path=tmp_path / "other", context=32)
    indexes[2] = sl.index_features(coders[2], lm, other.at(coders[2].reads[0]), tmp_path / "again")
    with pytest.raises(ValueError, match="the indexes are of several stores"):
        graph.groups(indexes)


# ---- by hand


@pytest.fixture(scope="module")
def grouped(made):  # noqa: F811
    graph = made[2].prune(0.9, 1.0)
    nodes = graph.nodes[: graph.counts[0]]
    return graph, nodes, graph.groups(of={"a": nodes[:2], "b": nodes[2:5], "c": nodes[5:6]})


def test_groups_are_changed_by_hand(grouped):
    graph, nodes, groups = grouped
    before = dict(groups.graph.supernodes)
    renamed = groups.rename("a", "rivers")
    assert set(renamed["rivers"].nodes) == set(nodes[:2]) and "a" not in renamed.names
    merged = groups.merge(["a", "c"])
    assert set(merged["a"].nodes) == {*nodes[:2], nodes[5]} and sorted(merged.names) == ["a", "b"]
    influence = float(graph.influence[[0, 1, 5]].sum())
    assert merged["a"].influence == pytest.approx(influence)
    split = groups.split("b", [nodes[3]], "d")
    assert set(split["b"].nodes) == {nodes[2], nodes[4]} and split["d"].nodes == (nodes[3],)
    moved = groups.move([nodes[5], nodes[9]], "a")
    assert set(moved["a"].nodes) == {*nodes[:2], nodes[5], nodes[9]} and "c" not in moved.names, "it had no other node"
    assert groups.move([nodes[0]], None)["a"].nodes == (nodes[1],)
    assert groups.graph.supernodes == before and set(groups["a"].nodes) == set(nodes[:2]), "the first is as it was"
    assert merged.graph.supernodes == {group.name: group.nodes for group in merged.groups}
    assert [g.influence for g in merged.groups] == sorted((g.influence for g in merged.groups), reverse=True)


def test_a_changed_group_has_no_score(grouped):
    _, nodes, groups = grouped
    scored = groups.score(draws=2)
    changed = scored.move([nodes[9]], "a").rename("b", "same")
    assert math.isnan(changed["a"].effect) and changed["same"].effect == scored["b"].effect


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g, n: g.rename("x", "y"), "there is no group of the name 'x'; the groups are: "),
        (lambda g, n: g.rename("a", "b"), "there is a group of the name 'b' already"),
        (lambda g, n: g.rename("a", " "), "a group's name is a text that is not empty, got ' '"),
        (lambda g, n: g.merge(["a"]), "merge takes the names of at least two groups"),
        (lambda g, n: g.split("a", n[:2], "d"), "split takes some of the 2 nodes of 'a', and not all"),
        (lambda g, n: g.split("a", [n[7]], "d"), "split takes some of the 2 nodes"),
        (lambda g, n: g.move([Node(Site("mlp_out", 0), 1, 10**6)], "a"), "this graph has no node mlp_out-0@1/1000000"),
        (lambda g, n: g.graph.groups(of={"a": n[:1], "b": n[:1]}), "is in two groups: leave it in one"),
        (lambda g, n: g.graph.groups(of={"a": []}), "a group has at least one node, 'a' got none"),
        (lambda g, n: g.graph.groups(alike=1.0), "alike is a cosine between 0 and 1, .* got 1.0"),
        (lambda g, n: g.graph.groups(of={"a": [g.graph.nodes[-1]]}).score(), "is a logit, which cannot be taken out"),
        (lambda g, n: g.score(draws=0), "draws must be at least 1, got 0"),
        (lambda g, n: g.grouped().effect("a", "x"), "this graph has no node 'x'"),
    ],
)
def test_what_is_refused(grouped, call, words):
    with pytest.raises(ValueError, match=words):
        call(grouped[2], grouped[1])


def test_a_group_as_one_node(grouped):
    graph, _, groups = grouped
    whole = groups.grouped()
    assert len(whole.nodes) == len(graph.nodes) - 3 and whole.inside.keys() == {"a", "b", "c"}
    rows = [graph.row(node) for node in groups["b"].nodes]
    columns = [graph.number(node) for node in groups["a"].nodes]
    assert whole.effect("a", "b") == pytest.approx(float(graph.effects[rows][:, columns].sum()), abs=1e-6)
    last = graph.targets[-1]
    assert whole.effect("a", last) == pytest.approx(float(graph.effects[-1, columns].sum()), abs=1e-6)
    inside = sum(whole.inside.values())
    assert float(whole.effects.sum()) + inside == pytest.approx(float(graph.effects.sum()), rel=1e-4), "none is lost"
    table = whole.to_pandas()
    assert abs(table.effect[0]) == float(whole.effects.abs().max())
    assert {"a", "b"} <= {*table.upstream, *table.downstream}


# ---- named, and kept in files


def test_labels_name_groups(made):  # noqa: F811
    lm, coders, graph = made
    nodes = [node for node in graph.nodes[: graph.counts[0]] if node.site.layer == 2]
    best = max(nodes, key=lambda node: float(graph.influence[graph.number(node)]))
    sl.notes(coders[2]).write(int(best.feature), label="say sea")
    (name,) = (trace(lm, coders, PROMPT).groups(alike=0.05).of(best),)
    assert name is not None and name.startswith("say sea")


def test_files_keep_groups(grouped, made, tmp_path):  # noqa: F811
    graph, _, groups = grouped
    kept = {group.name: group.nodes for group in groups.groups}
    back = AttributionGraph.load(groups.graph.save(tmp_path / "graph.safetensors"), *made[:2])
    assert back.supernodes == kept and graph.supernodes == {}
    again = back.groups(of=back.supernodes).score(draws=2)
    assert again.names == groups.names
    expected = [group.effect for group in groups.score(draws=2).groups]
    assert [group.effect for group in again.groups] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    smaller = groups.graph.prune(0.5, 1.0)
    assert all(node in smaller.nodes for listed in smaller.supernodes.values() for node in listed)
    file = groups.graph.to_json(tmp_path / "graph.json")
    content = json.loads(file.read_text())
    by_id = {n["node_id"]: n for n in content["nodes"]}
    assert sorted(name for name, *_ in content["qParams"]["supernodes"]) == ["a", "b", "c"]
    assert all(id in by_id for _, *ids in content["qParams"]["supernodes"] for id in ids)
    assert AttributionGraph.from_json(file).supernodes == kept


def test_groups_of_a_page_may_be_odd(grouped, tmp_path, caplog):
    """Ids that were pruned away, two groups of one name, a node in two groups."""
    graph, _, groups = grouped
    file = groups.graph.to_json(tmp_path / "graph.json")
    content = json.loads(file.read_text())
    listed = content["qParams"]["supernodes"]
    listed.append([listed[0][0], "9_9_9", listed[1][1], content["nodes"][-1]["node_id"]])
    file.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        found = AttributionGraph.from_json(file).supernodes
    assert "2 ids of this graph's groups are no nodes of it" in caplog.text
    assert found[f"{listed[0][0]} 2"] == (graph.nodes[-1],) and len(found) == 4
    del content["qParams"]
    file.write_text(json.dumps(content))
    assert AttributionGraph.from_json(file).supernodes == {}


@pytest.mark.parametrize("groups", [[["a", 10**6]], [["a", 0], ["b", 0]], [["a", "x"]], [[5, 0]]])
def test_damaged_groups_in_a_file(grouped, tmp_path, groups):
    from sae_lab import files

    file = grouped[0].save(tmp_path / "graph.safetensors")
    tensors, notes = files.read_tensors(file)
    note = json.loads(notes["sae_lab graph"]) | {"supernodes": groups}
    files.write_tensors(tensors, file, {"sae_lab graph": json.dumps(note)})
    with pytest.raises(ValueError, match="contradicts itself"):
        AttributionGraph.load(file)
