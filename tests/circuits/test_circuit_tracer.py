"""Graphs beside circuit-tracer 0.5.0's: the same tiny models, transcoders and tokens. What it found was kept by
``benchmarks/tracer_fixture.py``, which runs in an environment of its own."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as tf
import yaml
from safetensors.torch import save_file

import sae_lab as sl
from sae_lab import files
from sae_lab.circuits import trace
from sae_lab.circuits.graph_scores import edge_scores, pruned

FILE = Path(__file__).with_name("circuit_tracer.safetensors")
NEAR = 1e-4  # of the largest effect, and of a threshold: float32 sums in two orders


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def both(request, tmp_path_factory):
    """(our graph, what circuit-tracer found, its settings)."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    tensors, notes = files.read_tensors(FILE)
    kept = {key.removeprefix(f"{name}/"): x for key, x in tensors.items() if key.startswith(f"{name}/")}
    facts = json.loads(notes[name])
    config = {"llama": tf.LlamaConfig, "gemma2": tf.Gemma2Config}[name](**facts["config"])
    module = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    part = lambda at: {k.removeprefix(at): x.float() for k, x in kept.items() if k.startswith(at)}  # noqa: E731
    module.load_state_dict(part("model/"))
    for layer in range(config.num_hidden_layers):  # circuit-tracer's own files, which our loader reads
        save_file(part(f"layer_{layer}/"), folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(facts["transcoders"]))
    lm = sl.LM(module.eval(), tokenizer=tiny_models.tokenizer(), device="cpu")
    return trace(lm, sl.TranscoderSet.load(folder), facts["ids"], first="drop"), kept, facts


def test_weights_are_away_from_what_would_hide_a_mistake(both):
    """Gains lie away from 1 (Gemma adds 1 to its own), biases away from 0."""
    _, kept, facts = both
    one = 0.0 if "final_logit_softcapping" in facts["config"] else 1.0
    gains = [x.float() - one for key, x in kept.items() if "norm" in key]
    biases = [x.float() for key, x in kept.items() if key.endswith(".bias") or key.rsplit("/", 1)[-1].startswith("b_")]
    layers = facts["config"]["num_hidden_layers"]
    assert len(gains) == (4 if one == 0 else 2) * layers + 1 and len(biases) >= 6 * layers
    assert min(float(x.abs().mean()) for x in gains + biases) > 0.1


def test_the_same_nodes(both):
    graph, kept, facts = both
    assert graph.places[: graph.counts[0]].tolist() == kept["features"].tolist()
    assert graph.facts["ids"] == facts["ids"]
    assert graph.places[-graph.counts[3] :, 2].tolist() == kept["logits"].tolist()
    assert torch.allclose(graph.weights, kept["weights"], atol=1e-5)
    assert torch.allclose(graph.values[: graph.counts[0]], kept["values"], rtol=1e-4, atol=1e-5)


def test_the_same_effects(both):
    graph, kept, _ = both
    effects = kept["effects"]
    assert graph.effects.shape == effects.shape
    assert float((graph.effects - effects).abs().max()) < NEAR * float(effects.abs().max())
    # The control: rows of another feature at the same place are no such match.
    assert float((graph.effects.roll(1, 0) - effects).abs().max()) > 0.1 * float(effects.abs().max())


def test_the_same_influence_and_scores(both):
    graph, kept, facts = both
    assert torch.allclose(graph.influence, kept["influence"], atol=NEAR * float(kept["influence"].max()))
    assert torch.allclose(graph.share, kept["share"], atol=NEAR)
    assert graph.replacement == pytest.approx(facts["scores"]["replacement"], abs=NEAR)
    assert graph.completeness == pytest.approx(facts["scores"]["completeness"], abs=NEAR)


def near(scores, share):
    """Which scores lie where the sum of the largest ones reaches this share, within 1e-4 of the whole."""
    ordered = scores.flatten().sort(descending=True)
    found = torch.zeros(scores.numel(), dtype=torch.bool)
    found[ordered.indices] = (ordered.values.cumsum(0) / ordered.values.sum() - share).abs() < NEAR
    return found.reshape(scores.shape)


def test_the_same_pruned_nodes_and_edges(both):
    """But those near a threshold: which of them stay is a matter of rounding."""
    graph, kept, facts = both
    nodes, edges = pruned(graph.effects, graph.influence, graph.weights, graph.counts, facts["nodes"], facts["edges"])
    theirs, linked = kept["nodes"].bool(), torch.zeros_like(edges)
    linked[tuple(kept["edges"].long().T)] = True
    assert 20 < int(theirs.sum()) < 0.5 * len(theirs) and 100 < int(linked.sum()) < 0.5 * linked.numel()
    features, inner, sources = graph.counts[0], sum(graph.counts[:2]), graph.effects.shape[1]
    first = graph.share - graph.influence / graph.influence.sum() < facts["nodes"]  # of which edges are then chosen
    first[inner:] = True
    left = graph.effects * torch.cat([first[:features], first[sources:]])[:, None] * first[:sources]
    close = near(edge_scores(left, graph.weights, features), facts["edges"])
    assert not bool(((edges != linked) & ~close).any())
    doubtful = near(graph.influence, facts["nodes"])
    doubtful[:sources] |= close.any(0)
    doubtful[:features] |= close[:features].any(1)
    assert not bool(((nodes != theirs) & ~doubtful).any())
    assert int(close.sum()) < 0.1 * int(linked.sum()), "few are left open"
