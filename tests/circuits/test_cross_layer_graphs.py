"""Attribution graphs of cross-layer transcoders: sums, the formula written out, the model with parts taken out."""

import copy

import pytest
import tiny_models
import torch

import sae_lab as sl
from sae_lab.circuits import AttributionGraph, Edge, trace
from sae_lab.types import Site
from tests.circuits.test_attribution_graphs import PROMPT, off_the_sum, plain_llama, transcoders

WIDTH = 24


def random_clt(lm, activation="jumprelu", skip=True, reads="mlp_in", norm="none"):
    """A CLT of random weights with about four active features a token and layer."""
    sites = [Site(reads, n) for n in range(lm.n_layers)]
    x = torch.stack([lm.read(PROMPT, [s])[s][0] for s in sites], 1)
    clt = sl.CrossLayerTranscoder(
        x.shape[-1], WIDTH * lm.n_layers, lm.n_layers, k=4 * lm.n_layers, activation=activation, skip=skip, seed=3
    ).eval()
    clt.input_norm = norm
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight, size in ((clt.b_enc, 0.3), (clt.b_dec, 0.3), (clt.W_skip, 0.1)):
            if weight is not None:
                weight.normal_(0, size, generator=generator)
        if activation != "topk":
            clt.threshold.fill_(0.0)
            clt.threshold.copy_(clt(x).pre.quantile(1 - 4 / WIDTH).clamp_min(0.1))
    clt.reads, clt.writes = tuple(sites), tuple(Site("mlp_out", n) for n in range(lm.n_layers))
    return clt


@pytest.fixture(scope="module")
def made(make_tiny):
    lm = make_tiny("llama")
    clt = random_clt(lm)
    return lm, clt, trace(lm, clt, PROMPT)


def test_rows_are_those_of_a_plain_backward_pass(made):
    """A Llama written out, and what a feature writes to each layer: A[t, s] is the sum over the layers between."""
    lm, clt, graph = made
    assert graph.counts[0] > 60 and off_the_sum(graph) < 1e-5
    own = clt.as_set()
    embed, leaves, reads, out = plain_llama(lm, own, PROMPT)
    W = clt.W_dec.detach().view(3, WIDTH, 3, -1)
    generator = torch.Generator().manual_seed(0)
    for row in torch.randperm(len(graph.targets), generator=generator)[:12].tolist():
        target = graph.targets[row]
        if row >= graph.counts[0]:
            value = out[-1] @ graph.directions[row - graph.counts[0]]
        else:
            value = reads[target.site.layer][target.position] @ own[target.site.layer].W_enc[:, target.feature]
        grads = torch.autograd.grad(value, [embed, *leaves], retain_graph=True, allow_unused=True)
        grads = [torch.zeros_like(embed) if g is None else g for g in grads]
        expected = []
        for node, kind, code in zip(graph.nodes, graph.kinds, graph.values.tolist(), strict=True):
            if kind == "feature":
                layer = node.site.layer
                parts = [grads[1 + t][node.position] @ W[layer, node.feature, t] for t in range(layer, 3)]
                expected.append(code * float(sum(parts)))
        found = graph.effects[row, : graph.counts[0]]
        assert torch.allclose(found, torch.tensor(expected), atol=1e-4 * float(found.abs().max().clamp_min(1e-6)))


def test_errors_are_what_the_formula_written_out_leaves(made):
    """mlp_out_t less Σ_{l ≤ t} f_l·W_dec[l, t] + b_dec[t] + x_t·W_skip[t]."""
    lm, clt, graph = made
    sites = [*clt.reads, *clt.writes]
    acts = lm.read(PROMPT, sites)
    x = torch.stack([acts[s][0] for s in clt.reads], 1)
    f = clt.encode(x).detach()
    f[0] = 0.0  # position 0 has no features
    W = clt.W_dec.detach().view(3, WIDTH, 3, -1)
    for t in range(3):
        made_of = sum(f[:, n * WIDTH : (n + 1) * WIDTH] @ W[n, :, t] for n in range(t + 1))
        y_hat = made_of + clt.b_dec.detach().view(3, -1)[t] + x[:, t] @ clt.W_skip.detach()[t]
        expected = (acts[clt.writes[t]][0] - y_hat)[1:]
        assert torch.allclose(graph.local.parts[t].error[1:], expected, atol=1e-5 * float(expected.abs().max()))
    values = {(n.site.layer, n.position, n.feature): float(v) for n, v in zip(graph.nodes, graph.values, strict=True)}
    for p, i in f.nonzero().tolist():
        assert values[i // WIDTH, p, i % WIDTH] == pytest.approx(float(f[p, i]), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "activation", "reads", "norm", "first"),
    [
        ("llama", "batchtopk", "resid_mid", "none", "keep"), ("gpt2", "topk", "mlp_in", "none", "keep"),
        ("gemma2", "jumprelu", "resid_mid", "length", "drop"),
    ],
)  # fmt: skip
def test_edges_are_what_taking_their_source_out_does(name, activation, reads, norm, first):
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    clt = random_clt(lm, activation, skip=activation != "topk", reads=reads, norm=norm)
    graph = trace(lm, clt, PROMPT[:12], first=first)
    assert graph.counts[0] > 30 and off_the_sum(graph) < 1e-4
    places = graph.effects[:, : graph.counts[0]].nonzero()
    for t, s in places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:5]].tolist():
        found = graph.check(Edge(graph.nodes[s], graph.targets[t], float(graph.effects[t, s])))
        assert found.error < 1e-4
    some = [graph.nodes[s] for s in range(0, graph.counts[0], 5)]
    assert graph.check(some, graph.targets[-1]).error < 1e-4
    token = next(n for n, kind in zip(graph.nodes, graph.kinds, strict=True) if kind == "token" and n.position == 2)
    assert graph.check(token, graph.targets[-1]).error < 1e-4


def test_what_a_feature_does_along_all_paths(made):
    """All features are on and stay on: then the model with features that respond follows (I − A)⁻¹."""
    lm, clt, _ = made
    always = copy.deepcopy(clt)
    with torch.no_grad():
        always.b_enc += 40.0
        always.threshold.zero_()
    graph = trace(lm, always, PROMPT[:8])
    assert graph.counts[0] == 3 * WIDTH * (len(graph.tokens) - 1)
    error = graph.nodes[graph.counts[0] + len(graph.tokens) + 2]
    for source in [*graph.nodes[: graph.counts[0] : 97], error, graph.nodes[3:50:20]]:
        found = graph.check(source, graph.targets[-2:])
        assert found.responding == pytest.approx(found.total, rel=1e-3, abs=1e-4 * float(abs(found.total).max()))
    indirect = graph.check(graph.nodes[0], graph.targets[-1])
    assert abs(indirect.total - indirect.predicted).max() > 0.01 * abs(indirect.total).max(), "other paths matter"


def test_a_clt_that_writes_to_its_own_layer_alone_is_a_set(made):
    lm, clt, _ = made
    alone = copy.deepcopy(clt)
    with torch.no_grad():
        blocks = alone.W_dec.view(3, WIDTH, 3, -1)
        blocks.mul_(torch.eye(3)[:, None, :, None])
    one, other = trace(lm, alone, PROMPT), trace(lm, [alone.layer(n) for n in range(3)], PROMPT)
    assert one.nodes == other.nodes and torch.allclose(one.effects, other.effects, atol=1e-5)


def test_a_graph_comes_back_with_its_clt(made, tmp_path):
    lm, clt, graph = made
    back = AttributionGraph.load(graph.save(tmp_path / "graph.safetensors"), lm, clt)
    edge = graph.top(1)[0]
    assert back.check(edge).frozen == pytest.approx(graph.check(edge).frozen)
    with pytest.raises(ValueError, match="give other activations than this graph has"):
        AttributionGraph.load(tmp_path / "graph.safetensors", lm, transcoders(lm))


def test_what_is_refused(made):
    lm, clt, _ = made
    lost = copy.deepcopy(clt)
    lost.reads = ()
    with pytest.raises(ValueError, match="does not know its 3 layers' sites: train it on a store"):
        trace(lm, lost, PROMPT)
    turned = copy.deepcopy(clt)
    turned.reads, turned.writes = clt.reads[::-1], clt.writes[::-1]
    with pytest.raises(ValueError, match="in the order of layers"):
        trace(lm, turned, PROMPT)
    with pytest.raises(ValueError, match=r"a transcoder of layer 3, .* has layers 0 to 2"):
        far = copy.deepcopy(clt)
        far.reads, far.writes = (tuple(Site(s.kind, s.layer + 1) for s in sites) for sites in (clt.reads, clt.writes))
        trace(lm, far, PROMPT)
    with pytest.raises(ValueError, match="a set takes transcoders"):
        trace(lm, [clt, clt], PROMPT)


def test_a_clt_of_another_model_is_told(made, caplog):
    lm, clt, _ = made
    other = copy.deepcopy(clt)
    other.meta["model"] = "HuggingFaceTB/SmolLM2-135M"
    trace(lm, other, PROMPT[:8], features=5)
    assert "these transcoders are of the model HuggingFaceTB/SmolLM2-135M, and this graph is of" in caplog.text
