"""Labelled texts for probing: those of the installed ``sae-probes`` package, or your own; and how a model reads them.

The package is found, never imported, and its texts are third-party: they are read where they are installed.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.arguments import as_annotated, check_least
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import encode_texts, pad
from sae_lab.results import counted
from sae_lab.types import Site, as_sites

PIP_LINE = "pip install --no-deps sae-probes==0.4.2"
SKIPPED = (95, 106, 107)  # toxic and hateful posts
MOST_CLASSES = 50  # above, the labels are numbers (a year, a latitude), no classes
# One of each kind: topic, sentiment, grammar, register, programming language, a person's attribute, text written by a
# machine, a fact about what a name means. (Not 161 to 163, in which every other class is source code; nor sets such as
# 56 to 64, whose label depends on the last words of long texts, which the default length cuts off.)
DEFAULT_SETS = (
    "139_news_class_Politics", "92_glue_sst2", "87_glue_cola", "96_spam_is", "159_code_Python", "5_hist_fig_ismale",
    "110_aimade_humangpt3", "154_athlete_sport_football",
)  # fmt: skip
_TOKENS = 1024  # read at once: more is no faster
_HALF = 6e4  # the largest number that is kept in half precision


@as_annotated
@dataclass(frozen=True, repr=False)
class ProbeSet:
    """Texts with a binary label each. ``labels``: True for the class ``positive``; of several classes this is the
    commonest, against all others.

    Raises ValueError for labels of one class, or of more than 50 (numbers).
    """

    name: str
    texts: tuple[str, ...]
    labels: np.ndarray
    positive: str

    @classmethod
    def of(cls, name: str, texts: Sequence[str], labels: Any) -> "ProbeSet":
        """A set from texts and labels of any kind. Of two classes, the one that sorts last is positive."""
        texts, values = list(texts), [str(label) for label in np.asarray(labels).tolist()]
        if len(texts) != len(values):
            got = f"{counted(len(texts), 'text')} and {counted(len(values), 'label')}"
            raise ValueError(f"{name}: every text needs a label, got {got}")
        classes, counts = np.unique(values, return_counts=True)
        if len(classes) < 2:
            raise ValueError(f"{name}: a probe tells two classes apart, got {len(classes)}: {classes.tolist()}")
        if len(classes) > MOST_CLASSES:
            raise ValueError(
                f"{name}: labels must be at most {MOST_CLASSES} classes, got {len(classes)} values: if numbers, "
                "cut them in two first, e.g. value > median"
            )
        positive = str(classes[-1] if len(classes) == 2 else classes[counts.argmax()])
        return cls(name, tuple(texts), np.array([v == positive for v in values]), positive)

    def balanced(self, examples: int, seed: int = 0) -> "ProbeSet":
        """At most ``examples`` examples, half of either class, drawn without replacement; each text once."""
        draw = np.random.default_rng([seed, *self.name.encode()])
        order = draw.permutation(len(self.texts))
        first = {self.texts[i]: i for i in order[::-1]}  # the first of equal texts
        order = np.array([i for i in order if first[self.texts[i]] == i])
        each = min(examples // 2, *(int((self.labels[order] == label).sum()) for label in (False, True)))
        chosen = np.concatenate([order[self.labels[order] == label][:each] for label in (False, True)])
        return ProbeSet(self.name, tuple(self.texts[i] for i in chosen), self.labels[chosen], self.positive)

    def __repr__(self) -> str:
        many = counted(len(self.texts), "text")
        return f"ProbeSet({self.name!r}: {many}, {self.labels.mean():.0%} {self.positive!r})"


def available_sets() -> list[str]:
    """Names of the sets that the installed ``sae-probes`` holds, by number. ValueError where it is not installed."""
    names = [path.name.removesuffix(".csv.zst") for path in _folder().glob("*.csv.zst")]
    return sorted((n for n in names if _number(n) not in SKIPPED), key=lambda n: (_number(n), n))


@as_annotated
def probe_set(name: str) -> ProbeSet:
    """One set of the installed ``sae-probes`` package, by its file's name. ValueError for one that it does not hold."""
    import pandas as pd

    known = available_sets()
    if name not in known:
        near = [n for n in known if name.lower() in n.lower()][:5]
        told = f"near it: {', '.join(near)}" if near else "sl.evals.available_sets() lists them"
        raise ValueError(f"no probe set {name!r}; {told}")
    table = pd.read_csv(_folder() / f"{name}.csv.zst", usecols=["prompt", "target"]).dropna()
    return ProbeSet.of(name, table["prompt"].astype(str).tolist(), table["target"].tolist())


def as_probe_sets(data: Any = None) -> list[ProbeSet]:
    """The ``data`` argument of ``probing`` as a list of sets: None (``DEFAULT_SETS``), names, a pair (texts, labels), a
    dict of such pairs by name, or ProbeSets."""
    if isinstance(data, Mapping):
        return [ProbeSet.of(str(name), *pair) for name, pair in data.items()]
    many: list[Any] = [data] if isinstance(data, str | ProbeSet) else list(DEFAULT_SETS if data is None else data)
    if many and all(isinstance(one, str | ProbeSet) for one in many):
        return [probe_set(one) if isinstance(one, str) else one for one in many]
    if len(many) == 2 and all(not isinstance(one, str) for one in many) and len(many[0]):
        return [ProbeSet.of("texts", *many)]
    raise ValueError(
        "data must be names of probe sets, a pair (texts, labels), a dict of such pairs, or what read_probe_sets "
        f"returns, got {type(data).__name__} of {len(many)}"
    )


@dataclass(frozen=True, repr=False)
class ReadSet:
    """A probe set as a model reads it: activations of all real tokens but the prefix, text by text.

    x: ``tokens d``, in half precision if no value overflows. ids, positions: of these tokens. offsets: where each text
    begins. labels: of the texts.
    """

    name: str
    labels: np.ndarray
    x: Float[Tensor, "tokens d"] = field(repr=False)
    ids: Int[Tensor, " tokens"] = field(repr=False)
    positions: Int[Tensor, " tokens"] = field(repr=False)
    offsets: Int[Tensor, " texts_plus_one"] = field(repr=False)


@dataclass(frozen=True, repr=False)
class ProbeData:
    """What ``read_probe_sets`` returns: one pass of a model, for any number of coders of the site."""

    site: Site
    model: str
    sets: tuple[ReadSet, ...]
    tokens: int
    examples: int
    seed: int

    def __repr__(self) -> str:
        size = sum(one.x.numel() * one.x.element_size() for one in self.sets) / 1e6
        names = ", ".join(one.name for one in self.sets)
        return f"ProbeData({counted(len(self.sets), 'set')} at {self.site}, {size:.0f} MB: {names})"


@as_annotated
def read_probe_sets(
    lm: LM, site: Site | str, data: Any = None, *, examples: int = 400, tokens: int = 64, seed: int = 0
) -> ProbeData:
    """``data = sl.evals.read_probe_sets(lm, site)``: labelled texts, read once for ``probing`` of several coders.

    Args: data: as in ``probing``. examples: texts of each set, half of either class. tokens: length that each text is
    cut to (without the prefix).

    Memory: tokens·width half-precision numbers a text, about 130 MB for the defaults and the bundled model.
    """
    sites = as_sites(site)
    if len(sites) != 1:
        raise ValueError(f"probing reads one site, got {len(sites)}: call it for each")
    read = tuple(read_sets(lm, sites[0], as_probe_sets(data), examples, tokens, seed))
    return ProbeData(sites[0], lm.id, read, tokens, examples, seed)


def read_sets(lm: LM, site: Site, sets: Sequence[ProbeSet], examples: int, tokens: int, seed: int) -> Iterator[ReadSet]:
    """Each set as ``lm`` reads it at the site, one after the other, with a progress bar."""
    from tqdm.auto import tqdm

    check_least(8, examples=examples)
    check_least(1, tokens=tokens)
    with tqdm(total=len(sets) * examples, desc="read", unit="text", dynamic_ncols=True) as bar:
        for one in sets:
            yield _read(lm, site, one.balanced(examples, seed), min(tokens, lm.max_length - 1), bar)


def _read(lm: LM, site: Site, one: ProbeSet, tokens: int, bar: Any) -> ReadSet:
    rows = [tuple(ids[:tokens]) for ids in encode_texts(lm.tokenizer, list(one.texts))]
    prefix = [] if lm.prefix_id is None else [lm.prefix_id]
    first = {ids: number for number, ids in list(enumerate(rows))[::-1]}  # a copy could be in train and test
    chosen = sorted(number for ids, number in first.items() if ids)
    texts = [[*prefix, *rows[number]] for number in chosen]
    acts: list[Tensor] = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    while order:  # of about equal length, so that little is padding
        many = max(1, _TOKENS // len(texts[order[0]]))
        batch, order = order[:many], order[many:]
        padded = pad([texts[i] for i in batch])
        x = lm.run(padded, [site], logits=False)[0][site].cpu()
        for i, row in zip(batch, x, strict=True):
            acts[i] = row[len(prefix) : len(texts[i])].clone()
        bar.update(len(batch))
    x = torch.cat(acts)
    return ReadSet(
        name=one.name,
        labels=one.labels[chosen],
        x=x.half() if float(x.abs().max()) < _HALF else x,
        ids=torch.tensor([i for text in texts for i in text[len(prefix) :]]),
        positions=torch.cat([len(prefix) + torch.arange(len(a)) for a in acts]),
        offsets=torch.tensor([0, *map(len, acts)]).cumsum(0),
    )


def _folder() -> Path:
    spec = importlib.util.find_spec("sae_probes")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(folder) / "data" / "cleaned_data").is_dir():
            return found
    raise ValueError(f"the texts of sae-probes are not installed: {PIP_LINE}; or pass your own (texts, labels)")


def _number(name: str) -> int:
    return int(name.split("_")[0])
