"""What holds by construction of adapters, latent scaling and sparse sums."""

import pytest
import torch

import sae_lab as sl

from .scripts import script


@pytest.fixture(scope="module")
def ft():
    return script("finetuned")


def small_adapter(ft, monkeypatch, lm, seed=0):
    monkeypatch.setattr(ft, "LAYERS", (0, 1))
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: linear.weight.shape for name, linear in ft.modules(lm).items()}
    return {
        name: (torch.randn(ft.RANK, into, generator=draw), torch.randn(out, ft.RANK, generator=draw))
        for name, (out, into) in shapes.items()
    }


def test_a_merge_changes_the_model_and_is_undone(ft, tiny_lm, monkeypatch):
    adapter = small_adapter(ft, monkeypatch, tiny_lm)
    before = tiny_lm.logits("abc")
    with ft.merged(tiny_lm, adapter):
        assert not torch.allclose(tiny_lm.logits("abc"), before, atol=1e-3)
    assert torch.equal(tiny_lm.logits("abc"), before)


def test_the_control_has_the_adapters_singular_values(ft, tiny_lm, monkeypatch):
    adapter = small_adapter(ft, monkeypatch, tiny_lm)
    for name, (a, b) in ft.turned(adapter, 7).items():
        own, other = (torch.linalg.svdvals(w)[: ft.RANK] for w in (adapter[name][1] @ adapter[name][0], b @ a))
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(b @ a, adapter[name][1] @ adapter[name][0], atol=1e-2)


def test_an_adapter_is_kept_in_half_precision(ft, tiny_lm, monkeypatch):
    adapter = small_adapter(ft, monkeypatch, tiny_lm)
    again = ft.unpacked({**ft.packed(adapter, 3), "3/direction": torch.ones(2)}, 3)
    assert again.keys() == adapter.keys()
    for name, pair in adapter.items():
        for one, other in zip(pair, again[name], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


def test_latent_scaling_tells_a_planted_new_latent_from_a_shared_one(ft):
    """Of two models whose streams are the crosscoder's own, exactly: what the base has of each latent is known."""
    coder = sl.Crosscoder(d_in=12, d_sae=6, layers=2, k=6).eval()
    rows = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(5))).Q[:6]
    with torch.no_grad():
        base = rows * torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 0.0])[:, None]  # 3: half as strong; 4 and 5: not there
        coder.W_dec.copy_(torch.cat([base, rows], 1))
        coder.W_enc.copy_(torch.cat([0 * rows, rows], 1).T)  # it reads the second model alone
        coder.b_enc.zero_()
        coder.b_dec.zero_()
        coder.threshold.fill_(0.0)
    f = torch.rand(400, 6, generator=torch.Generator().manual_seed(6)) * (torch.rand(400, 6) < 0.4)
    x = torch.stack([f @ base, f @ rows], 1)
    x[:, 0] += f[:, 5:] * rows[5]  # 5 is in the base model, which the crosscoder has missed
    found = ft.latent_scaling(coder, x)
    torch.testing.assert_close(found["errors"], torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 1.0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["norms"][:, 0], base.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_a_sparse_sum_finds_what_it_was_made_of(ft):
    rows = torch.randn(50, 40, generator=torch.Generator().manual_seed(8))
    vector = 2 * rows[3] - rows[17] + 0.5 * rows[30]
    torch.testing.assert_close(ft.sparse_sum(rows, vector, 12), vector, rtol=1e-3, atol=1e-3)
    assert (ft.sparse_sum(rows, torch.randn(40), 2) - vector).norm() > 1  # the control: other directions


def test_prompts_have_one_length(ft, tiny_lm):
    texts = ["word " * 100] * 5 + ["short"]
    ids = ft.prompts(tiny_lm, texts, 5, torch.Generator().manual_seed(0))
    assert len(ids) == 5 and (ids[:, 0] == tiny_lm.prefix_id).all()
    with pytest.raises(ValueError, match="6 prompts need as many documents"):
        ft.prompts(tiny_lm, texts, 6, torch.Generator().manual_seed(0))
