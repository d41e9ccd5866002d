"""Ray Train's TorchTrainer starts the ranks: harvest and training are those of one process, also after a rank died.

``python test_ray.py FOLDER`` is the job; the test compares what it leaves with what one process makes here.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

import sae_lab as sl
from sae_lab.activations import sharding

pytestmark = pytest.mark.remote
TESTS = Path(__file__).parents[1]
SHARD = 256  # tokens: several shards for each of two ranks
CLOSE = 1e-4  # as in test_ranks.py: sums over ranks are taken in another order
SECONDS = 600  # Ray starts in ten seconds; a busy machine takes many times that
CONFIG = sl.TrainConfig(steps=20, batch_size=64, lr=3e-3, checkpoint_every=5, log_every=1)


def work(folder: Path, killed: bool = False) -> sl.SparseCoder:
    """Harvest and train. killed: rank 1 dies once, in the middle of training."""
    torch.set_num_threads(1)
    sharding.SHARD_TOKENS = SHARD
    lm = sl.LM(tiny_models.build("llama"), tokenizer=tiny_models.tokenizer(), device="cpu")
    text = sl.load_text([document[:400] for document in list(sl.load_text())[:12]])
    store = sl.harvest(lm, "resid_post-0", text, tokens=1500, context=32, path=folder / "store")
    sae = sl.TopK(store.width, 96, k=4)

    def die_once(event):
        mark = folder / "died"
        if killed and event.step == 12 and torch.distributed.get_rank() == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return sl.train(sae, store, CONFIG, path=folder / "run", callbacks=[die_once]).coder


def job(folder: Path) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def main() -> None:
        work(folder, killed=True)  # whose coder Ray would not send: it refuses tensors

    ray.init(num_cpus=2, include_dashboard=False)
    TorchTrainer(
        main,
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=2)),
    ).fit()


def test_ray_starts_the_ranks_and_starts_them_again(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "HOME": str(tmp_path),  # Ray leaves a token there, which would lock the NDIF server's Ray
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(SECONDS),  # it is 30, too few on a busy machine
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, __file__, there]
    done = subprocess.run(command, env=env, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (there / "died").exists()
    monkeypatch.setattr(sharding, "SHARD_TOKENS", SHARD)
    alone = work(here)
    for shard in sorted((here / "store").glob("*.safetensors")):
        assert shard.read_bytes() == (there / "store" / shard.name).read_bytes(), shard.name
    found, wanted = sl.load(there / "run").state_dict(), alone.state_dict()
    for name, tensor in found.items():
        assert float((tensor - wanted[name]).abs().max() / wanted[name].abs().max().clamp_min(1e-9)) < CLOSE, name


if __name__ == "__main__":
    job(Path(sys.argv[1]))
