"""Identities that notebooks/papers/writesae.ipynb rests on."""

import pytest
import torch

import sae_lab as sl

from .scripts import script


@pytest.fixture(scope="module")
def writesae():
    return script("writesae")


@pytest.fixture(scope="module")
def head(writesae):
    torch.manual_seed(0)
    model = writesae.Model().requires_grad_(False)
    return writesae.Head(model, 1, 0, torch.randint(0, len(writesae.ALPHABET), (4, 20)))


def stepwise(head, change=None, at=None):
    """o and S by the recurrence as it is written, with ``change`` added to the state after position ``at``."""
    state, reads, states = torch.zeros(len(head.q), head.q.shape[2], head.v.shape[2]), [], []
    for t in range(head.q.shape[1]):
        k, v, alpha, beta = head.k[:, t], head.v[:, t], head.log_alpha[:, t].exp(), head.beta[:, t]
        erase = torch.eye(k.shape[1]) - beta[:, None, None] * k[:, :, None] * k[:, None, :]
        state = alpha[:, None, None] * erase @ state + beta[:, None, None] * k[:, :, None] * v[:, None, :]
        if change is not None:
            state = torch.where((at == t)[:, None, None], state + change, state)
        states.append(state)
        reads.append((state.mT @ head.q[:, t, :, None])[..., 0])
    return torch.stack(reads, 1), torch.stack(states, 1)


def test_the_triangular_system_gives_the_states_of_the_recurrence(head):
    reads, states = stepwise(head)
    assert torch.allclose(head.states(), states, atol=1e-5)
    at = torch.tensor([3, 7, 0, 19])
    assert torch.allclose(head.state(at), states[torch.arange(4), at], atol=1e-5)
    assert torch.equal(head.write(at), head.writes()[torch.arange(4), at])
    assert torch.allclose((head.decay * (head.q @ head.k.mT)) @ head.u, reads, atol=1e-5)


def test_the_logits_are_those_of_the_model(head):
    assert torch.allclose(head.logits, head.model(head.ids), atol=1e-5)


def test_a_changed_state_spreads_as_in_the_recurrence(head):
    change, at = torch.randn(4, 16, 16), torch.tensor([3, 7, 0, 19])
    moved = stepwise(head, change, at)[0] - stepwise(head)[0]
    assert torch.allclose(head.propagate(change, at), moved, atol=1e-5)
    assert torch.equal(head.install(torch.zeros_like(change), at), head.logits)


def test_the_short_formula_is_exact_without_erasing_and_only_with_v_on_the_side_of_the_keys(head):
    v, w, at = torch.randn(4, 16), torch.randn(4, 16), torch.tensor([3, 7, 0, 15])
    exact = head.propagate(v[:, :, None] * w[:, None, :], at)
    beta, head.beta = head.beta, torch.zeros_like(head.beta)
    try:
        kept = head.propagate(v[:, :, None] * w[:, None, :], at)
    finally:
        head.beta = beta
    assert torch.allclose(head.formula(v, w, at), kept, atol=1e-5)
    assert not torch.allclose(head.formula(v, w, at), exact, atol=1e-2)  # with erasing it is an approximation
    assert not torch.allclose(head.formula(w, v, at), kept, atol=1e-2)


def test_in_the_last_layer_the_direct_path_lacks_only_the_mlp_and_the_norm(writesae):
    torch.manual_seed(0)
    model = writesae.Model().requires_grad_(False)
    for part in model.layers[-1].down.parameters():
        part.zero_()
    head = writesae.Head(model, writesae.LAST, 0, torch.randint(0, len(writesae.ALPHABET), (4, 20)))
    change, at = torch.randn(4, 16, 16), torch.tensor([3, 7, 0, 15])
    reads = head.propagate(change, at)
    rms = (head.mixed + reads @ head.W_o.T).pow(2).mean(-1, keepdim=True).sqrt()
    assert torch.allclose(head.install(change, at) * rms / head.rms - head.logits, head.direct(reads), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2])
def test_atoms_are_outer_products_and_stay_so(writesae, rank):
    coder = writesae.OuterTopK(6, 5, 12, 3, rank=rank)
    x = torch.randn(64, 6, 5)
    sl.train(coder, x.flatten(1), sl.TrainConfig(steps=3, batch_size=16))
    atoms = coder.W_dec.detach().view(-1, 6, 5)
    assert (torch.linalg.matrix_rank(atoms) == rank).all()
    assert torch.allclose(coder.v.norm(dim=-1), torch.ones(12, rank), atol=1e-5)
    pre = torch.einsum("irk,bkv,irv->bi", coder.v_enc, x - coder.b_dec.view(6, 5), coder.w_enc) + coder.b_enc
    assert torch.allclose(coder(x.flatten(1)).pre, pre, atol=1e-4)
    assert coder.config["rank"] == rank
