"""Identities that notebooks/papers/vision_features.ipynb rests on."""

import pytest
import torch

import sae_lab as sl

from .scripts import script


@pytest.fixture(scope="module")
def vision():
    return script("vision")


@pytest.fixture(scope="module")
def model(vision):
    return vision.ViT(0).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_tail_is_the_network(vision, model, images):
    x = sl.Net(model).read(images, vision.SITE)
    assert x.shape == (5, 1 + vision.PATCHES, vision.WIDTH)
    torch.testing.assert_close(vision.tail(model, x), model(images))


def test_a_clamp_moves_the_class_token_alone(vision, model, images):
    net = sl.Net(model)
    x = net.read(images, vision.SITE)
    coder = vision.placed(vision.new_coder(0, "class"), "class").requires_grad_(False).eval()
    coder.f_scale.fill_(2.0)
    codes = coder.encode(x[:, 0])
    moved = x.clone()
    moved[:, 0] += (3.0 - codes[:, [7]]) * coder.W_dec[7]
    clamped = net.output(images, edits=[sl.Clamp(coder, 7, value=1.5)])
    torch.testing.assert_close(clamped, vision.tail(model, moved), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(clamped, model(images), atol=1e-3)


def test_a_patch_moves_its_own_place_alone(vision, model, images):
    """Pixel (row, column) belongs to patch 4·(row // 2) + column // 2, behind the class token."""
    net, at = sl.Net(model), "blocks.0@input"
    for row, column in ((0, 0), (3, 6), (7, 1)):
        changed = images.clone()
        changed[:, row, column] += 1
        moved = (net.read(changed, at) != net.read(images, at)).any(2).any(0).nonzero().flatten().tolist()
        assert moved == [1 + 4 * (row // 2) + column // 2]


def test_focus(vision):
    one, all_alike, rare = torch.zeros(3, 12, 16)
    one[:, 3], all_alike[:] = 2.0, 0.7
    rare[:2, 0] = 1.0
    one[6:] = 0.0  # images on which a feature is silent do not count
    found = vision.focus(torch.stack([one, all_alike, rare], 2), least=3)
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 16, float("nan")]), equal_nan=True)
