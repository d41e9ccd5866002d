"""The tutorial on remote models, cell by cell against the server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.remote
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "07_remote.ipynb"


def test_the_remote_notebook(server):
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=300", "-q",
         "-p", "no:cacheprovider", "-o", "addopts=", str(NOTEBOOK)],
        capture_output=True, text=True, timeout=600, cwd=NOTEBOOK.parents[1],
        env=os.environ | {"NDIF_HOST": server.url, "HF_ENDPOINT": server.hub},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:]
