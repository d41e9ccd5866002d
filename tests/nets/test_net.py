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


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(7)
    return sl.Net(ViT())


@pytest.fixture(scope="module")
def images():
    return torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def coder(vit, images, tmp_path_factory):
    store = sl.harvest(vit, "blocks.0", images, tokens=2000, path=tmp_path_factory.mktemp("store"))
    return sl.train(sl.TopK(12, 24, k=3), store, sl.TrainConfig(steps=60, batch_size=256)).coder.eval()


def test_edits_change_the_places_they_name(vit, images, coder):
    x, before = images[:3], vit.read(images[:3], "blocks.0")
    live = int(coder.f_scale.argmax())
    after = vit.read(x, "blocks.0", [sl.Steer(coder, live, 2.0, positions=[0, 5], rows=[1])])
    moved = (after - before).abs().amax(-1) > 1e-6
    assert moved.nonzero().tolist() == [[1, 0], [1, 5]]
    step = 2.0 * coder.f_scale[live] * coder.W_dec[live]
    torch.testing.assert_close(after[1, 5] - before[1, 5], step)
    assert torch.equal(vit.output(x, [sl.Steer(coder, live, 0.0)]), vit.output(x))
    spliced = vit.read(x, "blocks.0", [sl.Splice(coder)])
    torch.testing.assert_close(spliced, coder(before.flatten(0, 1)).x_hat.reshape(before.shape))


def test_a_patch_takes_another_inputs_codes(vit, images, coder):
    x, source = images[:2], images[2:4]
    patched = vit.read(x, "blocks.0", [sl.Patch(coder, source, error="patch")])
    torch.testing.assert_close(patched, vit.read(source, "blocks.0"), atol=1e-5, rtol=1e-4)


def test_steps_name_passes_of_a_loop_and_visits(coder, vit, images):
    live = int(coder.f_scale.argmax())
    edit = sl.Steer(coder, live, 2.0, steps=[3])
    plain = vit.output(images[:2])
    assert torch.equal(vit.output(images[:2], edit, step=2), plain)
    assert not torch.equal(vit.output(images[:2], edit, step=3), plain)
    loop = sl.Net(Looped())
    x = torch.randn(4, 3, 5)
    vector = sl.Vector(torch.ones(6), loop.site("cell"), f_scale=1.0)
    before = loop.read(x, "cell")
    late = loop.read(x, "cell", [sl.Push(vector, 1.0, steps=[2])])
    assert torch.equal(late[:, :2], before[:, :2])
    torch.testing.assert_close(late[:, 2] - before[:, 2], vector.unit.expand(4, 6))
    named = sl.Vector(torch.ones(6), loop.site("cell@2"), f_scale=1.0)
    assert torch.equal(loop.read(x, "cell", [sl.Push(named, 1.0)]), late)
    placed = loop.read(x, "cell", [sl.Push(vector, 1.0, positions=[2])])  # with one place, a visit is a place
    assert torch.equal(placed, late)


def test_a_condition_is_read_at_every_place(vit, images, coder):
    live = int(coder.f_scale.argmax())
    codes = coder.encode(vit.read(images[:4], "blocks.0"))[..., live]
    level = 0.5
    before = vit.read(images[:4], "blocks.0")
    after = vit.read(images[:4], "blocks.0", [sl.Steer(coder, live, 1.0, when=(live, level, "token"))])
    moved = (after - before).abs().amax(-1) > 0
    assert torch.equal(moved, codes > level * coder.f_scale[live]) and moved.any() and not moved.all()


def test_the_gradient_is_autograds(vit, images):
    x = images[:3]
    site = vit.site("blocks.0")
    acts = vit.read(x, site)
    batch = vit._batch(x, site)  # what ``circuits.attribution`` gives it
    found = vit.gradient(batch, site, lambda out, places: out[:, 3], acts)
    leaf = acts.clone().requires_grad_()
    vit._module.blocks[1].zero_grad()
    h = vit._module.blocks[1](leaf)  # the rest of the network, by hand
    expected = torch.autograd.grad(vit._module.head(h[:, 0])[:, 3].sum(), leaf)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_attribution_agrees_with_patches(vit, images, coder):
    found = sl.circuits.attribution(
        vit, coder, images[:2], images[2:4], lambda out, places: out[:, 3], steps=20, check=40
    )
    agreed = found.agreement()
    assert agreed["nodes"] >= 40 and agreed["pearson"] > 0.95  # one patch of many is nearly linear here


def test_a_vector_is_a_difference_of_inputs(vit, images):
    bright, dark = images[:40] + 1.0, images[40:80] - 1.0
    vector = sl.Vector.difference(vit, "blocks.0", bright, dark, text=images)
    means = [vit.read(x, "blocks.0").mean((0, 1)) for x in (bright, dark)]
    torch.testing.assert_close(vector.direction, means[0] - means[1], atol=1e-5, rtol=1e-4)
    assert vector.f_scale > 0 and vector.model == "ViT"
    pushed = vit.read(images[:2], "blocks.0", [sl.Push(vector, 1.0)]) - vit.read(images[:2], "blocks.0")
    torch.testing.assert_close(pushed, (vector.f_scale * vector.unit).expand_as(pushed), atol=1e-5, rtol=1e-4)


BAD = {
    "no such module": (lambda net, x: net.read(x, "block.0"), "no module 'block.0'; did you mean blocks.0"),
    "no such visit": (lambda net, x: net.read(x, "blocks.0@2"), "names visit 2, and the module runs 1 time"),
    "no tensor": (lambda net, x: net.read(x, "blocks"), "gives no tensor of floating-point numbers"),
    "unequal inputs": (lambda net, x: net.read([x[0], x[0, :, :4]], "patch"), "must have one shape"),
    "text": (lambda net, x: net.read("a cat", "patch"), "inputs are a tensor"),
    "an iterator": (lambda net, x: sl.harvest(net, "patch", iter(x)), "read more than once"),
    "no data": (lambda net, x: sl.harvest(net, "patch", []), "is empty"),
    "other places": (lambda net, x: sl.harvest(net, ["blocks.0", "patch"], x), "as many places"),
    "a text's arguments": (lambda net, x: sl.harvest(net, "patch", x, context=64), "are for text"),
    "no width yet": (lambda net, x: sl.Net(ViT()).width("blocks.0"), "read inputs"),
    "wrong axes": (lambda net, x: sl.Net(ViT(), {"patch": "batch channel"}).read(x, "patch"), "must name each axis"),
    "axes of nothing": (lambda net, x: sl.Net(ViT(), {"path": "batch channel"}), "did you mean patch"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_right_is_refused(case, vit, images):
    call, said = BAD[case]
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        call(vit, images[:3])


def test_positions_by_text_and_beyond_are_refused(vit, images, coder):
    live = int(coder.f_scale.argmax())
    for positions, said in (("cat", "language model"), (17, "position 17 is beyond")):
        with pytest.raises(ValueError, match=said):
            vit.output(images[:2], [sl.Steer(coder, live, 1.0, positions=positions)])


class Mixing(torch.nn.Module):
    """A network in which the inputs of a batch see each other."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x - x.mean(0))


def test_a_batch_whose_inputs_mix_is_refused():
    with pytest.raises(ValueError, match="change each other's activations at 'inner'"):
        sl.Net(Mixing()).read(torch.randn(5, 4), "inner")
    steps_first = CASES["LSTM, steps first"]
    with pytest.raises(ValueError, match="change each other's activations at '0'"):
        sl.Net(steps_first.module).read(steps_first.x, "0")


def test_a_mapping_of_several_values_is_named():
    net, x = sl.Net(CASES["policy"].module), CASES["policy"].x
    with pytest.raises(ValueError, match="'heads' gives a mapping of logits, value: name one of them, heads@logits"):
        net.read(x, "heads")
    assert net.read(x, "heads@value").shape == (7, 1)


def test_a_graph_has_no_batch_unless_named():
    with pytest.raises(ValueError, match="axes="):
        sl.Net(GraphNet()).read(CASES["graph net"].x, "conv1")


def test_shapes_are_watched_once_for_inputs_of_a_form(vit, images, monkeypatch):
    from sae_lab.nets import shapes

    seen, watch = [], shapes.watch
    vit.read(images[:6], "blocks.0")
    monkeypatch.setattr(shapes, "watch", lambda *args: seen.append(1) or watch(*args))
    for _ in range(3):
        vit.read(images[:6], "blocks.0")
    assert not seen, "a pass with hooks costs as much as the read itself"
    vit.read(images[:7], "blocks.0")
    assert len(seen) == 1


class Turned(torch.nn.Module):
    """A tensor whose shape the module before and the module after would read in different ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.mid, self.linear = torch.nn.Conv2d(1, 6, 1), torch.nn.Identity(), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(self.mid(self.conv(x)))


def test_modules_that_disagree_on_the_channel_are_refused():
    x = torch.randn(2, 1, 6, 6)
    with pytest.raises(ValueError, match="which axis of 'mid' is the channel cannot be told"):
        sl.Net(Turned()).read(x, "mid")
    net = Turned()
    last, first = (
        sl.Net(net, axes={"mid": names}) for names in ("batch height width channel", "batch channel height width")
    )
    assert torch.equal(last.read(x, "mid"), first.read(x, "mid").permute(0, 3, 1, 2))


def test_what_a_net_is_not_for_says_so(vit, images, coder, tmp_path):
    with pytest.raises(ValueError, match="lm must be an LM, got a Net"):
        sl.Stream(vit, "blocks.0", images)
    with pytest.raises(ValueError, match="for language models alone"):
        sl.estimate(sl.harvest, vit, "blocks.0", images, path=tmp_path)
    with pytest.raises(ValueError, match=r"has none: use sl.Net\(module\)"):
        sl.LM(ViT())
