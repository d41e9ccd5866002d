"""sl.train over two processes of the real torchrun: the same coder as from one.

One torchrun runs this very file as its script (``work`` below) and leaves all it found in a folder; tests compare it
with what one process does here.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import sae_lab as sl
from sae_lab.activations.store import Rows
from sae_lab.training.checkpoint import CHECKPOINT
from sae_lab.training.ranks import Ranks

D_IN, D_SAE, Y, STEPS = 16, 64, 8, 20
SETTINGS = {"steps": STEPS, "batch_size": 64, "dead_after": 300, "checkpoint_every": 5}
# Sums over ranks are taken in another order. Measured after these steps: at most 6e-6 (JumpReLU), else below 1e-6.
CLOSE = 1e-4
FAMILIES = {
    "TopK": {"k": 4},
    "BatchTopK": {"k": 4, "multi": 2},
    "L1": {"sparsity": 0.5},
    "JumpReLU": {"sparsity": 0.1},
    "Matryoshka": {"k": 4},
    "Ordered": {"k": 4},
    "PAnneal": {"sparsity": 0.5},
    "SkipTranscoder": {"k": 4, "d_out": Y},
    "Crosscoder": {"k": 4, "layers": 2, "selection": "decoder_norms"},
}
BATCH = ["TopK", "BatchTopK", "L1", "Matryoshka", "Ordered", "SkipTranscoder", "Crosscoder"]
FEATURES = ["TopK", "BatchTopK", "L1", "JumpReLU", "SkipTranscoder"]
CASES = [("batch", name) for name in BATCH] + [("features", name) for name in FEATURES]


def config(**kwargs):
    return sl.TrainConfig(**{**SETTINGS, **kwargs})


def coder(name, seed=0, d_sae=D_SAE):
    """Some features start so low that they never fire: AuxK has something to do after 300 tokens."""
    sae = getattr(sl, name)(D_IN, d_sae, seed=seed, **FAMILIES.get(name, {}))
    if "k" in FAMILIES.get(name, {}):
        with torch.no_grad():
            sae.b_enc[: D_SAE // 3] -= 5.0  # most of them with the first of two ranks
    return sae


def data(name):
    """Far from norm √d and off the origin, so that scales and b_dec matter."""
    x = 7 * sl.worlds.planted(n=40, d=D_IN, l0=3, samples=2000).x + 3
    mix = torch.randn(D_IN, Y, generator=torch.Generator().manual_seed(1))
    target = 100 * (x @ mix / 20).relu() + 50
    return {"SkipTranscoder": sl.Batch(x, target), "Crosscoder": torch.stack([x, 100 * x - 700], 1)}.get(name, x)


# ---------------------------------------------------------------------------------------------- under torchrun


def work(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    told: dict[str, Any] = {"refused": {}}

    def leave(name, run):
        told[name] = {"history": run.history, "meta": run.coder.meta}
        weights = {n: t.contiguous() for n, t in run.coder.state_dict().items()}
        save_file(weights, folder / f"{name}-{rank}.safetensors")

    for shard, name in CASES:
        path = folder / f"{shard}-{name}"
        leave(path.name, sl.train(coder(name), data(name), config(shard=shard), path=path))
    told["group left"] = dist.is_initialized()
    leave("PAnneal", sl.train(coder("PAnneal"), data("PAnneal"), config()))
    with pytest.MonkeyPatch.context() as patch:  # the control: each rank chooses the largest of its own rows
        patch.setattr(Ranks, "choosing", lambda *_: nullcontext())
        leave("apart", sl.train(coder("BatchTopK"), data("BatchTopK"), config()))
    for shard in ("batch", "features"):
        _interrupt(rank, shard, folder, told, leave)
    _refuse(rank, told["refused"])
    dist.init_process_group("gloo")  # the script's own group is used, and left alone
    told["chosen"] = _choose(rank)
    leave("own-group", sl.train(coder("TopK"), data("TopK"), config()))
    told["own group left"] = dist.is_initialized()
    dist.destroy_process_group()
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def _interrupt(rank, shard, folder, told, leave):
    """Ctrl-C reaches the second rank alone, in the eighth step."""
    path, steps = folder / f"stopped-{shard}", []

    def press(event):
        steps.append((event.step, event.coder.d_sae))
        if (event.kind, event.step, rank) == ("step", 8, 1):
            os.kill(os.getpid(), signal.SIGINT)

    try:
        sl.train(coder("BatchTopK"), data("BatchTopK"), config(shard=shard), path=path, callbacks=[press])
        raise AssertionError("nothing stopped it")
    except KeyboardInterrupt:
        told[f"{path.name}-at"] = steps[-1]
    dist.destroy_process_group()  # as the end of the process does
    if rank == 0:
        shutil.copytree(path, folder / f"half-{shard}")
    for name in (path.name, f"{path.name}-again"):  # on from there, and opened when it is done
        run = sl.train(coder("BatchTopK"), data("BatchTopK"), config(shard=shard), path=path, callbacks=[press])
        leave(name, run)
    told[f"{path.name}-steps"] = [step for step, _ in steps]


def _refuse(rank, refused):
    x = data("TopK")
    for name, call in {
        "shard": lambda: config(shard="rows"),  # here no beartype speaks first
        "batch size": lambda: sl.train(coder("TopK"), x, config(batch_size=63)),
        "family": lambda: sl.train(sl.Hoyer(D_IN, D_SAE), x, config(shard="features")),
        "width": lambda: sl.train(coder("TopK", d_sae=63), x, config(shard="features")),
        "seed": lambda: sl.train(coder("TopK", seed=rank), x, config()),
        "data": lambda: sl.train(coder("TopK"), x + rank, config()),
        "config": lambda: sl.train(coder("TopK"), x, config(lr=1e-3 * (rank + 1))),
        "runs away": lambda: sl.train(coder("TopK"), x, config(lr=1e9)),
        "runs away in part": lambda: sl.train(coder("TopK"), x, config(lr=1e9, shard="features")),
    }.items():
        try:
            call()
            refused[name] = "nothing"
        except ValueError as err:
            refused[name] = str(err)
    dist.destroy_process_group()  # a run that failed leaves it


def matrices():
    """Rows for two ranks: all of the largest with the second, and many that are equal."""
    g = torch.Generator().manual_seed(0)
    skewed = torch.randn(80, 40, generator=g) + 9 * (torch.arange(80) >= 40)[:, None]
    return {"skewed": skewed, "equal": torch.randint(4, (80, 40), generator=g).float()}


N, K = 900, 9


def _choose(rank):
    """What this rank has of the largest of all."""
    by_rows, by_features = Ranks(rank, 2, "batch"), Ranks(rank, 2, "features")
    chosen = {}
    for name, pre in matrices().items():
        chosen[f"{name} rows"] = by_rows.of_batch(pre.chunk(2)[rank], N / len(pre)).dense().tolist()
        pre = pre.T
        chosen[f"{name} features"] = by_features.per_row(pre.chunk(2, 1)[rank], K).dense().tolist()
    return chosen


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    sys.exit()


# ---------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--redirects", "3", "--log-dir", str(folder / "logs"), __file__, str(folder)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True)
    logs = "\n".join(f.read_text()[-4000:] for f in (folder / "logs").rglob("stderr.log"))
    assert done.returncode == 0, logs
    return folder


@pytest.fixture(scope="module")
def told(folder):
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """A training in this one process, each family once."""
    runs = {}

    def train(name):
        if name not in runs:
            runs[name] = sl.train(coder(name), data(name), config())
        return runs[name]

    return train


def weights(folder, name, rank=0):
    return load_file(folder / f"{name}-{rank}.safetensors")


def apart(there, here):
    """The largest difference of any tensor, in units of that tensor's largest value."""
    assert there.keys() == here.keys()
    pairs = [(there[n].double(), here[n].double()) for n in here]
    assert all(bool(b.isfinite().all()) for _, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in pairs)


@pytest.mark.parametrize(("shard", "name"), CASES)
def test_two_ranks_train_what_one_does(shard, name, folder, told, alone):
    run, there = alone(name), told[0][f"{shard}-{name}"]
    assert apart(weights(folder, f"{shard}-{name}"), run.coder.state_dict()) < CLOSE
    assert len(there["history"]) == STEPS
    for row, mine in zip(there["history"], run.history, strict=True):
        assert row == pytest.approx(mine, rel=CLOSE)
    own = ("train", "id")  # the settings of each; a hash, which no rounding leaves close
    assert {k: v for k, v in there["meta"].items() if k not in own} == pytest.approx(
        {k: v for k, v in run.coder.meta.items() if k not in own}, rel=CLOSE
    )
    if "k" in FAMILIES[name]:
        assert "auxk" in run.history[-1] and 0.1 < run.history[-1]["dead"] < 0.9, "AuxK must have had work"


def test_all_ranks_end_with_the_same_coder_and_history(folder, told):
    for name in [f"{shard}-{name}" for shard, name in CASES] + ["PAnneal", "apart", "own-group"]:
        assert apart(weights(folder, name, 1), weights(folder, name)) == 0
        assert told[0][name] == told[1][name]


@pytest.mark.parametrize(("shard", "name"), CASES)
def test_the_first_rank_saves_an_ordinary_coder(shard, name, folder, told, alone):
    path = folder / f"{shard}-{name}"
    assert sorted(f.name for f in path.iterdir()) == ["config.json", "run.json", "sae.safetensors"]
    loaded, run = sl.load(path), alone(name)
    assert apart(loaded.state_dict(), weights(folder, path.name)) == 0
    x = data(name)
    x = (x.x if isinstance(x, sl.Batch) else x)[:200]
    f, mine = loaded.encode(x).detach(), run.coder.encode(x).detach()
    # Batches of other sizes are multiplied in another order, and a code at its threshold may then go either way.
    assert ((f - mine).abs() > CLOSE * mine.max()).sum() <= 2
    again = sl.train(coder(name), data(name), config(), path=path)
    assert again.history == told[0][path.name]["history"], "and a finished run"


def test_what_would_show_a_difference(folder, alone):
    """The control: BatchTopK whose ranks choose for themselves. PAnneal, whose weight goes by each rank's rows, is the
    one family here that is not the same; its ranks do not part."""
    assert apart(weights(folder, "apart"), alone("BatchTopK").coder.state_dict()) > 100 * CLOSE
    assert 10 * CLOSE < apart(weights(folder, "PAnneal"), alone("PAnneal").coder.state_dict()) < 0.1


@pytest.mark.parametrize("name", matrices())
def test_the_largest_of_all_ranks(name, told):
    pre = matrices()[name]
    by_rows = torch.cat([torch.tensor(t["chosen"][f"{name} rows"]) for t in told])
    by_features = torch.cat([torch.tensor(t["chosen"][f"{name} features"]) for t in told], 1)
    assert torch.equal(by_rows.flatten().topk(N).values, pre.flatten().topk(N).values)
    on = by_rows != 0
    assert on.sum() == N and torch.equal(by_rows[on], pre[on])
    if name == "skewed":
        assert not on[:40].any(), "the second rank had to offer more than its even share"
    pre = pre.T
    assert torch.equal(by_features.topk(K).values, pre.topk(K).values)
    on = by_features != 0
    assert bool((on.sum(1) == K).all()) and torch.equal(by_features[on], pre[on])


@pytest.mark.parametrize("shard", ["batch", "features"])
def test_ctrl_c_at_one_rank_stops_all_and_the_run_goes_on(shard, folder, told, tmp_path):
    name = f"stopped-{shard}"
    width = D_SAE if shard == "batch" else D_SAE // 2
    assert [t[f"{name}-at"] for t in told] == [[8, width]] * 2
    assert (folder / f"half-{shard}" / CHECKPOINT).exists()
    steps = told[0][f"{name}-steps"]
    assert steps[-2:] == [20, 20] and steps.count(0) == 1 and steps.count(9) == 1, "it went on where it was, once"
    for done in (name, f"{name}-again"):
        assert apart(weights(folder, done), weights(folder, f"{shard}-BatchTopK")) == 0
        assert told[0][done]["history"] == told[0][f"{shard}-BatchTopK"]["history"]


@pytest.mark.parametrize("shard", ["batch", "features"])
def test_a_run_goes_on_over_another_number_of_ranks(shard, folder, alone, tmp_path):
    shutil.copytree(folder / f"half-{shard}", tmp_path / "run")
    steps = []
    callbacks = [lambda e: steps.append(e.step)]
    run = sl.train(coder("BatchTopK"), data("BatchTopK"), config(), path=tmp_path / "run", callbacks=callbacks)
    assert steps[0] == 8 and apart(run.coder.state_dict(), alone("BatchTopK").coder.state_dict()) < CLOSE


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("shard", "shard must be one of batch, features, got 'rows'"),
        ("batch size", "batch_size must be a multiple of the 2 ranks that share it, got 63: try 64"),
        ("family", "shard='features' can divide TopK, BatchTopK, .*, got Hoyer: use shard='batch'"),
        ("width", "d_sae must be a multiple of the 2 ranks that hold features, got 63: try 64"),
        ("seed", "rank 1 and rank 0 train with different settings: coder seed: 0 there, 1 now; initial_weights"),
        ("data", "rank 1 and rank 0 train .* data: '.*' there, '.*' now. Every rank must run the same script, with fi"),
        ("config", "rank 1 and rank 0 train with different settings: config lr: 0.001 there, 0.002 now"),
        ("runs away", "step 1: the loss is not finite .*, so the weights ran away: lower lr"),
        ("runs away in part", "step 1: the loss is not finite .*, so the weights ran away: lower lr"),
    ],
)
def test_what_is_refused_on_every_rank(case, words, told):
    for rank in told:
        assert re.search(words, rank["refused"][case]), rank["refused"][case]


def test_the_process_group_is_left_as_it_was(told):
    assert [(t["group left"], t["own group left"]) for t in told] == [(False, True)] * 2


def test_only_the_first_rank_shows_progress(folder):
    first, second = (next((folder / "logs").rglob(f"{rank}/stderr.log")).read_text() for rank in (0, 1))
    assert "train TopK" in first and "train" not in second.replace("sl.train", "")


def test_shares_make_up_the_batch():
    rows = Rows(torch.arange(150.0)[:, None])  # 64 rows of it are nearly half a pass
    for step in range(5):
        shares = [Ranks(rank, 4, "batch").batch(rows, step, 64, seed=3).x for rank in range(4)]
        assert torch.equal(torch.cat(shares), rows.batch(step, 64, seed=3).x)
        assert torch.equal(Ranks(2, 4, "features").batch(rows, step, 64, seed=3).x, rows.batch(step, 64, seed=3).x)


def test_one_process_ignores_the_shard(alone):
    run = sl.train(coder("TopK"), data("TopK"), config(shard="features"))
    assert apart(run.coder.state_dict(), alone("TopK").coder.state_dict()) == 0
