"""The fast parts of two batteries: kills and full disks. Each in a process that starts no threads before it forks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "call", ["kills.run(False, moments=3)", "full_disk.run(False, sizes=1)", "full_disk.run(False, 1, 1, mounts=False)"]
)
def test_nothing_is_lost(call):
    code = f"import json; from batteries import full_disk, kills; print(json.dumps({call}))"
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("bad") == [] and found.pop("tries") >= 10
    assert not any(found.values()), found
