"""sl.sweep: what coders share must not show. Each ends as if it had been trained alone, and the table tells the truth
about it."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from torch.nn import functional as F

import sae_lab as sl
from sae_lab.activations.store import Rows, Store
from sae_lab.saes import FAMILIES
from sae_lab.training.checkpoint import CHECKPOINT
from sae_lab.types import Batch, Site

D, WIDTH = 12, 24
# dead_after is short, so that AuxK takes part: it reads the buffer of pre-activations that coders share.
SMALL = {"steps": 12, "batch_size": 64, "lr": 3e-3, "checkpoint_every": 4, "dead_after": 130}
CONFIG = sl.TrainConfig(**SMALL)
# One of each kind: sparse and dense codes, thresholds that are parameters, a list as an argument, no arguments at all.
GRID = {
    "TopK": {"k": [2, 4], "multi": 2},
    "BatchTopK": {"k": 3, "d_sae": (16, 32)},
    "L1": {"sparsity": [0.1, 0.5]},
    "JumpReLU": {"sparsity": 0.1},
    "Gated": {"sparsity": 0.3},
    "Matryoshka": {"k": 3, "prefixes": [(6, 24)]},
    "Switch": {"k": 2, "experts": 4},
    "VQ": {},
}
A, B = Site("mlp_in", 1), Site("mlp_out", 1)


@pytest.fixture(scope="module")
def data():
    """Rows in raw units far from norm √d, off the origin."""
    return 7 * sl.worlds.planted(20, D, 3, samples=2000).x + 3


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_tiny, small_text):
    folder = tmp_path_factory.mktemp("sweeping") / "store"
    return sl.harvest(make_tiny("llama"), [A, B], small_text, 2000, context=32, path=folder)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


def alone(family, data, seed=0, d_sae=WIDTH, d_in=D, config=CONFIG, **arguments):
    return sl.train(FAMILIES[family](d_in, d_sae, seed=seed, **arguments), data, config)


def expanded(grid, seeds):
    """(family, seed, arguments) in the order a reader expects."""
    for family, arguments in grid.items():
        lists = [v if isinstance(v, list | tuple) else [v] for v in arguments.values()]
        for values, seed in product(product(*lists), seeds):
            yield family, seed, dict(zip(arguments, values, strict=True))


@pytest.fixture
def reads(monkeypatch):
    """(sites, step) of every batch of the training's size that is read; at the start a larger one sets the scale."""
    seen = []

    def count(cls):
        batch = cls.batch

        def counted(self, step, batch_size, seed=0):
            if batch_size == CONFIG.batch_size:
                seen.append((getattr(self, "reads", ()), step))
            return batch(self, step, batch_size, seed)

        monkeypatch.setattr(cls, "batch", counted)

    count(Rows)
    count(Store)
    return seen


# ---- as if alone


def test_coders_end_as_if_trained_alone(data):
    config = sl.TrainConfig(**{**SMALL, "steps": 7})
    result = sl.sweep(GRID, data, config, d_sae=WIDTH, seeds=(0, 1))
    kinds = list(expanded(GRID, (0, 1)))
    assert len(result.coders) == len(result.runs) == len(result.rows) == len(kinds) == 22
    fired = 0
    for coder, run, row, (family, seed, arguments) in zip(result.coders, result.runs, result.rows, kinds, strict=True):
        lone = alone(family, data, seed, config=config, **arguments)
        assert same(coder, lone.coder), (family, seed, arguments)
        assert run.history == lone.history and coder.meta == lone.coder.meta and run.coder is coder
        assert not coder.training and coder.scratch is None and row["family"] == family and row["seed"] == seed
        fired += any("auxk" in step for step in run.history)
    assert fired, "AuxK, which reads the shared buffer, never took part: nothing was shown about it"
    assert not same(result.coders[0], result.coders[1]), "seeds make different coders"
    other = sl.sweep(
        {"TopK": {"k": 2, "multi": 2}}, data, sl.TrainConfig(**{**SMALL, "steps": 7, "seed": 1}), d_sae=WIDTH
    )
    assert not same(result.coders[0], other.coders[0]), "other batches make different weights: the comparison can fail"


def test_each_part_of_the_data_is_read_once(monkeypatch):
    seen = []
    for name, read in [(name, getattr(Rows, name)) for name in ("batch", "blocks", "reserved", "unseen")]:

        def counted(self, *args, read=read, name=name):
            seen.append((name, args))
            return read(self, *args)

        monkeypatch.setattr(Rows, name, counted)
    x = torch.randn(600, D, generator=torch.Generator().manual_seed(0))
    sl.sweep({"TopK": {"k": [2, 3, 4]}, "L1": {"sparsity": [0.1, 0.2]}}, x, CONFIG, d_sae=WIDTH)
    assert len(seen) == len(set(seen)), "something was read for every coder"
    assert {name for name, _ in seen} == {"batch", "blocks", "reserved", "unseen"}


def test_a_list_of_coders(data):
    """They are trained in place, whatever their widths; the table shows what differs between them."""
    coders = [sl.TopK(D, 16, k=3), sl.TopK(D, 32, k=3), sl.L1(D, 16, sparsity=0.3)]
    result = sl.sweep(coders, data, CONFIG)
    assert all(a is b for a, b in zip(result.coders, coders, strict=True))
    for coder, lone in zip(coders, [sl.TopK(D, 16, k=3), sl.TopK(D, 32, k=3), sl.L1(D, 16, sparsity=0.3)], strict=True):
        assert same(coder, sl.train(lone, data, CONFIG).coder)
    table = result.to_pandas()
    assert table["family"].tolist() == ["TopK", "TopK", "L1"] and table["d_sae"].tolist() == [16, 32, 16]
    assert "d_in" not in table and "seed" not in table, "all have the same"


def test_each_batch_is_read_once(data, reads):
    sl.sweep(GRID, data, CONFIG, d_sae=WIDTH)
    assert reads == [((), step) for step in range(12)]


def test_each_site_of_a_store_is_read_once(store, reads):
    sl.sweep({"TopK": {"k": [2, 4]}, "L1": {}}, store, CONFIG, d_sae=WIDTH)
    assert Counter(reads) == {((site,), step): 1 for site in (A, B) for step in range(12)}


def test_every_coder_at_every_site(store):
    result = sl.sweep({"TopK": {"k": [2, 4]}, "L1": {"sparsity": 0.5}}, store, CONFIG, d_sae=64, seeds=(0, 1))
    assert len(result.coders) == 3 * 2 * 2
    for coder, row in zip(result.coders, result.rows, strict=True):
        site = Site.of(row["site"])
        arguments = {"k": row["k"]} if row["family"] == "TopK" else {"sparsity": 0.5}
        lone = alone(row["family"], store.at(site), row["seed"], 64, 48, **arguments)
        assert same(coder, lone.coder) and coder.reads == coder.writes == (site,) and coder.meta == lone.coder.meta
    assert Counter(row["site"] for row in result.rows) == {A.key: 6, B.key: 6}
    one = sl.sweep({"TopK": {"k": [2]}}, store.at(B), CONFIG, d_sae=64)
    assert "site" not in one.to_pandas() and one.coders[0].reads == (B,)


def test_coders_of_two_sites_beside_coders_of_one(store):
    """One sweep holds SAEs of each site, the transcoder between them and the crosscoder over both."""
    grid = {"TopK": {"k": 4}, "Transcoder": {"k": 4}, "SkipTranscoder": {"k": 4}, "Crosscoder": {"k": 4, "layers": 2}}
    result = sl.sweep(grid, store, CONFIG, d_sae=64)
    at = [(row["family"], coder.reads, coder.writes) for row, coder in zip(result.rows, result.coders, strict=True)]
    assert at == [
        ("TopK", (A,), (A,)), ("TopK", (B,), (B,)), ("Transcoder", (A,), (B,)), ("SkipTranscoder", (A,), (B,)),
        ("Crosscoder", (A, B), (A, B)),
    ]  # fmt: skip
    for coder, row in zip(result.coders[2:], result.rows[2:], strict=True):
        assert same(coder, alone(row["family"], store, d_sae=64, d_in=48, **grid[row["family"]]).coder)


def test_any_family_made_a_transcoder_spans_the_two_sites(store):
    """``d_out`` makes a transcoder of any family: there is no site it could be trained at alone."""
    result = sl.sweep({"TopK": {"k": 4, "d_out": 48}}, store, CONFIG, d_sae=64)
    assert [(c.reads, c.writes) for c in result.coders] == [((A,), (B,))]
    assert same(result.coders[0], alone("TopK", store, d_sae=64, d_in=48, k=4, d_out=48).coder)


def test_targets_and_tokens(data):
    """A Batch brings what a transcoder and a Tokenized coder need."""
    x = data.repeat(12, 1)  # more unseen rows than are measured at once
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (len(x),), generator=g)
    batch = Batch(x, x[:, :8].tanh() + tokens[:, None], tokens)
    grid = {"Transcoder": {"k": [2, 4], "d_out": 8}, "Tokenized": {"k": 3, "vocab": 5, "d_out": 8}}
    result = sl.sweep(grid, batch, CONFIG, d_sae=WIDTH)
    for coder, (family, _, arguments) in zip(result.coders, expanded(grid, (0,)), strict=True):
        assert same(coder, alone(family, batch, **arguments).coder)
    unseen = Rows(batch).unseen(10**6)
    assert len(unseen.x) == result.tokens > 4096
    for coder, row in zip(result.coders, result.rows, strict=True):
        error = (coder(unseen.x, unseen.tokens).x_hat.detach() - unseen.target).pow(2).sum()
        variance = (unseen.target - unseen.target.mean(0)).pow(2).sum()
        assert row["fvu"] == pytest.approx(float(error / variance), rel=1e-4), "of the target, with the tokens"


# ---- grids


def test_forms_of_a_grid(data):
    """Lists, tuples and ranges vary, scalars and strings stay; a sequence that is one value stands in a list."""
    grid = {
        "TopK": {"k": range(2, 4)},
        "L1": {"sparsity": (0.1, 0.2)},
        "Matryoshka": {"k": 3, "prefixes": [(6, 24), (24,)]},
    }
    result = sl.sweep(grid, data, sl.TrainConfig(steps=1, batch_size=64), d_sae=WIDTH, seeds=[5])
    table = result.to_pandas()
    assert table["family"].tolist() == ["TopK"] * 2 + ["L1"] * 2 + ["Matryoshka"] * 2
    assert [c.config.get("k") for c in result.coders] == [2, 3, None, None, 3, 3]
    assert [c.config.get("sparsity") for c in result.coders] == [None, None, 0.1, 0.2, None, None]
    assert [c.config.get("prefixes") for c in result.coders[4:]] == [[6, 24], [24]]
    assert {c.config["seed"] for c in result.coders} == {5} == set(table["seed"])
    # k=3 of Matryoshka is no choice of this grid: it has no place in the table.
    assert table["k"].isna().tolist() == [False, False, True, True, True, True]


def test_seeds_serve_every_family(data):
    """Also where they can be read only once, as from a generator."""
    seeds = (seed for seed in (0, 1))
    result = sl.sweep({"TopK": {"k": 2}, "L1": {}}, data, sl.TrainConfig(steps=1, batch_size=64), d_sae=8, seeds=seeds)
    assert [(row["family"], row["seed"]) for row in result.rows] == list(product(["TopK", "L1"], [0, 1]))


@pytest.mark.parametrize(
    ("grid", "arguments", "words"),
    [
        ({"TopKK": {"k": 3}}, {"d_sae": 8}, "unknown family 'TopKK'; known: BatchTopK, .*VQ"),
        ({}, {"d_sae": 8}, r"the grid is empty: give a family, .* \{'TopK'"),
        ([], {}, r"a sweep takes a grid .* or a list of coders, got \[\]"),
        ({"L1": {}, "TopK": {"k": 3}}, {}, r"give sweep\(..., d_sae=\), or 'd_sae' among the arguments of L1"),
        ({"TopK": {"k": 3, "d_sae": 8}, "L1": {}}, {}, "'d_sae' among the arguments of L1"),
        ({"TopK": {"k": [2, 100]}}, {"d_sae": 8}, "k must be an integer from 1 to d_sae=8, got 100"),
        ({"Transcoder": {"k": 2}}, {"d_sae": 8}, r"a transcoder needs a target: pass sl.Batch\(x, target\)"),
        ({"TopK": {"k": []}}, {"d_sae": 8}, "k"),
        ({"TopK": {"k": 3}}, {"d_sae": 8, "seeds": ()}, "seed"),
    ],
)
def test_grids_that_are_refused(grid, arguments, words, data, reads):
    with pytest.raises(ValueError, match=words):
        sl.sweep(grid, data, CONFIG, **arguments)
    assert not reads, "nothing was trained before"


def test_a_coder_that_does_not_fit_is_refused_before_training(data, reads):
    good, wide = sl.TopK(D, 16, k=3), sl.TopK(D + 1, 16, k=3)
    before = {n: t.clone() for n, t in good.state_dict().items()}
    with pytest.raises(ValueError, match="the coder reads d_in=13, the activations have width 12: make them equal"):
        sl.sweep([good, wide], data, CONFIG)
    assert not reads and all(torch.equal(t, before[n]) for n, t in good.state_dict().items() if n != "threshold")


def test_a_language_model_without_text_is_refused(tiny_lm, small_text, store, reads):
    """ΔCE was asked for: to leave it out in silence after the training is no answer."""
    for given in ({"lm": tiny_lm}, {"text": small_text}):
        with pytest.raises(ValueError, match=r"\b(text|lm)\b"):
            sl.sweep({"TopK": {"k": 4}}, store.at(B), CONFIG, d_sae=16, **given)
    assert not reads


def test_a_language_model_for_coders_without_a_site_is_refused_before_training(tiny_lm, small_text, reads):
    """Coders of a plain tensor know no site to be spliced in: that is known before hours of training."""
    x = torch.randn(500, 48, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="site"):
        sl.sweep({"TopK": {"k": 4}}, x, CONFIG, d_sae=16, lm=tiny_lm, text=small_text.held_out)
    assert not reads


# ---- the table


def by_hand(coder, x):
    """(L0, FVU) of rows, by their definitions."""
    f, x_hat = coder.encode(x).detach(), coder(x).x_hat.detach()
    return float((f > 0).sum(1).float().mean()), float((x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def test_the_table_of_a_tensor(data):
    config = sl.TrainConfig(steps=100, batch_size=128)
    result = sl.sweep({"TopK": {"k": [2, 4]}, "L1": {"sparsity": 0.3}}, data, config, d_sae=WIDTH)
    table = result.to_pandas()
    assert list(table.columns) == ["family", "k", "seed", "l0", "fvu", "dead"]
    unseen = Rows(data).unseen(10**6)
    assert result.tokens == len(unseen.x) == len(Rows(data).reserved(10**6)) < len(data) / 3
    for coder, row in zip(result.coders, result.rows, strict=True):
        assert (row["l0"], row["fvu"]) == pytest.approx(by_hand(coder, unseen.x), rel=1e-4)
        assert row["fvu"] != pytest.approx(by_hand(coder, data)[1], rel=1e-4), "on rows that no batch held"
        assert row["dead"] == coder.meta["dead"]
    assert table["l0"][0] <= 2 < table["l0"][1] <= 4 and table["fvu"][1] < table["fvu"][0] < 1
    text, html = repr(result), result._repr_html_()
    assert text.splitlines()[0].split() == list(table.columns) and f"{table['fvu'][0]:.3f}" in text
    assert f"on {result.tokens:,} tokens that no training step saw" in text and "NaN" not in text
    assert html.count("<tr") == 4 and f"{table['fvu'][0]:.3f}" in html and "NaN" not in html


def test_the_table_of_a_world():
    world = sl.worlds.planted(n=16, d=32, l0=2, samples=5000)
    config = sl.TrainConfig(steps=80, batch_size=256, lr=1e-2)
    result = sl.sweep({"TopK": {"k": [2]}, "L1": {"sparsity": 0.3}}, world, config, d_sae=32, seeds=(0, 1))
    assert list(result.to_pandas().columns) == ["family", "seed", "l0", "fvu", "dead", "mmcs", "mmcs_back"]
    for coder, row in zip(result.coders, result.rows, strict=True):
        cosines = F.normalize(coder.W_dec.detach(), dim=1) @ world.dictionary.T
        assert row["mmcs"] == pytest.approx(float(cosines.amax(0).mean()), abs=1e-4)
        assert row["mmcs_back"] == pytest.approx(float(cosines.amax(1).mean()), abs=1e-4)
        assert (row["l0"], row["fvu"]) == pytest.approx(by_hand(coder, Rows(world.x).unseen(10**6).x), rel=1e-4)
        fresh = FAMILIES[row["family"]](32, 32, seed=row["seed"])  # what it started from: found is what was learnt
        assert row["mmcs"] > sl.match(fresh, world).b_to_a + 0.2 and coder.reads == ()
    assert same(result.coders[0], alone("TopK", world.x, d_sae=32, d_in=32, k=2, config=config).coder)


def test_the_table_of_a_store_with_a_language_model(store, tiny_lm, small_text):
    text = [document[:400] for document in small_text[:2]]
    grid = {"TopK": {"k": [4, 16]}, "Transcoder": {"k": 4}}
    result = sl.sweep(grid, store, CONFIG, d_sae=64, lm=tiny_lm, text=text)
    table = result.to_pandas()
    assert list(table.columns) == [
        "family", "k", "seed", "site", "l0", "fvu", "dead", "ce_delta", "ce_delta_se", "ce_recovered",
    ]  # fmt: skip
    assert len(table) == 5 and table["site"].isna().tolist() == [False] * 4 + [True]
    for coder, row in list(zip(result.coders, result.rows, strict=True))[1::3]:
        measured = sl.evals.reconstruction(coder, tiny_lm, text)
        assert row["ce_delta"] == measured.ce_delta != 0
        assert row["ce_recovered"] == pytest.approx(measured.ce_recovered, nan_ok=True)
    for coder, row in zip(result.coders[:4], result.rows, strict=False):
        unseen = store.at(row["site"]).unseen(10**6)
        assert (row["l0"], row["fvu"]) == pytest.approx(by_hand(coder, unseen.x), rel=1e-3)


def test_best():
    world = sl.worlds.planted(n=16, d=32, l0=2, samples=3000)
    config = sl.TrainConfig(steps=20, batch_size=256, lr=1e-2)
    result = sl.sweep({"TopK": {"k": [1, 2, 4]}, "L1": {"sparsity": 0.3}}, world, config, d_sae=32, seeds=(0, 1))
    table = result.to_pandas()
    assert result.best() is result.coders[table["fvu"].idxmin()]
    assert result.best("l0", family="TopK") is result.coders[table[table["family"] == "TopK"]["l0"].idxmin()]
    for by in ("mmcs", "mmcs_back"):  # more is better
        assert result.best(by) is result.coders[table[by].idxmax()] is not result.coders[table[by].idxmin()]
    few = table[(table["k"] == 1) & (table["seed"] == 1)]
    assert len(few) == 1 and result.best("fvu", k=1, seed=1) is result.coders[few.index[0]]
    result.rows[table["fvu"].idxmin()]["fvu"] = math.nan  # what is undefined is never the best
    assert result.best() is result.coders[table["fvu"].drop(table["fvu"].idxmin()).idxmin()]
    result.rows[:] = [row | {"mmcs": math.nan} for row in result.rows]
    with pytest.raises(ValueError, match=r"'mmcs' is undefined for every coder with \{\}: choose by another"):
        result.best("mmcs")
    columns = "columns: family, k, seed, l0, fvu, dead, mmcs, mmcs_back"
    for by, where in (("ce_delta", {}), ("fvu", {"k": 99}), ("fvu", {"colour": 1}), ("nonsense", {"k": 1})):
        with pytest.raises(ValueError, match=f"no coder with .* and '{by}'; {columns}"):
            result.best(by, **where)


# ---- on the way


def test_without_path_nothing_is_written(data, store, tmp_path, monkeypatch, cache_folder):
    monkeypatch.chdir(tmp_path)

    def files():
        return {f: f.stat().st_mtime_ns for root in (cache_folder, store.path) for f in root.rglob("*") if f.is_file()}

    before = files()
    for rows in (data, store.at(A)):
        sl.sweep({"TopK": {"k": [2, 4]}, "L1": {}}, rows, CONFIG, d_sae=WIDTH)
    assert not list(tmp_path.iterdir()) and files() == before


def test_the_progress_bar(data, capsys):
    sl.sweep({"TopK": {"k": [2, 4]}, "L1": {}}, data, CONFIG, d_sae=WIDTH)
    err = capsys.readouterr().err
    assert "sweep of 3" in err and "12/12" in err and "FVU 0." in err
    assert "train " not in err, "one view of progress for all"


SOME = {"TopK": {"k": [2, 4]}, "JumpReLU": {"sparsity": 0.1}, "BatchTopK": {"k": 3, "d_sae": (16, 24)}}


def stop_reading(monkeypatch, step, error=KeyboardInterrupt):
    """Rows.batch raises once, before any coder takes this step."""
    batch, left = Rows.batch, [1]

    def stopped(self, at, batch_size, seed=0):
        if at == step and batch_size == CONFIG.batch_size and left:
            left.clear()
            raise error
        return batch(self, at, batch_size, seed)

    monkeypatch.setattr(Rows, "batch", stopped)


def stop_in_the_middle(monkeypatch, step, error=KeyboardInterrupt):
    """The third coder raises once in its step: two coders are a step ahead of three others."""
    terms, calls = sl.JumpReLU.terms, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step + 1:
            raise error
        return terms(self, *args, **kwargs)

    monkeypatch.setattr(sl.JumpReLU, "terms", stopped)


def steps_in(path):
    """The step of each coder's checkpoint."""
    import json

    from safetensors import safe_open

    steps = []
    for folder in sorted(path.iterdir()):
        with safe_open(folder / CHECKPOINT, framework="pt") as f:
            steps.append(json.loads(f.metadata()["run"])["step"])
    return steps


@pytest.mark.parametrize(
    ("stop", "step", "error", "left_at"),
    [
        (stop_reading, 5, KeyboardInterrupt, [5, 5, 5, 5, 5]),
        (stop_in_the_middle, 5, KeyboardInterrupt, [6, 6, 5, 5, 5]),
        # What is no interruption leaves the last checkpoints, here every fourth step: two coders wait for three.
        (stop_reading, 5, RuntimeError, [4, 4, 4, 4, 4]),
        (stop_in_the_middle, 7, RuntimeError, [8, 8, 4, 4, 4]),
        (stop_in_the_middle, 0, KeyboardInterrupt, [1, 1, 0, 0, 0]),
    ],
)
def test_interrupted_and_called_again(stop, step, error, left_at, data, tmp_path, monkeypatch, reads):
    call = {"grid": SOME, "data": data, "config": CONFIG, "d_sae": 24, "path": tmp_path / "sweep"}
    stop(monkeypatch, step, error)
    with pytest.raises(error):
        sl.sweep(**call)
    assert steps_in(tmp_path / "sweep") == left_at
    reads.clear()
    resumed = sl.sweep(**call)
    assert [at for _, at in reads] == list(range(min(left_at), 12)), "it went on, and each batch is still read once"
    unbroken = sl.sweep(SOME, data, CONFIG, d_sae=24)
    for a, b in zip(resumed.runs, unbroken.runs, strict=True):
        assert same(a.coder, b.coder) and a.history == b.history and a.coder.meta == b.coder.meta
    assert resumed.rows == unbroken.rows
    folders = sorted((tmp_path / "sweep").iterdir())
    assert len(folders) == 5 and "TopK" in folders[0].name and "k=2" in folders[0].name
    assert all(sorted(f.name for f in d.iterdir()) == ["config.json", "run.json", "sae.safetensors"] for d in folders)
    reads.clear()
    again = sl.sweep(**call)
    assert not reads and again.rows == unbroken.rows, "a finished sweep is opened"
    assert all(same(a, b) for a, b in zip(again.coders, unbroken.coders, strict=True))
    assert same(sl.load(folders[1]), unbroken.coders[1])


def make_list():
    return [sl.TopK(D, 24, k=3), sl.L1(D, 24, sparsity=0.3), sl.JumpReLU(D, 24, sparsity=0.1), sl.BatchTopK(D, 16, k=3)]


def test_interrupted_in_a_notebook(data, tmp_path, monkeypatch):
    """The cell runs again with the same coder objects, whose weights have changed meanwhile."""
    coders = make_list()
    stop_in_the_middle(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        sl.sweep(coders, data, CONFIG, path=tmp_path)
    sl.sweep(coders, data, CONFIG, path=tmp_path)
    unbroken = sl.sweep(make_list(), data, CONFIG)
    assert all(same(a, b) for a, b in zip(coders, unbroken.coders, strict=True))


def test_a_store_of_two_sites_interrupted(store, tmp_path, monkeypatch):
    grid = {"TopK": {"k": 4}, "JumpReLU": {"sparsity": 0.1}, "Crosscoder": {"k": 4, "layers": 2}}
    stop_in_the_middle(monkeypatch, 11)  # two JumpReLUs take two calls a step
    with pytest.raises(KeyboardInterrupt):
        sl.sweep(grid, store, CONFIG, d_sae=64, path=tmp_path)
    resumed = sl.sweep(grid, Store(store.path, len(store)), CONFIG, d_sae=64, path=tmp_path)
    unbroken = sl.sweep(grid, store, CONFIG, d_sae=64)
    assert all(same(a, b) for a, b in zip(resumed.coders, unbroken.coders, strict=True))
    assert {f"site={site.key}" in f.name for f in tmp_path.iterdir() for site in (A, B)} == {True, False}


@pytest.mark.parametrize("stop", [stop_reading, stop_in_the_middle])
def test_interrupted_without_a_path(stop, data, monkeypatch):
    """Every coder is left as a training of so many steps leaves it: in raw units, usable, able to train on."""
    config = sl.TrainConfig(**{**SMALL, "steps": 40, "warmup": 0.0, "lr": 1e-2})
    coders, lone = make_list(), make_list()
    stop(monkeypatch, 30)
    with pytest.raises(KeyboardInterrupt):
        sl.sweep(coders, data, config)
    monkeypatch.undo()
    for number, (coder, other) in enumerate(zip(coders, lone, strict=True)):
        taken = 31 if stop is stop_in_the_middle and number < 2 else 30

        def interrupt(event, taken=taken):
            if event.kind == "step" and event.step == taken:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sl.train(other, data, config, callbacks=[interrupt])
        assert same(coder, other) and coder.in_raw_units and coder.scratch is None
        x_hat = coder.train()(data).x_hat.detach()
        assert (x_hat - data).pow(2).sum() < 0.7 * (data - data.mean(0)).pow(2).sum()
    first = [run.history[0]["fvu"] for run in sl.sweep(coders, data, CONFIG).runs]
    assert max(first) < 0.7, "they train on from where they are"


@pytest.mark.parametrize("path", [None, "sweep"])
def test_interrupted_while_calibrating(path, data, tmp_path, monkeypatch, reads):
    """The second coder is being calibrated; those behind it are trained, and no less usable than it."""
    path = path and tmp_path / path
    coders = make_list()
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(coders[1], "calibrate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sl.sweep(coders, data, CONFIG, path=path)
    unbroken = sl.sweep(make_list(), data, CONFIG).coders
    for coder, other in zip(coders, unbroken, strict=True):
        assert coder.in_raw_units and coder.scratch is None, type(coder).__name__
        assert all(torch.equal(a, b) for a, b in zip(coder.parameters(), other.parameters(), strict=True))
    if path:  # training itself was done: it is not done again
        reads.clear()
        again = sl.sweep(make_list(), data, CONFIG, path=path)
        assert all(same(a, b) for a, b in zip(again.coders, unbroken, strict=True))
        assert not reads


def test_another_sweep_is_refused(data, tmp_path):
    sl.sweep({"TopK": {"k": [2, 4]}}, data, CONFIG, d_sae=WIDTH, path=tmp_path)
    files = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    for rows, config, words in (
        (data, sl.TrainConfig(**{**SMALL, "lr": 1e-3}), "config lr: 0.003 there, 0.001 now"),
        (data + 1, CONFIG, "data: '.*-2000' there, '.*-2000' now"),
    ):
        with pytest.raises(ValueError, match=f"holds another run; it differs in {words}.*Pass another path="):
            sl.sweep({"TopK": {"k": [2, 4]}}, rows, config, d_sae=WIDTH, path=tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == files


def test_a_coder_that_fails_leaves_the_others_usable(data, monkeypatch):
    """NaN in the rows of a late step: every coder keeps its last good weights, in raw units."""
    rows = data.repeat(5, 1)  # the start looks at 4096 rows, fewer than these
    order = Rows(torch.arange(float(len(rows)))[:, None])
    late = int(order.batch(70, 64).x[5])
    rows[late] = float("nan")
    coders = make_list()
    with pytest.raises(ValueError, match=r"step 70: the activations hold NaN or Inf \(row 5 of the batch\)"):
        sl.sweep(coders, rows, sl.TrainConfig(**{**SMALL, "steps": 71, "log_every": 10}))
    for coder in coders:
        assert coder.in_raw_units
        x_hat = coder.train()(data).x_hat.detach()
        assert (x_hat - data).pow(2).sum() < 0.7 * (data - data.mean(0)).pow(2).sum()
