"""The block of docs/ndif.md on a real server, with the model that the server here has, its coder and fewer tokens."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.remote
PAGE = Path(__file__).resolve().parents[2] / "docs" / "ndif.md"


def test_the_block_of_the_page(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_LAB_DATA", str(tmp_path))
    [code] = re.findall(r'```python title="on NDIF"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    here = {
        '"meta-llama/Llama-3.1-8B", remote=True': f"remote={server.url!r}",
        '"llama_scope_lxr_8x", "l16r_8x"': '"smollm2-135m/resid_post-8"',
        "coder=sae)": f"coder=sae, tokens=200, path={str(tmp_path / 'store')!r})",
    }
    for there, ours in here.items():
        assert code.count(there) == 1, there
        code = code.replace(there, ours)
    scope = {}
    exec(code, scope)
    assert "coder" in scope["store"].identity
    assert scope["job"].result(60).shape[:2] == (2, 3)
