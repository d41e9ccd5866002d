"""What notebooks/papers/unlearning.ipynb takes for granted: sampling, the contrastive loss, reading of all steps."""

import torch

import sae_lab as sl

from .scripts import script

made = script("unlearning")


def test_sampling_finds_the_image_that_the_noise_is_told_of():
    image = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def exact(x, level, digit, step):
        kept = made.KEPT[level][:, None]
        return (x - kept.sqrt() * image) / (1 - kept).sqrt()

    torch.testing.assert_close(made.sample(exact, made.told([1, 2, 3], 1), 5), image, atol=1e-3, rtol=0)


def test_the_contrast_is_least_where_a_digit_is_one_direction():
    digit = made.told([0, 1, 2], 4)
    apart = torch.eye(5)[digit] + 0.01
    mixed = torch.eye(5)[made.told([0, 1, 2, 3], 3)] + 0.01
    assert made.contrast(apart, digit) < made.contrast(mixed, digit)
    twice = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # The pair sees itself beside one other image, the third image has none of its digit.
    expected = torch.log1p(torch.exp(torch.tensor(-1 / made.TEMPERATURE)))
    torch.testing.assert_close(made.contrast(twice, torch.tensor([0, 0, 1])), expected)


def test_activations_of_all_steps_are_those_of_a_hook():
    model = made.Denoiser(0).requires_grad_(False).eval()
    rows, digit = [], made.told([4, 5], 2)
    handle = model.layers[1].register_forward_hook(lambda _, __, out: rows.append(out.clone()))
    made.sample(lambda x, level, asked, _: model(x, level, asked), digit, 3)
    handle.remove()
    found = made.seen(sl.Net(model), digit, 3)
    assert found.shape == (4, made.STEPS, made.WIDTH)
    torch.testing.assert_close(found, torch.stack(rows, 1))
