"""sl.harvest by several processes: the store of one process, byte for byte.

torchrun's engine runs ``work`` and ``killed`` below in several ranks; tests compare what they leave with what one
process makes here.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import tiny_models
import torch
from torchrun import Job, launch, said

import sae_lab as sl
from sae_lab.activations import dealing, sharding

A, B = sl.Site("resid_post", 0), sl.Site("mlp_out", 1)
RANKS = 3
WHOLE = 10**6  # more tokens than the text has
# name: (sites, tokens). Their shards are of 256 to 384 tokens, so that 3 ranks have several rounds.
CASES = {"whole": (A, WHOLE), "part": (A, 1500), "one shard": (A, 100), "two sites": ([A, B], 1100)}


def small(patch):
    """Many small shards, of short passes."""
    patch.setattr(sharding, "SHARD_TOKENS", 256)
    patch.setattr(sharding, "FORWARD_TOKENS", 128)


def model():
    return sl.LM(tiny_models.build("llama"), tokenizer=tiny_models.tokenizer(), device="cpu")


def text():
    return sl.load_text([document[: 250 + 20 * number] for number, document in enumerate(sl.load_text()[:18])])


def coder():
    sae = sl.TopK(48, 96, k=4)
    sae.reads = sae.writes = (A,)
    return sae


def harvest(lm, sites, tokens, path, **kwargs):
    return sl.harvest(lm, sites, kwargs.pop("text", None) or text(), tokens, path=path, context=32, **kwargs)


def damage(folder, number=2):
    file = folder / f"{number:06d}.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"...")


# ---------------------------------------------------------------------------------------------- in a rank


def ready():
    model().tokenize("a")
    text()


def enter(what, folder, *arguments):
    torch.set_num_threads(1)
    small(pytest.MonkeyPatch())
    {"work": work, "killed": killed}[what](Path(folder), *arguments)


def work(folder: Path) -> None:
    rank, lm, told = int(os.environ["RANK"]), model(), {"refused": {}, "tokens": {}}
    for name, (sites, tokens) in CASES.items():
        told["tokens"][name] = len(harvest(lm, sites, tokens, folder / name))
    for name in ("of one, then whole", "damaged"):  # a test has put them there
        harvest(lm, A, WHOLE if name != "damaged" else 700, folder / name)
    harvest(lm, A, 600, folder / "codes", coder=coder())
    again, here = harvest(lm, A, WHOLE, folder / "whole"), os.getcwd()
    told["opened"] = len(again)
    os.chdir(folder / f"node-{rank}")
    dealing.SEEN = 0.5
    nan = model()
    with torch.no_grad():
        nan._module.model.layers[0].mlp.down_proj.weight.mul_(float("nan") if rank == 1 else 1)
    for name, call in {
        "text": lambda: harvest(lm, A, 600, folder / "x", text=[f"rank {rank}" * 50]),
        "tokens": lambda: harvest(lm, A, 600 + rank, folder / "x"),
        "folder": lambda: harvest(lm, A, 600, folder / f"x{rank}"),
        "another": lambda: harvest(lm, B, 600, folder / "whole"),
        "not shared": lambda: harvest(lm, A, 600, "store"),
        "not finite": lambda: _harvest_broken(nan, lm, folder / "broken"),
        "short": lambda: harvest(lm, A, 600, folder / "short", text=["a"]),
    }.items():
        try:
            call()
            told["refused"][name] = "nothing"
        except ValueError as err:
            told["refused"][name] = str(err)
    os.chdir(here)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def _harvest_broken(broken, lm, path):
    """The model of the second rank gives NaN; it says that it is the same model as the others."""
    broken.fingerprint, broken.id = lm.fingerprint, lm.id
    harvest(broken, A, 1500, path)


def killed(folder: Path, which: str) -> None:
    """In its first life one rank is killed while it makes its third shard."""
    first, doomed = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", os.environ["RANK"] == which
    read, seen = sharding.Harvest.read, []

    def dying(self, passes):
        seen.append(passes)
        if first and doomed and len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, passes)

    sharding.Harvest.read = dying
    harvest(model(), A, WHOLE, folder / "store")
    (folder / f"made-{os.environ['RANK']}").write_text(str(len(seen)))


# ---------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of each case."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        lm = model()
        for name, (sites, tokens) in CASES.items():
            harvest(lm, sites, tokens, folder / name)
        harvest(lm, A, 600, folder / "codes", coder=coder())
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, alone):
    """What three ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    for rank in range(RANKS):
        (folder / f"node-{rank}").mkdir()
    shutil.copytree(alone / "part", folder / "of one, then whole")
    shutil.copytree(alone / "part", folder / "damaged")
    damage(folder / "damaged")
    jobs = [Job(("work", folder), folder / "logs", RANKS)]
    for rank in "01":
        (folder / f"killed-{rank}").mkdir()
        jobs.append(Job(("killed", folder / f"killed-{rank}", rank), folder / f"logs-{rank}", restarts=1))
    launch(__file__, jobs)
    return folder


@pytest.fixture(scope="module")
def told(folder):
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(RANKS)]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("there", "here"),
    [*((name, name) for name in [*CASES, "codes"]), ("of one, then whole", "whole"), ("damaged", "part")],
)
def test_the_store_is_that_of_one_process_byte_for_byte(there, here, folder, alone):
    assert contents(folder / there) == contents(alone / here)


def test_there_was_work_for_all(told, alone):
    shards = {name: len(list((alone / name).glob("*.safetensors"))) for name in CASES}
    assert shards["whole"] > 3 * RANKS and shards["one shard"] == 1 and 2 < shards["part"] < shards["whole"]
    assert told[0]["tokens"] == told[1]["tokens"] == told[2]["tokens"]
    assert told[0]["tokens"]["part"] == 1500 and told[0]["opened"] == told[0]["tokens"]["whole"] > 1500


def test_one_process_goes_on_where_ranks_stopped(folder, alone, tmp_path, monkeypatch):
    small(monkeypatch)
    shutil.copytree(folder / "part", tmp_path / "store")
    harvest(model(), A, WHOLE, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(alone / "whole")


@pytest.mark.parametrize("doomed", [0, 1])
def test_a_rank_is_killed_and_torchrun_starts_all_again(doomed, folder, alone):
    left = folder / f"killed-{doomed}"
    assert contents(left / "store") == contents(alone / "whole")
    made = sum(int((left / f"made-{rank}").read_text()) for rank in (0, 1))
    assert made < len(list((alone / "whole").glob("*.safetensors"))), "the second life went on from the first's shards"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "text",
            "rank 1 and rank 0 harvest with different settings: text_fingerprint: .* Every rank must run the same",
        ),
        ("tokens", "rank 1 and rank 0 harvest with different settings: tokens: 600 there, 601 now"),
        ("folder", "rank 1 and rank 0 harvest with different settings: folder: "),
        ("another", "whole holds another harvest; it differs in sites: "),
        (
            "not shared",
            "rank 1 does not see the files that rank 0 writes to store: pass path= on a file system that all",
        ),
        ("not finite", "activations at .* are not finite .*: load the model in float32"),
        ("short", "the text holds . tokens, less than one context of 32: pass more text"),
    ],
)
def test_what_is_refused_on_every_rank(case, words, told):
    for rank in told:
        assert re.search(words, rank["refused"][case]), rank["refused"][case]
    if case == "not finite":
        assert "rank 1 failed, and all ranks stop" in told[0]["refused"][case]


def test_a_failure_leaves_what_was_whole(folder, alone):
    """Of the ranks' first round the shard before the broken one is kept, and one process goes on from there."""
    found = json.loads((folder / "broken" / "manifest.json").read_text())["shards"]
    assert len(found) == 2 and found == json.loads((alone / "whole" / "manifest.json").read_text())["shards"][:2]


def test_only_the_first_rank_shows_progress(folder):
    first, second = (said(folder / "logs", rank) for rank in (0, 1))
    assert "harvest resid_post-0" in first and "harvest resid_post-0" not in second
