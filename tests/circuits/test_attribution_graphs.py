"""Attribution graphs: a circuit made by hand, sums, the model with parts taken out, pruning by hand, files."""

import copy
import json
import math

import pytest
import tiny_models
import torch
import transformers as tf

import sae_lab as sl
from sae_lab import circuits
from sae_lab.circuits import AttributionGraph, Edge, Node, trace
from sae_lab.circuits.attribution_graph import pruned
from sae_lab.circuits.graph_scores import scores
from sae_lab.types import Site, Write

PROMPT = "The river rose in March"


def transcoders(lm, layers=None, d_sae=40, skip=True, reads="mlp_in", seed=0):
    """Random transcoders with about five active features a token."""
    made, x = [], lm.read(PROMPT, [Site(reads, n) for n in range(lm.n_layers)])
    for layer in range(lm.n_layers) if layers is None else layers:
        site = Site(reads, layer)
        coder = sl.Transcoder(lm.width(site), d_sae, k=5, seed=seed + layer, skip=skip).eval()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed + layer)
            for weight, size in ((coder.b_enc, 0.3), (coder.b_dec, 0.3), (coder.W_skip, 0.1)):
                if weight is not None:
                    weight.normal_(0, size, generator=generator)
            pre = x[site][0, 1:] @ coder.W_enc + coder.b_enc
            coder.threshold.copy_(pre.quantile(1 - 5 / d_sae).clamp_min(0.1))
        coder.reads, coder.writes = (site,), (Site("mlp_out", layer),)
        made.append(coder)
    return sl.TranscoderSet(made)


def off_the_sum(graph):
    """How far the sums of rows are from the pre-activations, in shares of each row's largest number."""
    total = graph.effects.sum(1) + graph.rest + graph.bias
    largest = torch.stack([graph.effects.abs().max(1).values, graph.bias.abs(), graph.pre.abs()]).max(0).values
    return float(((total - graph.pre).abs() / largest).max())


@pytest.fixture(scope="module")
def made(make_tiny):
    lm = make_tiny("llama")
    coders = transcoders(lm)
    return lm, coders, trace(lm, coders, PROMPT)


# ---- a circuit made by hand

D, VOCAB = 16, 264


def direction(i):
    """One of eight orthogonal vectors with mean 0; half of it reads it. Two entries of size 1, so that float32 rounds
    no product with them and no sum of two."""
    found = torch.zeros(D)
    found[2 * i], found[2 * i + 1] = 1.0, -1.0
    return found


@pytest.fixture(scope="module", params=[0.0, -0.1])
def by_hand(request):
    """A GPT-2 of two layers whose MLPs are what their transcoders say: "A" makes feature 0 of layer 0, which layer 1's
    attention moves to later tokens, where feature 0 of layer 1 reads it and writes "X"; "B" makes feature 1 of layer 0,
    which nothing reads, and feature 1 of layer 1, which writes "Y". With the encoders' biases, which come last."""
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_layer=2, n_head=1, n_inner=2, n_positions=32, activation_function="relu",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    module = tf.GPT2LMHeadModel(config).eval()
    tokenizer = tiny_models.tokenizer()
    a, b, x, y = (tokenizer(letter)["input_ids"][0] for letter in "ABXY")
    coders = []
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        for norm in [module.transformer.ln_f, *(n for block in module.transformer.h for n in (block.ln_1, block.ln_2))]:
            norm.weight.fill_(1.0)
        module.transformer.wte.weight[:] = direction(7)
        module.transformer.wte.weight[a], module.transformer.wte.weight[b] = direction(0), direction(1)
        attention = module.transformer.h[1].attn
        attention.c_attn.weight[:, 2 * D :] = torch.eye(D)  # values; queries and keys are 0: an even pattern
        attention.c_proj.weight.copy_(torch.outer(direction(2) / 2, direction(4)))
        head = torch.zeros(VOCAB, D)
        head[x], head[y] = direction(5) / 2, direction(6) / 2
        head[x + 32], head[y + 32] = -head[x], -head[y]  # the mean over the vocabulary stays 0
        module.lm_head.weight = torch.nn.Parameter(head)
        for layer, (reads, writes) in enumerate([((0, 1), (2, 3)), ((4, 1), (5, 6))]):
            mlp = module.transformer.h[layer].mlp
            mlp.c_fc.weight.copy_(torch.stack([direction(i) / 2 for i in reads], 1))
            mlp.c_fc.bias.fill_(request.param)
            mlp.c_proj.weight.copy_(torch.stack([direction(i) for i in writes]))
            coder = sl.JumpReLU(D, 2, d_out=D).eval()
            coder.W_enc.copy_(mlp.c_fc.weight)
            coder.b_enc.copy_(mlp.c_fc.bias)
            coder.W_dec.copy_(mlp.c_proj.weight)
            coder.threshold.fill_(0.0)
            coder.reads, coder.writes = (Site("mlp_in", layer),), (Site("mlp_out", layer),)
            coders.append(coder)
    return sl.LM(module, tokenizer=tokenizer, prefix=None), sl.TranscoderSet(coders), (a, b, x, y), request.param


def test_a_circuit_made_by_hand_is_found_whole_and_nothing_else(by_hand):
    """False edges are exactly 0. With biases those of errors are not quite: an MLP and its transcoder may round the
    sum of a product and a bias in two ways, and that difference is an error node."""
    lm, coders, (a, b, x, y), bias = by_hand
    graph = trace(lm, coders, "-AB", targets=["X", "Y"])
    feature = lambda layer, position, number: Node(Site("mlp_out", layer), position, number)  # noqa: E731
    token = lambda position, number: Node(Site("embed"), position, number)  # noqa: E731
    logits = [Node(Site("resid_post", 1), 2, number) for number in (x, y)]
    f = {n: graph.values[graph.number(n)].item() for n in graph.nodes[: graph.counts[0]]}
    assert set(f) == {feature(0, 1, 0), feature(0, 2, 1), feature(1, 1, 0), feature(1, 2, 0), feature(1, 2, 1)}

    def scale(vector):  # of a norm; every vector here has mean 0
        return float((vector.square().mean() + 1e-5).sqrt())

    one, two = f[feature(0, 1, 0)], f[feature(0, 2, 1)]
    assert one == pytest.approx(1 / scale(direction(0)) + bias, rel=1e-5)
    at_a, at_b = direction(0) + one * direction(2), direction(1) + two * direction(3)  # the streams after layer 0
    moved = one / scale(at_a)  # what the values at A have along direction 2
    mid_a, mid_b = at_a + moved / 2 * direction(4), at_b + moved / 3 * direction(4)
    last = mid_b + f[feature(1, 2, 0)] * direction(5) + f[feature(1, 2, 1)] * direction(6)
    expected = {
        (token(1, a), feature(0, 1, 0)): 1 / scale(direction(0)),
        (token(2, b), feature(0, 2, 1)): 1 / scale(direction(1)),
        (feature(0, 1, 0), feature(1, 1, 0)): moved / 2 / scale(mid_a),
        (feature(0, 1, 0), feature(1, 2, 0)): moved / 3 / scale(mid_b),
        (token(2, b), feature(1, 2, 1)): 1 / scale(mid_b),
        (feature(1, 2, 0), logits[0]): f[feature(1, 2, 0)] / scale(last),
        (feature(1, 2, 1), logits[1]): f[feature(1, 2, 1)] / scale(last),
    }
    effects, (features, errors, *_) = graph.effects.clone(), graph.counts
    if bias:
        of_errors = effects[:, features : features + errors]
        assert float(of_errors.abs().max()) < 1e-6 * float(effects.abs().max())
        of_errors.zero_()
    found = {(graph.nodes[s], graph.targets[t]): float(effects[t, s]) for t, s in effects.nonzero().tolist()}
    assert set(found) == set(expected), "no false edge, and none is missing"
    for edge, effect in expected.items():
        assert found[edge] == pytest.approx(effect, rel=1e-4), edge
    assert graph.bias[:5].tolist() == pytest.approx([bias] * 5, abs=1e-5) and off_the_sum(graph) < 1e-5
    assert graph.replacement > 0.999 and graph.completeness_inner > 0.999, "nothing is left to errors"
    small = graph.prune(1.0, 1.0)
    assert feature(0, 2, 1) not in small.nodes, "nothing reads it"


# ---- sums and checks on many architectures


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("gpt2", "keep"), ("gpt_neox", "keep"), ("gemma2", "keep"), ("olmo2", "keep"), ("falcon:new", "keep"),
        ("bloom", "keep"), ("phi:qk norm", "keep"), ("gpt2", "drop"), ("gemma2", "drop"),
    ],
)  # fmt: skip
def test_rows_sum_to_pre_activations(name, first):
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    coders = transcoders(lm, layers=[0, 2, 3], reads="resid_pre" if name == "gpt_neox" else "mlp_in")
    graph = trace(lm, coders, PROMPT[:12], first=first)
    assert graph.counts[0] > 50 and off_the_sum(graph) < 1e-5
    assert (first == "keep") == (float(graph.rest_size.max()) == 0.0), "what is dropped at position 0 is told"
    # Against the model: pre-activations and the centred logits are its own.
    logits = lm.logits(PROMPT[:12])[0, -1]
    cap = getattr(lm._module.config, "final_logit_softcapping", None)
    own = logits if cap is None else cap * (logits / cap).atanh()
    chosen = graph.places[-graph.counts[3] :, 2]
    assert torch.allclose(graph.pre[-graph.counts[3] :], (own - own.mean())[chosen], atol=1e-3 * float(own.abs().max()))
    errors = graph.effects[:, graph.counts[0] : sum(graph.counts[:2])]
    whole = errors.view(len(errors), lm.n_layers, -1)
    assert bool(whole[:, 1].any()), "a layer without a transcoder is all error"
    assert bool(whole[:, :, 0].any()) == (first == "keep")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_neox", "falcon:new"])
def test_edges_are_what_taking_their_source_out_does(name):
    """Forward, by the model's own modules, against the backward sweep of ``trace``."""
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    graph = trace(lm, transcoders(lm), PROMPT[:12])
    generator = torch.Generator().manual_seed(0)
    places = graph.effects.nonzero()
    for t, s in places[torch.randperm(len(places), generator=generator)[:8]].tolist():
        edge = Edge(graph.nodes[s], graph.targets[t], float(graph.effects[t, s]))
        found = graph.check(edge)
        assert found.error < 1e-4 and found.predicted[0, 0] == pytest.approx(-edge.effect)
    node = graph.top(1)[0].upstream
    assert graph.check(node).error < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_coders_that_read_a_norms_output_before_its_gain(name):
    """A coder that divides the stream itself, and the same with the gain of the model's norm folded in, which reads
    mlp_in: one graph."""
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    kind = "layer" if name == "gpt2" else "length"
    after = transcoders(lm)
    before = [copy.deepcopy(coder) for coder in after]
    for layer, coder in enumerate(before):
        block = lm._module.transformer.h[layer] if name == "gpt2" else lm._module.model.layers[layer]
        norms = {"gpt2": "ln_2", "llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm"}
        norm = getattr(block, norms[name])
        gain = 1 + norm.weight if name == "gemma2" else norm.weight
        assert float((gain.detach() - 1).abs().max()) > 0.05, "gains that matter"
        shift = norm.bias if name == "gpt2" else torch.zeros_like(gain)
        with torch.no_grad():
            coder.b_enc += shift @ coder.W_enc
            coder.b_dec += shift @ coder.W_skip
            for weight in (coder.W_enc, coder.W_skip):
                weight *= gain[:, None]
                if kind == "layer":  # a LayerNorm divides by the deviation over d, a coder by that over d - 1
                    weight *= (len(gain) / (len(gain) - 1)) ** 0.5
        coder.input_norm, coder.reads = kind, (Site("resid_mid", layer),)
    one, two = (trace(lm, sl.TranscoderSet(coders), PROMPT[:12]) for coders in (after, before))
    assert off_the_sum(two) < 1e-4 and torch.equal(one.places, two.places)
    for a, b in ((one.effects, two.effects), (one.values, two.values)):
        assert torch.allclose(a, b, atol=2e-3 * float(b.nan_to_num().abs().max()), equal_nan=True), "the norms' epsilon"
    expected, found = one.check(one.top(1)[0]), two.check(two.top(1)[0])
    assert found.error < 1e-4
    for way in ("responding", "free"):
        assert getattr(found, way) == pytest.approx(getattr(expected, way), rel=0.01, abs=1e-3)


def plain_llama(lm, coders, prompt):
    """A Llama written out, with detached patterns and scales, as circuit-tracer hooks it: leaves for embeddings and
    MLPs' outputs, what each transcoder reads, and the final norm's output."""
    model, ids = lm._module.model, lm.tokenize(prompt).ids[0]  # the weights, by their names in transformers

    def norm(module, x):
        return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt().detach()

    embed = model.embed_tokens(ids).detach().requires_grad_()
    h, reads, leaves = embed, [], []
    for n, block in enumerate(model.layers):
        pattern = circuits.attention(lm, prompt, n).pattern[0]
        v = block.self_attn.v_proj(norm(block.input_layernorm, h)).unflatten(-1, (2, -1)).transpose(0, 1)
        z = pattern @ v.repeat_interleave(len(pattern) // 2, 0)
        h = h + block.self_attn.o_proj(z.transpose(0, 1).flatten(1))
        reads.append(norm(block.post_attention_layernorm, h))
        leaves.append(block.mlp(reads[-1]).detach().requires_grad_())
        skip = reads[-1] @ coders[n].W_skip.detach()
        h = h + leaves[-1] + skip - skip.detach()
    return embed, leaves, reads, norm(model.norm, h)


def test_rows_are_those_of_a_plain_backward_pass(made):
    lm, coders, _ = made
    graph = trace(lm, coders, PROMPT, first="drop")
    embed, leaves, reads, normed = plain_llama(lm, coders, PROMPT)
    W_U = lm._module.lm_head.weight.detach()
    outs = [coder(read.detach()) for coder, read in zip(coders, reads, strict=True)]
    targets = graph.targets
    for t in [*range(0, graph.counts[0], 17), *range(graph.counts[0], len(targets))]:
        (site, position, number), expected = targets[t], torch.zeros(graph.effects.shape[1])
        if t < graph.counts[0]:
            read = reads[site.layer][position] @ coders[site.layer].W_enc[:, number].detach()
        else:
            read = normed[-1] @ (W_U[number] - W_U.mean(0))
        *slopes, at_tokens = torch.autograd.grad(read, [*leaves, embed], retain_graph=True, materialize_grads=True)
        for s, (source, kind) in enumerate(zip(graph.nodes[: len(expected)], graph.kinds, strict=False)):
            if kind == "token":
                expected[s] = at_tokens[source.position] @ embed[source.position].detach()
                continue
            coder, out = coders[source.site.layer], outs[source.site.layer]
            error = (leaves[source.site.layer] - out.x_hat)[source.position] * (source.position > 0)
            active = out.f[source.position, source.feature] * coder.W_dec[source.feature]
            expected[s] = slopes[source.site.layer][source.position] @ (error if kind == "error" else active).detach()
        assert torch.allclose(graph.effects[t], expected, atol=1e-4 * float(expected.abs().max())), targets[t]


def test_an_edge_by_hand(made):
    """The last layer's feature on a logit: f·W_dec, over the final norm's scale, times its gain and W_U."""
    lm, coders, graph = made
    last, position = lm.n_layers - 1, graph.places[-1, 1].item()
    here = [n for n in graph.nodes[: graph.counts[0]] if n.site == Site("mlp_out", last) and n.position == position]
    source = here[0]
    target = graph.targets[-1]
    effects = circuits.direct_effects(lm, coders[last], PROMPT, position, on=[target.feature], n=None)
    at = effects.features.tolist().index(source.feature)
    assert graph.effect(source, target) == pytest.approx(float(effects.effects[at, 0]), rel=1e-3)
    assert graph.effect(graph.targets[-1], target) == 0.0


def test_what_features_add_along_all_paths(made):
    """Where no feature turns on or off, what responds is what (I - A)⁻¹ says: a feature is scaled a little instead of
    taken out."""
    _, coders, graph = made
    local = graph.local
    early = [n for n in graph.nodes[: graph.counts[0]] if n.site == Site("mlp_out", 0)]
    source = max(early, key=lambda n: graph.influence[graph.number(n)])
    share, number = 1e-3, graph.number(source)
    by = share * graph.values[number] * coders[0].W_dec[source.feature].detach()

    def mlp(layer, x, read):
        found = local.responding_mlp(layer, read, [], {}).clone()
        if layer == 0:
            found[source.position] -= by
        return found

    base = local.run(lambda layer, x, read: local.responding_mlp(layer, read, [], {}))
    now = local.run(mlp)
    change = ((now[local.out] - base[local.out])[-1] @ graph.directions.T) / share
    found = graph.check(source, graph.targets[-graph.counts[3] :])
    assert found.total[0] == pytest.approx(change.numpy(), abs=2e-2 * float(change.abs().max()))
    assert abs(found.total[0] - found.predicted[0]).max() > 0.05 * abs(found.total[0]).max(), "paths, not only edges"


def test_free_is_the_model_itself(made):
    lm, coders, graph = made
    source = graph.top(1)[0].upstream
    found = graph.check(source, graph.targets[-1])
    if source.site.kind == "embed":
        what, site = graph.local.embed[source.position], source.site
    else:
        what, site = None, source.site
        x = lm.read(PROMPT, [coders[site.layer].site, site])
        made_of = coders[site.layer](x[coders[site.layer].site][0])
        if source.feature < 0:
            what = x[site][0, source.position] - made_of.x_hat[source.position].detach()
            what = what if source.position else x[site][0, 0]
        else:
            what = made_of.f[source.position, source.feature] * coders[site.layer].W_dec[source.feature].detach()

    def less(acts, tokens):
        acts = acts.clone()
        acts[0, source.position] -= what
        return acts

    batch = lm.tokenize(PROMPT)
    logits = [lm.run(batch, writes=writes)[1][0, -1] for writes in ([], [Write(site, less)])]
    change = logits[1] - logits[0]
    token = graph.targets[-1].feature
    assert found.free[0, 0] == pytest.approx(float(change[token] - change.mean()), rel=1e-3, abs=1e-4)


def test_a_group_is_taken_out_at_once(made):
    _, _, graph = made
    sources = list(dict.fromkeys(e.upstream for e in graph.top(6)))[:3]
    found = graph.check(sources, graph.targets[-2:])
    alone = sum(graph.check(s, graph.targets[-2:]).predicted for s in sources)
    assert found.predicted == pytest.approx(alone, rel=1e-5) and found.error < 1e-4
    assert "total" in found.to_pandas() and repr(sources[0]) in repr(found)


def test_codes_that_are_no_pre_activations_have_no_total(made):
    lm = made[0]
    coder = sl.Gated(48, 40, d_out=48).eval()
    coder.reads, coder.writes = (Site("mlp_in", 0),), (Site("mlp_out", 0),)
    with torch.no_grad():
        coder.r_mag.fill_(0.5)
    graph = trace(lm, [coder], PROMPT, features=5)
    found = graph.check(graph.nodes[0], graph.targets[-1])
    assert found.error < 1e-4 and bool(found.total[0] != found.total[0])


# ---- some of the features


def test_what_is_not_visited_is_told(made):
    lm, coders, whole = made
    graph = trace(lm, coders, PROMPT, features=40)
    assert graph.counts[0] == 40 and graph.active == whole.counts[0]
    assert graph.visited == pytest.approx(40 / graph.active)
    assert off_the_sum(graph) < 1e-5 and 0 < graph.left_out < 1
    gone = [i for i, n in enumerate(whole.nodes[: whole.counts[0]]) if n not in graph.nodes]
    for node in graph.targets:
        full, row = whole.effects[whole.row(node)], graph.row(node)
        assert float(graph.rest[row]) == pytest.approx(float(full[gone].sum()), abs=1e-5)
        assert float(graph.rest_size[row]) == pytest.approx(float(full[gone].abs().sum()), abs=1e-5)
        assert graph.effect(graph.nodes[0], node) == pytest.approx(whole.effect(graph.nodes[0], node), abs=1e-6)
    kept = torch.tensor([n in graph.nodes for n in whole.nodes[: whole.counts[0]]])
    influence = whole.influence[: whole.counts[0]]
    assert float(influence[kept].sum()) > 0.8 * float(influence.topk(40).values.sum()), "the most influential ones"


# ---- targets


def test_targets(made):
    lm, coders, graph = made
    chances = lm.logits(PROMPT)[0, -1].softmax(-1)
    assert graph.weights.tolist() == pytest.approx(chances.topk(10).values.tolist(), rel=1e-4), "at most 10"
    a, b = (lm.tokenizer(t)["input_ids"][0] for t in (" the", " sea"))
    v = torch.randn(48)
    some = trace(lm, coders, PROMPT, [" the", b, (" the", " sea"), v], features=5)
    assert some.counts[3] == 4 and some.weights.tolist()[2:] == [1.0, 1.0]
    assert some.outputs[2:] == [" the −  sea", "direction 3"]
    logits = lm.logits(PROMPT)[0, -1]
    centred = logits - logits.mean()
    expected = [float(centred[a]), float(centred[b]), float(logits[a] - logits[b])]
    assert some.pre[-4:-1].tolist() == pytest.approx(expected, abs=1e-3)
    assert torch.allclose(some.effects[-4] - some.effects[-3], some.effects[-2], atol=1e-4)
    assert some.targets[-1].feature >= lm.vocab_size
    assert some.check(some.nodes[0], some.targets[-1]).error < 1e-4


# ---- scores and pruning, by hand


def small():
    """Three features (0 and 1 in layer 0, 2 in layer 1), one error, one token, one logit."""
    effects = torch.tensor([
        [0.0, 0.0, 0.0, 0.0, 2.0],  # feature 0: from the token alone
        [0.0, 0.0, 0.0, 3.0, -1.0],  # feature 1: three quarters from the error
        [4.0, -1.0, 0.0, 0.0, 0.0],  # feature 2
        [0.0, 0.1, 0.8, 0.1, 0.0],  # the logit
    ])  # fmt: skip
    return effects, torch.tensor([1.0]), (3, 1, 1, 1)


def test_scores_by_hand():
    effects, weights, counts = small()
    found = scores(effects, torch.zeros(4), weights, counts)
    one = 0.1 + 0.8 * 0.2  # feature 1: by the logit, and through feature 2
    expected = [0.64, one, 0.8, 0.1 + 0.75 * one, 0.64 + 0.25 * one, 0.0]
    assert found["influence"].tolist() == pytest.approx(expected, abs=1e-6)
    token, error = expected[4], expected[3]
    assert found["replacement"] == pytest.approx(token / (token + error))
    inner = (0.64 + one * 0.25 + 0.8 + 1 * 0.9) / (0.64 + one + 0.8 + 1)
    assert found["completeness_inner"] == pytest.approx(inner)
    everything = (0.64 + one * 0.25 + 0.8 + 0.9 + error + token) / (0.64 + one + 0.8 + 1 + error + token)
    assert found["completeness"] == pytest.approx(everything)
    order = torch.tensor(expected).sort(descending=True)
    assert found["share"][order.indices[1]].item() == pytest.approx(sum(order.values[:2].tolist()) / sum(expected))
    rest = torch.tensor([2.0, 0.0, 0.0, 1.0])
    left_out = (0.64 * 0.5 + 0.5) / (0.64 + one + 0.8 + 1)
    assert scores(effects, rest, weights, counts)["left_out"] == pytest.approx(left_out)


def test_pruning_by_hand():
    effects, weights, counts = small()
    influence = scores(effects, torch.zeros(4), weights, counts)["influence"]  # .64 .26 .8 .295 .705 0
    # .8 of 2.7 is 2.16: features 2, the token and feature 0 make 2.145, the error is needed too.
    keep, edges = pruned(effects, influence, weights, counts, 0.8, 1.0)
    assert keep.tolist() == [True, False, True, True, True, True]
    assert edges.nonzero().tolist() == [[0, 4], [2, 0], [3, 2], [3, 3]]
    # .79 needs no error; then .98 of what is left keeps all three edges, each of the same size.
    keep, edges = pruned(effects, influence, weights, counts, 0.79, 0.98)
    assert keep.tolist() == [True, False, True, False, True, True]
    assert edges.nonzero().tolist() == [[0, 4], [2, 0], [3, 2]]
    # With .5 of the nodes feature 0 goes, then feature 2 has no edge in and goes too.
    keep, edges = pruned(effects, influence, weights, counts, 0.5, 1.0)
    assert keep.tolist() == [False, False, False, False, True, True] and not edges.any()


def test_a_pruned_graph_keeps_its_sums(made):
    _, _, graph = made
    little = graph.prune()
    assert 0 < little.counts[0] < graph.counts[0] and little.counts[2:] == graph.counts[2:]
    assert off_the_sum(little) < 1e-5 and float(little.rest_size.min()) >= 0
    assert little.replacement == graph.replacement and little.nodes[0] in graph.nodes
    edge = little.top(1)[0]
    assert graph.effect(edge.upstream, edge.downstream) == edge.effect and little.check(edge).error < 1e-4
    inputs = graph.top(3, into=edge.downstream)
    sizes = graph.effects[graph.row(edge.downstream)].abs().topk(3).values
    assert [abs(e.effect) for e in inputs] == pytest.approx(sizes.tolist())
    table = little.edges_to_pandas()
    assert len(table) == int(little.effects.count_nonzero()) and abs(table.effect[0]) == little.effects.abs().max()
    assert len(little.to_pandas()) == sum(little.counts) and "replacement" in repr(little)


# ---- files


def test_a_graph_comes_back_from_its_file(made, tmp_path):
    lm, coders, graph = made
    sl.notes(coders[0]).write(int(graph.nodes[0].feature), label="rivers")
    file = graph.save(tmp_path / "graph.safetensors")
    back = AttributionGraph.load(file)
    assert back.nodes == graph.nodes and torch.equal(back.effects, graph.effects) and repr(back) == repr(graph)
    assert back.name(graph.nodes[0]) == "rivers" == graph.name(graph.nodes[0])
    with pytest.raises(ValueError, match="this graph was read without one"):
        back.check(back.top(1)[0])
    edge = graph.top(1)[0]
    again = AttributionGraph.load(file, lm, coders).check(edge)
    assert again.frozen == pytest.approx(graph.check(edge).frozen)
    with pytest.raises(ValueError, match="give other activations than this graph has"):
        AttributionGraph.load(file, lm, transcoders(lm, seed=7))


def changed(file, change):
    """The file of a graph, its notes changed."""
    from sae_lab import files

    tensors, notes = files.read_tensors(file)
    note = json.loads(notes["sae_lab graph"])
    files.write_tensors(tensors, file, {"sae_lab graph": json.dumps(change(note))})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda note: note | {"version": 2}, "a graph of version 2, this sae_lab reads version 1"),
        (lambda note: note | {"counts": [1, 2, 3, 4]}, "contradicts itself"),
        (lambda note: note | {"tokens": ["a"]}, "contradicts itself"),
        (lambda note: {"version": 1}, "contradicts itself"),
    ],
)
def test_files_of_graphs_that_are_refused(made, tmp_path, change, words):
    file = made[2].prune().save(tmp_path / "graph.safetensors")
    changed(file, change)
    with pytest.raises(ValueError, match=words):
        AttributionGraph.load(file)


def test_other_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="holds no graph"):
        AttributionGraph.load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no graph"):
        AttributionGraph.load(tmp_path / "b.safetensors")


def test_neuronpedias_json(made, tmp_path):
    graph = made[2].prune()
    content = json.loads(graph.to_json(tmp_path / "graph.json", slug="river").read_text())
    assert content["metadata"]["slug"] == "river" and content["metadata"]["schema_version"] == 1
    assert content["metadata"]["prompt_tokens"] == list(graph.tokens) and content["metadata"]["node_threshold"] == 0.8
    assert len({n["node_id"] for n in content["nodes"]}) == len(content["nodes"]) == sum(graph.counts)
    by_id = {n["node_id"]: n for n in content["nodes"]}
    first = next(n for n in graph.nodes if n.site.layer and n.feature >= 0)
    layer, feature = first.site.layer, first.feature
    node = by_id[f"{layer}_{feature}_{first.position}"]
    assert node["feature"] == (layer + feature) * (layer + feature + 1) // 2 + feature and node["layer"] == str(layer)
    assert node["feature_type"] == "cross layer transcoder" and node["ctx_idx"] == first.position
    assert node["activation"] == pytest.approx(float(graph.values[graph.number(first)]))
    assert node["influence"] == pytest.approx(float(graph.share[graph.number(first)]))
    logits = [n for n in content["nodes"] if n["feature_type"] == "logit"]
    assert {n["layer"] for n in logits} == {"4"} and logits[0]["is_target_logit"]
    assert logits[0]["node_id"] == f"4_{graph.targets[-graph.counts[3]].feature}_{len(graph.tokens) - 1}"
    back = AttributionGraph.from_json(tmp_path / "graph.json")
    assert back.nodes == graph.nodes and back.outputs == graph.outputs
    assert torch.allclose(back.effects, graph.effects) and torch.allclose(back.weights, graph.weights)
    assert math.isnan(back.replacement) and back.top(1)[0] == graph.top(1)[0]
    again = AttributionGraph.from_json(back.to_json(tmp_path / "again.json"))
    assert again.nodes == graph.nodes and torch.equal(again.effects, back.effects)


def test_ids_that_clash_are_renumbered(made, tmp_path):
    """A feature of layer 0 whose number is a layer's, beside that layer's error at the same token."""
    lm, _, graph = made
    clashing = [n for n in graph.nodes if n.site == Site("mlp_out", 0) and 0 <= n.feature < lm.n_layers]
    assert clashing, "the random transcoders have one"
    content = json.loads(graph.to_json(tmp_path / "graph.json").read_text())
    ids = [n["node_id"] for n in content["nodes"]]
    assert len(ids) == len(set(ids))
    told = content["metadata"]["renumbered"]
    assert {f"0_{n.feature}_{n.position}" for n in clashing} == set(told) and set(told.values()) < set(ids)
    assert AttributionGraph.from_json(tmp_path / "graph.json").nodes == graph.nodes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["metadata"].update(schema_version=2), "a graph of schema 2, this sae_lab reads schema 1"),
        (lambda c: c.pop("metadata"), "no graph of Neuronpedia"),
        (lambda c: c["nodes"].pop(), "contradicts itself"),
        (lambda c: c["links"][0].update(weight="much"), "contradicts itself"),
        (lambda c: c["links"][0].update(source=c["nodes"][-1]["node_id"]), "contradicts itself"),
        (lambda c: c["nodes"][0].update(feature_type="attention"), "unknown type 'attention'"),
        (lambda c: c["nodes"][0].update(ctx_idx=99), "contradicts itself"),
    ],
)
def test_json_that_is_refused(made, tmp_path, change, words):
    file = made[2].prune().to_json(tmp_path / "graph.json")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        AttributionGraph.from_json(file)


# ---- refused


def foreign(lm):
    coders = transcoders(lm)
    coders[1].meta["model_fingerprint"] = "0123"
    return coders


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lm, c: trace(lm, c, [5]), "a prompt of at least two tokens, got one"),
        (lambda lm, c: trace(lm, c, ["a b", "c d"]), "a graph is of one prompt, got several"),
        (lambda lm, c: trace(lm, c, PROMPT, " Parisian rivers"), "a target is one token"),
        (lambda lm, c: trace(lm, c, PROMPT, 10**7), "a target's id must lie in"),
        (lambda lm, c: trace(lm, c, PROMPT, []), "at least one token, got none"),
        (lambda lm, c: trace(lm, c, PROMPT, [(5, 6, 7)]), "a difference of two tokens, got 3"),
        (lambda lm, c: trace(lm, c, PROMPT, torch.ones(7)), "d_model=48 finite numbers, got"),
        (lambda lm, c: trace(lm, c, PROMPT, [5.5]), "targets are tokens, pairs of tokens or directions, got 5.5"),
        (lambda lm, c: trace(lm, c, PROMPT, first="other"), "first must be 'keep' or 'drop', got 'other'"),
        (lambda lm, c: trace(lm, c, PROMPT, features=0), "features must be at least 1, got 0"),
        (lambda lm, c: trace(lm, [sl.TopK(48, 64, k=4)], PROMPT), "a set takes transcoders"),
        (lambda lm, c: trace(lm, foreign(lm), PROMPT), "the transcoder of layer 1 was trained on unknown"),
    ],
)
def test_what_is_refused(made, call, words):
    with pytest.raises(ValueError, match=words):
        call(*made[:2])


def test_coders_of_other_layers_widths_and_precision(make_tiny, made):
    lm, coders, _ = made
    far = transcoders(lm, [0])
    far[0].reads, far[0].writes = (Site("mlp_in", 9),), (Site("mlp_out", 9),)
    with pytest.raises(ValueError, match=r"a transcoder of layer 9, .* has layers 0 to 2"):
        trace(lm, sl.TranscoderSet(far), PROMPT)
    wide = sl.Transcoder(24, 32, k=2)
    wide.reads, wide.writes = (Site("mlp_in", 0),), (Site("mlp_out", 0),)
    with pytest.raises(ValueError, match="this coder reads width 24"):
        trace(lm, [wide], PROMPT)
    half = sl.LM(make_tiny("llama")._module.to(torch.bfloat16), tokenizer=lm.tokenizer)  # LM casts no loaded model
    with pytest.raises(ValueError, match=r"this model has torch.bfloat16: load it with dtype=torch.float32"):
        trace(half, coders, PROMPT)


@pytest.mark.parametrize("name", ["lfm2", "jamba", "recurrent_gemma"])
def test_a_model_in_which_something_else_lies_between(name):
    """Short convolutions, state spaces, recurrences: no name says so, the sums do."""
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    with pytest.raises(ValueError, match=r"the sum rule fails at \S+: its sources and biases add up to"):
        trace(lm, transcoders(lm), PROMPT[:12])


def test_nodes_that_are_refused(made):
    graph = made[2]
    with pytest.raises(ValueError, match="this graph has no node mlp_out-0@1/1000000"):
        graph.check(Node(Site("mlp_out", 0), 1, 10**6))
    with pytest.raises(ValueError, match="is a source alone"):
        graph.check(graph.nodes[0], graph.nodes[sum(graph.counts[:2])])
    with pytest.raises(ValueError, match="a logit adds to nothing"):
        graph.check(graph.targets[-1])
    dropped = trace(made[0], made[1], PROMPT, features=3, first="drop")
    with pytest.raises(ValueError, match="is no part of a graph made with first='drop'"):
        dropped.check(Node(Site("mlp_out", 1), 0, -1), dropped.targets[-1])
    with pytest.raises(ValueError, match="nodes must be a share of the influence from 0 to 1, got 80"):
        graph.prune(80)


def test_what_a_graph_will_cost(made):
    lm, coders, graph = made
    found = sl.estimate(trace, lm, coders, PROMPT)
    assert found.parts["active features"] == graph.active == found.parts["features visited"]
    assert found.ram >= 4 * graph.effects.numel() and found.parts["MB that the graph takes"] == pytest.approx(
        4e-6 * graph.effects.numel(), rel=0.01
    )
    assert 0 < found.minutes < 1 and found.disk == 0 and "features visited in" in found.probe
    assert sl.estimate(trace, lm, coders, PROMPT, features=10).parts["features visited"] == 10
    with pytest.raises(ValueError, match="a graph needs a prompt of at least two tokens"):
        sl.estimate(trace, lm, coders, lm.tokenize("").ids[0].tolist())
    with pytest.raises(ValueError, match=r"estimate knows sl\.harvest, .*, sl\.circuits\.trace, got attention"):
        sl.estimate(sl.circuits.attention, lm, PROMPT)
