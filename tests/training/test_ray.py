"""The script of the docs' page in Ray Train's TorchTrainer, on this machine: what one process gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae_lab as sl

pytest.importorskip("ray.train.torch", reason="Ray comes with the server's packages")
TESTS = Path(__file__).parents[1]
SECONDS = 500  # Ray takes a minute to start on two cores

TRAIN = """
import os, signal, sys
from pathlib import Path
import torch
import sae_lab as sl

def coder():
    return sl.TopK(16, 64, k=4)

def rows():
    return 7 * sl.worlds.planted(n=40, d=16, l0=3, samples=500).x + 3

CONFIG = sl.TrainConfig(steps=20, batch_size=64, checkpoint_every=5)

def main(config):
    torch.set_num_threads(1)
    folder = Path(config["folder"])

    def die(event):
        if event.kind == "step" and event.step == 13 and os.environ["RANK"] == "1" and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    run = sl.train(coder(), rows(), CONFIG, path=folder / "run", callbacks=[die])
    (folder / f"rank-{os.environ['RANK']}").write_text(str(torch.distributed.get_backend()))
"""
IN_RAY = """
import sys
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from train import main

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
TorchTrainer(
    main,
    train_loop_config={"folder": sys.argv[1]},
    scaling_config=ScalingConfig(num_workers=2, use_gpu=False, resources_per_worker={"CPU": 1}),
    run_config=RunConfig(failure_config=FailureConfig(max_failures=1), storage_path=sys.argv[1] + "/ray"),
).fit()
"""


def test_the_script_in_ray_goes_on_after_a_worker_was_killed(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "in_ray.py").write_text(IN_RAY)
    path = os.pathsep.join([str(tmp_path), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "in_ray.py", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "died").exists()
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["gloo"] * 2
    scope = {}
    exec(TRAIN, scope)
    sae = scope["coder"]()
    sl.train(sae, scope["rows"](), scope["CONFIG"])
    for name, t in load_file(tmp_path / "run" / "sae.safetensors").items():
        assert torch.allclose(t, sae.state_dict()[name], rtol=1e-4, atol=1e-4 * float(t.abs().max())), name
