"""Feature circuits: the features, errors and edges between them that cause a model's answer."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_lab.arguments import as_annotated, check_least
from sae_lab.circuits.attributing import Estimates
from sae_lab.circuits.faithfulness import Faithfulness, faithfulness
from sae_lab.circuits.gradients import require_slope
from sae_lab.circuits.metric import Metric
from sae_lab.circuits.nodes import Edge, Node, checked, edge_effects, in_order, ranked, scene_of, slopes_of
from sae_lab.circuits.pairs import both_runs
from sae_lab.lm.model import LM
from sae_lab.noting import Names
from sae_lab.results import by_column
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site


@dataclass(frozen=True, repr=False)
class FeatureCircuit(Estimates):
    """Result of ``circuits.feature_circuit``. Its table has one row per node, the strongest first.

    Attributes:
        nodes: {Node(site, position, feature): effect}, all active features and all errors (feature -1), the largest
            effect first: the estimated change of the metric when the node is replaced, mean over prompts.
        edges: between the strongest nodes, the largest effect first.
        true_effects: the measured change, of the nodes that were patched.
        faithfulness: of circuits of the strongest nodes; None with sizes=().
        base, source: the metric's mean over the prompts, and over the sources.
        steps, baseline: the arguments of the estimate. tokens: the first prompt's, by position. names: of features, by
            site.
    """

    nodes: dict[Node, float]
    edges: list[Edge]
    true_effects: dict[Node, float]
    faithfulness: Faithfulness | None
    base: float
    source: float
    steps: int
    baseline: str
    tokens: tuple[str, ...]
    names: dict[Site, Names] = field(default_factory=lambda: defaultdict(Names))

    _records = "_table"
    _above = (
        "{nodes!n} nodes, {edges!n} edges; metric {base:.3f}, {source:.3f} with the sources; "
        "effects of replacing a node by its {baseline}, {_how}; the strongest:"
    )

    @property
    def _table(self) -> dict[str, list[Any]]:
        named = {s: names.of(n.feature for n in self.nodes if n.site == s) for s, names in self.names.items()}
        truth = [self.true_effects.get(n, float("nan")) for n in self.nodes]
        rows = [
            (s.key, p, self.tokens[p], f, named.get(s, {}).get(f, ""), *effects)
            for (s, p, f), *effects in zip(self.nodes, self.nodes.values(), truth, strict=True)
        ]
        return by_column("site position token feature name effect truth", rows)

    def name(self, node: Node) -> str:
        """What the node's feature is called, "" for one without a name and for an error."""
        return self.names[node.site][node.feature]

    def edges_to_pandas(self):
        """One row an edge, the strongest first: upstream, its name, downstream, its name, effect."""
        import pandas as pd

        ends = ((e.upstream, e.downstream, e.effect) for e in self.edges)
        rows = [(repr(up), self.name(up), repr(down), self.name(down), effect) for up, down, effect in ends]
        return pd.DataFrame(rows, columns=["upstream", "upstream_name", "downstream", "downstream_name", "effect"])


@as_annotated
def feature_circuit(
    lm: LM,
    coders: Sequence[SparseCoder],
    prompts: Sequence[str],
    sources: Sequence[str],
    metric: Metric,
    *,
    steps: int = 10,
    baseline: str = "source",
    reference: Sequence[str] | None = None,
    sizes: Sequence[int] = (5, 10, 20, 50, 100),
    edges: int = 0,
    check: int = 0,
    draws: int = 5,
    seed: int = 0,
) -> FeatureCircuit:
    """``feature_circuit(lm, [sae_8, sae_16], prompts, sources, metric)``: a sparse feature circuit (Marks et al. 2024,
    arXiv:2403.19647).

    At each coder's site x = Σ_i z_i·W_dec[i] + (b_dec) + error. Nodes are the features and the error, by position.
    The effect of a node, in units of the metric m, mean over prompts:

        feature: (z' - z)·(W_dec[i]·g)      error: (error' - error)·g

    z', error': the source's at the same position (``baseline="source"``), or the mean over the reference ("mean").
    g: dm/dx on the prompts' run (``steps=1``), or its mean over ``steps`` points between x and x', one site at a time
    (integrated gradients). Edges: the effect of replacing a node through a later node, see ``circuits.nodes``; g on
    the prompts' run. Faithfulness: see ``circuits.Faithfulness``. A token that any coder's mask leaves out at any site
    has no nodes, and no run changes it, not even the empty circuit's.

    Args:
        coders: SAEs at different sites of this model, in any order.
        prompts, sources: equal numbers, all of one token length. All prompts share one circuit: a node is a
            feature at a position. metric: (logits, tokens) -> a number for each row, such as ``logit_difference``.
        reference: prompts that means are taken over: position by position if they are as long as the prompts, else
            over all their tokens; None: the prompts and the sources.
        sizes: numbers of nodes that circuits are run with; ``()``: none. Sizes above the number of nodes are left out.
        edges: the number of strongest nodes between which all edges are estimated.
        check: the number of features that are also patched, evenly spread over the ranking by estimates; above 0, all
            errors are patched too. Nodes that replacement leaves unchanged (all those before the first word in which
            prompts and sources differ) are skipped.
        draws, seed: of random circuits.

    Raises ValueError for prompts and sources that do not pair up, a coder that is no SAE of one site, two coders of one
    site, a metric that does not give one number a row or has no gradient, and numbers out of range.
    """
    check_least(1, steps=steps, draws=draws)
    check_least(0, edges=edges, check=check)
    if baseline not in ("source", "mean"):
        raise ValueError(f"baseline must be 'source' or 'mean', got {baseline!r}")
    if wrong := [size for size in sizes if size < 1]:
        raise ValueError(f"sizes are numbers of nodes, at least 1, got {wrong[0]} (the empty circuit is always run)")
    by_site = in_order(lm, coders)
    runs = both_runs(lm, prompts, sources, metric, list(by_site))
    require_slope(lm, metric, runs.batch)
    scene = scene_of(lm, by_site, runs, baseline, reference)
    slopes = slopes_of(scene, metric, steps)
    nodes = ranked(scene, slopes)
    links: list[Edge] = []
    if edges:
        links = edge_effects(scene, list(nodes)[:edges], slopes if steps == 1 else slopes_of(scene, metric, 1))
    sizes = [size for size in sorted(set(sizes)) if size <= len(nodes)]
    curve = faithfulness(scene, list(nodes), metric, runs.base, sizes, draws, seed) if sizes else None
    truth = checked(scene, nodes, check, metric, runs.base)
    tokens = tuple(token.label for token in lm.tokens(runs.batch.ids[0].tolist()))
    names = {site: Names(coder) for site, coder in by_site.items()}
    return FeatureCircuit(nodes, links, truth, curve, runs.base, runs.source, steps, baseline, tokens, names)
