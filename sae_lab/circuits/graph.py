"""Feature circuits: which features, errors and edges between them make a model answer as it does."""

from collections.abc import Sequence
from dataclasses import dataclass

from sae_lab.arguments import as_annotated
from sae_lab.circuits.attributing import correlations
from sae_lab.circuits.edges import Edge, edge_effects
from sae_lab.circuits.faithfulness import Faithfulness, faithfulness
from sae_lab.circuits.metric import Metric, measured, paired
from sae_lab.circuits.nodes import Node, Scene, checked, in_order, kept, mean_parts, node_effects, parts_of, ranked
from sae_lab.lm.model import LM
from sae_lab.results import frame_text
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site


@dataclass(frozen=True, repr=False)
class FeatureCircuit:
    """Result of ``circuits.feature_circuit``.

    Attributes:
        nodes: {Node(site, position, feature): effect}, all active features and all errors (feature -1), the largest
            effect first: what replacing the node is estimated to do to the metric, mean over prompts.
        edges: between the strongest nodes, the largest effect first.
        true_effects: of the nodes that were replaced in truth.
        faithfulness: of circuits of the strongest nodes; None where no sizes were asked for.
        base, source: the metric's mean over the prompts, and over the sources.
        steps, baseline: how effects were estimated. tokens: the first prompt's, by position.
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

    def to_pandas(self):
        """One row a node, the strongest first: site, position, token, feature (-1: the error), effect, truth."""
        import pandas as pd

        nan = float("nan")
        rows = [
            (n.site.key, n.position, self.tokens[n.position], n.feature, effect, self.true_effects.get(n, nan))
            for n, effect in self.nodes.items()
        ]
        return pd.DataFrame(rows, columns=["site", "position", "token", "feature", "effect", "truth"])

    def edges_to_pandas(self):
        """One row an edge, the strongest first: upstream, downstream, effect."""
        import pandas as pd

        rows = [(repr(e.upstream), repr(e.downstream), e.effect) for e in self.edges]
        return pd.DataFrame(rows, columns=["upstream", "downstream", "effect"])

    def agreement(self) -> dict[str, float]:
        """Pearson's and Spearman's correlation of estimate and truth, over the nodes replaced in truth."""
        import numpy as np

        if len(self.true_effects) < 3:
            raise ValueError("agreement needs at least three true effects: pass feature_circuit(..., check=)")
        estimate = np.array([self.nodes[node] for node in self.true_effects])
        return correlations(estimate, np.array(list(self.true_effects.values())))

    def __repr__(self) -> str:
        how = "gradient" if self.steps == 1 else f"integrated gradients, {self.steps} steps"
        best = frame_text(self.to_pandas().head(8), ".4f")
        return (
            f"{len(self.nodes)} nodes, {len(self.edges)} edges; metric {self.base:.3f}, {self.source:.3f} with the "
            f"sources; effects of replacing a node by its {self.baseline}, {how}; the strongest:\n{best}"
        )


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
    """A sparse feature circuit (Marks et al. 2024, arXiv:2403.19647).

    At each coder's site x = Σ_i z_i·W_dec[i] + (b_dec) + error. Nodes are the features and the error, by position.
    The effect of a node, in units of the metric m, mean over prompts:

        feature: (z' - z)·(W_dec[i]·g)      error: (error' - error)·g

    z', error': the source's at the same position (``baseline="source"``), or the mean over the reference ("mean").
    g: dm/dx on the prompts' run (``steps=1``), or its mean over so many points between x and x', one site at a time
    (integrated gradients). Edges: what replacing a node does through a later one, see ``circuits.edge_effects``; g on
    the prompts' run. Faithfulness: see ``circuits.Faithfulness``. Tokens that any coder's mask leaves out at any site
    are no nodes and stay as they are in every run, the empty circuit's too.

    Args:
        coders: SAEs at different sites of this model, in any order.
        prompts, sources: as many, of the same token lengths all together. The circuit is one for all prompts: a node
            is a feature at a position. metric: (logits, tokens) -> a number for each row, such as
            ``logit_difference``.
        reference: prompts that means are taken over, position by position where they are as long as the prompts, else
            over all their tokens; None: the prompts and the sources.
        sizes: numbers of nodes that circuits are run with; ``()``: none. Those beyond all nodes are left out.
        edges: between so many of the strongest nodes all edges are estimated.
        check: so many features are replaced in truth, evenly over the order of their estimates, and all errors; only
            of nodes that replacement changes (none in front of the first word in which prompts and sources differ).
        draws, seed: of random circuits.

    Raises ValueError for prompts and sources that do not pair up, coders that are no SAEs of sites of their own, a
    metric that gives no number a row, and numbers out of range.
    """
    sizes = _check(steps, baseline, sizes, {"edges": edges, "check": check, "draws": draws})
    by_site = in_order(lm, coders)
    scene, source = _scene(lm, by_site, prompts, sources, metric, baseline, reference)
    base = float(measured(lm, scene.batch, metric).mean())
    effects, grads = node_effects(scene, metric, steps)
    nodes = ranked(scene, effects)
    links: list[Edge] = []
    if edges:
        slopes = grads if steps == 1 else node_effects(scene, metric, 1)[1]
        links = edge_effects(scene, list(nodes)[:edges], slopes)
    sizes = [size for size in sizes if size <= len(nodes)]
    curve = faithfulness(scene, list(nodes), metric, sizes, draws, seed) if sizes else None
    truth = checked(scene, nodes, check, metric, base)
    first = prompts if isinstance(prompts, str) else prompts[0]
    tokens = tuple(token.label for token in lm.tokens(first))
    return FeatureCircuit(nodes, links, truth, curve, base, source, steps, baseline, tokens)


def _check(steps: int, baseline: str, sizes: Sequence[int], counts: dict[str, int]) -> list[int]:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if baseline not in ("source", "mean"):
        raise ValueError(f"baseline must be 'source' or 'mean', got {baseline!r}")
    if wrong := [size for size in sizes if size < 1]:
        raise ValueError(f"sizes are numbers of nodes, at least 1, got {wrong[0]} (the empty circuit is always run)")
    for name, value in counts.items():
        if value < (name == "draws"):
            raise ValueError(f"{name} must be at least {int(name == 'draws')}, got {value}")
    return sorted(set(sizes))


def _scene(
    lm: LM, coders: dict[Site, SparseCoder], prompts: Sequence[str], sources: Sequence[str], metric: Metric,
    baseline: str, reference: Sequence[str] | None,
) -> tuple[Scene, float]:  # fmt: skip
    """(scene, the metric's mean over the sources)."""
    batch, theirs = paired(lm, prompts, sources)
    prompts, sources = ([one] if isinstance(one, str) else list(one) for one in (prompts, sources))
    x, given = (lm.run(one, list(coders), logits=False)[0] for one in (batch, theirs))
    keep = kept(lm, coders, batch, x) & kept(lm, coders, theirs, given)
    others = lm.tokenize([*prompts, *sources] if reference is None else list(reference))
    means = mean_parts(lm, coders, others, batch.ids.shape[1])
    clean = parts_of(coders, x, batch.ids)
    if baseline == "source":
        other = parts_of(coders, given, theirs.ids)
    else:
        other = {s: type(part)(*(t.expand(len(batch.ids), -1, -1) for t in part)) for s, part in means.items()}
    return Scene(lm, coders, batch, keep, x, clean, other, means), float(measured(lm, theirs, metric).mean())
