"""The cache folder: where it is, what is in it, clearing it, files that appear whole or not at all."""

import errno
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sae_lab as sl
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


def test_clearing_deletes_links_and_not_what_they_point_to(root, tmp_path):
    """The tests' own cache links to the converted model: a test that clears the cache must not delete that."""
    put(tmp_path / "elsewhere" / "weights", 10)
    (root / "models" / "m").mkdir(parents=True)
    (root / "models" / "m" / "weights").symlink_to(tmp_path / "elsewhere" / "weights")
    (root / "models" / "whole").symlink_to(tmp_path / "elsewhere")
    sl.cache.clear()
    assert list((root / "models").iterdir()) == []
    assert os.listdir(tmp_path / "elsewhere") == ["weights"]


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
        assert not path.exists() and temporary.parent.parent == tmp_path
    assert path.read_bytes() == b"first"
    with pytest.raises(RuntimeError), cache.atomic(path) as temporary:
        temporary.write_bytes(b"half of the sec")
        raise RuntimeError
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["result.bin"]


def modes(folder):
    return {oct(f.stat().st_mode & 0o777) for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_and_folders_have_the_mode_that_the_umask_says(tmp_path, umask):
    coder = sl.TopK(8, 16, k=2)
    before = os.umask(umask)
    try:
        coder.save(tmp_path / "new" / "coder")
        coder.save(tmp_path / "new" / "coder")  # over what is there
        coder.save(tmp_path / "new" / "theirs", format="dictionary_learning")
        with cache.atomic(tmp_path / "new" / "tensors") as temporary:
            save_file({"a": torch.zeros(3)}, temporary)  # which makes files with mode 0600
        with cache.sole_writer(tmp_path / "new" / "folder"):
            pass
    finally:
        os.umask(before)
    assert modes(tmp_path) == {oct(0o666 & ~umask)} and len(list(tmp_path.rglob("*.*"))) == 4
    folders = [tmp_path / "new", *(f for f in (tmp_path / "new").iterdir() if f.is_dir())]
    assert {f.stat().st_mode & 0o777 for f in folders} == {0o777 & ~umask}


def test_files_that_come_together(tmp_path):
    folder = tmp_path / "export"
    with cache.together(folder, valid="weights") as temporary:
        (temporary / "weights").write_text("1")
        (temporary / "config").write_text("1")
        assert not folder.exists()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(RuntimeError), cache.together(folder, valid="weights") as temporary:
        (temporary / "config").write_text("2")
        raise RuntimeError
    assert {f.name: f.read_text() for f in folder.iterdir()} == {"weights": "1", "config": "1", "mine.txt": "mine"}
    with cache.together(folder, valid="weights") as temporary:
        (temporary / "weights").write_text("2")
        (temporary / "config").write_text("2")
        assert (folder / "config").read_text() == "1"
    assert {f.name: f.read_text() for f in folder.iterdir()} == {"weights": "2", "config": "2", "mine.txt": "mine"}
    assert os.listdir(tmp_path) == ["export"]


def test_new_files_never_stand_beside_old_ones_that_pass_for_theirs(tmp_path, monkeypatch):
    """A kill between two renames: here each rename in turn fails."""
    real = os.replace
    for fatal in range(3):
        folder = tmp_path / str(fatal)
        for content, names in (("1", "abc"), ("2", "abc")):
            calls = iter(range(9))

            def replace(*paths, calls=calls, content=content, fatal=fatal):
                if content == "2" and next(calls) == fatal:
                    raise KeyboardInterrupt
                real(*paths)

            monkeypatch.setattr(os, "replace", replace)
            try:
                with cache.together(folder, valid="b") as temporary:
                    for name in names:
                        (temporary / name).write_text(content)
            except KeyboardInterrupt:
                assert not (folder / "b").exists()
        assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_a_link_stays_a_link(tmp_path):
    put(tmp_path / "real", 3)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with cache.atomic(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("refused", [None, errno.EOPNOTSUPP, errno.EINVAL, "missing"])
def test_a_map_has_its_blocks_before_it_is_written(tmp_path, monkeypatch, refused):
    def refuse(*_):
        raise OSError(refused, "refused")

    if refused == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    elif refused:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    array = cache.mapped(tmp_path / "x.npy", np.float32, 1_000_000)
    assert not array.any() and (tmp_path / "x.npy").stat().st_blocks * 512 >= 4_000_000, "no holes"
    array[7] = 1.5
    array.flush()
    read = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert read.shape == (1_000_000,) and read.dtype == np.float32 and read[7] == 1.5 and read.sum() == 1.5


# ---- two writers on one path


HOLDS = """
import sys, time
from pathlib import Path
from sae_lab import cache
folder = Path(sys.argv[1])
with cache.sole_writer(folder), cache.atomic(folder / "file") as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
    temporary.write_text("whole")
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is in the middle of writing a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "d")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_writer_waits_for_the_first(tmp_path, holder, caplog):
    folder, seen = tmp_path / "d", []

    def second():
        with cache.sole_writer(folder):
            seen.append((folder / "file").read_text())

    thread = threading.Thread(target=second)
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not seen and list(folder.glob(".file.*.tmp"))
        holder.stdin.close()
        thread.join(30)
    assert seen == ["whole"] and "is writing into" in caplog.text
    assert os.listdir(folder) == ["file"] and holder.wait() == 0


def test_a_writer_of_the_same_file_disturbs_no_other(tmp_path, holder):
    with cache.atomic(tmp_path / "d" / "file") as temporary:
        temporary.write_text("second")
    assert (tmp_path / "d" / "file").read_text() == "second"
    holder.stdin.close()
    assert holder.wait() == 0 and (tmp_path / "d" / "file").read_text() == "whole"
    assert os.listdir(tmp_path / "d") == ["file"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, holder):
    folder = tmp_path / "d"
    holder.kill()
    holder.wait()
    assert list(folder.glob(".file.*.tmp")) and (folder / cache.LOCK).exists()
    (folder / ".tmpAbc123").write_bytes(b"half")  # as safetensors names its own
    (folder / ".tmpdir").mkdir()  # neither of them
    with cache.sole_writer(folder), cache.sole_writer(folder):  # the same thread may come again
        assert sorted(os.listdir(folder)) == [cache.LOCK, ".tmpdir"]
        cache.remove_leftovers(folder)
    assert os.listdir(folder) == [".tmpdir"]
    with cache.atomic(folder / "file") as temporary:
        temporary.write_text("whole")
    assert sorted(os.listdir(folder)) == [".tmpdir", "file"]


def test_the_cache_is_cleared_of_all_but_what_is_being_written(root, tmp_path, holder, caplog):
    (root / "stores").mkdir(parents=True)
    (root / "stores" / "s").symlink_to(tmp_path / "d", target_is_directory=True)
    put(root / "stores" / "other" / "shard", 1_000_000)
    with caplog.at_level(logging.WARNING):
        assert cache.clear() == 1.0
    assert "is being written: it stays" in caplog.text and os.listdir(root / "stores") == ["s"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with cache.sole_writer(tmp_path / "folder"):
        (tmp_path / "folder" / "file").write_text("x")
    assert "has no locks: let one process at a time write there" in caplog.text
    assert os.listdir(tmp_path / "folder") == ["file"]
