"""SAGE: an agent explains a feature by experiments: it makes hypotheses, writes texts to test them, and judges.

The agent is any function ``str -> str``: a language model behind an API, ``lm.generate``, or ``ScriptedAgent``, which
needs neither. Every prompt ends with a TASK and the form of the answer. Bullets, bold, case and talk around an answer
are ignored; an answer that cannot be read is counted, and the question asked again. All answers are kept.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from sae_lab.arguments import as_annotated, check_least
from sae_lab.explain.prompts import Example, Source, check_coder, random_examples, strongest_activations, top_examples
from sae_lab.explain.scoring import pearson
from sae_lab.lm.model import LM
from sae_lab.results import Figure, Result, counted, figure, result
from sae_lab.saes.base import SparseCoder

Agent = Callable[[str], str]

INTRODUCTION = (
    "You study one feature of a language model. For every text it has an activation: 0 where it is silent. Find out "
    "which property of a text makes it fire. Below, activations are in percent of the strongest in a large corpus."
)


class Trial(NamedTuple):
    """A text that the agent wrote. expected: whether it fires by the hypothesis; activation: the largest measured one;
    fired: whether that is more than half the mean of the feature's ten largest maxima."""

    text: str
    expected: bool
    activation: float
    fired: bool


@dataclass(frozen=True)
class Hypothesis:
    """A statement on what the feature fires on. status: "open", "confirmed", "refuted", or "refined" (replaced by
    another); evidence: the texts it was tried on."""

    statement: str
    status: str = "open"
    evidence: tuple[Trial, ...] = ()

    @property
    def right(self) -> int:
        """The number of trials that agree with the hypothesis."""
        return sum(t.fired == t.expected for t in self.evidence)

    @property
    def agreement(self) -> float:
        """Their share of all trials; NaN without trials."""
        return self.right / len(self.evidence) if self.evidence else math.nan


@result
class Sage(Result):
    """Result of ``sage_explain``.

    Attributes:
        explanation: the agent's conclusion; ``single_pass``: its first hypothesis, from examples alone.
        hypotheses: all, with their evidence. rounds: experiments made. calls: of the agent; ``unread``: answers that
            could not be read; ``transcript``: all (prompt, answer) pairs.
        generation: share of texts written to the explanation that fire (above ``threshold``, half the mean of the
            feature's ten largest maxima); ``single_pass_generation``: to the first one. random_generation: of pieces
            of the corpus drawn at random, the control.
        prediction: Pearson correlation of predicted and measured activations of unseen texts; random_prediction: with
            the predictions shuffled, mean of 100, the control.
        generated: the texts that were written to the explanation, with their activations.
    """

    feature: int
    explanation: str
    single_pass: str
    hypotheses: tuple[Hypothesis, ...]
    rounds: int
    calls: int
    unread: int = figure("unread answers", "of {calls} calls", best="low", digits=0)
    threshold: float
    generation: float = figure("generation accuracy", "share of {generated!n} texts above {threshold:.3g}", best="high",
                               error="_generation_se", control="random_generation", control_name="random text")
    single_pass_generation: float
    random_generation: float
    prediction: float = figure("prediction", "Pearson, predicted and measured activation", best="high",
                               control="random_prediction", control_name="shuffled")  # fmt: skip
    random_prediction: float
    generated: tuple[tuple[str, float], ...] = field(repr=False)
    transcript: tuple[tuple[str, str], ...] = field(repr=False, compare=False)

    @property
    def _generation_se(self) -> float:
        n = len(self.generated)
        return math.sqrt(self.generation * (1 - self.generation) / n) if n else math.nan

    def figures(self) -> list[Figure]:
        unread, generation, prediction = super().figures()
        gain = Figure("gain by experiments", self.generation - self.single_pass_generation, best="high",
                      meaning=f"over a single pass, {self.single_pass_generation:.3f}")  # fmt: skip
        return [generation, gain, prediction, unread]

    def _footer(self) -> str:
        lines = [f"  {h.status:9} {h.right}/{len(h.evidence)} as it says: {h.statement}" for h in self.hypotheses]
        head = f"feature {self.feature}, {counted(self.rounds, 'round')}: {self.explanation or 'no explanation'}"
        return "\n".join([head, *lines, f"  single pass: {self.single_pass or 'none'}"])


@as_annotated
def sage_explain(
    sae: SparseCoder,
    lm: LM,
    source: Source,
    feature: int,
    agent: Agent,
    *,
    rounds: int = 14,
    trials: int = 8,
    generated: int = 10,
    examples: int = 10,
    retries: int = 2,
    seed: int = 0,
) -> Sage:
    """``sage_explain(sae, lm, index, 812, agent)``: explain a feature by experiments: hypotheses from examples, and for
    each a round of texts written to test it, their measured activations, and a verdict: confirmed, refuted or refined.

    Generation accuracy = share of texts, written to the explanation, whose largest activation exceeds ½·mean of the
    feature's 10 largest maxima. Prediction = Pearson r of predicted and measured largest activations of texts that the
    agent has not seen: half of them contexts where the feature fires, half drawn at random. A round tries one
    hypothesis once; rounds end earlier when no hypothesis is open. "SAGE: an agentic explainer framework for
    interpreting SAE features" (2025), which predicts token by token.

    Args:
        source: an index of this coder, or text: of the examples and the random texts.
        agent: any str -> str. Errors that it raises are raised.
        trials: texts a round, half of which should fire. generated: texts that measure the explanation.
        examples: contexts shown, those with the largest activations; the next ones are kept for the prediction.
        retries: how often a question is asked again whose answer cannot be read.

    Raises ValueError for settings out of range, and a feature that never fires in the source.
    """
    check_coder(sae, lm)
    feature = sae.feature(feature)
    if not 0 <= rounds <= 14:
        raise ValueError(f"rounds must lie between 0 and 14, got {rounds}")
    check_least(2, trials=trials, generated=generated, examples=examples)
    check_least(0, retries=retries)
    top = top_examples(sae, lm, [feature], source, max(2 * examples, 10))[feature]
    if not top:
        raise ValueError(f"feature {feature} never fires in the source: choose a live feature, or a longer source")
    drawn = [lm.tokenizer.decode(ids) for ids in random_examples(lm, source, 2 * examples, seed)]
    lab = _Lab(sae, lm, feature, agent, retries, top, drawn, examples)
    opening = lab.hypotheses()
    first = opening[0].statement if opening else ""
    hypotheses, done = lab.experiments(opening, rounds, trials)
    explanation = lab.conclusion(hypotheses, first)
    texts = lab.texts_for(explanation, generated) if explanation else []
    before = texts if first == explanation else lab.texts_for(first, generated)
    reached = lab.activations(texts)
    prediction, shuffled = lab.prediction(explanation, seed)
    return Sage(
        feature=feature, explanation=explanation, single_pass=first, hypotheses=tuple(hypotheses), rounds=done,
        calls=len(lab.transcript), unread=lab.unread, threshold=lab.threshold, generation=lab.share_firing(reached),
        single_pass_generation=lab.share_firing(lab.activations(before)),
        random_generation=lab.share_firing(lab.activations(drawn)), prediction=prediction, random_prediction=shuffled,
        generated=tuple(zip(texts, reached, strict=True)), transcript=tuple(lab.transcript),
    )  # fmt: skip


class _Lab:
    """One feature, the agent that studies it, and the transcript."""

    def __init__(
        self, sae: SparseCoder, lm: LM, feature: int, agent: Agent, retries: int, top: list[Example], drawn: list[str],
        examples: int,
    ):  # fmt: skip
        self.sae, self.lm, self.feature, self.agent, self.retries = sae, lm, feature, agent, retries
        values = [e.value for e in top]
        self.most, self.threshold = values[0], float(np.mean(values[:10])) / 2
        self.unseen = [lm.tokenizer.decode(e.ids) for e in top[examples:]]
        self.drawn, self.fresh = drawn[:examples], drawn[examples:]
        silent = [t for t, v in zip(self.drawn, self.activations(self.drawn), strict=True) if v <= self.threshold]
        shown = [f"{self._percent(e.value)} | {_marked(lm, e)}" for e in top[:examples]]
        self.intro = "\n".join([
            INTRODUCTION, "", "EXAMPLES (the token where the feature is strongest stands in [[ ]]):", *shown, "",
            "OTHER TEXTS (below half):", *(f"0 | {_line(text)}" for text in silent), "",
        ])  # fmt: skip
        self.transcript: list[tuple[str, str]] = []
        self.unread = 0

    def activations(self, texts: Sequence[str]) -> list[float]:
        return strongest_activations(self.sae, self.lm, self.feature, list(texts)).tolist() if texts else []

    def share_firing(self, activations: Sequence[float]) -> float:
        return float(np.mean([a > self.threshold for a in activations])) if activations else 0.0

    def _percent(self, activation: float) -> int:
        return round(100 * activation / self.most)

    def ask(self, task: str, form: str, read: Callable[[str], Any], alone: bool = False) -> Any:
        """What ``read`` makes of the agent's answer, None if it can read none. alone: the prompt has no examples."""
        prompt = f"{INTRODUCTION if alone else self.intro}\n{task}\nAnswer in this form:\n{form}\n"
        for attempt in range(self.retries + 1):
            reminder = "\nYour last answer could not be read. Keep to the form.\n" if attempt else ""
            answer = str(self.agent(prompt + reminder))
            self.transcript.append((prompt + reminder, answer))
            if found := read(answer):
                return found
            self.unread += 1
        return None

    def hypotheses(self) -> list[Hypothesis]:
        task = "TASK: suppose\nGive up to 5 different hypotheses, the likeliest first, one a line."
        found = self.ask(task, "HYPOTHESIS: ...\nHYPOTHESIS: ...", lambda a: lines_of(a, "HYPOTHESIS"))
        return [Hypothesis(statement) for statement in dict.fromkeys(found or [])][:5]

    def experiments(self, opening: list[Hypothesis], rounds: int, trials: int) -> tuple[list[Hypothesis], int]:
        """(all hypotheses, the number of experiments); the successor of a refined hypothesis is tried next."""
        waiting, closed = list(opening), []
        while waiting and len(closed) < rounds:
            one = waiting.pop(0)
            one = replace(one, evidence=self.tried(one, trials))
            status, successor = self.judged(one) if one.evidence else ("open", "")
            closed.append(replace(one, status=status))
            if successor and successor not in {h.statement for h in closed}:
                waiting = [Hypothesis(successor), *(h for h in waiting if h.statement != successor)]
        return closed + waiting, len(closed)

    def tried(self, one: Hypothesis, trials: int) -> tuple[Trial, ...]:
        """Texts for and against with their activations; () if no design can be read."""
        task = (
            f"TASK: design\nHYPOTHESIS: {one.statement}\nWrite {trials} short texts, one a line, that test it: half on "
            "which the feature fires if it is true, half like them on which it is then silent."
        )
        pairs = self.ask(task, "FIRES: ...\nSILENT: ...", design_of) or []
        kinds = [[p for p in pairs if p[1]], [p for p in pairs if not p[1]]]
        chosen = [pair for kind in kinds for pair in kind[: max(1, trials // 2)]]
        values = self.activations([text for text, _ in chosen])
        return tuple(Trial(text, to, v, v > self.threshold) for (text, to), v in zip(chosen, values, strict=True))

    def judged(self, one: Hypothesis) -> tuple[str, str]:
        """(status, the statement that replaces it, or "")."""
        results = "\n".join(
            f"expected {'FIRES' if t.expected else 'SILENT'}, measured {self._percent(t.activation)} "
            f"({'FIRES' if t.fired else 'SILENT'}) | {_line(t.text)}"
            for t in one.evidence
        )
        question = "Is it confirmed, refuted, or to be refined?"
        task = f"TASK: judge\nHYPOTHESIS: {one.statement}\nRESULTS:\n{results}\n{question}"
        form = "VERDICT: confirmed, refuted or refined\nHYPOTHESIS: (only where refined) the better one"
        return self.ask(task, form, verdict_of) or ("open", "")

    def conclusion(self, hypotheses: list[Hypothesis], first: str) -> str:
        """The final explanation; without one that can be read the best confirmed hypothesis, else the first."""
        if not hypotheses:
            return ""
        listed = [f"{h.status} {h.right}/{len(h.evidence)} | {h.statement}" for h in hypotheses]
        task = "\n".join(["TASK: conclude", "HYPOTHESES (trials that went as they say):", *listed,
                          "In one sentence: on what does the feature fire?"])  # fmt: skip
        found = self.ask(task, "EXPLANATION: ...", lambda a: lines_of(a, "EXPLANATION", bullets=False))
        confirmed = [h for h in hypotheses if h.status == "confirmed"]
        best = max(confirmed, key=lambda h: h.agreement).statement if confirmed else first
        return found[0] if found else best

    def texts_for(self, explanation: str, n: int) -> list[str]:
        """n texts that should fire the feature if the explanation is right."""
        if not explanation:
            return []
        question = f"Write {n} different short texts, one a line, on which it fires."
        task = f"TASK: write\nEXPLANATION: {explanation}\n{question}"
        return (self.ask(task, "TEXT: ...\nTEXT: ...", lambda a: lines_of(a, "TEXT"), alone=True) or [])[:n]

    def prediction(self, explanation: str, seed: int) -> tuple[float, float]:
        """(Pearson r of predicted and measured activations of unseen texts, the same with shuffled predictions)."""
        texts = [*self.unseen, *self.fresh[: max(2, len(self.unseen))]]
        rng = np.random.default_rng(seed)
        texts = [texts[i] for i in rng.permutation(len(texts))]
        if not explanation:
            return math.nan, math.nan
        listed = "\n".join(f"{i}. {_line(text)}" for i, text in enumerate(texts, 1))
        question = "How strongly does each fire the feature, from 0 to 100?"
        task = f"TASK: predict\nEXPLANATION: {explanation}\nTEXTS:\n{listed}\n{question}"
        predicted = self.ask(task, "1: 0\n2: 100", lambda a: numbers_of(a, len(texts)), alone=True)
        if predicted is None:
            return math.nan, math.nan
        measured = np.array(self.activations(texts))
        shuffles = [pearson(rng.permutation(predicted), measured) for _ in range(100)]
        return pearson(np.array(predicted), measured), float(np.mean(shuffles))


def lines_of(answer: str, label: str, bullets: bool = True) -> list[str]:
    """The text after ``LABEL:`` of each line that has it; with ``bullets``, if no line has it, the listed lines."""
    labelled = rf"^[\s\-*•>#\d.)(]*{label}\W*?\d*\W*?[:：]\W*?(?=[\w\"'(\[«“])(.+)$"
    found = re.findall(labelled, answer, re.IGNORECASE | re.MULTILINE)
    if not found and bullets:
        found = re.findall(r"^\s*(?:[-*•]|\d+[.):])\s+(.+)$", answer, re.MULTILINE)
    stripped = (_unquoted(text.strip().strip("*").strip()) for text in found)
    return [text for text in stripped if text and text != "..."]


def design_of(answer: str) -> list[tuple[str, bool]] | None:
    """(text, whether it should fire) of a design; None without a text that should."""
    pairs = [(text, label == "FIRES") for label in ("FIRES", "SILENT") for text in lines_of(answer, label, False)]
    return pairs if any(to for _, to in pairs) else None


def verdict_of(answer: str) -> tuple[str, str] | None:
    """(status, the refined hypothesis or ""); None for no verdict, several, or a refined one without hypothesis."""
    verdicts = lines_of(answer, "VERDICT", False)
    told = (verdicts[0] if verdicts else answer).lower()
    told = re.sub(r"not (?:be )?confirm\w*|unconfirmed", "refuted", told)
    kinds = {stem for stem in ("confirm", "refut", "refin") if stem in told}
    if len(kinds) != 1:
        return None
    status = {"confirm": "confirmed", "refut": "refuted", "refin": "refined"}[kinds.pop()]
    if status != "refined":
        return status, ""
    better = lines_of(answer, "HYPOTHESIS", False)
    return (status, better[0]) if better else None


def numbers_of(answer: str, n: int) -> list[float] | None:
    """The numbers of items 1 to n, missing ones as the mean of the others; None if more than half are missing."""
    pairs = re.findall(r"^[\s\-*•>(#]*(\d+)[.):\s*=-]+(\d+(?:\.\d+)?)", answer, re.MULTILINE)
    found = {int(i): float(value) for i, value in pairs if 1 <= int(i) <= n}
    if len(found) < max(1, n / 2):
        return None
    middle = float(np.mean(list(found.values())))
    return [found.get(i, middle) for i in range(1, n + 1)]


def _unquoted(text: str) -> str:
    pairs = ('""', "''", "“”", "«»")
    return text[1:-1] if len(text) > 1 and text[0] + text[-1] in pairs and text.count(text[0]) <= 2 else text


def _line(text: str) -> str:
    return " ".join(text.split())


def _marked(lm: LM, example: Example) -> str:
    """The example on one line, with its peak in double brackets."""
    tokens: list[str] = [*lm.token_strings(example.ids)]
    tokens[example.peak] = f"[[{tokens[example.peak]}]]"
    return _line("".join(tokens))
