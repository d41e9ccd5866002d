"""sl.estimate: what it says is what is then written, and nothing of the user's is touched. What depends on the machine
is not asserted: the clock here ticks a second each time it is read."""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset

import sae_lab as sl
from sae_lab import costs
from sae_lab.activations import sharding
from sae_lab.feature_index import build
from sae_lab.lm.text import Text
from sae_lab.training import costing, estimating
from sae_lab.training.checkpoint import CHECKPOINT
from sae_lab.types import Batch, Site

A, B = Site("resid_post", 1), Site("mlp_out", 0)
CONFIG = sl.TrainConfig(steps=40, batch_size=64, checkpoint_every=10)
HARVEST = {"context": 32}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(sharding, "SHARD_TOKENS", 256)
    monkeypatch.setattr(sharding, "FORWARD_TOKENS", 128)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that is a second later each time."""
    monkeypatch.setattr(costs, "now", itertools.count().__next__)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_lm, small_text):
    return sl.harvest(tiny_lm, A, small_text, 2000, path=tmp_path_factory.mktemp("estimating") / "store", **HARVEST)


@pytest.fixture
def coder():
    return sl.TopK(48, 256, k=4)


@pytest.fixture(scope="module")
def trained(store):
    coder = sl.BatchTopK(48, 256, k=4)
    sl.train(coder, store, CONFIG)
    return coder


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def most_on_disk(folder, monkeypatch, work):
    """(the result of work, the most bytes that were in the folder at any moment)."""
    seen, put = [], os.replace

    def replace(source, target):
        seen.append(size(folder))  # the new file is whole, the old one still there
        put(source, target)

    monkeypatch.setattr(os, "replace", replace)
    result = work()
    return result, max([*seen, size(folder)])


def near(estimated, true):
    return true / 1.5 <= estimated <= 1.5 * true


def contents(folder):
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.is_file() and f.read_bytes()) for f in folder.rglob("*")
    }


def weights(coder):
    return {name: t.numpy().tobytes() for name, t in coder.state_dict().items()}


# ---------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize(("sites", "tokens"), [(A, 500), ([A, B], 1200), (A, 100_000)])
def test_a_harvest_writes_what_was_said(tiny_lm, small_text, tmp_path, small_shards, sites, tokens):
    call = (tiny_lm, sites, small_text, tokens)
    said = sl.estimate(sl.harvest, *call, path=tmp_path / "a", **HARVEST)
    store = sl.harvest(*call, path=tmp_path / "a", **HARVEST)
    assert near(said.disk, size(tmp_path / "a"))
    rows = sum(shard["rows"] for shard in store.manifest["shards"])  # 100,000 are more than the text has
    # Whole shards are told of as if all were like the first; here, of 256 to 384 tokens in passes of up to 128.
    assert said.parts["tokens to harvest"] == pytest.approx(rows, rel=0.2)


def test_a_training_writes_what_was_said(store, coder, tmp_path, monkeypatch):
    said = sl.estimate(sl.train, coder, store, CONFIG, path=tmp_path / "run")
    _, most = most_on_disk(tmp_path, monkeypatch, lambda: sl.train(coder, store, CONFIG, path=tmp_path / "run"))
    assert near(said.disk, most)
    assert near(said.parts["MB that stay on disk"] * 1e6, size(tmp_path / "run"))
    assert sl.estimate(sl.train, sl.TopK(48, 256, k=4), store, CONFIG).disk == 0  # the control: no path


def test_an_index_writes_what_was_said(trained, tiny_lm, store, tmp_path, monkeypatch):
    call = (trained, tiny_lm, store, tmp_path / "index")
    monkeypatch.setattr(build, "BLOCK", 512)
    said = sl.estimate(sl.index_features, *call)
    index, most = most_on_disk(tmp_path, monkeypatch, lambda: sl.index_features(*call))
    assert near(said.disk, most)
    assert near(said.parts["MB that stay on disk"] * 1e6, size(tmp_path / "index"))
    assert near(said.parts["L0"], index.counts.sum() / len(store))


# ---------------------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("arguments", [{}, {"pack": True}, {"mask": sl.TokenMask(skip_first=False)}])
@pytest.mark.parametrize("with_path", [True, False])
def test_a_store_that_is_there_costs_nothing(tiny_lm, small_text, tmp_path, small_shards, arguments, with_path):
    arguments = HARVEST | arguments | ({"path": tmp_path} if with_path else {})
    store = sl.harvest(tiny_lm, B, small_text, 700, **arguments)
    said = sl.estimate(sl.harvest, tiny_lm, B, small_text, 700, **arguments)
    assert (said.minutes, said.disk, said.ram) == (0, 0, 0)
    assert str(store.path) in repr(said)
    other = sl.estimate(sl.harvest, tiny_lm, B, small_text, 700, **arguments | {"path": tmp_path / "other"})
    assert other.disk > 0


def test_of_a_store_only_the_missing_part_costs(tiny_lm, small_text, tmp_path, small_shards):
    sl.harvest(tiny_lm, A, small_text, 600, path=tmp_path, **HARVEST)
    before = size(tmp_path)
    said = sl.estimate(sl.harvest, tiny_lm, A, small_text, 1800, path=tmp_path, **HARVEST)
    sl.harvest(tiny_lm, A, small_text, 1800, path=tmp_path, **HARVEST)
    assert near(said.disk, size(tmp_path) - before)
    sl.harvest(tiny_lm, A, small_text, 100_000, path=tmp_path, **HARVEST)  # the text's end
    assert sl.estimate(sl.harvest, tiny_lm, A, small_text, 100_000, path=tmp_path, **HARVEST).disk == 0
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.stat().st_size
    shard.write_bytes(b"damaged")
    assert near(sl.estimate(sl.harvest, tiny_lm, A, small_text, 100_000, path=tmp_path, **HARVEST).disk, whole)


def test_a_finished_training_costs_nothing(store, coder, tmp_path):
    sl.train(coder, store, CONFIG, path=tmp_path)
    for again in (coder, sl.TopK(48, 256, k=4)):
        said = sl.estimate(sl.train, again, store, CONFIG, path=tmp_path)
        assert (said.minutes, said.disk, said.ram) == (0, 0, 0)
        assert "finished" in repr(said)


def test_of_an_interrupted_training_only_the_rest_costs(store, coder, tmp_path, ticking):
    config = sl.TrainConfig(steps=400, batch_size=64, checkpoint_every=100)
    whole = sl.estimate(sl.train, coder, store, config, path=tmp_path / "run")

    def stop(event):
        if event.step == 300:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        sl.train(sl.TopK(48, 256, k=4), store, config, path=tmp_path / "run", callbacks=[stop])
    rest = sl.estimate(sl.train, coder, store, config, path=tmp_path / "run")
    # Two hundred steps were kept, at a second each, and two checkpoints.
    assert (whole.minutes - rest.minutes) * 60 == pytest.approx(202)


def test_an_index_that_is_there_costs_nothing(trained, tiny_lm, store, tmp_path):
    for path in (None, tmp_path):
        sl.index_features(trained, tiny_lm, store, path)
        said = sl.estimate(sl.index_features, trained, tiny_lm, store, path)
        assert (said.minutes, said.disk, said.ram) == (0, 0, 0)


def test_of_an_interrupted_index_only_the_rest_costs(trained, tiny_lm, store, tmp_path, ticking, monkeypatch):
    monkeypatch.setattr(build, "BLOCK", 100)
    whole = sl.estimate(sl.index_features, trained, tiny_lm, store, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sl.index_features(trained, tiny_lm, store, tmp_path)
    rest = sl.estimate(sl.index_features, trained, tiny_lm, store, tmp_path)
    assert (whole.minutes - rest.minutes) * 60 == pytest.approx(20)  # a second a block
    assert near(whole.disk - rest.disk, size(tmp_path))


# ---------------------------------------------------------------------------------------------- nothing is touched


def test_nothing_is_touched(tiny_lm, small_text, store, tmp_path, cache_folder, capsys):
    coder = sl.BatchTopK(48, 256, k=4)
    sl.train(coder, store, CONFIG)
    coder.train()
    torch.manual_seed(1), np.random.seed(1)  # Python's own is left out: beartype draws from it

    def state():
        facts = (coder.training, coder.meta, coder.in_raw_units, coder.scratch, coder.progress)
        return {
            "weights": weights(coder), "facts": facts, "gradients": [p.grad for p in coder.parameters()],
            "store": contents(store.path), "cache": [contents(cache_folder / k) for k in ("stores", "indexes")],
            "torch": torch.get_rng_state().tolist(), "numpy": str(np.random.get_state()),
        }  # fmt: skip

    before = state()
    capsys.readouterr()
    sl.estimate(sl.harvest, tiny_lm, [A, B], small_text, 900, **HARVEST)
    sl.estimate(sl.harvest, tiny_lm, A, small_text, 900, path=tmp_path / "none", **HARVEST)
    sl.estimate(sl.harvest, tiny_lm, A, small_text, 4000, path=store.path, **HARVEST)
    sl.estimate(sl.train, coder, store, CONFIG, path=tmp_path / "none")
    sl.estimate(sl.index_features, coder, tiny_lm, store)
    sl.estimate(sl.index_features, coder, tiny_lm, store, path=tmp_path / "none")
    after = state()
    assert [name for name in after if after[name] != before[name]] == []
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")  # no bar of the probe, as if it were the work


def test_an_interrupted_training_is_not_touched(store, coder, tmp_path):
    def stop(event):
        if event.step == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.train(coder, store, CONFIG, path=tmp_path, callbacks=[stop])
    before = weights(coder), contents(tmp_path)
    assert (tmp_path / CHECKPOINT).exists()
    sl.estimate(sl.train, coder, store, CONFIG, path=tmp_path)
    assert (weights(coder), contents(tmp_path)) == before


def test_callbacks_are_not_called(store, coder):
    called = []
    sl.estimate(sl.train, coder, store, CONFIG, callbacks=[called.append])
    assert called == []


# ---------------------------------------------------------------------------------------------- time and memory


def test_minutes_of_a_harvest_grow_with_tokens(tiny_lm, small_text, ticking, small_shards):
    many = sl.load_text([small_text[i % len(small_text)] for i in range(600)])
    few, more, all_of_it = (
        sl.estimate(sl.harvest, tiny_lm, A, many, tokens, **HARVEST) for tokens in (20_000, 40_000, 10**7)
    )
    assert all_of_it.parts["tokens to harvest"] < 10**6  # the text ends
    for longer in (more, all_of_it):
        tokens = longer.parts["tokens to harvest"] - few.parts["tokens to harvest"]
        # Tokenizing is a second for every hundred documents more.
        seconds = tokens / few.parts["tokens per second"]
        assert (longer.minutes - few.minutes) * 60 == pytest.approx(seconds, abs=5)


def test_minutes_of_a_training_grow_with_steps(store, coder, ticking):
    few, more = (
        sl.estimate(sl.train, coder, store, sl.TrainConfig(steps=steps, batch_size=64)) for steps in (1000, 3000)
    )
    assert (more.minutes - few.minutes) * 60 == pytest.approx(2000)  # a second a step


def test_minutes_of_an_index_grow_with_rows(tiny_lm, store, trained, ticking, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BLOCK", 100)
    half = sl.Store(store.path, 1000, A)
    few, more = (sl.estimate(sl.index_features, trained, tiny_lm, rows, path=tmp_path) for rows in (half, store))
    # Ten blocks, a second each for coding, for placing, for sorting by feature and for the codes by row; and the pairs
    # that meet, which are few here.
    assert (more.minutes - few.minutes) * 60 == pytest.approx(40, abs=0.1)


def test_a_slow_model_is_probed_with_one_pass(tiny_lm, small_text, small_shards, tmp_path, monkeypatch):
    slow, fast = ([], [])
    for passes, seconds in ((slow, 100.0), (fast, 0.01)):
        clock = itertools.count(0, seconds)
        monkeypatch.setattr(costs, "now", clock.__next__)
        run = tiny_lm.run

        def counted(batch, *args, run=run, passes=passes, **kwargs):
            passes.append(int(batch.mask.sum()))
            return run(batch, *args, **kwargs)

        monkeypatch.setattr(tiny_lm, "run", counted)
        # A path of its own: what another test has harvested of this text need not be harvested again.
        said = sl.estimate(sl.harvest, tiny_lm, A, small_text, 3000, path=tmp_path / "store", **HARVEST)
        monkeypatch.setattr(tiny_lm, "run", run)
        assert said.disk == pytest.approx(3000 * said.parts["bytes per token"], rel=0.2)
    assert len(slow[2:]) == 1 and sum(fast[2:-1]) < 256 <= sum(fast[2:])  # two of one context go before; a shard


def test_a_stream_is_estimated_too(tiny_lm, small_text):
    stream = Text(Dataset.from_dict({"text": list(small_text)}).to_iterable_dataset(), "text", "stream", "0")
    said = sl.estimate(sl.harvest, tiny_lm, A, stream, 10**6, **HARVEST)
    assert said.parts["tokens to harvest"] >= 10**6  # nobody knows where it ends


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells less")
def test_the_peak_is_seen():
    with costs.peak() as peak:
        for _ in range(3):  # one at a time
            block = torch.ones(50_000_000)
            del block
    assert 190e6 < peak.ram < 230e6
    with costs.peak() as nothing:
        torch.ones(1000)
    assert nothing.ram < 20e6


MEMORY = """
import sys, torch
import sae_lab as sl
from sae_lab import costs
coder = eval(sys.argv[1])
x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
config = sl.TrainConfig(steps=40, batch_size=1024, lr=0.01)  # L1 gets sparse in these
if sys.argv[2] == "said":
    print(sl.estimate(sl.train, coder, x, config).ram)
else:
    with costs.peak() as peak:
        sl.train(coder, x, config)
    print(peak.ram)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells less")
@pytest.mark.parametrize("coder", ["sl.TopK(64, 8192, k=16)", "sl.L1(64, 4096, sparsity=100.0)"])
def test_memory_is_near_what_training_takes(coder):
    # In processes of their own: what was taken and given back before would be taken again, and not be seen as new.
    commands = [[sys.executable, "-c", MEMORY, coder, which] for which in ("said", "true")]
    said, true = (int(subprocess.run(c, check=True, stdout=subprocess.PIPE, text=True).stdout) for c in commands)
    assert near(said, true)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_vram_is_near_what_training_takes(store):
    coder = sl.BatchTopK(48, 16_384, k=8).cuda()
    said = sl.estimate(sl.train, coder, store, CONFIG)
    with costs.peak() as peak:
        sl.train(coder, store, CONFIG)
    assert near(said.vram, peak.vram)


# ---------------------------------------------------------------------------------------------- coders and data


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: sl.L1(16, 40, sparsity=0.1), torch.randn(600, 16)),
        (lambda: sl.JumpReLU(16, 40, sparsity=0.1), torch.randn(600, 16)),
        (lambda: sl.Gated(16, 40, sparsity=0.1), torch.randn(600, 16)),
        (lambda: sl.VQ(16, 40), torch.randn(600, 16)),
        (lambda: sl.Matryoshka(16, 40, k=4), torch.randn(600, 16)),
        (lambda: sl.Transcoder(16, 40, k=4, d_out=12), Batch(torch.randn(600, 16), torch.randn(600, 12))),
        (lambda: sl.Crosscoder(8, 40, k=4, layers=2), torch.randn(600, 2, 8)),
        (lambda: sl.TopK(16, 40, k=4), torch.randn(3, 16)),  # too few to reserve any
    ],
)
def test_any_coder_and_data(make, data):
    said = sl.estimate(sl.train, make(), data, sl.TrainConfig(steps=2, batch_size=32))
    assert said.minutes > 0 and said.disk == 0


def test_dead_features_are_told_of(store, coder):
    config = sl.TrainConfig(steps=40, batch_size=64, dead_after=640)
    assert "minutes if a tenth of the features die" in sl.estimate(sl.train, coder, store, config).parts
    without = sl.L1(48, 256, sparsity=0.1)  # nothing revives its features
    assert "minutes if a tenth of the features die" not in sl.estimate(sl.train, without, store, config).parts


def test_a_coder_without_k_is_calibrated_as_sparse_as_it_will_be(store, monkeypatch):
    seen = []
    monkeypatch.setattr(costing, "TRIAL_SECONDS", 600)  # all of the small steps, however busy the machine is
    calibrate = sl.L1.calibrate
    monkeypatch.setattr(sl.L1, "calibrate", lambda *args: seen.append(calibrate(*args)) or seen[-1])
    config = sl.TrainConfig(steps=200, batch_size=512, lr=0.01)
    sl.estimate(sl.train, sl.L1(48, 512, sparsity=3.0), store, config)
    sl.train(sl.L1(48, 512, sparsity=3.0), store, config)
    assert near(seen[0]["l0"], seen[1]["l0"])
    assert seen[0]["l0"] < 75
    fresh = sl.L1(48, 512, sparsity=0.1)
    assert fresh.calibrate([next(store.blocks())[1]])["l0"] > 150  # the control: as it begins


# ---------------------------------------------------------------------------------------------- what it refuses


def test_wrong_arguments_are_the_calls_own(tiny_lm, small_text, store, coder, tmp_path):
    with pytest.raises(TypeError, match="missing a required argument: 'text'"):
        sl.estimate(sl.harvest, tiny_lm, A)
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'steps'"):
        sl.estimate(sl.train, coder, store, CONFIG, steps=3)
    with pytest.raises(TypeError, match="too many positional"):
        sl.estimate(sl.train, coder, store, CONFIG, tmp_path)  # path= has a name
    with pytest.raises(ValueError, match="tokens >= 1"):
        sl.estimate(sl.harvest, tiny_lm, A, small_text, tokens=0)
    with pytest.raises(ValueError, match="harvest needs tokens >= 1 and context >= 2"):
        sl.estimate(sl.harvest, tiny_lm, A, small_text, context=1)
    with pytest.raises(ValueError, match="less than one context"):
        sl.estimate(sl.harvest, tiny_lm, A, ["Too short."])
    with pytest.raises(ValueError, match="holds another harvest; it differs in sites"):
        sl.estimate(sl.harvest, tiny_lm, B, small_text, path=store.path, **HARVEST)
    with pytest.raises(ValueError, match="the coder reads d_in=50"):
        sl.estimate(sl.train, sl.TopK(50, 60, k=4), store, CONFIG)
    with pytest.raises(ValueError, match="the coder reads d_in=50"):
        sl.estimate(sl.index_features, sl.TopK(50, 60, k=4), tiny_lm, store)
    with pytest.raises(ValueError, match="no inference threshold"):
        sl.estimate(sl.index_features, sl.BatchTopK(48, 60, k=4), tiny_lm, store)
    sl.train(coder, store, CONFIG, path=tmp_path)
    with pytest.raises(ValueError, match="holds another run; it differs in config steps"):
        sl.estimate(sl.train, coder, store, sl.TrainConfig(steps=41, batch_size=64, checkpoint_every=10), path=tmp_path)


def test_other_functions_are_refused(tiny_lm):
    with pytest.raises(ValueError, match=r"knows sl.harvest, sl.train, sl.index_features,.* got features: pass one"):
        sl.estimate(sl.features, tiny_lm)


def test_it_prints_as_a_table():
    said = estimating.Estimate("train", 150.0, 2_500_000_000, 31_000_000, 0, "3 steps", {"tokens per second": 12_345.6})
    assert repr(said).splitlines() == [
        "train: 3 steps",
        "  time               150 min (2.5 h)",
        "  disk               2.5 GB",
        "  RAM                31.0 MB above what is in use now",
        "  VRAM               0 MB",
        "  tokens per second  12,346",
    ]
    with pytest.raises(AttributeError):
        said.minutes = 3.0


# ---------------------------------------------------------------------------------------------- several processes


def test_ranks_divide_a_harvest(tiny_lm, small_text, tmp_path, small_shards, ticking):
    """Whole rounds of shards, the first of which makes one; disk and what is read are the same."""
    call = (tiny_lm, A, small_text, 1500)
    one, eight = (sl.estimate(sl.harvest, *call, ranks=n, path=tmp_path / "x", **HARVEST) for n in (1, 8))
    assert eight.disk == one.disk and eight.parts["tokens to harvest"] == one.parts["tokens to harvest"]
    assert eight.parts["tokens per second"] == pytest.approx(8 * one.parts["tokens per second"])
    assert eight.minutes < one.minutes
    assert eight.parts["ranks"] == 8 and "ranks" not in one.parts
    assert re.search(r"ranks +8", repr(eight))


def test_ranks_divide_a_streamed_training(tiny_lm, small_text, small_shards, coder, ticking):
    """A rank takes its rows of each batch, and its model reads its share; it sends gradients and rows to the others."""
    stream = sl.Stream(tiny_lm, A, small_text, buffer=512, context=32)
    found = [sl.estimate(sl.train, coder, stream, CONFIG, ranks=n) for n in (1, 4)]
    parameters = sum(p.numel() for p in coder.parameters())
    sent = 0.75 * (2 * 4 * parameters + 2 * 48 * CONFIG.batch_size) / 1e6
    assert found[1].parts["MB that a rank sends in a step"] == pytest.approx(sent)
    assert "MB that a rank sends in a step" not in found[0].parts
    assert found[1].parts["minutes of the model"] < found[0].parts["minutes of the model"]


@pytest.mark.parametrize(
    ("config", "ranks", "words"),
    [
        ({"batch_size": 63}, 2, "batch_size must be a multiple of the 2 ranks that share it, got 63: try 64"),
        ({"shard": "features"}, 2, "estimate with ranks=2 knows shard='batch', got 'features': time a few real steps"),
        ({}, 0, "ranks must be at least 1, got 0"),
    ],
)
def test_ranks_that_cannot_be(config, ranks, words, store, coder):
    with pytest.raises(ValueError, match=words):
        sl.estimate(sl.train, coder, store, sl.TrainConfig(**{"steps": 4, "batch_size": 64} | config), ranks=ranks)


def test_ranks_are_of_a_harvest_or_a_training(trained, tiny_lm, store, tmp_path):
    with pytest.raises(ValueError, match=r"ranks= is for sl\.harvest and sl\.train, got ranks=2 for index_features"):
        sl.estimate(sl.index_features, trained, tiny_lm, store, tmp_path / "index", ranks=2)
