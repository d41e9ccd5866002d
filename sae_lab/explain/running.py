"""sl.explain.explain: explanations of some features, scored, with those of other features as control."""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_lab import cache
from sae_lab.arguments import Count, as_annotated
from sae_lab.explain import explainers
from sae_lab.explain.asking import Asker, name_of
from sae_lab.explain.contexts import Corpus
from sae_lab.explain.explainers import RuleExplainer, explainer_prompt, read_explanation
from sae_lab.explain.scoring import MEASURES, Explanation, Score, check_scored, score
from sae_lab.feature_index import FeatureIndex
from sae_lab.noting import Said
from sae_lab.results import Figure, Result, counted, result
from sae_lab.stats import mean_and_error
from sae_lab.types import check_feature

log = logging.getLogger(__name__)

VERSION = 1
JUDGED = 20  # firing passages of a score, and silent ones
SHOWN_ROWS = 8
SAVE_EVERY = 25  # features between two writes for the inspector


@dataclass(frozen=True)
class ScoredExplanation:
    """One feature's row. score: on its passages; control: of the explanation of feature ``other`` on the same passages.
    failure: why there is no explanation or no score, "" if there are both."""

    feature: int
    text: str = ""
    score: Score = field(default_factory=Score)
    control: Score = field(default_factory=Score)
    other: int = -1
    failure: str = ""


@result
class ExplainedFeatures(Result):
    """Result of ``sl.explain.explain``: one entry of ``rows`` a feature, in the order of the call. Its table has one
    row a feature: explanation, scores, controls, and the share of each kind of passage that was called firing.

    asked: how many questions the explainer and the judge answered.
    """

    rows: tuple[ScoredExplanation, ...]
    explainer: str
    judge: str
    measures: tuple[str, ...]
    seed: int
    asked: str

    _records = "_scored"

    def __getitem__(self, feature: int) -> ScoredExplanation:
        """``scores[812]``: the row of a feature. ValueError for one that was not asked for."""
        for row in self.rows:
            if row.feature == feature:
                return row
        raise ValueError(f"feature {feature} is not among the {len(self.rows)} that were explained")

    @property
    def failed(self) -> tuple[ScoredExplanation, ...]:
        """The rows without an explanation or without a score."""
        return tuple(row for row in self.rows if row.failure)

    def values(self, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """(scores, controls) of the features that have both."""
        pairs = [(getattr(row.score, measure), getattr(row.control, measure)) for row in self.rows]
        found = np.array([p for p in pairs if not any(map(math.isnan, p))]).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def minus_control(self, measure: str) -> tuple[float, float]:
        """(mean of score less control, standard error), paired by feature."""
        own, other = self.values(measure)
        return mean_and_error(own - other)

    def figures(self) -> list[Figure]:
        found = []
        for measure in self.measures:
            own, other = self.values(measure)
            unit = "Pearson correlation" if measure == "simulation" else "balanced accuracy"
            found += [
                Figure(measure, *mean_and_error(own), mean_and_error(other)[0], "another's explanation",
                       f"{unit}, mean over features", "high"),
                Figure(f"{measure} - control", *self.minus_control(measure), meaning="paired by feature", best="high"),
            ]  # fmt: skip
        return found

    def _rows(self) -> list[tuple[str, ...]]:
        first = self.measures[0]
        scored = [(np.nan_to_num(getattr(r.score, first), nan=-1), r) for r in self.rows if not r.failure]
        scored = [row for _, row in sorted(scored, key=lambda pair: -pair[0])]
        best = [
            (f"feature {r.feature}", f"{getattr(r.score, first):.2f}", f"{getattr(r.control, first):.2f}", r.text[:70])
            for r in scored[:SHOWN_ROWS]
        ]
        return [*super()._rows(), *([("best by " + first, "", "", "")] if best else []), *best]

    def _footer(self) -> str:
        reasons = Counter(row.failure for row in self.failed).most_common(4)
        return (
            f"{len(self.rows) - len(self.failed)} of {counted(len(self.rows), 'feature')} scored, "
            f"explained by {self.explainer}, "
            f"judged by {self.judge}; ± over features, seed {self.seed}"
            + "".join(f"; {n} failed: {reason}" for reason, n in reasons) + f"; {self.asked}"
        )  # fmt: skip

    @property
    def _scored(self) -> list[dict[str, Any]]:
        return [
            {"feature": row.feature, "explanation": row.text}
            | {m + of: getattr(s, m) for m in self.measures for of, s in (("", row.score), ("_control", row.control))}
            | {f"called firing: {kind}": share for kind, share in row.score.by_kind.items()}
            | {"other": row.other, "unanswered": row.score.unanswered, "failure": row.failure}
            for row in self.rows
        ]


@as_annotated
def explain(
    index: FeatureIndex,
    features: Sequence[int] | np.ndarray | int = 40,
    explainer: Callable[[str], str] | RuleExplainer | None = None,
    judge: Callable[[str], str] | None = None,
    *,
    measures: Sequence[str] = MEASURES,
    seed: int = 0,
    deadline: float = 60.0,
    retries: Count = 2,
    resume: bool = True,
    negatives: str = "firing",
) -> ExplainedFeatures:
    """``explain(index, 40)``: explain features, and score the explanations on documents that the explainer did not see
    (arXiv:2410.13928).

    The control of each score is the explanation of another feature, judged on the same passages. See
    ``sl.explain.score`` for detection, fuzzing and simulation. Each explanation is written beside the index, and
    ``index[i]``, searches and the inspector show it.

    Args:
        features: their numbers; or how many, drawn at random among those that fire.
        explainer: a ``str -> str`` function, such as ``sl.explain.local_chat()``; None: ``sl.explain.RuleExplainer()``.
        judge: a ``str -> str`` function; None: the explanation's own rule, which free text does not have.
        deadline: seconds for one answer (not of the rules). A question that hangs, raises or has no answer that can be
            read is asked ``retries`` times more; then the feature counts as failed, and the run continues.
        resume: continue an earlier call with the same explainer and judge (by their ``name``, or the function's name)
            and seed; failures are tried again. False: begin anew.
        negatives: the passages in which fuzzing marks wrong tokens: "firing", or "silent", the default of EleutherAI's
            delphi (see ``sl.explain.score``).

    Raises ValueError for features that the coder does not have, free text without a judge, a store of one document.
    """
    explainer = RuleExplainer() if explainer is None else explainer
    if judge is None and not isinstance(explainer, RuleExplainer):
        raise ValueError(
            "free text cannot be judged without a judge: pass judge=, a str -> str function (the explainer itself will "
            "do), or explainer=None for rules"
        )
    check_scored(measures, negatives)
    if not measures:
        raise ValueError(f"no measure given: name at least one of {', '.join(MEASURES)}")
    run = _Run(index, explainer, judge, tuple(measures), seed, deadline, retries, resume, negatives)
    return run(_chosen(index, features, seed))


def _chosen(index: FeatureIndex, features: Sequence[int] | np.ndarray | int, seed: int) -> list[int]:
    if isinstance(features, int):
        live = np.flatnonzero(index.counts > 0)
        if not 1 <= features <= len(live):
            raise ValueError(f"features must be a list or a number from 1 to the {len(live)} live ones, got {features}")
        return np.random.default_rng(seed).choice(live, features, replace=False).tolist()
    chosen = list(dict.fromkeys(check_feature(i, index.d_sae) for i in features))
    if not chosen:
        raise ValueError("no feature to explain: name at least one, or say how many")
    return chosen


class _Run:
    """One call of ``explain``: its questions, and its file beside the index, a line of JSON for each result."""

    def __init__(
        self, index: FeatureIndex, explainer: Any, judge: Any, measures: tuple[str, ...], seed: int, deadline: float,
        retries: int, resume: bool, negatives: str,
    ):  # fmt: skip
        self.index, self.seed, self.measures, self.negatives = index, seed, measures, negatives
        self.corpus = Corpus(index, seed)
        rules = isinstance(explainer, RuleExplainer)
        self.rules: RuleExplainer | None = explainer if rules else None
        self.explainer: Asker | None = None if rules else Asker(explainer, deadline, retries)
        self.judge = None if judge is None else Asker(judge, deadline, retries)
        self.explained_by = name_of(explainer)
        self.judged_by = "its own rule" if judge is None else name_of(judge)
        settings = repr(self.rules) if self.rules else self.explained_by
        how = [] if negatives == "firing" else [negatives]
        identity = json.dumps([VERSION, settings, self.judged_by, measures, seed, explainers.SHOWN, JUDGED, *how])
        self.file = index.path / f"explain-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
        if not resume:
            self.file.unlink(missing_ok=True)
        self.texts, self.scores = _read(self.file)

    def __call__(self, features: list[int]) -> ExplainedFeatures:
        from tqdm.auto import tqdm

        rows = {}
        with tqdm(total=2 * len(features), unit="step", desc="explain", dynamic_ncols=True) as bar:
            failures = {}
            for feature in features:
                failures[feature] = self._explain(feature)
                bar.update()
            others = self._others([i for i in features if not failures[i]])
            try:
                for number, feature in enumerate(features, 1):
                    row = ScoredExplanation(feature, failure=failures[feature])
                    rows[feature] = row if row.failure else self._score(feature, others[feature])
                    bar.update()
                    if number % SAVE_EVERY == 0:
                        self._show(rows)
            finally:
                self._show(rows)
        asked = [f"{who}: {a.summary}" for who, a in (("explainer", self.explainer), ("judge", self.judge)) if a]
        return ExplainedFeatures(
            tuple(rows[i] for i in features), self.explained_by, self.judged_by, self.measures, self.seed,
            "; ".join(asked) or "no question was asked",
        )  # fmt: skip

    def _others(self, explained: list[int]) -> dict[int, int]:
        """The feature whose explanation is each one's control: the next in a random order; -1 for a feature alone."""
        by_text = sorted(explained, key=lambda i: (self.texts[i], i))  # the same draw for any feature numbers
        order = np.random.default_rng([self.seed, 1]).permutation(by_text).tolist()
        return dict(zip(order, [*order[1:], *order[:1]] if len(order) > 1 else [-1], strict=False))

    def _explain(self, feature: int) -> str:
        """Make an explanation, unless there is one; returns the reason of a failure."""
        if feature in self.texts:
            return ""
        firing, silent = self.rules.passages if self.rules else explainers.SHOWN
        passages = self.corpus.passages(feature, "explain", firing, silent, strongest=True)
        if len(passages.firing) < 2:
            return "it fires in fewer than two contexts of the documents to explain from"
        if self.rules:
            text = self.rules.explain(passages)
        else:
            assert self.explainer is not None
            answer = self.explainer.ask(explainer_prompt(passages), read_explanation)
            if answer.value is None:
                return f"no explanation: {answer.failure}"
            text = answer.value
        self.texts[feature] = text
        self._append({"feature": feature, "text": text})
        return ""

    def _score(self, feature: int, other: int) -> ScoredExplanation:
        text = self.texts[feature]
        known = self.scores.get(feature)
        if known is not None and known.other == other:
            return replace(known, text=text)
        passages = self.corpus.passages(feature, "judge", JUDGED, JUDGED)
        row = ScoredExplanation(feature, text, other=other)
        if len(passages.firing) < 2 or len(passages.silent) < 2:
            what = "fires" if len(passages.firing) < 2 else "is silent"
            return replace(row, failure=f"it {what} in fewer than two contexts of the documents to judge on")
        row = replace(row, score=self._judged(text, passages))
        if other >= 0:
            row = replace(row, control=self._judged(self.texts[other], passages))
        if all(math.isnan(getattr(row.score, m)) for m in self.measures):
            return replace(row, failure="the judge gave too few answers that can be read")
        if not row.score.unanswered and not row.control.unanswered:  # else a later call asks again
            self._append(
                {"feature": feature, "other": other, "score": asdict(row.score), "control": asdict(row.control)}
            )
        return row

    def _judged(self, text: str, passages: Any) -> Score:
        return score(Explanation(text), passages, self.judge, self.measures, self.seed, self.negatives)

    def _append(self, record: Mapping[str, Any]) -> None:
        kept = "what was found is kept: make room there and call explain again to go on"
        with cache.told(self.file, kept), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _show(self, rows: Mapping[int, ScoredExplanation]) -> None:
        """Write explanations and scores beside the index, where the inspector reads them."""
        source = self.explained_by if self.judge is None else f"{self.explained_by}, judged by {self.judged_by}"
        self.index.explanations.write({
            i: [Said(row.text, source, {m: getattr(row.score, m) for m in self.measures})]
            for i, row in rows.items() if row.text
        })  # fmt: skip


def _read(file: Path) -> tuple[dict[int, str], dict[int, ScoredExplanation]]:
    """(explanations, scores) of an earlier call. A last line that was cut off is left out, and removed."""
    texts: dict[int, str] = {}
    scores: dict[int, ScoredExplanation] = {}
    whole = file.read_bytes() if file.exists() else b""
    content = whole[: whole.rfind(b"\n") + 1]
    if len(content) < len(whole):
        with open(file, "r+b") as f:
            f.truncate(len(content))
    for number, line in enumerate(content.decode("utf-8").split("\n")[:-1], 1):
        try:
            found = json.loads(line)
            feature = int(found["feature"])
            if "text" in found:
                texts[feature] = found["text"]
            else:
                own, control = (Score(**found[key]) for key in ("score", "control"))
                scores[feature] = ScoredExplanation(feature, "", own, control, found["other"])
        except (ValueError, LookupError, TypeError) as err:
            raise ValueError(f"{file}, line {number} is damaged ({err}): pass resume=False to begin anew") from err
    return texts, scores
