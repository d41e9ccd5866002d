"""The coders that come with the library: they load by name, belong to the bundled model, and are as good as their cards
say."""

import time

import pytest
import torch

import sae_lab as sl
from sae_lab.lm.text import mix_sources
from sae_lab.saes.io.ours import SHIPPED, shipped

NAMES = [f"smollm2-135m/{name}" for name in ("attn_z-8", "resid_post-16", "resid_post-8", "transcoder-8")]
SET = "smollm2-135m/transcoders"
MOST, MOST_SET = 5.7e6, 24e6  # bytes in the package, of a coder and of the set


def test_which_there_are():
    assert shipped() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_coder_loads_by_name(name):
    coder = sl.load(name)
    card = coder.meta["card"]
    assert coder.W_enc.dtype == torch.float32 and not coder.training and coder.in_raw_units
    assert sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) <= MOST
    assert card["tokens"] >= 2_000_000 and card["family"] == type(coder).__name__
    assert set(card["held_out"]) == {"encyclopedia", "news", "reviews"}
    assert bool((coder.f_scale > 0).float().mean() > 0.9) and coder.mask is not None
    rank = coder.config["k"]
    for domain, figures in card["held_out"].items():
        assert abs(figures["l0"] / rank - 1) < 0.25, f"{domain}: the threshold was fitted on other text, but not so far"
        assert figures["fvu"] < figures["pca_fvu"], f"{domain}: no better than PCA of rank {rank}"
        if figures["ce_delta_mean_ablation"] > 0.1:  # below, nothing at the site matters to the loss
            assert 0 < figures["ce_delta"] < figures["pca_ce_delta"], f"{domain}: no better than PCA of rank {rank}"
            assert figures["ce_recovered"] > 0.7, domain
        else:
            assert figures["ce_recovered"] is None, f"{domain}: a share of next to nothing"


def test_the_card_is_what_is_measured(lm):
    """On a quarter of the card's tokens, so within what documents differ by."""
    coder = sl.load("smollm2-135m/resid_post-8")
    assert coder.meta["model_fingerprint"] == lm.fingerprint()
    unseen = set(sl.load_text("mix").held_out)
    text = [document for document in mix_sources()["wikipedia"] if document in unseen]
    found = sl.evals.reconstruction(coder, lm, text, tokens=2048)
    said = coder.meta["card"]["held_out"]["encyclopedia"]
    assert found.fvu == pytest.approx(said["fvu"], rel=0.15)
    assert found.ce_delta == pytest.approx(said["ce_delta"], abs=0.1)


def test_a_shipped_coder_serves_a_prompt(lm):
    coder = sl.load("smollm2-135m/resid_post-8")
    table = sl.features(lm, coder, "The orchestra played a symphony.")
    assert len(table.feature) > 0
    plain = lm.logits("I went to the")
    steered = lm.logits("I went to the", edits=[sl.Steer(coder, int(table.feature[0]), strength=2)])
    assert not torch.equal(plain, steered)


def test_the_set_has_a_transcoder_for_every_layer(lm):
    coders = sl.TranscoderSet.load(SET)
    assert coders.layers == list(range(lm.n_layers))
    assert sum(file.stat().st_size for file in (SHIPPED / SET).rglob("*") if file.is_file()) <= MOST_SET
    assert {coder.meta["model_fingerprint"] for coder in coders} == {lm.fingerprint()}
    one = sl.load(f"{SET}/layer_8")
    assert one.path == coders[8].path == f"{SET}/layer_8", "a session names it so on any machine"
    assert torch.equal(one.W_dec, coders[8].W_dec) and one.is_saved
    assert sl.load(SET, "layer_8").path == one.path


def test_the_cards_of_the_set_are_what_is_measured(lm):
    """On other documents and fewer tokens than the cards', so within a fifth of them in the mean over layers."""
    coders = sl.TranscoderSet.load(SET)
    found = coders.check(lm.read([document[:600] for document in sl.load_text("mix").held_out[-16:]], coders.sites))
    for figure in ("fvu", "l0"):
        said = torch.tensor([coder.meta["card"]["held_out"]["mix"][figure] for coder in coders])
        measured = torch.tensor([found[layer][figure] for layer in coders.layers])
        assert float(measured.mean() / said.mean()) == pytest.approx(1, abs=0.2)
    assert all(row["fvu"] < 1 for row in found.values()), "worse than the mean"


def test_unknown_names_tell_what_there_is():
    with pytest.raises(ValueError, match=r"no set .* comes with the library: it has smollm2-135m/transcoders"):
        sl.TranscoderSet.load("smollm2-135m/transcoder")
    with pytest.raises(ValueError, match=r"no coder in .*transcoders: .* pass id=, \['layer_0', "):
        sl.load(SET)
    with pytest.raises(ValueError, match=r"one that comes with the library: smollm2-135m/attn_z-8, smollm2-135m/"):
        sl.load("/nowhere/resid_post-9")
    for name in ("smollm2-135m/../smollm2-135m/resid_post-8", "smollm2-135m/transcoders/../resid_post-8"):
        with pytest.raises(ValueError, match="no coder at"):  # no name leads out of its folder
            sl.load(name)
    begun = time.monotonic()
    for name in ("smollm2-135m/resid_post-9", "smolm2-135m/resid_post-8"):
        with pytest.raises(ValueError, match=r"names like it: smollm2-135m/resid_post-8, "):
            sl.load(name)
    assert time.monotonic() - begun < 2, "no hub is asked for what is hardly a repository's name"
