"""Attribution graphs with SAEs of attention's output: sums, the model with parts taken out, heads, files."""

import pytest
import tiny_models
import torch

import sae_lab as sl
from sae_lab.circuits import AttributionGraph, Edge, Node, head_attribution, trace, trace_many
from sae_lab.types import Site
from tests.circuits.test_attribution_graphs import off_the_sum, transcoders

PROMPT = "The river ro"


def attention_saes(lm, layers=(0, 2), kind="attn_out", d_sae=40, seed=50):
    """Random SAEs with about four active features a token, and errors."""
    made = []
    for layer in layers:
        site = Site(kind, layer)
        x = lm.read(PROMPT, [site])[site][0, 1:]
        coder = sl.JumpReLU(x.shape[-1], d_sae, seed=seed + layer).eval()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed + layer)
            coder.b_dec.normal_(0, float(x.std()), generator=generator)
            coder.b_enc.normal_(0, 0.1 * float(x.std()), generator=generator)
            pre = coder(x).pre
            coder.threshold.copy_(pre.quantile(1 - 4 / d_sae).clamp_min(1e-3))
        coder.reads = coder.writes = (site,)
        made.append(coder)
    return made


@pytest.fixture(scope="module")
def attended(make_tiny):
    lm = make_tiny("llama")
    coders = [*transcoders(lm), *attention_saes(lm)]
    return lm, coders, trace(lm, coders, PROMPT)


@pytest.mark.parametrize(
    ("name", "kind", "first"),
    [
        ("llama", "attn_out", "keep"), ("gpt2", "attn_z", "keep"), ("gemma2", "attn_out", "drop"),
        ("gpt_neox", "attn_out", "keep"), ("gemma2", "attn_z", "keep"),
    ],
)  # fmt: skip
def test_sums_and_edges(name, kind, first):
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    coders = [*transcoders(lm, layers=[0, 2], reads="resid_pre" if name == "gpt_neox" else "mlp_in")]
    coders += attention_saes(lm, kind=kind)
    graph = trace(lm, coders, PROMPT, first=first)
    assert off_the_sum(graph) < 1e-4
    of_attention = [n for n in graph.nodes[: graph.counts[0]] if n.site.kind == kind]
    assert len(of_attention) > 20 and graph.counts[1] == (lm.n_layers + 2) * len(graph.tokens)
    generator = torch.Generator().manual_seed(0)
    places = graph.effects.nonzero()
    rows, columns = ([n.site.kind == kind for n in nodes] for nodes in (graph.targets, graph.nodes))
    into = [(t, s) for t, s in places.tolist() if rows[t] and s != t]
    out = [(t, s) for t, s in places.tolist() if columns[s] and not rows[t]]
    for some in (into, out):
        for i in torch.randperm(len(some), generator=generator)[:4].tolist():
            t, s = some[i]
            found = graph.check(Edge(graph.nodes[s], graph.targets[t], float(graph.effects[t, s])))
            assert found.error < 1e-4, (graph.nodes[s], graph.targets[t])
    error = next(n for n in graph.nodes if n.site.kind == kind and n.feature < 0 and n.position == 2)
    assert graph.check(error, graph.targets[-1]).error < 1e-4
    assert graph.check(of_attention[:3], graph.targets[-1]).error < 1e-4


def test_nodes_are_what_the_sae_says(attended):
    lm, coders, graph = attended
    for coder in coders[-2:]:
        x = lm.read(PROMPT, [coder.site])[coder.site][0]
        out = coder(x)
        expected = {(p + 1, f): float(out.f[p + 1, f]) for p, f in out.f[1:].nonzero().tolist()}
        nodes = [n for n in graph.nodes[: graph.counts[0]] if n.site == coder.site]
        found = {(n.position, n.feature): float(graph.values[graph.number(n)]) for n in nodes}
        assert found == pytest.approx(expected, rel=1e-3)
        error = graph.local.parts[graph.local.coders.part[coder.site]].error
        assert torch.allclose(error[1:], (x - out.x_hat)[1:], atol=1e-5) and torch.allclose(error[0], x[0], atol=1e-6)
    free = next(n for n in graph.nodes if n.site == coders[-1].site and n.feature >= 0)
    what = graph.values[graph.number(free)] * coders[-1].W_dec[free.feature].detach()

    def less(x, tokens):
        x = x.clone()
        x[0, free.position] -= what
        return x

    batch = lm.tokenize(PROMPT)
    before, after = (lm.run(batch, writes=w)[1][0, -1] for w in ([], [sl.types.Write(free.site, less)]))
    token = graph.targets[-1].feature
    change = float((after - before)[token] - (after - before).mean())
    assert graph.check(free, graph.targets[-1]).free[0, 0] == pytest.approx(change, rel=1e-3, abs=1e-5)


def test_what_responds_is_the_model(attended):
    """With features that respond and errors held nothing changes when nothing is taken out."""
    graph = attended[2]
    local, made = graph.local, {}
    now = local.run(lambda layer, x, read: x if read is None else local.responding_mlp(layer, read, [], made))
    for site in (local.out, Site("attn_out", 2)):
        assert torch.allclose(now[site], local.base[site], atol=1e-4 * float(local.base[site].abs().max()))
    found = graph.faithfulness(sizes=[graph.counts[0]], draws=1)
    assert found.circuit[-1] == pytest.approx(1.0, abs=1e-3), "all features and errors are the model"


@pytest.mark.parametrize(("name", "kind"), [("llama", "attn_out"), ("gemma2", "attn_out"), ("gpt2", "attn_z")])
def test_heads_add_up(name, kind):
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    saes = attention_saes(lm, kind=kind)
    graph = trace(lm, [*transcoders(lm), *saes], PROMPT)
    node = [n for n in graph.nodes[: graph.counts[0]] if n.site == saes[1].site][3]
    found = graph.heads(node)
    coder, x = saes[1], lm.read(PROMPT, [node.site])[node.site][0, node.position]
    read = float(x @ coder.W_enc[:, node.feature].detach())
    # No bias of W_O: these models have none but GPT-2, whose attn_z lies before it.
    assert float(found.sum()) == pytest.approx(read, rel=1e-3, abs=1e-4 * float(found.abs().max()))
    assert float(found.abs().max()) > 0 and len(found) == lm._module.config.get_text_config().num_attention_heads
    if kind == "attn_z":
        other = head_attribution(lm, coder, node.feature, PROMPT, node.position)
        assert torch.allclose(found, other.heads, atol=1e-4)
    with pytest.raises(ValueError, match="heads write what features of attention read"):
        graph.heads(graph.nodes[-1])


def test_a_graph_with_attention_comes_back_from_its_file(attended, tmp_path):
    lm, coders, graph = attended
    node = next(n for n in graph.nodes if n.site.kind == "attn_out")
    sl.notes(coders[-2]).write(int(node.feature), label="moves a name")
    groups = graph.prune().groups()
    file = groups.graph.save(tmp_path / "graph.safetensors")
    back = AttributionGraph.load(file, lm, coders)
    assert back.nodes == groups.graph.nodes and back.supernodes == groups.graph.supernodes
    assert graph.name(node) == "moves a name" and AttributionGraph.load(graph.save(file)).name(node) == "moves a name"
    edge = back.top(1)[0]
    assert back.check(edge).frozen == pytest.approx(graph.check(edge).frozen)
    with pytest.raises(ValueError, match="give other activations than this graph has"):
        AttributionGraph.load(file, lm, coders[:-2])
    with pytest.raises(ValueError, match="schema 1 has no features of attention"):
        graph.to_json(tmp_path / "graph.json")


def test_what_is_refused(attended):
    lm, coders, _ = attended
    two = [*coders, *attention_saes(lm, [0])]
    normed = attention_saes(lm, [1])
    normed[0].input_norm = "length"
    head = sl.TopK(12, 16, k=2)
    head.reads = head.writes = (Site("attn_z", 1, 0),)
    for wrong, words in [
        (two, "one SAE of attention a layer, got two of layer 0"),
        ([*coders, *normed], "needs pre-activations that are linear"),
        ([*coders, head], "takes SAEs of all heads, this one is of attn_z-1-head0"),
        (attention_saes(lm, [1]), "a set needs at least one transcoder"),
    ]:
        with pytest.raises(ValueError, match=words):
            trace(lm, wrong, PROMPT)
    with pytest.raises(ValueError, match="trace_many takes transcoders alone"):
        trace_many(lm, coders, [PROMPT] * 4)
    assert Node(Site("attn_out", 0), 0, 3) not in trace(lm, coders, PROMPT).nodes, "the mask leaves position 0 out"
