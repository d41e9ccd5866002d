"""An index of a network's store, and how its items look in panels and pages."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import sae_lab as sl
from sae_lab.feature_index import drawing
from tests.nets.networks import ViT, cases

IMAGES = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(4))


def indexed(net, site, data, folder, width):
    store = sl.harvest(net, site, data, tokens=100_000, path=folder / "store")
    sae = sl.train(sl.TopK(width, 24, k=3), store, sl.TrainConfig(steps=60, batch_size=128)).coder.eval()
    return sl.index_features(sae, net, store, folder / "index")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    torch.manual_seed(7)
    return indexed(sl.Net(ViT()), "blocks.0", IMAGES, tmp_path_factory.mktemp("vit"), 12)


@pytest.fixture(autouse=True)
def undrawn(index):
    yield
    index.draw(None)


def pixels(address):
    assert address.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))


def test_a_context_is_a_whole_item(index):
    net, sae = index.lm, index.coder
    feature = index.best()
    codes = sae.encode(net.read(IMAGES, "blocks.0"))[..., feature]
    view = index[feature]
    assert view.lens_note == "no logit lens: this network is no language model"
    top = view.top[0]
    assert (top.document, top.position) == divmod(int(codes.argmax()), 17)
    assert len(top.values) == 17 and top.peak == top.position
    torch.testing.assert_close(torch.tensor(top.values), codes[top.document], atol=5e-3, rtol=5e-3)
    items = [c.document for group in view.groups for c in group["contexts"]]
    assert len(items) == len(set(items)), "no item twice"
    shown = len(view.top)
    assert shown == min(12, int((codes.amax(1) > 0).sum())), "items with equal places are not repeated text"


def test_the_first_to_look_at_are_selective(index):
    codes = index.coder.encode(index.lm.read(IMAGES, "blocks.0"))
    fires = (codes > 0).any(1).float().sum(0)
    score = (1 - fires / 60) * (fires / 30).clamp(max=1)
    assert score[index.best()] == score[index.counts > 0].max()


def test_heat_lies_on_the_places_of_the_picture(index):
    index.draw(lambda item: np.zeros((8, 8)))
    top = index[index.best()].top[0]
    assert top.area == [1, 4, 4, drawing.STRIP + drawing.GAP]
    seen = pixels(top.picture).astype(float)[..., 0]
    heat = np.array([v or 0.0 for v in top.values]).clip(0) / index.max[index.best()]
    cells = seen[:, top.area[3] :].reshape(4, 24, 4, 24)[:, 1:-1, :, 1:-1]  # without the line around the peak
    np.testing.assert_allclose(cells.mean((1, 3)).ravel(), heat[1:] * drawing.OPAQUE * drawing.HEAT[0], atol=1.0)
    left = seen[1:-1, 1 : drawing.STRIP - 1]  # the class token, on grey
    strip = drawing.GREY[0] + heat[0] * drawing.OPAQUE * (drawing.HEAT[0] - drawing.GREY[0])
    np.testing.assert_allclose(left, strip, atol=1.0)
    corner = seen[24 * ((top.peak - 1) // 4), top.area[3] + 24 * ((top.peak - 1) % 4)] if top.peak else seen[0, 0]
    assert corner == drawing.HEAT[0]


def test_pictures_of_every_kind(index):
    image = (IMAGES[0, 0].numpy() * 255).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    kinds = [IMAGES[0], IMAGES[0, 0], image, image[..., None], np.repeat(image[..., None], 3, 2),
             torch.from_numpy(image).expand(3, 8, 8), png.getvalue(), Image.fromarray(image)]  # fmt: skip
    kinds += [image.tolist(), image > -1, IMAGES[0, 0].to(torch.bfloat16)]
    seen = [pixels(look(kind).picture)[24:] for kind in kinds]  # without the line around the peak
    for i, other in enumerate(seen[1:-2]):
        np.testing.assert_allclose(seen[0], other, atol=1, err_msg=str(i))
    assert (seen[-2] == 255).all()
    np.testing.assert_allclose(seen[0], seen[-1], atol=2)


def look(made, places=16, peak=0, heat=None, grid=None):
    return drawing.drawn(lambda _: made, 0, np.zeros(places) if heat is None else heat, peak, grid, 1.0)


def test_frames_stand_in_lines_around_the_peak():
    frames = [np.full((5, 10), i / 99) for i in range(100)]
    heat = np.zeros(100)
    heat[70] = 1.0
    made = look(frames, 100, 70, heat)
    assert made.area == (50, 5, 8, 0)
    sheet = pixels(made.picture)
    height, width = sheet.shape[0] // 5, sheet.shape[1] // 8
    at = [tuple(int(c) for c in sheet[height * (i // 8) + 9, width * (i % 8) + 9, :3]) for i in range(40)]
    grey = [round(i * 255 / 99) for i in range(50, 90)]
    assert [a == (g, g, g) for a, g in zip(at, grey, strict=True)] == [i != 20 for i in range(40)]
    assert at[20][0] > grey[20] > at[20][2], "the hot one"
    assert look(frames[:3], 3).area == (0, 1, 3, 0)
    with pytest.raises(ValueError, match="a picture for each of the item's 4 places, got 3"):
        look(frames[:3], 4)


@pytest.mark.parametrize("made", [[0.0, 2.0, -1.0, 0.5], torch.tensor([1.0, 2.0, 3.0]), list(torch.arange(5)), [3] * 6])
def test_a_curve_lies_before_its_places(made):
    heat = np.zeros(6)
    heat[4] = 1.0
    drew = look(made, 6, 4, heat)
    assert drew.area == (0, 1, 6, 0)
    seen = pixels(drew.picture)
    assert seen.shape == (*drawing.CURVE, 4)
    column = [seen[:, 32 * i + 3, 3].max(initial=0) for i in range(6)]
    colour = [*drawing.HEAT, round(255 * drawing.OPAQUE)]  # the line is grey
    hot = [bool((seen[:, 32 * i + 3] == colour).all(1).any()) for i in range(6)]
    assert hot == [False, False, False, False, True, False]
    assert all(value > 100 for value in column[1:-1]), "the line"


def test_a_small_hot_place_of_many_is_seen():
    heat = np.zeros(300 * 300)
    heat[300 * 123 + 45] = 1.0
    seen = pixels(look(np.zeros((300, 300)), 90_000, 5, heat).picture)
    assert (seen[..., 0] > 180).sum() >= 1


def test_many_places_are_shown_around_the_peak(tmp_path):
    g = torch.Generator().manual_seed(3)
    data = torch.randn(4, 3000, 5, generator=g)
    index = indexed(sl.Net(cases()["LSTM"].module), "lstm", data, tmp_path, 7)
    feature = int(index.counts.argmax())
    top = index[feature].top[0]
    assert len(top.values) == len(top.tokens) <= 513 and top.tokens[top.peak] == str(top.position)
    assert top.values[top.peak] == pytest.approx(index.max[feature], rel=1e-2)
    index.draw(lambda item: data[item, :, 0])
    assert index[feature].top[0].area == [0, 1, 3000, 0]
    index.draw(lambda item: [f"s{i}" for i in range(3000)])
    top = index[feature].top[0]
    assert top.tokens[top.peak] == f"s{top.position}"


def test_names_of_places_are_shown_as_tokens(tmp_path):
    net, g = sl.Net(cases()["LSTM"].module), torch.Generator().manual_seed(2)
    letters = ["ACDE", "FGHIKL", "MNPQRS"] * 10
    data = [torch.randn(len(word), 5, generator=g) for word in letters]
    index = indexed(net, "lstm", data, tmp_path, 7).draw(lambda item: list(letters[item]))
    top = index[index.best()].top[0]
    assert "".join(top.tokens) == letters[top.document] and top.picture == ""
    assert index.draw(None)[index.best()].top[0].tokens[:2] == ["0", "1"]


def test_panel_page_and_site_hold_the_pictures(index, tmp_path):
    index.draw(lambda item: IMAGES[item])
    panel = sl.FeatureInspector(index)
    assert panel.view["groups"][0]["contexts"][0]["picture"].startswith("data:image/png")
    assert '<img src="data:image/png;base64,' in panel._html()  # the form that a saved notebook keeps
    assert "data:image/png" in panel.to_html(tmp_path / "page.html").read_text()
    site = index.to_site(tmp_path / "site").parent
    written = (site / "features-0.js").read_text()
    assert written.count("data:image/png;base64,") == sum(len(g["contexts"]) for view in index for g in view.groups)
    assert '"unit":"place"' in written.replace(": ", ":")
    assert "places of" in (site / "index.html").read_text()
    assert "of 1,020 places" in panel._html() and "ogit lens" not in panel._html()
    assert "most selective first" in panel.results_note
    best = index.best()
    assert index.names[best] == f"at {', '.join(index.top_tokens(best, 4))}"
    assert repr(index[index.best()]).count("item ") == min(6, len(index[index.best()].top))
    assert panel.code().startswith("import sae_lab as sl\n\n# lm: your ViT, lm = sl.Net(module)")


def test_conditions_find_and_words_are_refused(index):
    assert index.search("density<100%").features
    for what in ("eye", '"an eye in the dark"'):
        with pytest.raises(ValueError, match="features of another network are found by conditions"):
            index.search(what)
    with pytest.raises(ValueError, match="found by conditions"):
        index.search(["a"], against=["b"])
    with pytest.raises(ValueError, match="Neuronpedia shows features of language models"):
        index.to_neuronpedia("export")


def test_an_input_is_scored(index):
    scored = index.score(index.best(), IMAGES[:1])
    expected = index.coder.encode(index.lm.read(IMAGES[:1], "blocks.0"))[0, :, index.best()]
    torch.testing.assert_close(torch.tensor(scored.values), expected, atol=1e-4, rtol=1e-4)
    assert scored.tokens == [str(i) for i in range(17)]
    with pytest.raises(ValueError, match="one input is scored at a time, got 2"):
        index.score(0, IMAGES[:2])
    with pytest.raises(ValueError, match="reads no text"):
        index.score(0, "hello")


BAD = {
    "a str": (lambda item: "x", None, "render gives a PNG"),
    "bytes that are no picture": (lambda item: b"x", None, "bytes that are no picture"),
    "names of other places": (lambda item: ["a"], None, "a name for each of the item's 17 places, got 1"),
    "five axes": (lambda item: np.zeros((1, 1, 1, 1, 1)), None, "render gives a PNG"),
    "it raises": (lambda item: [][item], None, r"render\(\d+\) raised IndexError: list index out of range"),
    "unequal rows": (lambda item: [[1.0], [1.0, 2.0]], None, "render gives a PNG"),
    "a curve with gaps": (lambda item: [1.0, float("nan")], None, "finite numbers"),
    "nothing": (lambda item: None, None, "got NoneType"),
    "a list of nothing": (lambda item: [], None, "render gives a PNG"),
    "names and numbers": (lambda item: ["a", 1.0], None, "render gives a PNG"),
    "values beyond 1": (lambda item: IMAGES[item] * 4 + 1, None, "values go from 0 to 1, got 1"),
    "gaps": (lambda item: IMAGES[item] * float("nan"), None, "values go from 0 to 1, got nan"),
    "whole numbers beyond 255": (lambda item: np.full((8, 8), 300), None, "values go from 0 to 255, got 300 to 300"),
    "another grid": (lambda item: IMAGES[item], (5, 5), "is not known: say so"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_render_may_not_give(case, index):
    render, grid, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        index.draw(render, grid)[index.best()]


def test_a_language_model_has_no_pictures(tiny_lm, tmp_path):
    text = ["the quick brown fox jumps over the lazy dog"] * 20
    store = sl.harvest(tiny_lm, "resid_post-1", text, tokens=100, path=tmp_path / "s", context=8)
    sae = sl.train(sl.TopK(48, 64, k=4), store, sl.TrainConfig(steps=3, batch_size=32)).coder.eval()
    with pytest.raises(ValueError, match=r"draw is for an index of a sl\.Net"):
        sl.index_features(sae, tiny_lm, store, tmp_path / "i").draw(lambda item: item)
