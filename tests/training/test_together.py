"""Streams, sweeps and restarts over several processes: what one process gives.

torchrun's engine runs ``work`` and ``killed`` below in two ranks; tests compare what they leave with what one process
makes here.
"""

import json
import os
import re
import shutil
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torchrun import Job, launch

import sae_lab as sl
from sae_lab import processes
from sae_lab.activations import sharding

A, B = sl.Site("resid_post", 0), sl.Site("resid_post", 1)
HALF = 256  # rows of half a buffer here
BATCHES = 80  # that are compared: far more rows than the buffer has, and fewer than the text
SMALL = {"batch_size": 64, "lr": 3e-3, "checkpoint_every": 5, "dead_after": 500, "steps": 30}
CLOSE = 1e-4  # as in test_ranks.py: sums over ranks are taken in another order
GRID = {"TopK": {"k": [2, 4]}, "JumpReLU": {"sparsity": [0.1]}}
AIMED = sl.TrainConfig(steps=40, batch_size=64, target_l0=6.0)


def config(**kwargs):
    return sl.TrainConfig(**SMALL | kwargs)


def coder(seed=0):
    return sl.TopK(48, 96, k=4, seed=seed)


def model():
    return sl.LM(tiny_models.build("llama"), tokenizer=tiny_models.tokenizer(), device="cpu")


def text():
    return sl.load_text([document[: 500 + 20 * number] for number, document in enumerate(sl.load_text()[:18])])


def stream(lm, sites=A, **kwargs):
    return sl.Stream(lm, sites, text(), buffer=2 * HALF, context=32, **kwargs)


def rows():
    return 7 * sl.worlds.planted(n=40, d=48, l0=3, samples=1500).x + 3


def small(patch):
    """Many small shards, of short passes: the text does not lie whole in the start that stays in memory."""
    patch.setattr(sharding, "SHARD_TOKENS", 256)
    patch.setattr(sharding, "FORWARD_TOKENS", 128)


def leave(folder, name, trained, told, history):
    """What a rank, or one process, has made."""
    save_file({n: t.contiguous() for n, t in trained.state_dict().items()}, folder / f"{name}.safetensors")
    told[name] = {"history": history, "meta": trained.meta, "config": trained.config}


def leave_sweep(folder, name, found, told):
    for number, (sae, run) in enumerate(zip(found.coders, found.runs, strict=True)):
        assert run.coder is sae
        leave(folder, f"{name}-{number}", sae, told, run.history)
    told[f"{name} rows"] = [found.rows, found.tokens, found.held_out, [bool(run.reached) for run in found.runs]]


def sweeps(lm, folder, told, **kwargs):
    """The sweeps that are compared."""
    leave_sweep(folder, "grid", sl.sweep(GRID, rows(), config(), d_sae=96, **kwargs), told)
    leave_sweep(folder, "aimed", sl.sweep({"L1": {"sparsity": [0.5, 1.0]}}, rows(), AIMED, d_sae=96), told)
    leave_sweep(folder, "sites", sl.sweep({"TopK": {"k": [2]}}, stream(lm, [A, B]), config(), d_sae=96), told)


# ---------------------------------------------------------------------------------------------- in a rank


def ready():
    model().tokenize("a")
    text()
    coder()


def enter(what, folder):
    torch.set_num_threads(1)
    small(pytest.MonkeyPatch())
    {"work": work, "killed": killed}[what](Path(folder))


def work(folder: Path) -> None:
    rank, lm, told = int(os.environ["RANK"]), model(), {"refused": {}, "labels": []}
    mine = folder / f"rank-{rank}"
    read, run = [], sl.LM.run

    def counted(lm, batch, *args, **kwargs):
        read.append(int(batch.mask.sum()))
        return run(lm, batch, *args, **kwargs)

    sl.LM.run = counted
    one = stream(lm)
    with processes.peers() as peers, one.shared_by(peers):
        x = torch.cat([one.share(step, 64, 0, rank, 2).x for step in range(BATCHES)])
        one.rest()
    save_file({"x": x.contiguous()}, mine / "batches.safetensors")
    told["read"] = sum(read)
    for shard in ("batch", "features"):
        found = sl.train(coder(), stream(lm), config(shard=shard), path=folder / shard)
        leave(mine, shard, found.coder, told, found.history)
    _interrupt(rank, lm, folder, mine, told)
    sweeps(lm, mine, told, path=folder / "sweep", callbacks=[lambda e: told["labels"].append([e.label, e.kind])])
    leave_sweep(mine, "again", sl.sweep(GRID, rows(), config(), d_sae=96, path=folder / "sweep"), told)
    for name, call in {
        "kept": lambda: sl.train(coder(), stream(lm, keep="disk", path=folder / "kept"), config()),
        "kept sweep": lambda: sl.sweep(GRID, stream(lm, keep="disk", path=folder / "kept"), config(), d_sae=96),
        "text": lambda: sl.train(coder(), sl.Stream(lm, A, [f"{rank} a b c" * 90], context=32), config()),
        "seeds": lambda: sl.sweep({"TopK": {"k": [2, 4]}}, rows(), config(), d_sae=96, seeds=[rank]),
        "broken data": lambda: sl.sweep([coder(), coder(1)], _broken(rank), config()),
    }.items():
        try:
            call()
            told["refused"][name] = "nothing"
        except ValueError as err:
            told["refused"][name] = str(err)
    (mine / "told.json").write_text(json.dumps(told))


def _broken(rank):
    """Rows whose fingerprint is the same on both ranks, and which on the second hold NaN."""
    found = sl.Batch(rows(), rows(), None)
    return found if rank == 0 else sl.Batch(torch.full_like(found.x, torch.nan), found.target, None)


def _interrupt(rank, lm, folder, mine, told):
    """Ctrl-C reaches the second rank alone, in the twelfth step."""

    def press(event):
        if (event.kind, event.step, rank) == ("step", 12, 1):
            os.kill(os.getpid(), signal.SIGINT)

    try:
        sl.train(coder(), stream(lm), config(), path=folder / "stopped", callbacks=[press])
        raise AssertionError("nothing stopped it")
    except KeyboardInterrupt:
        torch.distributed.destroy_process_group()  # as the end of the process does
    if rank == 0:
        shutil.copytree(folder / "stopped", folder / "half")
    found = sl.train(coder(), stream(lm), config(), path=folder / "stopped")
    leave(mine, "stopped", found.coder, told, found.history)


def killed(folder: Path) -> None:
    """In its first life the second rank is killed in a training on rows, in its second life the first one on a
    stream. In the third all is done."""
    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    steps = []

    def die(at):
        def callback(event):
            steps.append(event.step)
            if (event.kind, event.step, rank, life) == ("step", 13, *at):
                os.kill(os.getpid(), signal.SIGKILL)

        return callback

    for name, data, at in (("rows", rows(), (1, 0)), ("stream", stream(model()), (0, 1))):
        found = sl.train(coder(), data, config(), path=folder / name, callbacks=[die(at)])
        leave(folder / f"rank-{rank}", name, found.coder, {}, found.history)
    (folder / f"rank-{rank}" / "steps.json").write_text(json.dumps([life, steps]))


# ---------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("together")
    for rank in (0, 1):
        (folder / f"rank-{rank}").mkdir()
        (folder / "killed" / f"rank-{rank}").mkdir(parents=True)
    killed = Job(("killed", folder / "killed"), folder / "logs-killed", restarts=2)
    launch(__file__, [Job(("work", folder), folder / "logs"), killed])
    return folder


@pytest.fixture(scope="module")
def told(folder):
    return [json.loads((folder / f"rank-{rank}" / "told.json").read_text()) for rank in (0, 1)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    small(monkeypatch)


def weights(file):
    return {name: t.numpy().tobytes() for name, t in load_file(file).items()}


def apart(there, here):
    """The largest difference of any tensor, in units of that tensor's largest value."""
    assert there.keys() == here.keys()
    pairs = [(there[n].double(), here[n].double()) for n in here]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in pairs)


def test_ranks_share_the_batches_of_one_process_bit_for_bit(folder):
    alone = stream(model())
    parts = [load_file(folder / f"rank-{rank}" / "batches.safetensors")["x"].split(32) for rank in (0, 1)]
    for step in range(BATCHES):
        assert torch.equal(torch.cat([parts[0][step], parts[1][step]]), alone.batch(step, 64).x)


def test_each_model_reads_its_share(told, monkeypatch):
    read, run = [], sl.LM.run

    def counted(lm, batch, *args, **kwargs):
        read.append(int(batch.mask.sum()))
        return run(lm, batch, *args, **kwargs)

    monkeypatch.setattr(sl.LM, "run", counted)
    alone = stream(model())
    for step in range(BATCHES):
        alone.batch(step, 64)
    alone.rest()
    for rank in told:  # a half, and up to four shards of 384 tokens that were read ahead
        assert rank["read"] < 0.5 * sum(read) + 4 * 384 < sum(read)


@pytest.mark.parametrize("shard", ["batch", "features"])
def test_a_stream_trains_what_one_process_does(shard, folder, told):
    sae = coder()
    run = sl.train(sae, stream(model()), config())
    assert apart(load_file(folder / "rank-0" / f"{shard}.safetensors"), sae.state_dict()) < CLOSE
    assert weights(folder / "rank-0" / f"{shard}.safetensors") == weights(folder / "rank-1" / f"{shard}.safetensors")
    for there, here in zip(told[0][shard]["history"], run.history, strict=True):
        assert there == pytest.approx(here, rel=CLOSE)
    assert sl.load(folder / shard).site == A and told[0][shard]["meta"]["mask"] == sae.meta["mask"]


def test_a_stopped_stream_goes_on(folder, told):
    for rank in (0, 1):
        assert weights(folder / f"rank-{rank}" / "stopped.safetensors") == weights(folder / "rank-0/batch.safetensors")
    assert told[0]["stopped"]["history"] == told[0]["batch"]["history"]


def test_one_process_goes_on_where_two_stopped(folder):
    sae, steps = coder(), []
    sl.train(sae, stream(model()), config(), path=folder / "half", callbacks=[lambda e: steps.append(e.step)])
    assert steps[0] == 12 and apart(load_file(folder / "rank-0/batch.safetensors"), sae.state_dict()) < CLOSE


def test_a_sweep_is_that_of_one_process_bit_for_bit(folder, told, tmp_path):
    here = {}
    sweeps(model(), tmp_path, here)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3 + 2 + 2
    here = json.loads(json.dumps(here))
    for rank in (0, 1):
        for file in files:
            assert weights(folder / f"rank-{rank}" / file.name) == weights(file), file.name
        assert {name: told[rank][name] for name in here} == here
    assert here["aimed rows"][3] == [True, True] and here["aimed-0"]["config"] != here["aimed-1"]["config"]


def test_a_sweep_is_dealt_and_is_opened_again(folder, told):
    labels = [{label for label, kind in rank["labels"] if kind == "start"} for rank in told]
    assert labels == [{"TopK k=2", "JumpReLU"}, {"TopK k=4"}]
    assert [told[0][f"again-{i}"] for i in range(3)] == [told[1][f"grid-{i}"] for i in range(3)]
    assert len(list((folder / "sweep").glob("*/sae.safetensors"))) == 3


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("kept", "keep='disk' needs one process, got 2: harvest a store first, which ranks do together, or leave keep"),
        ("kept sweep", "keep='disk' needs one process, got 2"),
        ("text", "rank 1 and rank 0 train with different settings: data: '.*-stream' there, '.*-stream' now"),
        ("seeds", "rank 1 and rank 0 sweep with different settings: TopK k=2 coder: "),
        ("broken data", "rank 1 and rank 0 sweep with different settings: TopK.* data: "),
    ],
)
def test_what_is_refused_on_every_rank(case, words, told):
    for rank in told:
        assert re.search(words, rank["refused"][case]), rank["refused"][case]


def test_ranks_are_killed_and_torchrun_goes_on_from_the_checkpoint(folder):
    """To the weights of an unbroken run of two ranks, bit for bit."""
    left = folder / "killed"
    for rank in (0, 1):
        life, steps = json.loads((left / f"rank-{rank}" / "steps.json").read_text())
        assert (life, steps[0]) == (2, 10), "the third life, from the checkpoint of step 10"
        assert weights(left / f"rank-{rank}" / "stream.safetensors") == weights(folder / "rank-0/batch.safetensors")
    sae = coder()
    sl.train(sae, rows(), config())
    assert apart(load_file(left / "rank-0" / "rows.safetensors"), sae.state_dict()) < CLOSE


# ---------------------------------------------------------------------------------------------- no engine


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 speaks of 2 processes, and MASTER_ADDR and MASTER_PORT must say where"),
        (
            {"WORLD_SIZE": "two"},
            "WORLD_SIZE must be the number of processes, got 'two': start the script with torchrun",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "2 processes were to meet at 127.0.0.1:1 within 0:00:01, and did not .*: start the script with torchrun",
        ),
    ],
)
def test_an_engine_that_is_not_there(said, words, monkeypatch, tiny_lm, small_text, tmp_path):
    """The environment speaks of several processes; nobody started the others."""
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    for name, value in {"RANK": "1", **said}.items():
        monkeypatch.setenv(name, value)
    for call in (
        lambda: sl.harvest(tiny_lm, A, small_text, 500, path=tmp_path / "store", context=32),
        lambda: sl.train(coder(), rows(), config()),
        lambda: sl.sweep(GRID, rows(), config(), d_sae=96),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_torch_that_knows_no_other_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"this PyTorch has no torch\.distributed: install one that has it, or unset"):
        sl.train(coder(), rows(), config())


def test_one_process_of_an_engine_works_alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.started() == 1 and sl.train(coder(), rows(), config(steps=2)).history


def test_processes_that_nobody_joined_are_warned_of(monkeypatch, caplog):
    """``srun --ntasks 4 python script.py``, without torchrun."""
    processes._warn_of_others.cache_clear()  # it warns once in a process
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert processes.started() == processes.started() == 1
    assert re.findall("SLURM_STEP_NUM_TASKS=4: several processes run this script.*torchrun", caplog.text)
    assert len(caplog.records) == 1
