"""Stores of networks that are no language models."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import sae_lab as sl
from tests.nets.networks import Looped, ViT, cases


@pytest.fixture
def vit():
    torch.manual_seed(7)
    return sl.Net(ViT())


IMAGES = torch.randn(90, 1, 8, 8, generator=torch.Generator().manual_seed(8))


def all_rows(store):
    return store.rows(np.arange(len(store)), store.site.key)


def test_its_rows_are_what_the_network_reads(vit, tmp_path):
    store = sl.harvest(vit, "blocks.0", IMAGES, tokens=10_000, path=tmp_path)
    assert len(store) == 90 * 17 and store.excluded == 0
    expected = vit.read(IMAGES, "blocks.0").reshape(-1, 12)
    torch.testing.assert_close(all_rows(store), expected, atol=2e-3, rtol=2e-3)  # a store keeps half precision
    where = np.array([0, 16, 17, 100])
    assert store.rows(where, "position").tolist() == [0, 16, 0, 15] == store.rows(where, "token").tolist()
    assert store.contexts(where).tolist() == [0, 0, 1, 5]


def test_a_mask_keeps_places_by_number(vit, tmp_path):
    store = sl.harvest(vit, "blocks.0", IMAGES, tokens=10_000, path=tmp_path, mask=vit.mask(keep=[0], places=17))
    assert len(store) == 90 and set(store.rows(np.arange(90), "position").tolist()) == {0}
    sae = sl.train(sl.TopK(12, 24, k=3), store, sl.TrainConfig(steps=5, batch_size=32)).coder.eval()
    sae.f_scale.fill_(1.0)
    moved = vit.read(IMAGES[:2], "blocks.0", [sl.Steer(sae, 0, 1.0)]) - vit.read(IMAGES[:2], "blocks.0")
    assert (moved.abs().amax(-1) > 0).nonzero().tolist() == [[0, 0], [1, 0]]  # an edit keeps to the coder's mask
    with pytest.raises(ValueError, match="keep names places from 0 to places - 1"):
        vit.mask(keep=[17], places=17)


def test_loaders_data_sets_and_lists_are_one(vit, tmp_path):
    labelled = TensorDataset(IMAGES, torch.arange(90))
    forms = [IMAGES, list(IMAGES), labelled, DataLoader(labelled, batch_size=7)]
    stores = [sl.harvest(vit, "blocks.1", data, tokens=10_000, path=tmp_path / str(i)) for i, data in enumerate(forms)]
    first = all_rows(stores[0])
    for store in stores[1:]:
        torch.testing.assert_close(all_rows(store), first, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="shuffles"):
        sl.harvest(vit, "blocks.1", DataLoader(labelled, shuffle=True), path=tmp_path / "s")


def test_items_of_many_lengths(tmp_path):
    """The thread that reads ahead looks at a new shape while a pass of another runs."""
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(4, 300), torch.nn.ReLU(), torch.nn.Linear(300, 5))
    net = sl.Net(module)
    items = [torch.randn(i, 4) for i in range(1, 141)]
    store = sl.harvest(net, "2", items, tokens=100_000, path=tmp_path)
    assert len(store) == sum(len(item) for item in items)
    torch.testing.assert_close(all_rows(store), module(torch.cat(items)).detach(), atol=2e-3, rtol=2e-3)


def test_the_same_call_opens_it_and_other_data_is_refused(vit, tmp_path):
    once = sl.harvest(vit, "blocks.0", IMAGES, tokens=500, path=tmp_path)
    again = sl.harvest(vit, "blocks.0", IMAGES, tokens=500, path=tmp_path)
    assert again.fingerprint == once.fingerprint
    changed = IMAGES.clone()
    changed[70, 0, 3, 3] += 1
    with pytest.raises(ValueError, match="holds another harvest; it differs in text_fingerprint"):
        sl.harvest(vit, "blocks.0", changed, tokens=500, path=tmp_path)


def test_visits_are_places_of_an_item(tmp_path):
    net, x = sl.Net(Looped()), torch.randn(30, 3, 5)
    store = sl.harvest(net, "cell", x, tokens=1000, path=tmp_path)
    torch.testing.assert_close(all_rows(store), net.read(x, "cell").reshape(-1, 6), atol=2e-3, rtol=2e-3)
    assert store.rows(np.arange(4), "position").tolist() == [0, 1, 2, 0]


def test_graphs_are_read_one_by_one(tmp_path):
    case = cases()["graph net"]
    net, g = sl.Net(case.module, case.axes), torch.Generator().manual_seed(2)
    graphs = [(torch.randn(n, 3, generator=g), torch.randint(0, n, (2, 2 * n), generator=g)) for n in (5, 6, 7)] * 4
    store = sl.harvest(net, "conv1", graphs, tokens=1000, path=tmp_path)
    expected = torch.cat([net.read(graph, "conv1")[0] for graph in graphs])
    torch.testing.assert_close(all_rows(store), expected, atol=2e-3, rtol=2e-3)


def test_sequences_of_unequal_length_are_items(tmp_path):
    net, g = sl.Net(cases()["LSTM"].module), torch.Generator().manual_seed(2)
    sequences = [torch.randn(n, 5, generator=g) for n in (4, 4, 6, 3, 6)]
    store = sl.harvest(net, "lstm", sequences, tokens=1000, path=tmp_path)
    expected = torch.cat([net.read(s[None], "lstm")[0] for s in sequences])
    torch.testing.assert_close(all_rows(store), expected, atol=2e-3, rtol=2e-3)


def test_codes_can_be_kept_in_place_of_activations(vit, tmp_path):
    store = sl.harvest(vit, "blocks.0", IMAGES, tokens=10_000, path=tmp_path / "x")
    sae = sl.train(sl.TopK(12, 24, k=3), store, sl.TrainConfig(steps=20, batch_size=64)).coder.eval()
    kept = sl.harvest(vit, sae.site, IMAGES, tokens=10_000, path=tmp_path / "z", coder=sae)
    x = vit.read(IMAGES, "blocks.0").reshape(-1, 12)
    torch.testing.assert_close(kept.codes(0, len(kept), 24).dense(), sae.encode(x), atol=1e-5, rtol=1e-4)


def test_a_pass_has_room_for_so_many_places(vit):
    from sae_lab.nets.inputs import PLACES, Inputs

    many = torch.zeros(600, 1, 8, 8)
    passes = [len(some) for some in vit.in_batches(Inputs(many, vit.accepts), [vit.site("blocks.0")])]
    assert passes == [PLACES // 17, PLACES // 17, 600 - 2 * (PLACES // 17)]
