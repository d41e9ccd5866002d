"""sl.Net against plain hooks, on twelve networks of other kinds."""

import pytest
import torch
from torch import Tensor

import sae_lab as sl
from sae_lab.lm.passes import first_tensor
from tests.nets.networks import GraphNet, Looped, ViT, cases

CASES = cases()
EVERY = [(name, site) for name, case in CASES.items() for site in case.sites]


def hooked(case, site, change=None):
    """(what a plain hook sees at a site, the module's output), with ``change`` of the tensor if given."""
    path, *words = site.split("@")
    visit = next((int(w) for w in words if w.isdigit()), 0)
    part = next((w for w in words if not w.isdigit() and w != "input"), None)
    seen = []

    def see(value):
        x = first_tensor(value if part is None else value[part])
        seen.append(x.clone())
        if change is None or len(seen) - 1 != visit:
            return value
        new = change(x)
        return {**value, part: new} if part else new if isinstance(value, Tensor) else (new, *value[1:])

    module = case.module.get_submodule(path)
    if "input" in words:
        handle = module.register_forward_pre_hook(lambda _, args: (see(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: see(out))
    with handle, torch.no_grad():
        out = case.module(*(case.x if isinstance(case.x, tuple) else (case.x,)))
    return seen[visit], out


def by_rows(name, x):
    """A hook's tensor as ``net.read`` gives it."""
    if name == "graph net":
        return x[None]
    if name == "LSTM, steps first":
        return x.transpose(0, 1)
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


@pytest.mark.parametrize(("name", "site"), EVERY)
def test_a_site_is_what_a_hook_sees(name, site):
    case = CASES[name]
    net = sl.Net(case.module, case.axes)
    seen, out = hooked(case, site)
    assert torch.equal(net.read(case.x, site), by_rows(name, seen))
    assert net.width(site) == by_rows(name, seen).shape[-1]
    plain, ours = first_tensor(out), first_tensor(net.output(case.x))
    assert torch.equal(ours, plain)


class Flip:
    """An edit that reverses the channels of every place."""

    def __init__(self, site):
        self.site = site

    def writes(self, lm, batch, new=0):
        def flip(x, tokens):
            assert tokens.ids.shape == x.shape[:2]
            return x.flip(-1)

        return [sl.types.Write(self.site, flip)]


@pytest.mark.parametrize(("name", "site"), EVERY)
def test_an_edit_changes_what_a_hook_would(name, site):
    case = CASES[name]
    net = sl.Net(case.module, case.axes)

    _, expected = hooked(case, site, lambda x: x.flip(1 if x.dim() == 4 else -1))
    ours = net.output(case.x, [Flip(net.site(site))])
    for a, b in zip(*(o.values() if isinstance(o, dict) else [first_tensor(o)] for o in (ours, expected)), strict=True):
        assert torch.equal(a, b)
    changed = not torch.equal(first_tensor(ours), first_tensor(net.output(case.x)))
    assert changed or net.width(site) == 1 or site == "heads@value"
