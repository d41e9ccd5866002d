"""Features of uncertainty and of wrong answers, told apart on questions with known answers."""

import math
from collections.abc import Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.reading import coded
from sae_lab.arguments import as_annotated
from sae_lab.edits.edit import Ablate
from sae_lab.evals.sampling import require
from sae_lab.files import read_json
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import pad
from sae_lab.results import Result, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import auroc, mean_and_error

PASS_ROWS = 16  # questions that go through the model together
DRAWS = 5  # sets of random features, ablated as a control
SHUFFLED = "labels shuffled"
LEAST = 5  # questions of the choosing half on which a feature fires
QUESTIONS = Path(__file__).parent.parent / "data" / "questions.json"  # countries and capitals, pairs of opposites


class Question(NamedTuple):
    """prompt + answer is the whole text; kind: "sum", "product", "capital" or "opposite"."""

    prompt: str
    answer: str
    kind: str


@as_annotated
def synthetic_qa(seed: int = 0, n: int = 240) -> list[Question]:
    """``n`` questions made by rule, a quarter of each kind: sums and products of numbers of one or two digits,
    capitals, opposites. Each follows three solved examples of its kind, drawn for it. ValueError for n below 4."""
    if n < 4:
        raise ValueError(f"n must be at least 4, one question of each kind, got {n}")
    random = np.random.default_rng(seed)
    pairs = read_json(QUESTIONS)
    pools = {
        "sum": [(f"{a} + {b} = ", str(a + b)) for a in range(2, 60) for b in range(2, 60)],
        "product": [(f"{a} * {b} = ", str(a * b)) for a in range(2, 16) for b in range(2, 13)],
        "capital": [(f"The capital of {country} is", f" {city}") for country, city in pairs["capital"]],
        "opposite": [(f"The opposite of {a} is", f" {b}") for one in pairs["opposite"] for a, b in (one, one[::-1])],
    }
    out = []
    for i, (kind, pool) in enumerate(pools.items()):
        wanted = n // 4 + (i < n % 4)
        for start in range(0, wanted, len(pool)):  # rounds over all questions, each round with other examples
            for asked in random.permutation(len(pool))[: wanted - start]:
                shown = random.choice([j for j in range(len(pool)) if j != asked], 3, replace=False)
                lines = [f"{pool[j][0]}{pool[j][1]}" for j in shown]
                out.append(Question("\n".join([*lines, pool[asked][0]]), pool[asked][1], kind))
    return [out[i] for i in random.permutation(len(out))]


@result
class Uncertainty(Result):
    """Result of ``sl.evals.uncertainty``.

    Attributes:
        cells: questions that are certain and correct, certain and incorrect, uncertain and correct, uncertain and
            incorrect.
        *_shuffled: the same with labels shuffled.
        auroc_entropy: AUROC for correctness of −entropy. accuracy_change: from ablating ``suppressed``, on questions
            other than those on which these were found; accuracy_change_random: from ablating random features.
        features: their numbers, by class, the strongest first.
    """

    accuracy: float
    entropy: float
    cells: tuple[int, int, int, int]
    pure_uncertainty: int = figure("pure uncertainty features", "|t| > {threshold:g} for uncertain, not for incorrect",
                                   control="pure_uncertainty_shuffled", control_name=SHUFFLED, digits=1)  # fmt: skip
    pure_incorrectness: int = figure(
        "pure incorrectness features", "|t| > {threshold:g} for incorrect, not for uncertain",
        control="pure_incorrectness_shuffled", control_name=SHUFFLED, digits=1,
    )  # fmt: skip
    confounded: int = figure("confounded features", "|t| > {threshold:g} for both",
                             control="confounded_shuffled", control_name=SHUFFLED, digits=1)  # fmt: skip
    pure_uncertainty_shuffled: float
    pure_incorrectness_shuffled: float
    confounded_shuffled: float
    auroc: float = figure("AUROC, 3 features", "of correctness, unseen questions; -entropy has {auroc_entropy:.3f}",
                          control="auroc_shuffled", control_name=SHUFFLED, best="high")  # fmt: skip
    auroc_se: float
    auroc_shuffled: float
    auroc_within: float = figure("AUROC within groups", "the same among questions of one group", best="high",
                                 control="auroc_within_shuffled", control_name=SHUFFLED)  # fmt: skip
    auroc_within_se: float
    auroc_within_shuffled: float
    auroc_entropy: float
    accuracy_before: float
    accuracy_change: float = figure(
        "accuracy change", "{suppressed!n} confounded features ablated; {accuracy_before:.3f} before",
        control="accuracy_change_random", control_name="random features", best="high",
    )  # fmt: skip
    accuracy_change_se: float
    accuracy_change_random: float
    suppressed: tuple[int, ...]
    questions: int
    live: int
    splits: int
    threshold: float
    mask: str
    features: dict[str, list[int]] = field(repr=False, compare=False)
    correct: Tensor = field(repr=False, compare=False)
    uncertain: Tensor = field(repr=False, compare=False)
    entropies: Tensor = field(repr=False, compare=False)

    _below = (
        "{questions} questions: certain {cells[0]} correct, {cells[1]} incorrect; uncertain {cells[2]} correct, "
        "{cells[3]} incorrect; {live} live features; AUROC over {splits} random halves, ± corrected for their overlap; "
        "{mask}"
    )


@as_annotated
@torch.no_grad()
def uncertainty(
    coder: SparseCoder,
    lm: LM,
    prompts: Sequence[str],
    answers: Sequence[str],
    groups: Sequence[str] | None = None,
    threshold: float = 3.0,
    suppress: int = 10,
    splits: int = 20,
    seed: int = 0,
) -> Uncertainty:
    """Which features, at the last token of a question, go with uncertainty and which with a wrong answer.

        qa = sl.evals.synthetic_qa()
        prompts, answers, kinds = zip(*qa)
        sl.evals.uncertainty(sae, lm, prompts, answers, groups=kinds)

    Uncertain: the next token's entropy is above its group's median. Correct: every token of the answer is the
    likeliest. Each live feature f is fitted by f ~ b·uncertain + c·incorrect within groups (least squares on deviations
    from the group's mean); the t statistics class it: pure uncertainty |t_b| > threshold ≥ |t_c|, pure incorrectness
    |t_c| > threshold ≥ |t_b|, confounded if both exceed it. Control: both labels of a question shuffled together within
    groups.

    AUROC: on several random halves, the three features whose AUROC for correctness is farthest from 1/2 are combined by
    logistic regression, which is scored on the other half. Within groups, only pairs of questions of one group are
    compared: a feature that only marks a hard kind of question then scores 1/2.

    Suppression: the features with the largest min(t_b, t_c) > 0 on one half are ablated while the other half is
    answered; control: random features that fire about as often on these questions, mean of five draws.

    Args:
        prompts, answers: questions, and the text that continues each. groups: the kind of each question.
        threshold: of |t|. suppress: features to ablate at most, 0 for none.

    Raises ValueError if prompts and answers do not match, or fewer than 8 answers are right or fewer than 8 wrong.
    """
    rows, starts = _tokenized(lm, prompts, answers)
    n = len(rows)
    if groups is not None and len(groups) != n:
        raise ValueError(f"groups must name the kind of each question, got {len(groups)} for {n} questions")
    require(coder)
    group = np.unique(["" for _ in rows] if groups is None else list(groups), return_inverse=True)[1]
    correct, entropy, codes = _answered(lm, coder, rows, starts)
    if min(int(correct.sum()), int((~correct).sum())) < 8:
        raise ValueError(
            f"the model answers {int(correct.sum())} of {n} questions: 8 right and 8 wrong ones at least are needed, "
            "give easier or harder ones, or more"
        )
    uncertain = entropy > _of_groups(entropy, group, np.median)
    order = np.argsort(-codes.sum(0), kind="stable")  # so that ties and draws depend on rank
    live = order[(codes > 0).sum(0)[order] >= LEAST]
    if len(live) < 3:
        raise ValueError(f"three features must fire on {LEAST} questions or more, got {len(live)}: add questions")
    f, random = codes[:, live], np.random.default_rng(seed)
    t = association(f, uncertain, ~correct, group)
    shuffled = np.mean([_classes(t, threshold).sum(1) for t in _shuffled_t(f, uncertain, correct, group, random)], 0)
    names = ("pure_uncertainty", "pure_incorrectness", "confounded")
    classes = dict(zip(names, _classes(t, threshold), strict=True))
    strength = dict(zip(names, (np.abs(t[0]), np.abs(t[1]), np.abs(t).min(0)), strict=True))
    measured: dict[str, Any] = {name: int(c.sum()) for name, c in classes.items()}
    measured |= {f"{name}_shuffled": float(c) for name, c in zip(names, shuffled, strict=True)}
    measured |= _predict(f, correct, group, splits, random)
    measured |= _suppressed(lm, coder, rows, starts, codes, uncertain, correct, group, suppress, random)
    return Uncertainty(
        accuracy=float(correct.mean()),
        entropy=float(entropy.mean()),
        cells=tuple(int((u & c).sum()) for u in (~uncertain, uncertain) for c in (correct, ~correct)),  # type: ignore
        **measured,
        auroc_entropy=auroc(-entropy[:, None], correct)[0],
        questions=n,
        live=len(live),
        splits=splits,
        threshold=threshold,
        mask=str(coder.mask or lm.mask()),
        features={name: live[c][np.argsort(-strength[name][c], kind="stable")].tolist() for name, c in classes.items()},
        correct=torch.from_numpy(correct),
        uncertain=torch.from_numpy(uncertain),
        entropies=torch.from_numpy(entropy),
    )


def _tokenized(lm: LM, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """(ids of each prompt with its answer, where the answer begins)."""
    if len(prompts) != len(answers) or not len(prompts):
        raise ValueError(f"each prompt needs an answer, got {len(prompts)} prompts and {len(answers)} answers")
    rows, starts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, whole = (lm.tokenize(text).ids[0].tolist() for text in (prompt, prompt + answer))
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise ValueError(
                f"the tokens of a prompt must begin those of prompt + answer, not so for {prompt[-20:]!r} + {answer!r}"
                ": move the space between them to the other side"
            )
        rows.append(whole)
        starts.append(len(ids))
    return rows, starts


def _answered(
    lm: LM, coder: SparseCoder | None, rows: list[list[int]], starts: list[int], edits: Sequence[Ablate] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(whether the answer is right, the next token's entropy in nats, strengths at the prompt's last token) of each
    question; without a coder no strengths."""
    correct, entropy = np.zeros(len(rows), bool), np.zeros(len(rows))
    codes = np.zeros((len(rows), coder.d_sae if coder else 0), np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths together, for little padding
    for first in range(0, len(rows), PASS_ROWS):
        part = order[first : first + PASS_ROWS]
        batch, last = pad([rows[i] for i in part]), torch.tensor([starts[i] - 1 for i in part])
        of_logits: Any = partial(greedy_and_entropy, last=last)
        form = {"greedy": Int[Tensor, " ".join(map(str, batch.ids.shape))], "entropy": Float[Tensor, f"{len(part)}"]}
        sites, writes = [coder.site] if coder else [], Ablate.together(edits, lm, batch)
        acts, said = lm.run(batch, sites, writes, logits=of_logits, form=form)
        right = (said["greedy"][:, :-1] == batch.ids[:, 1:]) | ~batch.mask[:, 1:]
        before = torch.arange(right.shape[1]) < last[:, None]  # only the answer's tokens are checked
        correct[part] = (right | before).all(1).numpy()
        entropy[part] = said["entropy"].numpy()
        if coder:
            x = acts[coder.site]
            found, keep = coded(lm, coder, batch, x)
            row, position = keep.nonzero(as_tuple=True)
            here = (position == last[row])[found.rows]
            strengths = coder.strengths(found, x[keep.to(x.device)]).values
            codes[np.array(part)[row[found.rows[here]]], found.features[here]] = strengths[here]
    return correct, entropy, codes


@no_type_check
def greedy_and_entropy(logits, tokens, last):
    """The likeliest next token at every position, and its distribution's entropy, nats, at one position of each row."""
    scores = logits[torch.arange(len(logits)), last.to(logits.device)].float().log_softmax(-1)
    return {"greedy": logits.argmax(-1).cpu(), "entropy": -(scores.exp() * scores).sum(-1).cpu()}


def _of_groups(values: np.ndarray, group: np.ndarray, of=np.mean) -> np.ndarray:
    """For each question the mean (or median) over its group."""
    return np.stack([of(values[group == g], axis=0) for g in range(group.max() + 1)])[group]


def association(
    f: Float[np.ndarray, "questions features"],
    uncertain: Bool[np.ndarray, " questions"],
    incorrect: Bool[np.ndarray, " questions"],
    group: np.ndarray,
) -> Float[np.ndarray, "two features"]:
    """t of b and of c in f ~ b·uncertain + c·incorrect, with each group's mean subtracted from all three."""
    x = np.stack([uncertain, incorrect], 1).astype(float)
    rounding = 1e-12 * np.square(f, dtype=float).mean(0) + 1e-30  # the variance that rounding gives a constant feature
    x, f = x - _of_groups(x, group), f - _of_groups(f, group)
    inverse = np.linalg.pinv(x.T @ x)
    slopes = inverse @ x.T @ f
    freedom = len(f) - 2 - len(np.unique(group))
    variance = (f - x @ slopes).var(0) * len(f) / max(1, freedom)
    return slopes / np.sqrt(np.maximum(np.diag(inverse)[:, None] * variance, rounding))


def _classes(t: np.ndarray, threshold: float) -> np.ndarray:
    """ "three features": pure uncertainty, pure incorrectness, confounded."""
    b, c = np.abs(t) > threshold
    return np.stack([b & ~c, c & ~b, b & c])


def _shuffled_t(f: np.ndarray, uncertain: np.ndarray, correct: np.ndarray, group: np.ndarray, random, times: int = 20):
    for _ in range(times):
        order = _within(group, random)
        yield association(f, uncertain[order], ~correct[order], group)


def _within(group: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random permutation of the questions within their groups."""
    order = np.empty(len(group), int)
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        order[members] = random.permutation(members)
    return order


def _auroc_within(scores: np.ndarray, positive: np.ndarray, group: np.ndarray) -> float:
    """AUROC over pairs of questions of the same group."""
    total, pairs = 0.0, 0
    for here in (group == g for g in np.unique(group)):
        if many := int((positive & here).sum()) * int((~positive & here).sum()):
            total, pairs = total + many * float(auroc(scores[here, None], positive[here])[0]), pairs + many
    return total / pairs if pairs else math.nan


def _predict(
    f: np.ndarray, correct: np.ndarray, group: np.ndarray, splits: int, random: np.random.Generator
) -> dict[str, float]:
    """AUROC of three features on held-out halves, with true and with shuffled labels. Halves of different splits
    overlap, so the variance of their mean is var·(1/splits + 1), for halves of equal size (Nadeau & Bengio 2003)."""
    found = np.array([
        [*_three(f, correct, group, random), *_three(f, random.permutation(correct), group, random)]
        for _ in range(splits)
    ])  # fmt: skip
    mean = np.nanmean(found, 0)
    error = np.nanstd(found, 0, ddof=1) * math.sqrt(1 / splits + 1) if splits > 1 else np.full(4, np.nan)
    names = ("auroc", "auroc_within", "auroc_shuffled", "auroc_within_shuffled", "auroc_se", "auroc_within_se")
    return dict(zip(names, [*mean.tolist(), *error[:2].tolist()], strict=True))


def _three(f: np.ndarray, correct: np.ndarray, group: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """(AUROC, AUROC within groups) on one half of three features chosen and combined on the other half."""
    from sklearn.linear_model import LogisticRegression

    train = _half(correct, random)
    far = np.abs(auroc(f[train], correct[train]) - 0.5)
    far[(f[train] > 0).sum(0) < LEAST] = 0
    best = np.argsort(-far, kind="stable")[:3]
    x = f[:, best] / np.maximum(f[train][:, best].std(0), 1e-9)
    scores = x @ LogisticRegression().fit(x[train], correct[train]).coef_[0]
    test = ~train
    return float(auroc(scores[test, None], correct[test])[0]), _auroc_within(scores[test], correct[test], group[test])


def _half(correct: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random half of the questions, with half of the right and half of the wrong answers."""
    chosen = np.zeros(len(correct), bool)
    for side in (True, False):
        members = random.permutation(np.flatnonzero(correct == side))
        chosen[members[: len(members) // 2]] = True
    return chosen


def _suppressed(
    lm: LM, coder: SparseCoder, rows: list[list[int]], starts: list[int], codes: np.ndarray, uncertain: np.ndarray,
    correct: np.ndarray, group: np.ndarray, most: int, random: np.random.Generator,
) -> dict[str, float | tuple[int, ...]]:  # fmt: skip
    """Accuracy on one half after ablating features found on the other half, and after ablating random ones."""
    found = _half(correct, random)
    firings = (codes[found] > 0).sum(0)
    order = np.argsort(-codes[found].sum(0), kind="stable")
    live = order[firings[order] >= LEAST]
    both = association(codes[found][:, live], uncertain[found], ~correct[found], group[found]).min(0)
    chosen = live[np.argsort(-both, kind="stable")[: min(most, int((both > 0).sum()))]]
    test = np.flatnonzero(~found)
    none = {"accuracy_before": float(correct[test].mean()), "suppressed": tuple(chosen.tolist())}
    if not len(chosen):
        return none | dict.fromkeys(("accuracy_change", "accuracy_change_se", "accuracy_change_random"), math.nan)

    def change(features: np.ndarray) -> np.ndarray:
        edit = Ablate(coder, sorted(features.tolist()))
        right, *_ = _answered(lm, None, [rows[i] for i in test], [starts[i] for i in test], [edit])
        return right.astype(float) - correct[test]

    others = live[~np.isin(live, chosen)]
    draws = [change(_alike(chosen, others, firings, random)) for _ in range(DRAWS)] if len(others) else [math.nan]
    own, error = mean_and_error(change(chosen))
    return none | dict(accuracy_change=own, accuracy_change_se=error, accuracy_change_random=float(np.mean(draws)))


def _alike(chosen: np.ndarray, others: np.ndarray, firings: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each chosen feature a random one of the ten others of most similar firing rate; none is drawn twice."""
    taken: list[int] = []
    for feature in chosen:
        free = others[~np.isin(others, taken)]
        if not len(free):
            break
        near = free[np.argsort(np.abs(firings[free] - firings[feature]), kind="stable")[:10]]
        taken.append(int(random.choice(near)))
    return np.array(taken)
