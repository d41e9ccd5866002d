"""Site spellings, the token mask, sparse codes."""

import numpy as np
import pytest
import torch

from sae_lab.types import KINDS, LAYER_KINDS, Batch, Codes, Output, Site, TokenBatch, TokenMask, as_sites

# Every spelling of one place, written out by hand.
SPELLINGS = [
    (Site("resid_post", 8), "blocks.8.hook_resid_post", "resid_post-8"),
    (Site("resid_pre", 0), "blocks.0.hook_resid_pre", "resid_pre-0"),
    (Site("resid_mid", 3), "blocks.3.hook_resid_mid", "resid_mid-3"),
    (Site("mlp_in", 3), "blocks.3.ln2.hook_normalized", "mlp_in-3"),
    (Site("mlp_out", 12), "blocks.12.hook_mlp_out", "mlp_out-12"),
    (Site("attn_z", 8), "blocks.8.attn.hook_z", "attn_z-8"),
    (Site("attn_out", 8), "blocks.8.hook_attn_out", "attn_out-8"),
    (Site("embed"), "hook_embed", "embed"),
]
PATHS = {
    "layers.8": Site("resid_post", 8),
    "model.layers.8": Site("resid_post", 8),
    "transformer.h.8": Site("resid_post", 8),
    "gpt_neox.layers.8": Site("resid_post", 8),
    "model.language_model.layers.8": Site("resid_post", 8),
    "blocks.8": Site("resid_post", 8),
    "model.layers.8.self_attn": Site("attn_out", 8),
    "transformer.h.8.attn": Site("attn_out", 8),
    "gpt_neox.layers.8.attention": Site("attn_out", 8),
    "model.layers.8.mlp": Site("mlp_out", 8),
}


@pytest.mark.parametrize(("site", "hook", "key"), SPELLINGS)
def test_spellings(site, hook, key):
    assert site.hook_name == hook and Site(hook) == site
    assert site.key == key and Site.of(key) == site
    assert Site.of(site) is site and Site.of(hook) == site
    assert eval(repr(site)) == site
    assert hash(Site(hook)) == hash(site)


@pytest.mark.parametrize(("path", "site"), PATHS.items())
def test_module_paths_of_blocks(path, site):
    assert Site(path) == site


def test_heads():
    site = Site("attn_z", 8, head=3)
    assert site == Site("blocks.8.attn.hook_z", head=3) == Site.of("attn_z-8-head3")
    assert site.key == "attn_z-8-head3" and repr(site) == "Site('attn_z', layer=8, head=3)"
    assert site.hook_name == "blocks.8.attn.hook_z"
    assert site != Site("attn_z", 8)


def test_other_modules():
    site = Site("model.layers.8.mlp.gate_proj")
    assert (site.kind, site.layer, site.path) == ("module", None, "model.layers.8.mlp.gate_proj")
    assert site.hook_name == site.key == "model.layers.8.mlp.gate_proj"
    assert Site.of(site.key) == site == eval(repr(site))


def test_keys_tell_all_sites_apart_and_suit_files():
    sites = [Site(k, layer) for k in LAYER_KINDS for layer in (1, 11)] + [Site("embed"), Site("attn_z", 1, head=1)]
    keys = {s.key for s in sites}
    assert len(keys) == len(sites)
    assert all(c.isalnum() or c in "-_." for key in keys for c in key)


def test_every_kind_has_a_spelling_of_its_own():
    sites = [Site(k, 2 if k in LAYER_KINDS else None) for k in KINDS]
    assert len({s.hook_name for s in sites}) == len(KINDS)
    assert [Site(s.hook_name) for s in sites] == sites


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("resid_post",), r"Site\('resid_post'\) needs a layer: write Site\('resid_post', layer=8\)"),
        (("embed", 0), "takes no layer"),
        (("resid_post", -1), "counts from 0, got -1"),
        (("resid_post", 8, 0), "head=0 needs kind 'attn_z'"),
        (("attn_z", 8, -1), "head=-1 needs kind 'attn_z' and counts from 0"),
        (("residual", 8), "unknown site kind 'residual'; kinds: embed, resid_pre, attn_z"),
        (("residual",), "unknown site 'residual'; kinds: "),
        (("",), "unknown site kind ''"),
        (("blocks.8.hook_resid_pos",), "known after 'blocks.N.': hook_resid_pre, attn.hook_z"),
        (("blocks.8.hook_mlp_in",), r"write Site\('resid_mid', layer=8\), or Site\('mlp_in', layer=8\)"),
        (("layers.8", None, 3), "head=3 needs kind 'attn_z'"),
        (("blocks.8.hook_resid_post", 8), "unknown site kind 'blocks.8.hook_resid_post'"),
    ],
)
def test_sites_that_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Site(*arguments)


def test_sites_are_frozen():
    with pytest.raises(AttributeError):
        Site("embed").layer = 3


def test_as_sites():
    assert as_sites("layers.8") == [Site("resid_post", 8)]
    assert as_sites(["layers.8", Site("resid_post", 8), "hook_embed"]) == [Site("resid_post", 8), Site("embed")]
    with pytest.raises(ValueError, match="no site given: pass at least one"):
        as_sites([])


# ---- token masks

IDS = torch.tensor([[7, 1, 2, 3], [0, 4, 7, 5]])
POSITIONS = torch.arange(4).expand(2, 4)


def test_the_mask_leaves_out_specials_and_the_first():
    assert TokenMask((7, 0)).keep(IDS, POSITIONS).tolist() == [[False, True, True, True], [False, True, False, True]]
    assert TokenMask((7,), skip_first=False).keep(IDS, POSITIONS).tolist() == [[False, True, True, True], [True, True, False, True]]  # fmt: skip  # noqa: E501
    assert TokenMask().keep(IDS, POSITIONS)[:, 1:].all()


def test_one_sites_norm_leaves_a_token_out_at_all():
    a, b = Site("resid_post", 0), Site("resid_post", 1)
    x, y = torch.ones(2, 4, 9), torch.ones(2, 4, 4)  # norms 3 and 2
    x[0, 1] *= 2
    y[1, 3] *= 3
    mask = TokenMask(skip_first=False, max_norm={a.key: 3.0, b.key: 5.0})
    expected = torch.ones(2, 4, dtype=torch.bool)
    expected[0, 1] = expected[1, 3] = False
    assert torch.equal(mask.keep(IDS, POSITIONS, {a: x, b: y}), expected)
    assert mask.keep(IDS, POSITIONS, {Site("embed"): 100 * x}).all(), "no limit is known there"


def test_masks_travel():
    mask = TokenMask((2, 5), False, {"resid_post-8": 512.5})
    assert TokenMask.from_dict(mask.to_dict()) == mask
    assert str(mask) == "left out: 2 special ids, norm > 512.5 at resid_post-8"
    assert str(TokenMask(skip_first=False)) == "left out: nothing"


def test_role_masks_are_as_wide_as_the_batch():
    ids = torch.tensor([[5, 6, 7], [5, 0, 0]])
    batch = TokenBatch(ids, ids > 0, torch.arange(3).expand(2, 3), [["user", "template", "user"], ["user"]])
    assert batch.role_mask("user").tolist() == [[True, False, True], [True, False, False]]
    assert not batch.role_mask("tool").any()


# ---- codes


def codes():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    return Codes(values, torch.tensor([4, 0, 1]), torch.tensor([0, 2, 2, 3]), 5)


def test_codes_dense():
    c = codes()
    assert c.rows.tolist() == [0, 0, 2]
    assert c.dense().tolist() == [[2, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 3, 0, 0, 0]]
    (c.dense() * torch.arange(15.0).view(3, 5)).sum().backward()
    assert c.values.grad.tolist() == [4, 0, 11]


def test_outputs_show_dense_codes_of_the_inputs_shape():
    c = codes()
    assert torch.equal(Output(torch.zeros(3, 2), c, torch.zeros(3, 5)).f, c.dense())
    assert Output(torch.zeros(1, 3, 2), c, torch.zeros(3, 5)).f.shape == (1, 3, 5)
    dense = torch.rand(3, 5)
    assert torch.equal(Output(torch.zeros(3, 2), dense, dense).f, dense)


def test_batches_default_to_no_tokens():
    x = torch.zeros(2, 3)
    batch = Batch(x, x)
    assert batch.target is x and batch.tokens is None and np.shape(batch.x) == (2, 3)
