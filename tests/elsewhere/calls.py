"""Every public call on a pretend accelerator. ``test_elsewhere.py`` runs this file in a process of its own, since the
device stays registered in a process.

Where a model and a coder stand is a placement: "both" there, the "coder" there, or the "model" there.
"""

import copy
from types import SimpleNamespace

import pytest
import test_invariance as figures
from test_invariance import lab, plain  # noqa: F401 (fixtures)

import sae_lab as sl
from elsewhere.pretend import DEVICE

PLACEMENTS = ("both", "coder", "model")
ROUNDING = 1e-5  # the sums are the CPU's, in the order that an accelerator's kernels would be asked for


class Placed(figures.Spelled):
    """A coder where a placement has it."""

    def again(self, coder):
        return placed(coder, self.kind, self.size)


def placed(coder, kind, size):
    one = figures.respelled(coder, "", size)
    made = copy.deepcopy(coder).eval()
    made = made if kind == "model" else made.to(DEVICE)
    return Placed(kind, made, one.place, one.unit, size, coder)


@pytest.fixture(scope="module")
def labs(lab, tmp_path_factory):  # noqa: F811
    """The lab of each placement, with a cache of its own: what was made on the CPU must not be opened there."""
    found = {}
    there = sl.LM(copy.deepcopy(lab.lm._module), tokenizer=lab.lm.tokenizer, device=DEVICE)
    for kind in PLACEMENTS:
        lm = lab.lm if kind == "coder" else there
        own = {"lm": lm, "indexes": {}, "folder": tmp_path_factory.mktemp(kind)}
        if kind != "model":
            own["x"] = lab.x.to(DEVICE)
        own["metric"] = sl.circuits.logit_difference(lm, " river", " king")
        found[kind] = SimpleNamespace(**vars(lab) | own)
    return found


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("name", figures.FIRST.values())
def test_the_figures_are_those_of_the_cpu(name, kind, lab, labs, plain, tmp_path, monkeypatch):  # noqa: F811
    expected = plain(name, lab.jump)
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path))
    found = figures.CASES[name](placed(lab.jump, kind, lab.size), labs[kind])
    assert not (off := figures.differences(expected, found, ROUNDING)), off[:5]
