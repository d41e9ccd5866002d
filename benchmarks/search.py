"""How often index.search finds a feature for a word and for a sentence, and how long it takes.

The coder is the shipped one of layer 8, the text sl.load_text("mix"). Every second document makes the index (500,000
tokens); "unused" are the others, cut into stretches of 80 words.

Words. A noun is recognised without a tagger: a word in lower case of which at least 15 % of all occurrences follow
"the", "a" or "an", and at least 60 % of these stand before punctuation or a function word. From the nouns of rank 500
to 5,000 that stand in at least 12 unused documents, a seed draws 60: the first 30 choose among the scores, the others
are the test. Right is a word whose first feature tells its unused stretches (at most 30, one a document) from up to
300 others without it or its plural by an AUROC of at least .9 (a stretch's largest code). Beside it: the search among
top tokens that was here before, a random feature of like density, and the share of words for which any feature does
it.

Sentences. 40 classes of sae-probes, drawn by a seed from the sets whose texts are not in the mix and that have 100
texts of either class: the first 20 choose among the scores, the others are the test. A sentence is one of the first
50 positive texts (their first 500 letters), five a class. Right is a sentence of whose first five features one tells
the other 50 positive texts from 50 negative ones by an AUROC of at least .8. Beside it: features whose top tokens the
sentence has, random features of like density, and the share of classes for which any feature does it.

Labels by meaning. Each feature is labelled with the words among its eight top tokens. For each word: labels that
contain it, the first feature of these by readability, against the label whose mean embedding is nearest to the
word's.

Latencies: the shipped coder over a million tokens, a store made as in index.py.

--work FOLDER: keeps stores, indexes and codes there.   --only words, --only latencies: the others stay as they are.
--docs: the tables in docs/howto/features.md.
"""

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from index import make_store
from pages import put
from scipy.sparse import csr_array, load_npz, save_npz
from steps import processor

import sae_lab as sl
from sae_lab.activations.reading import alike, read_codes
from sae_lab.evals.probe_sets import available_sets, probe_set
from sae_lab.feature_index import query, searching
from sae_lab.lm.text import mix_sources
from sae_lab.stats import auroc

RESULTS = Path(__file__).parent / "results" / "search.json"
CODER = "smollm2-135m/resid_post-8"
TOKENS, STRETCH, RANKS = 500_000, 80, (500, 5_000)
WORDS, CLASSES, SENTENCES, FIRST = 30, 20, 5, 5
WITH, WITHOUT, FEWEST = 30, 300, 12
GOOD_WORD, GOOD_SENTENCE = 0.9, 0.8
IN_MIX = {45, 46, 48, 49, 94, 100, 101, 111, 112, 145, 146, 147, 157, 158, 159, 160, 161, 162, 163}
LETTERS = 500  # of a text of sae-probes

WORD = re.compile(r"[^\W\d_]+|[^\w\s]")
ARTICLES = {"the", "a", "an"}
FUNCTION_WORDS = "of in and is was to for that on at with by from as or who which has had will are were"
AFTER = {*FUNCTION_WORDS.split(), *".,;:)?!"}

# What else the order of a word's features could be, from the share of the feature's activation that lies on the word
# and the share of the word's occurrences on which it fires (recall).
WORD_SCORES: dict[str, Callable[[Any, Any], Any]] = {
    "share": lambda share, recall: share,
    "recall": lambda share, recall: recall,
    "share x recall": lambda share, recall: share * recall,
    "F1": lambda share, recall: 2 * share * recall / np.maximum(share + recall, 1e-9),
}


# ------------------------------------------------------------------------------------------- texts and codes


def documents() -> tuple[list[str], list[str]]:
    """(of the index, unused)."""
    found = [document for source in mix_sources().values() for document in source]
    np.random.default_rng(0).shuffle(found)
    return found[::2], found[1::2]


def nouns(found: Sequence[str]) -> list[str]:
    """Nouns of RANKS among the words of these documents, the commonest first."""
    all_of, behind, heads = Counter[str](), Counter[str](), Counter[str]()
    for document in found:
        words = WORD.findall(document)
        lower = [word.lower() for word in words]
        all_of.update(lower)
        for i, (before, word) in enumerate(pairwise(lower[:-1])):
            if before in ARTICLES and words[i + 1].islower():
                behind[word] += 1
                heads[word] += lower[i + 2] in AFTER
    ranked = [word for word, _ in all_of.most_common() if word[0].isalpha()][slice(*RANKS)]
    return [w for w in ranked if len(w) > 2 and behind[w] >= 0.15 * all_of[w] and heads[w] >= 0.6 * behind[w]]


def largest(lm: sl.LM, sae: Any, texts: list[str]) -> csr_array:
    """Each feature's largest code in each text, "texts features"."""
    rows, features, values = [], [], []
    for group in alike([len(lm.tokenize(text).ids[0]) for text in texts]):
        codes, keep = read_codes(lm, sae, lm.tokenize([texts[i] for i in group]))
        rows.append(np.array(group)[keep.nonzero()[:, 0].numpy()[codes.rows.numpy()]])
        features.append(codes.features.numpy())
        values.append(codes.values.numpy())
    row, feature, value = map(np.concatenate, (rows, features, values))
    pairs, where = np.unique(row * sae.d_sae + feature, return_inverse=True)
    most = np.zeros(len(pairs))
    np.maximum.at(most, where, value)
    return csr_array((most, np.divmod(pairs, sae.d_sae)), shape=(len(texts), sae.d_sae))


def matched(index: sl.FeatureIndex, features: Sequence[int], random: np.random.Generator) -> list[int]:
    """Of each feature a random one among the fifty of nearest density."""
    order = np.argsort(index.density, kind="stable")
    place = np.argsort(order)
    spots = [np.clip(place[f] - 25, 0, len(order) - 51) + random.integers(51) for f in features]
    return order[spots].tolist()


def by_top_tokens(index: sl.FeatureIndex, wanted: Callable[[str], float]) -> np.ndarray:
    """The search that was here before: features by their top tokens, of which the first counts most."""
    weight = np.array([wanted(label) for label in index._labels.lower] + [0.0])
    top = np.asarray(index._stats["top_tokens"])
    return weight[top] @ (1 / (1 + np.arange(top.shape[1])))


# ------------------------------------------------------------------------------------------- words


class Words:
    """The words, their unused stretches, and each feature's largest code in each stretch."""

    def __init__(self, unused: list[str], all_nouns: list[str]):
        stretches = [
            (number, " ".join(words[i : i + STRETCH]))
            for number, words in enumerate(document.split() for document in unused)
            for i in range(0, len(words), STRETCH)
        ]
        holds = [{word.lower() for word in WORD.findall(text)} for _, text in stretches]
        random, self.having = np.random.default_rng(1), dict[str, list[int]]()
        for word in map(str, random.permutation(all_nouns)):
            first: dict[int, int] = {}  # one stretch of each document
            for i in random.permutation(len(stretches)).tolist():
                if word in holds[i]:
                    first.setdefault(stretches[i][0], i)
            if len(first) >= FEWEST:
                self.having[word] = list(first.values())[:WITH]
            if len(self.having) == 2 * WORDS:
                break
        self.others = np.random.default_rng(2).choice(len(stretches), WITHOUT, replace=False).tolist()
        needed = sorted({*self.others, *(i for some in self.having.values() for i in some)})
        self.texts = [stretches[i][1][:700] for i in needed]
        self._place = {i: place for place, i in enumerate(needed)}
        self._holds = holds
        self.codes: Any = None
        self._areas: dict[str, np.ndarray] = {}

    def aurocs(self, word: str) -> np.ndarray:
        """Of each feature, how well it tells stretches with the word from those without."""
        stemmed = searching.stem(word)
        others = [i for i in self.others if not any(searching.stem(other) == stemmed for other in self._holds[i])]
        rows = [self._place[i] for i in (*self.having[word], *others)]
        if word not in self._areas:
            self._areas[word] = auroc(self.codes[rows].toarray(), np.arange(len(rows)) < len(self.having[word]))
        return self._areas[word]


def words_found(index: sl.FeatureIndex, words: Words, some: list[str], found: dict[str, int]) -> dict[str, float]:
    """What the features found for some words come to."""
    areas = np.array([words.aurocs(word)[found[word]] if found[word] >= 0 else 0.5 for word in some])
    return {"right": float((areas >= GOOD_WORD).mean()), "mean AUROC": float(areas.mean())}


def first_by_label(index: sl.FeatureIndex, word: str, weight: np.ndarray) -> int:
    """The most readable of the features with the largest weight; -1 where all are 0."""
    best = weight.max()
    return int(max(np.flatnonzero(weight == best), key=lambda i: index._readability[i])) if best > 0 else -1


def meaning(lm: sl.LM, index: sl.FeatureIndex, some: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """The first feature of each word by matching strings of labels, and by their mean embedding."""
    stripped = [label.strip() for label in index._labels.alone]
    labels = [[stripped[t] for t in row if t >= 0 and stripped[t].isalpha() and len(stripped[t]) > 2]
              for row in np.asarray(index._stats["top_tokens"]).tolist()]  # fmt: skip

    table = lm.embedding(torch.arange(lm.vocab_size)).float().numpy()

    def embedded(texts: list[str]) -> np.ndarray:
        ids = lm.tokenizer.encode(" " + " ".join(texts), add_special_tokens=False)
        return table[ids].mean(0) - centre

    centre = table.mean(0)
    vectors = np.array([embedded(label) if label else 0 * centre for label in labels])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    matching, nearest = {}, {}
    for word in some:
        matching[word] = first_by_label(index, word, np.array([float(word in " ".join(t).lower()) for t in labels]))
        nearest[word] = int((vectors @ embedded([word])).argmax())
    return matching, nearest


def measure_words(lm: sl.LM, index: sl.FeatureIndex, words: Words) -> dict[str, Any]:
    listed, random = list(words.having), np.random.default_rng(0)
    tables = {word: index._by_words(query.parse(word))[0] for word in listed}  # of all features

    def first(score: Callable[[Any, Any], Any]) -> dict[str, int]:
        of = {w: score(t["share"], t["recall"]) for w, t in tables.items()}
        return {w: int(t["feature"][of[w].argmax()]) if len(of[w]) else -1 for w, t in tables.items()}

    searched = {word: int(table["feature"][0]) if len(table["feature"]) else -1 for word, table in tables.items()}
    tops = {w: by_top_tokens(index, lambda t, w=w: (t.strip() == w) + (w in t)) for w in listed}  # type: ignore[misc]
    matching, nearest = meaning(lm, index, listed)
    ways = {"index.search: recall x share^1/4": searched} | {name: first(score) for name, score in WORD_SCORES.items()}
    ways |= {"among top tokens": {w: int(s.argmax()) if s.max() > 0 else -1 for w, s in tops.items()}}
    ways |= {"density-matched random": {w: matched(index, [max(f, 0)], random)[0] for w, f in searched.items()}}
    ways |= {"labels, matching strings": matching, "labels, by meaning": nearest}
    halves = {"choosing": listed[:WORDS], "test": listed[WORDS:]}
    out: dict[str, Any] = {
        half: {name: words_found(index, words, some, found) for name, found in ways.items()}
        for half, some in halves.items()
    }
    for half, some in halves.items():
        best = np.array([np.nanmax(words.aurocs(word)) for word in some])
        out[half]["any feature"] = {"right": float((best >= GOOD_WORD).mean()), "mean AUROC": float(best.mean())}
    out["words"] = {
        word: {"first": searched[word], "AUROC": float(words.aurocs(word)[searched[word]])} for word in halves["test"]
    }
    return out


# ------------------------------------------------------------------------------------------- sentences


class Texts:
    """A class of sae-probes. codes: each feature's largest code in 50 positive texts, then 50 negative ones."""

    def __init__(self, name: str):
        found = probe_set(name).balanced(200)
        order = np.random.default_rng(4).permutation(100)
        self.whole = len(found.texts) == 200
        self.codes: Any = None
        if self.whole:
            mine, others = ([found.texts[i][:LETTERS] for i in np.flatnonzero(found.labels == side)[order]]
                            for side in (True, False))  # fmt: skip
            self.sentences, self.unused = mine[:SENTENCES], mine[50:] + others[50:]

    def aurocs(self) -> np.ndarray:
        return auroc(self.codes.toarray(), np.arange(100) < 50)


def classes() -> dict[str, Texts]:
    names = [name for name in available_sets() if int(name.split("_")[0]) not in IN_MIX]
    found: dict[str, Texts] = {}
    for name in map(str, np.random.default_rng(3).permutation(names)):
        try:
            texts = Texts(name)
        except ValueError:  # labels that are numbers
            continue
        if texts.whole:
            found[name] = texts
        if len(found) == 2 * CLASSES:
            return found
    raise ValueError(f"only {len(found)} classes of sae-probes have 100 texts of either kind")


# What else a sentence's order could be: from the mean code on it, its number of codes, and the density and mean code on
# the store.
SENTENCE_SCORES: dict[str, Callable[..., Any]] = {
    "mean code": lambda here, density, usual: here,
    "mean code x log(1/density)": lambda here, density, usual: here * -np.log(density),
    "times the usual": lambda here, density, usual: here / usual,
}


def measure_sentences(lm: sl.LM, index: sl.FeatureIndex, found: dict[str, Texts]) -> dict[str, Any]:
    random, rights = np.random.default_rng(0), dict[str, dict[str, list[float]]]()
    usual = np.maximum(index.density * index.mean, 1e-12)
    for name, texts in found.items():
        areas = texts.aurocs()
        rights.setdefault("any feature", {})[name] = [float(np.nanmax(areas) >= GOOD_SENTENCE)]
        for sentence in texts.sentences:
            table = searching.on_sentence(lm, index.coder, sentence, index.density, index.mean)  # all features
            here = np.zeros(len(index))
            here[table["feature"]] = table["times"] * usual[table["feature"]]
            held = set(index.lm.tokenize(sentence).ids[0].tolist())
            stems = {searching.stem(index._labels.lower[i].strip()) for i in held}
            tokens = by_top_tokens(index, lambda t, stems=stems: float(searching.stem(t.strip()) in stems))  # type: ignore[misc]
            first = table["feature"][:FIRST].tolist()
            ways = {"index.search": first, "density-matched random": matched(index, first, random)}
            ways["overlap with top tokens"] = np.argsort(-tokens, kind="stable")[:FIRST].tolist()
            for way, score in SENTENCE_SCORES.items():
                order = np.where(here > 0, score(here, np.maximum(index.density, 1e-9), usual), -np.inf)
                ways[way] = np.argsort(-order, kind="stable")[:FIRST].tolist()
            for way, features in ways.items():
                right = float(bool((areas[features] >= GOOD_SENTENCE).any()))
                rights.setdefault(way, {}).setdefault(name, []).append(right)
    listed, halves = list(found), {}
    for half, some in (("choosing", listed[:CLASSES]), ("test", listed[CLASSES:])):
        within = [name for name in some if rights["any feature"][name][0]]
        halves[half] = {
            way: {"right": float(np.mean([np.mean(of[n]) for n in some])),
                  "right, where any feature is": float(np.mean([np.mean(of[n]) for n in within]))}
            for way, of in rights.items()
        }  # fmt: skip
        halves[half]["classes that any feature tells"] = within
    return halves


# ------------------------------------------------------------------------------------------- latencies


def milliseconds(call: Callable[[], Any], times: int = 5) -> dict[str, float]:
    """The first call; the median of later ones: what passed, and of the processor."""
    spans = []
    for _ in range(times + 1):
        start = time.perf_counter(), time.process_time()
        call()
        spans.append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])))
    passed, processors = np.median(spans[1:], axis=0)
    return {"first": spans[0][0], "later": float(passed), "processor": float(processors)}


def measure_latencies(lm: sl.LM, sae: Any, folder: Path, tokens: int) -> dict[str, Any]:
    if not (folder / "store" / "manifest.json").exists():
        (folder / "store").mkdir(parents=True)
        make_store(lm, folder / "store", tokens)
    index = sl.index_features(sae, lm, sl.Store(folder / "store", tokens), path=folder / "index")
    lines = ["war", "the", "influence", "new york city", "xyzzyx", "density>0.1%", "war density<1%", "label:war"]
    found: dict[str, Any] = {line: milliseconds(lambda line=line: index.search(line)) for line in lines}
    sentence = "The army marched at dawn and took the bridge."
    whole, alone = (milliseconds(call) for call in (
        lambda: index.search(sentence), lambda: read_codes(lm, sae, lm.tokenize(sentence)))
    )  # fmt: skip
    both = {"whole": whole, "pass of the model": alone}
    return {"tokens": tokens, "lines": found, "sentence": both}


# ------------------------------------------------------------------------------------------- the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--only", choices=["words", "latencies"])
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.work or Path(temporary), args)


def kept(file: Path, make: Callable[[], csr_array]) -> csr_array:
    """Codes from a file, or made and written there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_npz(file, make())
    return load_npz(file)


def measure(work: Path, args: argparse.Namespace) -> None:
    lm, sae = sl.LM(), sl.load(CODER)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"machine": processor(), "coder": CODER, "tokens": TOKENS}
    if args.only != "latencies":
        ours, unused = documents()
        store = sl.harvest(lm, sae.site, ours, tokens=TOKENS, context=128, path=work / "store")
        index = sl.index_features(sae, lm, store, path=work / "index")
        words = Words(unused, nouns(ours + unused))
        words.codes = kept(work / "words.npz", lambda: largest(lm, sae, words.texts))
        results["words"] = measure_words(lm, index, words)
        found = classes()
        for name, texts in found.items():
            texts.codes = kept(work / f"{name}.npz", lambda texts=texts: largest(lm, sae, texts.unused))
        results["sentences"] = measure_sentences(lm, index, found)
    if args.only != "words":
        results["latencies"] = measure_latencies(lm, sae, work / "large", args.tokens)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    if args.docs:
        put("docs/howto/features.md", "search", report(results))


def report(results: dict[str, Any]) -> str:
    words, sentences = results["words"]["test"], results["sentences"]["test"]
    names = [("index.search: recall x share^1/4", "`index.search`"), ("among top tokens", "the word among top tokens"),
             ("density-matched random", "a random feature of like density"), ("any feature", "any feature at all"),
             ("labels, matching strings", "labels of top tokens, strings"),
             ("labels, by meaning", "labels of top tokens, embeddings")]  # fmt: skip
    lines = ["| | words: right | mean AUROC |", "|---|---|---|"]
    lines += [f"| {shown} | {words[name]['right']:.2f} | {words[name]['mean AUROC']:.3f} |" for name, shown in names]
    lines += ["", "| | sentences: right | of classes that any feature tells |", "|---|---|---|"]
    for name in ("index.search", "overlap with top tokens", "density-matched random", "any feature"):
        row = sentences[name]
        lines.append(f"| {name} | {row['right']:.2f} | {row['right, where any feature is']:.2f} |")
    if "latencies" in results:
        slow = max(results["latencies"]["lines"].values(), key=lambda one: one["later"])
        both = results["latencies"]["sentence"]
        more = both["whole"]["processor"] - both["pass of the model"]["processor"]
        first = max(one["first"] for one in results["latencies"]["lines"].values())
        lines += ["", f"Over {results['latencies']['tokens']:,} tokens the slowest of eight words and conditions takes "
                  f"{slow['later']:.0f} ms ({slow['processor']:.0f} ms of the processor), the first of all {first:.0f} "
                  f"ms; a sentence one pass of the model and {more:.0f} ms of the processor."]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
