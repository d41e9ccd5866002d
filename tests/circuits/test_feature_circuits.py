"""Feature circuits, effects on later features and pulled-back directions, against the model run by hand."""

import pytest
import torch
from torch import nn

import sae_lab as sl
from sae_lab import circuits
from sae_lab.circuits.gradients import gradients
from sae_lab.circuits.nodes import Node
from sae_lab.results import Result
from sae_lab.types import Site, Write
from tests.circuits.test_circuits import metric_of
from tests.edits.test_edit import OTHER, PROMPT, make

EARLY, LATE = Site("resid_post", 0), Site("resid_post", 1)
PROMPTS, SOURCES = [PROMPT, OTHER], [OTHER, PROMPT]


def patched(lm, writes, prompts=PROMPTS):
    """The metric's mean with activations changed."""
    batch = lm.tokenize(prompts)
    return float(both(lm)(lm.run(batch, writes=writes)[1], batch).mean())


def both(lm):
    return circuits.logit_difference(lm, [" the", " sea"], [" sea", " the"])


def add(site, position, change):
    def write(x, tokens):
        x = x.clone()
        x[:, position] += change
        return x

    return Write(site, write)


def change_of(lm, sae, node):
    """What replacing a node by its source's adds, from the coder's own encode and decode."""
    x, given = (lm.read(p, node.site)[node.site] for p in (PROMPTS, SOURCES))
    z, theirs = sae.encode(x), sae.encode(given)
    if node.feature < 0:
        return ((given - sae.decode(theirs)) - (x - sae.decode(z)))[:, node.position]
    return (theirs - z)[:, node.position, node.feature, None] * sae.W_dec[node.feature].detach()


@pytest.fixture(scope="module")
def scene(make_tiny):
    lm = make_tiny("llama")
    saes = [make(lm, EARLY), make(lm, LATE, seed=1)]
    result = circuits.feature_circuit(
        lm, saes[::-1], PROMPTS, SOURCES, both(lm), steps=1, sizes=(3, 20, 10_000), edges=10_000, check=10
    )
    return lm, dict(zip((EARLY, LATE), saes, strict=True)), result


# ---- gradients


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "neox"])
def test_gradients_at_several_sites_are_those_at_each(name, tiny):
    lm, metric = tiny[name], metric_of(tiny[name])
    batch = lm.tokenize(PROMPTS)
    kinds = ["resid_post", "mlp_out", "attn_z", "mlp_in"] + ["resid_mid"] * (name != "neox")
    at = [Site(kind, 1) for kind in kinds]
    before = lm.run(batch)[1]
    (found,) = gradients(lm, batch, at, lambda acts, logits: [metric(logits, batch).sum()])
    for s in at:
        x = lm.run(batch, [s], logits=False)[0][s]
        alone = lm.gradient(batch, s, metric, x)
        assert torch.allclose(found[s], alone, atol=1e-4 * float(alone.abs().max()) + 1e-7), s
        assert float(alone.abs().max()) > 0
    assert torch.equal(lm.run(batch)[1], before)


def test_gradients_of_activations_reach_only_what_is_before(tiny_lm):
    (one, two) = gradients(
        tiny_lm, tiny_lm.tokenize(PROMPT), [LATE, EARLY], lambda acts, _: [acts[EARLY][0, 3].sum(), acts[LATE][0, 3, 0]]
    )
    assert (one[LATE] == 0).all() and (one[EARLY][0, 3] == 1).all() and (two[LATE][0, 3, 1:] == 0).all()
    assert two[LATE][0, 3, 0] == 1 and (two[EARLY][0, 4:] == 0).all() and (two[EARLY][0, :4] != 0).any()


# ---- nodes


@pytest.fixture(scope="module")
def linear(make_module, tokenizer):
    """A model that is linear behind its first block: no norms, no attention, one matrix for each MLP."""
    module = make_module("llama", len(tokenizer))
    module.model.norm = nn.Identity()
    torch.manual_seed(5)
    for block in module.model.layers[1:]:
        block.mlp = nn.Linear(48, 48)
        block.post_attention_layernorm = nn.Identity()
        nn.init.zeros_(block.self_attn.o_proj.weight)
    return sl.LM(module, tokenizer=tokenizer)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("baseline", ["source", "mean"])
def test_in_a_linear_model_estimates_are_the_truth(linear, steps, baseline):
    saes = [make(linear, EARLY), make(linear, LATE, seed=1)]
    prompts, sources = ["The ship went down", "A fox ran up"], ["A fox ran up", "The ship went down"]
    found = circuits.feature_circuit(
        linear, saes, prompts, sources, both(linear), steps=steps,
        baseline=baseline, sizes=(), check=30,
    )  # fmt: skip
    scale = max(map(abs, found.true_effects.values()))
    assert len(found.true_effects) > 30 and scale > 0.1 and found.faithfulness is None
    for node, truth in found.true_effects.items():
        assert found.nodes[node] == pytest.approx(truth, abs=1e-3 * scale), node
    assert found.agreement()["pearson"] > 0.9999 and found.agreement()["spearman"] > 0.98


def test_an_effect_is_the_gradient_times_the_change(scene):
    lm, saes, result = scene
    batch = lm.tokenize(PROMPTS)
    sizes = [abs(effect) for effect in result.nodes.values()]
    assert sizes == sorted(sizes, reverse=True) and {n.site for n in result.nodes} == {EARLY, LATE}
    assert all(n.position > 0 for n in result.nodes)
    for s, sae in saes.items():
        g = lm.gradient(batch, s, both(lm), lm.read(PROMPTS, s)[s])
        for node in [n for n in result.nodes if n.site == s][:40:3]:
            by_hand = float((change_of(lm, sae, node).detach() * g[:, node.position]).sum(-1).mean())
            assert result.nodes[node] == pytest.approx(by_hand, rel=1e-3, abs=1e-5)


def test_all_active_features_and_errors_are_nodes(scene):
    lm, saes, result = scene
    for s, sae in saes.items():
        on = (sae.encode(lm.read(PROMPTS, s)[s]) > 0).any(0) | (sae.encode(lm.read(SOURCES, s)[s]) > 0).any(0)
        wanted = {Node(s, p, f) for p, f in on.nonzero().tolist() if p > 0} | {Node(s, p, -1) for p in range(1, 10)}
        assert {n for n in result.nodes if n.site == s} == wanted


def test_true_effects_are_those_of_patches_by_hand(scene):
    lm, saes, result = scene
    assert sum(n.feature < 0 for n in result.true_effects) == 16 and len(result.true_effects) == 26
    assert all(n.position > 1 for n in result.true_effects)  # the first word is the same in prompts and sources
    assert result.base == pytest.approx(patched(lm, []), abs=1e-4)
    for node in list(result.true_effects)[::4]:
        write = add(node.site, node.position, change_of(lm, saes[node.site], node))
        assert result.true_effects[node] == pytest.approx(patched(lm, [write]) - result.base, abs=2e-3)
    assert result.agreement()["nodes"] == 26


def test_integrated_gradients_add_up(scene):
    """At one site, the effects of all nodes are together that of replacing the activation."""
    lm, saes, _ = scene
    found = circuits.feature_circuit(lm, list(saes.values()), PROMPTS, SOURCES, both(lm), steps=24, sizes=())
    given = lm.read(SOURCES, LATE)[LATE]
    whole = patched(lm, [Write(LATE, lambda x, _: torch.cat([x[:, :1], given[:, 1:]], 1))]) - found.base
    together = sum(effect for node, effect in found.nodes.items() if node.site == LATE)
    assert abs(whole) > 0.5 and together == pytest.approx(whole, rel=0.05)


def test_integrated_gradients_take_midpoints(scene):
    lm, saes, _ = scene
    found = circuits.feature_circuit(lm, list(saes.values()), PROMPTS, SOURCES, both(lm), steps=2, sizes=())
    batch, x, given = lm.tokenize(PROMPTS), lm.read(PROMPTS, LATE)[LATE], lm.read(SOURCES, LATE)[LATE]
    halves = [lm.gradient(batch, LATE, both(lm), x + s * (given - x)) for s in (0.25, 0.75)]
    for node in [n for n in found.nodes if n.site == LATE][:20]:
        change = change_of(lm, saes[LATE], node).detach()
        by_hand = float((change * (halves[0] + halves[1])[:, node.position] / 2).sum(-1).mean())
        assert found.nodes[node] == pytest.approx(by_hand, rel=1e-3, abs=1e-4)


# ---- edges


def test_an_edge_is_a_measured_slope(scene):
    """d(downstream node along its dm/dd)/d(share of the upstream node replaced), by a difference."""
    lm, saes, result = scene
    batch = lm.tokenize(PROMPTS)
    g = lm.gradient(batch, LATE, both(lm), lm.read(PROMPTS, LATE)[LATE])

    def value(edge, share):
        change = share * change_of(lm, saes[EARLY], edge.upstream)
        x = lm.run(batch, [LATE], [add(EARLY, edge.upstream.position, change)], logits=False)[0][LATE]
        down, sae = edge.downstream, saes[LATE]
        z = sae.encode(x)
        node = z[:, down.position, down.feature, None] * sae.W_dec[down.feature]
        if down.feature < 0:
            node = (x - sae.decode(z))[:, down.position]
        return float((node.detach() * g[:, down.position]).sum(-1).mean())

    kinds = {(e.upstream.feature < 0, e.downstream.feature < 0): e for e in reversed(result.edges)}  # the strongest
    assert len(kinds) == 4
    for edge in [*kinds.values(), *result.edges[:20:4]]:
        slope = (value(edge, 1e-3) - value(edge, -1e-3)) / 2e-3
        assert edge.effect == pytest.approx(slope, rel=0.03, abs=2e-3), edge
        assert edge.upstream.site == EARLY and edge.downstream.site == LATE


def test_edges_through_all_later_nodes_are_the_whole_effect(scene):
    _, _, result = scene
    ends = [n for n in result.nodes if n.site == EARLY][:10]
    for node in ends:
        through = sum(e.effect for e in result.edges if e.upstream == node)
        assert through == pytest.approx(result.nodes[node], rel=1e-3, abs=1e-4)
    assert all(e.upstream.position <= e.downstream.position for e in result.edges)
    sizes = [abs(e.effect) for e in result.edges]
    assert sizes == sorted(sizes, reverse=True)


# ---- faithfulness


def by_hand(lm, saes, nodes, reference=PROMPTS + SOURCES):
    """Every site rebuilt, its codes and error one by one: those of the nodes as they arrive, the others at their mean.
    Position 0, which the mask leaves out, stays."""
    writes = []
    for s, sae in saes.items():
        x = lm.read(reference, s)[s]
        z = sae.encode(x)
        mean_z, mean_error = z.mean(0), (x - sae.decode(z)).mean(0)

        def write(x, tokens, s=s, sae=sae, mean_z=mean_z, mean_error=mean_error):
            z = sae.encode(x)
            error = x - sae.decode(z)
            codes, wrong = mean_z.expand_as(z).clone(), mean_error.expand_as(x).clone()
            for node in nodes:
                if node.site == s and node.feature < 0:
                    wrong[:, node.position] = error[:, node.position]
                elif node.site == s:
                    codes[:, node.position, node.feature] = z[:, node.position, node.feature]
            new = sae.decode(codes) + wrong
            new[:, 0] = x[:, 0]
            return new

        writes.append(Write(s, write))
    return patched(lm, writes)


def test_the_complete_graph_is_the_model_and_the_empty_one_the_mean(scene):
    lm, saes, result = scene
    curve = result.faithfulness
    assert curve.full == result.base and curve.complete == curve.full  # bit-equal
    means = {s: lm.read(PROMPTS + SOURCES, s)[s].mean(0) for s in saes}
    writes = [Write(s, lambda x, _, m=m: torch.cat([x[:, :1], m.expand_as(x)[:, 1:]], 1)) for s, m in means.items()]
    assert curve.empty == pytest.approx(patched(lm, writes), abs=1e-3)
    assert curve.empty == pytest.approx(by_hand(lm, saes, []), abs=1e-3)
    assert abs(curve.full - curve.empty) > 0.5


def test_circuits_against_sites_rebuilt_by_hand(scene):
    lm, saes, result = scene
    curve, nodes = result.faithfulness, list(result.nodes)
    assert curve.sizes == (3, 20)  # what is beyond all nodes is left out

    def share(of):
        return (by_hand(lm, saes, of) - curve.empty) / (curve.full - curve.empty)

    for i, size in enumerate(curve.sizes):
        assert curve.circuit[i] == pytest.approx(share(nodes[:size]), abs=2e-3)
        features = [n for n in nodes[:size] if n.feature >= 0]
        assert len(features) < size and curve.no_errors[i] == pytest.approx(share(features), abs=2e-3)
    assert curve.all_errors == pytest.approx(share([n for n in nodes if n.feature < 0]), abs=2e-3)
    everywhere = [Node(s, p, f) for s, sae in saes.items() for p in range(1, 10) for f in range(sae.d_sae)]
    assert curve.all_features == pytest.approx(share(everywhere), abs=2e-3)
    assert curve.circuit[1] != curve.no_errors[1] != curve.random[1]


def test_means_of_a_reference_that_does_not_align(scene):
    """Of prompts of other lengths one mean serves all positions."""
    lm, saes, _ = scene
    reference = ["The old man and the sea", "A red fox"]
    found = circuits.feature_circuit(
        lm, [saes[LATE]], PROMPTS, SOURCES, both(lm), steps=1, sizes=(1,), reference=reference, baseline="mean"
    )
    reading = lm.read(reference, LATE)
    x = reading[LATE][reading.mask & (reading.batch.positions > 0)]
    mean = x.mean(0)
    empty = patched(lm, [Write(LATE, lambda x, _: torch.cat([x[:, :1], mean.expand_as(x)[:, 1:]], 1))])
    assert found.faithfulness.empty == pytest.approx(empty, abs=1e-3)
    node = next(n for n in found.nodes if n.feature >= 0)
    batch, sae = lm.tokenize(PROMPTS), saes[LATE]
    now = lm.read(PROMPTS, LATE)[LATE]
    g = lm.gradient(batch, LATE, both(lm), now)[:, node.position]
    step = sae.encode(x)[:, node.feature].mean() - sae.encode(now)[:, node.position, node.feature]
    assert found.nodes[node] == pytest.approx(float((step * (g @ sae.W_dec[node.feature])).mean().detach()), rel=1e-3)


def test_random_circuits_depend_on_the_seed_alone(scene):
    lm, saes, _ = scene

    def curve(seed):
        return circuits.feature_circuit(
            lm, list(saes.values()), PROMPTS, SOURCES, both(lm), steps=1, sizes=(20,), draws=3, seed=seed
        ).faithfulness

    assert curve(0) == curve(0) and curve(0).random != curve(1).random and curve(0).random_sd[0] > 0


def test_the_tables(scene):
    _, _, result = scene
    table = result.to_pandas()
    assert list(table.columns) == ["site", "position", "token", "feature", "name", "effect", "truth"]
    assert len(table) == len(result.nodes) and table.truth.notna().sum() == 26
    assert len(result.edges_to_pandas()) == len(result.edges) and "gradient; the strongest" in repr(result)
    curve = result.faithfulness.to_pandas()
    assert curve.nodes.tolist() == ["0", "3", "20", "all"] and curve.circuit.iloc[[0, -1]].tolist() == [0.0, 1.0]
    assert repr(result.faithfulness).count("\n") == 5
    for shown in (result, result.faithfulness):
        assert isinstance(shown, Result) and "text-align:right" in shown._repr_html_()
    assert repr(Node(EARLY, 3, -1)) == "resid_post-0@3/error" and repr(Node(EARLY, 3, 7)) == "resid_post-0@3/7"


# ---- effects on later features


def mean_codes(lm, sae, prompts, edits=()):
    """Mean codes over the real tokens behind position 0."""
    reading = lm.read(prompts, sae.site, edits=edits)
    return sae.encode(reading[sae.site])[reading.mask & (reading.batch.positions > 0)].mean(0).detach()


MANY = [PROMPT, "The ship went"]  # of unequal lengths


def strongest(lm, sae):
    return int(mean_codes(lm, sae, MANY).argmax())


@pytest.mark.parametrize("strength", [None, 2.0, -1.0])
def test_changes_are_those_of_the_edit(scene, strength):
    lm, saes, _ = scene
    feature = strongest(lm, saes[EARLY])
    found = circuits.effects_of(lm, saes[EARLY], feature, MANY, [saes[LATE]], strength=strength, controls=8)
    edit = sl.Ablate(saes[EARLY], feature) if strength is None else sl.Steer(saes[EARLY], feature, strength=strength)
    before, after = mean_codes(lm, saes[LATE], MANY), mean_codes(lm, saes[LATE], MANY, [edit])
    assert torch.allclose(found.before[LATE], before, atol=1e-4)
    assert torch.allclose(found.changes[LATE], after - before, atol=1e-4) and found.changes[LATE].abs().max() > 0.01
    assert len(set(found.controls)) == 8 and feature not in found.controls


def test_scores_are_among_the_controls(scene):
    lm, saes, _ = scene
    feature = strongest(lm, saes[EARLY])
    found = circuits.effects_of(lm, saes[EARLY], feature, MANY, [saes[LATE]], controls=6)
    before = mean_codes(lm, saes[LATE], MANY)
    theirs = torch.stack(
        [mean_codes(lm, saes[LATE], MANY, [sl.Ablate(saes[EARLY], g)]) - before for g in found.controls]
    )
    sd = theirs.std(0)
    floor = sd[sd > 1e-6].median()
    theirs, sd = theirs.detach(), sd.detach()
    by_hand = (found.changes[LATE] - theirs.mean(0)) / sd.clamp_min(float(floor.detach()))
    assert torch.allclose(found.control_mean[LATE], theirs.mean(0), atol=1e-4)
    assert torch.allclose(found.z[LATE], by_hand, rtol=0.05, atol=0.05) and found.z[LATE].isfinite().all()
    assert found.beyond == int((found.z[LATE].abs() > 3).sum()) and len(found.beyond_controls) == 6
    assert found.largest == float(found.z[LATE].abs().max()) and len(found.largest_controls) == 6
    sd = theirs[1:].std(0)  # the first control, scored among the others
    alone = (theirs[0] - theirs[1:].mean(0)) / sd.clamp_min(float(sd[sd > 1e-6].median()))
    assert found.largest_controls[0] == pytest.approx(float(alone.abs().max()), rel=0.05)
    table = found.to_pandas()
    assert float(table.z.abs().iloc[0]) == pytest.approx(found.largest) and (table.change != 0).all()
    assert "controls reach it" in repr(found)


def test_a_copy_of_the_feature_is_found(scene):
    """A later coder, at a site that the model copies the change to, has the largest score at the same feature."""
    lm, saes, _ = scene
    copy = make(lm, EARLY)
    copy.reads = copy.writes = (Site("resid_pre", 1),)  # the same place, read a step later
    feature = strongest(lm, saes[EARLY])
    found = circuits.effects_of(lm, saes[EARLY], feature, MANY, [copy], controls=8)
    assert int(found.z[copy.site].abs().argmax()) == feature
    assert float(found.changes[copy.site][feature]) == pytest.approx(
        -float(mean_codes(lm, copy, MANY)[feature]), rel=0.1
    )


def test_random_directions_have_the_same_norm(scene, monkeypatch):
    lm, saes, _ = scene
    seen = []
    run = lm.run

    def spy(batch, reads=(), writes=(), logits=True, past=None):
        def watched(w):
            def fn(x, *rest):
                new = w.fn(x, *rest)
                seen.append((new - x).unflatten(0, (-1, 2)))
                return new

            return Write(w.site, fn, w.reads)

        return run(batch, reads, [watched(w) for w in writes], logits, past)

    monkeypatch.setattr(lm, "run", spy)
    feature = strongest(lm, saes[EARLY])
    found = circuits.effects_of(lm, saes[EARLY], feature, MANY, [saes[LATE]], against="directions", controls=5)
    norms = torch.cat(seen).norm(dim=-1)
    assert len(norms) == 6 and found.controls == () and norms.max() > 0.1
    assert torch.allclose(norms, norms[:1].expand_as(norms), atol=1e-3)
    flat = torch.cat(seen).flatten(1)
    assert float(torch.corrcoef(flat).fill_diagonal_(0).abs().max()) < 0.9


def test_a_transcoder_is_changed_where_it_writes(scene):
    lm, saes, _ = scene
    coder = transcoder(lm)
    feature = strongest(lm, coder)
    found = circuits.effects_of(lm, coder, feature, MANY, [saes[LATE]], controls=5, against="directions")
    after = mean_codes(lm, saes[LATE], MANY, [sl.Ablate(coder, feature)])
    assert torch.allclose(found.changes[LATE], after - found.before[LATE], atol=1e-4)
    assert found.site == Site("mlp_out", 1) and found.changes[LATE].abs().max() > 0


def transcoder(lm):
    coder = sl.Transcoder(lm.width("blocks.1.hook_mlp_out"), 64, d_out=48, k=6).eval()
    coder.reads, coder.writes = (Site("mlp_in", 1),), (Site("mlp_out", 1),)
    coder.calibrate([lm.read(PROMPTS, coder.site)[coder.site].flatten(0, 1)])
    return coder


# ---- pulled-back directions


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "olmo2", "neox"])
@pytest.mark.parametrize(
    ("at", "reads"), [("mlp_in", "mlp_out"), ("resid_mid", "resid_post"), ("mlp_in", "resid_post")]
)
def test_directions_against_differences(name, at, reads, tiny):
    lm = tiny[name]
    if name == "neox" and at == "resid_mid":
        pytest.skip("attention and MLP in parallel: no middle")
    sae = make(lm, Site(reads, 1))
    found = circuits.pull_back(lm, sae, 5, MANY, at=at)
    assert found.directions.shape == (2, 10, 48) and found.at == Site(at, 1)
    kept = (found.directions != 0).any(-1)
    assert kept.tolist() == [[False] + [True] * 9, [False] + [True] * 3 + [False] * 6]
    batch, w = lm.tokenize(MANY), sae.W_enc[:, 5].detach()
    x = lm.run(batch, [found.at], logits=False)[0][found.at]
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    step *= 3e-3 * x.norm(dim=-1, keepdim=True) / step.norm(dim=-1, keepdim=True)

    def pre(sign):
        writes = [Write(found.at, lambda x, _: x + sign * step)]
        return lm.run(batch, [sae.site], writes, logits=False)[0][sae.site] @ w

    slopes = (pre(1) - pre(-1))[kept] / 2
    assert torch.allclose((found.directions * step).sum(-1)[kept], slopes, atol=0.03 * float(slopes.abs().max()))


def test_how_far_a_direction_carries(tiny_lm):
    sae = make(tiny_lm, Site("mlp_out", 1))
    found = circuits.pull_back(tiny_lm, sae, 5, PROMPTS + MANY, draws=6, seed=2)
    assert found.sizes == (0.01, 0.1, 1.0) and found.changes == 6 * 30
    assert found.r[0] > 0.999 and found.slope[0] == pytest.approx(1, abs=0.03)
    assert found.r[2] < found.r[0] and abs(found.random[0]) < 0.4 and found.other_token[0] < 0.9
    assert found.other_token[0] != found.mean_direction[0] < 0.99  # the direction differs from token to token
    again = circuits.pull_back(tiny_lm, sae, 5, PROMPTS + MANY, draws=6, seed=2)
    assert again.r == found.r and again.random == found.random
    assert len(found.to_pandas()) == 3 and "pulled back to mlp_in-1" in repr(found)


def test_a_linear_mlp_pulls_back_exactly(linear):
    """Its direction is the same at every token, and right at full size."""
    sae = make(linear, Site("mlp_out", 1))
    found = circuits.pull_back(linear, sae, 5, PROMPT)
    matrix = linear._module.model.layers[1].mlp.weight.detach()
    assert torch.allclose(found.directions[0, 1:], (sae.W_enc[:, 5] @ matrix).expand(9, -1), atol=1e-5)
    assert min(found.r) > 0.9999 and found.slope[2] == pytest.approx(1, abs=1e-3) and found.mean_direction[2] > 0.9999


def test_a_transcoder_pulls_back_through_the_norm(tiny_lm):
    coder = transcoder(tiny_lm)
    found = circuits.pull_back(tiny_lm, coder, 5, PROMPT, at="resid_mid")
    assert found.site == Site("mlp_in", 1) and found.r[0] > 0.999
    x = tiny_lm.read(PROMPT, found.at)[found.at].requires_grad_(True)
    norm = tiny_lm._module.model.layers[1].post_attention_layernorm
    ((norm(x) @ coder.W_enc[:, 5])[0, 1:].sum()).backward()
    assert torch.allclose(found.directions, x.grad, atol=1e-4 * float(x.grad.abs().max()))


# ---- what is refused


def circuit(lm, saes, **given):
    given = {"prompts": [PROMPT], "sources": [OTHER], "metric": metric_of(lm), "steps": 1, "sizes": (1,), **given}
    return circuits.feature_circuit(lm, saes, **given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lm, a, b: circuit(lm, []), "at least one coder"),
        (lambda lm, a, b: circuit(lm, [a, transcoder(lm)]), "coder 1 is a Transcoder that reads .*take an SAE"),
        (lambda lm, a, b: circuit(lm, [a, a]), "one coder a site, got Site.*leave out all but one"),
        (lambda lm, a, b: circuit(lm, [a], sources=["A red fox"]), "prompt 0 has 10, source 0 has 4"),
        (lambda lm, a, b: circuit(lm, [a], metric=lambda out, _: out), "one number for each row, 1 here"),
        (lambda lm, a, b: circuit(lm, [a], metric=lambda out, _: out[:, -1].detach().sum(-1)), "is differentiable in"),
        (lambda lm, a, b: circuits.effects_of(lm, a, 0, PROMPT, [b], against="x"), "against must be 'features' or"),
        (lambda lm, a, b: circuits.pull_back(lm, b, 0, PROMPT, at="x"), "at must be 'mlp_in' or 'resid_mid', got 'x'"),
        (lambda lm, a, b: circuit(lm, [a], steps=0), "steps must be at least 1, got 0"),
        (lambda lm, a, b: circuit(lm, [a], baseline="zero"), "baseline must be 'source' or 'mean', got 'zero'"),
        (lambda lm, a, b: circuit(lm, [a], sizes=(0, 3)), "at least 1, got 0"),
        (lambda lm, a, b: circuit(lm, [a], check=-1), "check must be at least 0, got -1"),
        (lambda lm, a, b: circuit(lm, [a], draws=0), "draws must be at least 1, got 0"),
        (lambda lm, a, b: circuit(lm, [a], metric=lambda out, t: out[:, 0, 0]), "faithfulness is undefined"),
        (lambda lm, a, b: circuit(lm, [a]).agreement(), "at least three true effects"),
        (lambda lm, a, b: circuits.effects_of(lm, b, 0, PROMPT, [a]), "Site.'resid_post', layer=0.* is not: leave it"),
        (lambda lm, a, b: circuits.effects_of(lm, a, 0, PROMPT, []), "later needs at least one coder"),
        (lambda lm, a, b: circuits.effects_of(lm, a, 0, PROMPT, [b, b]), "one coder a site"),
        (lambda lm, a, b: circuits.effects_of(lm, a, 99, PROMPT, [b]), "from 0 to 63, got 99"),
        (lambda lm, a, b: circuits.effects_of(lm, a, silent(lm, a), PROMPT, [b]), "is silent on these prompts"),
        (lambda lm, a, b: circuits.effects_of(lm, a, 0, PROMPT, [b], strength=0.0), "in units of f_scale and not 0"),
        (lambda lm, a, b: circuits.effects_of(lm, a, 0, PROMPT, [b], controls=2), "controls must be at least 3, got 2"),
        (lambda lm, a, b: circuits.effects_of(lm, a, strongest(lm, a), PROMPT, [b], controls=64), "64 controls need"),
        (lambda lm, a, b: circuits.pull_back(lm, make(lm, Site("attn_out", 1)), 0, PROMPT), "coder that reads mlp_out"),
        (lambda lm, a, b: circuits.pull_back(lm, transcoder(lm), 0, PROMPT), "or mlp_in, with at='resid_mid'"),
        (lambda lm, a, b: circuits.pull_back(lm, b, 0, PROMPT, sizes=(0.0,)), "sizes must be above 0"),
        (lambda lm, a, b: circuits.pull_back(lm, b, 0, "A"), "at least three tokens, these prompts have 1"),
    ],
)  # fmt: skip
def test_refused(call, words, scene):
    lm, saes, _ = scene
    with pytest.raises(ValueError, match=words):
        call(lm, saes[EARLY], saes[LATE])


def silent(lm, sae):
    return int((mean_codes(lm, sae, [PROMPT]) == 0).nonzero()[0])


def test_coders_that_rescale_what_they_read_are_refused(scene):
    lm, saes, _ = scene
    odd = make(lm, LATE)
    odd.input_norm = "layer"
    with pytest.raises(ValueError, match="coder 1 has input_norm='layer'"):
        circuit(lm, [saes[EARLY], odd])
    with pytest.raises(ValueError, match="linear in what the coder reads; this one has input_norm='layer'"):
        circuits.pull_back(lm, odd, 0, PROMPT)
