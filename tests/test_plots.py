"""sl.plot: the figures show the numbers that the results hold, each once, under names that say what they are."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure

import sae_lab as sl
from sae_lab.sweeping import Sweep

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
    assert [axis.get_title() for axis in axes] == ["FVU, unseen tokens", "MMCS, true features found"]
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
    assert [axis.get_title() for axis in drawn(figure)] == ["FVU, unseen tokens", "ΔCE (nats/token)"]
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
