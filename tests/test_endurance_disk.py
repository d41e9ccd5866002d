"""The fast parts of two batteries: kills and full disks. One process makes what they need once, and starts no threads
before it forks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CALLS = {
    "kills": "kills.run(False, moments=2, writers=writers)",
    "full disks": "full_disk.run(False, sizes=1, writers=writers)",
    "full disks, another seed, without mounts": "full_disk.run(False, 1, 1, mounts=False, writers=writers)",
}
CODE = f"""
import json, tempfile
from pathlib import Path
from batteries import full_disk, kills
from batteries.writers import Writers
with tempfile.TemporaryDirectory() as folder:
    writers = Writers(Path(folder) / "made")
    print(json.dumps({{{", ".join(f"{name!r}: {call}" for name, call in CALLS.items())}}}))
"""


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    # A machine that is busy with other work may need many minutes.
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_lost(found, name):
    counts = dict(found[name])
    assert counts.pop("bad") == [] and counts.pop("tries") >= 10
    assert not any(counts.values()), counts
