"""What the features of an attribution graph keep by themselves: both ends, a model made by hand, plain torch."""

import math

import pytest
import tiny_models
import torch

import sae_lab as sl
from sae_lab.circuits import AttributionGraph, trace
from tests.circuits.test_attribution_graphs import PROMPT, by_hand, made, transcoders  # noqa: F401 (fixtures)


@pytest.mark.parametrize(("name", "skip"), [("llama", True), ("gpt2", False), ("gemma2", True)])
def test_both_ends(name, skip):
    """All features and errors are the model; the curve's last point has all features of the graph."""
    lm = sl.LM(tiny_models.build(name), tokenizer=tiny_models.tokenizer(), device="cpu")
    graph = trace(lm, transcoders(lm, skip=skip), "The river")
    found = graph.faithfulness(sizes=[graph.counts[0]], draws=1)
    logits = lm.logits("The river")[0, -1].float()
    answers = graph.places[-graph.counts[3] :, 2]
    model = float(graph.weights @ (logits[answers] - logits.mean())) / float(graph.weights.sum())
    if name != "gemma2":  # whose capped logits are not what is attributed
        assert found.full == pytest.approx(model, rel=1e-4)
    assert found.complete == pytest.approx(found.full, rel=1e-5) and graph.counts[0] == graph.active
    assert found.circuit[-1] == pytest.approx(1.0, abs=1e-3)
    assert found.no_errors[-1] == pytest.approx(found.all_features)
    assert found.activation[-1] == pytest.approx(found.circuit[-1]) == pytest.approx(found.gradient[-1])
    dropped = graph.faithfulness(sizes=[4], errors=False, draws=1)
    assert dropped.circuit == dropped.no_errors and dropped.empty == found.empty


def test_the_circuit_by_hand(by_hand):  # noqa: F811
    """The one path from "A" to "X" has two features. With them the logit stands, up to what the others add to the last
    norm's divisor; with as many others it does not."""
    lm, coders, *_ = by_hand
    found = trace(lm, coders, "-AB", targets="X").faithfulness(sizes=[2, 5], draws=2)
    assert found.circuit[0] > 0.9 and found.gradient[0] == found.circuit[0] and found.circuit[1] == pytest.approx(1.0)
    assert abs(found.random[0]) < 0.1 and math.isnan(found.random[1]), "no five others are active"


def test_against_plain_torch(made):  # noqa: F811
    """The model with hooks on its MLPs: features outside are taken from what the MLP makes of its own input."""
    lm, coders, graph = made
    best = graph.influence[: graph.counts[0]].argsort(descending=True)[:16]
    kept = {tuple(place) for place in graph.places[best].tolist()}
    module = lm.module if hasattr(lm, "module") else lm._module
    handles = []

    def hook(layer):
        coder = coders[layer]

        def change(_module, args, out):
            x = args[0][0]
            codes = coder.encode(x)
            codes[0] = 0  # the mask leaves position 0 out
            gone = codes.clone()
            for _, position, feature in (place for place in kept if place[0] == layer):
                gone[position, feature] = 0
            return out - (gone @ coder.W_dec)[None]

        return change

    for layer, block in enumerate(module.model.layers):
        handles.append(block.mlp.register_forward_hook(hook(layer)))
    with torch.no_grad():
        logits = module(lm.tokenize(PROMPT).ids).logits[0, -1]
    for handle in handles:
        handle.remove()
    answers = graph.places[-graph.counts[3] :, 2]
    expected = float(graph.weights @ (logits[answers] - logits.mean())) / float(graph.weights.sum())
    found = graph.faithfulness(sizes=[16], draws=1)
    assert found.circuit[0] * (found.full - found.empty) + found.empty == pytest.approx(expected, rel=1e-4)


def test_bad_input(made, tmp_path):  # noqa: F811
    graph = made[2]
    with pytest.raises(ValueError, match=rf"sizes are numbers of features from 1 to {graph.counts[0]}, .* got 0"):
        graph.faithfulness(sizes=[0])
    with pytest.raises(ValueError, match="faithfulness runs the model, and this graph was read without one"):
        AttributionGraph.load(graph.save(tmp_path / "graph.safetensors")).faithfulness()
    table = graph.faithfulness(sizes=[4, 16], draws=1).to_pandas()
    assert list(table.columns) == ["nodes", "circuit", "no_errors", "random", "random_sd", "activation", "gradient"]
    assert table.nodes.tolist() == ["0", "4", "16", "all"]
