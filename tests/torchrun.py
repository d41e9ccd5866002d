"""Starts a test's own file as the script of a real torchrun."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
SECONDS = 400  # a run takes ten to forty; on a busy machine several times that


def launch(file, *arguments, ranks=2, restarts=0, logs, expect=0, env=()):
    """Run ``file`` in so many ranks, one thread each. Returns what each rank wrote to stderr in its last life."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), "--redirects", "3", "--log-dir", str(logs)]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*command, str(file), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | dict(env), timeout=SECONDS, capture_output=True,
    )  # fmt: skip
    said = [[f.read_text() for f in sorted(logs.rglob(f"attempt_*/{rank}/stderr.log"))] for rank in range(ranks)]
    assert done.returncode == expect, (
        "\n".join(lives[-1][-4000:] for lives in said if lives) + done.stderr.decode()[-2000:]
    )
    return [lives[-1] for lives in said]
