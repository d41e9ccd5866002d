"""The main calls on a device that is not the CPU: ``calls.py``, in a process of its own, since torch knows a device
as long as a process lives."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_main_calls_run_on_a_pretend_accelerator():
    command = [sys.executable, "-m", "pytest", str(HERE / "calls.py"), "-q", "-p", "no:cacheprovider", "--tb=short"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
