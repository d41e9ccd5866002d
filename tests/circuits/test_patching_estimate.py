"""Patching by one gradient against patches in truth; patches as they come; metrics; tokens side by side."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab import circuits
from sae_lab.types import Site, Write
from tests.conftest import ARCHITECTURES
from tests.edits.test_edit import OTHER, PROMPT

IOI = "When Mary and John went to the store, {} gave a drink to"


def metric_of(lm):
    return circuits.logit_difference(lm, " the", " sea")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_estimates_are_slopes(name, tiny):
    """A small step from each activation towards the source's moves the metric by the estimate times the step."""
    lm, metric = tiny[name], metric_of(tiny[name])
    grid = circuits.patching_estimate(lm, [PROMPT], [OTHER], metric)
    assert grid.estimated and grid.values.shape == (3, lm.n_layers, 9) and "estimated by gradient" in repr(grid)
    batch, step = lm.tokenize(PROMPT), 1e-2
    for i, j, p in ((0, 0, 2), (0, 2, 8), (1, 1, 8), (2, 0, 5), (2, 2, 8)):
        site, at = Site(grid.kinds[i], grid.layers[j]), grid.positions[p]
        given = lm.read(OTHER, site)[site][0, at]

        def moved(share, site=site, at=at, given=given):
            def write(x, tokens):
                x = x.clone()
                x[0, at] += share * (given - x[0, at])
                return x

            return float(metric(lm.run(batch, writes=[Write(site, write)])[1].float(), batch))

        slope = (moved(step) - moved(-step)) / (2 * step) / (grid.source - grid.base)
        assert float(grid.values[i, j, p]) == pytest.approx(slope, rel=0.03, abs=3e-3)
    assert float(grid.values[0, -1, :-1].abs().max()) == 0.0  # the last stream elsewhere decides nothing


def test_axes_are_those_of_patching(tiny_lm):
    true, estimate = (
        call(tiny_lm, [PROMPT], [OTHER], metric_of(tiny_lm), kinds=["mlp_out"], layers=[2, 0], positions=[4, 9])
        for call in (circuits.patching, circuits.patching_estimate)
    )
    assert estimate.values.shape == true.values.shape == (1, 2, 2)
    assert (estimate.base, estimate.source) == pytest.approx((true.base, true.source), abs=1e-4)
    assert (estimate.tokens, estimate.positions, estimate.layers) == (true.tokens, true.positions, true.layers)
    assert estimate.tokens[0] == (tiny_lm.tokens(PROMPT)[4].label, tiny_lm.tokens(OTHER)[4].label)


def test_many_prompts_give_the_mean_over_them(tiny_lm):
    lm, kinds = tiny_lm, ["attn_out"]
    pairs = [(PROMPT, OTHER, " the", " sea"), (OTHER, PROMPT, " sea", " the")]
    metric = circuits.logit_difference(lm, [" the", " sea"], [" sea", " the"])
    both = circuits.patching_estimate(lm, [PROMPT, OTHER], [OTHER, PROMPT], metric, kinds=kinds, layers=[1])
    alone = [
        circuits.patching_estimate(lm, [p], [s], circuits.logit_difference(lm, a, b), kinds=kinds, layers=[1])
        for p, s, a, b in pairs
    ]
    raw = [g.values * (g.source - g.base) for g in (both, *alone)]
    assert torch.allclose(raw[0], (raw[1] + raw[2]) / 2, atol=1e-4)


def test_cells_come_as_they_are_done(tiny_lm, monkeypatch):
    lm, metric = tiny_lm, metric_of(tiny_lm)
    whole = circuits.patching(lm, [PROMPT], [OTHER], metric)
    cells = [(kind, layer, p) for p in range(1, 10) for layer in range(lm.n_layers) for kind in whole.kinds]
    parts = list(circuits.patched_cells(lm, [PROMPT], [OTHER], metric, cells))
    assert [len(part) for part in parts] == [32, 32, 17], "cells of several layers and kinds share a pass"
    for (kind, layer, p), share in {k: v for part in parts for k, v in part.items()}.items():
        there = whole.values[whole.kinds.index(kind), layer, whole.positions.index(p)]
        assert share == pytest.approx(float(there), abs=1e-4)
    passes, run = [], lm.run
    monkeypatch.setattr(lm, "run", lambda *args, **kwargs: passes.append(1) or run(*args, **kwargs))
    coming = circuits.patched_cells(lm, [PROMPT], [OTHER], metric, cells)
    assert len(passes) == 2 and next(coming) and len(passes) == 4  # what is not asked for is not computed
    assert len(list(coming)) == 2 and len(passes) <= 8, "one pass of the source for the sites that are new"
    with pytest.raises(ValueError, match="position 10 is beyond"):
        circuits.patched_cells(lm, [PROMPT], [OTHER], metric, [("mlp_out", 1, 10)])


def test_cells_patched_together(tiny_lm):
    lm, metric = tiny_lm, metric_of(tiny_lm)
    together = partial(circuits.patched_together, lm, [PROMPT], [OTHER], metric)
    # The whole stream of a layer from the source is the source's run, whatever stands before.
    assert together([("resid_post", 0, p) for p in range(1, 10)]) == pytest.approx(1.0, abs=1e-4)
    whole = circuits.patching(lm, [PROMPT], [OTHER], metric)
    assert together([("mlp_out", 1, 3)]) == pytest.approx(float(whole.values[2, 1, 2]), abs=1e-4)
    column = [("attn_out", layer, 9) for layer in range(lm.n_layers)]
    sites, batch = [Site("attn_out", layer) for layer in range(lm.n_layers)], lm.tokenize(PROMPT)
    given = lm.read(OTHER, sites)

    def put(x, tokens, of):
        return torch.cat([x[:, :9], given[of][:, 9:]], dim=1)

    logits = lm.run(batch, writes=[Write(site, partial(put, of=site)) for site in sites])[1]
    true = (float(metric(logits.float(), batch)) - whole.base) / (whole.source - whole.base)
    assert together(column) == pytest.approx(true, abs=1e-4)
    assert together(column) != pytest.approx(float(whole.values[1, :, -1].sum()), abs=1e-2), "no sum of the cells' own"
    pairs = [PROMPT, OTHER], [OTHER, PROMPT]
    metrics = circuits.logit_difference(lm, [" the", " sea"], [" sea", " the"])
    two = circuits.patching(lm, *pairs, metrics, kinds=["mlp_out"], layers=[1], positions=[3])
    several = circuits.patched_together(lm, *pairs, metrics, [("mlp_out", 1, 3)])
    assert several == pytest.approx(float(two.values), abs=1e-4), "the mean over prompts"
    with pytest.raises(ValueError, match="needs at least one cell"):
        together([])
    with pytest.raises(ValueError, match="position 10 is beyond"):
        together([("mlp_out", 1, 10)])


CHATS: list[Any] = [[{"role": "user", "content": f"The {what} went home."}] for what in ("ship", "fox")]


def test_chats_are_patched_as_the_texts_that_their_template_makes(tiny_lm):
    lm, metric = tiny_lm, metric_of(tiny_lm)
    render = partial(lm.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    texts = [[render(chat)] for chat in CHATS]
    at = [("mlp_out", 1, 26)]
    calls: list[Any] = [
        circuits.patching_estimate,
        partial(circuits.patching, kinds=["mlp_out"], layers=[1], positions=[26]),
        partial(circuits.patched_together, cells=at),
    ]
    for call in calls:
        of_chats, of_texts = call(lm, CHATS[0], CHATS[1], metric), call(lm, *texts, metric)
        same = [getattr(found, "values", found) for found in (of_chats, of_texts)]
        same = [torch.as_tensor(found) for found in same]
        assert torch.allclose(*same, atol=1e-5) and bool(same[0].abs().max() > 0)
    assert circuits.aligned_tokens(lm, *CHATS) == circuits.aligned_tokens(lm, texts[0][0], texts[1][0])
    logits = lm.logits(CHATS[0])
    of_chat, of_text = (circuits.kl_from(lm, one)(logits, lm.tokenize(CHATS[0])) for one in (CHATS[1], texts[1][0]))
    assert torch.allclose(of_chat, of_text, atol=1e-5) and float(of_chat) > 0


def test_log_probability(tiny_lm):
    lm = tiny_lm
    ids = [lm.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (" the", " sea")]
    logs = lm.logits([PROMPT, "A red fox"]).log_softmax(-1)
    batch = lm.tokenize([PROMPT, "A red fox"])
    last = batch.mask.sum(1) - 1
    per_row = circuits.log_probability(lm, [" the", " sea"])(lm.logits(batch), batch)
    assert per_row.tolist() == pytest.approx([float(logs[i, last[i], ids[i]]) for i in range(2)], abs=1e-4)
    one = circuits.log_probability(lm, " sea")(lm.logits(batch), batch)
    assert one.tolist() == pytest.approx([float(logs[i, last[i], ids[1]]) for i in range(2)], abs=1e-4)


def test_kl_from_the_source(tiny_lm):
    lm = tiny_lm
    metric, batch = circuits.kl_from(lm, OTHER), lm.tokenize(PROMPT)
    p, q = (lm.logits(text)[0, -1].double().log_softmax(-1) for text in (OTHER, PROMPT))
    assert float(metric(lm.logits(PROMPT), batch)) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert float(metric(lm.logits(OTHER), lm.tokenize(OTHER))) == pytest.approx(0.0, abs=1e-5)
    grid = circuits.patching(lm, [PROMPT], [OTHER], metric, kinds=["resid_post"])
    assert float(grid.values[0, -1, -1]) == pytest.approx(1.0, abs=1e-3)  # the last stream is the source's prediction


def test_tokens_side_by_side(tiny_lm):
    pairs = circuits.aligned_tokens(tiny_lm, "The ship went to sea", "The big ship went home")
    assert pairs[1:] == [
        ("The", "The"), (None, " big"), (" ship", " ship"), (" went", " went"), (" to", " home"), (" sea", None),
    ]  # fmt: skip
    assert pairs[0][0] == pairs[0][1] == tiny_lm.tokens("x")[0].label
    assert circuits.aligned_tokens(tiny_lm, "", "") == pairs[:1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lm, m: circuits.patching_estimate(lm, [PROMPT], [PROMPT], m), "there is no difference to patch"),
        (lambda lm, m: circuits.patching(lm, [PROMPT], [PROMPT], m), "there is no difference to patch"),
        (lambda lm, m: circuits.patching_estimate(lm, [PROMPT], ["A red fox"], m), "prompt 0 has 10, source 0 has 4"),
        (
            lambda lm, m: circuits.patching_estimate(lm, [PROMPT], [OTHER], lambda out, _: (out[:, -1, 5] > 0) * 1.0),
            "differentiable in the logits, and this one is not",
        ),
        (lambda lm, m: circuits.patching_estimate(lm, [PROMPT], [OTHER], lambda o, _: o * 1.0), "one number for each"),
        (lambda lm, m: circuits.patching_estimate(lm, [PROMPT], [OTHER], m, positions=[10]), "position 10 is beyond"),
        (lambda lm, m: circuits.log_probability(lm, " the old"), "an answer is one token"),
    ],
)
def test_refused(call, words, tiny_lm):
    with pytest.raises(ValueError, match=words):
        call(tiny_lm, metric_of(tiny_lm))


def test_estimates_of_a_trained_model(lm):
    """The indirect object on the bundled model: estimates rank the cells as patches do; against another cell's, not."""
    prompt, source = IOI.format("Mary"), IOI.format("John")
    metric = circuits.logit_difference(lm, " Mary", " John")
    axes = {"layers": [4, 10, 16, 22, 28], "positions": [10, 12, 14]}
    true, estimate = (
        call(lm, [prompt], [source], metric, **axes).values.flatten().numpy()
        for call in (circuits.patching, circuits.patching_estimate)
    )
    agreement = np.corrcoef(true, estimate)[0, 1]
    shuffled = np.corrcoef(true, np.random.default_rng(0).permutation(estimate))[0, 1]
    print(f"pearson {agreement:.3f}, shuffled {shuffled:.3f}")
    assert agreement > 0.6 > abs(shuffled)


def test_plots(tiny_lm):
    grid = circuits.patching_estimate(tiny_lm, [PROMPT], [OTHER], metric_of(tiny_lm), positions=[2, 9])
    assert [axis.get_title() for axis in sl.plot(grid).axes if axis.images] == list(grid.kinds)
