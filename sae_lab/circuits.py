"""Which parts of a model make it answer as it does: patching, and its estimates by gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, Write

KINDS = ("resid_post", "attn_out", "mlp_out")
ROWS = 32  # prompts, or copies of them, that go through the model together
Metric = Callable[[Tensor, TokenBatch], Tensor]  # (logits "batch pos vocab", tokens) -> a number for each row


def logit_difference(lm: LM, right: Sequence[str] | str, wrong: Sequence[str] | str) -> Metric:
    """The metric of most circuit work: at each prompt's last token, logit of the right answer less that of the wrong.

    Args: right, wrong: an answer for all rows, or one for each; each one token.
    """
    ids = [_answers(lm, side) for side in (right, wrong)]

    def metric(logits: Tensor, tokens: TokenBatch) -> Tensor:
        rows = tokens.row_numbers
        last = logits[torch.arange(len(rows)), tokens.mask.sum(1) - 1]
        a, b = (one.expand(int(rows.max()) + 1) if len(one) == 1 else one for one in ids)
        at = torch.arange(len(rows))
        return last[at, a[rows].to(last.device)] - last[at, b[rows].to(last.device)]

    return metric


def _answers(lm: LM, answers: Sequence[str] | str) -> Tensor:
    found = []
    for answer in [answers] if isinstance(answers, str) else answers:
        ids = lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"an answer is one token, {answer!r} is {len(ids)}: take its first, or another")
        found += ids
    return torch.tensor(found)


@dataclass(frozen=True, repr=False)
class PatchGrid:
    """Result of ``circuits.patching``.

    Attributes:
        values: "kind layer pos": the share of the metric that one patch brings over, (patched - base) / (source -
            base), of means over prompts; 0: nothing, 1: all of it.
        base, source: the metric's mean over the prompts, and over the sources.
        kinds, layers, positions: the axes. tokens: what stands at the positions of the first prompt, and of its source.
    """

    values: Float[Tensor, "kind layer pos"]
    base: float
    source: float
    kinds: tuple[str, ...]
    layers: list[int]
    positions: list[int]
    tokens: list[tuple[str, str]] = field(default_factory=list)

    def to_pandas(self):
        """One row a patch."""
        import pandas as pd

        table = [
            {"kind": kind, "layer": layer, "position": position, "effect": float(self.values[i, j, p])}
            for i, kind in enumerate(self.kinds)
            for j, layer in enumerate(self.layers)
            for p, position in enumerate(self.positions)
        ]
        return pd.DataFrame(table)

    def __repr__(self) -> str:
        best = self.to_pandas().sort_values("effect", ascending=False).head(8)
        table = best.to_string(index=False, float_format="{:.3f}".format)  # type: ignore[arg-type]
        return f"metric {self.base:.3f} → {self.source:.3f} with the sources; the strongest patches:\n{table}"


def patching(
    lm: LM,
    prompts: Sequence[str],
    sources: Sequence[str],
    metric: Metric,
    *,
    kinds: Sequence[str] = KINDS,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> PatchGrid:
    """Activation patching: the prompts run again and again, each time with one activation of the sources' run.

    At every kind, layer and position one patch takes what stands there in each source's run into its prompt's (Meng et
    al. 2022, arXiv:2202.05262; "denoising" where the prompts are the corrupted ones).

    Args:
        prompts, sources: as many, of the same token lengths all together.
        metric: (logits, tokens) -> a number for each row, such as ``logit_difference``.
        layers, positions: None: all; position 0, the same everywhere, is left out.

    Raises ValueError for prompts and sources that do not pair up, and a metric that gives no number a row.
    """
    batch, theirs = _paired(lm, prompts, sources)
    length = batch.ids.shape[1]
    layers = list(range(lm.n_layers)) if layers is None else list(layers)
    positions = list(range(1, length)) if positions is None else list(positions)
    if beyond := [p for p in positions if not 0 <= p < length]:
        raise ValueError(f"position {beyond[0]} is beyond the prompts, which have {length} tokens")
    base, source = _measured(lm, batch, metric).mean(), _measured(lm, theirs, metric).mean()
    values = torch.empty(len(kinds), len(layers), len(positions))
    for i, kind in enumerate(kinds):
        for j, layer in enumerate(layers):
            site = Site(kind, layer)
            given = lm.run(theirs, [site], logits=False)[0][site]
            values[i, j] = _patch_positions(lm, batch, site, given, positions, metric)
    there = [(a.label, b.label) for a, b in zip(lm.tokens(prompts[0]), lm.tokens(sources[0]), strict=True)]
    share = (values - base) / (source - base)
    tokens = [there[p] for p in positions]
    return PatchGrid(share, float(base), float(source), tuple(kinds), layers, positions, tokens)


def _patch_positions(
    lm: LM, batch: TokenBatch, site: Site, given: Tensor, positions: list[int], metric: Metric
) -> Float[Tensor, " pos"]:
    """The metric's mean with each position patched; several positions' copies of the prompts go together."""
    n, found = len(batch.ids), []
    at_once = max(1, ROWS // n)
    for start in range(0, len(positions), at_once):
        part = positions[start : start + at_once]
        copies = _copied(batch, len(part))
        where = torch.tensor(part).repeat_interleave(n)

        def write(x: Tensor, tokens: TokenBatch, where: Tensor = where, copies: int = len(part)) -> Tensor:
            out, rows = x.clone(), torch.arange(len(x))
            out[rows, where] = given.repeat(copies, 1, 1)[rows, where].to(x)
            return out

        found.append(_measured(lm, copies, metric, [Write(site, write)]).view(len(part), n).mean(1))
    return torch.cat(found)


def _copied(batch: TokenBatch, times: int) -> TokenBatch:
    """The batch several times over; copies keep their rows' numbers."""
    ids, mask, positions = (t.repeat(times, 1) for t in (batch.ids, batch.mask, batch.positions))
    return TokenBatch(ids, mask, positions, rows=batch.row_numbers.repeat(times))


def _paired(lm: LM, prompts: Sequence[str], sources: Sequence[str]) -> tuple[TokenBatch, TokenBatch]:
    """Both as tokens. ValueError where they do not pair up token by token."""
    prompts, sources = ([one] if isinstance(one, str) else list(one) for one in (prompts, sources))
    if len(prompts) != len(sources) or not prompts:
        raise ValueError(f"give one source for each prompt: got {len(prompts)} prompts and {len(sources)} sources")
    lengths = [len(lm.tokenize(p).ids[0]) for p in [*prompts, *sources]]
    if odd := [i for i, n in enumerate(lengths) if n != lengths[0]]:
        which = f"prompt {odd[0]}" if odd[0] < len(prompts) else f"source {odd[0] - len(prompts)}"
        raise ValueError(
            f"patching needs prompts of equal token lengths, since a patch goes to the same position: prompt 0 has "
            f"{lengths[0]}, {which} has {lengths[odd[0]]} (lm.tokens(prompt) shows them)"
        )
    return lm.tokenize(prompts), lm.tokenize(sources)


def _measured(lm: LM, batch: TokenBatch, metric: Metric, writes: Sequence[Write] = ()) -> Float[Tensor, " batch"]:
    logits = lm.run(batch, writes=writes)[1]
    assert logits is not None
    return _numbers(metric(logits.float(), batch), batch).cpu()


def _numbers(value: Any, batch: TokenBatch) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (len(batch.ids),):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a metric gives one number for each row, {len(batch.ids)} here, this one gave {shape}")
    return value


# ---- features, by gradient and in truth


@dataclass(frozen=True, repr=False)
class Attribution:
    """Result of ``circuits.attribution``: what patching features (and the coder's error) would do to the metric.

    Attributes:
        effects: "pos d_sae": estimated, mean over prompts, in units of the metric; 0 where a feature is active in
            neither run.
        error: " pos": of the coder's error, a node like the others.
        true_effects: by (position, feature), of those that were patched in truth; feature -1 is the error.
        steps: 1: the gradient at the prompts; more: integrated gradients with so many.
    """

    effects: Float[Tensor, "pos d_sae"]
    error: Float[Tensor, " pos"]
    true_effects: dict[tuple[int, int], float]
    base: float
    source: float
    steps: int

    def to_pandas(self):
        """One row a node that was patched in truth, or all active ones where none was: position, feature, estimate,
        truth."""
        import pandas as pd

        places = list(self.true_effects) or [(p, f) for p, f in self.effects.nonzero().tolist()]
        rows = [
            {
                "position": p, "feature": f, "estimate": float(self.error[p] if f < 0 else self.effects[p, f]),
                "truth": self.true_effects.get((p, f), float("nan")),
            }
            for p, f in places
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def agreement(self) -> dict[str, float]:
        """Pearson's and Spearman's correlation of estimate and truth, over the nodes patched in truth."""
        from scipy.stats import pearsonr, spearmanr

        if len(self.true_effects) < 3:
            raise ValueError("agreement needs at least three true effects: pass attribution(..., check=)")
        estimate, truth = (self.to_pandas()[name].to_numpy() for name in ("estimate", "truth"))
        pearson: Any = pearsonr(estimate, truth)
        spearman: Any = spearmanr(estimate, truth)
        return {"pearson": float(pearson[0]), "spearman": float(spearman[0]), "nodes": len(truth)}

    def __repr__(self) -> str:
        table = self.to_pandas()
        best = table.iloc[np.argsort(-table["estimate"].abs().to_numpy())[:8]]
        how = "gradient" if self.steps == 1 else f"integrated gradients, {self.steps} steps"
        return (
            f"metric {self.base:.3f} → {self.source:.3f} with the sources; {how}:\n"
            + best.to_string(index=False, float_format="{:.4f}".format)  # type: ignore[arg-type]
        )


def attribution(
    lm: LM,
    coder: SparseCoder,
    prompts: Sequence[str],
    sources: Sequence[str],
    metric: Metric,
    *,
    steps: int = 1,
    check: int = 0,
) -> Attribution:
    """Attribution patching: (z_source - z)·(W_dec·dm/dx), one backward pass for all features at all positions.

    With ``steps`` > 1 the gradient is the mean over so many points between the two runs' activations (integrated
    gradients, as Marks et al. 2024, arXiv:2403.19647, use them); the error term, x - x_hat, is a node of its own.

    Args:
        coder: an SAE at one site. prompts, sources, metric: as for ``patching``.
        check: so many nodes are patched in truth too, drawn evenly from those active in either run by the size of
            their estimate, and the error node at every position.

    Raises ValueError as ``patching``, and for a coder that reads elsewhere than it writes.
    """
    if coder.transcodes or (coder.writes and coder.writes != coder.reads):
        raise ValueError("attribution takes a coder that writes where it reads: an SAE")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    batch, theirs = _paired(lm, prompts, sources)
    site, mask = coder.site, coder.mask or lm.mask()
    x, given = (lm.run(one, [site], logits=False)[0][site] for one in (batch, theirs))
    keep = mask.keep(batch.ids, batch.positions, {site: x.cpu()}) & mask.keep(
        theirs.ids, theirs.positions, {site: given.cpu()}
    )
    gradient = torch.zeros_like(x)
    for step in range(steps):
        share = (step + 0.5) / steps if steps > 1 else 0.0
        between = x + share * (given - x)
        gradient += lm.gradient(batch, site, lambda out: _numbers(metric(out, batch), batch), between) / steps
    with torch.no_grad():
        z, z_given = coder.encode(x), coder.encode(given)
        wrong = (given - coder(given, theirs.ids).x_hat) - (x - coder(x, batch.ids).x_hat)
        effects = (z_given - z) * (gradient @ coder.W_dec.T) * keep.unsqueeze(-1)
        error = (wrong * gradient).sum(-1) * keep
    n = len(batch.ids)
    base, source = _measured(lm, batch, metric).mean(), _measured(lm, theirs, metric).mean()
    active = (((z > 0) | (z_given > 0)) & keep.unsqueeze(-1)).any(0)
    found = effects.sum(0) / n
    truth: dict[tuple[int, int], float] = {}
    if check:
        nodes = _nodes_to_check(found, active, check) + [(p, -1) for p in range(1, x.shape[1])]
        changes = {(p, f): wrong[:, p] if f < 0 else (z_given - z)[:, p, f, None] * coder.W_dec[f] for p, f in nodes}
        truth = _true_effects(lm, batch, site, keep, changes, metric, float(base))
    return Attribution(found, error.sum(0) / n, truth, float(base), float(source), steps)


def _nodes_to_check(effects: Tensor, active: Tensor, count: int) -> list[tuple[int, int]]:
    """Of the active nodes, evenly over the order of their estimates, the strongest included."""
    places = active.nonzero()
    order = effects[active].abs().argsort(descending=True)
    chosen = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [(int(p), int(f)) for p, f in places[order[torch.from_numpy(chosen)]]]


def _true_effects(
    lm: LM, batch: TokenBatch, site: Site, keep: Tensor, changes: dict[tuple[int, int], Tensor], metric: Metric,
    base: float,
) -> dict[tuple[int, int], float]:  # fmt: skip
    """What adding each change at its position does to the metric's mean."""
    n, found, nodes = len(batch.ids), {}, list(changes)
    at_once = max(1, ROWS // n)
    for start in range(0, len(nodes), at_once):
        part = nodes[start : start + at_once]
        copies = _copied(batch, len(part))
        where = torch.tensor([p for p, _ in part]).repeat_interleave(n)
        added = torch.cat([changes[node] * keep[:, node[0], None] for node in part])

        def write(x: Tensor, tokens: TokenBatch, where: Tensor = where, added: Tensor = added) -> Tensor:
            out = x.clone()
            out[torch.arange(len(x)), where] += added.to(x)
            return out

        means = _measured(lm, copies, metric, [Write(site, write)]).view(len(part), n).mean(1)
        found |= {node: float(mean) - base for node, mean in zip(part, means, strict=True)}
    return found
