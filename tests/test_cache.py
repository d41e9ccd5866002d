"""The cache folder: where it is, what is in it, clearing it, files that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from sae_lab import cache


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("SAE_LAB_CACHE", "~/elsewhere")
    assert cache.root() == Path.home() / "elsewhere"
    monkeypatch.delenv("SAE_LAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.root() == Path("/xdg/sae_lab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.root() == Path.home() / ".cache" / "sae_lab"


def test_list_and_clear(root):
    assert len(cache.list()) == 0 and cache.clear() == 0
    put(root / "models" / "m" / "weights", 3_000_000)
    put(root / "stores" / "s" / "shard", 1_000_000)
    put(root / "stores" / "stray file", 500_000)
    put(root / "mine.txt", 10)
    listed = cache.list()
    assert [(e.kind, e.name, e.megabytes) for e in listed] == [
        ("models", "m", 3.0),
        ("stores", "s", 1.0),
        ("stores", "stray file", 0.5),
    ]
    assert "3 entries, 4.5 MB" in repr(listed) and "stores         1.0 MB  s" in repr(listed)
    with pytest.raises(ValueError, match="unknown kind of cache 'sae'; kinds: models, stores, indexes"):
        cache.clear("sae")
    assert cache.clear("stores") == 1.5
    assert [e.kind for e in cache.list()] == ["models"]
    assert cache.clear() == 3.0 and (root / "mine.txt").exists(), "only what sae_lab made is cleared"


def test_the_sessions_cache_only_links_to_the_model(cache_folder):
    """So that a test that clears the cache does not delete the converted model."""
    assert cache.root() == cache_folder
    assert all(f.is_symlink() for folder in (cache_folder / "models").glob("*") for f in folder.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    put(tmp_path / "file", 1)
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no/such")):
        with pytest.raises(ValueError, match=r"cannot write to the folder .*pass path= .*or set SAE_LAB_CACHE"):
            cache.make_folder(path)
    assert cache.make_folder(tmp_path / "a" / "b").is_dir()
    assert cache.make_folder(tmp_path / "a" / "b").is_dir(), "twice is fine"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.bin"
    with cache.atomic(path) as temporary:
        temporary.write_bytes(b"first")
        assert not path.exists() and temporary.parent == tmp_path
    assert path.read_bytes() == b"first"
    with pytest.raises(RuntimeError), cache.atomic(path) as temporary:
        temporary.write_bytes(b"half of the sec")
        raise RuntimeError
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["result.bin"]
