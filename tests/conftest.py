"""Shared fixtures: the bundled model, tiny random models of several architectures, a small text, a cache of its own.

    lm          the bundled model, sl.LM()
    tiny_lm     a tiny random Llama (3 layers, d=48) behind sl.LM: milliseconds a pass
    tiny        {name: tiny LM} of every architecture in ARCHITECTURES
    any_lm      the same, one test per architecture
    tokenizer   the bundled model's tokenizer, which the tiny models use too
    make_tiny   make_tiny(name, seed=0, **kwargs): a new tiny LM of one architecture (kwargs to sl.LM)
    make_module make_module(name, vocab=256, seed=0, **config): only the transformers model inside
    small_text  eighteen short documents of the bundled Wikipedia (about 4500 tokens), one of them held out

All of them live for the session: a test that changes a model makes its own.
"""

import signal
from pathlib import Path

import jaxtyping
import pytest
import runtime_checks
import torch

jaxtyping.jaxtyped = runtime_checks.jaxtyped  # before anything imports sae_lab

ARCHITECTURES = ("llama", "gpt2", "neox", "neox_serial", "gemma3", "qwen3", "olmo2")
LAYERS, HEADS, D, D_HEAD = 3, 4, 48, 12

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background of a shell: some tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The longest first.
LONG = (
    "test_pages.py", "test_zoo_on_text.py", "test_elsewhere.py", "test_endurance_disk.py", "test_zoo.py",
    "test_running.py", "test_choosing.py", "test_together.py", "test_ranks.py", "test_recipes.py", "test_loop.py",
    "test_grid.py", "test_quickstart_in_lab.py", "test_lab_bench_in_lab.py", "test_working_day.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files that take minutes come first: two processes then end at about the same time."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """A cache folder for this test session, in which the converted bundled model is already there.

    The model is converted, once, in the real cache; here stand links to its files, so that even ``sl.cache.clear()``
    in a test deletes nothing that took time to make.
    """
    from sae_lab.lm import bundled

    source = Path(bundled.folder())
    root = tmp_path_factory.mktemp("cache")
    if source.is_dir():
        mirror = root / "models" / source.name
        mirror.mkdir(parents=True)
        for file in source.iterdir():
            (mirror / file.name).symlink_to(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_LAB_CACHE", str(root))
        # What is made for a whole file of tests must not see the notes of whoever runs them.
        patch.setenv("SAE_LAB_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # silences a warning about forks
        yield root


@pytest.fixture(autouse=True)
def data_folder(tmp_path_factory, monkeypatch):
    """A folder of each test's own for notes: they follow a coder, and many tests share one."""
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("SAE_LAB_DATA", str(folder))
    return folder


@pytest.fixture(autouse=True)
def threads(request):
    """All threads for the bundled model, else one: small work is not worth sharing, and bit-equal runs need the same
    number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if "lm" in request.fixturenames else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lm():
    import sae_lab as sl

    return sl.LM()


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from sae_lab.lm import bundled

    return AutoTokenizer.from_pretrained(bundled.folder())


@pytest.fixture(scope="session")
def tiny(make_tiny):
    return {name: make_tiny(name) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def any_lm(request, tiny):
    return tiny[request.param]


@pytest.fixture(scope="session")
def tiny_lm(tiny):
    return tiny["llama"]


@pytest.fixture(scope="session")
def repeater(tokenizer):
    """A model that says again the token it read: on ``repeated`` an ablation costs about a nat, where one with random
    weights loses nothing."""
    import sae_lab as sl

    module = _make_module("llama", len(tokenizer))
    with torch.no_grad():
        embed = module.model.embed_tokens.weight
        module.lm_head.weight.copy_(embed / (2 * embed.norm(dim=1, keepdim=True)))
    return sl.LM(module, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def repeated():
    """Documents in which each word stands five times."""
    import sae_lab as sl

    words = [word for word in sl.load_text()[0].split() if word.isalpha()][:360]
    documents = [" ".join(word for word in words[i : i + 20] for _ in range(5)) for i in range(0, len(words), 20)]
    return sl.load_text(documents)


@pytest.fixture(scope="session")
def small_text():
    import sae_lab as sl

    return sl.load_text([document[:1200] for document in sl.load_text()[:18]])


@pytest.fixture(scope="session")
def make_module():
    return _make_module


@pytest.fixture(scope="session")
def make_tiny(tokenizer):
    import sae_lab as sl

    def make(name, seed=0, **kwargs):
        return sl.LM(_make_module(name, len(tokenizer), seed), tokenizer=tokenizer, **kwargs)

    return make


def _make_module(name, vocab=256, seed=0, **overrides):
    """The transformers model inside. Its weights are large and its norms' gains and biases random, so that every part
    of it matters: with the small weights of a usual initialisation a wrong site would go unnoticed."""
    import transformers as tf

    modern = {
        "vocab_size": vocab, "hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": 256, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    grouped = {**modern, "num_key_value_heads": 2}
    makers = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**grouped, **overrides})),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                **{"vocab_size": vocab, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256,
                   "bos_token_id": None, "eos_token_id": None, **overrides}
            )
        ),
        "neox": lambda: tf.GPTNeoXForCausalLM(
            tf.GPTNeoXConfig(**{**modern, "use_parallel_residual": True, **overrides})
        ),
        "neox_serial": lambda: tf.GPTNeoXForCausalLM(
            tf.GPTNeoXConfig(**{**modern, "use_parallel_residual": False, **overrides})
        ),
        # A width of the heads that is not hidden_size / heads, as in the real Gemma and Qwen models.
        "gemma3": lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(
                **{**grouped, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
                   "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"], **overrides}
            )
        ),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**grouped, "head_dim": 16, **overrides})),
        "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**{**grouped, **overrides})),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = makers[name]().eval()
        with torch.no_grad():
            for p in module.parameters():
                if p.dim() == 1:
                    p.add_(0.3 * torch.randn_like(p))
                else:
                    p.normal_(0, 1.0 if p.shape[0] == vocab else D**-0.5)
    return module
