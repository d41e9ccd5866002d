"""A mask that leaves out every token: what measures on tokens says so in words, and gives no figure of nothing."""

import pytest

import sae_lab as sl
from sae_lab.types import Site, TokenMask

SITE = Site("resid_post", 1)
TEXTS = ["The ship went down the river to the sea", "A red fox crossed the white field at dawn"] * 4
PAIRS = ["The red ship went down", "The red ship came back"], ["The old ship went down", "The old ship came back"]
CALLS = {
    "reconstruction": lambda lm, coder: sl.evals.reconstruction(coder, lm, TEXTS, tokens=60, context=16),
    "by_position": lambda lm, coder: sl.evals.by_position(coder, lm, TEXTS, tokens=60, context=8),
    "pathological_errors": lambda lm, coder: sl.evals.pathological_errors(coder, lm, TEXTS, tokens=60, context=16),
    "find_features": lambda lm, coder: sl.find_features(lm, coder, TEXTS[:4], TEXTS[4:]),
    "dose_response": lambda lm, coder: sl.dose_response(
        lm, coder, 0, TEXTS[0], " the", TEXTS[1], strengths=[0.0, 1.0], examples=(TEXTS[0], TEXTS[1])
    ),
    "attribution": lambda lm, coder: sl.circuits.attribution(lm, coder, *PAIRS, lambda logits, batch: logits[:, -1, 5]),
    "patched_directions": lambda lm, coder: sl.circuits.patched_directions(lm, coder, *(2 * side for side in PAIRS)),
    "feature_circuit": lambda lm, coder: sl.circuits.feature_circuit(
        lm, [coder], *PAIRS, lambda logits, batch: logits[:, -1, 5], steps=1, sizes=()
    ),
    "probing": lambda lm, coder: sl.evals.probing(coder, lm, (2 * TEXTS, 8 * [0, 1])),
    "harvest": lambda lm, coder: sl.harvest(lm, SITE, TEXTS, tokens=50, context=8, coder=coder),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("length", [False, True])
def test_every_token_left_out_is_an_error_in_words(call, length, tiny_lm):
    """By the norm at the site, and by special ids."""
    x = tiny_lm.read(TEXTS, SITE)
    coder = sl.TopK(48, 64, k=6)
    coder.calibrate([x[SITE][x.mask]])
    coder.reads = coder.writes = (SITE,)
    every = tuple(range(len(tiny_lm.tokenizer)))
    mask = TokenMask((), True, {SITE.key: 0.0}) if length else TokenMask(every, False)
    coder.meta = {"mask": mask.to_dict()}
    with pytest.raises(ValueError, match=r"leaves? out every (token|one of \d+)"):
        CALLS[call](tiny_lm, coder.eval())
    if call != "harvest":
        return
    coder.meta = {"mask": TokenMask((), True).to_dict()}  # the control
    assert len(CALLS[call](tiny_lm, coder)) == 50


def test_a_metric_that_differs_by_rounding_is_no_difference(tiny_lm):
    """Shares of 1.2e-7, a unit in the last place of 1, would be shares of noise."""
    red = tiny_lm.tokenizer(" red", add_special_tokens=False)["input_ids"][0]

    def metric(size):
        return lambda logits, batch: 1 + size * (batch.ids == red).any(1) + 0 * logits[:, -1, 5]

    with pytest.raises(ValueError, match="there is no difference to patch"):
        sl.circuits.patching(tiny_lm, *PAIRS, metric(1.2e-7), layers=[0])
    assert sl.circuits.patching(tiny_lm, *PAIRS, metric(1e-3), layers=[0]).source == pytest.approx(1)
