"""Explainers: a rule found by counting, which needs no network, and the prompt for a language model."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sae_lab.arguments import as_annotated
from sae_lab.explain.contexts import Passages

Explainer = Callable[[str], str]

NEAR = 8  # tokens before, among which "soon after" looks
# The words of each kind of condition. A rule is written as text and read back from it.
PHRASES = {
    "token": "on the tokens",
    "starts": "on words that begin with",
    "ends": "on words that end in",
    "pair": "on the second of",
    "after": "on what comes right after",
    "near": f"within {NEAR} tokens after",
}
_ITEM = re.compile(r'((?:"(?:[^"\\]|\\.)*"\s*)+)\((\d+)\s*%\)')
_AFFIX = (3, 4, 5)  # letters


class Condition(NamedTuple):
    """One condition under which a feature fires. strength: the mean activation under it, as a share of the largest."""

    kind: str
    what: tuple[str, ...]
    strength: float


@as_annotated
@dataclass(frozen=True)
class Rule:
    """``rule.predict(tokens)``: conditions on a token and those before it on which a feature fires.

    ``Rule.read(rule.text)`` is the rule."""

    conditions: tuple[Condition, ...]

    @property
    def text(self) -> str:
        """``fires on the tokens " July" (98 %), " June" (91 %); on what comes right after " of" (12 %)``"""
        if not self.conditions:
            return "fires on nothing in particular"
        groups: dict[str, list[str]] = {}
        for kind, what, strength in self.conditions:
            words = " ".join(json.dumps(w, ensure_ascii=False) for w in what)
            groups.setdefault(kind, []).append(f"{words} ({max(1, round(100 * strength))} %)")
        return "fires " + "; ".join(f"{PHRASES[kind]} {', '.join(items)}" for kind, items in groups.items())

    @classmethod
    def read(cls, text: str) -> "Rule | None":
        """``Rule.read(text)``: the rule that a text states, or None."""
        if text == cls(()).text:
            return cls(())
        if not text.startswith("fires "):
            return None
        found, rest = [], text.removeprefix("fires ")
        while rest:
            kind = next((k for k, phrase in PHRASES.items() if rest.startswith(phrase)), None)
            if kind is None:
                return None
            rest = rest[len(PHRASES[kind]) :]
            while match := _ITEM.match(rest.lstrip(" ,")):
                words = tuple(json.loads(w) for w in re.findall(r'"(?:[^"\\]|\\.)*"', match[1]))
                found.append(Condition(kind, words, int(match[2]) / 100))
                rest = rest.lstrip(" ,")[match.end() :]
            if rest and not rest.startswith("; "):
                return None
            rest = rest[2:]
        return cls(tuple(found))

    def predict(self, tokens: Sequence[str]) -> np.ndarray:
        """Activation of each token as a share of the largest: the top strength of the conditions that hold, or 0."""
        known = {(kind, what): strength for kind, what, strength in self.conditions}
        return np.array([
            max((known.get(fact, 0.0) for fact in facts(tokens, i)), default=0.0) for i in range(len(tokens))
        ])  # fmt: skip


def facts(tokens: Sequence[str], at: int) -> set[tuple[str, tuple[str, ...]]]:
    """All (kind, what) that hold at one of the tokens."""
    token = tokens[at]
    found: set[tuple[str, tuple[str, ...]]] = {("token", (token,))}
    word = token.strip().lower()
    if word.isalpha():
        if token.startswith(" "):
            found |= {("starts", (word[:n],)) for n in _AFFIX if len(word) > n}
        found |= {("ends", (word[-n:],)) for n in _AFFIX if len(word) > n}
    if at:
        found |= {("after", (tokens[at - 1],)), ("pair", (tokens[at - 1], token))}
    return found | {("near", (t,)) for t in tokens[max(0, at - NEAR) : at]}


@as_annotated
@dataclass(frozen=True)
class RuleExplainer:
    """``explain(index, 40, RuleExplainer(most=5))``: an explainer that counts conditions on a token and those before it
    (``PHRASES``).

    Conditions are added as long as one raises, by ``gain`` or more,

        mean over firing passages of [a condition holds where the feature fires]
        - mean over silent passages of [a condition holds anywhere]

    the one that raises it most first (times the share of its tokens at which the feature fires). A condition must hold
    at firing tokens of two passages of two documents, and the feature must fire at a share of ``precision`` of the
    tokens of firing passages at which the condition holds.

    It reads ``passages`` (firing, silent) of the documents to explain from. Rules have no words for a topic, a sense or
    a syntactic role; a language model does.
    """

    gain: float = 0.005
    precision: float = 0.3
    most: int = 20
    passages: tuple[int, int] = (300, 300)
    name: str = field(default="rules", init=False)

    def explain(self, passages: Passages) -> str:
        """The rule's text."""
        return self.rule(passages).text

    def rule(self, passages: Passages) -> Rule:
        """The rule itself."""
        held = _Held(passages)
        precise = held.candidates(self.precision)
        candidates = {fact: where for fact, (*where, _) in precise.items()}
        chosen: list[tuple[str, tuple[str, ...]]] = []
        right, wrong = np.zeros(len(passages.firing), bool), np.zeros(len(passages.silent), bool)
        while candidates and len(chosen) < self.most:
            gains = {fact: (hit & ~right).mean() - (_mean(false & ~wrong)) for fact, (hit, false) in candidates.items()}
            worth = [fact for fact in gains if gains[fact] >= self.gain]
            if not worth:
                break
            best = max(worth, key=lambda fact: (gains[fact] * precise[fact][2], -len(fact[1]), fact))
            chosen.append(best)
            hit, false = candidates.pop(best)
            right, wrong = right | hit, wrong | false
        return Rule(tuple(Condition(*fact, held.strength(fact) / (passages.largest or 1.0)) for fact in chosen))


class _Held:
    """The places in a feature's passages at which each fact holds."""

    def __init__(self, passages: Passages):
        self._passages = passages
        self._places: dict[tuple[str, tuple[str, ...]], list[tuple[int, int]]] = {}
        wanted = self._at_firing()
        for number, passage in enumerate(passages.all):
            for at in np.flatnonzero(passage.known).tolist():
                for fact in facts(passage.tokens, at) & wanted:
                    self._places.setdefault(fact, []).append((number, at))

    def _at_firing(self) -> set[tuple[str, tuple[str, ...]]]:
        """Facts that hold at firing tokens of two passages at least, of two documents if there are two."""
        where: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
        for passage in self._passages.firing:
            for fact in set().union(*(facts(passage.tokens, at) for at in np.flatnonzero(passage.fires).tolist())):
                where[fact].append(passage.document)
        needed = min(2, len({passage.document for passage in self._passages.firing}))
        return {fact for fact, documents in where.items() if len(documents) >= 2 and len(set(documents)) >= needed}

    def candidates(self, precision: float) -> dict[tuple[str, tuple[str, ...]], tuple[np.ndarray, np.ndarray, float]]:
        """Facts of at least that precision: (firing passages in which each holds at a firing token, silent passages in
        which it holds, its precision: the share of its tokens in firing passages at which the feature fires)."""
        firing = len(self._passages.firing)
        every = self._passages.all
        found = {}
        for fact, places in self._places.items():
            hit, false = np.zeros(firing, bool), np.zeros(len(every) - firing, bool)
            right = held = 0
            for number, at in places:
                if number < firing:
                    held += 1
                    fires = every[number].values[at] > 0
                    right += fires
                    hit[number] |= fires
                else:
                    false[number - firing] = True
            if held and right >= precision * held:
                found[fact] = hit, false, right / held
        return found

    def strength(self, fact: tuple[str, tuple[str, ...]]) -> float:
        """Mean activation at the tokens at which a fact holds, silent ones included."""
        every = self._passages.all
        return float(np.mean([every[number].values[at] for number, at in self._places[fact]]))


def _mean(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0


SHOWN = (20, 10)  # firing and silent passages in a prompt
_INSTRUCTIONS = """\
A feature of a language model fires on some tokens of a text and is silent on all others. Below are passages in which \
it fires, with the tokens on which it does between << and >> and its strength there (1 to 10) listed behind, and \
passages in which it is silent throughout.

What does the feature fire on? Name the tokens and, where they matter, what has to stand around them. Be specific: the \
answer must also rule out the silent passages. Write one line that begins with "EXPLANATION:" and nothing after it.
"""


def explainer_prompt(passages: Passages) -> str:
    """The prompt for an explainer that is a ``str -> str`` function."""
    lines = [_INSTRUCTIONS, "Passages in which it fires:"]
    for number, passage in enumerate(passages.firing, 1):
        at = np.flatnonzero(passage.fires).tolist()
        sizes = {i: max(1, round(10 * float(passage.values[i]) / passages.largest)) for i in at}
        strengths = ", ".join(f"{passage.tokens[i]!r} {size}" for i, size in sizes.items())
        lines.append(f"{number}. {marked(passage.tokens, at)}\n   fires: {strengths}")
    lines.append("\nPassages in which it is silent:")
    lines += [f"{number}. {passage.text}" for number, passage in enumerate(passages.silent, 1)]
    return "\n".join([*lines, "\nEXPLANATION:"])


def read_explanation(answer: str) -> str:
    """The explanation in an answer: the text after the last "EXPLANATION:", or all of it. ValueError for a text of less
    than three letters."""
    text = " ".join(answer.rsplit("EXPLANATION:", 1)[-1].split())
    if sum(c.isalpha() for c in text) < 3:
        raise ValueError(f"no explanation in the answer {answer[:60]!r}")
    return text


def marked(tokens: Sequence[str], at: Iterable[int]) -> str:
    """The text with some tokens between << and >>."""
    chosen = set(at)
    return "".join(f"<<{token}>>" if i in chosen else token for i, token in enumerate(tokens))
