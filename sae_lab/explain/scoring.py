"""How well an explanation predicts where its feature fires: detection, fuzzing and simulation.

Detection and fuzzing: Juang et al. 2024 and Paulo et al. 2024 (arXiv:2410.13928); simulation: Bills et al. 2023.
A judge is any ``str -> str`` callable; None lets the explanation's own rule judge (``Rule.predict``).
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from sae_lab.arguments import as_annotated
from sae_lab.explain.asking import Asker
from sae_lab.explain.contexts import Passage, Passages
from sae_lab.explain.explainers import Rule, marked

MEASURES = ("detection", "fuzzing", "simulation")
NEGATIVES = ("firing", "silent")  # the passages in which fuzzing marks wrong tokens
AT_ONCE = {"detection": 10, "fuzzing": 10, "simulation": 5}  # passages in a question
SCALE = 10  # a judge's strongest activation


@as_annotated
@dataclass(frozen=True)
class Explanation:
    """``Explanation("names of months")``: a description of a feature. source: its author."""

    text: str
    source: str = ""

    @property
    def rule(self) -> Rule | None:
        """The rule the text states, None where it is free text."""
        return Rule.read(self.text)

    def predict(self, tokens: Sequence[str]) -> np.ndarray:
        """Activation at each token as a share of the largest, by the rule. ValueError for free text, which needs a
        judge."""
        return _rule(self).predict(tokens)


@dataclass(frozen=True)
class Score:
    """Scores of one explanation on one feature's passages.

    detection, fuzzing: balanced accuracy, .5 by chance; simulation: Pearson correlation, 0 by chance; NaN for too few
    passages or answers. by_kind: the share of passages that detection judged as firing, for each kind of passage
    (``Passage.kind``) and each fifth of the activations, 5 the strongest. unanswered: passages without an answer that
    can be read, which do not count.
    """

    detection: float = math.nan
    fuzzing: float = math.nan
    simulation: float = math.nan
    by_kind: dict[str, float] = field(default_factory=dict)
    unanswered: int = 0


@as_annotated
def score(
    explanation: Explanation,
    passages: Passages,
    judge: Asker | None = None,
    measures: Sequence[str] = MEASURES,
    seed: int = 0,
    negatives: str = "firing",
) -> Score:
    """``score(Explanation("names of months"), passages, judge)``: score an explanation on passages that its explainer
    did not see; judge None: by the explanation's own rule.

    Detection: is the feature active anywhere in this passage? Balanced accuracy = (share of firing passages called
    firing + share of silent passages called silent) / 2. Fuzzing: some tokens of each passage are marked; are those the
    ones on which the feature fires? Balanced accuracy. Simulation: Pearson correlation of predicted and true
    activations over all tokens of all passages; 0 for a constant prediction.

    Args:
        negatives: what fuzzing marks wrongly. "firing": half of the firing passages are marked at the tokens on which
            the feature fires, half at equally many silent tokens, so that only the mark tells them apart (close to
            ``fuzz_type="active"`` of EleutherAI's delphi). "silent", delphi's default: all firing passages are marked
            where the feature fires, and silent passages at random tokens, as many as fire in a firing one on average,
            rounded up. A judge can then answer from the passage alone, as in detection. (delphi marks as right only
            tokens of .3 of an example's largest activation or more, and among the wrong ones always the place at which
            its passages fire; here all that fire are marked, and any place.)

    ValueError for free text without a judge, and for an unknown measure or kind of negatives.
    """
    check_scored(measures, negatives)
    if judge is None:
        _rule(explanation)
    random = np.random.default_rng([seed, *(p.document for p in passages.firing)])  # for any number
    ways = {"detection": detection, "fuzzing": partial(fuzzing, negatives=negatives), "simulation": simulation}
    found = {name: way(explanation, passages, judge, random) for name, way in ways.items() if name in measures}
    by_kind = found["detection"].by_kind if "detection" in found else {}
    unanswered = sum(one.unanswered for one in found.values())
    return Score(**{name: getattr(one, name) for name, one in found.items()}, by_kind=by_kind, unanswered=unanswered)


def check_scored(measures: Sequence[str], negatives: str) -> None:
    if unknown := [m for m in measures if m not in MEASURES]:
        raise ValueError(f"measures are {', '.join(MEASURES)}, got {unknown[0]!r}")
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives are {' or '.join(map(repr, NEGATIVES))} passages, got {negatives!r}")


def _rule(explanation: Explanation) -> Rule:
    rule = explanation.rule
    if rule is None:
        raise ValueError(
            f"{explanation.text[:60]!r} is free text, which a rule cannot apply: pass judge=, a function of a prompt "
            "that returns a language model's answer (sl.explain.openai_compatible, sl.explain.local_chat)"
        )
    return rule


def balanced(truth: np.ndarray, said: np.ndarray) -> float:
    """Balanced accuracy: mean of the shares of right answers among true and among false ones. NaN without both."""
    if truth.all() or not truth.any():
        return math.nan
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation, 0 where ``a`` (the prediction) is constant, NaN where ``b`` is."""
    a, b = a.astype(np.float64) - a.mean(), b.astype(np.float64) - b.mean()
    if not b.any():
        return math.nan
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread > 0 else 0.0


def detection(explanation: Explanation, passages: Passages, judge: Asker | None, random: np.random.Generator) -> Score:
    every = [passages.all[i] for i in random.permutation(len(passages.all))]
    if judge is None:
        said = [bool((explanation.predict(p.tokens) > 0).any()) for p in every]
    else:
        said = _flags(judge, "detection", explanation, [p.text for p in every])
    groups: dict[str, list[bool]] = {}
    for passage, answer in zip(every, said, strict=True):
        if answer is not None:
            groups.setdefault(passage.kind, []).append(answer)
            if passage.kind == "fires":
                groups.setdefault(f"fires, fifth {passage.quantile + 1}", []).append(answer)
    by_kind = {kind: float(np.mean(answers)) for kind, answers in sorted(groups.items())}
    accuracy, unanswered = _accuracy([p.kind == "fires" for p in every], said)
    return Score(detection=accuracy, by_kind=by_kind, unanswered=unanswered)


def fuzzing(
    explanation: Explanation, passages: Passages, judge: Asker | None, random: np.random.Generator,
    negatives: str = "firing",
) -> Score:  # fmt: skip
    fires = [np.flatnonzero(p.fires) for p in passages.firing]
    if negatives == "silent":
        usual = math.ceil(np.mean([len(at) for at in fires])) if fires else 0
        shown = [(p, at, True) for p, at in zip(passages.firing, fires, strict=True)]
        shown += [(p, _silent_tokens(p, min(usual, int(p.known.sum())), random), False) for p in passages.silent]
    else:
        shown = [
            (p, at if number % 2 == 0 else _silent_tokens(p, len(at), random), number % 2 == 0)
            for number, (p, at) in enumerate(zip(passages.firing, fires, strict=True))
        ]
    usable = [one for one in shown if len(one[1])]
    usable = [usable[i] for i in random.permutation(len(usable))]
    if judge is None:
        said = [bool((explanation.predict(p.tokens)[at] > 0).mean() >= 0.5) for p, at, _ in usable]
    else:
        said = _flags(judge, "fuzzing", explanation, [marked(p.tokens, at.tolist()) for p, at, _ in usable])
    accuracy, unanswered = _accuracy([right for _, _, right in usable], said)
    return Score(fuzzing=accuracy, unanswered=unanswered)


def _accuracy(truth: Sequence[bool], said: Sequence[bool | None]) -> tuple[float, int]:
    """(balanced accuracy of the answers, the number of passages without one)."""
    pairs = [(right, answer) for right, answer in zip(truth, said, strict=True) if answer is not None]
    answered = np.array(pairs, bool).reshape(-1, 2)
    return balanced(answered[:, 0], answered[:, 1]), len(said) - len(pairs)


def _silent_tokens(passage: Passage, n: int, random: np.random.Generator) -> np.ndarray:
    """n tokens on which the feature is silent, or none if there are fewer."""
    silent = np.flatnonzero(passage.known & ~passage.fires)
    return np.sort(random.choice(silent, n, replace=False)) if len(silent) >= n else silent[:0]


def simulation(explanation: Explanation, passages: Passages, judge: Asker | None, random: np.random.Generator) -> Score:
    every = [passages.all[i] for i in random.permutation(len(passages.all))]
    if judge is None:
        predicted: list[np.ndarray | None] = [explanation.predict(p.tokens) for p in every]
    else:
        texts, sizes = [json.dumps(p.tokens, ensure_ascii=False) for p in every], [len(p.tokens) for p in every]
        predicted = _asked(judge, "simulation", explanation, texts, lambda said, at: read_activations(said, sizes[at]))
    pairs = [(a[p.known], p.values[p.known]) for a, p in zip(predicted, every, strict=True) if a is not None]
    unanswered = sum(a is None for a in predicted)
    if not pairs:
        return Score(unanswered=unanswered)
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return Score(simulation=pearson(a, b), unanswered=unanswered)


QUESTION = """\
A feature of a language model is described below. {task}, and nothing else.

FEATURE: {explanation}

{passages}

ANSWER:"""
TASKS = {
    "detection": (
        "For each numbered passage say whether the feature fires anywhere in it: 1 if it does, 0 if it does not. "
        "Answer with a JSON list of {n} numbers, in order"
    ),
    "fuzzing": (
        "In each numbered passage some tokens stand between << and >>. Say whether those are the tokens on which the "
        "feature fires: 1 if they are, 0 if others were marked. Answer with a JSON list of {n} numbers, in order"
    ),
    "simulation": (
        "Each numbered passage is given as a JSON list of its tokens. Predict how strongly the feature fires on each "
        "token, from 0 (silent) to 10. Answer with a JSON list that holds one list of numbers for each passage, as "
        "long as the passage has tokens"
    ),
}


def _flags(judge: Asker, measure: str, explanation: Explanation, texts: Sequence[str]) -> list[bool | None]:
    return _asked(judge, measure, explanation, texts, lambda said, at: read_flags(said, len(texts[at])))


def _asked(
    judge: Asker, measure: str, explanation: Explanation, texts: Sequence[str], read: Callable[[str, slice], list[Any]]
) -> list[Any]:
    """The judge's answers on the passages, None for those without one that can be read. read: (answer, the passages
    it is about)."""
    said: list[Any] = []
    for start in range(0, len(texts), AT_ONCE[measure]):
        at = slice(start, start + AT_ONCE[measure])
        answer = judge.ask(_filled(measure, explanation, texts[at]), lambda text, at=at: read(text, at))
        said += answer.value or [None] * len(texts[at])
    return said


def _filled(measure: str, explanation: Explanation, texts: Sequence[str]) -> str:
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
    # One part after the other: braces in a passage or an explanation are text.
    parts = {"{n}": str(len(texts)), "{explanation}": explanation.text, "{passages}": numbered}
    question = QUESTION.replace("{task}", TASKS[measure])
    return "".join(parts.get(piece, piece) for piece in re.split(r"(\{n\}|\{explanation\}|\{passages\})", question))


def read_flags(answer: str, n: int) -> list[bool]:
    """n noughts and ones from the last list in an answer. ValueError if there is no such list."""
    for found in reversed(re.findall(r"\[[^\[\]]*\]", answer)):
        values = re.split(r"[\s,]+", found.strip("[] \n"))
        if len(values) == n and all(v in ("0", "1") for v in values):
            return [v == "1" for v in values]
    raise ValueError(f"no list of {n} noughts and ones")


def read_activations(answer: str, lengths: Sequence[int]) -> list[np.ndarray]:
    """A list of numbers from 0 to 10 a passage, as shares of 10. ValueError for other lengths or numbers."""
    start, stop = answer.find("["), answer.rfind("]")
    try:
        lists = json.loads(answer[start : stop + 1]) if 0 <= start < stop else None
        lists = [lists] if isinstance(lists, list) and lists and not isinstance(lists[0], list) else lists
        found = [np.array(values, np.float64) for values in lists or []]
    except (ValueError, TypeError):
        raise ValueError("no list of lists of numbers") from None
    if [len(v) if v.ndim == 1 else -1 for v in found] != list(lengths):
        raise ValueError("the lists of numbers are not as long as the passages")
    if any(not ((v >= 0) & (v <= SCALE)).all() for v in found):
        raise ValueError(f"activations must be numbers from 0 to {SCALE}")
    return [v / SCALE for v in found]
