"""sl.dose_response: effect and cost of steering a feature, beside controls that need no coder."""

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from itertools import count, islice, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.edits.edit import Push, Steer
from sae_lab.edits.vector import Vector, text_means
from sae_lab.feature_index.summaries import TOP_TOKENS
from sae_lab.lm.model import LM
from sae_lab.lm.text import load_text
from sae_lab.lm.tokens import Texts, is_chat, pad
from sae_lab.noting import Names
from sae_lab.results import Result, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import mean_and_error

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
FEATURE, RANDOM, MEANS, PROMPT = "feature", "random direction", "difference in means", "prompt"


@result
class DoseResponse(Result):
    """Result of ``sl.dose_response``: one row for each method and strength.

    Columns of ``to_pandas()``: method; strength; norm of what is added to every token; log_odds (nats) of the target as
    the next token after the prompts, their mean; se, its standard error over prompts; cost: rise of the loss on the
    other text (nats/token; perplexity grows by exp of it); cost_se, over its texts. "random direction" is a mean over
    seeds.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    feature: int
    target: tuple[str, ...]
    names: Names = field(default_factory=Names, repr=False)

    def at_cost(self, cost: float) -> dict[str, float]:
        """Each method's log-odds at this cost (nats/token), linear between its strengths; NaN if none of its strengths
        costs as much. A prompt has one cost: NaN if it costs more."""
        found = {}
        for method in dict.fromkeys(row["method"] for row in self.rows):
            points = [(r["cost"], r["log_odds"]) for r in self.rows if r["method"] == method]
            prompt = points[0][1] if points[0][0] <= cost else math.nan
            found[method] = prompt if method == PROMPT else _first_crossing(points, cost)
        return found

    _records, _shown, _gap = "rows", 100, " "

    def _footer(self) -> str:
        reached = max(r["cost"] for r in self.rows if r["method"] == FEATURE)
        even = ", ".join(f"{m} {v:.2f}" for m, v in self.at_cost(reached / 2).items())
        return (
            f"feature {self.names.numbered(self.feature)}, target {', '.join(map(repr, self.target))}; log-odds where "
            f"each costs {reached / 2:.3f} nats/token: {even}"
        )


def own_tokens(lm: LM, index: Any, feature: int, n: int = 3) -> list[str]:
    """The n tokens that a feature fires on most, of those that encode to one token; none without an index."""
    texts = [] if index is None else index.top_tokens(feature, TOP_TOKENS)
    return [t for t in texts if len(lm.tokenizer(t, add_special_tokens=False)["input_ids"]) == 1][:n]


def neutral_texts(n: int = 4, characters: int = 300) -> list[str]:
    """The beginnings of held-out documents of the bundled text: texts to measure a cost on."""
    return [document[:characters] for document in islice(load_text().held_out, n)]


def _first_crossing(points: list[tuple[float, float]], cost: float) -> float:
    """The response at the smallest dose that has this cost; points (cost, response) are in the order of doses."""
    for (c0, y0), (c1, y1) in pairwise(points):
        if c0 <= cost <= c1 and c1 > c0:
            return y0 + (y1 - y0) * (cost - c0) / (c1 - c0)
    return math.nan


@as_annotated
def dose_response(
    lm: LM,
    coder: SparseCoder,
    feature: int,
    prompts: str | Texts,
    target: str | Sequence[str],
    text: str | Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    examples: tuple[Sequence[str], Sequence[str]] | None = None,
    ask: str | None = None,
    seeds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> DoseResponse:
    """Steer a feature at several strengths: the target's log-odds and the cost in perplexity, beside controls.

        sl.dose_response(lm, sae, 12, ["I went to the"], [" war"], other_texts,
                         examples=(texts_of_war, texts_of_peace), ask="Speak of war. ")

    Controls: random directions of the same norm; the difference in means of labelled examples at the coder's site, of
    the same norm (``examples``: positive and negative texts, of their tokens that the coder's mask counts); and a
    prompt that asks for the same (``ask``, put before the prompts and before the text). Compare them at equal cost, by
    ``.at_cost``: steering the feature is worth its cost only if it beats every control.

    Args:
        prompts: texts, or chats, which go through the model's template.
        target: a token, or several that count together; each must be one token of this model.
        text: other texts, on which the cost is measured, the same edit at every token.
        seeds: of random directions.
        progress: is called with (measurements done, of how many) before each; what it raises ends the work.

    Raises ValueError for a target of more than one token, strengths that do not begin at 0, fall or are not finite, an
    empty list, another text too short to have a loss, an example without a token that counts, a direction of no length,
    a coder with an ``input_norm``, and what ``sl.Steer`` refuses.
    """
    prompts, targets, text = [prompts] if isinstance(prompts, str) else prompts, tuple(_texts(target)), _texts(text)
    if ask is not None and any(map(is_chat, prompts)):
        raise ValueError("ask is put before texts, and these prompts are chats: ask in one of their messages")
    strengths = [float(s) for s in strengths]
    if not prompts or not text or not targets or seeds < 1:
        raise ValueError("dose_response needs at least one prompt, one target, one other text and one seed")
    if not strengths or strengths[0] != 0 or not all(a < b < math.inf for a, b in pairwise(strengths)):
        raise ValueError(f"strengths begin at 0, where nothing is changed, and rise, all finite, got {strengths}")
    if coder.input_norm != "none" and not coder.transcodes:
        raise ValueError(
            f"dose_response adds one vector at every token, and this coder writes in the size of each token's own "
            f"activation (input_norm={coder.input_norm!r}): take a coder with input_norm='none', or compare sl.Steer "
            "with sl.Steer"
        )
    ids = _single_tokens(lm, targets)
    Steer(coder, feature).writes(lm, lm.tokenize(prompts[0]))  # refuses what it must, before anything runs
    write = (coder.f_scale[feature] * coder.W_dec[feature]).detach().cpu()
    methods, at = _directions(lm, coder, write, examples, seeds), coder.writes[0] if coder.writes else coder.site
    total, done = 1 + (len(strengths) - 1) * sum(map(len, methods.values())) + (ask is not None), count()

    def measure(edits: list[Any], ask: str = "") -> tuple[Tensor, Tensor]:
        if progress is not None:
            progress(next(done), total)
        asked: Any = [ask + str(p) for p in prompts] if ask else prompts
        return _log_odds(lm, asked, ids, edits), _losses(lm, text, edits, ask)

    clean = measure([])
    rows = []
    for method, directions in methods.items():
        for strength in strengths:
            norm = strength * float(write.norm())
            pushes = [Push(Vector(d, at, f_scale=norm, mask=coder.mask)) for d in directions]
            results = [measure([push]) if strength else clean for push in pushes]
            rows.append({"method": method, "strength": strength, "norm": norm} | _row(results, clean))
    if ask is not None:
        rows.append({"method": PROMPT, "strength": math.nan, "norm": 0.0} | _row([measure([], ask)], clean))
    return DoseResponse(rows, coder.feature(feature), targets, Names(coder))


def _texts(given: str | Sequence[str]) -> list[str]:
    """One text, or several, as a list."""
    return [given] if isinstance(given, str) else list(given)


def _directions(
    lm: LM, coder: SparseCoder, write: Tensor, examples: Any, seeds: int
) -> dict[str, list[Float[Tensor, " d"]]]:
    """Unit directions by method."""
    random = torch.randn(seeds, len(write), generator=torch.Generator().manual_seed(0))
    found = {FEATURE: [write], RANDOM: list(random)}
    if examples is not None:
        sites = [coder.writes[0] if coder.writes else coder.site, *coder.reads]
        sides = [text_means(lm, list(dict.fromkeys(sites)), _texts(side), coder.mask or lm.mask()) for side in examples]
        found[MEANS] = [sides[0][0].mean(0) - sides[1][0].mean(0)]
    for method, directions in found.items():
        if any(float(d.norm()) == 0 for d in directions):
            raise ValueError(f"the {method} has no length: its positive and negative examples must differ")
    return {method: [d / d.norm() for d in directions] for method, directions in found.items()}


def _single_tokens(lm: LM, targets: tuple[str, ...]) -> list[int]:
    ids = []
    for target in targets:
        found = lm.tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            pieces = [lm.tokenizer.decode([i]) for i in found]
            raise ValueError(f"a target is one token, {target!r} is {len(found)} ({pieces}): take one of them")
        ids.append(found[0])
    return ids


def _log_odds(lm: LM, prompts: Texts, target: list[int], edits: list[Any]) -> Float[Tensor, " prompt"]:
    """Of the target as the next token after each prompt."""
    last = lm.tokenize(prompts).mask.sum(1) - 1
    logits = lm.logits(prompts, edits=edits)[torch.arange(len(last)), last]
    chance = logits.log_softmax(-1)[:, target].logsumexp(-1)
    return (chance - torch.log1p(-chance.exp())).cpu()


def _losses(lm: LM, text: list[str], edits: list[Any], ask: str) -> Float[Tensor, " text"]:
    """The mean loss of each text's tokens from its second on, the first that an edit reaches; ``ask`` stands before
    each text, and its tokens do not count."""
    first = 0 if lm.prefix_id is None else 1  # of a text's tokens
    before = lm.tokenize(ask.rstrip()).ids[0].tolist() if ask else lm.tokenize(text[0]).ids[0].tolist()[:first]
    batch = lm.tokenize(text)
    rows = [ids[mask].tolist()[first:] for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    losses = lm.loss(pad([before + row for row in rows]), edits=edits, per_token=True)
    found = losses[:, len(before) + 1 :].nanmean(1)
    if bool((short := found.isnan()).any()):
        raise ValueError(
            f"another text needs at least two tokens, since the first has no loss, got "
            f"{text[int(short.nonzero()[0])]!r}: give a longer one"
        )
    return found


def _row(results: list[tuple[Tensor, Tensor]], clean: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Means over the results, with standard errors over prompts and texts; costs are paired with the clean run."""
    log_odds, se = mean_and_error(torch.stack([r[0] for r in results]).mean(0).tolist())
    cost, cost_se = mean_and_error(torch.stack([r[1] - clean[1] for r in results]).mean(0).tolist())
    return {"log_odds": log_odds, "se": se, "cost": cost, "cost_se": cost_se}
