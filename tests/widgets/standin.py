"""A small feature index made by hand: features fire on words of one text. For widget tests only.

It reads no file, so that a test notebook can hold this file's text as its first cell.
"""

import math
import re

import numpy as np

from sae_lab.feature_index import FeatureIndex
from sae_lab.feature_index.finding import FoundFeatures

TEXT = """<|endoftext|>In March the river rose over the old stone bridge, and by April the town had a new one.
The council met in June. "We cannot wait until December," said the mayor, "it must open before winter."
<|endoftext|>The red fox crossed the white field at dawn; a black crow followed it from tree to tree.
Nobody in the grey house saw them, for the green shutters stay closed until October.
<|endoftext|>Seven ships left the harbour in May. Three came back in August, two in September.
The captain wrote: "The sea was green, then grey, then black, and on the ninth of July we saw white cliffs."
<|endoftext|>She counted one, two, three, four steps, opened the red door, and read:
<b>closed</b> <script>alert(1)</script> until January. The river froze in February.
In November ten boats lay on the shore of the lake.
<|endoftext|>A bridge of stone, a road of sand, a house by the sea: in May the child drew it in blue and red.
"""

# feature: (words it fires on, strength)
CONCEPTS = {
    812: ("January February March April May June July August September October November December", 9.6),
    17: ("red white black grey green blue", 7.25),
    405: ("one two three Three four seven Seven ninth ten", 5.1),
    1999: ("river sea lake harbour shore ships boats", 6.4),
    2301: ("bridge road house town door", 4.2),
    3070: ("in In until before by at", 2.75),
    4607: ("script", 3.3),
}


def _tokens():
    return re.findall(r"<\|endoftext\|>| ?\w+| ?[^\w\s]+|\n|\s", TEXT)


class StandInView:
    """One feature as a dict, in the form a FeatureView gives."""

    def __init__(self, view):
        self._view = view

    def to_dict(self):
        return self._view


class StandInLog:
    """What names are read from."""

    def __init__(self, notes):
        self.notes = notes

    def refresh(self):
        pass

    def _values(self, feature):
        return self.notes[feature]._asdict()

    def all(self):
        return {feature: self._values(feature) for feature in self.notes.written}


class StandInNote:
    def __init__(self, label="", text=""):
        self.label, self.text = label, text

    def _asdict(self):
        return {"label": self.label, "text": self.text}


class StandInNotes:
    """Notes that live as long as the index."""

    def __init__(self):
        self.written, self.listeners, self._log = {}, [], StandInLog(self)

    def __getitem__(self, feature):
        return self.written.get(feature, StandInNote())

    def heading(self, feature):
        return self[feature].label


class NoExplanations:
    def label(self, feature):
        return ""

    def __getitem__(self, feature):
        return []


class StandIn(FeatureIndex):
    """A feature index over ``TEXT``; features outside ``CONCEPTS`` are dead. It has no coder, store or file."""

    coder = site = density = max = density_histogram = None

    def __init__(self, d_sae=4608):
        self.d_sae = d_sae
        self.notes, self.explanations = StandInNotes(), NoExplanations()
        self.tokens = _tokens()
        self.kept = np.array([token != "<|endoftext|>" for token in self.tokens])
        self.codes = {feature: self._codes(*concept) for feature, concept in CONCEPTS.items()}
        self.density = np.zeros(d_sae)
        self.max = np.zeros(d_sae)
        for feature, codes in self.codes.items():
            self.density[feature] = (codes > 0).sum() / self.kept.sum()
            self.max[feature] = codes.max()
        counts, edges = np.histogram(np.log10(self.density[self.density > 0]), bins=40, range=(-4, 0))
        self.density_histogram = {"counts": counts.tolist(), "edges": edges.tolist()}

    def annotate(self, feature, label=None, text=None):
        self.notes.written[feature] = StandInNote(label, text)
        return self.notes[feature]

    def _codes(self, words, strength):
        words = words.split()
        codes = np.zeros(len(self.tokens))
        for position, token in enumerate(self.tokens):
            if token.strip() in words:
                wave = 0.5 + 0.5 * math.cos(1.7 * position + words.index(token.strip()))
                codes[position] = round(strength * (0.08 + 0.92 * wave), 3)
        return codes

    def best(self, n=1):
        found = [int(feature) for feature in self.order("best")[:n]]
        return found[0] if n == 1 else found

    def order(self, by):
        live = np.array(list(self.codes))
        if by == "best":
            return live
        return live[np.argsort(-getattr(self, by)[live], kind="stable")]

    def search(self, text, against=None, limit=50):
        found = [f for f in self.codes if any(text in token for token in self.top_tokens(f, 99))][:limit]
        return FoundFeatures({"feature": np.array(found, np.int64)}, f"words: {text}")

    def top_tokens(self, feature, n=5):
        if feature not in self.codes:
            return []
        order = np.argsort(-self.codes[feature], kind="stable")
        fired = [self.tokens[i] for i in order if self.codes[feature][i] > 0]
        return list(dict.fromkeys(fired))[:n]

    def __getitem__(self, feature):
        if not 0 <= feature < self.d_sae:
            raise ValueError(f"feature must be from 0 to {self.d_sae - 1}, got {feature}")
        codes = self.codes.get(feature, np.zeros(len(self.tokens)))
        active = codes[codes > 0]
        top = float(active.max()) if len(active) else 0.0
        counts, edges = np.histogram(active, bins=40, range=(0, top or 1))
        promoted = self.top_tokens(feature, 10)
        suppressed = [" the", "\n", " of", " <b>", "?", "  ", "⟨E2⟩"]
        others = [other for other in self.codes if other != feature]
        view = {
            "feature": int(feature),
            "d_sae": self.d_sae,
            "density": float(self.density[feature]),
            "count": len(active),
            "tokens_seen": int(self.kept.sum()),
            "mean": float(active.mean()) if len(active) else 0.0,
            "max": top,
            "f_scale": 0.97 * top,
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "groups": self._groups(codes),
            "promoted": [[token, 3.1 - 0.27 * i] for i, token in enumerate(promoted)],
            "suppressed": [[token, -1.9 + 0.15 * i] for i, token in enumerate(suppressed)],
            "lens_note": "the final norm is not folded in: trust the order" if feature == 17 else "",
            "neighbours": [[other, round(0.61 - 0.07 * i, 2)] for i, other in enumerate(others)],
            "cofiring": [[other, round(0.31 - 0.05 * i, 2), 9 - i] for i, other in enumerate(others)],
            "tokens": list(promoted),
            "names": {},
        }
        return StandInView(view)

    def _groups(self, codes):
        order = [int(i) for i in np.argsort(-codes, kind="stable") if codes[i] > 0]
        quarter = max(1, len(order) // 4)
        groups = [{"label": "top", "contexts": [self._context(codes, i) for i in order[:8]]}]
        for q in range(4):
            part = order[q * quarter : (q + 1) * quarter][:3]
            label = f"quantile {75 - 25 * q}-{100 - 25 * q} %"
            groups.append({"label": label, "contexts": [self._context(codes, i) for i in part]})
        return [group for group in groups if group["contexts"]]

    def _context(self, codes, position, side=20):
        start, stop = max(0, position - side), position + side + 1
        values = [float(codes[i]) if self.kept[i] else None for i in range(len(codes))][start:stop]
        document = sum(token == "<|endoftext|>" for token in self.tokens[: position + 1]) - 1
        return {
            "tokens": self.tokens[start:stop],
            "values": values,
            "peak": position - start,
            "document": document,
            "position": position,
        }
