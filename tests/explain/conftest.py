"""An index whose features are known: each fires on one token, and nowhere else."""

import shutil

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.feature_index import FeatureIndex, index_features
from sae_lab.types import Site

SITE = Site("embed")
TOKENS = 12


@pytest.fixture(scope="session")
def token_store(make_tiny, small_text, tmp_path_factory):
    lm = make_tiny("llama")
    return lm, sl.harvest(lm, SITE, small_text, 4000, context=64, path=tmp_path_factory.mktemp("explain") / "store")


@pytest.fixture(scope="session")
def token_coder(token_store):
    """Feature i fires on the i-th most common token: its embedding is W_enc[:, i], and b_enc lets no other through.
    The last feature fires on nothing."""
    lm, store = token_store
    ids, counts = np.unique(store.rows(np.arange(len(store)), "token").numpy(), return_counts=True)
    common = ids[np.argsort(-counts, kind="stable")][:TOKENS]
    coder = sl.TopK(lm.width(SITE), TOKENS + 1, k=TOKENS)
    embedding = lm.embedding(torch.from_numpy(common)).float()
    with torch.no_grad():
        coder.W_enc[:, :TOKENS] = embedding.T
        coder.b_enc[:TOKENS] = -0.9 * embedding.pow(2).sum(1)
        coder.b_enc[TOKENS] = -1e6
    coder.eval()
    return coder, [lm.tokenizer.decode([i]) for i in common]


@pytest.fixture(scope="session")
def token_words(token_coder):
    """The token of each feature."""
    return token_coder[1]


@pytest.fixture(scope="session")
def built(token_store, token_coder, tmp_path_factory):
    lm, store = token_store
    return index_features(token_coder[0], lm, store, path=tmp_path_factory.mktemp("explain") / "index")


@pytest.fixture
def token_index(built, tmp_path_factory) -> FeatureIndex:
    """A copy for each test, so that one sees nothing of what another wrote."""
    folder = shutil.copytree(built.path, tmp_path_factory.mktemp("explain") / "index")
    return FeatureIndex(folder, built.store, built.lm, built.coder)
