"""sl.plot: the figures show the numbers that the results hold, each once, under names that say what they are."""

import io
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import sae_lab as sl
from sae_lab.circuits import Edge, FeatureCircuit, Node, PatchGrid
from sae_lab.evals.reporting import Report
from sae_lab.plots.geometry import _around  # where names stand, of points by hand
from sae_lab.plots.style import NEGATIVE, POSITIVE
from sae_lab.results import Figure as EvalFigure
from sae_lab.results import Result
from sae_lab.training.sweeping import Sweep
from sae_lab.types import Site

CONFIG = sl.TrainConfig(steps=5, batch_size=64)


def drawn(figure):
    """The figure's axes, after drawing it in earnest."""
    assert isinstance(figure, Figure)
    figure.savefig(io.BytesIO(), format="png")
    return figure.axes


def legend(figure):
    (box,) = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    return [text.get_text() for text in box.get_texts()]


def points(axis):
    """All points of an axis's lines, in ascending order."""
    return sorted(tuple(xy) for line in axis.lines for xy in np.asarray(line.get_xydata()).tolist())


def near(found, expected):
    return len(found) == len(expected) and np.allclose(np.array(found), np.array(sorted(expected)))


def made_up(*rows):
    """A Sweep of these figures; a plot does not look at the coders."""
    return Sweep([], [], [{"seed": 0, "dead": 0.0} | row for row in rows], 100)


def test_a_sweep():
    world = sl.worlds.planted(n=16, d=12, l0=2, samples=1000)
    grid = {"TopK": {"k": [4, 1, 2]}, "L1": {"sparsity": 0.3}}
    sweep = sl.sweep(grid, world, CONFIG, d_sae=16, seeds=(0, 1))
    figure = sl.plot(sweep)
    axes = drawn(figure)
    assert [axis.get_title() for axis in axes] == ["FVU, held-out tokens", "MMCS, true features found"]
    assert all(axis.get_xlabel() == "L0 (active features per token)" for axis in axes)
    assert sorted(legend(figure)) == ["L1", "TopK"]
    table = sweep.to_pandas()
    for axis, name in zip(axes, ("fvu", "mmcs"), strict=True):
        lines = {line.get_label(): line for line in axis.lines}
        assert set(lines) == {"TopK", "L1"} and len(axis.lines) == 2
        x, y = lines["TopK"].get_data()
        assert len(x) == 3 and list(x) == sorted(x), "a point for each k, from left to right"
        for k, at in zip((1, 2, 4), range(3), strict=True):
            seeds = table[table["k"] == k]
            assert (x[at], y[at]) == pytest.approx((seeds["l0"].mean(), seeds[name].mean()))
        assert len(lines["L1"].get_xdata()) == 1, "of the seeds, the mean"


def test_the_axes_are_what_was_measured():
    one = {"family": "TopK", "l0": 2.0, "fvu": 0.5}
    assert len(drawn(sl.plot(made_up(one)))) == 1
    figure = sl.plot(made_up(one | {"ce_delta": 0.1}, {"family": "L1", "l0": 3.0, "fvu": 0.4, "ce_delta": 0.05}))
    assert [axis.get_title() for axis in drawn(figure)] == ["FVU, held-out tokens", "ΔCE (nats/token)"]
    assert points(figure.axes[1]) == [(2.0, 0.1), (3.0, 0.05)]


def test_many_families_stay_apart():
    """Colours come in tens; after that the marker changes."""
    rows = [{"family": name, "k": k, "l0": k + i / 100, "fvu": 1 / k} for i, name in enumerate(sl.saes.FAMILIES)
            for k in (1, 2)]  # fmt: skip
    figure = sl.plot(made_up(*rows))
    (axis,) = drawn(figure)
    looks = {(line.get_color(), line.get_marker()) for line in axis.lines}
    assert len(looks) == len(axis.lines) == len(sl.saes.FAMILIES) and legend(figure) == list(sl.saes.FAMILIES)


def test_only_seeds_are_averaged():
    """FVU at one site says nothing about another: their mean is nobody's."""
    rows = [
        {"family": "TopK", "k": k, "seed": seed, "site": site, "l0": k + seed, "fvu": fvu / k}
        for k in (2, 8) for seed in (0, 1) for site, fvu in (("mlp_in-1", 0.2), ("mlp_out-1", 0.8))
    ]  # fmt: skip
    (axis,) = drawn(sl.plot(made_up(*rows)))
    assert near(points(axis), [(k + 0.5, fvu / k) for k in (2, 8) for fvu in (0.2, 0.8)])


def test_coders_that_do_not_have_the_arguments_of_others():
    """A list of coders: what one family does not have is no number, a list, or None."""
    x = sl.worlds.planted(n=16, d=12, l0=2, samples=500).x
    coders = [sl.TopK(12, 16, k=2), sl.L1(12, 16, sparsity=0.3), sl.VQ(12, 16)]
    assert len(points(drawn(sl.plot(sl.sweep(coders, x, CONFIG)))[0])) == 3
    coders = [sl.TopK(12, 16, k=2), sl.Matryoshka(12, 16, k=2), sl.Matryoshka(12, 16, k=2, prefixes=(4, 16))]
    sweep = sl.sweep(coders, x, CONFIG)
    expected = [(row["l0"], row["fvu"]) for row in sweep.rows]
    assert near(points(drawn(sl.plot(sweep))[0]), expected)


def test_a_choice_of_l0():
    x = sl.worlds.planted(n=16, d=12, l0=2, samples=500).x
    sweep = sl.sweep({"BatchTopK": {"k": [4, 1, 2]}}, x, CONFIG, d_sae=16)
    choice = sl.evals.choose_l0(sweep.coders, x)
    axes = drawn(sl.plot(choice))
    assert len(axes) == 3 and [axis.get_title().split()[0].rstrip(":") for axis in axes] == ["c_dec", "s_n", "FVU"]
    for axis, name in zip(axes, ("c_dec", "s_n", "fvu"), strict=True):
        values = getattr(choice, name)
        curve, *marks = axis.lines
        assert np.allclose(np.asarray(curve.get_xydata()), list(zip(choice.l0, values, strict=True)))
        least = [] if name == "fvu" else [choice.l0[int(np.argmin(values))]]  # FVU's least says nothing
        assert [mark.get_xdata()[0] for mark in marks] == pytest.approx(least)
        assert axis.get_xlabel() == "L0 (active features per token)"


def test_a_run():
    x = sl.worlds.planted(n=16, d=12, l0=2, samples=500).x
    run = sl.train(sl.TopK(12, 16, k=2), x, CONFIG)
    axes = drawn(sl.plot(run))
    assert [axis.get_title().split()[0] for axis in axes] == ["FVU", "L0", "dead"]
    for axis, name in zip(axes, ("fvu", "l0", "dead"), strict=True):
        (line,) = axis.lines
        assert line.get_xdata() == pytest.approx([64e-6 * step for step in range(1, 6)])
        assert line.get_ydata() == pytest.approx([row[name] for row in run.history])


def test_nothing_global_is_touched():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    sl.plot(made_up({"family": "TopK", "l0": 2.0, "fvu": 0.5}))
    assert plt.get_fignums() == before


# ---- how often features fire


class Densities(sl.FeatureIndex):
    """An index of these densities; the picture looks at nothing else."""

    def __init__(self, counts, tokens):
        self.counts, self.tokens_seen, self.d_sae, self.site = np.array(counts), tokens, len(counts), Site("embed")
        self.density = self.counts / tokens


class TwoNumbers(Result):
    def figures(self):
        return [EvalFigure("F1", 0.7, 0.05, 0.5), EvalFigure("undefined", math.nan), EvalFigure("bits", 400.0)]


def test_any_result_of_an_eval():
    figure = sl.plot(TwoNumbers())
    f1, bits = drawn(figure)
    assert [f1.get_ylabel(), bits.get_ylabel()] == ["F1", "bits"], "what is undefined has no row"
    assert {x for x, _ in points(f1)} >= {0.7, 0.5} and f1.collections, "value, control, and an error bar"
    assert {x for x, _ in points(bits)} == {400.0}


def test_a_report_has_a_marker_a_coder():
    found = {"a": ([EvalFigure("F1", 0.7)], [EvalFigure("F1", 0.6)]), "b": ([], [EvalFigure("dCE", 0.1, control=2.0)])}
    figure = sl.plot(Report(("one", "two"), found, {}, {}, {}))
    f1, dce = drawn(figure)
    assert {x for x, _ in points(f1)} >= {0.7, 0.6} and {x for x, _ in points(dce)} == {0.1, 2.0}
    (box,) = figure.legends
    assert [text.get_text() for text in box.get_texts()] == ["one", "two"]
    with pytest.raises(ValueError, match="this Report holds no number to draw"):
        sl.plot(Report(("one",), {}, {}, {}, {}))


@pytest.mark.filterwarnings("error")  # matplotlib warns where it finds no layout
def test_the_legend_of_a_report_leaves_room_for_the_axes():
    found = {"a": tuple([EvalFigure("F1", f1, 0.05, 0.9), EvalFigure("L0", 9.0)] for f1 in (0.7, 0.6, 0.5))}
    figure = sl.plot(Report(("one", "two", "three"), found, {}, {}, {}))
    figure.savefig(io.BytesIO())
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    assert boxes[0].y0 >= boxes[1].y1, "numbers of one row are not under the next"


def test_a_hill_curve():
    result = sl.evals.hill([(4, 0.5), (8, 0.7), (16, 0.84)])
    (axis,) = drawn(sl.plot(result))
    lines = {line.get_label(): line for line in axis.lines}
    assert near(sorted(lines["coders"].get_xydata().tolist()), [(1 / 16, 0.16), (1 / 8, 0.3), (1 / 4, 0.5)])
    x, y = lines[f"Hill, n = {result.slope:.2f}"].get_data()
    assert np.allclose(y, [result.lost_at(1 / s) for s in x])


def test_the_density_of_features():
    counts = [0, 0, 1, 10, 10, 100, 1000]
    (axis,) = drawn(sl.plot(Densities(counts, 1000)))
    heights = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axis.patches if bar.get_height()]
    assert sum(height for _, height in heights) == 5, "the live ones"
    assert [height for _, height in sorted(heights)] == [1, 2, 1, 1]
    assert [round(x) for x, _ in sorted(heights)] == [-3, -2, -1, 0]
    assert axis.get_title() == "embed: 2 of 7 features dead (28.6%)" and "1,000 tokens" in axis.get_xlabel()
    assert axis.lines[0].get_xdata()[0] == pytest.approx(-2), "their median"
    (axis,) = drawn(sl.plot(Densities([0, 0], 50)))
    assert axis.get_title() == "embed: 2 of 2 features dead (100.0%)" and not axis.lines


# ---- the graph of a circuit


def circuit(edges=True):
    a, error = Node(Site("resid_post", 0), 1, 7), Node(Site("resid_post", 0), 1, -1)
    b, c = Node(Site("attn_out", 1), 1, 3), Node(Site("resid_post", 1), 3, 9)
    silent = Node(Site("resid_post", 1), 2, 5)
    links = [Edge(a, c, 2.0), Edge(error, b, -1.0), Edge(a, b, 0.5)] if edges else []
    nodes = {a: 2.0, c: -1.0, error: 0.5, b: 0.1, silent: 0.0}
    return FeatureCircuit(nodes, links, {}, None, 1.0, -1.0, 10, "source", ("<s>", " A", " B", " C"))


def test_the_graph_of_a_circuit():
    (axis,) = drawn(sl.plot(circuit()))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["resid_post-0", "attn_out-1", "resid_post-1"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["A\n1", "C\n3"], "where nodes stand"
    looks = {line.get_linewidth(): (line.get_color(), line.is_dashed()) for line in axis.lines}
    assert [looks[width] for width in sorted(looks)] == [(POSITIVE, False), (NEGATIVE, True), (POSITIVE, False)]
    sizes = [points.get_sizes()[0] for points in axis.collections]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 4
    hollow = [bool((points.get_facecolor() == 1).all()) for points in axis.collections]
    assert hollow == [False, True, False, False], "the negative one, also in grey"
    assert [text.get_text() for text in axis.texts] == ["7", "9", "error", "3"]
    assert axis.get_title(loc="left").startswith("4 of 5 nodes, 3 of 3 edges")
    places = {tuple(points.get_offsets()[0]) for points in axis.collections}
    ends = {tuple(end) for line in axis.lines for end in np.asarray(line.get_xydata())}
    assert ends == places and len(places) == 4
    (axis,) = drawn(sl.plot(circuit(edges=False)))
    assert len(axis.collections) == 5 and not axis.lines and len(axis.get_legend().get_texts()) == 3


# ---- maps


def test_negative_patches_are_marked_for_those_who_see_no_colour():
    values = torch.tensor([[[1.0, -0.5], [-0.01, 0.0]]])
    grid = PatchGrid(values, 0.0, 1.0, ("mlp_out",), [0, 1], [1, 2], [("a", "a"), ("b", "c")])
    axis = drawn(sl.plot(grid))[0]
    assert axis.collections[0].get_offsets().tolist() == [[1.0, 0.0]]
    drawn(sl.plot(PatchGrid(torch.zeros(1, 2, 2), 0.0, 1.0, ("mlp_out",), [0, 1], [1, 2], grid.tokens)))


# ---- one style


def test_lines_differ_in_more_than_colour():
    rows = [{"family": name, "k": k, "l0": k + i, "fvu": 1 / k} for i, name in enumerate("abcd") for k in (1, 2)]
    (axis,) = drawn(sl.plot(made_up(*rows)))
    for of in ("get_marker", "get_linestyle", "get_color"):
        values = {str(getattr(line, of)()) for line in axis.lines}
        assert len(values) == 4 or of == "get_linestyle"
    assert len({str(line._dash_pattern) for line in axis.lines}) == 4


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_saving_twice_gives_the_same_file(tmp_path, kind):
    for name in ("a", "b"):
        sl.plot(circuit()).savefig(tmp_path / f"{name}.{kind}")
    first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("a", "b"))
    assert first == second
    if kind == "svg":
        text = first.decode()
        assert re.search(r"<text[^>]*>resid_post-0</text>", text), "text stays text"
        assert "<dc:date>" not in text
    if kind == "png":
        import matplotlib.image

        assert matplotlib.image.imread(tmp_path / "a.png").shape[1] == pytest.approx(200 * 4.2, abs=300)


def test_the_style_stays_inside():
    import matplotlib

    before = dict(matplotlib.rcParams)
    sl.plot(circuit()).savefig(io.BytesIO(), format="svg")
    assert dict(matplotlib.rcParams) == before


# ---- names and axes that can be read


def test_names_around_a_circle_cover_neither_each_other_nor_the_line():
    """Also where all words but one lie on one side."""
    angles = torch.tensor([0.0, 0.02, 0.04, 0.06, 0.08, 3.0])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    places = _around(points.numpy())
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)[~np.eye(6, dtype=bool)]
    assert distances.min() > 0.5, "without the pushing 0.02"
    assert np.allclose(np.hypot(*(places - points.numpy().mean(0)).T), np.hypot(*(places[0] - points.numpy().mean(0))))


def test_estimates_and_truth_are_on_one_scale(tiny_lm):
    coder = sl.TopK(48, 64, k=4).eval()
    coder.reads = coder.writes = (Site("resid_post", 1),)
    found = sl.circuits.attribution(tiny_lm, coder, ["the cat sat"], ["the dog sat"], lambda x, _: x[:, -1, 5], check=3)
    (axis,) = drawn(sl.plot(found))
    assert axis.get_xlim() == axis.get_ylim()
    both = found.to_pandas()[["estimate", "truth"]].dropna().to_numpy()
    assert len(both) and axis.get_xlim()[0] < both.min() and axis.get_xlim()[1] > both.max()
    assert "units of the metric" in axis.get_ylabel()
