"""What notebooks/papers/images_as_functions.ipynb takes for granted: areas, ranks, PSNR, edits that stay in place."""

import pytest
import torch

import sae_lab as sl

from .scripts import script

made = script("images_as_functions")


def test_areas_by_hand():
    side = 20
    z = torch.zeros(side * side, 4)
    z[:, 0] = 1  # everywhere
    z[210, 1] = 5  # one pixel
    z.reshape(side, side, 4)[5:15, 5:15, 2] = 1  # a square of half the side
    z[0, 3] = z[-1, 3] = 1  # two opposite corners: farther apart than all places on average
    assert made.areas(z, side)[:2].tolist() == pytest.approx([1, 0], abs=1e-5)
    assert float(made.areas(z, side)[2]) == pytest.approx(0.25, abs=0.01) and made.areas(z, side)[3] > 2
    assert made.areas(3 * z, side).tolist() == pytest.approx(made.areas(z, side).tolist())
    assert made.areas(torch.zeros(4, 1), 2).isnan().all()


def test_stable_rank_counts_equal_directions():
    assert made.stable_rank(torch.eye(5)) == pytest.approx(5)
    assert made.stable_rank(torch.ones(4, 3)) == pytest.approx(1)
    assert made.stable_rank(torch.diag(torch.tensor([2.0, 1, 1]))) == pytest.approx(1.5)


def test_psnr_of_a_known_error():
    true = torch.zeros(100, 2)
    assert made.psnr(true + torch.tensor([0.2, 0.02]), true).tolist() == pytest.approx([20, 40], abs=1e-3)


def test_images_are_pieces_of_halves_that_do_not_meet():
    first, new = made.images(100), made.images(100, new=True)
    assert first.shape == new.shape == (made.SIDE**2, made.IMAGES) and first.abs().max() <= 1
    assert not torch.equal(first, made.images(101)) and torch.equal(first, made.images(100))
    assert first.std(0).min() > 0.02


def test_what_is_frozen_stays_and_the_rest_learns():
    model = made.Images("SIREN", 100)
    before = [layer.linear.weight.clone() for layer in model.layers]
    made.fit(model, made.images(100), steps=2, frozen=2)
    same = [torch.equal(old, layer.linear.weight) for old, layer in zip(before, model.layers, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("kind", made.KINDS)
def test_an_edit_changes_only_pixels_where_its_feature_fires(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(made, "DATA", tmp_path)
    models = {k: made.Images(k, 100).requires_grad_(False).eval() for k in made.KINDS}
    coders = {f"{k}-{layer}": sl.TopK(made.WIDTH, made.FEATURES, k=made.K) for k in made.KINDS for layer in made.READ}
    made.save(tmp_path / "1.safetensors", models, coders, {"moved SIREN": torch.ones(5)})
    again, kept, told = made.load(1)
    net, coder = sl.Net(again[kind]), kept[kind, 1]
    assert told["moved SIREN"].tolist() == [1] * 5
    assert torch.allclose(coder.W_dec, coders[f"{kind}-1"].W_dec, atol=1e-2)
    z = coder.codes_of(net.read(made.grid(), "layers.1")[0]).dense()
    feature = int((z > 0).sum(0).sub(40).abs().argmin())
    for own in (coder, made.turned(coder, 0)):
        moved = (net.output(made.grid(), edits=[sl.Ablate(own, feature)]) - net.output(made.grid()))[0].abs().amax(1)
        assert (moved[z[:, feature] == 0] < 1e-5).all() and (moved[z[:, feature] > 0] > 0).any()
    assert torch.allclose(made.turned(coder, 0).W_dec.norm(dim=1), coder.W_dec.norm(dim=1), atol=1e-5)
