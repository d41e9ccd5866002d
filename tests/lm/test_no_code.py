"""Nothing in the folder of a model or of a dataset is run, and nobody is asked whether to."""

import builtins
import json
import sys

import pytest
import transformers

import sae_lab as sl
from sae_lab import cache
from sae_lab.lm import bundled

CODE = """
open({ran!r}, "w").write("x")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    return None
"""
REFUSED = "sae_lab runs no code that comes with a model or a dataset, and .* cannot be loaded without its own: read"
AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    """A complete model with code beside it, which leaves a mark if it runs."""
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("evil.py", "tokenizer.py", "model.py", "generate.py"):
        (folder / name).write_text(CODE.format(ran=str(tmp_path / "ran")))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    yield folder
    assert asked == []
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_folder_of_an_unknown_kind(folder):
    change(folder / "config.json", model_type="evil", auto_map=AUTO)
    with pytest.raises(ValueError, match=REFUSED):
        sl.LM(str(folder))


def test_a_known_kind_with_a_map_to_code_loads_without_it(folder):
    change(folder / "config.json", auto_map=AUTO)
    assert type(sl.LM(str(folder))._module) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("name", ["evil.Tokenizer", "someone/else--evil.Tokenizer"])
def test_a_tokenizer_with_code(folder, name):
    change(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map={"AutoTokenizer": [None, name]})
    with pytest.raises(ValueError, match=REFUSED):
        sl.LM(str(folder))


def test_generation_with_code(folder):
    change(folder / "generation_config.json", custom_generate=str(folder))
    sl.LM(str(folder)).generate("the", max_new_tokens=2)


def test_attention_from_elsewhere(folder):
    """A kernel of the hub is code too."""
    change(folder / "config.json", attn_implementation="someone/kernel", _attn_implementation="someone/kernel")
    with pytest.raises(ValueError, match=REFUSED):
        sl.LM(str(folder))


def test_a_folder_of_documents_with_a_script(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.py").write_text((folder / "evil.py").read_text())
    with pytest.raises(ValueError, match="must hold files of one kind"):
        sl.load_text(str(data))
    (data / "a.jsonl").write_text('{"text": "a document"}\n' * 3)
    (data / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data.py\n---\n")
    assert sl.load_text(str(data)).name == "data"


@pytest.mark.parametrize("call", [sl.LM, sl.load_text])
def test_who_asks_for_it_is_told(call):
    with pytest.raises(ValueError, match="sae_lab never sets trust_remote_code: load"):
        call("any/thing", trust_remote_code=True)


@pytest.mark.parametrize("kwargs", [{}, {"remote": True}, {"model": "any/thing"}])
def test_and_at_once(kwargs, monkeypatch):
    """Not after a minute in which the bundled model is converted, or seconds in which the hub is asked."""
    asked = []
    monkeypatch.setattr(bundled, "folder", lambda: asked.append("bundled") or bundled.HUB_ID)
    monkeypatch.setattr(cache, "hub_answers", lambda: asked.append("hub"))
    with pytest.raises(ValueError, match="sae_lab never sets trust_remote_code: load"):
        sl.LM(**kwargs, trust_remote_code=True)
    assert not asked
