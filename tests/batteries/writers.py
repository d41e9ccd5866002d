"""Every writer of the library, on tiny random models, each as one call that a process forked from this one makes.

``Writers(folder)`` makes what they need, in children too: the process that forks starts no threads.
"""

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)

# What each child would import anew, as far as it starts no thread (datasets starts one).
import matplotlib.pyplot  # noqa: E402, F401
import transformers as tf  # noqa: E402
from tiny_models import tokenizer  # noqa: E402

import sae_lab as sl  # noqa: E402
import sae_lab.feature_index  # noqa: E402
import sae_lab.plots  # noqa: E402
import sae_lab.training  # noqa: E402
import sae_lab.widgets  # noqa: E402

SITE = sl.Site("resid_post", 1)
TEXT = [" ".join(f"{a}{b}" for b in ["the", "cat", "sat", "on", "a", "mat"]) for a in "abcdefghijklmnopqrstuvwxyz" * 3]
STEPS = 24
RUN_ID = re.compile(rb'"run": "[0-9a-f]{32}"|"checksum": "[0-9a-f]{8}"')  # the checksum is of the id too


def in_child(call: Callable[[], object], kill_after: float | None = None) -> tuple[int, str, float]:
    """(exit code, what an error said, seconds) of a forked process that makes the call; -9 where it was killed."""
    told, tell = os.pipe()
    begin, pid = time.perf_counter(), os.fork()
    if pid == 0:
        os.close(told)
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            call()
            code = 0
        except BaseException as err:
            os.write(tell, f"{type(err).__name__}: {err}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(tell)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # its zombie stays until it is waited for: the number is still its own
    with os.fdopen(told, "rb") as said:
        words = said.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), words, time.perf_counter() - begin


def tree(path: Path) -> dict[str, str]:
    """What lies at a path, hidden files and folders too: names and contents. The id of a run, which every run draws
    anew, is left out."""
    files = [path, *sorted(path.rglob("*"))] if path.exists() else []
    return {str(f.relative_to(path)): _content(f) for f in files if f != path or f.is_file()}


def _content(file: Path) -> str:
    return hashlib.sha256(RUN_ID.sub(b"", file.read_bytes())).hexdigest() if file.is_file() else "folder"


class Writers:
    """Names of writers and their calls, path -> None: each writes a file or a folder at the path."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        tokens = tokenizer()
        config = tf.LlamaConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        self.module = tf.LlamaForCausalLM(config).eval()
        self.lm = sl.LM(self.module, tokenizer=tokens, device="cpu")
        self.x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(1))
        self.made = folder
        for name, make in (("store", self.harvest), ("coder", self._coder), ("index", self.index)):
            code, words, _ = in_child(lambda name=name, make=make: make(folder / name))
            assert code == 0, f"{name}: {words}"
        self.calls: dict[str, Callable[[Path], object]] = {
            "harvest": self.harvest,
            "train TopK": lambda path: self._train(path, sl.TopK(32, 64, k=4), "k", 8),
            "train BatchTopK": lambda path: self._train(path, sl.BatchTopK(32, 64, k=4), "lr", 1e-4),
            "train JumpReLU": lambda path: self._train(path, sl.JumpReLU(32, 64, sparsity=0.5), "sparsity", 0.9),
            "index": self.index,
            "sweep": self._sweep,
            "save": lambda path: self.coder().save(path),
            "export saelens": lambda path: self.coder().save(path, format="saelens"),
            "export sparsify": lambda path: self.coder().save(path, format="sparsify"),
            "export dictionary_learning": lambda path: self.coder().save(path, format="dictionary_learning"),
        }
        self.files: dict[str, Callable[[Path], object]] = {
            "session": self._session, "to_html": self._page, "figure": self._figure,
        }  # fmt: skip

    def harvest(self, path: Path) -> sl.Store:
        return sl.harvest(self.lm, SITE, TEXT, tokens=9000, path=path, context=64)

    def store(self) -> sl.Store:
        return sl.Store(self.made / "store")

    def coder(self) -> sl.TopK:
        return sl.load(self.made / "coder")

    def _coder(self, path: Path) -> None:
        sl.train(sl.TopK(32, 256, k=8), self.store(), sl.TrainConfig(steps=5, batch_size=256), path=path)

    def index(self, path: Path) -> None:
        sl.index_features(self.coder(), self.lm, self.store(), path=path)

    def _train(self, path: Path, coder: sl.TopK, what: str, new: float) -> None:
        """With a change that the monitor's screen could have made. 64 features are few: lr's default is large."""
        config = sl.TrainConfig(steps=STEPS, batch_size=128, lr=1e-3, checkpoint_every=3)
        old = config.lr if what == "lr" else coder.config[what]
        sl.train(coder, self.x, config, path=path, changes=[{"step": 10, "what": what, "old": old, "new": new}])

    def _sweep(self, path: Path) -> None:
        config = sl.TrainConfig(steps=8, batch_size=128, checkpoint_every=3)
        sl.sweep({"TopK": {"k": [2, 4]}, "JumpReLU": {"sparsity": [0.5]}}, self.x, config, d_sae=64, path=path)

    def _session(self, path: Path) -> None:
        session = sl.Session(notes="n" * 20_000)
        session.edits.add(sl.Steer(self.coder(), 3, strength=2.0))
        session.save(path)

    def _page(self, path: Path) -> None:
        sl.TokenFeatures(self.lm, self.coder(), "the cat sat").to_html(path)

    def _figure(self, path: Path) -> None:
        run = sl.train(sl.TopK(32, 64, k=4), self.x, sl.TrainConfig(steps=5, batch_size=128))
        sl.plot(run).savefig(path, format="svg")
