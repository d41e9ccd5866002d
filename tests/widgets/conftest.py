"""A real feature index on a tiny model, for widgets that ask the model."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import sae_lab as sl
from sae_lab.types import Site

SITE = Site("resid_post", 1)


class Lab(NamedTuple):
    lm: sl.LM
    sae: sl.SparseCoder
    store: sl.Store
    folder: Path


@pytest.fixture(scope="session")
def lab(make_tiny, small_text, tmp_path_factory):
    """Model, a coder trained for some steps and saved, its store, a folder."""
    folder = tmp_path_factory.mktemp("lab")
    lm = make_tiny("llama")
    sl.harvest(lm, SITE, small_text, 1500, context=48, path=folder / "store")
    store = sl.Store(folder / "store")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    sae = sl.BatchTopK(48, 96, k=5)
    sl.train(sae, store, sl.TrainConfig(steps=60, batch_size=128, lr=3e-3))
    torch.set_num_threads(before)
    sae.save(folder / "sae")
    return Lab(lm, sae, store, folder)


@pytest.fixture
def real_index(lab, tmp_path):
    return sl.index_features(lab.sae, lab.lm, lab.store, path=tmp_path / "index")


class Screen:
    """The other end of a widget's messages: what it sends is kept, calls are made as the page makes them."""

    def __init__(self, panel, monkeypatch):
        self.panel, self.replies, self._next = panel, [], 0
        monkeypatch.setattr(panel, "send", lambda content, buffers=None: self.replies.append(content))

    def start(self, method, **args):
        self._next += 1
        self.panel._on_message(panel := self.panel, {"call": self._next, "method": method, "args": args}, [])
        assert panel is self.panel
        return self._next

    def cancel(self, number):
        self.panel._on_message(self.panel, {"cancel": number}, [])

    def of(self, number, *kinds):
        return [r for r in list(self.replies) if r["reply"] == number and r["kind"] in kinds]

    def call(self, method, timeout=20.0, **args):
        """(kind, value) of the end of a call."""
        return self.wait(self.start(method, **args), timeout)

    def wait(self, number, timeout=20.0):
        import time

        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if found := self.of(number, "done", "error", "cancelled"):
                return found[0]["kind"], found[0]["value"]
            time.sleep(0.005)
        raise AssertionError(f"no answer to call {number} within {timeout} s")


@pytest.fixture
def screen(monkeypatch):
    return lambda panel: Screen(panel, monkeypatch)
