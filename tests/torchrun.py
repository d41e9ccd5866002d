"""Starts a test's own file in several ranks of torchrun's engine, torch.distributed's elastic agent.

The agent forks the ranks from one process that has imported everything once: torchrun's command would have each rank of
each life import it again, which takes longer than all their work. ``test_ranks.py`` and ``docs/test_pages.py`` start
the command itself.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
SECONDS = 900  # all jobs of a file together take one or two minutes; on a busy machine many times that


class Job(NamedTuple):
    """``enter(*arguments)`` of the file, in so many ranks; killed ranks are started again so many times."""

    arguments: tuple
    logs: Path
    ranks: int = 2
    restarts: int = 0


def launch(file, jobs):
    """Do the jobs one after the other, one thread a rank."""
    module = ".".join(Path(file).relative_to(TESTS).with_suffix("").parts)
    told = json.dumps([module, [[list(map(str, j.arguments)), str(j.logs), j.ranks, j.restarts] for j in jobs]])
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, __file__, told], env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=SECONDS, capture_output=True, text=True,
    )  # fmt: skip
    said = [(f, f.read_text()[-3000:]) for job in jobs for f in sorted(job.logs.rglob("stderr.log"))]
    assert done.returncode == 0, "\n".join(f"{f}: {text}" for f, text in said) + done.stderr[-3000:]


def start(enter, arguments, logs, ranks, restarts):
    """One job, from this process."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    Path(logs).mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=restarts, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="fork", monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )  # fmt: skip
    elastic_launch(config, enter)(*arguments)


def said(logs, rank):
    """What a rank wrote to stderr."""
    return "".join(file.read_text() for file in sorted(Path(logs).rglob(f"attempt_*/{rank}/stderr.log")))


if __name__ == "__main__":
    name, jobs = json.loads(sys.argv[1])
    module = importlib.import_module(name)
    module.ready()  # imports what a rank needs
    for job in jobs:
        start(module.enter, *job)
