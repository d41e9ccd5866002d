"""FeatureIndex: everything about every feature, opened in milliseconds from memory-mapped files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from sae_lab import files, noting
from sae_lab.activations.store import Store
from sae_lab.arguments import Count, as_annotated
from sae_lab.feature_index import exporting, finding, live, query, searching
from sae_lab.feature_index.annotations import Note, Notes
from sae_lab.feature_index.labels import Labels
from sae_lab.feature_index.summaries import BINS, QUANTILE_CONTEXTS, QUARTERS, TOP_CONTEXTS
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.results import Name, counted, visible
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, check_feature

VERSION = 3
# Their checksums stand in index.json.
CHECKED = ("rows.npy", "values.npy", "row_features.npy", "row_values.npy", "labels.json")
TABLES = (
    "offsets", "f_scale", "mean", "max", "histogram", "top_tokens", "shown", "readability", "cofiring",
    "cofiring_counts", "neighbours", "cosines",
)  # fmt: skip
SIZED = 4096  # rows of the store whose mean size ``norm`` uses for a coder with an input_norm
REMEDY = "index again with sl.index_features(coder, lm, store, ..., rebuild=True); labels and notes stay"
BEFORE, AFTER = 24, 12  # tokens shown around an activation
PLACES = 256  # places shown on each side of an activation, of a network that is no language model
PERMUTATIONS = 100  # of the labels of examples
READABLE_DENSITY = (5e-4, 1e-2)  # rarer features have too few contexts to judge, denser ones are rarely about one thing


@dataclass(frozen=True)
class Context:
    """Tokens around an activation. values: the feature's activation per token, None where the mask leaves it out;
    ``peak`` is the index of the activation in ``tokens``, ``position`` its position in the model's context. Of a
    ``sl.Net`` a context is an item, ``document`` its number, and its tokens are places, at most 256 on each side of the
    peak. picture: the item with heat, as an address that holds it, where ``index.draw`` says how items look; area:
    where places lie on it, [place of its first cell, rows, columns, pixels left of them]."""

    tokens: list[str]
    values: list[float | None]
    peak: int
    document: int
    position: int
    picture: str = ""
    area: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        marked = [f"[{t}]" if i == self.peak else t for i, t in enumerate(self.tokens)]
        return f"{self.values[self.peak]:8.2f}  {''.join(marked)!r}"


@dataclass(frozen=True)
class FeatureView:
    """One feature. density: share of kept tokens on which it fires; mean: over those; histogram: of activations > 0.

    neighbours: (feature, cosine of the decoder rows). cofiring: (feature, Jaccard index n_ij / (n_i + n_j - n_ij),
    n_ij: the number of tokens on which both fire), up to 32. explanations: what others say of it, as {text, source,
    scores}. tokens: those it fires on most. names: {number: name} of it and of the features beside it. unit: what
    stands in a context, "token", or "place" of a ``sl.Net``.
    """

    feature: int
    d_sae: int
    density: float
    count: int
    tokens_seen: int
    mean: float
    max: float
    f_scale: float
    histogram: dict[str, list[int] | list[float]]
    groups: list[dict[str, Any]]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    lens_note: str
    neighbours: list[tuple[int, float]]
    cofiring: list[tuple[int, float, int]]
    explanations: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    unit: str = "token"

    @property
    def top(self) -> list[Context]:
        """The strongest contexts."""
        return self.groups[0]["contexts"] if self.groups else []

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers. The lists are this view's own."""
        # Not dataclasses.asdict: it copies every token of every context, a quarter of what a click takes in Python.
        groups = [group | {"contexts": [dict(vars(one)) for one in group["contexts"]]} for group in self.groups]
        return vars(self) | {"groups": groups}

    def __str__(self) -> str:
        name = visible(Name(self.names.get(str(self.feature), "")))
        head = f"feature {self.feature}{f' ({name})' if name else ''}: fires on {self.density:.3%} of {self.unit}s"
        head += f", max {self.max:.2f}"
        promoted = [] if self.lens_note else self.promoted  # of a noisy lens the tokens may be chance
        words = f"promotes {' '.join(repr(t) for t, _ in promoted[:6])}" if promoted else ""
        others = f"fires with {', '.join(f'{i} ({j:.2f})' for i, j, _ in self.cofiring[:6])}" if self.cofiring else ""
        said = [visible(f"explained: {one['text']} ({one['source']})") for one in self.explanations[:2]]
        top = map(str, self.top[:6])
        if self.unit == "place":
            top = (f"{c.values[c.peak]:8.2f}  item {c.document:,} at {c.tokens[c.peak]}" for c in self.top[:6])
        return "\n".join([head, *said, words, others, *top])

    __repr__ = __str__


def read_facts(file: Path) -> dict[str, Any]:
    """What ``index.json`` says, or ``building.json`` of one that is being made. ValueError with the remedy."""
    try:
        facts = files.read_json(file)
        whole = {"site": str, "notes": str, "d_sae": int, "rows": int} if file.name == "index.json" else {}
        if whole and type(facts.get("version")) is int and facts["version"] < VERSION:
            whole = {}  # of an earlier version of this library: it is made again
        for key, kind in {"coder": str, "store": str, **whole}.items():
            if type(facts[key]) is not kind or (kind is int and not 0 < facts[key] < 1 << 40):
                raise ValueError(f"its {key!r} is {facts[key]!r:.60}")
        if whole and not all(isinstance(facts["blocks"][name], str) for name in CHECKED):
            raise ValueError("its checksums are not text")
        return facts
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is no index of sae_lab ({err}): {REMEDY}") from err


def read_tables(folder: Path, d_sae: int) -> dict[str, files.Table]:
    """An index's tables, one row a feature. ValueError with the remedy."""
    tables = files.map_tensors(folder / "stats.safetensors", REMEDY)
    for name in TABLES:
        shape = tables[name].shape if name in tables else ()
        if shape[:1] != (d_sae + (name == "offsets"),):
            raise ValueError(f"{folder}/stats.safetensors is no table of {d_sae} features ({name}: {shape}): {REMEDY}")
    return tables


@as_annotated
class FeatureIndex:
    """All features of a coder over a store. Made and opened by ``sl.index_features``.

    ``index[i]`` opens a feature; ``index.search("Paris")`` finds features; ``index.order("density")`` sorts
    them (``mean`` and ``max`` are in units of codes);
    ``density``, ``mean``, ``max``, ``counts``, ``norm`` are arrays over features; ``notes`` are what you wrote on
    them. With the model and the coder at hand (``lm``, ``coder``) it also scores new text.
    """

    def __init__(self, path: str | Path, store: Store, lm: Network, coder: SparseCoder | None = None):
        self.path, self.store, self.lm, self.coder = Path(path), store, lm, coder
        facts = read_facts(self.path / "index.json")
        self.d_sae: int = facts["d_sae"]
        self.site = Site.of(facts["site"])
        log = noting.of(coder) if coder is not None else noting.by_id(facts["notes"])
        self._log = log
        self.notes = Notes(log, self.d_sae, lm.id, self.site.layer)
        self.explanations = self.notes.explanations
        noting.INDEXES[log.file.stem] = self
        self.tokens_seen: int = facts["rows"]
        blocks = facts["blocks"]
        self._stats = stats = read_tables(self.path, self.d_sae)
        self._rows, self._values, self._row_features, self._row_values = (
            files.map_npy(self.path / name, blocks[name], REMEDY) for name in CHECKED[:4]
        )
        self._offsets = np.asarray(stats["offsets"])
        self.counts = np.diff(self._offsets)
        self.density = self.counts / self.tokens_seen
        self.mean, self.max = np.asarray(stats["mean"]), np.asarray(stats["max"])
        # Labels and the headers of the store's files are read now, so that the first feature opens as fast as others.
        self._labels = Labels.read(lm, self.path / "labels.json", blocks["labels.json"], REMEDY)
        self.store.contexts(np.zeros(1, np.int64))
        self._render: Callable[[int], Any] | None = None
        self._grid: Sequence[int] | None = None

    def __len__(self) -> int:
        return self.d_sae

    def __repr__(self) -> str:
        live = int((self.counts > 0).sum())
        return (
            f"FeatureIndex({counted(self.d_sae, 'feature')}, {live} live on {counted(self.tokens_seen, self.unit)}, "
            f"{self.site}, {self.bytes / 1e6:,.1f} MB)"
        )

    @property
    def names(self) -> noting.Names:
        """What features are called: ``index.names[7]``, your label, else its top tokens, else an explanation."""
        return noting.Names(index=self)

    @property
    def unit(self) -> str:
        """What a row of the store is: a "token", or a "place" of a ``sl.Net``."""
        return "token" if isinstance(self.lm, LM) else "place"

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def order(self, by: str = "density") -> np.ndarray:
        """Live features, largest first, by "density", "max", "norm" or "best" (readable)."""
        if by not in ("density", "max", "norm", "best"):
            raise ValueError(f"order by one of density, max, norm, best, got {by!r}")
        order = np.argsort(-np.asarray(self._readability if by == "best" else self._column(by)), kind="stable")
        return order[self.counts[order] > 0]

    @cached_property
    def norm(self) -> np.ndarray:
        """Length of what each feature writes at its f_scale: f_scale·‖W_dec‖, in units of the activations; with an
        ``input_norm`` times the mean size of the store's first rows."""
        coder, size = self._at_hand("norm"), 1.0
        if coder.input_norm != "none" and not coder.transcodes:
            if "coder" in self.store.identity:
                raise ValueError(
                    f"norm needs activations, for this coder writes in their size (input_norm={coder.input_norm!r}), "
                    "and the store holds codes: index a store of activations"
                )
            first = self.store.rows(np.arange(min(SIZED, self.tokens_seen)), self.store.site.key)
            size = float(coder.sizes(first.to(coder.W_dec.device)).mean())
        return (size * coder.f_scale * coder.W_dec.detach().norm(dim=1)).cpu().numpy()

    def _column(self, name: str) -> np.ndarray:
        return self.counts if name == "count" else getattr(self, name)

    @cached_property
    def density_histogram(self) -> dict[str, list[int] | list[float]]:
        """Live features by log10 of their density: counts and edges, from a whole power of ten to 0."""
        live = np.log10(self.density[self.counts > 0])
        counts, edges = np.histogram(live, bins=BINS, range=(float(np.floor(live.min(initial=-1.0))), 0.0))
        return {"counts": counts.tolist(), "edges": edges.tolist()}

    def best(self, n: Count = 1) -> int | list[int]:
        """Live, readable features, the most readable first: an int for n=1."""
        found = self.order("best")[:n].tolist()
        if not found:
            raise ValueError("no feature of this coder fires on the store: train it longer, or on this site")
        return found[0] if n == 1 else found

    @property
    def _readability(self) -> np.ndarray:
        """How readable each feature looks; those of middling density come first."""
        low, high = READABLE_DENSITY
        middling = (self.density >= low) & (self.density <= high)
        return np.asarray(self._stats["readability"]) + middling

    @cached_property
    def _places(self) -> searching.Places:
        tokens = self.store.rows(np.arange(self.tokens_seen), "token").numpy().astype(np.int32)
        return searching.Places(cast(LM, self.lm), self._labels, tokens)

    def search(
        self, what: str | Sequence[str], against: Sequence[str] | None = None, limit: Count = 50,
        pooling: finding.Pooling = "max",
    ) -> finding.FoundFeatures:  # fmt: skip
        """Find features by words, by a sentence, by conditions, or by examples.

            index.search("war")                             # one to three words: what fires on them
            index.search("The army marched at dawn")        # four words or more: what fires in this sentence
            index.search('"At dawn" density<1%')            # quotation marks: a sentence, however short
            index.search("war density>0.1% label:weapons")  # conditions, with words or without
            index.search(texts, against=other_texts)        # what tells the ones from the others

        ``.best`` is the number of the first feature, ``.features`` are all, ``.searched`` says what was looked for.
        Columns of the table, beside density, tokens and label: for words recall (the share of their places in the store
        on which the feature fires), share (of its activation, what lies there) and relevance = recall·share^¼; plurals
        count as the word, and what you labelled so comes first. For a sentence times (its mean code there over that on
        the store), peak and token (the largest code, and where) and relevance = (mean code there - mean code on the
        store)·log(1/density). For examples those of ``sl.find_features``.

        Args:
            what: a line, or a list of texts. Conditions are density, norm, max, mean and count with >, <, >= or <=, and
                ``label:`` with text of your notes or of explanations; all must hold. Without words or a sentence the
                most readable features come first.
            against: texts of the other kind; see ``sl.find_features``, which is called with 100 permutations: p is at
                least .01.
            limit: the most features to give.
            pooling: of each text with ``against``: "max", "mean" or "last" code over its tokens.

        ValueError for a limit that is no number, a sentence beyond the model's length, and a sentence or examples on an
        index without its coder.
        """
        lm = self.lm
        if not isinstance(lm, LM) and (not isinstance(what, str) or query.parse(what).kind in ("words", "sentence")):
            raise ValueError(
                "words, sentences and examples are looked for in texts; features of another network are found by "
                "conditions, index.search('density<1% label:eye')"
            )
        if against is not None:
            texts = [what] if isinstance(what, str) else what
            coder = self._at_hand("a search by examples")
            asked = cast(LM, lm), coder, texts, against
            found = finding.find_features(*asked, pooling=pooling, permutations=PERMUTATIONS)
            return self._described(found.table, found.searched, limit)
        if not isinstance(what, str):
            many = counted(len(what), "text")
            raise ValueError(f"a list of {many} needs others beside it: index.search(texts, against=others)")
        asked = query.parse(what)
        holds = asked.holds(self._column, self.d_sae) & (self.counts > 0)
        if asked.label is not None:
            said = np.zeros(self.d_sae, bool)
            said[self.notes.find(asked.label) + self.explanations.find(asked.label)] = True
            holds &= said
        if asked.kind == "words":
            table, searched = self._by_words(asked)
        elif asked.kind == "sentence":
            coder = self._at_hand("a search by a sentence")
            table = searching.on_sentence(cast(LM, lm), coder, asked.text, self.density, self.mean)
            searched = str(asked)
        else:
            order = self.order("best")
            table, searched = {"feature": order, "max": self.max[order]}, str(asked) or "all live features"
        kept = holds[table["feature"]]
        return self._described({name: column[kept] for name, column in table.items()}, searched, limit)

    def _by_words(self, asked: query.Query) -> tuple[dict[str, np.ndarray], str]:
        words = list(dict.fromkeys(asked.text.lower().split()))
        found = [self._places.of(word) for word in words]
        table = searching.relevance([rows for rows, _ in found], self._codes_on, self.counts * self.mean)
        mine = np.zeros(self.d_sae, bool)
        mine[self.notes.find(asked.text)] = True
        order = np.lexsort((-table["relevance"], ~mine))  # first what you named so yourself
        order = order[(table["relevance"] > 0)[order] | mine[order]]
        told = [f"{Name(word)} ({len(rows):,} in the store{'' if whole else ', as a part of tokens'})"
                for word, (rows, whole) in zip(words, found, strict=True)]  # fmt: skip
        table = {"feature": order} | {name: column[order] for name, column in table.items()}
        return table, str(asked._replace(text=", ".join(told)))

    @cached_property
    def _row_ends(self) -> np.ndarray:
        return np.asarray(self._stats["per_row"]).cumsum(dtype=np.int64)

    def _codes_on(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features, activations) of all codes on some rows of the store."""
        many = np.asarray(self._stats["per_row"])[rows]
        behind = many.cumsum()
        at = np.arange(behind[-1] if len(rows) else 0) + np.repeat(self._row_ends[rows] - behind, many)
        features = self._row_features[at].astype(np.int64)
        return features, self._row_values[at].astype(np.float64) * self.max[features]

    def _described(self, table: dict[str, np.ndarray], searched: str, limit: int) -> finding.FoundFeatures:
        """The first rows of what was found, with what is known of each feature."""
        table = {name: column[:limit] for name, column in table.items()}
        features = table["feature"]
        table.setdefault("density", self.density[features])
        table["tokens"] = np.array([" ".join(map(visible, self.top_tokens(i))) for i in features.tolist()], object)
        table["label"] = np.array([self.notes.heading(i) for i in features.tolist()], object)
        return finding.FoundFeatures(table, searched)

    def top_tokens(self, feature: int, n: Count = 5) -> list[str]:
        """The tokens a feature fires on most."""
        ids = self._stats["top_tokens"][self._check(feature)]
        return [self._labels[int(i)] for i in ids[:n] if i >= 0]

    def token_labels(self, ids: Sequence[Count] | np.ndarray) -> list[str]:
        """Labels of token ids that follow each other in a text."""
        return self._labels.of(np.asarray(ids).tolist())

    def _check(self, feature: int) -> int:
        return check_feature(feature, self.d_sae)

    def _at_hand(self, what: str) -> SparseCoder:
        if self.coder is None:
            raise ValueError(f"{what} needs the coder: open the index by sl.index_features(coder, lm, store)")
        return self.coder

    def annotate(self, feature: int, label: str | None = None, text: str | None = None) -> Note:
        """Put a label or a note on a feature; it follows the coder (``sl.notes``). None leaves a part as it was."""
        return self.notes.write(feature, label, text)

    def load_labels(self, source: str | Path, model: str | None = None, layer: str | None = None) -> int:
        """Read explanations that Neuronpedia exports, or what ``notes.save`` wrote; see ``sl.notes(sae).load``. Your
        own notes stay as they are. Returns the number of features that have labels now."""
        return self.notes.load(source, model, layer)

    def to_site(self, path: str | Path) -> Path:
        """``index.to_site("features")``: write a folder with all features as a page, and return its index.html.

        The page opens from disk, or from any web server, without Python or a network: list, search and sort over all
        features, their contexts, figures and labels, a link per feature (index.html#812). Texts stay texts, and the
        page may ask no other host for anything. A page that was written there before is replaced; ValueError for a
        folder that holds another page.
        """
        return import_module("sae_lab.widgets.site").write(self, path)  # a face, which the core may not import

    def to_neuronpedia(
        self, path: str | Path, model: str | None = None, layer: str | None = None, author: str = ""
    ) -> Path:
        """``index.to_neuronpedia("export", "gpt2-small", "8-res-mine")``: write the files that Neuronpedia imports.

        They go into the folder path/model/layer, which is new and is returned: features, their contexts, and what you
        and others say of them, as its importer reads them (github.com/hijohnnylin/neuronpedia). Explanations of other
        sources than Neuronpedia's own keep their source in ``notes``.

        Args: model, layer: Neuronpedia's names of both; None: made of the model's id, the site and d_sae. author: the
        name shown beside the coder.

        Raises ValueError for names that its addresses cannot hold, for a layer of another number, and for a folder that
        exists.
        """
        return exporting.write(self, self._log.all(), path, model, layer, author)

    def score(self, feature: int, text: Any) -> live.Scored:
        """A feature's activation at each token of a new text, or at each place of an input of a ``sl.Net``: one pass to
        the coder's site."""
        scored = live.score(self.lm, self._at_hand("scoring a text"), self._check(feature), text)
        if self.unit == "place":
            return replace(scored, tokens=self._labels.of(range(len(scored.values)), prefixed=True))
        return scored

    def draw(self, render: Callable[[int], Any] | None, grid: Sequence[Count] | None = None) -> "FeatureIndex":
        """``index.draw(lambda i: images[i])``: how the items of a network's store look, in panels, pages and tables.

        render: the number of an item in the data -> what it looks like, one of
            a picture: a PNG, or an array of height and width (and 3) from 0 to 1, or of whole numbers to 255
            frames: a list of pictures, one for each place; the 40 around the strongest are shown
            a curve: a list of numbers, along which the places lie; drawn from its lowest to its highest
            names: a list of str, one for each place (residues, steps), shown as tokens are
        None: places are shown by their numbers. Activations lie on a picture as heat, that of places beside the grid
        (a class token) on a bar at its left.
        grid: (height, width) of the places on the picture; None: the site's own, or a square, with a place before it
        or not. Returns the index. ValueError for a language model, whose tokens are shown.
        """
        if isinstance(self.lm, LM):
            raise ValueError("a language model's contexts are shown as their tokens: draw is for an index of a sl.Net")
        self._render, self._grid = render, self.store.identity["grid"] if grid is None else list(grid)
        return self

    def compare(self, a: Count, b: Count) -> live.Pair:
        """Two features: cosine of their decoder rows, and on how many tokens of the store both fire."""
        rows = [self.activations(i)[0] for i in (a, b)]
        return live.pair(self._at_hand("comparing features"), self._check(a), self._check(b), *rows)

    def weakest(self, feature: int, n: Count = TOP_CONTEXTS) -> list[Context]:
        """The contexts of a feature's n smallest activations, the smallest first."""
        rows, values = self.activations(feature)
        n = min(n, len(values))
        low = np.argpartition(values, n - 1)[:n] if n else np.zeros(0, np.int64)
        return self._contexts(rows[low[np.argsort(values[low], kind="stable")]].astype(np.int64), rows, values)

    def activations(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the store, values) where a feature fires, in the order of rows."""
        feature = self._check(feature)
        part = slice(*self._offsets[feature : feature + 2])
        return self._rows[part], self._values[part]

    def __getitem__(self, feature: int) -> FeatureView:
        rows, values = self.activations(feature)
        stats = self._stats
        edges = np.linspace(0.0, float(self.max[feature]) or 1.0, BINS + 1)
        near = zip(stats["neighbours"][feature].tolist(), stats["cosines"][feature].tolist(), strict=True)
        return FeatureView(
            feature=int(feature),
            d_sae=self.d_sae,
            density=float(self.density[feature]),
            count=len(values),
            tokens_seen=self.tokens_seen,
            mean=float(self.mean[feature]),
            max=float(self.max[feature]),
            f_scale=float(stats["f_scale"][feature]),
            histogram={"counts": stats["histogram"][feature].tolist(), "edges": edges.tolist()},
            groups=self._groups(stats["shown"][feature], rows, values),
            promoted=self._lens(feature, "up"),
            suppressed=self._lens(feature, "down"),
            lens_note=self._lens_note(feature),
            neighbours=list(near),
            cofiring=self._cofiring(feature),
            explanations=[said._asdict() for said in self.explanations[feature]],
            tokens=self.top_tokens(feature, 8),
            names=self.names_around(feature),
            unit=self.unit,
        )

    def names_around(self, feature: int) -> dict[str, str]:
        """{number: name} of a feature, its neighbours and those it fires with."""
        feature = check_feature(feature, self.d_sae)
        around = (feature, *self._stats["neighbours"][feature].tolist(), *self._stats["cofiring"][feature].tolist())
        return {str(i): name for i, name in self.names.of(around).items()}

    def __iter__(self) -> Iterator[FeatureView]:
        return (self[i] for i in range(self.d_sae))

    def _cofiring(self, feature: int) -> list[tuple[int, float, int]]:
        others, both = self._stats["cofiring"][feature], self._stats["cofiring_counts"][feature]
        others, both = others[others >= 0], both[others >= 0]
        jaccard = both / (self.counts[feature] + self.counts[others] - both)
        return list(zip(others.tolist(), jaccard.tolist(), both.tolist(), strict=True))

    def _lens(self, feature: int, side: str) -> list[tuple[str, float]]:
        if f"lens_{side}" not in self._stats:
            return []
        ids, values = self._stats[f"lens_{side}_ids"][feature], self._stats[f"lens_{side}"][feature]
        return [(self._labels[int(i)], round(float(v), 3)) for i, v in zip(ids, values, strict=True)]

    def _lens_note(self, feature: int) -> str:
        if "lens_kurtosis" not in self._stats:
            if not isinstance(self.lm, LM):
                return "no logit lens: this network is no language model"
            return f"no logit lens: {self.site} is not written to the residual stream"
        sharp = float(self._stats["lens_kurtosis"][feature]) > self._noise
        return "" if sharp else "These tokens may be chance: random directions are as sharp as this one."

    @cached_property
    def _noise(self) -> float:
        return float(np.quantile(np.asarray(self._stats["lens_random"]), 0.99))

    def _groups(self, shown: np.ndarray, rows: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
        """Top contexts, then a few from each quarter of the activations; no stretch of text twice."""
        if not len(rows):
            return []
        labels = ["top", *(f"quantile {75 - 25 * q}-{100 - 25 * q} %" for q in range(QUARTERS))]
        parts = np.split(shown, TOP_CONTEXTS + QUANTILE_CONTEXTS * np.arange(QUARTERS))
        groups = [
            {"label": label, "contexts": self._contexts(part[part >= 0].astype(np.int64), rows, values)}
            for label, part in zip(labels, parts, strict=True)
        ]
        return [group for group in groups if group["contexts"]]

    def _contexts(self, shown: np.ndarray, rows: np.ndarray, values: np.ndarray) -> list[Context]:
        """The contexts of rows of the store."""
        from sae_lab.feature_index import drawing  # it imports Pillow

        if not len(shown):
            return []
        numbers, documents = self.store.contexts(shown), self.store.rows(shown, "document")
        before, after = (BEFORE, AFTER) if isinstance(self.lm, LM) else (PLACES, PLACES)
        found, largest = [], float(values.max())
        for shown_row, number, document in zip(shown, numbers.tolist(), documents.tolist(), strict=True):
            here, positions = self.store.context_rows(number)
            ids, peak = self.store.context_ids(number), int(positions[np.searchsorted(here, shown_row)])
            start, stop = max(0, peak - before), min(len(ids), peak + after + 1)
            along: list[float | None] = [None] * (stop - start)
            # In the type of rows: else all of them would be converted, a million of a dense feature.
            first, last = np.searchsorted(rows, np.array([here[0], here[-1] + 1], rows.dtype))
            fires = dict(zip(rows[first:last].tolist(), values[first:last].tolist(), strict=True))
            known = (positions >= start) & (positions < stop) & (here < self.tokens_seen)  # it may end in a context
            for row, position in zip(here[known].tolist(), positions[known].tolist(), strict=True):
                along[position - start] = round(fires.get(row, 0.0), 4)
            labels, look = self._labels.of(ids[start:stop].tolist(), prefixed=start == 0), {}
            if self._render is not None:
                heat = np.zeros(len(ids))
                heat[positions[np.searchsorted(here, rows[first:last])]] = values[first:last]
                made = drawing.drawn(self._render, document, heat, peak, self._grid, largest)
                labels = list(made.names[start:stop]) or labels
                look = {"picture": made.picture, "area": list(made.area)}
            found.append(Context(labels, along, peak - start, document, peak, **look))
        return found
