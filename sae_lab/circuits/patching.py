"""Activation patching: which places of a model carry what makes it answer as it does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.circuits.metric import ROWS, Metric, copied, measured, paired, placed
from sae_lab.lm.model import LM
from sae_lab.types import Site, TokenBatch, Write

KINDS = ("resid_post", "attn_out", "mlp_out")


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
    batch, theirs = paired(lm, prompts, sources)
    length = batch.ids.shape[1]
    layers = list(range(lm.n_layers)) if layers is None else list(layers)
    positions = list(range(1, length)) if positions is None else list(positions)
    if beyond := [p for p in positions if not 0 <= p < length]:
        raise ValueError(f"position {beyond[0]} is beyond the prompts, which have {length} tokens")
    base, source = measured(lm, batch, metric).mean(), measured(lm, theirs, metric).mean()
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
        copies = copied(batch, len(part))
        where = torch.tensor(part).repeat_interleave(n)
        put = given[:, part].transpose(0, 1).flatten(0, 1)  # of each copy, what it gets
        write = Write(site, partial(placed, where=where, put=put))
        found.append(measured(lm, copies, metric, [write]).view(len(part), n).mean(1))
    return torch.cat(found)
