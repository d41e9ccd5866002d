"""Arguments that cannot be right, for every public function: none is taken, and each refusal names its argument.

The tries come from signatures. ``RIGHT`` holds an argument of every name or kind; a public function that takes one it
does not know is a fault, so that a new function is tried too. One argument at a time is made wrong: a value whose kind
the annotation does not name, the value of the argument beside it, a number far out of range, a name with a letter
missing. A call that goes on for seconds has taken what it was given.
"""

import dataclasses
import inspect
import os
import random
import re
import signal
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch

TITLE = "bad arguments"
SECONDS = 5  # for a call that takes milliseconds, where it refuses
LONGEST = 300  # characters of a refusal
# What the library makes, and no caller.
MADE_HERE = {"Run", "Sweep", "FeatureIndex", "SparseCoder", "Games", "World", "Control", "Figure", "Report", "Notes",
             "Snapshot"}  # fmt: skip
# Methods that training, panels and traces call, no caller.
INSIDE = re.compile(
    r"SparseCoder\.(act|auxk|begin|loss|terms|reach|reusing|training_threshold|check_sparsity|get_parameter_or_buffer|"
    r"choose_sites|output|portable|write_of|feature|fit_threshold)|"
    r"\w+\.(set_state|shared_by|together|rule|writes|check|place|measured|error_of_another_run|pick)|"
    r"TokenMask\.\w+|Batch\.\w+|Net\.(in_batches|joined|places|grid|batched|run|gradient)"
)


class Try(NamedTuple):
    """One call with one wrong argument."""

    name: str
    argument: str
    value: str
    call: Callable[[], Any]


class TooLong(BaseException):
    """The call did not end: it took its argument."""


# ---- what is public


def public() -> Iterator[tuple[str, Callable[..., Any], type | None]]:
    """(name, function, the class whose method it is) of all that a caller can call with an argument."""
    from importlib import import_module

    import sae_lab as sl

    seen = set()
    names = ("circuits", "evals", "explain", "geometry", "saes", "worlds", "feature_index", "widgets")
    for room in [sl, *(import_module(f"sae_lab.{name}") for name in names)]:
        for name in getattr(room, "__all__", None) or [n for n in dir(room) if n[0] != "_"]:
            one = getattr(room, name)
            if not getattr(one, "__module__", "").startswith("sae_lab") or one in seen:
                continue
            seen.add(one)
            if inspect.isfunction(one):
                yield name, one, None
            elif inspect.isclass(one) and not issubclass(one, Exception) and not getattr(one, "_is_protocol", False):
                yield from _of_class(one, at_the_top=room is sl)


def _of_class(cls: type, at_the_top: bool) -> Iterator[tuple[str, Callable[..., Any], type | None]]:
    from sae_lab.saes import SparseCoder

    family = issubclass(cls, SparseCoder) and cls is not SparseCoder  # what a family adds serves training
    result = dataclasses.is_dataclass(cls) and not at_the_top  # the library makes results
    if cls.__name__ not in MADE_HERE and not result and not issubclass(cls, tuple) and "__init__" in vars(cls):
        yield cls.__name__, cls, None
    for name, member in vars(cls).items():
        method = getattr(member, "__func__", member)
        known = f"{cls.__name__}.{name}"
        mine = not family and (name[0] != "_" or name == "__getitem__") and inspect.isfunction(method)
        beside = getattr(method, "_from_screen", None) == "beside"  # gets a job, from the screen
        if mine and not beside and not INSIDE.fullmatch(known) and _is_first(cls, name):
            yield known, getattr(cls, name), cls


def _is_first(cls: type, name: str) -> bool:
    """Whether this is the first class that has the method."""
    return not any(name in vars(base) and base.__module__.startswith("sae_lab") for base in cls.__mro__[1:])


# ---- right arguments


class Things:
    """A tiny model, a coder trained on it, and what is made with them."""

    def __init__(self, folder: Path):
        import tiny_models

        import sae_lab as sl

        self.tokenizer = tiny_models.tokenizer()
        self.module = tiny_models.build("llama")
        self.lm = sl.LM(self.module, tokenizer=self.tokenizer, device="cpu")
        self.text = sl.load_text(["The quick brown fox jumps over the lazy dog. " * 3, "Pack my box. " * 5] * 8)
        self.site = sl.Site("resid_post", 1)
        self.store = sl.harvest(self.lm, self.site, self.text, tokens=600, path=folder / "store", context=64)
        self.stream = sl.Stream(self.lm, self.site, self.text, context=64, buffer=256)
        self.config = sl.TrainConfig(steps=5, batch_size=64)
        self.coder = sl.TopK(48, 64, k=4)
        self.run = sl.train(self.coder, self.store, self.config)
        self.index = sl.index_features(self.coder, self.lm, self.store, folder / "index")
        self.x = torch.randn(8, 48)
        self.edit = sl.Steer(self.coder, int(self.coder.f_scale.argmax()))
        self.reading = self.lm.read("a fox", self.site)
        self.vector = sl.Vector(torch.ones(48), self.site, f_scale=1.0)
        self.session = sl.Session()
        self.stack = self.session.edits
        self.world = sl.worlds.planted(16, 8, 2.0, samples=500)
        self.games = sl.worlds.othello(games=5)
        self.batch = self.lm.tokenize("a fox")
        self.found = sl.evals.reconstruction(self.coder, self.lm, self.text, tokens=100, context=32)
        self.explanation = sl.explain.Explanation("foxes")
        self.corpus = sl.explain.Corpus(self.index)
        self.passages = self.corpus.passages(self.edit.feature, "explain", 2, 2)
        self.sweep = sl.sweep([sl.TopK(48, 64, k=4)], self.store, self.config)
        self.folder = folder / "new"
        transcoder = sl.Transcoder(48, 64, k=4)
        transcoder.threshold.fill_(0.5)
        transcoder.reads, transcoder.writes = (sl.Site("mlp_in", 1),), (sl.Site("mlp_out", 1),)
        self.coders = sl.TranscoderSet([transcoder])
        self.graph = sl.circuits.trace(self.lm, self.coders, "a fox", features=5)
        self.groups = self.graph.groups(of={"a": self.graph.nodes[:1], "b": self.graph.nodes[1:2]})
        self.grouped = self.groups.grouped()
        self.node = sl.circuits.Node(self.site, 1, 1)
        self.net = sl.Net(torch.nn.Sequential(torch.nn.Linear(48, 48)))
        self.net.read(self.x, "0")
        self.own = {type(t).__name__: t for t in vars(self).values()} | {"Network": self.lm}
        self.by_name = {
            "model": self.module, "coder": self.coder, "sae": self.coder, "small": self.coder, "large": self.coder,
            "a": self.coder, "b": self.coder, "data": self.store, "d_in": 8, "d_sae": 64, "layers": 2, "k": 2,
            "vocab": 16, "kind": "resid_post", "site": self.site, "sites": self.site, "path": self.folder,
            "text": self.text, "texts": ["a fox", "a dog"], "against": ["a cat", "a cow"], "prompt": "a fox",
            "prompts": ["a fox"], "source": "a dog", "sources": ["a dog"],
            "answers": [" a", " b"], "x": self.x, "f": torch.zeros(2, 64),
            "codes": torch.zeros(8, 64), "scale": 2.0, "blocks": [self.x], "grid": [self.coder], "what": len,
            "directions": torch.randn(2, 48), "ids": [5, 6], "features": [1, 2], "feature": 1, "index": self.index,
            "metric": lambda x, tokens: x.sum(), "line": "fox", "html": "<p>", "name": "a", "points": np.zeros((64, 2)),
            "results": [(1.0, 2.0), (2.0, 1.0)], "words": ["a", "b"], "part": "explain",
            "tokenizer": self.tokenizer, "labels": [0, 1], "position": 1, "rows": slice(0, 2), "edit": self.edit,
            "activations": self.x.abs(), "other": "plain", "result": self.sweep,
            "positive": ["a fox"], "negative": ["a dog"], "direction": torch.ones(48), "vector": self.vector,
            "found": self.vector.to_dict(), "node": ("feature", 1, 1, 1),
        }  # fmt: skip

    def right(self, p: inspect.Parameter) -> Any:
        """An argument of the right kind; ``Things`` itself where none is known."""
        own = self.by_name.get(p.name, Things)
        protocols = [q for q in parts(p.annotation) if getattr(q, "_is_protocol", False)]
        if accepts(p.annotation) & {kind_of(own), "anything"} or isinstance(own, tuple(protocols)):
            return own
        for part in parts(p.annotation):
            named = part if isinstance(part, str) else getattr(get_origin(part) or part, "__name__", "")
            if named in self.own:
                return self.own[named]
        known = accepts(p.annotation)
        for value in (self.coder, self.lm, self.store, 1, 0.5, "a", True, None, ["a"], [1], self.x, self.edit, len, {}):
            if kind_of(value) in known:
                return value
        return Things


# ---- wrong ones


def parts(hint: Any) -> list[Any]:
    """What a union is one of; a quoted one is read by its names."""
    if isinstance(hint, str):
        return hint.split(" | ")
    if get_origin(hint) is typing.Annotated:
        return [get_args(hint)[0]]
    if get_origin(hint) in (typing.Union, types.UnionType):
        return [part for one in get_args(hint) for part in parts(one)]
    return [hint]


LISTS = (list, tuple, set, Sequence, Iterable, Iterator)
NAMED = {"str": "text", "int": "number", "float": "number", "bool": "truth", "None": "none", "Any": "anything"}


def accepts(hint: Any) -> set[str]:
    """The kinds of value (see ``kind_of``) that an annotation may mean. Lists take one of their items too."""
    found: set[str] = set()
    for part in parts(hint):
        origin, items = get_origin(part), get_args(part)
        if part is inspect.Parameter.empty or part is Any:
            found.add("anything")
        elif part is None or part is type(None):
            found.add("none")
        elif isinstance(part, str):
            found |= {"LM", "Net"} if part == "Network" else set()
            found.add(NAMED.get(part, part if "[" not in part else "anything"))
        elif origin is Literal:
            found.add("text")
        elif origin is Callable or part is Callable:
            found |= {"function", "TopK", "LM"}
        elif part is torch.Tensor or part is np.ndarray or hasattr(part, "array_type"):
            found |= {"array", "list"}
        elif (origin or part) in LISTS:
            found |= {"list", "array", "range"} | (accepts(items[0]) if items else {"anything"})
        elif (origin or part) is float:
            found |= {"number", "fraction"}
        elif (origin or part) is slice:
            found.add("slice")
        elif issubclass(origin or part, os.PathLike):
            found |= {"path", "text"}
        elif (origin or part) in (dict, Mapping):
            found |= {"mapping", "Reading"}
        else:
            known = getattr(origin or part, "__name__", "")
            found.add(NAMED.get(known, known))
            found |= {"text", "list"} if getattr(part, "_is_protocol", False) else set()
            found |= {"number"} if known == "SupportsIndex" else set()
            found |= {c.__name__ for c in _below(origin or part)}
            found |= {"Steer"} if known == "Editing" else set()
    return found


def _below(cls: type) -> Iterator[type]:
    for sub in type.__subclasses__(cls):
        yield sub
        yield from _below(sub)


def kind_of(value: Any) -> str:
    plain = {bool: "truth", int: "number", float: "fraction", str: "text", type(None): "none", dict: "mapping"}
    if type(value) in plain:
        return plain[type(value)]
    if isinstance(value, torch.Tensor | np.ndarray):
        return "array"
    if isinstance(value, list | tuple):
        return "list"
    if isinstance(value, Path):
        return "path"
    return "function" if inspect.isroutine(value) else type(value).__name__


def wrong(p: inspect.Parameter, things: Things, ranges: bool, method: bool) -> Iterator[tuple[str, Any]]:
    """(what it is, the value) of values that this argument cannot be. ranges: also those of the right kind.
    method: whether it is a coder's, which has a width."""
    known = accepts(p.annotation)
    if "anything" in known:
        return
    nan = float("nan")
    values = {
        "True": True, "'5'": "5", "2.5": 2.5, "a number": 3, "an object": object(), "the model": things.lm,
        "the coder": things.coder, "the store": things.store, "a reading": things.reading, "a dict": {"a": 1},
        "None": None, "bytes": b"x", "a function": len, "a tensor": things.x, "a list of objects": [object()],
    }  # fmt: skip
    for name, value in values.items():
        kind = "objects" if name == "a list of objects" else kind_of(value)
        if kind not in known and not (name == "2.5" and "number" in known and "fraction" in known):
            yield name, value
    if "number" in known:
        yield "nan", nan
        if "fraction" not in known and ranges:
            yield "-10**9", -(10**9)
    floats = [q for q in parts(p.annotation) if "float32" in str(getattr(q, "dtypes", ""))]
    if floats:
        yield "NaN activations", things.x * nan
        yield "infinite activations", things.x / 0
        yield "complex activations", things.x * 1j
        yield "whole numbers for activations", things.x.long()
        yield "an empty list", []
        if p.name in ("x", "f", "codes") and method:
            yield "a wrong width", torch.randn(8, 31)


def tries(things: Things) -> tuple[dict[str, list[Try]], list[str]]:
    """The tries of each public function, and what is missing for some."""
    found: dict[str, list[Try]] = {}
    missing = []
    for name, fn, cls in public():
        signature = inspect.signature(fn.__init__ if inspect.isclass(fn) else fn)
        params = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        params = [p for p in params if p.kind is not p.VAR_KEYWORD]
        bound = inspect.ismethod(fn)
        own: list[Any] = []  # self; None is enough for what is refused before it is used
        if cls is not None and "self" in signature.parameters and not bound:
            own = [next((t for t in things.own.values() if isinstance(t, cls)), None)]
        needed = {p.name: things.right(p) for p in params if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
        needed |= {"model": things.module, "tokenizer": things.tokenizer} if name == "LM" else {}
        missing += [f"{name}: nothing is known to give for {n}" for n, value in needed.items() if value is Things]
        mine = found.setdefault(name, [])
        for i, p in enumerate(params):
            values = list(wrong(p, things, own != [None], cls is not None))
            if p.default is p.empty and i + 1 < len(params) and params[i + 1].name in needed and p.name in needed:
                other = needed[params[i + 1].name]
                if not accepts(p.annotation) & {kind_of(other), "anything"}:
                    values.append((f"what is {params[i + 1].name}", other))
            for what, value in values:
                if p.kind is p.VAR_POSITIONAL:
                    call = lambda fn=fn, own=own, value=value, needed=needed: fn(*own, *needed.values(), value)  # noqa: E731
                else:
                    given = {**needed, p.name: value}
                    by_place = [q.name for q in params if q.kind is q.POSITIONAL_ONLY and q.name in given]
                    first = [*own, *(given.pop(n) for n in by_place)]
                    call = lambda fn=fn, first=first, given=given: fn(*first, **given)  # noqa: E731
                mine.append(Try(name, p.name, what, call))
            if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and len(p.name) > 4 and cls is None:
                typo = p.name[:-2] + p.name[-1]
                given = {**{n: v for n, v in needed.items() if n != p.name}, typo: things.right(p)}
                mine.append(Try(name, p.name, f"{typo}=", lambda fn=fn, given=given: fn(**given)))
        if not mine:
            del found[name]
    return found, missing


# ---- the battery


def outcome(one: Try) -> tuple[str, str]:
    """("clear" | "silent" | "unclear", what happened)."""

    def ring(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        one.call()
    except TooLong:
        return "silent", f"went on for {SECONDS} s"
    except Exception as err:
        import sae_lab

        tb = err.__traceback__
        while tb is not None and tb.tb_next is not None:
            tb = tb.tb_next
        ours = tb is not None and tb.tb_frame.f_code.co_filename.startswith(str(Path(sae_lab.__file__).parent))
        text = str(err)
        clear = isinstance(err, ValueError | TypeError) and ours and len(text) <= LONGEST and "\n" not in text
        clear = clear and re.search(rf"\b{one.argument.removesuffix('s')}s?\b", text) is not None
        return ("clear" if clear else "unclear"), f"{type(err).__name__}: {text}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return "silent", "was taken"


def run(full: bool, seed: int = 0) -> dict[str, Any]:
    """600 tries, or 150: functions are drawn alike, then their tries."""
    from unittest.mock import patch

    rng, counts, bad = random.Random(seed), {"silent": 0, "unclear": 0}, []
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"SAE_LAB_CACHE": folder}):
        found, missing = tries(Things(Path(folder)))
        for mine in found.values():
            rng.shuffle(mine)
        chosen: list[Try] = []
        while len(chosen) < (600 if full else 150) and any(found.values()):
            names = [n for n, mine in found.items() if mine]
            rng.shuffle(names)
            chosen += [found[n].pop() for n in names]
        chosen = chosen[: 600 if full else 150]
        for one in chosen:
            kind, said = outcome(one)
            if kind != "clear":
                counts[kind] += 1
                bad.append(f"{kind}: {one.name}({one.argument}: {one.value}) {said[:400]}")
    return {"tries": len(chosen), **counts, "unknown": len(missing), "bad": missing + bad}
