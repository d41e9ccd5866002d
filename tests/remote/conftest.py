"""One real server for all tests here, and models that are the same on both sides.

    server      the running Server of the bundled model and of a tiny random Llama
    far, near   the tiny model on the server, and here
    coders      by name, small coders of the tiny model at its second block
"""

import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import sae_lab as sl
from tests.remote.server import Server

TINY = "sae-lab/tiny-llama"
SITE = sl.Site("resid_post", 1)


@pytest.fixture(scope="session")
def server(tmp_path_factory, make_module, tokenizer):
    from huggingface_hub import constants, hf_api

    from sae_lab.lm import bundled

    folder = tmp_path_factory.mktemp("tiny")
    make_module("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    models = {bundled.HUB_ID: Path(bundled.folder()), TINY: folder}
    with Server(models) as running, pytest.MonkeyPatch.context() as patch:
        # The hub's address is read when its library is imported, which other tests may have done.
        files = running.hub + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", running.hub)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(hf_api.api, "endpoint", running.hub)
        patch.setenv("HF_ENDPOINT", running.hub)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        for name in [n for n in os.environ if n.startswith("NDIF_")]:
            patch.delenv(name)
        yield running
        family = [psutil.Process(p.pid) for p in running.running.values()]
        family += [child for p in family for child in p.children(recursive=True)]
        ports = running.port.values()
    assert not psutil.wait_procs(family, 10)[1]  # all ended
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr}
    assert not listening & set(ports)


@pytest.fixture(scope="session")
def far(server):
    return sl.LM(TINY, remote=server.url, deadline=150)


@pytest.fixture(scope="session")
def near(far, make_module):
    return sl.LM(make_module("llama", len(far.tokenizer)), tokenizer=far.tokenizer)


@pytest.fixture(scope="session")
def coders(near):
    x = near.read(PROMPTS, SITE)[SITE]
    x = x[near.tokenize(PROMPTS).mask]
    generator = torch.Generator().manual_seed(0)
    around = x.mean(0) + x.std(0) * torch.randn(4000, x.shape[1], generator=generator)
    made = {}
    for name, coder in {
        "topk": sl.TopK(x.shape[1], 96, k=8), "batchtopk": sl.BatchTopK(x.shape[1], 96, k=8, seed=1),
        "gated": sl.saes.Gated(x.shape[1], 96, seed=2), "switch": sl.saes.Switch(x.shape[1], 96, k=4, experts=4),
    }.items():  # fmt: skip
        coder.reads = coder.writes = (SITE,)
        coder.calibrate([around])
        made[name] = coder.eval()
    return made


PROMPTS = ["The fox ran over the hill", "A cat", "The dog sat on the mill and slept"]


def same(a, b, tolerance=1e-5):
    """Equal up to 1e-5 of the largest magnitude; NaN where the other is."""
    a, b = (torch.from_numpy(t.copy()) if isinstance(t, np.ndarray) else torch.as_tensor(t) for t in (a, b))
    a, b = a.float(), b.float()
    assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
    off = float((a - b).abs().nan_to_num().max())
    assert off <= tolerance * float(b.abs().nan_to_num().max()), off
